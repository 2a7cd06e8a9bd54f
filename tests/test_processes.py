"""Two processes learn what one learns, and data come in by every door that `fit` names.

Run as a script, this file is one of the two processes: it trains every kind and writes down what
came out, in a file of its own.
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from ibllm import training
from ibllm.encoders import ImageBind
from ibllm.objectives import (
    IGNORE,
    Binding,
    Jitter,
    NextTokenLoss,
    prepare_stage_one,
    prepare_stage_two,
    tokenize_pairs,
)
from ibllm.toyland.recipes import (
    toyland_imagebind,
    toyland_llm,
    toyland_model,
    toyland_text,
    train_tokenizer,
)
from ibllm.training import (
    Columns,
    Recipe,
    WholeBatch,
    batch_norm,
    collate,
    fit,
    set_seed,
)

ADAMW = Recipe(steps=10, batch_size=8, lr=2e-4, warmup=3)
MUON = replace(ADAMW, lr=1e-3, muon_lr=5e-3)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tower(name):
    "A fresh tower with dropout and paths to drop, which Toyland's own do without."
    config = toyland_imagebind(300)
    config = replace(config, **{name: replace(getattr(config, name), dropout=0.2, drop_path=0.3)})
    set_seed(0)
    return ImageBind(config).towers[name]


def anchors():
    return F.normalize(random(40, 128, seed=2), dim=1)


# One function per kind of training: the objective and its data


def pictures():
    jittered = Binding(tower("vision"), jitter=Jitter())
    return jittered, Columns(x=random(40, 3, 32, 32), anchor=anchors())


def captions():
    "Two towers that learn."
    set_seed(0)
    towers = ImageBind(toyland_imagebind(300)).towers
    words = torch.randint(300, (40, 12), generator=torch.Generator().manual_seed(3))
    binding = Binding(towers["text"], anchor_tower=towers["vision"], jitter=Jitter())
    return binding, Columns(x=words, anchor=random(40, 3, 32, 32))


def clouds():
    "Batch norm, whose mean and variance are those of the batch."
    return Binding(tower("point")), Columns(x=random(40, 64, 3), anchor=anchors())


def toy_model():
    texts = [f"{p} {a}" for p, a in zip(*toyland_text(200, seed=0))]
    tokenizer = train_tokenizer(texts, vocabulary=300)
    llm = toyland_llm(tokenizer)
    llm.model.layers, llm.config.num_hidden_layers = llm.model.layers[:2], 2
    encoder = ImageBind(toyland_imagebind(len(tokenizer)))
    return toyland_model(encoder, llm, tokenizer)


def sentences(model):
    pairs = tokenize_pairs(model.tokenizer, *toyland_text(40, seed=1))
    pairs["labels"][5:9] = IGNORE  # rows whose answers were cut off
    return pairs


def text():
    model = toy_model()
    return NextTokenLoss(model.llm), Columns(**sentences(model))


def stage_one():
    model = toy_model()
    objective = prepare_stage_one(model.llm, model.bind, model.injection)
    return objective, Columns(**sentences(model), feature=anchors())


def stage_two():
    "With open gates, and with a dropout in LoRA, which is PEFT's."
    model = toy_model()
    nn.init.normal_(model.injection.gates)
    set_seed(0)
    objective = prepare_stage_two(model.llm, model.bind, model.injection)
    for part in objective.modules():
        if hasattr(part, "lora_dropout"):
            part.lora_dropout["default"] = nn.Dropout(0.2)
    return objective, Columns(**sentences(model), feature=anchors())


KINDS = {
    "pictures": (pictures, ADAMW),
    "captions": (captions, ADAMW),
    "clouds": (clouds, ADAMW),
    "text": (text, ADAMW),
    "stage_one": (stage_one, ADAMW),
    "stage_two": (stage_two, ADAMW),
    "clouds_muon": (clouds, MUON),
    "stage_one_long": (stage_one, replace(ADAMW, steps=30, lr=5e-3)),
}
LOOSER = {"clouds_muon", "stage_one_long"}  # at most twice what reversed rows do


def trained(kind, data_of=lambda data: data):
    "What a kind of training ends with: weights and statistics, and its losses."
    make, recipe = KINDS[kind]
    objective, data = make()
    losses = fit(objective, data_of(data), recipe, kind)
    return {"state": objective.state_dict(), "losses": losses}


def main(folder):
    training.progress_display = lambda *_: None
    found = {kind: trained(kind) for kind in KINDS}
    found["rank"], found["world"] = distributed.get_rank(), distributed.get_world_size()
    found["backend"], found["process"] = distributed.get_backend(), os.getpid()
    found["nan"] = stopped()
    found["continued"] = continued(folder / "run.pt")
    torch.save(found, folder / f"{found['rank']}.pt")
    distributed.destroy_process_group()


class Breaks(Columns):
    "Raises Ctrl-C when the eighth batch is fetched."

    fetched = 0

    def __getitems__(self, indices):
        self.fetched += 1
        if self.fetched == 8:
            raise KeyboardInterrupt
        return super().__getitems__(indices)


def continued(path):
    "Clouds again, stopped and continued."
    objective, data = clouds()
    try:
        fit(objective, Breaks(**data.columns), ADAMW, "stopped", path)
    except KeyboardInterrupt:
        distributed.barrier()  # as a new start of both would wait
    objective, data = clouds()
    losses = fit(objective, data, ADAMW, "continued", path)
    return {"state": objective.state_dict(), "losses": losses}


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.factor * x).mean()


def stopped():
    "What a process says of a loss that is not finite in one of the processes only."
    rows = torch.ones(8, 1)
    rows[3] = torch.nan
    try:
        fit(Mean(), Columns(x=rows), Recipe(steps=1, batch_size=8), "nan")
    except FloatingPointError as error:
        return str(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# Two processes against one


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(code, rank, port):
    "One process of two, as `torchrun` starts it."
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *code]
    environment = {**os.environ, **place, **meeting}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "What each of two processes wrote down."
    folder, port = tmp_path_factory.mktemp("both"), free_port()
    started = [start([__file__, str(folder)], rank, port) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=250)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


class Reversed(Columns):
    "The rows of every batch in reverse."

    def __getitems__(self, indices):
        return super().__getitems__(indices[::-1])


class Backwards(WholeBatch):
    "One process whose noise goes with rows in reverse: each row keeps its own."

    def drawn(self, draw, shape):
        return super().drawn(draw, shape).flip(0)


@pytest.fixture(scope="module")
def alone():
    "Of every kind what one process learns, and what it learns from reversed rows."
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "progress_display", lambda *_: None)
        for kind in KINDS:
            found[kind] = [trained(kind)]
        patch.setattr(training, "step_noise", reversed_noise)
        for kind in KINDS:
            found[kind].append(trained(kind, lambda data: Reversed(**data.columns)))
    return found


def reversed_noise(recipe, step, accelerator):
    return Backwards(recipe.seed * 1_000_003 + step, 0, 1)


def without_effect(name):
    """Whether a loss does not depend on a weight, so that rounding alone moves it.

    Those are biases before a batch norm, which takes the mean away, and of keys, which add the same
    to all of a row's scores. A running mean follows the biases."""
    return name.endswith(("_1.bias", "_2.bias", "_3.bias", "qkv.bias", "running_mean"))


def differences(one, other):
    "The largest difference of weights that have an effect, and of those that have none."
    largest = [0.0, 0.0]
    for name, t in one["state"].items():
        away = (t.double() - other["state"][name].double()).abs()
        if name.endswith("qkv.bias"):  # of queries, keys and values
            keys = away.chunk(3)[1].max().item()
            largest[1], away = max(largest[1], keys), torch.cat(away.chunk(3)[::2])
            largest[0] = max(largest[0], away.max().item())
            continue
        idle = without_effect(name)
        largest[idle] = max(largest[idle], away.max().item())
    return largest


@pytest.mark.timeout(300)
def test_there_were_two_processes(both):
    assert [one["rank"] for one in both] == [0, 1]
    assert [one["world"] for one in both] == [2, 2]
    assert [one["backend"] for one in both] == ["gloo", "gloo"]
    assert len({os.getpid(), *(one["process"] for one in both)}) == 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(kind, both, alone):
    first, second = both[0][kind], both[1][kind]
    one, backwards = alone[kind]
    assert differences(first, second) == [0, 0]
    assert first["losses"] == second["losses"]
    found, idle = differences(first, one)
    rounding, idle_rounding = differences(backwards, one)
    print(kind, found, rounding, idle, idle_rounding)
    assert found <= (2 * rounding if kind in LOOSER else 1e-5)
    assert idle <= max(1e-5, 2 * idle_rounding)
    if kind not in LOOSER:
        assert first["losses"] == pytest.approx(one["losses"], abs=1e-5)


def test_two_processes_continue_where_they_were_stopped(both):
    for one in both:
        assert one["continued"]["losses"] == one["clouds"]["losses"]
        assert differences(one["continued"], one["clouds"]) == [0, 0]


def test_a_loss_that_is_not_finite_stops_both(both):
    said = "loss: got nan at step 0, wants a finite number; lower the learning rate"
    assert [one["nan"] for one in both] == [said, said]


# The noise of a batch


def shares(draw, world=3, seed=5):
    "What each of `world` processes draws, one after the other."
    found = []
    for rank in range(world):
        with WholeBatch(seed, rank, world):
            found.append(draw())
    return found


@pytest.mark.parametrize(
    "draw",
    [
        lambda rows: torch.rand(rows, 2),
        lambda rows: torch.rand((rows, 2)),
        lambda rows: torch.randn(rows),
        lambda rows: torch.randint(9, (rows, 1)),
        lambda rows: torch.randint(3, 9, (rows, 1)),
        lambda rows: F.dropout(torch.ones(rows, 5), 0.3),
        lambda rows: F.dropout(torch.ones(rows, 5), 0.3, inplace=True),
        lambda rows: nn.Dropout(0.3)(torch.ones(rows, 5)),
        lambda rows: Jitter()(random(12, 3, 8, 8)[:rows] * 0 + torch.arange(8.0)),
    ],
)
def test_processes_share_the_noise_that_one_draws(draw):
    set_seed(5)
    whole = torch.cat([draw(12), draw(12)])
    parts = shares(lambda: (draw(4), draw(4)))
    together = [torch.cat([part[i] for part in parts]) for i in (0, 1)]
    assert torch.equal(torch.cat(together), whole)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.empty(4).normal_(),
        lambda: torch.rand(()),
        lambda: F.scaled_dot_product_attention(*[torch.ones(1, 1, 8, 4)] * 3, dropout_p=0.5),
        lambda: F.alpha_dropout(torch.ones(20), 0.5, training=True),
    ],
)
def test_no_two_processes_draw_what_is_not_known_alike(draw):
    first, second, third = shares(draw)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third) and not torch.equal(second, third)


def test_what_brings_its_own_generator_is_left_alone():
    def draw():
        return torch.rand(4, generator=torch.Generator().manual_seed(1))

    first, second, _ = shares(draw)
    assert torch.equal(first, second) and torch.equal(first, draw())


def test_without_training_there_is_no_noise():
    x = torch.ones(3, 3)
    assert all(torch.equal(part, x) for part in shares(lambda: nn.Dropout(0.5).eval()(x)))
    norm = nn.BatchNorm1d(3).eval()
    assert all(torch.equal(part, norm(x)) for part in shares(lambda: norm(x)))


@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5), (4, 3, 2, 5)])
def test_batch_norm_is_torchs(shape):
    layer, x = nn.BatchNorm1d(3), random(*shape)
    layer.weight.data, layer.bias.data = random(3, seed=3), random(3, seed=4)
    goal = random(*shape, seed=2)
    running = [torch.zeros(3), torch.ones(3)]
    results = []
    for of in (
        lambda x: F.batch_norm(x, *running, layer.weight, layer.bias, True),
        lambda x: batch_norm(x, *running, layer.weight, layer.bias),
    ):
        running[0].zero_(), running[1].fill_(1)
        given = x.clone().requires_grad_()
        y = of(given)
        gradients = torch.autograd.grad((y * goal).sum(), [given, layer.weight, layer.bias])
        results.append([y, *gradients, *(statistic.clone() for statistic in running)])
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Every door for data

ROWS = Columns(x=random(24, 4), y=random(24, 1, seed=2))
RECIPE = Recipe(steps=6, batch_size=4, lr=0.01, warmup=2)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        set_seed(0)
        self.line = nn.Linear(4, 1)

    def forward(self, x, y):
        return (self.line(x) - y).square().mean()


class RowByRow(Dataset):
    "As most datasets are written."

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {name: column[index] for name, column in ROWS.columns.items()}


class Arrays(RowByRow):
    def __getitem__(self, index):
        return {name: row.numpy() for name, row in super().__getitem__(index).items()}


class ListOfRows(RowByRow):
    "As `datasets.Dataset` of Hugging Face answers."

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class DictOfColumns(RowByRow):
    def __getitems__(self, indices):
        return ROWS.__getitems__(indices)


@pytest.mark.parametrize("kind", [RowByRow, Arrays, ListOfRows, DictOfColumns])
def test_any_dataset_of_dicts_will_do(kind, tmp_path):
    usual, other = Line(), Line()
    losses = fit(usual, ROWS, RECIPE, "columns")
    assert fit(other, kind(), RECIPE, "rows", tmp_path / "run.pt") == losses
    assert torch.equal(usual.line.weight, other.line.weight)
    assert fit(Line(), kind(), RECIPE, "again", tmp_path / "run.pt") == losses


def test_rows_become_columns():
    rows = [
        {"t": torch.ones(2) * i, "n": i, "f": i / 2, "b": i > 0, "s": "ab"[i], "g": torch.tensor(i)}
        for i in (0, 1)
    ]
    batch = collate(rows)
    assert batch.pop("s") == ["a", "b"]
    expected = {
        "t": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "n": torch.tensor([0, 1]),
        "f": torch.tensor([0.0, 0.5]),
        "b": torch.tensor([False, True]),
        "g": torch.tensor([0, 1]),
    }
    for name, column in expected.items():
        assert batch[name].dtype == column.dtype and torch.equal(batch[name], column)
    assert collate(batch) == batch


def test_the_scalars_and_arrays_of_numpy_become_tensors():
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    rows = [{"a": frozen, "i": np.int32(3), "f": np.float64(0.5), "b": np.True_}] * 2
    batch = collate(rows)
    types = [torch.float32, torch.int64, torch.float32, torch.bool]
    assert [column.dtype for column in batch.values()] == types


class Stream(IterableDataset):
    def __iter__(self):
        yield {"x": 1}


class Endless(Dataset):
    def __getitem__(self, index):
        return {"x": 1}


class Bad(RowByRow):
    def __init__(self, *rows):
        self.rows = rows

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


@pytest.mark.parametrize(
    "data, message",
    [
        (Stream(), "data: got Stream, wants `Columns`, or a Dataset of dicts with a length"),
        (Endless(), "data: got Endless, wants"),
        (None, "data: got NoneType, wants"),
        ({"x": [1, 2]}, "data: got dict, wants"),
        ("words", "data: got str, wants"),
        (torch.zeros(8, 1), "data: got Tensor, wants"),
        ([1, 2, 3, 4], "data: got a row 1, wants rows that are dicts"),
        (Bad((torch.ones(4), 1)), "data: got a row .*, wants rows that are dicts"),
        (Bad({"x": 1}, {"y": 1}), "data: got rows with .'x'. and .'y'., wants the same columns"),
        (Bad({"x": [1, 2]}), "data.'x'.: got list, wants tensors, arrays of numbers"),
        (Bad({"x": None}), "data.'x'.: got NoneType, wants tensors"),
        (Bad({"x": 1}, {"x": "a"}), "data.'x'.: got int, str, wants .* one of these in all rows"),
        (Bad({"x": np.array(["a"])}), "data.'x'.: got ndarray, wants"),
        (
            Bad({"x": torch.ones(2)}, {"x": torch.ones(3)}),
            "data.'x'.: got rows of shapes .*, wants one shape; pad the rows",
        ),
    ],
)
def test_what_makes_no_batch_is_refused(data, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        fit(Line(), data, RECIPE, "bad")


SPAWNED = """
import multiprocessing
import torch
from torch import nn
from ibllm import training


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 24), "word": "a"}


class Line(nn.Linear):
    def forward(self, x, word):
        assert word == ["a"] * 4
        return (super().forward(x) - x).square().mean()


def learn(workers):
    training.set_seed(0)
    recipe = training.Recipe(steps=6, batch_size=4, lr=0.01, warmup=2)
    return training.fit(Line(4, 4), Rows(), recipe, "line", workers=workers)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    training.progress_display = lambda *_: None
    assert learn(2) == learn(0)
    print("equal")
"""


@pytest.mark.timeout(300)
def test_workers_may_start_afresh(tmp_path):
    "Nothing that a worker is sent has to be a copy of the process."
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.split() == ["equal"], done.stderr
