"The paper's figures: redrawn they are the committed ones; what is quoted adds up."

import json

import numpy as np
import pytest
from PIL import Image

import ibllm
from ibllm.encoders import extract_features
from ibllm.evaluation import load_results
from ibllm.experiments import figures_paper
from ibllm.experiments.figures_paper import (
    SYSTEM_LOOKS,
    _marked,
    draw_bind_network,
    draw_cache,
    draw_failures,
    draw_mme,
    draw_nearest,
    draw_traditional,
    verdict,
)
from ibllm.figures import save_figure
from ibllm.files import project_folder
from ibllm.toyland.recipes import read_recording
from ibllm.toyland.sensors import record
from ibllm.toyland.world import draw_things, split_things

ROOT = project_folder()

pytestmark = pytest.mark.usefixtures("clean_style")


@pytest.fixture(scope="module")
def results():
    return load_results("paper_figures")


@pytest.fixture(scope="module")
def cast(results):
    things = draw_things(**results["cast"])
    return things, record(things, results["cast"]["seed"])


@pytest.fixture(scope="module")
def memory(results):
    "The pictures in the shipped memory, recorded again."
    things, seed = split_things(results["memory"]["split"])
    return record(things[: results["memory"]["size"]], seed, ("image",))["image"]


@pytest.fixture(scope="module")
def tables():
    return json.loads((ROOT / "data/quoted/paper_tables.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def same_as_committed(figure, name, folder):
    again = save_figure(figure, name, folder)
    assert np.array_equal(pixels(again), pixels(ROOT / "figures" / again.name)), (
        f"{name}: run its notebook again"
    )


# Redrawn


@pytest.mark.usefixtures("same_matplotlib")
@pytest.mark.parametrize(
    "name, draw, key",
    [
        ("paper_1_two_systems", "draw_two_systems", "systems"),
        ("paper_2_what_learns", "draw_stages", "stages"),
        ("paper_5_captions", "draw_captions", "captions"),
        ("paper_6_instructions", "draw_instructions", "instructions"),
        ("paper_7_mixtures", "draw_mixtures", "mixtures"),
        ("paper_13_failures", "draw_failures", "failures"),
    ],
)
def test_figures_of_the_cast_are_what_the_results_say(name, draw, key, results, cast, tmp_path):
    same_as_committed(getattr(figures_paper, draw)(results[key], *cast), name, tmp_path)


@pytest.mark.usefixtures("same_matplotlib")
def test_the_bind_network_is_what_the_results_say(results, tmp_path):
    same_as_committed(draw_bind_network(results["bind"]), "paper_3_bind_network", tmp_path)


@pytest.mark.usefixtures("same_matplotlib")
def test_figures_with_the_memory_are_what_the_results_say(results, cast, memory, tmp_path):
    found = dict(first=memory[:6], nearest=memory[results["cache"]["ids"]])
    same_as_committed(draw_cache(results["cache"], *cast, found), "paper_4_visual_cache", tmp_path)
    nearest = [memory[query["ids"]] for query in results["nearest"]]
    drawn = draw_nearest(results["nearest"], *cast, nearest)
    same_as_committed(drawn, "paper_8_nearest_pictures", tmp_path)


@pytest.mark.usefixtures("same_matplotlib")
def test_quoted_tables_are_drawn_from_their_file(tables, tmp_path):
    same_as_committed(draw_mme(tables["mme"]), "paper_tables_mme", tmp_path)
    same_as_committed(draw_traditional(tables["traditional"]), "paper_tables_traditional", tmp_path)


def test_the_shipped_model_still_says_what_the_first_figure_shows(results, cast):
    model, systems = ibllm.load("toyland"), results["systems"]
    thing, said = systems["thing"], {}
    for modality, recording in cast[1].items():
        prepared = read_recording(model.processor, modality, recording)
        feature = extract_features(model.encoder, modality, prepared)[thing : thing + 1]  # [1, D]
        feature = model.enhance(feature)
        [said[modality]] = model.answer(feature, systems["question"], do_sample=False)
    assert said == systems["answers"]


def test_shares_are_shares(results):
    for mixture in results["mixtures"]:
        assert sum(mixture["shares"].values()) == pytest.approx(1, abs=1e-3)
    for shares in results["failures"]["mixing"]["shares"].values():
        assert all(sum(column) == pytest.approx(1, abs=1e-3) for column in zip(*shares.values()))
    assert sum(results["cache"]["weights"]) == pytest.approx(1, abs=0.01)


def test_colours_that_a_modality_cannot_see_stand_beside_both_levels_of_luck(results, cast):
    luck = {"1 of 8: luck": 1 / 8, "1 of 6: kind known": 1 / 6}
    [axes] = draw_failures(dict(results["failures"], luck=luck), *cast).axes
    [inset] = [inset for inset in axes.child_axes if inset.get_ylabel() == "answers"]
    assert [line.get_ydata()[0] for line in inset.lines] == list(luck.values())
    assert [text.get_text() for text in inset.texts] == list(luck)


# Marks

BELL = dict(kind="bell", colour="red", size="big", motion="still")
STAR = dict(kind="star", colour="blue", size="big", motion="sliding")


@pytest.mark.parametrize(
    "word, sources, wanted",
    [
        ("bell", [("audio", BELL)], "right"),
        ("drum", [("audio", BELL)], "wrong"),
        ("red", [("audio", BELL)], "unknowable"),
        ("red", [("image", BELL)], "right"),
        ("still", [("point", BELL)], "unknowable"),
        ("it", [("point", BELL)], "right"),
        ("red", [("image", BELL), ("audio", STAR)], "right"),
        ("blue", [("image", BELL), ("audio", STAR)], "wrong"),
        ("star", [("image", BELL), ("audio", STAR)], "right"),
        ("bell", [], "unknowable"),
        ("ringing", [], "wrong"),
    ],
)
def test_words_are_marked_by_what_the_modalities_carry(word, sources, wanted):
    assert verdict(word, sources) == wanted


@pytest.mark.parametrize(
    "answer, wanted",
    [
        ("a red bell", "right right right"),
        ("a bell bell", "right right wrong"),
        ("in a tower", "right right right"),
        ("for drumming", "wrong wrong"),
        ("the bell is red , big and still", "right " * 7),
    ],
)
def test_answers_are_marked_word_by_word_or_as_a_whole(answer, wanted):
    assert [mark for _, mark in _marked(answer, [("image", BELL)])] == wanted.split()


# Quoted numbers


def test_mme_tasks_add_up_to_the_totals_that_the_paper_prints(tables):
    mme = tables["mme"]
    for part, tasks in (("Perception", mme["perception"]), ("Cognition", mme["cognition"])):
        scores = [mme["scores"][task] for task in tasks]
        sums = [sum(column) for column in zip(*scores, strict=True)]
        assert sums == pytest.approx(mme["totals"][part], abs=0.011)
    assert sorted(mme["scores"]) == sorted(mme["perception"] + mme["cognition"])
    assert len(mme["scores"]) == 14


def test_every_quoted_row_has_a_number_per_system_and_every_data_set_one_group(tables):
    for table in (tables["mme"], tables["traditional"]):
        sizes = {len(row) for row in table["scores"].values()}
        assert sizes == {len(table["systems"]), len(table["visual_tokens"])}
        assert set(table["systems"]) <= set(SYSTEM_LOOKS)
    grouped = sum(tables["traditional"]["groups"].values(), [])
    assert sorted(grouped) == sorted(tables["traditional"]["scores"]) and len(grouped) == 27


def marks_of(axes):
    "Where the marks of a panel stand, as pairs of score and height."
    marks = []
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            marks.append((float(line.get_xdata()[0]), float(line.get_ydata()[0])))
    return marks


def quoted_figures(tables):
    "Both figures of quoted numbers, each with its table."
    yield draw_mme(tables["mme"]), tables["mme"]
    yield draw_traditional(tables["traditional"]), tables["traditional"]


def test_quoted_figures_say_so_and_draw_every_number(tables):
    for figure, table in quoted_figures(tables):
        [legend] = figure.legends
        assert "quoted" in legend.get_title().get_text()
        drawn = []
        for axes in figure.axes:
            drawn += [score for score, _ in marks_of(axes)]
        assert sorted(drawn) == sorted(sum(table["scores"].values(), []))


def test_equal_scores_of_a_row_lie_apart(tables):
    for figure, _ in quoted_figures(tables):
        for axes in figure.axes:
            marks = marks_of(axes)
            assert len(set(marks)) == len(marks)
            assert all(abs(height - round(height)) < 0.5 for _, height in marks)


def test_chance_levels_of_mme_are_drawn(tables):
    for axes in draw_mme(tables["mme"]).axes:
        lines = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert [line.get_xdata()[0] for line in lines[-2:]] == [50, 75]


# The list


def test_every_figure_is_listed_and_everything_listed_exists():
    lines = (ROOT / "figures/README.md").read_text().splitlines()
    listed = {line.split("`")[1] for line in lines if line.startswith("| `")}
    for kind in ("png", "pdf"):
        assert listed == {path.stem for path in (ROOT / "figures").glob(f"*.{kind}")}
