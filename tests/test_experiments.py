"The experiments' results files: complete, what the figures show, and found again by a small part of the experiment."
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from ibllm import figures
from ibllm.evaluation import (
    caption_accuracy, every_thing, load_results, seed_models, sense_features, text_prototypes, wilson, zero_shot)
from ibllm.training import extract_features, read_recording
from ibllm.world import ATTRIBUTES, CARRIES, KINDS, SENSORS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"


def cases(name, key, arrays):
    "Arguments of `draw_cases` from a results file and the arrays beside it."
    stored = load_file(RESULTS / f"{arrays}.safetensors")
    lists = ([stored[f"{kind}_{i}"] for i in range(len(stored) // 2)] for kind in ("query", "pictures"))
    return load_results(name)[key], *lists


DRAW = dict(
    cache_gains=lambda: figures.draw_gains(load_results("cache_ablation")["headline"]),
    cache_sweeps=lambda: figures.draw_sweeps(load_results("cache_ablation")["sweeps"]),
    cache_memories=lambda: figures.draw_memories(load_results("cache_ablation")["memories"]),
    cache_beyond=lambda: figures.draw_beyond(load_results("cache_ablation")["beyond"]),
    cache_examples=lambda: figures.draw_cases(*cases("cache_ablation", "examples", "cache_examples")),
    modality_gap=lambda: figures.draw_gap(load_results("modality_gap")),
    gate_starts=lambda: figures.draw_gate_starts(load_results("gates")),
    gate_opening=lambda: figures.draw_gate_opening(load_results("gates")),
    injection_forms=lambda: figures.draw_forms(load_results("injection_forms")),
    parts_and_stages=lambda: figures.draw_parts(load_results("parts_and_stages")),
    other_towers=lambda: figures.draw_towers(load_results("other_towers")),
    emergence=lambda: figures.draw_emergence(load_results("emergence")),
    arithmetic=lambda: figures.draw_arithmetic(load_results("arithmetic")),
    arithmetic_cases=lambda: figures.draw_cases(*cases("arithmetic", "cases", "arithmetic_cases")),
    joint_map=lambda: figures.draw_joint_map(load_results("joint_map"), dict(np.load(RESULTS / "joint_map.npz"))),
    silence=lambda: figures.draw_silence(load_results("silence")),
    never_pictured=lambda: figures.draw_never_pictured(load_results("silence")),
)


@pytest.mark.usefixtures("clean_style", "same_matplotlib")
@pytest.mark.parametrize("name", DRAW)
def test_a_committed_figure_is_what_its_results_give(name, tmp_path):
    drawn = figures.save_figure(DRAW[name](), name, tmp_path)
    pixels, committed = (np.asarray(Image.open(f)) for f in (drawn, ROOT / "figures" / f"{name}.png"))
    assert np.array_equal(pixels, committed)
    assert drawn.with_suffix(".pdf").read_bytes() == (ROOT / "figures" / f"{name}.pdf").read_bytes()


def test_the_cache_ablation_is_complete():
    results = load_results("cache_ablation")
    assert len(results["seeds"]) >= 5 and results["n_seen"] >= 1000
    for by in results["headline"].values():
        assert list(by) == list(SENSORS)
        for sense, cells in by.items():
            for attribute, cell in cells.items():
                assert cell["carried"] == (attribute in CARRIES[sense])
                assert len(cell["mcnemar"]) == len(results["seeds"])
                assert cell["difference"]["low"] <= cell["difference"]["mean"] <= cell["difference"]["high"]
                gained = cell["cache"]["mean"] - cell["raw"]["mean"]
                assert gained == pytest.approx(cell["difference"]["mean"], abs=2e-4), "two ways to the same number"
                if cell["carried"]: continue
                chance = dict(colour=1 / 6, motion=1 / 4)[attribute]                # a kind comes in six of the colours
                assert max(cell["raw"]["mean"], cell["cache"]["mean"]) < chance + .02, "a sense that cannot know it"


def test_a_part_of_the_ablation_is_found_again():
    "Depth maps of the test split, shipped model: the accuracies must lie in the intervals of the published ones."
    models, published = seed_models([0]), load_results("cache_ablation")["headline"]["seen"]["depth"]
    things, features = sense_features(models[0], "test", senses=("depth",))
    for row, cache in dict(raw=False, cache=True).items():
        hits = caption_accuracy(models[0], features["depth"], things, cache)
        for attribute in ATTRIBUTES:
            low, high = wilson(published[attribute][row]["seeds"][0], len(things))
            assert low <= hits[attribute].float().mean() <= high, (row, attribute)


def test_a_part_of_emergence_is_found_again():
    "Sounds named by point clouds, once more, by the shipped towers: within the interval of the published accuracy."
    model, results = seed_models([0])[0], load_results("emergence")
    things, sounds = sense_features(model, "test", senses=("audio",))
    known, clouds = sense_features(model, "validation", senses=("point",))
    means = torch.stack([clouds["point"][known.kind == kind].mean(0) for kind in range(len(KINDS))])
    guess = (sounds["audio"] @ F.normalize(means, dim=1).T).argmax(1)
    low, high = wilson(results["naming"][SENSORS.index("audio")][SENSORS.index("point")], len(things))
    assert low <= (guess == things.kind).float().mean() <= high


def assert_paired(scores, difference, reference):
    "Differences to the `reference` arm are those of the means, within their own interval."
    for arm, by in difference.items():
        for asked, d in by.items():
            assert d["low"] <= d["mean"] <= d["high"] and d["p"] <= d["p_holm"] <= 1
            assert scores[arm][asked]["mean"] - scores[reference][asked]["mean"] == pytest.approx(d["mean"], abs=2e-4)


def test_ways_in_are_compared_thing_by_thing():
    results = load_results("injection_forms")
    assert len(results["seeds"]) >= 3 and results["n"]["pictured"] >= 1000
    assert list(results["scores"]) == list(results["losses"]) == list(figures.FORM_LOOKS)
    assert all(results["rates"][form] == max(tried, key=tried.get) for form, tried in
               ((form, {float(rate): v for rate, v in by.items()}) for form, by in results["tried"].items()))
    assert_paired(results["scores"], results["difference"], "attention output")


def test_parts_are_compared_thing_by_thing():
    results = load_results("parts_and_stages")
    assert len(results["seeds"]) >= 3 and results["n"]["pictured"] >= 1000
    assert {arm for arms in results["groups"].values() for arm in arms} == set(results["scores"])
    assert results["scores"]["stage 2 alone"]["kind, pictured"]["mean"] < .2, "blind by construction"
    assert_paired(results["scores"], results["difference"], "reference")
    rivals = {arm: results["scores"][arm] for arm in ("reference, cache", *results["to_cache"])}
    assert_paired(rivals, results["to_cache"], "reference, cache")


def test_the_other_towers_are_measured_like_the_shipped_ones():
    results = load_results("other_towers")
    assert len(results["seeds"]) >= 3 and results["n"]["seen"] >= 1000
    for part, agreement in results["agreement"].items():
        assert list(results["gains"]["shipped"][part]) == list(results["gains"]["other"][part]) == list(SENSORS)
        assert sum(agreement.values()) == len(SENSORS)
        for sense, row in results["gains"]["other"][part].items():
            gained = row["cache"]["mean"] - row["raw"]["mean"]
            assert gained == pytest.approx(row["difference"]["mean"], abs=2e-4), sense


def test_emergence_is_measured_for_all_pairs_of_senses():
    results = load_results("emergence")
    assert results["senses"] == list(SENSORS) and results["n"] >= 1000
    for matrix in ("own", "alike", "naming", "untrained_naming"):
        assert [len(row) for row in results[matrix]] == [8] * 8
        assert all(0 <= value <= 1 for row in results[matrix] for value in row)
    assert results["overview"]["emergent"]["naming"] > 4 * results["overview"]["emergent"]["untrained"]


def test_the_gap_has_its_controls_and_its_course():
    results = load_results("modality_gap")
    assert list(results["gaps"]) == [sense for sense in SENSORS if sense != "image"]
    assert set(results["controls"]) == {"pictures, taken again", "pictures, dealt anew"}
    for course in results["courses"].values():
        steps = [row["step"] for row in course]
        assert steps[0] == 0 and steps == sorted(steps) and course[0]["pair"] < course[-1]["pair"]


def test_sums_are_compared_question_by_question():
    results = load_results("arithmetic")
    for by in results["sums"].values():
        assert by["seen"]["n"] + by["unseen"]["n"] == results["n"]
        for part in by.values():
            assert len(part["mcnemar"]) == len(results["seeds"]) >= 3
            gained = part["on"]["both"]["mean"] - part["off"]["both"]["mean"]
            assert gained == pytest.approx(part["difference"]["mean"], abs=2e-4)
    for course in results["walks"].values():
        for shares in zip(*course.values()): assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_answers_that_should_not_be_given_are_counted_in_full():
    results = load_results("silence")
    assert len(results["seeds"]) >= 3 and results["best"] in results["lessons"]
    for case, by in results["outcomes"].items():
        for when, rows in by.items():
            for cells in rows.values():
                assert sum(s["mean"] for s in cells.values()) == pytest.approx(1, abs=1e-3), "every answer ends one way"
                assert when != "before" or cells["refused"]["mean"] == 0, "nobody had taught it to refuse"
                assert case in ("carried", "not carried") or cells["right"]["mean"] == 0, "nothing can be right"
    for key, d in results["changes"].items():
        row, case, outcome, *control = key.split(", ")
        if control: continue
        gained = (results["outcomes"][case][when][row][outcome]["mean"] for when in ("after", "before"))
        assert next(gained) - next(gained) == pytest.approx(d["mean"], abs=2e-4)
    for curve in results["curves"].values():
        assert curve["coverage"] == sorted(curve["coverage"]) and curve["coverage"][-1] <= 1


def test_what_was_never_pictured_is_followed_from_the_feature_to_the_answer():
    results = load_results("silence")
    assert list(results["places"])[0] == "search" and list(results["places"])[-1] == "answer"
    assert {name: by for name, by in results["places"].items() if name in results["probes"]["pictured"]} == \
        results["probes"]["pictured"]
    for name, row in results["remedies"].items():
        for part in ("seen", "unseen"):
            gained = row[part]["both"]["mean"] - results["places"]["answer"][part]["both"]["mean"]
            assert gained == pytest.approx(row["difference"][part]["mean"], abs=2e-4), name
    bind, lora = (results["remedies"][f"{which}: pictures of all"]["unseen"]["both"]["mean"]
                  for which in ("bind", "LoRA"))
    assert bind - lora == pytest.approx(results["bind_over_lora"]["unseen"]["mean"], abs=2e-4)


def test_a_part_of_the_search_for_the_never_pictured_is_found_again():
    "The kinds of new pictures of never-pictured combinations, searched among sentences by the shipped towers."
    model, published = seed_models([0])[0], load_results("silence")["never"]["unseen"]["image"]["search"]
    things, features = sense_features(model, "test_unseen", senses=("image",))
    prototypes = text_prototypes(lambda texts: extract_features(
        model.encoder, "text", read_recording(model.processor, "text", texts)))
    found = zero_shot(features["image"], prototypes, every_thing())
    low, high = wilson(published["kind"]["mean"], load_results("silence")["n_unseen"])
    assert low <= (found["kind"] == things.kind).float().mean() <= high
