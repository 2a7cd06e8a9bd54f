"The experiments' results files: complete, what the figures show, and found again by a small part of the experiment."
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from ibllm import figures
from ibllm.evaluation import caption_accuracy, load_results, seed_models, sense_features, wilson
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
    emergence=lambda: figures.draw_emergence(load_results("emergence")),
    arithmetic=lambda: figures.draw_arithmetic(load_results("arithmetic")),
    arithmetic_cases=lambda: figures.draw_cases(*cases("arithmetic", "cases", "arithmetic_cases")),
    joint_map=lambda: figures.draw_joint_map(load_results("joint_map"), dict(np.load(RESULTS / "joint_map.npz"))),
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
