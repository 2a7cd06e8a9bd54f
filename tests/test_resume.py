"""Whatever is trained can be killed at any moment and goes on as if nothing had happened.

Each kind of training runs in processes forked from one clean server. One of them is left alone; the
others are killed (SIGKILL: nothing is caught or tidied up) after random times and started again.
All must end with the same bits.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import ibllm.cache
from ibllm import training
from ibllm.cache import VisualCache
from ibllm.encoders import ImageBind
from ibllm.evaluation import load_results, save_results
from ibllm.model import load
from ibllm.objectives import Binding, Jitter, NextTokenLoss, tokenize_pairs
from ibllm.shards import embed_images
from ibllm.toyland import recipes
from ibllm.toyland.recipes import (
    RECIPES,
    picture_features,
    toyland_imagebind,
    toyland_llm,
    toyland_settings,
    toyland_text,
    train_stages,
    train_tokenizer,
)
from ibllm.toyland.scoring import caption_accuracy
from ibllm.toyland.sensors import record
from ibllm.toyland.world import draw_things
from ibllm.training import (
    Columns,
    Recipe,
    fit,
    newest_checkpoint,
    previous_checkpoint,
    read_checkpoint,
    save_checkpoint,
    seconds_spent,
    set_seed,
)

KILLS = 10
TINY = dict(warmup=3, save_every=2)
unit = nn.functional.normalize


def words():
    return train_tokenizer([f"{p} {a}" for p, a in zip(*toyland_text(200, seed=0))], vocabulary=300)


def tiny_llm(tokenizer):
    llm = toyland_llm(tokenizer)
    llm.model.layers, llm.config.num_hidden_layers = llm.model.layers[:2], 2
    return llm


# One function per kind of training: it works in `folder` and returns tensors, losses and answers


def binding(folder):
    set_seed(0)
    towers = ImageBind(toyland_imagebind(300)).towers
    things = torch.Generator().manual_seed(1)
    pictures = torch.randn(48, 3, 32, 32, generator=things)
    anchors = unit(torch.randn(48, 128, generator=things), dim=1)
    recipe = Recipe(14, 8, lr=1e-3, muon_lr=5e-3, **TINY)
    jittered = Binding(towers["vision"], jitter=Jitter())
    pairs = Columns(x=pictures, anchor=anchors)
    history = fit(jittered, pairs, recipe, "images", folder / "vision.pt")
    # Batch norms: buffers that learn
    clouds = Columns(x=torch.randn(48, 64, 3, generator=things), anchor=anchors)
    shorter = replace(recipe, steps=8)
    history += fit(Binding(towers["point"]), clouds, shorter, "clouds", folder / "point.pt")
    return {**towers["vision"].state_dict(), **towers["point"].state_dict()}, history, []


def language_model(folder):
    tokenizer = words()
    llm = tiny_llm(tokenizer)
    pairs = Columns(**tokenize_pairs(tokenizer, *toyland_text(64, seed=1), learn_prompt=True))
    recipe = Recipe(40, 8, lr=3e-3, muon_lr=1e-2, **TINY)
    history = fit(NextTokenLoss(llm), pairs, recipe, "words", folder / "llm.pt")
    return llm.state_dict(), history, []


def stages(folder, one, two):
    "Both stages, of as many steps; what is measured counts as well."
    RECIPES["stage_one"] = Recipe(one, 8, lr=5e-3, **TINY)
    RECIPES["stage_two"] = Recipe(two, 8, lr=2e-3, **TINY)
    tokenizer, things = words(), draw_things(40, seed=3)
    features = unit(torch.randn(40, 128, generator=torch.Generator().manual_seed(2)), dim=1)
    set_seed(0)
    encoder = ImageBind(toyland_imagebind(len(tokenizer)))
    model = train_stages(encoder, tiny_llm(tokenizer), tokenizer, things, features, 0, folder)
    history = []
    for path in sorted(folder.glob("*.pt")):
        history += newest_checkpoint(path)["history"]
    assert len(history) == one + two
    found = caption_accuracy(model, features[:8], things[:8])
    scores = {name: hits.tolist() for name, hits in found.items()}
    save_results("tiny", scores, 0, toyland_settings(), folder)
    results = load_results("tiny", folder) | dict(peak_mb=0)
    return model.state_dict(), history, [model.answer(features[:4], "describe it ."), results]


def stage_one(folder):
    return stages(folder, 40, 1)


def stage_two(folder):
    return stages(folder, 1, 40)


def features(folder):
    recipes.build_in(folder)
    things, found = picture_features(load("toyland"), "validation", size=600)
    return dict(features=found), [], [things.words(0)]


def cache(folder):
    "Pictures become shards, and these a memory."
    ibllm.shards.CHUNK, model = 64, load("toyland")

    def embed(some):
        return model.embed({"image": some})["image"]

    pictures = list(record(draw_things(600, seed=4), 4, ("image",))["image"].numpy())
    embed_images(pictures, embed, folder / "shards", size=32, batch=32)
    memory = VisualCache.build(folder / "shards", "hnsw", path=folder / "memory.index")
    stored = torch.frombuffer(bytearray((folder / "memory.index").read_bytes()), dtype=torch.uint8)
    kept = sorted(file.name for file in folder.iterdir())
    assert kept == ["memory.index", "memory.index.json", "shards"]
    return dict(index=stored), [], memory.enhance(torch.eye(128)).tolist()


KINDS = dict(
    binding=binding,
    language_model=language_model,
    stage_one=stage_one,
    stage_two=stage_two,
    features=features,
    cache=cache,
)


def work(kind, folder, result, stay=False):
    "What a process does: train, write down what came out and, if it is to be killed, wait for it."
    training.progress_display = lambda *_: None
    tensors, history, answers = KINDS[kind](folder)
    torch.save(dict(tensors=tensors, history=history, answers=json.dumps(answers)), result)
    while stay:
        time.sleep(1)


@pytest.fixture(scope="module")
def server():
    "Processes forked from one that has imported everything and has no threads."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ibllm.toyland.scoring", "peft", "ibllm.figures"])
    return context


def train(server, *arguments, kill_after=None):
    process = server.Process(target=work, args=(*arguments, kill_after is not None))
    process.start()
    process.join(kill_after)
    if kill_after is not None:
        process.kill()
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_it_ends_the_same(kind, server, tmp_path):
    whole = tmp_path / "whole.result"
    start = time.monotonic()
    assert train(server, kind, tmp_path / "whole", whole) == 0
    seconds, moments = time.monotonic() - start, random.Random(kind)
    expected = torch.load(whole, weights_only=True)
    assert len(expected["tensors"])
    assert not any(t.isnan().any() for t in expected["tensors"].values())
    checkpoints = 0
    for number in range(KILLS):
        folder, result = tmp_path / str(number), tmp_path / f"{number}.result"
        killed = train(server, kind, folder, result, kill_after=moments.uniform(0, seconds))
        assert killed == -signal.SIGKILL
        checkpoints += len([*folder.glob("*.pt")])
        result.unlink(missing_ok=True)
        assert train(server, kind, folder, result) == 0
        again = torch.load(result, weights_only=True)
        assert again["history"] == expected["history"] and again["answers"] == expected["answers"]
        assert again["tensors"].keys() == expected["tensors"].keys()
        for name, t in again["tensors"].items():
            assert torch.equal(t, expected["tensors"][name])
    assert checkpoints or kind in ("features", "cache")


# Half-written and damaged checkpoints


class Curve(nn.Module):
    "With everything that could remember half a step: batch norm, dropout, two optimisers."

    def __init__(self):
        super().__init__()
        set_seed(0)
        self.net = nn.Module()
        self.net.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.norm, self.dropout, self.out = nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)

    def forward(self, x, y):
        return (self.out(self.dropout(self.norm(self.net.blocks[0](x)))) - y).square().mean()


DATA = Columns(
    x=torch.randn(40, 4, generator=torch.Generator().manual_seed(1)),
    y=torch.linspace(-1, 1, 40)[:, None],
)
RECIPE = Recipe(steps=12, batch_size=8, lr=0.01, muon_lr=0.01, warmup=4, save_every=3)


def same(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


@pytest.fixture(scope="module")
def unbroken():
    curve = Curve()
    return curve, fit(curve, DATA, RECIPE, "unbroken")


@pytest.fixture
def path(tmp_path):
    "A finished run's checkpoint, of 12 steps; the one before it is of 9."
    fit(Curve(), DATA, RECIPE, "first", tmp_path / "run.pt")
    return tmp_path / "run.pt"


def continued(path, unbroken):
    "Whether a run that continues at `path` ends as an unbroken one."
    curve = Curve()
    return fit(curve, DATA, RECIPE, "again", path) == unbroken[1] and same(curve, unbroken[0])


def test_the_checkpoint_before_is_kept(path):
    files = path, previous_checkpoint(path)
    assert [len(read_checkpoint(file)["history"]) for file in files] == [12, 9]


def cut(place, data):
    return data[: int(place * len(data))]


def zeros(place, data):
    return cut(place, data).ljust(len(data), bytes(1))


def damages():
    "Ways to damage a file: cut off anywhere, zeros at the end or a changed byte anywhere."
    places = [random.Random(0).uniform(0, 1) for _ in range(12)]
    for place in places:
        yield f"cut_{place:.2f}", partial(cut, place)
        yield f"zeros_{place:.2f}", partial(zeros, place)
    yield "cut_one", lambda data: data[:-1]
    yield "emptied", lambda data: b""


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in damages()])
def test_half_a_checkpoint_is_recognised_and_the_one_before_it_used(damage, path, unbroken):
    path.write_bytes(damage(path.read_bytes()))
    assert read_checkpoint(path) is None
    with pytest.warns(UserWarning, match="run.pt: is damaged, continuing from the one before it"):
        assert continued(path, unbroken)
    assert len(read_checkpoint(path)["history"]) == 12


def test_a_changed_byte_is_recognised_anywhere_in_the_weights(path):
    data = path.read_bytes()
    place = read_checkpoint(path)["weights"]["norm.running_mean"].numpy().tobytes()
    spot = data.index(place)
    for i in range(len(place)):
        path.write_bytes(data[: spot + i] + bytes([data[spot + i] ^ 1]) + data[spot + i + 1 :])
        assert read_checkpoint(path) is None


def test_killed_between_moving_the_old_and_writing_the_new(path, unbroken):
    path.unlink()
    assert continued(path, unbroken)


def test_damage_that_cannot_be_helped_is_said_and_nothing_is_deleted(path):
    for file in (path, previous_checkpoint(path)):
        file.write_bytes(b"half")
    said = "^checkpoint run.pt: got no whole checkpoint, wants one that"
    with pytest.raises(ValueError, match=said) as error:
        fit(Curve(), DATA, RECIPE, "again", path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == previous_checkpoint(path).read_bytes() == b"half"


def test_what_killed_writers_left_is_tidied_up(path):
    (left := path.with_name("run.pt.123.part")).write_bytes(b"half")
    save_checkpoint(path, read_checkpoint(path))
    assert not left.exists() and sorted(path.parent.iterdir()) == [path, previous_checkpoint(path)]


def test_a_save_that_fails_leaves_the_one_before(path, unbroken):
    with pytest.raises(AttributeError):
        save_checkpoint(path, dict(history=lambda: None))  # cannot be pickled
    assert sorted(path.parent.iterdir()) == [previous_checkpoint(path)]
    assert continued(path, unbroken)


# Ctrl-C


class Pressed(Curve):
    "Somebody presses Ctrl-C in the middle of step number `at`."

    def __init__(self, at):
        super().__init__()
        self.steps = [None] * at

    def forward(self, x, y):
        loss = super().forward(x, y)
        if self.steps and not self.steps[1:]:
            os.kill(os.getpid(), signal.SIGINT)
        del self.steps[:1]
        return loss


@pytest.mark.parametrize("at", [1, 2, 3, 8, 12])
def test_ctrl_c_waits_for_the_step_and_the_cell_can_be_run_again(at, tmp_path, unbroken):
    curve, usual = Pressed(at), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(curve, DATA, RECIPE, "pressed", tmp_path / "run.pt")
    assert signal.getsignal(signal.SIGINT) is usual and not curve.training
    state = newest_checkpoint(tmp_path / "run.pt")
    assert len(state["history"]) == at
    assert all(torch.equal(t, curve.state_dict()[name]) for name, t in state["weights"].items())
    for title in ("the cell again", "and again"):
        assert fit(curve, DATA, RECIPE, title, tmp_path / "run.pt") == unbroken[1]
        assert same(curve, unbroken[0])


def test_a_step_outside_the_main_thread(unbroken):
    from threading import Thread

    curve, found = Curve(), []
    thread = Thread(target=lambda: found.append(fit(curve, DATA, RECIPE, "in a thread")))
    thread.start()
    thread.join()
    assert found == [unbroken[1]]


# Seconds


def test_seconds_are_counted_over_all_processes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])

    class Slow(Curve):
        def forward(self, x, y):
            clock[0] += 10
            if clock[0] == 1070:
                raise KeyboardInterrupt
            return super().forward(x, y)

    assert seconds_spent(tmp_path / "run.pt") == 0
    clock[0] = 1000
    with pytest.raises(KeyboardInterrupt):
        fit(Slow(), DATA, RECIPE, "seven steps, six whole", tmp_path / "run.pt")
    assert seconds_spent(tmp_path / "run.pt") == 70
    clock[0] = 5000  # much later, in another process
    fit(Slow(), DATA, RECIPE, "six more", tmp_path / "run.pt")
    assert seconds_spent(tmp_path / "run.pt", tmp_path / "other.pt") == 130
