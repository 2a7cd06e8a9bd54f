"""Whatever is wrong, the answer is one line: which argument, what came, what is wanted. Quickly, in
little memory.

Files of pictures, sounds and the like have tables of their own, in test_inputs_bad.py and
test_inputs_hypothesis.py. Here is the rest of the public surface: prompts, weights, settings,
folders, weights files, indexes, results."""

import inspect
import json
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import within
from safetensors.torch import save_file
from torch import nn

import ibllm
from ibllm.bind import BindNetwork
from ibllm.cache import VisualCache
from ibllm.checkpoints.adapter import load_adapter, load_llama, load_tokenizer
from ibllm.checkpoints.imagebind import load_imagebind
from ibllm.checkpoints.official import download_official, export_official, load_official
from ibllm.checkpoints.weights import read_weights, write_weights
from ibllm.config import (
    BindConfig,
    CacheSettings,
    InputConfig,
    ModelConfig,
    TowerConfig,
    VisionConfig,
)
from ibllm.evaluation import (
    load_results,
    mcnemar,
    modality_gap,
    neighbour_vote,
    paired_difference,
    save_results,
    summary,
    wilson,
)
from ibllm.explorer.show import combine, sample_inputs
from ibllm.figures import save_figure
from ibllm.llama import GatedInjection, enable_injection
from ibllm.model import mix
from ibllm.objectives import released_exercise, tokenize_pairs
from ibllm.toyland.recipes import recipe_for
from ibllm.toyland.scoring import score_captions, zero_shot
from ibllm.toyland.sensors import record, write_files
from ibllm.toyland.world import draw_things, one_thing, split_things
from ibllm.training import Columns, Recipe, fit, newest_checkpoint, set_seed

PACKAGE = Path(ibllm.__file__).parent
TOYLAND = Path(__file__).resolve().parents[1] / "data" / "toyland"
BALL = np.zeros((32, 32, 3), np.uint8)
REFUSALS = (ValueError, TypeError, OSError, RuntimeError)
REFUSAL = re.compile(r"^[^\n]+?: got .+, wants .+|run the notebook|choose other recordings")


def stored(folder):
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def refusal(call, folder):
    """The error's text that `call` ends with, or None for none; checks what holds for every error
    of the package.

    It is raised by a line of the package, is one line, and comes soon, in little memory, leaving
    `folder` as it was."""
    files = stored(folder)
    try:
        with within(), warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    except REFUSALS as error:
        text, place = str(error), inspect.getinnerframes(error.__traceback__)[-1]
        assert PACKAGE in Path(place.filename).parents, (
            f"{place.filename}:{place.lineno} raises {error!r}"
        )
        assert text and "\n" not in text and len(text) < 1000 and REFUSAL.search(text), text
        return text
    finally:
        assert stored(folder) == files


@pytest.fixture(scope="module")
def model():
    return ibllm.load("toyland")


@pytest.fixture(scope="module")
def answer(model):
    return model.generate({"image": BALL}, "what is it ?")


# Requests: what is asked, of what, how loudly.
# Each row: the start of the error, then the arguments of `generate`.

ASK = "what is it ?"
PROMPTS = [
    None,
    "",
    "  \n",
    5,
    [],
    [""],
    ["a", None],
    b"what",
    ("a",),
    ("a", "b", "c"),
    ("", "context"),
    "\ud800",
    ["half \udfff"],
    {"a": 1},
    float("nan"),
    "ball " * 5000,
    ("a", 5),
]
ENTRIES = [
    ("got tuple", (BALL, "half")),
    ("got tuple", (BALL, 0.5)),
    ("got tuple", ()),
    ("empty list", []),
    ("shape", np.zeros(5, np.uint8)),
    ("got NoneType", None),
    ("got int", 5),
]
WEIGHTS = [-1, float("nan"), float("inf"), -float("inf"), 0]
CACHES = ["yes", 5, True, {"image": {"k": 3}}, {"k": 3}, {"audio": False}]
CACHE_SETTINGS = [
    ("k: ", {"k": 0}),
    ("k: ", {"k": 10**9}),
    ("k: ", {"k": -1}),
    ("k: ", {"k": 1.5}),
    ("k: ", {"k": "3"}),
    ("k: ", {"k": None}),
    ("temperature: ", {"temperature": float("nan")}),
    ("temperature: ", {"temperature": "hot"}),
    ("temperature: ", {"temperature": -1}),
    ("weight: ", {"weight": 2}),
    ("weight: ", {"weight": -1}),
    ("weight: ", {"weight": float("nan")}),
    ("weight: ", {"weight": [0.5, 0.5]}),
    ("whiten: ", {"whiten": 1}),
]
REQUESTS = [("prompts: ", ({}, prompt)) for prompt in PROMPTS]
REQUESTS += [("messages: ", ({}, [prompt])) for prompt in (["a"], [{"role": "user"}], [{}])]
REQUESTS += [(says, ({"image": entry}, ASK)) for says, entry in ENTRIES]
REQUESTS += [("weights: ", ({"image": BALL}, ASK, {"image": weight})) for weight in WEIGHTS]
REQUESTS += [("weights: ", ({"image": BALL}, ASK, weights)) for weights in (0.5, {"audio": 1})]
REQUESTS += [("cache: ", ({"image": BALL}, ASK, None, cache)) for cache in CACHES]
REQUESTS += [
    ("scale: ", ({"image": BALL}, ASK, None, False, n))
    for n in (float("nan"), float("inf"), "1", None, [1])
]
REQUESTS += [
    ("modality: got 'smell'", ({"smell": BALL}, ASK)),
    ("modality: got 5", ({5: BALL}, ASK)),
    ("inputs: ", ("ball.png", ASK)),
    ("inputs: ", ([BALL], ASK)),
    ("inputs: ", (5, ASK)),
    ("prompts: got 3 for 2", ({"image": [BALL, BALL]}, [ASK] * 3)),
    ("features: ", ({"image": [BALL, BALL], "depth": [BALL[..., 0] + 1.0] * 3}, ASK)),
    ("no such file", ({"audio": "no such file.wav"}, ASK)),
]
OPTIONS = [("max_new_tokens: ", dict(max_new_tokens=n)) for n in (0, -1, 1.5, "a", True)]
OPTIONS += [
    (f"{name}: ", {name: n})
    for name in ("num_beams", "num_return_sequences")
    for n in (0, -1, 1.5, "a")
]
OPTIONS += [
    ("options: got ", given)
    for given in (
        dict(flavour=5),
        dict(num_return_sequences=3, do_sample=False),
        dict(do_sample=True, temperature=0.0),
        dict(do_sample=True, top_k=-1),
        dict(generation_config=5),
        dict(streamer=5),
        dict(eos_token_id="x"),
        dict(input_ids=None),
        dict(attention_mask=None),
        dict(gated_values=None),
    )
]


@pytest.mark.parametrize("start, values", CACHE_SETTINGS)
def test_cache_settings(start, values, model, tmp_path):
    said = refusal(
        lambda: model.generate({"image": BALL}, ASK, cache=CacheSettings(**values)), tmp_path
    )
    assert said.startswith(start)


TEMPLATES = ["{{ 1 / 0 }}", "{% for %}", "{{ raise_exception('no') }}", "{{ messages.x.y }}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(template, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    said = refusal(lambda: model.generate({}, ASK), tmp_path)
    assert said.startswith("tokenizer: got its chat template, which cannot be loaded")


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_requests(number, model, tmp_path):
    start, arguments = REQUESTS[number]
    assert re.search(start, refusal(lambda: model.generate(*arguments, max_new_tokens=4), tmp_path))
    if callable(getattr(model, "stream", None)) and not isinstance(arguments[1], list):
        assert re.search(
            start, refusal(lambda: [*model.stream(*arguments, max_new_tokens=4)], tmp_path)
        )


@pytest.mark.parametrize("start, options", OPTIONS)
def test_options(start, options, model, tmp_path):
    assert refusal(lambda: model.generate({}, ASK, **options), tmp_path).startswith(start)
    assert refusal(lambda: [*model.stream({}, ASK, **options)], tmp_path).startswith(start)


FEATURES = [
    None,
    [1.0] * 128,
    torch.zeros(128),
    torch.zeros(2, 3),
    torch.zeros(1, 128, dtype=torch.long),
    torch.full((1, 128), float("nan")),
    np.zeros((1, 128), np.float32),
    "x",
]


@pytest.mark.parametrize("number", range(1, len(FEATURES)))
def test_features(number, model, tmp_path):
    for call in (lambda x: model.answer(x, ASK), model.gated_values):
        assert refusal(lambda call=call: call(FEATURES[number]), tmp_path).startswith("features: ")


# Functions: (start of the error, call)

row = torch.nn.functional.normalize(
    torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1
)
memory = VisualCache.build(row)
nan, things = row.where(row > 0, torch.nan), draw_things(3, 0)
yes = torch.tensor([True, False])
COLUMN, HERE = Columns(x=torch.zeros(4, 1)), Path(__file__).parent
NO_NAMES = ["../x", "/x", "a/b", "", "..", "\0", "x" * 5000, None, 5]
NO_JSON = [float("nan"), float("inf"), {1}, row, b"x"]
NO_ITEMS = [
    {},
    None,
    5,
    [],
    "caption",
    {"caption": 5},
    {"conversations": []},
    {"conversations": [1, 2]},
    {"conversations": [{"value": "a"}]},
    {"instruction": "a"},
    {"instruction": "a", "output": None},
    {5: "a"},
]
NO_FOLDERS = [  # a file lies there
    ("folder", lambda file: write_files({}, file, "a")),
    ("folder", lambda file: ibllm.load("toyland").save_pretrained(file)),
    ("folder", lambda file: save_results("tiny", {}, 0, {}, file)),
    ("folder", lambda file: export_official(None, file)),
    ("path", lambda file: write_weights({}, file / "w.pth")),
    ("checkpoint", lambda file: fit(nn.Linear(1, 1), COLUMN, Recipe(2, 2), "bad", file / "run.pt")),
]


def place():
    return Path(tempfile.mkdtemp())  # inside pytest's `tmp_path`


CALLS = [
    ("features: ", lambda: mix([], [])),
    ("weights: ", lambda: mix([row], [1, 2])),
    ("weights: ", lambda: mix([row], ["1"])),
    ("weights: ", lambda: mix([row], [None])),
    ("weights: ", lambda: mix([row, row], [1, -1])),
    ("features: ", lambda: mix([row, row[:2]], [1, 1])),
    ("features: ", lambda: VisualCache.build(row[0])),
    ("features: ", lambda: VisualCache.build(row[:0])),
    ("features: ", lambda: VisualCache.build(nan)),
    ("features: ", lambda: VisualCache.build(row * 0)),
    ("form: ", lambda: VisualCache.build(row, "round")),
    ("query: ", lambda: memory.search(row[:, :3], 1)),
    ("query: ", lambda: memory.search(nan, 1)),
    ("k: ", lambda: memory.search(row, 5)),
    ("k: ", lambda: memory.search(row, 0)),
    ("feature: ", lambda: memory.enhance([1.0])),
    ("device: ", lambda: memory.to("cuda")),
    ("feature: ", lambda: BindNetwork(8, 4)(torch.zeros(1, 3))),
    ("norm: ", lambda: BindNetwork(8, 4, norm="none")),
    ("layers: ", lambda: GatedInjection(8, 2, 2, layers=3)),
    ("llm: ", lambda: enable_injection(nn.Linear(1, 1))),
    ("accuracy: ", lambda: wilson(1.5, 9)),
    ("n: ", lambda: wilson(0.5, 0)),
    ("values: ", lambda: summary([])),
    ("after: ", lambda: mcnemar(yes, yes[:1])),
    ("after: ", lambda: paired_difference(yes, yes[:1])),
    ("k: ", lambda: neighbour_vote(row, row, torch.arange(4), 5)),
    ("captions: ", lambda: score_captions(["a"], things)),
    ("b: ", lambda: modality_gap(row, row[:2])),
    ("kind: ", lambda: one_thing("cow")),
    *[("n: ", lambda n=n: draw_things(n, 0)) for n in (0, -3, 1.5, None, "5", 10**12)],
    *[("n: ", lambda n=n: split_things("test", size=n)) for n in (0, -3, 1.5, "5", 10**12)],
    *[("name: ", lambda n=n: write_files({"image": BALL[None]}, place(), n)) for n in NO_NAMES],
    *[("name: ", lambda n=n: save_results(n, {}, 0, {}, place())) for n in NO_NAMES],
    *[("name: ", lambda n=n: load_results(n, place())) for n in NO_NAMES],
    *[("name: ", lambda n=n: save_figure(None, n, place())) for n in NO_NAMES],
    *[("path: ", lambda path=path: VisualCache.load(path)) for path in (None, 5, [])],
    *[("values: ", lambda v=v: save_results("tiny", dict(a=v), 0, {}, place())) for v in NO_JSON],
    *[("values: ", lambda v=v: summary([v])) for v in ("1", None, float("nan"), float("inf"))],
    ("captions: ", lambda: score_captions([None] * 3, things)),
    ("labels: ", lambda: neighbour_vote(row, row, torch.arange(3), 1)),
    ("text_features: ", lambda: zero_shot(row, row, things)),
    ("features: ", lambda: mix([1], [1])),
    ("features: ", lambda: mix([row.long()], [1])),
    *[("item: ", lambda i=i: released_exercise(i)) for i in NO_ITEMS],
    ("answers: ", lambda: tokenize_pairs(None, [], [])),
    ("prompts: ", lambda: tokenize_pairs(None, ["a"], [5])),
    ("name: ", lambda: recipe_for("nothing")),
    ("seed: ", lambda: set_seed("0")),
    ("objective: ", lambda: fit(None, COLUMN, Recipe(2, 2), "bad")),
    ("recipe: ", lambda: fit(nn.Linear(1, 1), COLUMN, dict(steps=2), "bad")),
    ("data: ", lambda: fit(nn.Linear(1, 1), [1, 2, 3], Recipe(2, 2), "bad")),
    ("checkpoint: ", lambda: fit(nn.Linear(1, 1), COLUMN, Recipe(2, 2), "bad", 5)),
    *[(f"{name}: ", lambda c=call: c(Path(__file__))) for name, call in NO_FOLDERS],
    *[
        ("source: ", lambda c=call, s=source: c(s))
        for call in (load_llama, load_tokenizer)
        for source in (
            None,
            5,
            "",
            "\0",
            "x" * 5000,
            "../x",
            "/missing",
            "someone/nothing",
            Path(__file__),
            HERE,
        )
    ],
    ("source: ", lambda: load_official("a.pth", "b.pth", "/missing")),
    *[("path: ", lambda v=v: read_weights(v)) for v in (None, 5, [], HERE)],
    ("path: ", lambda: load_imagebind(None)),
    ("path: ", lambda: load_adapter(None, None)),
    ("config: ", lambda: load_imagebind({}, "huge")),
    ("weights: ", lambda: write_weights({"w": 5}, place() / "w.pth")),
    ("weights: ", lambda: write_weights([row], place() / "w.pth")),
    ("suffix: ", lambda: export_official(None, place(), ".exe")),
    ("name: ", lambda: ibllm.model.ImageBindLLM.from_pretrained(None)),
    ("device: ", lambda: ibllm.load("toyland", device=None)),
    ("name: ", lambda: split_things("exam")),
    ("modalities: ", lambda: record(things, 0, ("smell",))),
    ("modalities: ", lambda: record(things, 0, "image")),
    ("things: ", lambda: record(things[:0], 0)),
    ("parts: ", lambda: download_official(("everything",))),
    ("a − b", lambda: combine(row, row * 0, -row)),
    ("name: ", lambda: ibllm.load("toylend")),
    ("name: ", lambda: ibllm.load(None)),
    ("name: ", lambda: ibllm.load(5)),
    ("name: ", lambda: ibllm.load("../..//x")),
    ("name: ", lambda: ibllm.load("\0")),
    ("name: ", lambda: ibllm.load("")),
    ("name: ", lambda: ibllm.load("x" * 5000)),
    ("name: ", lambda: ibllm.load(TOYLAND / "config.json")),
    ("folder: ", lambda: ibllm.load(TOYLAND / "llm")),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_calls(number, tmp_path, monkeypatch):
    start, call = CALLS[number]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert re.match(rf"(\[Errno \d+\] )?{start}", refusal(call, tmp_path))


# Settings

NUMBERS = [-1, 0, 1.5, "3", None, [3], True, 2**40, float("nan")]
FIELDS = [
    ("steps", Recipe, dict(batch_size=4)),
    ("batch_size", Recipe, dict(steps=4)),
    ("image_size", InputConfig, {}),
    ("points", InputConfig, {}),
    ("audio_frames", InputConfig, {}),
    ("width", TowerConfig, {}),
    ("blocks", TowerConfig, {}),
    ("expansion", BindConfig, {}),
]
FLOATS = ["1", None, [1.0], float("nan"), float("inf"), True]
SETTINGS = [
    (name, lambda n=name, k=kind, v=value, r=rest: k(**{**r, n: v}))
    for name, kind, rest in FIELDS
    for value in NUMBERS
    if not (kind is Recipe and value == 2**40)
]
SETTINGS += [
    (name, lambda n=name, k=kind, v=value: k(**{n: v}))
    for value in FLOATS
    for name, kind in (
        ("temperature", CacheSettings),
        ("depth_scale", InputConfig),
        ("logit_scale", VisionConfig),
    )
    if (name, value) != ("logit_scale", None)
]
SETTINGS += [
    ("video_crops", lambda: InputConfig(video_crops=2)),
    ("image_mean", lambda: InputConfig(image_mean=(1, 2))),
    ("image_mean", lambda: InputConfig(image_mean="abc")),
    ("lr", lambda: Recipe(4, lr=-1)),
    ("lr", lambda: Recipe(4, lr=float("nan"))),
    ("clip", lambda: Recipe(4, clip="1")),
    ("num_blocks", lambda: BindConfig(num_blocks=10**6)),
    ("norm", lambda: BindConfig(norm=5)),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_settings(number, tmp_path):
    name, call = SETTINGS[number]
    assert re.match(rf"{name}: (got|makes)", refusal(call, tmp_path))


GOOD = ModelConfig().to_dict()
JUNK = st.sampled_from(
    [None, [], {}, "x", -1, 2**70, 1e400, [[[]]], {"a": 1}, "\ud800", 1e308, [1e400] * 3]
)


def leaves(value, path=()):
    "Paths to all that is no dict in nested dicts."
    if not isinstance(value, dict):
        return [path]
    return [place for key, inner in value.items() for place in leaves(inner, (*path, key))]


def put(values, path, value):
    if not path:
        return value
    return {**values, path[0]: put(values[path[0]], path[1:], value)}


def kind_of(value):
    return (int, float) if type(value) in (int, float) else type(value)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from([path for path in leaves(GOOD) if path != ("model_type",)]),
    st.integers(0, 3),
    JUNK,
)
def test_generated_settings(tmp_path, path, keep, junk):
    "Something else where a value or a group of values belongs."
    place = path[: max(1, len(path) - keep)]
    old = GOOD
    for key in place:
        old = old[key]
    text = refusal(lambda: ModelConfig.from_dict(put(GOOD, place, junk)), tmp_path)
    if text is None:
        assert (
            junk in ({}, None, []) or isinstance(junk, kind_of(old)) or isinstance(old, type(None))
        )
    unknown = (
        put(GOOD, path[:-1], {"unheard of": junk})
        if len(path) > 1
        else {**GOOD, "unheard of": junk}
    )
    assert "unheard of" in refusal(lambda: ModelConfig.from_dict(unknown), tmp_path)


# Files: what may lie where a file of weights, an index, a checkpoint, a record is wanted


class Touch:
    "Unpickling it leaves a file behind."

    def __reduce__(self):
        return open, ("unpickled.txt", "w")


def safetensors(claim, header=b"{}", rest=b""):
    return struct.pack("<Q", claim) + header + rest


def entry(**changes):
    header = json.dumps({"w": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | changes}).encode()
    return safetensors(len(header), header, bytes(8))


def torch_file(path, value):
    torch.save(value, path)
    return path.read_bytes()


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w") as inside:
            for _ in range(300):
                inside.write(bytes(2**20))
    return path.read_bytes()


def climbing(path):
    "An archive whose entries lead out of every folder."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../unpickled.txt", b"x")
    return path.read_bytes()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "file.bin"
    return dict(
        empty=b"",
        byte=b"x",
        noise=np.random.default_rng(0).bytes(5000),
        zeros=bytes(5000),
        json=b"{}",
        list=b"[1]",
        deep=b"[" * 100_000,
        half=b'{"a": 1',
        page=b"<!DOCTYPE html><html>",
        pickle=pickle.dumps(Touch()),
        hostile=torch_file(path, {"w": Touch()}),
        inside=torch_file(path, {"model": {"w": Touch()}}),
        bomb=bomb(path),
        climbing=climbing(path),
        tensor=torch_file(path, torch.zeros(3)),
        number=torch_file(path, 5),
        huge_claim=safetensors(2**63),
        claim=safetensors(2**33),
        all=safetensors(2**64 - 1),
        outside=entry(data_offsets=[0, 2**50]),
        backwards=entry(data_offsets=[8, 0]),
        shape=entry(shape=[2**60]),
        negative=entry(shape=[-2]),
        kind=entry(dtype="F33"),
        offsets=entry(data_offsets=[0]),
    )


NAMES = (
    "empty byte noise zeros json list deep half page pickle hostile inside bomb climbing "
    "tensor number huge_claim "
    "claim all outside backwards shape negative kind offsets"
).split()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_files(name, suffix, hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(hostile[name])
    calls = [lambda: load_imagebind(path), lambda: load_adapter(path, tmp_path)]
    for call in calls:
        assert refusal(call, tmp_path)
    if not (name == "json" and suffix == ".safetensors"):
        assert refusal(lambda: read_weights(path), tmp_path).startswith("path: ")


@pytest.mark.parametrize("name", NAMES)
def test_indexes(name, hostile, tmp_path):
    path = tmp_path / "memory.index"
    path.write_bytes(hostile[name])
    assert refusal(lambda: VisualCache.load(path), tmp_path).startswith("path: ")
    assert refusal(lambda: VisualCache.load(path, mmap=True), tmp_path).startswith("path: ")
    memory.save(path)
    (tmp_path / "memory.index.json").write_bytes(hostile[name])
    assert refusal(lambda: VisualCache.load(path), tmp_path) or name == "json"


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_training(name, hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    path.write_bytes(hostile[name])
    line, data = nn.Linear(1, 1), Columns(x=torch.zeros(4, 1))
    assert refusal(lambda: fit(line, data, Recipe(2, 2), "bad", path), tmp_path).startswith(
        "checkpoint run.pt: "
    )


@pytest.mark.parametrize("name", NAMES)
def test_results_files(name, hostile, tmp_path):
    (tmp_path / "tiny.json").write_bytes(hostile[name])
    found = refusal(lambda: load_results("tiny", tmp_path), tmp_path)
    assert name in ("json", "list") or found.startswith("results tiny.json: ")


@pytest.mark.parametrize("name", NAMES)
def test_shards(name, hostile, tmp_path):
    (tmp_path / "000000.safetensors").write_bytes(hostile[name])
    assert refusal(lambda: VisualCache.build(tmp_path), tmp_path).startswith("features: ")


@pytest.mark.parametrize("name", NAMES)
def test_params_of_a_llama(name, hostile, tmp_path):
    torch.save({"tok_embeddings.weight": torch.zeros(4, 4)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_bytes(hostile[name])
    assert re.match("params.json: |llama: ", refusal(lambda: load_llama(tmp_path), tmp_path))


def test_missing_files(tmp_path):
    missing = tmp_path / "missing"
    for call in (
        read_weights,
        load_imagebind,
        VisualCache.load,
        VisualCache.build,
        sample_inputs,
        ibllm.load,
        lambda path: load_results("missing", path),
    ):
        assert refusal(lambda call=call: call(missing), tmp_path)
        assert not missing.exists()


# Folders of models: one file of a good one is replaced


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TOYLAND, tmp_path / "model")
    return tmp_path / "model"


PARTS = [
    "config.json",
    "model.safetensors",
    "llm/config.json",
    "llm/model.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "tokenizer/tokenizer.json",
    "cache.index",
    "cache.index.json",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["empty", "noise", "deep", "list", "hostile", "claim", "page"])
def test_parts_of_a_model(part, name, hostile, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / part).write_bytes(hostile[name])
    assert refusal(lambda: ibllm.load(folder), folder)


@pytest.mark.parametrize(
    "part",
    [
        "config.json",
        "model.safetensors",
        "llm",
        "tokenizer",
        "llm/model.safetensors",
        "tokenizer/tokenizer.json",
        "lora/adapter_model.safetensors",
        "llm/config.json",
    ],
)
def test_missing_parts_of_a_model(part, folder):
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    assert refusal(lambda: ibllm.load(folder), folder).startswith("folder: ")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_code_that_comes_with_a_model_is_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "llm" / "evil.py").write_text("open('unpickled.txt', 'w')\nclass Evil: pass\n")
    change(
        folder / "llm" / "config.json",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        model_type="evil",
    )
    assert refusal(lambda: ibllm.load(folder), folder).startswith("folder: ")


def test_pickled_language_models_are_not_unpickled(folder, hostile, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "llm" / "model.safetensors").unlink()
    (folder / "llm" / "pytorch_model.bin").write_bytes(hostile["hostile"])
    assert refusal(lambda: ibllm.load(folder), folder).startswith("folder: ")


@pytest.mark.parametrize(
    "file, values",
    [
        ("llm/config.json", dict(hidden_size=2**40)),
        ("llm/config.json", dict(num_hidden_layers=10**7)),
        ("llm/config.json", dict(vocab_size=-5)),
        ("llm/config.json", dict(hidden_size="a")),
        ("lora/adapter_config.json", dict(r=2**40)),
        ("lora/adapter_config.json", dict(peft_type="EVIL")),
        ("config.json", dict(model_type="bert")),
        ("config.json", dict(bind=dict(expansion=2**19))),
        ("config.json", dict(encoder=dict(feature_dim=2**50))),
    ],
)
def test_absurd_settings_of_a_model(file, values, folder):
    change(folder / file, **values)
    assert refusal(lambda: ibllm.load(folder), folder)


def test_after_all_that_the_model_answers_as_before(model, answer):
    assert model.generate({"image": BALL}, "what is it ?") == answer


# Generated files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "{name: (contents, reader)} of small good files."
    place = tmp_path_factory.mktemp("good")
    memory.save(place / "memory.index")
    save_file({"w": torch.zeros(3), "v": torch.ones(2, 2)}, place / "weights.safetensors")
    torch.save({"w": torch.zeros(3), "v": torch.ones(2, 2)}, place / "weights.pth")
    save_results("tiny", dict(a=[1.0, 2.0], b={"c": "d"}), 1, {}, place)
    fit(
        nn.Sequential(nn.Linear(1, 1), Mean()),
        Columns(input=torch.zeros(4, 1)),
        Recipe(2, 2, warmup=0),
        "good",
        place / "run.pt",
    )
    readers = {
        "memory.index": VisualCache.load,
        "weights.safetensors": read_weights,
        "weights.pth": read_weights,
        "run.pt": newest_checkpoint,
        "tiny.json": lambda path: load_results("tiny", path.parent),
    }
    return {name: ((place / name).read_bytes(), reader) for name, reader in readers.items()}


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["memory.index", "weights.safetensors", "weights.pth", "run.pt", "tiny.json"]),
    st.floats(0, 0.999),
    st.sampled_from(["cut", "byte", "claim", "drop", "noise"]),
    st.sampled_from("<H <I <Q".split()),
    st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]),
    st.binary(min_size=1, max_size=40),
)
def test_generated_files(good, tmp_path, name, where, accident, form, number, noise):
    "A good file after an accident; a cut one is always refused, and so is noise."
    data, reader = good[name]
    place = int(where * len(data))
    if accident == "cut":
        data = data[: min(place, len(data) - 2)]  # JSON's last line break is no loss
    if accident == "drop":
        data = data[:place] + data[place + len(noise) :]
    if accident == "byte":
        data = data[:place] + noise[:1] + data[place + 1 :]
    if accident == "claim":
        claim = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
        data = data[:place] + claim + data[place + len(claim) :]
    if accident == "noise":
        data = noise * 9
    path = tmp_path / name
    path.write_bytes(data)
    text = refusal(lambda: reader(path), tmp_path)
    assert text or accident in ("byte", "claim", "drop")
