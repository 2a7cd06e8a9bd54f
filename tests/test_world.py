"Toyland: alike in every process, recordings of only what a sensor carries, files that read back."

import itertools
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibllm.config import MODALITIES
from ibllm.files import write_atomically
from ibllm.inputs.processor import Processor
from ibllm.toyland.recipes import TOYLAND_INPUTS, read_recording, train_tokenizer
from ibllm.toyland.sensors import make_shape, make_shapes, record, write_files
from ibllm.toyland.world import (
    ATTRIBUTES,
    CARRIES,
    COLOURS,
    DESCRIPTIONS,
    KINDS,
    MOTIONS,
    PLACE,
    PURPOSE,
    QUESTIONS,
    SIZES,
    SPLITS,
    Things,
    answer,
    ask,
    ask_in_words,
    describe,
    draw_things,
    generator,
    is_pictured,
    one_thing,
    read_attributes,
    split_things,
    uniform,
)

SAMPLES = Path(__file__).parents[1] / "data" / "samples"
UNSEEN = "validation_unseen", "test_unseen"


@pytest.fixture(scope="module")
def things():
    return draw_things(40, seed=4)


@pytest.fixture(scope="module")
def recording(things):
    return record(things, seed=4)


@pytest.fixture(scope="module")
def every_thing():
    sizes = [range(len(words)) for words in ATTRIBUTES.values()]
    return Things(*torch.tensor(list(itertools.product(*sizes))).T)


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Things


def test_modalities_are_in_the_order_used_everywhere():
    assert MODALITIES == ("image", "video", "text", "audio", "point", "depth", "thermal", "imu")


def test_things_can_be_picked_counted_and_read(things):
    assert len(things[3]) == len(things[-1]) == 1 and things[3].words(0) == things.words(3)
    assert len(things[5:9]) == 4 and len(things[things.size == 0]) == (things.size == 0).sum()
    assert [t.words(0) for t in things] == [things.words(i) for i in range(len(things))]


def test_things_show_the_first_few_as_words():
    assert (
        repr(one_thing("bell", "yellow", motion="bouncing"))
        == "Things(1): big yellow bell, bouncing"
    )
    assert repr(draw_things(3, 0)).count(";") == 2 and repr(draw_things(4, 0)).endswith("; …")
    assert repr(draw_things(4, 0)[:0]) == "Things(0): "


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("pictured", [True, False, None])
def test_exactly_as_many_things_are_drawn_as_wanted(n, pictured):
    for seed in range(40):
        drawn = draw_things(n, seed, pictured)
        assert len(drawn) == n and (pictured is None or (is_pictured(drawn) == pictured).all())


def test_every_word_is_drawn_about_equally_often():
    drawn = draw_things(12_000, 0, pictured=None)
    for name, words in ATTRIBUTES.items():
        counts = (
            torch.bincount(getattr(drawn, name), minlength=len(words)) / len(drawn) * len(words)
        )
        assert counts.min() > 0.9 and counts.max() < 1.1


def test_a_quarter_of_the_combinations_is_never_pictured():
    kind, colour = torch.meshgrid(
        torch.arange(len(KINDS)), torch.arange(len(COLOURS)), indexing="ij"
    )
    pictured = is_pictured(Things(kind, colour, None, None))
    assert ((~pictured).sum(1) == 2).all(), "two colours of each kind"
    assert set((~pictured).sum(0).tolist()) <= {2, 3, 4}, "each colour is pictured with most kinds"


# Randomness


def test_streams_depend_on_seed_and_name_only():
    def draw(*names):
        return uniform(0, 1, 8, generator(*names))

    first = draw(0, "a")
    assert torch.equal(first, draw(0, "a")) and 0 <= first.min() and first.max() < 1
    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (10, "a"), (1, "0a")]
    assert len({tuple(draw(*one).tolist()) for one in names}) == len(names)


def test_recordings_do_not_depend_on_what_else_was_drawn(things, recording):
    torch.rand(100)
    for sensor in MODALITIES:
        assert equal(record(things, 4, (sensor,))[sensor], recording[sensor]), sensor
    assert not any(equal(r, recording[sensor]) for sensor, r in record(things, seed=5).items())


def test_another_process_records_the_same(recording, tmp_path):
    code = (
        "import sys, torch; from ibllm.toyland.sensors import *; from ibllm.toyland.world import *;"
        "torch.save(record(draw_things(40, seed=4), seed=4), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "recording.pt"], check=True)
    for sensor, r in torch.load(tmp_path / "recording.pt", weights_only=True).items():
        assert equal(r, recording[sensor]), sensor


def test_every_chunk_has_its_own_scene():
    ten = Things(*(torch.zeros(10, dtype=torch.long) for _ in ATTRIBUTES))
    image = record(ten, 0, ("image",), chunk=5)["image"]
    assert len(image.flatten(1).unique(dim=0)) == 10


# Splits


def test_no_two_recordings_of_any_split_share_their_seed():
    ranges = []
    for seed, name in itertools.product(range(20), SPLITS):
        start = split_things(name, seed, size=1)[1] * 100_003
        ranges.append((start, start + SPLITS[name].size))
    ranges.sort()
    assert len(ranges) == 20 * len(SPLITS) and all(
        end <= start for (_, end), (start, _) in pairwise(ranges)
    )


def test_splits_hold_different_things_and_unpictured_ones_only_where_they_should():
    for name, split in SPLITS.items():
        drawn, key = split_things(name)
        assert len(drawn) == split.size
        assert is_pictured(drawn).any() == is_pictured(drawn).all() == (name not in UNSEEN)
        assert not torch.equal(drawn.kind[:500], split_things(name, seed=1)[0].kind[:500])


# Shapes and sensors


def test_shapes_are_closed_into_the_unit_ball():
    points, normals, parts = make_shapes()
    assert points.shape == normals.shape == (12, 8192, 3) and parts.shape == (12, 8192)
    assert torch.allclose(points.norm(dim=2).amax(1), torch.ones(12))
    assert torch.allclose(normals.norm(dim=2), torch.ones(12, 8192), atol=1e-5)
    assert 0 <= parts.min() and parts.max() <= 4
    assert torch.equal(make_shape("bell")[0], points[KINDS.index("bell")])


def test_recordings_have_the_promised_shapes_types_and_ranges(recording):
    wanted = dict(
        image=((40, 32, 32, 3), torch.uint8, 0, 255),
        video=((40, 6, 32, 32, 3), torch.uint8, 0, 255),
        audio=((40, 8000), torch.float32, -1, 1),
        point=((40, 256, 3), torch.float32, -0.65, 0.65),
        depth=((40, 32, 32), torch.float32, 0, 3.3),
        thermal=((40, 32, 32), torch.float32, 14, 52),
        imu=((40, 6, 64), torch.float32, -12, 12),
    )
    assert len(recording["text"]) == 40 and all(
        isinstance(caption, str) for caption in recording["text"]
    )
    for sensor, (shape, dtype, low, high) in wanted.items():
        r = recording[sensor]
        assert r.shape == shape and r.dtype == dtype, sensor
        assert low <= r.min() and r.max() <= high, sensor  # NaN fails both


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("sensor", MODALITIES)
def test_a_recording_depends_on_an_attribute_exactly_if_the_sensor_carries_it(
    sensor, attribute, things
):
    columns = {name: getattr(things, name) for name in ATTRIBUTES}
    other = Things(**columns | {attribute: (columns[attribute] + 1) % len(ATTRIBUTES[attribute])})
    before, after = (record(t, 4, (sensor,))[sensor] for t in (things, other))
    assert [equal(a, b) for a, b in zip(before, after)] == [attribute not in CARRIES[sensor]] * len(
        things
    )


# Words


def test_every_caption_reads_back(every_thing):
    for phrasing in DESCRIPTIONS:
        for i in range(len(every_thing)):
            words = every_thing.words(i)
            read = read_attributes(phrasing.format(**words))
            assert {name: ATTRIBUTES[name][position] for name, position in read.items()} == words


def test_attributes_are_read_from_any_text():
    assert read_attributes("") == dict(kind=-1, colour=-1, size=-1, motion=-1)
    assert read_attributes("A RED,green ball.") == dict(kind=0, colour=0, size=-1, motion=-1)


def test_captions_use_every_phrasing(things):
    assert describe(things, 0) == describe(things, 0) != describe(things, 1)
    starts = {caption.split()[0] for caption in describe(draw_things(300, 0), 0)}
    assert starts == {phrasing.split()[0] for phrasing in DESCRIPTIONS}


def test_questions_are_answered_rightly(things):
    words = things.words(0)
    for topic in QUESTIONS:
        [asked] = ask(things[0], seed=0, about=(topic,))
        assert asked["about"] == topic and asked["question"] in QUESTIONS[topic]
        assert asked["answer"] == answer(topic, words, caption=describe(things[0], 0)[0])
    assert answer("place", words) == PLACE[words["kind"]] and PURPOSE[words["kind"]] in answer(
        "purpose", words
    )


def test_exercises_in_words_hold_what_their_answer_needs():
    drawn = draw_things(600, 0, pictured=None)
    exercises, named = ask_in_words(drawn, seed=0), 0
    for i, exercise in enumerate(exercises):
        words, given = drawn.words(i), exercise["question"].split()
        if " . " in exercise["question"]:
            assert set(words.values()) <= set(given)
        else:
            named += 1
            assert words["kind"] in given and exercise["about"] in ("place", "purpose")
    assert 70 < named < 130


# Files


@pytest.fixture(scope="module")
def files(recording, tmp_path_factory):
    return write_files(recording, tmp_path_factory.mktemp("files") / "new", "thing", i=2)


@pytest.mark.parametrize(
    "sensor, off",
    dict(
        image=0, video=0, text=0, audio=0.002, point=1e-6, depth=0.01, thermal=0.002, imu=1e-5
    ).items(),
)
def test_a_file_reads_back_as_the_array(sensor, off, recording, files):
    processor = Processor(TOYLAND_INPUTS, train_tokenizer(recording["text"]))
    from_array = read_recording(processor, sensor, recording[sensor][2:3])
    from_file = processor(sensor, files[sensor])
    assert from_file.shape == from_array.shape and from_file.dtype == from_array.dtype
    assert (from_file - from_array).abs().max() <= off


def test_files_are_named_after_thing_and_sensor_and_written_alike_each_time(
    recording, files, tmp_path
):
    again = write_files(recording, tmp_path, "thing", i=2)
    assert (
        [path.name for path in again.values()]
        == [path.name for path in files.values()]
        == [
            "thing_image.png",
            "thing_video.mp4",
            "thing_text.txt",
            "thing_audio.wav",
            "thing_point.ply",
            "thing_depth.png",
            "thing_thermal.png",
            "thing_imu.csv",
        ]
    )
    assert sorted(tmp_path.iterdir()) == sorted(again.values()), "nothing else is left"
    for sensor in MODALITIES:
        assert again[sensor].read_bytes() == files[sensor].read_bytes(), sensor


@pytest.mark.parametrize(
    "name, words",
    dict(
        bell=("yellow", "big", "bouncing"),
        ball=("red", "big", "still"),
        plane=("white", "big", "circling"),
    ).items(),
)
def test_samples_show_this_world(name, words):
    with Image.open(SAMPLES / f"{name}_image.png") as file:
        stored = torch.tensor(np.array(file)).long()
    recorded = record(one_thing(name, *words), seed=11, modalities=("image",))["image"][0].long()
    assert ((stored - recorded).abs() > 1).float().mean() < 0.05, (
        "run nbs/toyland/01_sensors.ipynb, which writes data/samples"
    )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(recording, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as error:
        write_files(recording, tmp_path / "file" / "folder", "thing")
    assert "\n" not in str(error.value)


# Bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: one_thing("elephant"), "kind: got 'elephant', wants one of ball, box"),
        (lambda: one_thing("ball", "pink"), "colour: got 'pink', wants one of red, orange"),
        (
            lambda: one_thing("ball", size="huge"),
            f"size: got 'huge', wants one of {', '.join(SIZES)}",
        ),
        (
            lambda: one_thing("ball", motion="flying"),
            f"motion: got 'flying', wants one of {', '.join(MOTIONS)}",
        ),
        (lambda: make_shape("elephant"), "kind: got 'elephant', wants one of"),
        (
            lambda: draw_things(0, seed=0),
            "n: got 0, wants a whole number of things, from 1 to ten million",
        ),
        (
            lambda: ask(one_thing("ball"), 0, about=("smell",)),
            "about: got 'smell', wants one of kind, colour",
        ),
        (
            lambda: record(one_thing("ball"), 0, ("image", "smell")),
            "wants a tuple of sensors out of image, video",
        ),
        (lambda: record(one_thing("ball"), 0, "audio"), "modalities: got 'audio', wants a tuple"),
        (lambda: record(one_thing("ball")[:0], 0), "things: got none, wants at least one"),
        (lambda: split_things("training"), "name: got 'training', wants one of image_text"),
    ],
)
def test_bad_input_is_explained_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
