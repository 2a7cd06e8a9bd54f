"""Same seed, same bytes: weights, results and figures.

And nothing kept is used for what it was not made for."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import ibllm
from ibllm.objectives import Jitter
from ibllm.toyland import recipes
from ibllm.toyland.recipes import features_key, picture_features
from ibllm.toyland.sensors import record
from ibllm.toyland.world import split_things
from ibllm.training import Columns, Recipe, fit, provenance

ROOT = Path(__file__).resolve().parents[1]


# One place sets seeds


def test_one_place_seeds_the_global_generators():
    "Anything else that is random draws from a generator of its own."
    found = []
    for path in sorted((ROOT / "ibllm").rglob("*.py")):
        source = ast.unparse(ast.parse(path.read_text()))
        seeds = r"torch\.(manual_)?seed\(|random\.seed\(|np\.random\.(?!default_rng)|^import random"
        found += [
            (path.name, line.strip()) for line in source.splitlines() if re.search(seeds, line)
        ]
    assert found == [("training.py", "torch.manual_seed(seed)")]


# Same seed, same bytes, in processes that hash differently

WORK = """
import sys, torch
from pathlib import Path
from ibllm.cache import VisualCache
from ibllm.encoders import ImageBind
from ibllm.evaluation import save_results, summary
from ibllm.figures import draw_gates, save_figure
from ibllm.objectives import Binding, Jitter
from ibllm.toyland.pictures import show_things
from ibllm.toyland.recipes import *
from ibllm.toyland.scoring import caption_accuracy
from ibllm.toyland.sensors import record, write_files
from ibllm.toyland.world import draw_things
from ibllm.training import Columns, Recipe, fit, set_seed
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
RECIPES["stage_one"] = Recipe(12, 8, lr=5e-3, warmup=3)
RECIPES["stage_two"] = Recipe(12, 8, lr=2e-3, warmup=3)
tokenizer = train_tokenizer([f"{p} {a}" for p, a in zip(*toyland_text(200, seed))], 300)
things = draw_things(24, seed)
recording = record(things, seed)
set_seed(seed)
encoder = ImageBind(toyland_imagebind(len(tokenizer)))
images = recording["image"].permute(0, 3, 1, 2).float()
features = torch.nn.functional.normalize(torch.randn(24, 128), dim=1)
losses = fit(Binding(encoder.towers["vision"], jitter=Jitter()), Columns(x=images, anchor=features),
             Recipe(8, 8, muon_lr=5e-3, warmup=2, seed=seed), "binding")
encoder.eval()
llm = toyland_llm(tokenizer, seed)
model = train_stages(encoder, llm, tokenizer, things, features, seed, folder / "build")
model.cache = VisualCache.build(features)
model.save_pretrained(folder / "model")
right = caption_accuracy(model, features, things)
right = summary([right["kind"].float().mean().item()])
found = dict(seed=seed, losses=losses, right=right)
save_results("tiny", found, 0, toyland_settings(), folder)
save_figure(show_things(things[:3], {s: r[:3] for s, r in recording.items()}), "things", folder)
save_figure(draw_gates(model.injection.gates.tolist()), "gates", folder)
write_files(recording, folder, "sample")
"""


def worked(folder, seed, **env):
    """All files that `WORK` writes with `seed`, by name: their bytes.

    Of results files, all but time and memory."""
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    files = {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.suffix != ".pt" and "build" not in f.relative_to(folder).parts
    }
    measured = json.loads(files.pop("tiny.json"))
    assert measured["versions"].keys() >= {"python", "torch", "transformers"}
    assert measured["seed"] == seed
    return files | dict(results=json.dumps({**measured, "seconds": 0, "peak_mb": 0}))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    first = worked(tmp_path / "a", 1, PYTHONHASHSEED="1")
    again = worked(tmp_path / "b", 1, PYTHONHASHSEED="2", TZ="Asia/Tokyo")
    assert len(first) > 20 and first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    other = worked(tmp_path / "c", 2)
    for name in (
        "results",
        "things.png",
        "gates.png",
        "model/model.safetensors",
        "model/llm/model.safetensors",
    ):
        assert first[name] != other[name]


# What a run was made from


class Net(nn.Module):
    def __init__(self, dropout=0.1, stride=1, shift=2):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.learned = nn.Conv1d(3, 3, 1, stride)
        self.jitter, self.dropout = Jitter(shift), nn.Dropout(dropout)

    def forward(self, x):
        return self.learned(self.dropout(self.frozen(x)).T).square().mean()


RECIPE, ROWS = Recipe(steps=4, batch_size=4, warmup=1), torch.linspace(0, 1, 60).reshape(20, 3)
OTHER = dict(
    steps=5,
    batch_size=5,
    lr=0.1,
    muon_lr=0.1,
    warmup=2,
    weight_decay=0.1,
    clip=2.0,
    seed=1,
    save_every=3,
)


def changed(net=None, recipe=RECIPE, rows=ROWS, **columns):
    "Which parts of the provenance differ from the usual one's."
    ours = provenance(net or Net(), recipe, Columns(x=rows, **columns))
    usual = provenance(Net(), RECIPE, Columns(x=ROWS))
    return [part for part in usual if ours[part] != usual[part]]


def test_the_same_again_has_the_same_origin():
    assert changed() == []


@pytest.mark.parametrize("name, value", OTHER.items())
def test_every_field_of_the_recipe_counts(name, value):
    assert OTHER.keys() == {f.name for f in fields(Recipe)}
    assert changed(recipe=replace(RECIPE, **{name: value})) == ["recipe"]


@pytest.mark.parametrize("place", [(0, 0), (7, 1), (13, 2), (19, 2)])
def test_every_value_of_the_data_counts(place):
    rows = ROWS.clone()
    rows[place] += 1e-6
    assert changed(rows=rows) == ["data"]


def test_names_order_and_number_of_the_data_count():
    assert changed(rows=ROWS[:19]) == changed(rows=ROWS.flip(0)) == changed(y=ROWS) == ["data"]
    ours, theirs = (provenance(Net(), RECIPE, Columns(x=list(x))) for x in ("ab", "ac"))
    assert ours != theirs


@pytest.mark.parametrize("options", [dict(dropout=0.2), dict(stride=2), dict(shift=3)])
def test_numbers_that_no_weight_shows_count(options):
    assert changed(Net(**options)) == ["objective"]


def test_weights_count_whether_they_learn_or_not():
    for part in ("frozen", "learned"):
        net = Net()
        with torch.no_grad():
            getattr(net, part).weight[0] += 1e-6
        assert changed(net) == ["frozen" if part == "frozen" else "start"]
    assert changed(Net().requires_grad_(True)) == ["frozen", "start"]
    assert "objective" in changed(nn.ModuleDict(dict(Net().named_children())))  # another class


def test_a_data_set_of_files_is_known_by_a_few_examples():
    class Files(torch.utils.data.Dataset):
        looked, content = 0, 0

        def __len__(self):
            return 10_000

        def __getitems__(self, indices):
            self.looked += len(indices)
            return dict(x=torch.tensor(indices) + self.content)

    ours, theirs = Files(), Files()
    theirs.content = 1
    found = [provenance(Net(), RECIPE, data)["data"] for data in (ours, theirs)]
    assert found[0] != found[1] and ours.looked == 16


@pytest.mark.parametrize(
    "part, change",
    [
        ("recipe", dict(recipe=replace(RECIPE, lr=0.1))),
        ("data", dict(data=Columns(x=ROWS + 1))),
        ("objective", dict(objective=Net(dropout=0.3))),
        ("frozen", None),
        ("start", None),
    ],
)
def test_each_change_is_refused_by_name(part, change, tmp_path):
    if change is None:
        net = Net()
        nn.init.ones_((net.frozen if part == "frozen" else net.learned).weight)
        change = dict(objective=net)
    usual = dict(objective=Net(), data=Columns(x=ROWS), recipe=RECIPE)
    fit(**usual, title="usual", checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=rf"run.pt: got one .*\(another {part}\), wants"):
        fit(**usual | change, title="changed", checkpoint=tmp_path / "run.pt")


# What kept features were made from


@pytest.fixture(scope="module")
def model():
    return ibllm.load("toyland")


@pytest.fixture
def kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "build_folder", lambda: tmp_path)
    return picture_features(model, "validation", 20)[1], tmp_path


def test_features_are_kept(model, kept, monkeypatch):
    features, folder = kept
    [path] = folder.iterdir()
    path.touch()
    before = path.stat().st_mtime_ns
    assert torch.equal(picture_features(model, "validation", 20)[1], features)
    assert [*folder.iterdir()] == [path]
    assert path.stat().st_mtime_ns == before, "it was read, not written again"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:9], lambda data: b"", lambda data: b"x"]
)
def test_damaged_features_are_made_again(damage, model, kept):
    features, folder = kept
    [path] = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(picture_features(model, "validation", 20)[1], features)
    assert path.read_bytes() == whole


def another_tower(model):
    model.encoder.towers["vision"].head.norm.bias.data[0] += 1e-6


def another_reading(model):
    model.config = replace(model.config, inputs=replace(model.config.inputs, image_size=16))


def another_shape(model):
    vision = replace(model.config.encoder.vision, heads=2)
    model.config = replace(model.config, encoder=replace(model.config.encoder, vision=vision))


@pytest.mark.parametrize("change", [another_tower, another_reading, another_shape])
def test_a_changed_model_has_other_features(change):
    ours, theirs = (ibllm.load("toyland") for _ in range(2))
    split = split_things("validation", size=20)
    change(theirs)
    assert features_key(ours, *split) == features_key(ours, *split) != features_key(theirs, *split)


def test_other_things_and_other_pictures_have_other_features(model, monkeypatch):
    things, seed = split_things("validation", size=20)
    others = [(things[:19], seed), (things, seed + 1), (split_things("test", size=20)[0], seed)]
    others += [(replace(things, colour=things.colour.roll(1)), seed)]
    keys = [features_key(model, *given) for given in [(things, seed), *others]]
    usual = record
    monkeypatch.setattr(
        recipes, "record", lambda *given: {m: r ^ 1 for m, r in usual(*given).items()}
    )
    keys.append(features_key(model, things, seed))  # drawn by other code
    assert len(set(keys)) == len(keys) == 6
