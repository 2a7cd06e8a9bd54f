"The explorer: functions agree with the model; controls do what they say and never fail in silence."

import itertools
import sys
import time
from html import unescape
from threading import Event, Thread
from types import SimpleNamespace

import av
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from ipywidgets import HTML, Button, Widget
from matplotlib.figure import Figure
from plotly.basedatatypes import BaseFigure

import ibllm
from ibllm.config import MODALITIES, CacheSettings
from ibllm.explorer.show import (
    combine,
    draw_cloud,
    draw_map,
    draw_view,
    mp4,
    neighbours,
    next_tokens,
    pca,
    place_on_map,
    sample_inputs,
    show_input,
    store_places,
    stored_places,
    thumbnails,
)
from ibllm.explorer.widgets import CacheRow, Explorer, Plot
from ibllm.files import project_folder
from ibllm.toyland.pictures import memory_pictures, toyland_atlas

QUESTION = "what is this ?"


@pytest.fixture(scope="module")
def samples():
    return sample_inputs(project_folder() / "data" / "samples")


@pytest.fixture(scope="module")
def model():
    "Toyland with random gates, as zero gates would hide every mistake."
    model = ibllm.load("toyland")
    with torch.no_grad():
        model.injection.gates.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def pictures(model):
    return memory_pictures(model)


@pytest.fixture(scope="module")
def atlas(model):
    return toyland_atlas(model, count=20)


@pytest.fixture
def explorer(model, samples, pictures, atlas):
    explorer = Explorer(model, samples, pictures=lambda _: pictures, atlas=lambda _: atlas)
    explorer.preparation.join()
    yield explorer
    explorer.stop()
    if explorer.worker:
        explorer.worker.join()


@pytest.fixture
def bell(samples):
    return {"audio": samples["bell"]["audio"], "depth": samples["bell"]["depth"]}


WEIGHTS = {"audio": 1.0, "depth": 0.5}


def endless(self, inputs, prompt, weights, cache, scale):
    for i in itertools.count():
        time.sleep(0.005)
        yield f"{i} "


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Functions


def test_samples_are_sorted_by_thing_and_modality(samples, tmp_path):
    assert all(set(files) == set(MODALITIES) for files in samples.values())
    for name in ("old_bell_audio.wav", "bell_smell.wav", "audio.wav", "bell_audio"):
        (tmp_path / name).touch()
    assert sample_inputs(tmp_path) == {"old_bell": {"audio": tmp_path / "old_bell_audio.wav"}}


def test_a_folder_without_samples_is_explained(tmp_path):
    with pytest.raises(ValueError, match="without samples, wants files called like"):
        sample_inputs(tmp_path)


def test_neighbours_are_those_the_model_uses(model, bell):
    found = neighbours(model, bell, WEIGHTS, k=4, temperature=7.0)
    feature = model.prepare(bell, WEIGHTS, cache=False)
    mixed = torch.nn.functional.normalize(0.5 * feature + 0.5 * found.prototype, dim=1)
    settings = CacheSettings(k=4, temperature=7.0, weight=0.5)
    torch.testing.assert_close(mixed, model.prepare(bell, WEIGHTS, settings))
    torch.testing.assert_close(found.weights, torch.softmax(7 * found.similarities, dim=1))


def test_weights_reach_everything_that_is_shown(model, bell):
    quiet, loud = {"audio": 0.1}, {"audio": 10.0}
    found = [neighbours(model, bell, weights).similarities for weights in (quiet, loud)]
    assert not torch.equal(*found)
    told = [next_tokens(model, bell, QUESTION, weights, scales=(1,)) for weights in (quiet, loud)]
    assert not torch.equal(told[0].probabilities, told[1].probabilities)


def test_neighbours_need_a_cache_and_a_feature(model, bell, monkeypatch):
    with pytest.raises(ValueError, match="zero vector"):
        neighbours(model, {})
    with pytest.raises(ValueError, match="k: got 0"):
        neighbours(model, bell, k=0)
    monkeypatch.setattr(model, "cache", None)
    with pytest.raises(ValueError, match="model: got one without a cache"):
        neighbours(model, bell)


@torch.no_grad()
def test_next_tokens_go_from_the_language_model_alone_to_the_trained_model(model, bell):
    told = next_tokens(model, bell, QUESTION, WEIGHTS, cache=False, scales=(0, 1), count=5)
    [answer] = model.generate(bell, QUESTION, WEIGHTS, cache=False)
    assert answer.startswith(told.written.strip())
    assert told.probabilities.shape == (2, len(told.tokens)) == (2, 5)
    written = model.tokenizer(told.written, add_special_tokens=False, return_tensors="pt")
    ids = [model.tokenize([QUESTION])["input_ids"], written["input_ids"].long()]
    ids = torch.cat(ids, dim=1)
    alone = model.llm(ids).logits[0, -1].softmax(-1)
    whole = model(ids, model.prepare(bell, WEIGHTS, cache=False)).logits[0, -1].softmax(-1)
    for row, wanted in zip(told.probabilities, (alone, whole)):
        assert all((wanted - p).abs().min() < 1e-5 for p in row)
    best = told.probabilities.amax(0)
    assert best.tolist() == sorted(best.tolist(), reverse=True)
    assert best.max() >= torch.stack([alone, whole]).max() - 1e-5


def test_next_tokens_are_shown_where_the_scales_disagree(model, bell):
    options = {"cache": False, "count": len(model.tokenizer)}
    told = next_tokens(model, bell, QUESTION, scales=(0, 1), **options)
    first = next_tokens(model, bell, QUESTION, scales=(1,), **options)  # one scale: no dispute
    assert first.written == "" and first.probabilities.sum().item() == pytest.approx(1, abs=1e-4)
    assert (told.probabilities[0] - told.probabilities[1]).abs().sum() > 0.1


def test_next_tokens_take_the_cache_into_account(model, bell):
    caches = (False, None, CacheSettings(weight=1.0))
    told = [next_tokens(model, bell, QUESTION, cache=cache, scales=(1,)) for cache in caches]
    assert not torch.equal(told[0].probabilities, told[1].probabilities)
    assert not torch.equal(told[1].probabilities, told[2].probabilities)


@pytest.mark.parametrize(
    "scales, got", [((), "none"), ((float("nan"),), "nan"), ((1, float("inf")), "inf")]
)
def test_bad_scales_are_explained(model, bell, scales, got):
    with pytest.raises(ValueError, match=f"scales?: got {got}, wants .* finite number"):
        next_tokens(model, bell, QUESTION, scales=scales)


def test_view_has_both_charts(model, bell):
    cache = CacheSettings(k=4, temperature=7.0)
    figure = draw_view(model, bell, QUESTION, WEIGHTS, cache, scale=2.0, title="$a title")
    left, right = figure.axes
    assert isinstance(figure, Figure) and len(left.patches) == 4 and len(right.patches) == 12
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend == ["injection × 0", "injection × 2"]
    assert draw_view(model, {}, QUESTION).axes[0].texts[0].get_text() == "the cache is not used"


def test_inputs_are_shown_as_the_model_got_them(model, samples):
    shown = {}
    for modality, path in samples["bell"].items():
        shown[modality] = show_input(model.processor, modality, path, "<a> bell")
    assert "bell" in shown.pop("text")
    assert "<audio" in shown["audio"] and "<video" in shown["video"]
    assert all("image/png" in html for modality, html in shown.items() if modality != "video")
    assert all("<a> bell" not in html and "&lt;a&gt; bell" in html for html in shown.values())
    sound = samples["bell"]["audio"].read_bytes()
    assert " autoplay" in show_input(model.processor, "audio", sound, "", play=True)
    assert "<b>" not in show_input(model.processor, "text", b"<b>bell", "")
    with pytest.raises(ValueError):
        show_input(model.processor, "image", b"no picture", "")


def test_films_can_be_played(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "a.mp4").write_bytes(mp4(frames))
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert film.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert [frame.width for frame in film.decode(video=0)] == [64] * 5


def test_cloud_keeps_its_points(model, samples):
    points = model.processor("point", samples["bell"]["point"])[0]
    [trace] = draw_cloud(points).data
    assert np.array_equal(np.stack([trace.x, trace.z, trace.y]).T, points.numpy())


def test_thumbnails_show_what_was_found(model, bell, pictures):
    found = neighbours(model, bell, k=4)
    shown = thumbnails(found, pictures)
    assert shown.count("<img") == thumbnails(found).count("<img") == 4
    assert shown != thumbnails(found)
    for similarity, weight in zip(found.similarities[0], found.weights[0]):
        assert f"similar {similarity:.2f}<br>weight {weight:.0%}" in shown


def test_memory_pictures_are_those_of_the_memory(model, pictures, monkeypatch):
    rows = torch.tensor([3, 777, len(pictures) - 1])
    features = model.embed({"image": pictures[rows].numpy()})["image"]
    similarities, ids = model.cache.search(features, 1)
    assert ids[:, 0].tolist() == rows.tolist() and similarities.min() > 0.999
    other = ibllm.cache.VisualCache.build(torch.randn(500, model.cache.width))
    monkeypatch.setattr(model, "cache", other)
    with pytest.raises(ValueError, match="model: got a memory of other pictures"):
        memory_pictures(model)
    monkeypatch.setattr(model, "cache", None)
    with pytest.raises(ValueError, match="model: got one without a cache"):
        memory_pictures(model)


# The map


def test_recordings_of_the_map_are_files_that_have_its_features(model, atlas):
    assert len(atlas.features) == len(atlas.places) == 20 * len(MODALITIES)
    for n, modality in enumerate(MODALITIES):
        i = n * 20 + 7
        assert atlas.modality(i) == modality and atlas.words[i].startswith(f"{modality} 7: ")
        again = model.embed({modality: [atlas.read(i)]})[modality]
        assert (again @ atlas.features[i]).item() > 0.99  # files round


def test_stored_map_is_the_one_of_the_shipped_weights(model):
    assert toyland_atlas(model).method == "UMAP", (
        "the weights changed: run nbs/walkthrough/07_mix_the_senses.ipynb"
    )


def test_places_are_stored_for_these_features_only(atlas, tmp_path):
    path = tmp_path / "map.npz"
    assert stored_places(atlas, path) is None
    store_places(atlas, path)
    torch.testing.assert_close(stored_places(atlas, path), atlas.places, atol=0.006, rtol=0)
    assert stored_places(atlas._replace(features=atlas.features.flip(0)), path) is None
    fewer = atlas._replace(features=atlas.features[:80], words=atlas.words[:80])
    assert stored_places(fewer, path) is None
    assert list(tmp_path.iterdir()) == [path]


def test_pca_keeps_the_two_widest_directions():
    noise = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    wide = noise * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1]) + 3
    first, second = pca(wide).T
    centred = wide - wide.mean(0)
    assert torch.corrcoef(torch.stack([first, centred[:, 1]]))[0, 1].abs() > 0.99
    assert torch.corrcoef(torch.stack([second, centred[:, 3]]))[0, 1].abs() > 0.99


def test_features_are_placed_among_their_neighbours(atlas):
    torch.testing.assert_close(place_on_map(atlas.features, atlas, k=1), atlas.places)
    between = place_on_map(atlas.features[:1] + atlas.features[1:2], atlas, temperature=5.0)
    assert (between > atlas.places.amin(0)).all() and (between < atlas.places.amax(0)).all()


def test_sums_of_features(atlas):
    a, b, c = atlas.features[:3].split(1)
    total = combine(a, b, c)
    torch.testing.assert_close(total * (a - b + c).norm(), a - b + c)
    with pytest.raises(ValueError, match="a − b [+] c: got a sum of length 0"):
        combine(a, 2 * a, a)


def test_static_map_has_a_dot_for_every_recording(atlas):
    assert [len(axes.collections[0].get_offsets()) for axes in draw_map(atlas).axes] == [160, 160]


def test_map_colours_by_kind_and_names_the_kinds(explorer):
    explorer.map.colour.value = "label"
    figure, labels = explorer.map.figure, set(explorer.map.atlas.labels)
    assert len(set(figure.data[0].marker.color)) == len(labels)
    assert {note.text for note in figure.layout.annotations} == labels
    explorer.map.colour.value = "modality"
    assert not figure.layout.annotations and len(set(figure.data[0].marker.color)) == 1


def marked(explorer, name):
    [trace] = explorer.map.figure.select_traces(selector={"name": name})
    return torch.tensor([trace.x, trace.y]).T


def test_marks_follow_the_sliders(explorer, model):
    explorer.modalities["audio"].choice.label = "bell"
    explorer.modalities["image"].choice.label = "ball"
    explorer.worker.join()
    before = marked(explorer, "mixture → enhanced")
    explorer.modalities["audio"].weight.value = 0.1
    explorer.worker.join()
    after, asked = marked(explorer, "mixture → enhanced"), explorer.request()
    mixture = model.prepare(asked["inputs"], asked["weights"], cache=False)
    enhanced = model.prepare(asked["inputs"], asked["weights"], asked["cache"])
    both = place_on_map(torch.cat([mixture, enhanced]), explorer.map.atlas)
    torch.testing.assert_close(after, both, atol=1e-4, rtol=0)
    assert (before - after).abs().max() > 1e-3
    explorer.cache.use.value = False
    explorer.worker.join()
    assert len(marked(explorer, "mixture → enhanced")) == 1


def test_choosing_on_the_map_asks_about_the_recording(explorer):
    explorer.map.modality.value, explorer.map.number.value = "audio", 5
    explorer.map.button.click()
    explorer.worker.join()
    explorer.map.viewer.join()
    assert list(explorer.request()["inputs"]) == ["audio"] and explorer.status.value == "done"
    assert explorer.modalities["audio"].choice.label == explorer.map.atlas.words[3 * 20 + 5]
    assert "<audio" in explorer.map.preview.value and explorer.plain.value
    place = explorer.map.atlas.places[65:66]
    torch.testing.assert_close(marked(explorer, "chosen"), place, atol=1e-4, rtol=0)


def tell(plot, event, points=()):
    "Let `plot` hear of an `event` on the page at `points` [(trace, number), …]."
    traces, numbers = zip(*points) if points else ((), ())
    where = {"trace_indexes": traces, "point_indexes": numbers, "xs": numbers, "ys": numbers}
    told = {"event_type": f"plotly_{event}", "points": where}
    plot.set_state({"_js2py_pointsCallback": told})


def test_pointing_shows_and_clicking_asks(explorer):
    panel, atlas = explorer.map, explorer.map.atlas
    tell(panel.figure, "hover", [(3, 5)])
    assert atlas.words[65] in panel.preview.value and explorer.worker is None
    panel.viewer.join()
    assert "<audio" in panel.preview.value and " autoplay" in panel.preview.value
    tell(panel.figure, "click", [(3, 5)])
    explorer.worker.join()
    assert explorer.modalities["audio"].choice.label == atlas.words[65]
    assert explorer.status.value == "done"


def test_only_the_last_of_many_is_shown_in_full(explorer, monkeypatch):
    panel, made, held = explorer.map, [], Event()

    def fail_slowly(i):
        held.wait(10)
        made.append(i)
        raise ValueError("no <sound> today")

    panel.atlas = panel.atlas._replace(read=fail_slowly)
    for number in range(6):
        tell(panel.figure, "hover", [(2, number)])
    assert "text 5: " in panel.preview.value  # nothing waits for what is slow
    held.set()
    panel.viewer.join()
    assert made[-1] == 45 and len(made) <= 2
    assert panel.preview.value.endswith("<b>no &lt;sound&gt; today</b>")  # what fails says so


@pytest.mark.parametrize("kind", ["lasso", "box"])
def test_a_lasso_chooses_what_is_in_its_middle(explorer, kind):
    panel, atlas = explorer.map, explorer.map.atlas
    x, y = atlas.places[24].tolist()
    # more corners at one end
    path = f"M{x - 1},{y}L{x},{y + 1}L{x + 1e-9},{y + 1}L{x + 1},{y}L{x},{y - 1}Z"
    drawn = {
        "lasso": {"type": "path", "path": path},
        "box": {"type": "rect", "x0": x + 1, "x1": x - 1, "y0": y - 1, "y1": y + 1},
    }

    def let_go():
        """What the page tells.

        A pointing mouse may replace its message about points, but not that about the layout."""
        told = {"relayout_data": {"selections": [drawn[kind]]}, "source_view_id": "the view"}
        panel.figure.set_state({"_js2py_relayout": told})

    let_go()
    explorer.worker.join()
    assert atlas.words[24] in panel.preview.value
    assert explorer.modalities["video"].choice.label == atlas.words[24]
    assert panel.figure.to_dict()["layout"]["selections"] == []  # put away
    panel.figure.data[1].visible = "legendonly"
    let_go()
    assert "video" not in panel.preview.value


def test_no_edit_is_lost_between_page_and_threads():
    plot, sent = Plot(go.Figure(go.Scatter(x=[], y=[]))), []

    def note(change):
        if change["new"]:
            sent.append(change["new"]["style_data"])

    plot.observe(note, "_py2js_update")

    def edit(first):
        for i in range(first, first + 20):
            with plot.batch_update():
                plot.data[0].update(x=[i], y=[i])

    threads = [Thread(target=edit, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        tell(plot, "hover")
    assert len(sent) == 80 and all(edit["x"] == edit["y"] for edit in sent)


def test_three_recordings_make_a_sum(explorer, model):
    atlas = explorer.map.atlas
    for name, i in {"a": 0, "b": 60, "c": 67}.items():
        explorer.map.action.value = name
        explorer.map.choose(i)
    explorer.worker.join()
    feature = combine(*atlas.features[[0, 60, 67]].split(1))
    [answer] = model.answer(model.enhance(feature), QUESTION)
    assert explorer.status.value == "done" and f"<b>{answer}</b>" in explorer.map.sum.value
    shown, place = marked(explorer, "a − b + c")[-1:], place_on_map(feature, atlas)
    torch.testing.assert_close(shown, place, atol=1e-4, rtol=0)


def test_what_cannot_be_prepared_says_so(model, samples):
    def fail(model):
        raise ValueError("no <map> today")

    explorer = Explorer(model, samples, pictures=fail, atlas=fail)
    explorer.preparation.join()
    said = "<b>no &lt;map&gt; today</b>"
    assert explorer.retrieved.value == explorer.map_box.children[0].value == said
    explorer.modalities["audio"].choice.label = "bell"
    explorer.worker.join()
    assert explorer.status.value == "done" and "similar" in explorer.retrieved.value


# Controls


def controls(widget: Widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from controls(child)


def test_every_control_has_a_label_and_fits_800_pixels(explorer):
    every = list(controls(explorer))
    leaves = [w for w in every if not hasattr(w, "children") and not isinstance(w, BaseFigure)]
    labels = [w.description for w in leaves if not isinstance(w, HTML)]
    assert all(labels) and len(set(labels)) == len(labels)
    assert all(int(w.layout.width[:-2]) <= 720 for w in leaves if w.layout.width)
    rows = [w for w in every if type(w).__name__ in ("HBox", "ModalityRow")]
    assert all(w.layout.flex_flow == "row wrap" for w in rows)
    sliders = [w for w in leaves if "Slider" in type(w).__name__]
    assert len(sliders) == 12 and not any(w.continuous_update for w in sliders)
    assert "/" not in repr(explorer)


def test_answers_are_the_models(explorer, model, samples):
    explorer.modalities["audio"].choice.label = "bell"
    explorer.modalities["point"].choice.label = "ball"
    explorer.modalities["point"].weight.value = 0.4
    explorer.question.value, explorer.scale.value = "what colour is it ?", 1.5
    asked = explorer.request()
    inputs = {"audio": samples["bell"]["audio"], "point": samples["ball"]["point"]}
    weights = {"audio": 1.0, "point": 0.4}
    assert (asked["inputs"], asked["weights"]) == (inputs, weights)
    assert asked["cache"] == model.config.cache and asked["scale"] == 1.5
    explorer.ask_button.click()
    explorer.worker.join()
    assert (explorer.status.value, explorer.stop_button.disabled) == ("done", True)
    for box, cache in ((explorer.cached, asked["cache"]), (explorer.plain, False)):
        [answer] = model.generate(inputs, asked["question"], weights, cache, scale=1.5)
        assert unescape(box.value) == answer
    assert explorer.retrieved.value.count("<img") == model.config.cache.k
    assert "<img" in explorer.chart.value and "<img" in explorer.gates.value
    cards = explorer.given.cards.items()
    assert [m for m, card in cards if card.layout.display != "none"] == ["audio", "point"]


def test_at_scale_zero_the_language_model_answers_alone(explorer, model):
    explorer.modalities["audio"].choice.label = "bell"
    explorer.scale.value = 0.0
    explorer.worker.join()
    assert explorer.cached.value == explorer.plain.value == model.generate(None, QUESTION)[0]


def test_cards_come_and_go(explorer):
    cloud, point = explorer.given.cloud, explorer.modalities["point"].choice
    for label, display in (("bell", ""), ("ball", ""), ("none", "none")):
        point.label = label
        explorer.worker.join()
        assert cloud.layout.display == explorer.given.cards["point"].layout.display == display
        assert len(cloud.children) == 1


def test_words_alone_and_an_unused_cache(explorer):
    assert explorer.request()["cache"] is False
    explorer.ask()
    explorer.worker.join()
    assert explorer.status.value == "done" and "not used" in explorer.cached.value


@pytest.mark.parametrize("name", ["choice", "weight", "cache", "scale", "question"])
def test_letting_go_of_a_control_asks(explorer, monkeypatch, name):
    asked = []
    monkeypatch.setattr(explorer, "_answer", lambda request, stopped: asked.append(request))
    if name == "choice":
        explorer.modalities["imu"].choice.label = "bell"
    if name == "question":
        explorer.question.value = "what colour is it ?"
    if name == "weight":
        explorer.modalities["imu"].weight.value = 0.5
    if name == "cache":
        explorer.cache.use.value = False
    if name == "scale":
        explorer.scale.value = 2.0
    explorer.worker.join()
    assert len(asked) == 1


def test_stop_ends_an_endless_answer_and_asking_does_not_block(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer.model), "stream", endless)
    start = time.monotonic()
    explorer.ask()
    assert time.monotonic() - start < 1
    until(lambda: explorer.plain.value)
    assert (explorer.status.value, explorer.stop_button.disabled) == ("answering …", False)
    explorer.stop_button.click()
    explorer.worker.join(10)
    assert not explorer.worker.is_alive()
    assert (explorer.status.value, explorer.stop_button.disabled) == ("stopped", True)


def test_asking_again_replaces_the_answer_under_way(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer.model), "stream", endless)
    explorer.ask()
    first = explorer.worker
    until(lambda: explorer.plain.value)
    explorer.ask()
    until(lambda: not first.is_alive() and explorer.status.value == "answering …")
    assert explorer.worker is not first and explorer.worker.is_alive()


def upload(explorer, content):
    explorer.modalities["image"].add({"new": [{"name": "a.png", "content": content}]})


@pytest.mark.parametrize(
    "upset, words",
    [
        (lambda e: setattr(e.question, "value", " "), "prompts: got"),
        (lambda e: upload(e, b"<b>no"), "a.png: got no known picture format"),
        (lambda e: upload(e, b""), "a.png: got an empty file"),
    ],
    ids=["no question", "no picture", "empty file"],
)
def test_errors_are_shown_in_words(explorer, upset, words):
    upset(explorer)
    explorer.ask()
    explorer.worker.join()
    assert words in explorer.status.value and explorer.stop_button.disabled
    assert "<b>no" not in explorer.status.value
    explorer.modalities["image"].choice.index, explorer.question.value = 0, QUESTION
    explorer.ask()
    explorer.worker.join()
    assert explorer.status.value == "done"


def test_an_uploaded_file_keeps_the_format_that_its_name_tells(explorer):
    shape = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
    row = explorer.modalities["point"]
    row.add({"new": [{"name": "corner.obj", "content": memoryview(shape)}]})
    explorer.worker.join()
    assert explorer.status.value == "done" and row.choice.label == "corner.obj"


def test_a_model_without_a_cache_has_its_controls_disabled(model, samples, monkeypatch):
    monkeypatch.setattr(model, "cache", None)
    row = CacheRow(model)
    assert row.settings() is False and all(w.disabled for w in row.children)


def test_colab_is_told_of_widgets_from_outside_before_any_is_made(model, samples, monkeypatch):
    done, make = [], Explorer._make_controls

    def noted(*args):
        done.append("made")
        make(*args)

    colab = SimpleNamespace(enable_custom_widget_manager=lambda: done.append("told"))
    monkeypatch.setitem(sys.modules, "google.colab.output", colab)
    monkeypatch.setattr(Explorer, "_make_controls", noted)
    Explorer(model, samples, pictures=lambda _: None, atlas=lambda _: None).preparation.join()
    assert done[:2] == ["told", "made"]


def test_buttons_are_the_ones_shown(explorer):
    shown = [w for w in controls(explorer) if isinstance(w, Button)]
    assert shown == [explorer.ask_button, explorer.stop_button, explorer.map.button]
