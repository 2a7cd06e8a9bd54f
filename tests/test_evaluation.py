"Scores against hand-made features and formulas; results files that are whole or not there."

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from ibllm.config import CacheSettings
from ibllm.encoders import extract_features
from ibllm.evaluation import (
    holm,
    load_results,
    mcnemar,
    modality_gap,
    neighbour_vote,
    paired_difference,
    purity,
    recall_at,
    save_results,
    separability,
    summary,
    wilson,
)
from ibllm.files import project_folder
from ibllm.model import _NearlyAll, answer_all
from ibllm.toyland import recipes
from ibllm.toyland.recipes import RECIPES, read_recording, toyland_settings
from ibllm.toyland.scoring import (
    answer_accuracy,
    caption_accuracy,
    caption_hits,
    carried_hits,
    modality_features,
    score_captions,
    seed_models,
    zero_shot,
)
from ibllm.toyland.sensors import record
from ibllm.toyland.world import (
    ATTRIBUTES,
    CARRIES,
    describe,
    draw_things,
    every_thing,
    read_attributes,
    split_things,
    text_prototypes,
)


def one_hot(things):
    "Features that list the attributes: alike things have alike features."
    columns = [F.one_hot(getattr(things, name), len(words)) for name, words in ATTRIBUTES.items()]
    return F.normalize(torch.cat(columns, 1).float(), dim=1)


# Captions and answers


class Model:
    "Answers with the position that its feature holds; remembers how it was asked."

    class config:
        class encoder:
            feature_dim = 7

    llm, tokenizer = torch.nn.Identity(), SimpleNamespace(eos_token_id=2)

    def __init__(self, replies):
        self.replies, self.batches = replies, []

    def enhance(self, features, cache):
        return features + 1 if cache else features

    def answer(self, features, questions, **options):
        self.batches.append((tuple(features.shape), options["do_sample"]))
        return [self.replies[int(i)] for i in features[:, 0]]


def test_captions_are_scored_attribute_by_attribute():
    things = draw_things(3, seed=0)
    words = [things.words(i) for i in range(3)]
    right = score_captions(
        ["{colour}".format(**words[0]), "it is {size} and {motion}".format(**words[1]), ""], things
    )
    assert {a: hits.tolist() for a, hits in right.items()} == dict(
        kind=[False] * 3,
        colour=[True, False, False],
        size=[False, True, False],
        motion=[False, True, False],
    )


def test_caption_accuracy_asks_in_batches_and_with_the_cache():
    things = draw_things(700, seed=0)
    captions = describe(things, seed=0)
    features = torch.arange(700.0)[:, None]
    model = Model(captions + ["nothing"])
    assert all(hits.all() for hits in caption_accuracy(model, features, things).values())
    assert model.batches == [((n, 1), False) for n in (250, 250, 200)]
    shifted = caption_accuracy(model, features, things, cache=CacheSettings())
    assert shifted["kind"].float().mean() < 0.2 and not shifted["kind"][-1]


def test_like_questions_are_asked_together_and_with_lora_merged(monkeypatch):
    model, asked = seed_models([0])[0], []

    def answer(features, prompts, **options):
        asked.append((prompts, any(getattr(m, "merged", False) for m in model.llm.modules())))
        return prompts

    monkeypatch.setattr(model, "answer", answer)
    questions = ["what is it ?", "describe it ."] * 3
    assert answer_all(model, torch.zeros(6, 128), questions, chunk=3) == questions
    assert asked == [(["what is it ?"] * 3, True), (["describe it ."] * 3, True)]


def test_many_questions_get_the_answers_they_get_alone():
    model = seed_models([0])[0]
    _, features = modality_features(model, "test", size=9, modalities=("audio",))
    questions = [
        "what is it ?",
        "describe it .",
        ("what is it ?", "a small red bell that is bouncing"),
    ] * 3
    alone = [
        model.answer(features["audio"][i : i + 1], [q], do_sample=False)[0]
        for i, q in enumerate(questions)
    ]
    assert answer_all(model, features["audio"], questions, chunk=4) == alone
    assert answer_all(model, features["audio"][:2], questions[0]) == [
        model.answer(features["audio"][i : i + 1], questions[0], do_sample=False)[0]
        for i in range(2)
    ]
    assert answer_all(model, features["audio"][:0], "what is it ?") == []
    with pytest.raises(ValueError, match="^prompts: got 9 for 2 features"):
        answer_all(model, features["audio"][:2], questions)


def test_long_answers_are_asked_for_again_and_change_nothing(monkeypatch):
    model, sizes = seed_models([0])[0], []
    _, features = modality_features(model, "test", size=60, modalities=("audio",))
    questions = ["what is it ?"] * 58 + [
        "describe it ."
    ] * 2  # an answer of two words, and of seven
    alone = [
        model.answer(features["audio"][i : i + 1], q, do_sample=False)[0]
        for i, q in enumerate(questions)
    ]
    answer = model.answer
    monkeypatch.setattr(
        model, "answer", lambda f, q, **options: sizes.append(len(f)) or answer(f, q, **options)
    )
    assert answer_all(model, features["audio"], questions) == alone and sizes == [60, 2]


def test_a_batch_ends_when_nineteen_of_twenty_answers_have():
    prompt, eos = torch.full((20, 3), 2), 2  # what is padded with the end has not ended
    stop = _NearlyAll(eos)
    assert (
        not stop(torch.cat([prompt, torch.arange(20)[:, None] % 3], 1), None).any()
        and stop.left == []
    )
    words = torch.full((20, 2), 5)
    words[1:, 1] = eos
    assert stop(torch.cat([prompt, words], 1), None).all() and stop.left == [0]
    few = _NearlyAll(eos)
    for length in (4, 5):
        assert not few(torch.cat([prompt, words], 1)[:19, :length], None).any()


def test_answer_accuracy_counts_exact_answers_per_topic():
    exercises = [
        dict(about=about, question="?", answer=right)
        for about, right in (
            ("size", "big"),
            ("kind", "a bell"),
            ("size", "small"),
            ("kind", "a ball"),
        )
    ]
    model = Model(["big", "a bell", "big", "a ball ."])
    assert answer_accuracy(model, exercises, torch.arange(4.0)[:, None]) == dict(kind=0.5, size=0.5)
    assert answer_accuracy(model, exercises) == dict(kind=0, size=0.5), "a zero feature each"
    assert model.batches[-1][0] == (4, 7)


# How sure


def by_hand(share, n, z):
    "Wilson's interval as he wrote it in 1927."
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@pytest.mark.parametrize("z", [1.0, 1.96, 2.5758])
@pytest.mark.parametrize("hits, n", [(0, 7), (1, 1), (5, 10), (837, 900), (900, 900)])
def test_wilson_is_his_formula(hits, n, z):
    assert wilson(hits / n, n, z) == pytest.approx(by_hand(hits / n, n, z), abs=1e-12)
    rounded = torch.tensor(hits / n).item()  # float32
    assert wilson(rounded, n, z) == wilson(hits / n, n, z)


def test_wilson_is_the_textbooks():
    assert [round(x, 4) for x in wilson(0.5, 10)] == [0.2366, 0.7634]


@pytest.mark.parametrize("fixed, broken", [(0, 0), (1, 0), (12, 3), (20, 20), (0, 40), (700, 640)])
def test_mcnemar_counts_the_tosses_of_a_coin(fixed, broken):
    before = torch.tensor([False] * fixed + [True] * broken + [True, False])
    after = torch.tensor([True] * fixed + [False] * broken + [True, False])
    result = mcnemar(before, after)
    n, low = fixed + broken, min(fixed, broken)
    tails = 2 * sum(math.comb(n, i) for i in range(low + 1))
    assert (result["fixed"], result["broken"]) == (fixed, broken)
    assert result["p"] == pytest.approx(min(1, tails / 2**n), rel=1e-12)


def test_paired_difference_is_scipys_standard_error_over_things():
    g = torch.Generator().manual_seed(0)
    before, after = torch.rand(3, 200, generator=g) < 0.6, torch.rand(3, 200, generator=g) < 0.7
    difference = (after.double() - before.double()).mean(0).numpy()
    error = stats.sem(difference)
    result = paired_difference(before, after)
    assert result["mean"] == pytest.approx(difference.mean(), abs=1e-4)
    assert (result["low"], result["high"]) == pytest.approx(
        (difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=1e-4
    )
    assert result["p"] == pytest.approx(2 * stats.norm.sf(abs(difference.mean()) / error))
    assert result["seeds"] == pytest.approx(
        (after.double() - before.double()).mean(1).tolist(), abs=1e-4
    )


def test_paired_difference_counts_a_thing_once_however_often_it_is_asked():
    before, after = torch.arange(50) < 20, torch.arange(50) < 30
    once, often = (
        paired_difference(before, after),
        paired_difference(before.expand(7, 2, -1), after.expand(7, 2, -1)),
    )
    assert once | dict(seeds=[0.2] * 7) == often and once["seeds"] == [0.2]
    assert paired_difference(before, before) == dict(mean=0, low=0, high=0, p=1, seeds=[0])
    assert paired_difference(torch.zeros(4), torch.ones(4))["p"] == 0


def test_holm_is_the_textbooks():
    assert holm(dict(c=0.03, a=0.01, b=0.02, d=0.5)) == pytest.approx(
        dict(c=0.06, a=0.04, b=0.06, d=0.5)
    )
    assert list(holm(dict(c=0.03, a=0.01))) == ["c", "a"] and holm(dict(a=0.7, b=0.8)) == dict(
        a=1, b=1
    )


def test_summary_is_mean_and_sample_deviation():
    assert summary([0.9, 0.92, 0.97]) == dict(
        mean=0.93, spread=round(math.sqrt(0.0026 / 2), 4), seeds=[0.9, 0.92, 0.97]
    )
    assert summary([0.123456]) == dict(mean=0.1235, spread=0.0, seeds=[0.1235])


# Ceilings


def test_every_thing_is_there_once():
    things = every_thing()
    assert len({tuple(things.words(i).values()) for i in range(len(things))}) == len(things) == 768


def test_neighbours_vote():
    memory = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1]]), dim=1)
    labels = torch.tensor([4, 2, 2, 7, 7])
    query = torch.tensor([[1.0, 0], [0, 1]])
    assert neighbour_vote(query, memory, labels, k=1).tolist() == [4, 7]
    assert neighbour_vote(query, memory, labels, k=3).tolist() == [2, 7]
    assert neighbour_vote(query[:1], memory, labels, k=2).tolist() == [2], (
        "of 4 and 2, once each, the lower"
    )


def test_zero_shot_finds_the_nearest_text_even_in_noise():
    everything, things = every_thing(), draw_things(100, seed=1)
    noisy = one_hot(things) + 0.02 * torch.randn(
        100, 26, generator=torch.Generator().manual_seed(0)
    )
    guess = zero_shot(noisy, one_hot(everything), everything)
    assert all(torch.equal(guess[name], getattr(things, name)) for name in ATTRIBUTES)


def test_text_prototypes_are_unit_and_mean_over_phrasings():
    def embed(captions):
        length = torch.tensor([[float(len(c))] for c in captions])
        return torch.cat(
            [torch.tensor([list(read_attributes(c).values()) for c in captions]) + 1.0, length], 1
        )

    prototypes = text_prototypes(embed)
    assert prototypes.shape == (768, 5)
    assert torch.allclose(prototypes.norm(dim=1), torch.ones(768), atol=1e-6)
    things = every_thing()
    ratio = prototypes[:, 0] / prototypes[:, 1]
    assert torch.allclose(ratio, (things.kind + 1) / (things.colour + 1), rtol=1e-5), (
        "attributes survive the mean"
    )


# The gap


def test_gap_of_two_known_clouds():
    a, b = torch.eye(4)[:2], torch.eye(4)[2:]
    assert modality_gap(a, b) == pytest.approx(dict(centroid=1, pair=0, other=0), abs=1e-6)
    assert modality_gap(a, a) == pytest.approx(dict(centroid=0, pair=1, other=0), abs=1e-6)


def test_recall_counts_matches_and_no_ties():
    g = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(300, 16, generator=g), dim=1)
    assert recall_at(a, a) == 1 and recall_at(a, a.flip(0)) == 0
    ranks = (a @ a.roll(1, 0).T).argsort(1, descending=True)
    expected = (ranks[:, :5] == torch.arange(300)[:, None]).any(1).float().mean()
    assert recall_at(a, a.roll(1, 0), k=5) == pytest.approx(expected.item())
    collapsed = a[:1].expand(300, -1)
    assert recall_at(collapsed, collapsed, k=10) == 0, "features that are all the same find nothing"


def test_two_heaps_are_told_apart_and_one_is_not():
    g = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(400, 8, generator=g), dim=1) for _ in range(2))
    assert 0.4 < separability(a, b) < 0.6 and 0.45 < purity(a, b) < 0.55
    shifted = F.normalize(b + 3 * torch.eye(8)[0], dim=1)
    assert separability(a, shifted) > 0.95 and purity(a, shifted) > 0.9


def test_purity_leaves_the_row_and_its_match_out():
    one, other = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    assert purity(torch.cat([one, one]), torch.cat([other, other]), k=1) == 1
    assert purity(torch.cat([one, other]), torch.cat([other, one]), k=1) == 0, (
        "the nearest is of the other modality"
    )


# What experiments share


def test_features_of_modalities_are_the_encoders_in_the_order_asked_for():
    model = seed_models([0])[0]
    things, features = modality_features(model, "validation", size=9, modalities=("text", "audio"))
    expected, key = split_things("validation", size=9)
    assert torch.equal(things.kind, expected.kind) and list(features) == ["text", "audio"]
    for modality, recording in record(expected, key, ("text", "audio")).items():
        made = extract_features(
            model.encoder, modality, read_recording(model.processor, modality, recording)
        )
        assert torch.equal(features[modality], made)


def test_hits_are_by_seed_modality_thing_and_attribute():
    things = draw_things(5, seed=0)
    captions = describe(things, seed=0)
    models = {0: Model(captions * 2), 1: Model([""] * 10)}
    features = dict(image=torch.arange(5.0)[:, None], point=torch.arange(5.0, 10)[:, None])
    hits = caption_hits(models, features, things)
    assert hits.shape == (2, 2, 5, 4) and hits[0].all() and not hits[1].any()
    moved = caption_hits(
        models, features, things, lambda modality, f: f.roll(1, 0) if modality == "point" else f
    )
    assert moved[0, 0].all() and not moved[0, 1].all()


def test_a_modality_is_judged_by_what_it_carries():
    hits = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    hits[0, 1, :, [list(ATTRIBUTES).index(a) for a in CARRIES["point"]]] = True
    assert carried_hits(hits, ["image", "point"]).tolist() == [[0.5] * 3]
    assert carried_hits(hits, ["image", "point"], ("point",)).tolist() == [[1.0] * 3]


# Results files


def test_results_come_back_with_versions_settings_and_seconds(tmp_path, monkeypatch):
    path = save_results("one", dict(accuracy=0.5), 12.345, toyland_settings(), tmp_path / "results")
    assert path == tmp_path / "results" / "one.json" and [path] == list(path.parent.iterdir())
    loaded = load_results("one", path.parent)
    assert loaded["accuracy"] == 0.5 and loaded["seconds"] == 12.3
    assert set(loaded["versions"]) == {"torch", "transformers", "peft", "faiss-cpu", "python"}
    assert (
        loaded["settings"]["recipes"].keys() == RECIPES.keys()
        and loaded["settings"]["threads"] >= 1
    )
    monkeypatch.setitem(RECIPES, "audio", replace(RECIPES["audio"], lr=0.5))
    monkeypatch.setattr(recipes, "load", lambda name: torch.nn.Linear(1, 1))
    again = load_results(
        "one", save_results("one", dict(accuracy=0.5), 0, toyland_settings(), tmp_path).parent
    )
    assert "lr=0.5" in again["settings"]["recipes"].pop("audio") and loaded["settings"][
        "recipes"
    ].pop("audio")
    assert again["settings"].pop("shipped_weights") != loaded["settings"].pop("shipped_weights")
    assert again["settings"] == loaded["settings"]


@pytest.mark.parametrize("values", [dict(a=math.nan), dict(a=torch.ones(1))])
def test_results_that_cannot_be_written_leave_the_old_file(values, tmp_path):
    path = save_results("one", dict(a=1), 0, {}, tmp_path)
    with pytest.raises((ValueError, TypeError)):
        save_results("one", values, 0, {}, tmp_path)
    assert json.loads(path.read_text())["a"] == 1 and [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\x00"])
def test_a_broken_results_file_is_named(text, tmp_path):
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(ValueError, match="^results one.json: got .*, wants a JSON object") as error:
        load_results("one", tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_results_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="results one.json: got no such file"):
        load_results("one", tmp_path)


def test_the_project_folder_is_found_from_anywhere_inside(monkeypatch, tmp_path):
    inside = tmp_path / "nbs" / "walkthrough"
    for folder in (inside, tmp_path / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert project_folder().samefile(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert project_folder().samefile(tmp_path)
    (tmp_path / "data").rmdir()
    with pytest.raises(FileNotFoundError, match="wants one inside a checkout"):
        project_folder()


# Bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: score_captions(["a"], draw_things(2, 0)),
            "captions: got 1, wants 2, one per thing",
        ),
        (lambda: wilson(1.1, 5), "accuracy: got 1.1, wants a share from 0 to 1"),
        (lambda: wilson(math.nan, 5), "accuracy: got nan"),
        (lambda: wilson(0.5, 0), "n: got 0, wants 1 or more"),
        (lambda: summary([]), "values: got none"),
        (
            lambda: mcnemar(torch.ones(3).bool(), torch.ones(4).bool()),
            "after: got 4 answers, wants 3",
        ),
        (
            lambda: paired_difference(torch.ones(2, 3), torch.ones(3, 3)),
            "after: got [3, 3] for [2, 3]",
        ),
        (lambda: separability(torch.ones(3, 2), torch.ones(4, 2)), "b: got [4, 2] for [3, 2]"),
        (
            lambda: neighbour_vote(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(3), k=4),
            "k: got 4, wants 1 to 3",
        ),
        (lambda: modality_gap(torch.ones(3, 2), torch.ones(4, 2)), "b: got [4, 2] for [3, 2]"),
        (lambda: recall_at(torch.ones(1, 2), torch.ones(1, 2)), "wants two or more rows"),
    ],
)
def test_bad_input_is_explained_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
