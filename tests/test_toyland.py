"The shipped Toyland weights: what the configuration says, and as good as the shipped results say."

import json
import math
from pathlib import Path

import pytest
import torch

import ibllm
from ibllm.encoders import extract_features
from ibllm.toyland.recipes import (
    TOYLAND_INPUTS,
    TOYLAND_TEMPLATE,
    read_recording,
    toyland_imagebind,
)
from ibllm.toyland.scoring import answer_accuracy, caption_accuracy
from ibllm.toyland.sensors import record
from ibllm.toyland.world import CARRIES, ask_in_words, draw_things, split_things

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data" / "toyland"
RESULTS = json.loads((ROOT / "data" / "results" / "modalities.json").read_text())
SAMPLES = {
    s: ROOT / "data" / "samples" / f"bell_{s}.{end}"
    for s, end in dict(
        image="png",
        video="mp4",
        text="txt",
        audio="wav",
        point="ply",
        depth="png",
        thermal="png",
        imu="csv",
    ).items()
}


@pytest.fixture(scope="module")
def model():
    return ibllm.load("toyland")


def test_weights_are_small_and_safe():
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert not {f.suffix for f in files} & {".pt", ".pth", ".bin", ".pkl"}


def test_the_configuration_is_the_training_notebooks(model):
    assert model.config.encoder == toyland_imagebind(len(model.tokenizer))
    assert model.config.inputs == TOYLAND_INPUTS
    assert model.tokenizer.chat_template == TOYLAND_TEMPLATE
    assert len(model.cache) == RESULTS["memory"]


@pytest.fixture(scope="module")
def recorded():
    things, seed = split_things("test", size=250)
    return things, record(things, seed)


@pytest.mark.parametrize("modality", CARRIES)
def test_each_modality_reaches_its_shipped_accuracy(model, recorded, modality):
    things, recording = recorded
    tensors = read_recording(model.processor, modality, recording[modality])
    features = extract_features(model.encoder, modality, tensors)
    hits = caption_accuracy(model, features, things, cache=None)
    for attribute in CARRIES[modality]:
        shipped = RESULTS["modalities"][modality]["seen"]["cache"][attribute]["seeds"][0]
        variance = max(shipped * (1 - shipped), 0.01)
        error = math.sqrt(variance * (1 / len(things) + 1 / RESULTS["n_seen"]))
        assert abs(hits[attribute].float().mean().item() - shipped) < 3.5 * error, attribute


def test_words_alone_reach_their_shipped_accuracy(model):
    exercises = ask_in_words(draw_things(300, seed=97, pictured=None), seed=97)
    for topic, accuracy in answer_accuracy(model, exercises).items():
        assert accuracy > RESULTS["text_only"][topic]["seeds"][0] - 0.1, topic


def test_every_sample_file_gets_the_recorded_answer(model):
    recorded = json.loads((ROOT / "data" / "results" / "answers.json").read_text())
    for modality, file in SAMPLES.items():
        for name, cache in (("on", None), ("off", False)):
            [said] = model.generate({modality: file}, "describe it .", cache=cache, do_sample=False)
            assert said == recorded[modality][name], (modality, name)


def test_a_closed_gate_is_the_plain_language_model(model):
    ids = model.tokenize(["what is it ?"])["input_ids"]
    feature = torch.nn.functional.normalize(torch.randn(1, 128), dim=1)
    gates = model.injection.gates.data.clone()
    with torch.no_grad():
        plain = model.llm(input_ids=ids).logits
        assert not torch.equal(model(ids, features=feature).logits, plain)
        model.injection.gates.data.zero_()
        assert torch.equal(model(ids, features=feature).logits, plain)
        model.injection.gates.data.copy_(gates)


def test_the_table_is_complete():
    assert RESULTS["n_seen"] >= 900 and len(RESULTS["seeds"]) >= 3
    for modality in CARRIES:
        for part in ("seen", "unseen"):
            rows = RESULTS["modalities"][modality][part]
            assert {"raw", "cache", "neighbour_vote", "zero_shot"} <= rows.keys()
        assert {"shuffled", "random_memory"} <= RESULTS["modalities"][modality]["seen"].keys()
