"Explorer: functions agree with the model's own; controls do what they say, never block and never fail in silence."
import itertools
import time
from dataclasses import asdict
from html import unescape

import pytest
import torch
from ipywidgets import Button, Image, Widget
from matplotlib.figure import Figure

import ibllm
from ibllm.explorer import CacheRow, Explorer, draw_view, neighbours, next_tokens, sample_inputs
from ibllm.world import SENSORS, project_folder

QUESTION = "what is this ?"


@pytest.fixture(scope="module")
def samples(): return sample_inputs(project_folder() / "data" / "samples")


@pytest.fixture(scope="module")
def model():
    "Toyland with random gates, as zero gates would hide every mistake."
    model = ibllm.load("toyland")
    with torch.no_grad(): model.injection.gates.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def explorer(model, samples):
    explorer = Explorer(model, samples)
    yield explorer
    explorer.stop()
    if explorer.worker: explorer.worker.join()


@pytest.fixture
def bell(samples): return {"audio": (samples["bell"]["audio"], 1.), "depth": (samples["bell"]["depth"], .5)}


def endless(self, inputs, question, cache):
    for i in itertools.count():
        time.sleep(.005)
        yield f"{i} "


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(.005)


# Functions

def test_samples_are_sorted_by_thing_and_sense(samples, tmp_path):
    assert all(set(files) == set(SENSORS) for files in samples.values())
    for name in ("old_bell_audio.wav", "bell_smell.wav", "audio.wav", "bell_audio"): (tmp_path / name).touch()
    assert sample_inputs(tmp_path) == {"old_bell": {"audio": tmp_path / "old_bell_audio.wav"}}


def test_a_folder_without_samples_is_explained(tmp_path):
    with pytest.raises(ValueError, match="has no samples, wants files called like"): sample_inputs(tmp_path)


def test_neighbours_are_those_the_model_uses(model, bell):
    found = neighbours(model, bell, k=4, temperature=7.)
    feature = model.prepare(bell, cache=False)
    mixed = torch.nn.functional.normalize(.5 * feature + .5 * found.prototype, dim=1)
    torch.testing.assert_close(mixed, model.prepare(bell, cache=dict(k=4, temperature=7., weight=.5)))
    torch.testing.assert_close(found.weights, torch.softmax(7 * found.similarities, dim=1))


def test_neighbours_need_a_cache_and_a_feature(model, bell, monkeypatch):
    with pytest.raises(ValueError, match="zero vector"): neighbours(model, {})
    with pytest.raises(ValueError, match="k: got 0"): neighbours(model, bell, k=0)
    monkeypatch.setattr(model, "cache", None)
    with pytest.raises(ValueError, match="model: got one without a cache"): neighbours(model, bell)


@torch.no_grad()
def test_next_tokens_go_from_the_language_model_alone_to_the_trained_model(model, bell):
    tokens, probabilities = next_tokens(model, bell, QUESTION, (0, 1, 2), cache=False, count=5)
    ids = model.tokenize([QUESTION])["input_ids"]
    alone = model.llm(ids).logits[0, -1].softmax(-1)
    whole = model(ids, model.prepare(bell, cache=False)).logits[0, -1].softmax(-1)
    top = torch.stack([alone, whole]).amax(0)
    for row, wanted in zip(probabilities, (alone, whole)):
        assert all((wanted - p).abs().min() < 1e-5 for p in row)
    assert len(tokens) == 5 and probabilities.shape == (3, 5)
    assert probabilities.amax(0).tolist() == sorted(probabilities.amax(0).tolist(), reverse=True)
    assert probabilities.max() >= top.max() - 1e-5
    assert not torch.allclose(probabilities[0], probabilities[1])


def test_next_tokens_take_the_cache_into_account(model, bell):
    first, second = (next_tokens(model, bell, QUESTION, (1,), cache, count=len(model.tokenizer))[1].sum()
                     for cache in (False, dict(k=3, temperature=5., weight=1.)))
    assert first.item() == pytest.approx(1, abs=1e-4) and second.item() == pytest.approx(1, abs=1e-4)
    first, second = (next_tokens(model, bell, QUESTION, (1,), cache)[1] for cache in (False, True))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("scales", [(), (float("nan"),), (1, float("inf"))])
def test_bad_scales_are_explained(model, bell, scales):
    with pytest.raises(ValueError, match="scales: got .* wants at least one finite number"):
        next_tokens(model, bell, QUESTION, scales)


def test_view_has_both_charts(model, bell):
    figure = draw_view(model, bell, QUESTION, dict(k=4, temperature=7., weight=.5), scale=2., title="$a title")
    left, right = figure.axes
    assert isinstance(figure, Figure) and len(left.patches) == 4 and len(right.patches) == 12
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["injection × 0", "injection × 2"]
    assert draw_view(model, {}, QUESTION).axes[0].texts[0].get_text() == "the cache is not used"


# Controls

def controls(widget: Widget):
    yield widget
    for child in getattr(widget, "children", ()): yield from controls(child)


def test_every_control_has_a_label_and_fits_800_pixels(explorer):
    leaves = [w for w in controls(explorer) if not getattr(w, "children", None)]
    labels = [w.description for w in leaves if not isinstance(w, Image)]
    assert all(labels) and len(set(labels)) == len(labels)
    for row in explorer.children:
        assert sum(int((w.layout.width or "0px")[:-2]) for w in getattr(row, "children", (row,))) <= 720
    assert not any(getattr(w, "continuous_update", False) for w in leaves if "Slider" in type(w).__name__)
    assert "/" not in repr(explorer)


def test_answers_are_the_models(explorer, model, samples):
    explorer.senses["audio"].choice.label, explorer.senses["point"].choice.label = "bell", "ball"
    explorer.question.value = "what colour is it ?"
    asked = explorer.request()
    assert asked["inputs"] == {"audio": (samples["bell"]["audio"], 1.), "point": (samples["ball"]["point"], 1.)}
    assert asked["cache"] == asdict(model.config.cache) and asked["scale"] == 1
    explorer.ask_button.click()
    explorer.worker.join()
    assert (explorer.status.value, explorer.stop_button.disabled) == ("done", True)
    for box, cache in ((explorer.cached, asked["cache"]), (explorer.plain, False)):
        assert unescape(box.value) == model.generate(asked["inputs"], asked["question"], cache=cache)[0]
    assert bytes(explorer.picture.value[:4]) == b"\x89PNG"


def test_words_alone_and_an_unused_cache(explorer):
    assert explorer.request()["cache"] is False
    explorer.ask()
    explorer.worker.join()
    assert explorer.status.value == "done" and "not used" in explorer.cached.value


@pytest.mark.parametrize("name", ["weight", "cache", "scale"])
def test_letting_go_of_a_control_asks(explorer, monkeypatch, name):
    asked = []
    monkeypatch.setattr(explorer, "_answer", lambda request, stopped: asked.append(request))
    if name == "weight": explorer.senses["imu"].weight.value = .5
    if name == "cache": explorer.cache.use.value = False
    if name == "scale": explorer.scale.value = 2.
    explorer.worker.join()
    assert len(asked) == 1


def test_stop_ends_an_endless_answer_and_asking_does_not_block(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer.model), "stream", endless)
    start = time.monotonic()
    explorer.ask()
    assert time.monotonic() - start < 1
    until(lambda: explorer.plain.value)
    assert (explorer.status.value, explorer.stop_button.disabled) == ("answering …", False)
    explorer.stop_button.click()
    explorer.worker.join(10)
    assert not explorer.worker.is_alive()
    assert (explorer.status.value, explorer.stop_button.disabled) == ("stopped", True)


def test_asking_again_replaces_the_answer_under_way(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer.model), "stream", endless)
    explorer.ask()
    first = explorer.worker
    until(lambda: explorer.plain.value)
    explorer.ask()
    until(lambda: not first.is_alive() and explorer.status.value == "answering …")
    assert explorer.worker is not first and explorer.worker.is_alive()


@pytest.mark.parametrize("upset, words", [
    (lambda e: setattr(e.question, "value", " "), "prompts: got"),
    (lambda e: e.senses["image"].add({"new": [{"name": "a.png", "content": b"<b>no picture"}]}), "cannot be read"),
], ids=["no question", "no picture"])
def test_errors_are_shown_in_words(explorer, upset, words):
    upset(explorer)
    explorer.ask()
    explorer.worker.join()
    assert words in explorer.status.value and explorer.stop_button.disabled
    assert "<b>no" not in explorer.status.value
    explorer.senses["image"].choice.index, explorer.question.value = 0, QUESTION
    explorer.ask()
    explorer.worker.join()
    assert explorer.status.value == "done"


def test_a_model_without_a_cache_has_its_controls_disabled(model, samples, monkeypatch):
    monkeypatch.setattr(model, "cache", None)
    row = CacheRow(model)
    assert row.settings() is False and all(w.disabled for w in row.children)


def test_buttons_are_the_ones_shown(explorer):
    shown = [w for w in controls(explorer) if isinstance(w, Button)]
    assert shown == [explorer.ask_button, explorer.stop_button]
