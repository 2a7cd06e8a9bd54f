"""The joined model: mixing and prompts against recorded values, requests, streaming, saving, and
every error."""

import copy
import json
import math
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import config, features, image, make_model, sound, tokenizer
from torch.nn import functional as F
from transformers import (
    StoppingCriteria,
    Trainer,
    TrainingArguments,
)

import ibllm
from ibllm.bind import BindNetwork
from ibllm.cache import VisualCache, Whitening
from ibllm.config import (
    BindConfig,
    CacheSettings,
    ImageBindConfig,
    IMUConfig,
    ModelConfig,
)
from ibllm.encoders import ImageBind, encoder_fingerprint
from ibllm.llama import GatedInjection, base_model
from ibllm.model import ALPACA, ImageBindLLM, load, mix, prompt_ids, prompt_text, read_messages
from ibllm.objectives import count_trainable, prepare_stage_two

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def cached():
    return make_model(cache=VisualCache.build(features(30, seed=1)))


# --- mixing and prompts, recorded from the published system ---------------------------------------

CACHE_META = json.loads((GOLDEN / "cache_tiny/meta.json").read_text())


@pytest.mark.parametrize("entry", CACHE_META["mixes"], ids=lambda entry: f"mix{entry['mix']}")
def test_recorded_mixtures(entry):
    inputs, outputs = (
        load_file(GOLDEN / f"cache_tiny/{name}.safetensors") for name in ("inputs", "outputs")
    )
    weights = {name.lower(): weight for name, weight in entry.items() if name != "mix"}
    mixed = mix([inputs[f"mix/{name}"] for name in weights], list(weights.values()))
    assert torch.allclose(mixed[0], outputs[f"mix{entry['mix']}/plain"], **CACHE_META["tolerance"])
    enhanced = VisualCache.load(GOLDEN / "cache_tiny/knn.index").enhance(mixed)
    assert torch.allclose(
        enhanced[0], outputs[f"mix{entry['mix']}/enhanced"], **CACHE_META["tolerance"]
    )


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "prompts/prompts.json").read_text()), ids=range(3)
)
def test_alpaca_prompts(case):
    plain = tokenizer()
    plain.chat_template = ALPACA
    text = prompt_text(plain, (case["instruction"], case["input"]))
    assert text == "<s>" + case["prompt"]
    plain.bos_token = None
    assert prompt_text(plain, (case["instruction"], case["input"])) == case["prompt"]


# --- requests -------------------------------------------------------------------------------------


def test_pixels_survive_every_way_in(model):
    one = model.embed({"image": image()})["image"]
    assert one.shape == (1, 24) and torch.allclose(one.norm(dim=1), torch.ones(1))
    assert torch.allclose(model.prepare({"image": image()}, {"image": 3.0}), one, atol=1e-5)
    assert torch.allclose(model.prepare({"image": [image(1), image()]})[1:], one, atol=1e-5)


def test_arrays_come_with_a_rate(model):
    plain = model.prepare({"audio": (sound(), 8000)})
    assert torch.allclose(
        model.prepare({"audio": (sound(), 8000)}, {"audio": 0.3}), plain, atol=1e-5
    )
    assert model.prepare({"imu": (np.ones((6, 64), np.float32), 64)}).shape == (1, 24)


def test_weights_change_the_mixture_and_zero_leaves_out(model):
    def mixture(a, b):
        inputs = {"image": image(), "audio": (sound(), 8000)}
        return model.prepare(inputs, {"image": a, "audio": b})

    assert not torch.allclose(mixture(1, 1), mixture(1, 2), atol=1e-3)
    assert torch.allclose(mixture(1, 1), mixture(7, 7), atol=1e-5)
    assert torch.allclose(mixture(1, 0), model.embed({"image": image()})["image"], atol=1e-5)


@torch.no_grad()
def test_batches_equal_single_requests(cached):
    pictures = [image(i) for i in range(3)]
    prompts = ["what is this ?", "describe it", "describe the sound of the bell"]
    together = cached.generate(
        {"image": pictures, "audio": [(sound(i), 8000) for i in range(3)]}, prompts
    )
    alone = [
        cached.generate({"image": p, "audio": (sound(i), 8000)}, prompts[i])[0]
        for i, p in enumerate(pictures)
    ]
    assert together == alone and len(set(alone)) > 1
    one_prompt = [cached.generate({"image": p}, "describe it")[0] for p in pictures]
    one_picture = [cached.generate({"image": image()}, p)[0] for p in prompts]
    assert cached.generate({"image": pictures}, "describe it") == one_prompt
    assert cached.generate({"image": image()}, prompts) == one_picture


def test_text_only_is_the_plain_language_model(model):
    ids = model.tokenize(["what is this ?"])
    plain = model.tokenizer.batch_decode(model.llm.generate(**ids)[:, 5:], skip_special_tokens=True)
    assert plain == model.generate(None, "what is this ?") == model.answer(None, "what is this ?")
    assert plain != model.answer(features(1), "what is this ?")


def test_words_alone_inject_the_zero_feature(model):
    zero = torch.zeros(1, model.config.encoder.feature_dim)
    assert model.generate({}, "what is this ?") == model.answer(zero, "what is this ?")


def test_input_changes_the_answer(model):
    answers = model.answer(features(12), "what is this ?")
    assert len(set(answers)) > 3


def test_scale_goes_from_the_language_model_alone_to_the_trained_model(model):
    alone, whole = (model.gated_values(features(2), scale) for scale in (0, 1))
    assert not alone.any() and torch.equal(whole, model.gated_values(features(2)))
    torch.testing.assert_close(model.gated_values(features(2), 2.0), 2 * whole)
    source = {"image": image()}
    answers = [model.generate(source, "what is this ?", scale=scale)[0] for scale in (0, 1, 2.0)]
    assert answers[:2] == [
        model.generate(source if s else None, "what is this ?")[0] for s in (0, 1)
    ]
    assert "".join(model.stream(source, "what is this ?", scale=2.0)).strip() == answers[2]
    with pytest.raises(ValueError, match="scale: got nan, wants a finite number"):
        model.answer(features(1), "what ?", math.nan)


def test_generate_options_pass_through(model):
    assert (
        len(model.answer(features(2), "what is this ?", num_beams=3, num_return_sequences=3)) == 6
    )
    assert len(model.answer(features(1), "what is this ?", max_new_tokens=1)[0].split()) <= 1

    def sample(seed):
        torch.manual_seed(seed)
        return model.answer(features(1), "what is this ?", do_sample=True, temperature=2.0)

    assert sample(1) == sample(1) and len({sample(i)[0] for i in range(5)}) > 1
    plain = model.answer(features(1), "what is this ?")
    assert model.answer(features(1), "what is this ?", return_dict_in_generate=True) == plain


def test_answers_stay_in_the_context(model):
    prompt = " ".join(["ball"] * 44)  # 45 tokens with the start, 48 fit
    assert len(model.answer(None, prompt, max_new_tokens=30, min_new_tokens=3)[0].split()) == 3


def test_context_of_a_prompt(model):
    ids = model.tokenize([("describe", "the bell"), "what is this ?"])
    assert (
        model.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == "describe the bell"
    )
    assert ids["attention_mask"].sum(1).tolist() == [4, 5]


def test_forward_scores_tokens_and_reaches_what_learns(model):
    ids = model.tokenize(["what is this ?"])["input_ids"]
    assert torch.equal(model(ids).logits, model.llm(ids).logits)
    model(ids, features(1), labels=ids).loss.backward()
    assert all(
        p.grad is not None for part in (model.bind, model.injection) for p in part.parameters()
    )
    model.zero_grad(set_to_none=True)


def test_encoder_stays_in_evaluation_mode():
    model = make_model().train()
    assert (
        model.bind.training
        and model.llm.training
        and not any(m.training for m in model.encoder.modules())
    )


def test_cache_is_used_unless_switched_off(cached):
    raw, enhanced = (
        cached.prepare({"image": image()}, cache=False),
        cached.prepare({"image": image()}),
    )
    assert torch.allclose(enhanced, cached.cache.enhance(raw, k=5))
    prototype = cached.prepare({"image": image()}, cache=CacheSettings(k=5, weight=1.0))
    assert torch.allclose(prototype, cached.cache.enhance(raw, k=5, weight=1.0))


def test_settings_for_each_modality(cached):
    one, two = {"image": image()}, {"image": image(), "audio": (sound(), 8000)}
    settings = CacheSettings(k=3, temperature=5.0, weight=0.9)
    assert torch.allclose(
        cached.prepare(one, cache={"image": settings}),
        cached.prepare(one, cache=settings),
        atol=1e-5,
    )
    raw = cached.embed(two)
    wanted = mix([cached.enhance(raw["image"], settings), cached.enhance(raw["audio"])], [1, 1])
    assert torch.allclose(cached.prepare(two, cache={"image": settings}), wanted, atol=1e-5)
    wanted = mix([raw["image"], cached.enhance(raw["audio"], settings)], [1, 3])
    said = {"weights": {"audio": 3}, "cache": {"image": False, "audio": settings}}
    found = cached.prepare(two, **said)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert cached.generate(two, "what is this ?", **said) == cached.answer(found, "what is this ?")
    pieces = cached.stream(two, "what is this ?", **said)
    assert "".join(pieces).strip() == cached.answer(found, "what is this ?")[0]


# --- whitening ------------------------------------------------------------------------------------


@pytest.fixture
def whitened():
    model = make_model(cache=VisualCache.build(features(30, seed=1)))
    model.whitenings = {"audio": Whitening.fit(features(90, seed=2), model.cache)}
    return model


def test_whitening_comes_before_mixture_and_cache(whitened):
    two = {"image": image(), "audio": (sound(), 8000)}
    raw = whitened.embed(two)
    moved = whitened.whitenings["audio"](raw["audio"])
    mixed, plain = mix([raw["image"], moved], [1, 1]), mix(list(raw.values()), [1, 1])
    for cache, wanted in (
        (None, whitened.enhance(mixed)),
        (False, plain),
        (CacheSettings(weight=0), F.normalize(mixed, dim=1)),
        (CacheSettings(whiten=False), whitened.enhance(plain, CacheSettings())),
        (CacheSettings(k=2, whiten=False), whitened.enhance(plain, CacheSettings(k=2))),
        (
            {"audio": CacheSettings(whiten=False), "image": False},
            mix([raw["image"], whitened.enhance(raw["audio"], CacheSettings())], [1, 1]),
        ),
        (
            {"audio": CacheSettings(k=2)},
            mix(
                [whitened.enhance(raw["image"]), whitened.enhance(moved, CacheSettings(k=2))],
                [1, 1],
            ),
        ),
    ):
        assert torch.allclose(whitened.prepare(two, cache=cache), wanted, atol=1e-5), cache


def test_whitening_is_off_by_default_and_saved_if_given(whitened, tmp_path):
    assert make_model().whitenings == {}
    whitened.save_pretrained(tmp_path)
    again = load(tmp_path)
    request = {"audio": (sound(), 8000)}
    assert torch.equal(again.prepare(request), whitened.prepare(request))
    assert list(again.whitenings) == ["audio"]
    again.whitenings = {}
    again.save_pretrained(tmp_path)
    assert load(tmp_path).whitenings == {} and not (tmp_path / "whitenings.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        {"audio.mean": torch.ones(24)},
        {f"audio.{name}": torch.ones(3) for name in ("mean", "matrix", "centre")},
    ],
)
def test_broken_whitenings_are_refused(content, whitened, tmp_path):
    whitened.save_pretrained(tmp_path)
    path = tmp_path / "whitenings.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(
        ValueError, match="safetensors', which cannot be loaded .*, wants whitenings of width 24"
    ) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


# --- the memory's encoder -------------------------------------------------------------------------


def test_a_memory_of_another_image_tower_is_refused(tmp_path):
    model, message = (
        make_model(),
        "^fingerprint: got that of another encoder than the one that made this memory",
    )
    known = VisualCache.build(
        features(9), fingerprint=encoder_fingerprint(model.encoder.tower("image"))
    )
    unknown = VisualCache.build(features(9))
    torch.manual_seed(7)
    other = ImageBindLLM(config(), model.llm, tokenizer())
    for cache in (known, unknown, None):
        model.cache = cache
    for cache in (unknown, None):
        other.cache = cache
    with pytest.raises(ValueError, match=message):
        other.cache = known
    assert other.cache is None
    with pytest.raises(ValueError, match=message):
        ImageBindLLM(config(), model.llm, tokenizer(), encoder=other.encoder, cache=known)
    assert (
        ImageBindLLM(config(), model.llm, tokenizer(), encoder=model.encoder, cache=known).cache
        is known
    )
    other.save_pretrained(tmp_path)
    known.save(tmp_path / "cache.index")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    unknown.save(tmp_path / "cache.index")
    assert load(tmp_path).cache.fingerprint == ""


def test_the_other_towers_do_not_matter_to_the_memory(tmp_path):
    model = make_model()
    model.cache = VisualCache.build(
        features(9), fingerprint=encoder_fingerprint(model.encoder.tower("image"))
    )
    for p in model.encoder.tower("audio").parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).cache.fingerprint == model.cache.fingerprint
    assert model.bfloat16().cache is not None
    model.cache = model.cache  # half precision is the same tower


def test_shipped_memory_names_the_shipped_image_tower():
    model = load("toyland")
    assert model.cache.fingerprint == encoder_fingerprint(model.encoder.tower("image")) != ""
    for p in model.encoder.tower("image").parameters():
        p.data.mul_(1.5)
    with pytest.raises(ValueError, match="^fingerprint: got that of another encoder"):
        model.cache = model.cache


def test_a_tokenizer_without_padding_gets_one():
    plain = tokenizer()
    plain.pad_token = None
    llm = make_model().llm
    batch = ImageBindLLM(config(), llm, plain).tokenize(["describe it", "a ball and a bell"])
    assert batch["attention_mask"].sum() == 9


# --- streaming ------------------------------------------------------------------------------------


def test_stream_equals_generate(cached):
    for source in ({}, {"image": image()}, {"audio": (sound(), 8000), "text": "a red ball"}):
        pieces = list(cached.stream(source, "what is this ?", cache=CacheSettings(weight=0.2)))
        assert (
            "".join(pieces).strip()
            == cached.generate(source, "what is this ?", cache=CacheSettings(weight=0.2))[0]
        )
        assert all(pieces)


def test_abandoned_stream_stops_generating(model):
    class Slow(StoppingCriteria):
        steps = 0

        def __call__(self, ids, scores, **_):
            self.steps += 1
            time.sleep(0.01)
            return torch.zeros(len(ids), dtype=torch.bool)

    slow, before = Slow(), threading.active_count()
    pieces = model.stream(
        {}, "describe it", stopping_criteria=[slow], max_new_tokens=40, min_new_tokens=40
    )
    next(pieces)
    pieces.close()
    assert slow.steps < 20 and threading.active_count() == before


def test_errors_reach_the_reader(model):
    class Broken(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            raise RuntimeError("broken criterion")

    pieces = model.stream({}, "describe it", stopping_criteria=[Broken()])
    with pytest.raises(RuntimeError, match="broken criterion"):
        list(pieces)
    with pytest.raises(ValueError, match="one at a time"):
        model.stream({"image": [image(), image(1)]}, "describe it")


def test_streams_run_side_by_side(model):
    expected = [model.answer(features(3)[i : i + 1], "what is this ?")[0] for i in range(3)]
    requests = [model.request(features(3)[i : i + 1], "what is this ?") for i in range(3)]
    results = {}

    def work(i):
        results[i] = base_model(model.llm).generate(**requests[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert [
        model.tokenizer.decode(results[i][0, 5:], skip_special_tokens=True).strip()
        for i in range(3)
    ] == expected


# --- saving and loading ---------------------------------------------------------------------------


def same(a, b):
    ids = a.tokenize(["what is this ?"])["input_ids"]
    with torch.no_grad():
        assert torch.allclose(a(ids, features(1)).logits, b(ids, features(1)).logits, atol=1e-5)
    source = {"image": image(), "text": "a red ball", "audio": (sound(), 8000)}
    assert torch.allclose(a.prepare(source), b.prepare(source), atol=1e-6) and a.config == b.config
    assert a.generate(source, "what is this ?") == b.generate(source, "what is this ?")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_round_trip(kind, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    same(model, again)
    assert not again.training and again.cache is None
    assert type(base_model(again.llm)).__name__ == type(model.llm).__name__
    assert again.llm.generation_config.max_new_tokens == 6
    again.save_pretrained(tmp_path / "b")
    first, second = (
        {p.relative_to(tmp_path / name): p for p in (tmp_path / name).rglob("*")} for name in "ab"
    )
    assert first.keys() == second.keys()
    weights = [name for name in first if name.suffix == ".safetensors"]
    assert len(weights) == 2 and all(
        first[name].read_bytes() == second[name].read_bytes() for name in weights
    )


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str
)
def test_round_trip_with_lora_keeps_the_bare_value_matrix(options, tmp_path):
    model = make_model(cache=VisualCache.build(features(9)))
    bare = model.llm.model.layers[0].self_attn.v_proj.weight.clone()
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    model.llm = get_peft_model(model.llm, lora).eval()
    for name, p in model.llm.named_parameters():  # as stage 2 tunes them
        if "norm" in name or name.endswith("bias") or "modules_to_save" in name:
            p.data.normal_()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(
        again.llm.get_base_model().model.layers[0].self_attn.v_proj.base_layer.weight, bare
    )
    assert (
        None not in json.loads((tmp_path / "lora/adapter_config.json").read_text()).values()
    )  # older PEFT would warn
    same(model, again)


def test_saved_folder_names_no_path_of_this_machine(tmp_path):
    make_model().save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    model.llm = get_peft_model(model.llm, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "second")
    texts = [p.read_bytes() for p in (tmp_path / "second").rglob("*") if p.is_file()]
    assert texts and not any(str(tmp_path).encode() in text for text in texts)


def test_saving_again_replaces_the_parts_and_nothing_else(tmp_path, cached):
    (tmp_path / "notes.txt").write_text("mine")
    cached.save_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    names = {"config.json", "llm", "model.safetensors", "notes.txt", "text_tokenizer", "tokenizer"}
    names.add("processor_config.json")
    assert {p.name for p in tmp_path.iterdir()} == names


def test_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert not any(p.name.startswith("tmp") for p in tmp_path.iterdir())
    same(model, load(tmp_path))


def test_language_model_options_pass_through(tmp_path):
    make_model().save_pretrained(tmp_path)
    again = ImageBindLLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.llm.dtype == torch.bfloat16 and again.bind.project.weight.dtype == torch.float32
    assert again.generate({"image": image()}, "what is this ?")[0] is not None


def test_config_defaults_are_the_published_system():
    default = ModelConfig()
    assert default.cache == CacheSettings(10, 20.0, 0.5) and default.bind == BindConfig(3, 4, "rms")
    assert default.layers is None and default.encoder == ImageBindConfig()
    assert ModelConfig.from_dict({}) == default


def test_top_level_names():
    assert ibllm.load is load and ibllm.ImageBindLLM is ImageBindLLM


# --- what goes wrong ------------------------------------------------------------------------------

NAN = torch.full((1, 24), math.nan)
BAD = {
    "unknown modality": (
        lambda m: m.generate({"smell": "x"}, "hi"),
        ValueError,
        "^modality: got 'smell'",
    ),
    "modality this model lacks": (
        lambda m: m.generate({"thermal": "x"}, "hi"),
        ValueError,
        "^modality: got 'thermal'",
    ),
    "inputs no dict": (
        lambda m: m.generate("x.png", "hi"),
        TypeError,
        "^inputs: got str, wants a dict",
    ),
    "empty list of sources": (lambda m: m.generate({"image": []}, "hi"), ValueError, "empty"),
    "empty tuple": (
        lambda m: m.generate({"audio": ()}, "hi"),
        ValueError,
        ": got a tuple of 0, wants",
    ),
    "missing file": (
        lambda m: m.generate({"image": "absent.png"}, "hi"),
        FileNotFoundError,
        "absent.png",
    ),
    "wrong dtype": (
        lambda m: m.embed({"image": np.ones((4, 4, 3), complex)}),
        (ValueError, TypeError),
        "complex",
    ),
    "wrong shape": (
        lambda m: m.embed({"audio": (np.ones((1, 1, 1, 8)), 8000)}),
        ValueError,
        r"\(1, 1, 1, 8\)",
    ),
    "NaN in a recording": (
        lambda m: m.embed({"audio": (np.full(8000, np.nan), 8000)}),
        ValueError,
        "(?i)nan",
    ),
    "negative weight": (
        lambda m: m.generate({"image": image()}, "hi", {"image": -1}),
        ValueError,
        "^weights: got",
    ),
    "NaN weight": (
        lambda m: m.generate({"image": image()}, "hi", {"image": math.nan}),
        ValueError,
        "^weights: got",
    ),
    "all weights zero": (
        lambda m: m.generate({"image": image()}, "hi", {"image": 0}),
        ValueError,
        "not all of them 0",
    ),
    "weight no number": (
        lambda m: m.generate({"image": image()}, "hi", {"image": "1"}),
        ValueError,
        "^weights: got",
    ),
    "weight of an absent modality": (
        lambda m: m.generate({"image": image()}, "hi", {"audio": 1}),
        ValueError,
        r"^weights: got entries for \['audio'\], wants some of \['image'\]",
    ),
    "weight in a pair": (
        lambda m: m.generate({"image": (image(), 0.5)}, "hi"),
        (ValueError, TypeError),
        ": got tuple, wants a picture",
    ),
    "weights no dict": (
        lambda m: m.generate({"image": image()}, "hi", 0.5),
        TypeError,
        "^weights: got float, wants a dict",
    ),
    "unequal lists": (
        lambda m: m.generate({"image": [image()] * 2, "audio": (sound(), 8000)}, "hi"),
        ValueError,
        r"^features: got shapes \[\(2, 24\), \(1, 24\)\]",
    ),
    "prompts for other inputs": (
        lambda m: m.generate({"image": [image()] * 3}, ["hi"] * 2),
        ValueError,
        "^prompts: got 2 for 3 inputs",
    ),
    "no prompts": (lambda m: m.generate({}, []), ValueError, "^prompts: got an empty list"),
    "empty prompt": (lambda m: m.generate({}, " "), ValueError, "^prompts: got ' ', wants text"),
    "prompt no text": (lambda m: m.generate({}, [3]), ValueError, "^prompts: got 3, wants text"),
    "long prompt": (
        lambda m: m.generate({}, "ball " * 60),
        ValueError,
        "^prompts: got one of 61 tokens, wants fewer",
    ),
    "NaN features": (lambda m: m.answer(NAN, "hi"), ValueError, "^features: got NaN"),
    "features of another width": (
        lambda m: m.answer(torch.ones(1, 5), "hi"),
        ValueError,
        r"got .* \(1, 5\)",
    ),
    "features of another rank": (
        lambda m: m.answer(torch.ones(24), "hi"),
        ValueError,
        r"^features: got .* \(24,\)",
    ),
    "integer features": (
        lambda m: m.answer(torch.ones(1, 24).long(), "hi"),
        ValueError,
        "^features: got torch.int64",
    ),
    "features no tensor": (lambda m: m.answer([[1.0]], "hi"), ValueError, "^features: got list"),
    "k above the memory": (
        lambda m: m.generate({"image": image()}, "hi", cache=CacheSettings(k=31)),
        ValueError,
        "^k: got 31",
    ),
    "settings of an absent modality": (
        lambda m: m.generate({"image": image()}, "hi", cache={"audio": False}),
        ValueError,
        r"^cache: got entries for \['audio'\], wants some of \['image'\]",
    ),
    "settings and modalities": (
        lambda m: m.generate({"image": image()}, "hi", cache={"image": False, "k": 3}),
        ValueError,
        r"^cache: got entries for \['k'\], wants some of \['image'\]",
    ),
    "settings of a modality": (
        lambda m: m.generate({"image": image()}, "hi", cache={"image": 3}),
        TypeError,
        "^cache: got 3, wants a CacheSettings, False",
    ),
    "cache switched on": (
        lambda m: m.generate({"image": image()}, "hi", cache=True),
        TypeError,
        "^cache: got True, wants a CacheSettings, False",
    ),
    "cache of another type": (
        lambda m: m.generate({"image": image()}, "hi", cache=10),
        TypeError,
        "^cache: got 10, wants a CacheSettings, False",
    ),
    "weight of the cache": (
        lambda m: m.generate({"image": image()}, "hi", cache=CacheSettings(weight=1.5)),
        ValueError,
        "^weight: got 1.5, wants a number from 0 to 1",
    ),
    "a message without content": (
        lambda m: m.chat([{"role": "user"}]),
        ValueError,
        "^messages: got .*, wants a list of dicts",
    ),
    "a message that says nothing": (
        lambda m: m.chat([{"role": "user", "content": [{"type": "image", "url": image()}]}]),
        ValueError,
        "^messages: got .*, wants text in every message",
    ),
    "two pictures in a conversation": (
        lambda m: m.chat([{"role": "user", "content": [{"type": "image", "url": image()}] * 2}]),
        ValueError,
        "^messages: got two recordings of the modality image",
    ),
    "misspelt option": (
        lambda m: m.generate({}, "hi", max_new_token=3),
        ValueError,
        "max_new_token",
    ),
}


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_requests_refused(call, error, message, cached):
    with pytest.raises(error, match=message) as raised:
        call(cached)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], []), "^features: got none"),
        (([torch.ones(1, 2)], [1, 1]), "^weights: got 2, wants 1"),
        (([torch.ones(1, 2)], [math.inf]), "^weights: got"),
        (([torch.ones(1, 2), torch.ones(1, 3)], [1, 1]), "^features: got shapes"),
    ],
)
def test_mix_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mix(*arguments)


def test_cache_wanted_but_absent(model):
    with pytest.raises(ValueError, match="^cache: got settings for a model without memory"):
        model.prepare({"image": image()}, cache=CacheSettings(k=1))


def test_parts_that_do_not_fit(model):
    with pytest.raises(ValueError, match="^cache: got features of width 3, wants 24"):
        ImageBindLLM(config(), model.llm, tokenizer(), cache=VisualCache.build(torch.ones(1, 3)))
    other = ImageBind(
        ImageBindConfig(
            feature_dim=8,
            vision=None,
            text=None,
            audio=None,
            point=None,
            depth=None,
            thermal=None,
            imu=IMUConfig(width=16, blocks=1, heads=2),
        )
    )
    with pytest.raises(
        ValueError, match="^encoder: got one with another config, wants one made from"
    ):
        ImageBindLLM(config(), model.llm, tokenizer(), encoder=other)
    with pytest.raises(
        ValueError, match="^bind: got one from 8 to 32 numbers, wants from 24 to 32"
    ):
        ImageBindLLM(config(), model.llm, tokenizer(), bind=BindNetwork(8, 32))
    with pytest.raises(ValueError, match="^injection: got queries and gates of shapes"):
        injection = GatedInjection(32, 2, 4, layers=1)
        ImageBindLLM(config(), model.llm, tokenizer(), injection=injection)


def test_parts_that_exist_are_taken(model):
    parts = {"encoder": model.encoder, "bind": model.bind, "injection": model.injection}
    again = ImageBindLLM(config(), model.llm, tokenizer(), **parts)
    assert all(getattr(again, name) is part for name, part in parts.items())


def test_merged_lora_is_not_saved(tmp_path):
    model = make_model()
    model.llm = get_peft_model(model.llm, LoraConfig(r=2, target_modules=["q_proj"]))
    model.llm.merge_adapter()
    with pytest.raises(ValueError, match="^llm: got merged LoRA"):
        model.save_pretrained(tmp_path)


def test_adapters_that_would_be_lost_are_not_saved(tmp_path):
    bare, several = make_model(), make_model()
    get_peft_model(bare.llm, LoraConfig(r=2, target_modules=["q_proj"]))  # the wrapper is dropped
    several.llm = get_peft_model(several.llm, LoraConfig(r=2, target_modules=["q_proj"]))
    several.llm.add_adapter("two", LoraConfig(r=2, target_modules=["k_proj"]))
    for model, got in ((bare, "LoRA in a model without PEFT"), (several, "adapters .*two")):
        with pytest.raises(ValueError, match=f"^llm: got {got}"):
            model.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_lora_merged_into_a_value_matrix_for_good_is_refused(tmp_path):
    model = make_model()
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model.llm = get_peft_model(model.llm, lora).eval()
    before = model.answer(features(1), "what is this ?")
    model.llm.merge_and_unload()  # what this returns is the same model, unwrapped
    message = "LoRA merged into|value matrices other than"
    with pytest.raises(ValueError, match=message):
        model.answer(features(1), "what is this ?")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert before


def test_weights_that_are_loaded_or_learned_are_the_models_own():
    first, second = make_model(), make_model()
    torch.nn.init.normal_(first.llm.model.layers[0].self_attn.v_proj.weight)
    second.load_state_dict(first.state_dict())
    same(first, second)
    second.llm.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)  # it may learn
    assert second.answer(features(1), "what is this ?")
    second.llm.requires_grad_(False)
    with pytest.raises(ValueError, match="value matrices other than"):
        second.answer(features(1), "what is this ?")


def test_a_loaded_model_is_tuned_further(tmp_path):
    model = make_model()
    tuned = prepare_stage_two(model.llm, model.bind, model.injection, rank=2)
    model.llm = tuned.llm
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    further = prepare_stage_two(again.llm, again.bind, again.injection, rank=2)
    assert further.llm is again.llm and count_trainable(further) == count_trainable(tuned)
    again.save_pretrained(tmp_path)
    same(load(tmp_path), model)


def test_quantised_weights_are_not_saved(tmp_path):
    model = make_model()
    model.llm.is_quantized = True  # as transformers marks them
    with pytest.raises(ValueError, match="^llm: got quantised weights"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"model_type": "llama"}'])
def test_folders_that_hold_no_model(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match="which holds no model, wants one written by `save_pretrained`$"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["toylend", "a/b/c", "no such folder"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="^name: got .*, wants 'toyland', a folder"):
        load(name)


def test_weights_that_do_not_fit(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for wrong in (
        weights | {"bind.extra": torch.ones(1)},
        {n: p for n, p in weights.items() if n != "injection.gates"},
        weights | {"injection.gates": torch.ones(1, 4)},
    ):
        save_file(wrong, path)
        with pytest.raises(
            ValueError,
            match="^folder: got 1 weights in model.safetensors .* that do not fit, wants",
        ):
            load(tmp_path)


# --- conversations --------------------------------------------------------------------------------


def test_a_conversation_is_a_request(cached):
    question = [{"type": "image", "url": image()}, {"type": "text", "text": "what is this ?"}]
    first = cached.chat([{"role": "user", "content": question}])
    assert first == cached.generate({"image": image()}, "what is this ?")[0]
    assert (
        cached.chat([{"role": "user", "content": "describe it"}], cache=False)
        == (cached.generate({}, "describe it")[0])
    )


def test_turns_of_a_conversation_are_all_read(cached):
    said = [{"role": "user", "content": "a ball"}, {"role": "assistant", "content": "a bell"}]
    last = {
        "role": "user",
        "content": [{"type": "text", "text": "describe"}, {"type": "text", "text": "it"}],
    }
    inputs, plain = read_messages([*said, last])
    assert inputs == {} and plain[-1]["content"] == "describe it"
    plainly = {
        "chat_template": "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    }
    words = tokenizer()
    words.chat_template = plainly["chat_template"]
    assert prompt_text(words, plain) == "[user] a ball [assistant] a bell [user] describe it "


def test_a_start_token_stands_once_and_only_where_the_template_writes_it():
    words = tokenizer()
    [row] = prompt_ids(words, ["a ball"])
    assert row[0] == words.bos_token_id and row.count(words.bos_token_id) == 1
    words.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert prompt_ids(words, ["a ball"]) == [row[1:]]


# --- the Hub, and the tools of Hugging Face -------------------------------------------------------


class Hub:
    "Stands in for the Hub's API: remembers what it was asked, and keeps what was uploaded."

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, name, private=None, exist_ok=False):
        self.asked.append(("create", name, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, delete_patterns, **options):
        self.deleted = delete_patterns
        self.asked.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.folder)
        return f"https://hub/{repo_id}/commit"

    def download(self, name, **options):
        self.asked.append(("download", name, options))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("ibllm.model.HfApi", found)
    monkeypatch.setattr("ibllm.saving.snapshot_download", found.download)
    return found


def test_a_model_goes_to_the_hub_and_comes_back(hub, cached):
    results = {"kind of sounds": 0.99}
    address = cached.push_to_hub("me/bells", results, private=True, token="t", commit_message="new")
    assert address == "https://hub/me/bells/commit"
    assert hub.asked == [
        ("token", "t"),
        ("create", "me/bells", True, True),
        ("upload", "me/bells", {"commit_message": "new"}),
    ]
    assert {"lora/*", "cache.index", "whitenings.safetensors"} <= set(hub.deleted)
    card = (hub.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ibllm\n") and "| kind of sounds | 0.99 |" in card
    assert "image, video, text, audio, imu" in card and "| visual cache | 30 features |" in card
    where = {"revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": True}
    again = ibllm.load("me/bells", **where)
    assert hub.asked[-1] == ("download", "me/bells", where)
    same(cached, again)
    same(cached, ImageBindLLM.from_pretrained("me/bells"))


def test_a_hub_that_cannot_be_reached_is_one_line():
    message = "^name: got 'me/none', no folder here, which cannot be loaded"
    with pytest.raises(ValueError, match=message) as error:
        load("me/none", local_files_only=True)
    assert "\n" not in str(error.value)


def test_a_model_can_be_pickled_copied_and_kept(cached, tmp_path):
    same(cached, pickle.loads(pickle.dumps(cached)))
    same(cached, copy.deepcopy(cached))
    torch.save(cached, tmp_path / "model.pt")
    same(cached, torch.load(tmp_path / "model.pt", weights_only=False))


def test_transformers_trainer_trains_it(tmp_path):
    model = make_model()
    model.llm.requires_grad_(False)
    rows = model.tokenize(["a red ball", "a blue bell", "a green plane"] * 4)["input_ids"]
    data = [
        {"input_ids": row, "labels": row, "features": feature}
        for row, feature in zip(rows, features(12))
    ]
    before = model.bind.project.weight.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    assert trainer.train().global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.bind.project.weight, before)
    assert all(p.grad is None for p in model.llm.parameters())
