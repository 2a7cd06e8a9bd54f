"Figures: the same data gives the same bytes, and what is drawn is what the results say."

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from ibllm.config import MODALITIES
from ibllm.experiments.figures_cache import (
    ROW_COLOURS,
    draw_accuracy,
    draw_beyond,
    draw_gains,
    draw_sweeps,
)
from ibllm.experiments.figures_space import draw_arithmetic, draw_emergence, draw_joint_map
from ibllm.experiments.figures_training import (
    GATE_COLOURS,
    MOMENTS,
    draw_gate_opening,
    draw_gate_starts,
)
from ibllm.figures import MODALITY_COLOURS, STYLE, draw_gates, save_figure
from ibllm.toyland.pictures import show_answers, show_things
from ibllm.toyland.sensors import record
from ibllm.toyland.world import ATTRIBUTES, CARRIES, draw_things

pytestmark = pytest.mark.usefixtures("clean_style")


@pytest.fixture(scope="module")
def things():
    return draw_things(2, seed=3)


@pytest.fixture(scope="module")
def recording(things):
    return record(things, seed=3)


def results(rows=tuple(ROW_COLOURS), part="seen"):
    "A results file of the walkthrough in which every number is another one."

    def number(*where):
        return sum(map(ord, "".join(where))) % 97 / 100

    def summary(*where):
        mean = number(*where)
        return dict(mean=mean, seeds=[mean - 0.01, mean + 0.01])

    modalities = {}
    for modality in MODALITIES:
        by = {}
        for row in rows:
            by[row] = {a: summary(modality, row, a) for a in ATTRIBUTES}
        by["neighbour_vote"] = {a: number(modality, "vote", a) for a in ATTRIBUTES}
        modalities[modality] = {part: by}
    return {f"n_{part}": 250, "seeds": [0, 1, 2], "modalities": modalities}


def test_every_modality_has_a_colour_of_its_own():
    assert tuple(MODALITY_COLOURS) == MODALITIES == tuple(CARRIES)
    assert len(set(MODALITY_COLOURS.values())) == 8
    assert plt.rcParams["pdf.fonttype"] == STYLE["pdf.fonttype"] == 42


# The same bytes


DRAW = dict(
    things=lambda things, recording: show_things(things, recording, ["one", "two"]),
    answers=lambda things, recording: show_answers(
        recording, dict.fromkeys(recording, ["an answer"])
    ),
    accuracy=lambda things, recording: draw_accuracy(results()),
    gates=lambda things, recording: draw_gates([[0.1, -0.2], [0, 0.3]], "gates"),
)


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_a_figure_drawn_again_is_the_same_file(draw, things, recording, tmp_path):
    pictures = [
        save_figure(draw(things, recording), "figure", tmp_path / name)
        for name in ("first", "second")
    ]
    for ending in (".png", ".pdf"):
        first, second = (picture.with_suffix(ending).read_bytes() for picture in pictures)
        assert first == second and len(first) > 1000
    assert len(list((tmp_path / "first").iterdir())) == 2, "nothing else is left"


# What is drawn


PARTS = ("seen", "unseen")


def gains():
    "A headline in which every difference is another one."
    headline = {}
    for k, part in enumerate(PARTS):
        headline[part] = {}
        for i, modality in enumerate(MODALITIES):
            cells = {}
            for j, attribute in enumerate(ATTRIBUTES):
                d = (i + 8 * j + 32 * k) / 100
                seeds = [d - 0.1, d, d + 0.1]
                difference = dict(mean=d, low=d - 0.01, high=d + 0.02, seeds=seeds)
                carried = attribute in CARRIES[modality]
                cells[attribute] = dict(carried=carried, difference=difference)
            headline[part][modality] = cells
    return headline


def lines_of_length(axes, n):
    "The x values of all lines with `n` points."
    return [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == n]


def test_gains_are_drawn_for_carried_attributes_with_their_intervals_and_seeds():
    given = gains()
    for axes, by in zip(draw_gains(given).axes, given.values(), strict=True):
        carried = []
        for cells in by.values():
            carried += [cell["difference"] for cell in cells.values() if cell["carried"]]
        *spans, zero = lines_of_length(axes, 2)
        assert spans == [(d["low"], d["high"]) for d in carried] and zero == (0, 0)
        assert lines_of_length(axes, 1) == [(d["mean"],) for d in carried]
        assert lines_of_length(axes, 3) == [tuple(d["seeds"]) for d in carried]


def test_sweeps_draw_every_modality_the_mean_of_all_but_the_image_and_its_interval():
    scores, differences = [], []
    for start, d in ((0.5, 0.1), (0.6, 0.2)):
        by = {modality: start + i / 50 for i, modality in enumerate(MODALITIES)}
        scores.append(dict.fromkeys(PARTS, by))
        difference = dict(mean=d, low=d - 0.01, high=d + 0.02)
        differences.append(dict(difference=dict.fromkeys(PARTS, difference)))
    sweep = dict(values=[1, 1_000], scores=scores, gains=differences)
    [axes] = draw_sweeps(dict(k=sweep)).axes
    drawn = [tuple(np.round(line.get_ydata(), 6)) for line in axes.lines]
    assert drawn[:8] == [(round(0.5 + i / 50, 6), round(0.6 + i / 50, 6)) for i in range(8)]
    assert drawn[8] == drawn[10] == (0.58, 0.68), "the mean of 1 to 7 fiftieths is 4"
    assert drawn[9] == drawn[11] == (0.48, 0.48), "no cache"
    band = axes.collections[0].get_paths()[0].vertices.round(6).tolist()
    assert set(map(tuple, band)) == {(0, 0.57), (0, 0.6), (1, 0.67), (1, 0.7)}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "1,000"]


def test_ways_are_sorted_and_full_where_they_are_significant():
    def way(mean, p):
        difference = dict(mean=mean, low=0, high=0, p=0, p_holm=p)
        image = dict(mean=0, low=0, high=0, p=0, p_holm=1)
        by_part = {part: dict(difference) for part in PARTS}
        return dict(setting="", difference=by_part, image=dict.fromkeys(PARTS, image))

    given = dict(better=way(0.1, 0.01), worse=way(-0.1, 0.01), alike=way(0, 0.06), paper=way(0, 1))
    for d in given["paper"]["difference"].values():
        del d["p_holm"]
    axes = draw_beyond(given).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["worse", "alike", "better"]
    rounds = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in rounds] == [-0.1, 0, 0.1]
    assert [line.get_markerfacecolor() for line in rounds] == ["k", "w", "k"], "by Holm's p"
    squares = [line for line in axes.lines if line.get_marker() == "s"]
    assert [line.get_markerfacecolor() for line in squares] == ["w"] * 3


def test_matrices_frame_what_was_trained_with_pairs():
    grid = ((torch.arange(8)[:, None] + torch.arange(8)) / 16).tolist()  # [8][8]
    figure = draw_emergence(dict(modalities=list(MODALITIES), own=grid, alike=grid, naming=grid))
    itself = [[*row[:i], None, *row[i + 1 :]] for i, row in enumerate(grid)]
    trained = {(i, j) for i, j in itertools.permutations(range(8), 2) if min(i, j) < 2}
    for axes, drawn in zip(figure.axes, (itself, grid, grid)):
        assert axes.images[0].get_array().tolist() == drawn
        framed = {(round(p.get_y() + 0.46), round(p.get_x() + 0.46)) for p in axes.patches}
        assert framed == trained


def first_coordinates(axes):
    "Which rows of a map, whose row i has the first coordinate 2 i, are drawn, in order."
    return (axes.collections[0].get_offsets()[:, 0] / 2).astype(int).tolist()


def test_a_map_tells_its_neighbours_and_those_of_the_space_in_an_order_that_mixes_modalities():
    n = 8 * 3  # of 3 things; then the same after the cache, and 4 sums
    places = torch.arange(104.0).reshape(52, 2).numpy()  # [24 + 24 + 4, 2]
    shares = {}
    for i, name in enumerate(("space", "UMAP", "PCA", "chance")):
        raw = dict(kind=i / 10, modality=i / 20)
        shares[name] = dict(raw=raw, cache=dict(kind=i / 10, modality=(i + 1) / 20))
    figure = draw_joint_map(
        dict(modalities=list(MODALITIES), count=3, kinds=[0, 5, 11], numbers=shares),
        dict(UMAP=places, PCA=places),
    )
    assert [axes.get_title().splitlines()[1] for axes in figure.axes] == [
        "same sense 0.05 (0.00)",
        "same sense 0.10 (0.05)",
        "same kind 0.10 (0.00)",
        "same kind 0.10 (0.00)",
        "same kind 0.20 (0.00)",
    ]
    for axes, start in zip(figure.axes, (0, n, 0, 0, 0)):
        rows = first_coordinates(axes)
        assert sorted(rows) == list(range(start, start + n)) != rows
    drawn = figure.axes[0].collections[0].get_facecolors()
    wanted = list(MODALITY_COLOURS.values())
    colours = [wanted[row // 3] for row in first_coordinates(figure.axes[0])]
    assert [to_hex(colour).upper() for colour in drawn] == colours


def test_sums_and_walks_are_the_results():
    value = iter(range(1, 9))
    sums = {}
    for name in ("swap", "mixture"):
        sums[name] = {}
        for part in PARTS:
            off, on = next(value) / 10, next(value) / 10
            both = (dict(both=dict(mean=mean, seeds=[mean])) for mean in (off, on))
            sums[name][part] = dict(zip(("off", "on"), both))
    walk = dict(a=[1, 0.5], b=[0, 0.2], neither=[0, 0.3])
    walks = ("image, cache off", "image, cache on", "audio, cache off", "audio, cache on")
    given = dict(sums=sums, shares=[0, 1], walks=dict.fromkeys(walks, walk))
    left, *right = draw_arithmetic(given).axes
    assert [round(bar.get_width(), 6) for bar in left.patches] == [i / 10 for i in range(1, 9)]
    for axes in right:
        assert [list(line.get_ydata()) for line in axes.lines] == list(walk.values()) * 2


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_bars_dots_and_lines_are_the_results(attribute):
    given = results()
    [axes] = draw_accuracy(given, attribute).axes
    means, seeds, votes = [], [], []
    for by in given["modalities"].values():
        drawn = [by["seen"][row][attribute] for row in ROW_COLOURS]
        means += [summary["mean"] for summary in drawn]
        seeds += [tuple(summary["seeds"]) for summary in drawn]
        votes.append((by["seen"]["neighbour_vote"][attribute],) * 2)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(means)
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches[:4]]
    assert colours == list(ROW_COLOURS.values())
    *lines, chance = [tuple(line.get_ydata()) for line in axes.lines]
    assert sorted(lines) == sorted(seeds + votes)
    assert chance == (1 / len(ATTRIBUTES[attribute]),) * 2


def test_bars_stand_side_by_side_within_their_modality():
    for rows in (("raw",), ("raw", "cache"), tuple(ROW_COLOURS)):
        [axes] = draw_accuracy(results(rows)).axes
        centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
        assert len({round(centre, 3) for centre in centres}) == 8 * len(rows)
        for place in range(8):
            own = centres[place * len(rows) : (place + 1) * len(rows)]
            assert sum(own) / len(rows) == pytest.approx(place)


def test_modalities_that_do_not_carry_the_attribute_stand_in_brackets():
    [axes] = draw_accuracy(results(), "colour").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "image",
        "video",
        "text",
        "(audio)",
        "(point)",
        "(depth)",
        "(thermal)",
        "(imu)",
    ]


def test_the_unseen_part_has_its_own_count_and_only_the_rows_it_has():
    figure = draw_accuracy(results(("raw", "cache"), "unseen"), part="unseen")
    assert figure.axes[0].get_title("left") == "250 captions per sense, 3 seeds (dots)"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["cache", "chance", "neighbour vote", "raw"]


def test_contact_sheet_has_a_column_per_thing_and_a_row_per_modality(things, recording):
    axes = show_things(things, recording, ["first", "second"]).axes
    assert len(axes) == 16
    assert [a.get_ylabel() for a in axes[::2]] == list(MODALITIES)
    assert [a.get_xlabel() for a in axes[-2:]] == ["first", "second"]
    words = axes[4].texts[0].get_text()
    assert words.replace("\n", " ") == recording["text"][0].replace(" ,", ",")


@pytest.mark.parametrize(
    "modalities, places", [(MODALITIES, 8), (("image",), 4), (MODALITIES[:5], 8)]
)
def test_answers_stand_below_their_modality(modalities, places, recording):
    recordings = {modality: recording[modality] for modality in modalities}
    answers = {modality: [f"{modality} one", "two"] for modality in modalities}
    figure = show_answers(recordings, answers)
    assert len(figure.axes) == places and sum(a.axison for a in figure.axes) == len(modalities)
    labels = [axes.get_xlabel() for axes in figure.axes[: len(modalities)]]
    assert labels == [f"{modality} one\ntwo" for modality in modalities]


def test_gates_are_white_at_zero():
    for gates, reach in (([[0.1, -0.4, 0]], 0.4), ([[0.0, 0.0]], 1)):
        image = draw_gates(gates).axes[0].images[0]
        assert -image.norm.vmin == image.norm.vmax == reach
        assert image.get_array().tolist() == gates


def starts_of_the_gates(asked, moments):
    "A summary at each of `moments` from every start of the gates, each with another mean."
    starts = {}
    for gates in GATE_COLOURS:
        starts[gates] = {}
        for when in moments:
            mean = sum(map(ord, asked + gates + when)) % 89 / 100
            starts[gates][when] = dict(mean=mean, seeds=[mean, 0.95])
    return starts


def test_every_start_of_the_gates_is_drawn_on_one_scale():
    ability = {asked: starts_of_the_gates(asked, MOMENTS) for asked in ("a", "b")}
    kind = starts_of_the_gates("kind", MOMENTS[1:])
    figure = draw_gate_starts(dict(ability=ability, kind=kind))
    for axes, by in zip(figure.axes, [*ability.values(), kind], strict=True):
        assert axes.get_ylim() == (0, 1.05)
        for gates, moments in by.items():
            line, *dots = [one for one in axes.lines if one.get_color() == GATE_COLOURS[gates]]
            assert list(line.get_ydata()) == [value["mean"] for value in moments.values()]
            seeds = [value["seeds"] for value in moments.values()]
            assert [list(drawn.get_ydata()) for drawn in dots] == seeds
            assert [round(x) for x in line.get_xdata()] == [MOMENTS.index(when) for when in moments]


def test_the_way_of_the_gates_keeps_its_sign():
    opening = [[[0, 0], [0, 0]], [[-0.25, 0.5], [0.75, -1]]]  # [points, layers, heads]
    figure = draw_gate_opening(dict(opening=[opening], steps=dict(stage_one=10), seeds=[7]))
    axes, _ = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines[1:]] == [[0, -0.25], [0, 0.5]]
    assert list(axes.lines[1].get_xdata()) == [0, 5] and "seed 7" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["head 0", "head 1"]


def test_an_unknown_attribute_is_explained_in_one_line():
    with pytest.raises(ValueError) as refused:
        draw_accuracy(results(), "smell")
    wants = "one of kind, colour, size, motion"
    assert str(refused.value) == f"attribute: got 'smell', wants {wants}"
