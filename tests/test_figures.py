"Figures: the same data gives the same bytes, and what is drawn is what the results say."

import matplotlib.pyplot as plt
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
        return dict(mean=number(*where), seeds=[number(*where) - 0.01, number(*where) + 0.01])

    by = {
        modality: {row: {a: summary(modality, row, a) for a in ATTRIBUTES} for row in rows}
        for modality in MODALITIES
    }
    for modality in MODALITIES:
        by[modality]["neighbour_vote"] = {a: number(modality, "vote", a) for a in ATTRIBUTES}
    return {
        f"n_{part}": 250,
        "seeds": [0, 1, 2],
        "modalities": {modality: {part: by[modality]} for modality in MODALITIES},
    }


def test_every_sense_has_a_colour_of_its_own():
    assert tuple(MODALITY_COLOURS) == MODALITIES == tuple(CARRIES)
    assert len(set(MODALITY_COLOURS.values())) == 8
    assert plt.rcParams["pdf.fonttype"] == STYLE["pdf.fonttype"] == 42


# The same bytes


@pytest.mark.parametrize(
    "draw",
    [
        lambda things, recording: show_things(things, recording, ["one", "two"]),
        lambda things, recording: show_answers(
            recording, {modality: ["an answer"] for modality in recording}
        ),
        lambda things, recording: draw_accuracy(results()),
        lambda things, recording: draw_gates([[0.1, -0.2], [0, 0.3]], "gates"),
    ],
    ids=["things", "answers", "accuracy", "gates"],
)
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


def gains():
    "A headline in which every difference is another one."
    return {
        part: {
            s: {
                a: dict(
                    carried=a in CARRIES[s],
                    difference=dict(
                        mean=(d := (i + 8 * j + 32 * k) / 100),
                        low=d - 0.01,
                        high=d + 0.02,
                        seeds=[d - 0.1, d, d + 0.1],
                    ),
                )
                for j, a in enumerate(ATTRIBUTES)
            }
            for i, s in enumerate(MODALITIES)
        }
        for k, part in enumerate(("seen", "unseen"))
    }


def test_gains_are_drawn_for_carried_attributes_with_their_intervals_and_seeds():
    given = gains()
    for axes, by in zip(draw_gains(given).axes, given.values()):
        carried = [c["difference"] for cells in by.values() for c in cells.values() if c["carried"]]
        spans, points, seeds = (
            [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == n]
            for n in (2, 1, 3)
        )
        assert spans[:-1] == [(d["low"], d["high"]) for d in carried] and spans[-1] == (0, 0)
        assert points == [(d["mean"],) for d in carried]
        assert seeds == [tuple(d["seeds"]) for d in carried]


def test_sweeps_draw_every_sense_the_mean_of_all_but_the_image_and_its_interval():
    scores = [
        {part: {s: v + i / 50 for i, s in enumerate(MODALITIES)} for part in ("seen", "unseen")}
        for v in (0.5, 0.6)
    ]
    gains = [
        dict(
            difference={
                part: dict(mean=d, low=d - 0.01, high=d + 0.02) for part in ("seen", "unseen")
            }
        )
        for d in (0.1, 0.2)
    ]
    [axes] = draw_sweeps(dict(k=dict(values=[1, 1_000], scores=scores, gains=gains))).axes
    drawn = [tuple(round(y, 6) for y in line.get_ydata()) for line in axes.lines]
    assert drawn[:8] == [(round(0.5 + i / 50, 6), round(0.6 + i / 50, 6)) for i in range(8)]
    assert drawn[8] == drawn[10] == (0.58, 0.68), "the mean of 1 to 7 fiftieths is 4"
    assert drawn[9] == drawn[11] == (0.48, 0.48), "no cache"
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band.round(6).tolist()} == {
        (0, 0.57),
        (0, 0.6),
        (1, 0.67),
        (1, 0.7),
    }
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "1,000"]


def test_ways_are_sorted_and_full_where_they_are_significant():
    def way(mean, p):
        return dict(
            setting="",
            difference={
                part: dict(mean=mean, low=0, high=0, p=0, p_holm=p) for part in ("seen", "unseen")
            },
            image={part: dict(mean=0, low=0, high=0, p=0, p_holm=1) for part in ("seen", "unseen")},
        )

    given = dict(better=way(0.1, 0.01), worse=way(-0.1, 0.01), alike=way(0, 0.06), paper=way(0, 1))
    for d in given["paper"]["difference"].values():
        del d["p_holm"]
    axes = draw_beyond(given).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["worse", "alike", "better"]
    rounds = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in rounds] == [-0.1, 0, 0.1]
    assert [line.get_markerfacecolor() for line in rounds] == ["k", "w", "k"]
    assert {line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "s"} == {
        "w"
    }, "by Holm's p"


def test_matrices_frame_what_was_trained_with_pairs():
    grid = [[(i + j) / 16 for j in range(8)] for i in range(8)]
    figure = draw_emergence(dict(modalities=list(MODALITIES), own=grid, alike=grid, naming=grid))
    itself = [[None if i == j else grid[i][j] for j in range(8)] for i in range(8)]
    for axes, drawn in zip(figure.axes, (itself, grid, grid)):
        assert axes.images[0].get_array().tolist() == drawn
        framed = {(round(p.get_y() + 0.46), round(p.get_x() + 0.46)) for p in axes.patches}
        assert framed == {(i, j) for i in range(8) for j in range(8) if i != j and min(i, j) < 2}


def test_a_map_tells_its_neighbours_and_those_of_the_space_in_an_order_that_mixes_the_senses():
    n, places = (
        8 * 3,
        torch.arange(104.0).reshape(52, 2).numpy(),
    )  # 3 things, raw, after the cache, and 4 sums
    shares = {
        name: {
            half: dict(kind=i / 10, modality=(i + half.count("c")) / 20)
            for half in ("raw", "cache")
        }
        for i, name in enumerate(("space", "UMAP", "PCA", "chance"))
    }
    figure = draw_joint_map(
        dict(modalities=list(MODALITIES), count=3, kinds=[0, 5, 11], numbers=shares),
        dict(UMAP=places, PCA=places),
    )
    assert [axes.get_title().splitlines()[1] for axes in figure.axes] == [
        "same sense 0.05 (0.00)",
        "same sense 0.15 (0.10)",
        "same kind 0.10 (0.00)",
        "same kind 0.10 (0.00)",
        "same kind 0.20 (0.00)",
    ]
    for axes, start in zip(figure.axes, (0, n, 0, 0, 0)):
        rows = (axes.collections[0].get_offsets()[:, 0] / 2 - start).astype(int).tolist()
        assert sorted(rows) == list(range(n)) != rows
    rows = (figure.axes[0].collections[0].get_offsets()[:, 0] / 2).astype(int).tolist()
    colours = [to_hex(colour).upper() for colour in figure.axes[0].collections[0].get_facecolors()]
    assert colours == [list(MODALITY_COLOURS.values())[row // 3] for row in rows]


def test_sums_and_walks_are_the_results():
    value = iter(range(1, 9))
    sums = {
        name: {
            part: {
                row: dict(both=dict(mean=(v := next(value)) / 10, seeds=[v / 10]))
                for row in ("off", "on")
            }
            for part in ("seen", "unseen")
        }
        for name in ("swap", "mixture")
    }
    walk = dict(a=[1, 0.5], b=[0, 0.2], neither=[0, 0.3])
    left, *right = draw_arithmetic(
        dict(
            sums=sums,
            shares=[0, 1],
            walks={f"{s}, cache {r}": walk for s in ("image", "audio") for r in ("off", "on")},
        )
    ).axes
    assert [round(bar.get_width(), 6) for bar in left.patches] == [i / 10 for i in range(1, 9)]
    for axes in right:
        assert [list(line.get_ydata()) for line in axes.lines] == list(walk.values()) * 2


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_bars_dots_and_lines_are_the_results(attribute):
    given = results()
    [axes] = draw_accuracy(given, attribute).axes
    drawn = [round(bar.get_height(), 6) for bar in axes.patches]
    wanted = [
        by["seen"][row][attribute]["mean"]
        for by in given["modalities"].values()
        for row in ROW_COLOURS
    ]
    assert drawn == pytest.approx(wanted)
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches[:4]] == list(
        ROW_COLOURS.values()
    )
    *lines, chance = [tuple(line.get_ydata()) for line in axes.lines]
    seeds = [
        tuple(by["seen"][row][attribute]["seeds"])
        for by in given["modalities"].values()
        for row in ROW_COLOURS
    ]
    votes = [(by["seen"]["neighbour_vote"][attribute],) * 2 for by in given["modalities"].values()]
    assert sorted(lines) == sorted(seeds + votes)
    assert chance == (1 / len(ATTRIBUTES[attribute]),) * 2


def test_bars_stand_side_by_side_within_their_sense():
    for rows in (("raw",), ("raw", "cache"), tuple(ROW_COLOURS)):
        [axes] = draw_accuracy(results(rows)).axes
        centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
        assert len(set(round(c, 3) for c in centres)) == 8 * len(rows)
        for i in range(8):
            assert sum(centres[i * len(rows) : (i + 1) * len(rows)]) / len(rows) == pytest.approx(i)


def test_senses_that_do_not_carry_the_attribute_stand_in_brackets():
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


def test_contact_sheet_has_a_column_per_thing_and_a_row_per_sense(things, recording):
    axes = show_things(things, recording, ["first", "second"]).axes
    assert len(axes) == 16
    assert [a.get_ylabel() for a in axes[::2]] == list(MODALITIES)
    assert [a.get_xlabel() for a in axes[-2:]] == ["first", "second"]
    words = axes[4].texts[0].get_text()
    assert words.replace("\n", " ") == recording["text"][0].replace(" ,", ",")


@pytest.mark.parametrize(
    "modalities, places", [(MODALITIES, 8), (("image",), 4), (MODALITIES[:5], 8)]
)
def test_answers_stand_below_their_sense(modalities, places, recording):
    figure = show_answers(
        {s: recording[s] for s in modalities}, {s: [f"{s} one", "two"] for s in modalities}
    )
    assert len(figure.axes) == places and sum(a.axison for a in figure.axes) == len(modalities)
    assert [a.get_xlabel() for a in figure.axes[: len(modalities)]] == [
        f"{s} one\ntwo" for s in modalities
    ]


def test_gates_are_white_at_zero():
    for gates in ([[0.1, -0.4, 0]], [[0.0, 0.0]]):
        image = draw_gates(gates).axes[0].images[0]
        assert -image.norm.vmin == image.norm.vmax == (max(abs(g) for g in gates[0]) or 1)
        assert image.get_array().tolist() == gates


def test_every_start_of_the_gates_is_drawn_on_one_scale():
    def at(*where):
        return sum(map(ord, "".join(where))) % 89 / 100

    def course(injected, gates, moments):
        return {
            when: dict(mean=at(injected, gates, when), seeds=[at(injected, gates, when), 0.95])
            for when in moments
        }

    ability = {
        injected: {gates: course(injected, gates, MOMENTS) for gates in GATE_COLOURS}
        for injected in ("a", "b")
    }
    kind = {gates: course("kind", gates, MOMENTS[1:]) for gates in GATE_COLOURS}
    figure = draw_gate_starts(dict(ability=ability, kind=kind))
    for axes, by in zip(figure.axes, [*ability.values(), kind], strict=True):
        assert axes.get_ylim() == (0, 1.05)
        for gates, moments in by.items():
            line, *dots = [
                drawn for drawn in axes.lines if drawn.get_color() == GATE_COLOURS[gates]
            ]
            assert list(line.get_ydata()) == [value["mean"] for value in moments.values()]
            assert [list(drawn.get_ydata()) for drawn in dots] == [
                value["seeds"] for value in moments.values()
            ]
            assert [round(x) for x in line.get_xdata()] == [MOMENTS.index(when) for when in moments]


def test_the_way_of_the_gates_keeps_its_sign():
    opening = [[[0, 0], [0, 0]], [[-0.25, 0.5], [0.75, -1]]]  # [points, layers, heads]
    figure = draw_gate_opening(dict(opening=[opening], steps=dict(stage_one=10), seeds=[7]))
    axes, _ = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines[1:]] == [[0, -0.25], [0, 0.5]]
    assert list(axes.lines[1].get_xdata()) == [0, 5] and "seed 7" in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["head 0", "head 1"]


def test_an_unknown_attribute_is_explained_in_one_line():
    with pytest.raises(
        ValueError, match="attribute: got 'smell', wants one of kind, colour, size, motion"
    ):
        draw_accuracy(results(), "smell")
