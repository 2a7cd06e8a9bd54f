"The experiments' results files: complete, what is shown of them, and found again in part."

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from ibllm.config import MODALITIES
from ibllm.encoders import extract_features
from ibllm.evaluation import load_results, wilson
from ibllm.experiments.figures_cache import (
    draw_beyond,
    draw_cases,
    draw_gains,
    draw_memories,
    draw_sweeps,
    draw_towers,
)
from ibllm.experiments.figures_space import (
    draw_arithmetic,
    draw_emergence,
    draw_gap,
    draw_joint_map,
)
from ibllm.experiments.figures_training import (
    FORM_LOOKS,
    GATE_COLOURS,
    MOMENTS,
    draw_forms,
    draw_gate_opening,
    draw_gate_starts,
    draw_never_pictured,
    draw_parts,
    draw_silence,
)
from ibllm.figures import save_figure
from ibllm.toyland.recipes import read_recording
from ibllm.toyland.scoring import caption_accuracy, modality_features, seed_models, zero_shot
from ibllm.toyland.world import ATTRIBUTES, CARRIES, KINDS, every_thing, text_prototypes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"


def cases(name, key, arrays):
    "Arguments of `draw_cases` from a results file and the arrays beside it."
    stored = load_file(RESULTS / f"{arrays}.safetensors")
    count = len(stored) // 2
    queries = [stored[f"query_{i}"] for i in range(count)]
    pictures = [stored[f"pictures_{i}"] for i in range(count)]
    return load_results(name)[key], queries, pictures


DRAW = dict(
    cache_gains=lambda: draw_gains(load_results("cache_ablation")["headline"]),
    cache_sweeps=lambda: draw_sweeps(load_results("cache_ablation")["sweeps"]),
    cache_memories=lambda: draw_memories(load_results("cache_ablation")["memories"]),
    cache_beyond=lambda: draw_beyond(load_results("cache_ablation")["beyond"]),
    cache_examples=lambda: draw_cases(*cases("cache_ablation", "examples", "cache_examples")),
    modality_gap=lambda: draw_gap(load_results("modality_gap")),
    gate_starts=lambda: draw_gate_starts(load_results("gates")),
    gate_opening=lambda: draw_gate_opening(load_results("gates")),
    injection_forms=lambda: draw_forms(load_results("injection_forms")),
    parts_and_stages=lambda: draw_parts(load_results("parts_and_stages")),
    other_towers=lambda: draw_towers(load_results("other_towers")),
    emergence=lambda: draw_emergence(load_results("emergence")),
    arithmetic=lambda: draw_arithmetic(load_results("arithmetic")),
    arithmetic_cases=lambda: draw_cases(*cases("arithmetic", "cases", "arithmetic_cases")),
    joint_map=lambda: draw_joint_map(
        load_results("joint_map"), dict(np.load(RESULTS / "joint_map.npz"))
    ),
    silence=lambda: draw_silence(load_results("silence")),
    never_pictured=lambda: draw_never_pictured(load_results("silence")),
)


def said(notebook, name):
    """What the code cell of an experiment with the id `name` printed or returned.

    As committed: nothing is run."""
    cells = json.loads((ROOT / f"nbs/experiments/{notebook}.ipynb").read_text())["cells"]
    [cell] = [cell for cell in cells if cell["id"] == name]
    texts = []
    for output in cell["outputs"]:
        texts += output.get("text") or output.get("data", {}).get("text/plain", ())
    return "".join(texts)


def numbers(part):
    "All numbers in a part of a results file, in order."
    if not isinstance(part, dict | list):
        return [part]
    found = []
    for inner in part.values() if isinstance(part, dict) else part:
        found += numbers(inner)
    return found


def stand_in_order(wanted, text):
    "Whether the numbers `wanted` stand in `text` in this order, each rounded as printed there."
    printed = re.finditer(r"[-+]?\d+(?:\.(\d+))?", text)  # goes on after the last one found

    def shows(shown, number):
        return float(shown[0]) == (round(number, len(shown[1])) if shown[1] else number)

    for number in wanted:
        if not any(shows(shown, number) for shown in printed):
            return False
    return True


def picked(part, depth, *keys):
    "Of every dictionary `depth` levels down in a part of a results file, the values at `keys`."
    if depth == 0:
        return [part[key] for key in keys]
    return [picked(inner, depth - 1, *keys) for inner in part.values()]


def said_of_the_cache():
    found = []
    for by in load_results("cache_ablation")["headline"].values():
        for cells in by.values():
            kind = cells["kind"]
            found += [kind[which]["mean"] for which in ("raw", "cache", "difference")]
    return found


def said_of_gates():
    results = load_results("gates")
    ability = picked(results["ability"], 3, "mean", "spread")
    return [ability, picked(results["kind"], 2, "mean", "spread")]


def said_of_walks():
    "The middle of every course."
    return [picked(by, 1, 5) for by in load_results("arithmetic")["walks"].values()]


SAID = {  # notebook and id of a cell: what its output shows
    ("01_cache_ablation", "c1ec1c9c"): said_of_the_cache,
    ("01_cache_ablation", "2b28a7ca"): lambda: load_results("cache_ablation")["tried"],
    ("02_modality_gap", "d6e5dfd9"): lambda: load_results("modality_gap")["controls"],
    ("03_gates", "5931b819"): said_of_gates,
    ("04_injection_forms", "a8bfc7e5"): lambda: picked(
        load_results("injection_forms")["scores"], 2, "mean", "spread"
    ),
    ("05_parts_and_stages", "3ace4bda"): lambda: picked(
        load_results("parts_and_stages")["scores"], 2, "mean", "spread"
    ),
    ("06_emergence", "da21f8c1"): lambda: load_results("emergence")["overview"],
    ("06_emergence", "45a5f6dd"): lambda: load_results("emergence")["chain"],
    ("07_arithmetic", "09f0c7bb"): lambda: load_results("arithmetic")["retrieval"],
    ("07_arithmetic", "4ca253d7"): said_of_walks,
    ("08_map", "61ab7883"): lambda: load_results("joint_map")["numbers"],
    ("08_map", "eb9c472a"): lambda: load_results("joint_map")["arrows"],
    ("09_what_it_should_not_say", "cfcdbb0d"): lambda: load_results("silence")["lessons"],
    ("09_what_it_should_not_say", "a934d5a7"): lambda: picked(
        load_results("silence")["places"], 3, "mean"
    ),
    ("10_the_papers_figures", "ae487a00"): lambda: load_results("paper_figures")["failures"][
        "blind"
    ],
    ("12_other_towers", "32877553"): lambda: load_results("other_towers")["zero_shot"],
}


@pytest.mark.parametrize("where", SAID, ids=" · ".join)
def test_a_notebook_shows_the_numbers_of_its_results_file(where):
    wanted, text = numbers(SAID[where]()), said(*where)
    assert stand_in_order(wanted, text)
    for i in range(len(wanted)):
        assert not stand_in_order([*wanted[:i], wanted[i] + 1.3, *wanted[i + 1 :]], text), (
            "another number would be seen"
        )


@pytest.mark.usefixtures("clean_style", "same_matplotlib")
@pytest.mark.parametrize("name", DRAW)
def test_a_committed_figure_is_what_its_results_give(name, tmp_path):
    drawn = save_figure(DRAW[name](), name, tmp_path)
    committed = ROOT / "figures" / drawn.name
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(committed)))
    written, wanted = (path.with_suffix(".pdf").read_bytes() for path in (drawn, committed))
    assert written == wanted


def assert_one_cell(modality, attribute, cell, seeds):
    "One modality and attribute of the headline: both ways lead to the same difference."
    d = cell["difference"]
    assert cell["carried"] == (attribute in CARRIES[modality])
    assert len(cell["mcnemar"]) == seeds
    assert d["low"] <= d["mean"] <= d["high"]
    gained = cell["cache"]["mean"] - cell["raw"]["mean"]
    assert gained == pytest.approx(d["mean"], abs=2e-4), "two ways to the same number"
    if not cell["carried"]:
        chance = dict(colour=1 / 6, motion=1 / 4)[attribute]  # a kind comes in six of the colours
        best = max(cell["raw"]["mean"], cell["cache"]["mean"])
        assert best < chance + 0.02, "a modality that cannot know it"


def test_the_cache_ablation_is_complete():
    results = load_results("cache_ablation")
    assert len(results["seeds"]) >= 5 and results["n_seen"] >= 1000
    for by in results["headline"].values():
        assert list(by) == list(MODALITIES)
        for modality, cells in by.items():
            for attribute, cell in cells.items():
                assert_one_cell(modality, attribute, cell, len(results["seeds"]))


def test_the_cache_names_kinds_better_in_every_seed_unless_they_were_never_pictured():
    headline = load_results("cache_ablation")["headline"]
    for modality in ("audio", "point", "depth", "thermal", "imu"):
        d = headline["seen"][modality]["kind"]["difference"]
        assert d["low"] > 0 and min(d["seeds"]) > 0, modality
    for modality in ("image", "video", "text"):
        d = headline["unseen"][modality]["kind"]["difference"]
        assert d["high"] < 0 and max(d["seeds"]) < 0, modality


def interval(gains, part, key="difference"):
    "-1 or 1 if the interval of a difference lies below or above zero, else 0."
    d = gains[key][part]
    return (d["low"] > 0) - (d["high"] < 0)


def test_knobs_are_compared_with_no_cache_and_none_of_them_helps_both_parts():
    results = load_results("cache_ablation")
    none, sweeps = results["memories"]["no cache"], results["sweeps"]
    for sweep in sweeps.values():
        for scores, gains in zip(sweep["scores"], sweep["gains"], strict=True):
            for part in ("seen", "unseen"):
                others = dict(scores[part])
                image = others.pop("image") - none[f"{part}_image"]
                gained = np.mean(list(others.values())) - none[part]
                assert gained == pytest.approx(gains["difference"][part]["mean"], abs=3e-4)
                assert image == pytest.approx(gains["image"][part]["mean"], abs=2e-4)
            assert interval(gains, "unseen") <= 0
    quarter = sweeps["weight"]["gains"][sweeps["weight"]["values"].index(0.25)]
    assert [interval(quarter, part) for part in ("seen", "unseen")] == [1, 0]
    assert interval(quarter, "unseen", "image") == -1


def test_memories_are_compared_with_no_cache():
    memories = load_results("cache_ablation")["memories"]
    for row in memories.values():
        for key, gains in row["gains"].items():
            for part, d in gains.items():
                name = part if key == "difference" else f"{part}_image"
                assert row[name] - memories["no cache"][name] == pytest.approx(d["mean"], abs=2e-4)
    gains = {name: row["gains"] for name, row in memories.items()}
    for name in ("the released kind: pictures", "captions"):
        assert [interval(gains[name], part) for part in ("seen", "unseen")] == [1, -1]
    for name in ("noise", "noise shaped like pictures"):
        assert (interval(gains[name], "seen"), interval(gains[name], "seen", "image")) == (0, -1)
    wide = gains["pictures of all combinations"]
    assert (interval(wide, "seen"), interval(wide, "unseen")) == (1, 1)
    assert interval(wide, "unseen", "image") == 0
    assert load_results("cache_ablation")["missing"]["kinds not in it"]["difference"]["high"] < 0


def test_ways_beyond_the_cache_are_compared_with_it_and_with_nothing():
    beyond = load_results("cache_ablation")["beyond"]
    for name, row in beyond.items():
        assert row["seeds"] >= 3
        references = {"the paper's cache": row, "no cache": row["to_no_cache"]}
        for reference, differences in references.items():
            for part, d in differences["difference"].items():
                before, after = (beyond[n]["by_seed"][part]["seeds"] for n in (reference, name))
                by_seed = [b - a for a, b in zip(before, after)]
                assert by_seed == pytest.approx(d["seeds"], abs=2e-4)
                assert len(by_seed) == row["seeds"]
                assert name == reference or d["p"] <= d["p_holm"] <= 1
    ways = [name for name in beyond if name != "no cache"]
    best = max(ways, key=lambda name: beyond[name]["difference"]["seen"]["mean"])
    assert best == "whitening"
    assert [interval(beyond[best], part) for part in ("seen", "unseen")] == [1, 1]
    to_nothing = beyond[best]["to_no_cache"]
    assert [interval(to_nothing, "unseen", key) for key in ("difference", "image")] == [-1, -1]
    assert interval(beyond["bridge"]["to_no_cache"], "unseen") == 1


def test_words_are_compared_with_the_feature_after_the_cache():
    words = load_results("cache_ablation")["words"]
    reference = words["feature after the cache"]["test"]
    for name, row in words.items():
        for key, suffix in dict(difference="", image="_image").items():
            for part, d in row[key].items():
                gained = row["test"][part + suffix] - reference[part + suffix]
                assert gained == pytest.approx(d["mean"], abs=2e-4)
                assert name == "feature after the cache" or d["p"] <= d["p_holm"] <= 1
    best = max(words, key=lambda name: words[name]["test"]["seen"])
    assert best == "that sentence alone"
    for key in ("difference", "image"):
        assert [interval(words[best], part, key) for part in ("seen", "unseen")] == [1, 1]


def test_sounds_and_motion_fail_by_naming_no_kind():
    faults = load_results("cache_ablation")["faults"]
    for modality in ("audio", "imu"):
        by = faults[f"{modality}, raw"]
        assert by["another kind"]["mean"] < 0.01 < by["no kind"]["mean"]
        assert faults[f"{modality}, cache"]["no kind"]["mean"] < by["no kind"]["mean"]
    image = faults["image, raw"]
    assert image["no kind"]["mean"] < 0.01 < image["another kind"]["mean"]


def test_a_part_of_the_ablation_is_found_again():
    """Depth maps of the test split, shipped model.

    The accuracies must lie in the intervals of the published ones."""
    model = seed_models([0])[0]
    published = load_results("cache_ablation")["headline"]["seen"]["depth"]
    things, features = modality_features(model, "test", modalities=("depth",))
    for row, cache in dict(raw=False, cache=None).items():
        hits = caption_accuracy(model, features["depth"], things, cache)
        for attribute in ATTRIBUTES:
            low, high = wilson(published[attribute][row]["seeds"][0], len(things))
            assert low <= hits[attribute].float().mean() <= high, (row, attribute)


def test_a_part_of_emergence_is_found_again():
    """Sounds named by point clouds, once more, by the shipped towers.

    The accuracy must lie within the interval of the published one."""
    model = seed_models([0])[0]
    things, sounds = modality_features(model, "test", modalities=("audio",))
    known, clouds = modality_features(model, "validation", modalities=("point",))
    means = [clouds["point"][known.kind == kind].mean(0) for kind in range(len(KINDS))]
    guess = (sounds["audio"] @ F.normalize(torch.stack(means), dim=1).T).argmax(1)
    naming = load_results("emergence")["naming"]
    published = naming[MODALITIES.index("audio")][MODALITIES.index("point")]
    low, high = wilson(published, len(things))
    assert low <= (guess == things.kind).float().mean() <= high


def assert_paired(scores, difference, reference):
    "Differences to the `reference` arm are those of the means, within their own interval."
    for arm, by in difference.items():
        for asked, d in by.items():
            assert d["low"] <= d["mean"] <= d["high"] and d["p"] <= d["p_holm"] <= 1
            gained = scores[arm][asked]["mean"] - scores[reference][asked]["mean"]
            assert gained == pytest.approx(d["mean"], abs=2e-4)


def test_ways_in_are_compared_thing_by_thing():
    results = load_results("injection_forms")
    assert len(results["seeds"]) >= 3 and results["n"]["pictured"] >= 1000
    assert list(results["scores"]) == list(results["losses"]) == list(FORM_LOOKS)
    seconds = results["step_seconds"]
    slower = {form: s / seconds["attention output"] for form, s in seconds.items()}
    assert slower == pytest.approx(results["slower"], rel=0.2), (
        "a median of ratios is about the ratio of medians"
    )
    for form, tried in results["tried"].items():
        assert results["rates"][form] == float(max(tried, key=tried.get))
    assert_paired(results["scores"], results["difference"], "attention output")


def test_starts_of_the_gates_are_asked_the_same_at_every_moment():
    results = load_results("gates")
    starts, moments = list(GATE_COLOURS), list(MOMENTS)
    assert len(results["seeds"]) >= 3 and results["n"] >= 1000
    for by in results["ability"].values():
        assert list(by) == starts and all(list(course) == moments for course in by.values())
        shut = by["zero"]["before"]["seeds"]
        assert shut == [1] * len(results["seeds"]), "a shut gate lets nothing in"
    assert_paired(results["kind"], results["difference"], "zero")
    for by in results["difference"].values():
        for d in by.values():
            assert len(d["seeds"]) == len(results["seeds"])
            assert max(d["seeds"]) < 0, "zero gates lead"


def test_gates_open_from_zero_and_are_needed():
    results = load_results("gates")
    kind = {gates: by["after stage 2"]["mean"] for gates, by in results["kind"].items()}
    assert kind["open"] < 0.2 < 0.5 < min(kind["zero"], kind["random"])
    opening, final = torch.tensor(results["opening"]), torch.tensor(results["final"])
    assert opening.shape == (len(results["seeds"]), 100, 4, 4) and not opening[:, 0].any()
    assert torch.allclose(opening[:, -1], final, atol=0.002), (
        "the rate ends at zero, and so does the way"
    )
    assert final[0].abs().mean(1).argmax() == 3, "the last layer opens widest"


def test_parts_are_compared_thing_by_thing():
    results = load_results("parts_and_stages")
    assert len(results["seeds"]) >= 3 and results["n"]["pictured"] >= 1000
    assert set().union(*results["groups"].values()) == set(results["scores"])
    blind = results["scores"]["stage 2 alone"]["kind, pictured"]
    assert blind["mean"] < 0.2, "blind by construction"
    assert_paired(results["scores"], results["difference"], "reference")
    for arm, sign in {"linear": -1, "stage 1 alone": 1, "stage 2 alone": -1, "joint": 1}.items():
        for d in results["difference"][arm].values():
            assert min(sign * seed for seed in d["seeds"]) > 0, arm
    rivals = {arm: results["scores"][arm] for arm in ("reference, cache", *results["to_cache"])}
    assert_paired(rivals, results["to_cache"], "reference, cache")


def test_the_other_towers_are_measured_like_the_shipped_ones():
    results = load_results("other_towers")
    assert len(results["seeds"]) >= 3 and results["n"]["seen"] >= 1000
    carried = []
    for modality in MODALITIES:
        carried += [f"{modality} {attribute}" for attribute in CARRIES[modality]]
    for part, agreement in results["agreement"].items():
        compared = [name.split(",")[0] for name in sum(agreement.values(), [])]
        assert sorted(compared) == sorted(carried)
        for by in results["headline"].values():
            assert list(by[part]) == list(MODALITIES)
            for cells in by[part].values():
                for cell in cells.values():
                    assert len(cell["difference"]["seeds"]) == len(results["seeds"])
                    gained = cell["cache"]["mean"] - cell["raw"]["mean"]
                    assert gained == pytest.approx(cell["difference"]["mean"], abs=2e-4)


def test_emergence_is_measured_for_all_pairs_of_modalities():
    results = load_results("emergence")
    assert results["modalities"] == list(MODALITIES) and results["n"] >= 1000
    for name in ("own", "alike", "naming", "untrained_naming"):
        matrix = torch.tensor(results[name])
        assert matrix.shape == (8, 8) and ((0 <= matrix) & (matrix <= 1)).all()
    emergent = results["overview"]["emergent"]
    assert emergent["naming"] > 4 * emergent["untrained"]


def test_the_gap_has_its_controls_and_its_course():
    results = load_results("modality_gap")
    assert list(results["gaps"]) == [modality for modality in MODALITIES if modality != "image"]
    assert set(results["controls"]) == {"pictures, taken again", "pictures, dealt anew"}
    for course in results["courses"].values():
        steps = [row["step"] for row in course]
        assert steps[0] == 0 and steps == sorted(steps) and course[0]["pair"] < course[-1]["pair"]
    names = list(results["gains"])
    assert not any(name.endswith(" 14") for name in names), "the shipped towers count once"
    for by in results["correlations"].values():
        assert by["raw"]["low"] <= by["raw"]["r"] <= by["raw"]["high"]


def test_a_third_sound_leads_nowhere_and_the_cache_helps_only_what_was_pictured():
    sums = load_results("arithmetic")["sums"]
    assert sums["swap"]["seen"]["off"]["both"]["mean"] > 0.9
    for part in ("seen", "unseen"):
        for row in ("off", "on"):
            assert sums["swap with a third sound"][part][row]["both"]["mean"] < 0.05
    for name in ("swap", "mixture", "direction"):
        for part, sign in dict(seen=1, unseen=-1).items():
            d = sums[name][part]["difference"]
            assert d["p_holm"] < 0.05, (name, part)
            assert all(sign * x > 0 for x in (d["low"], d["high"], *d["seeds"])), (name, part)


def test_sums_are_compared_question_by_question():
    results = load_results("arithmetic")
    for by in results["sums"].values():
        assert by["seen"]["n"] + by["unseen"]["n"] == results["n"]
        for part in by.values():
            assert len(part["mcnemar"]) == len(results["seeds"]) >= 3
            gained = part["on"]["both"]["mean"] - part["off"]["both"]["mean"]
            assert gained == pytest.approx(part["difference"]["mean"], abs=2e-4)
    for course in results["walks"].values():
        for shares in zip(*course.values()):
            assert sum(shares) == pytest.approx(1, abs=1e-3)


def assert_ends(case, when, cell):
    "Every answer ends one way; what cannot be right is not, and nobody refuses untaught."
    assert sum(share["mean"] for share in cell.values()) == pytest.approx(1, abs=1e-3)
    if when == "before":
        assert cell["refused"]["mean"] == 0, "nobody had taught it to refuse"
    if case in ("noise", "mean picture", "zero", "strange questions", "new questions"):
        assert cell["right"]["mean"] == 0, "nothing can be right"


def test_answers_that_should_not_be_given_are_counted_in_full():
    results = load_results("silence")
    assert len(results["seeds"]) >= 3 and results["best"] in results["lessons"]
    everything = results["outcomes"] | results["other_outcomes"]
    for case, by in everything.items():
        for when, rows in by.items():
            for cell in rows.values():
                assert_ends(case, when, cell)
    for key, d in results["changes"].items():
        row, case, outcome, *control = key.split(", ")
        if control:
            continue
        before, after = (everything[case][when][row][outcome] for when in ("before", "after"))
        assert after["mean"] - before["mean"] == pytest.approx(d["mean"], abs=2e-4)
    for curve in results["curves"].values():
        assert curve["coverage"] == sorted(curve["coverage"]) and curve["coverage"][-1] <= 1


def test_what_was_never_pictured_is_followed_from_the_feature_to_the_answer():
    results = load_results("silence")
    places, remedies = results["places"], results["remedies"]
    assert list(places)[0] == "search" and list(places)[-1] == "answer"
    probes = results["probes"]["pictured"]
    assert {name: by for name, by in places.items() if name in probes} == probes
    for name, row in remedies.items():
        for part in ("seen", "unseen"):
            gained = row[part]["both"]["mean"] - places["answer"][part]["both"]["mean"]
            assert gained == pytest.approx(row["difference"][part]["mean"], abs=2e-4), name
    bind, lora = (remedies[f"{which}: pictures of all"]["unseen"] for which in ("bind", "LoRA"))
    difference = results["bind_over_lora"]["unseen"]["mean"]
    assert bind["both"]["mean"] - lora["both"]["mean"] == pytest.approx(difference, abs=2e-4)


def test_a_part_of_the_search_for_the_never_pictured_is_found_again():
    "The kinds of new, never-pictured combinations, searched among sentences by shipped towers."
    model = seed_models([0])[0]
    results = load_results("silence")
    things, features = modality_features(model, "test_unseen", modalities=("image",))

    def embed(texts):
        recording = read_recording(model.processor, "text", texts)
        return extract_features(model.encoder, "text", recording)

    found = zero_shot(features["image"], text_prototypes(embed), every_thing())
    published = results["never"]["unseen"]["image"]["search"]["kind"]["mean"]
    low, high = wilson(published, results["n_unseen"])
    assert low <= (found["kind"] == things.kind).float().mean() <= high
