"Published layouts, there and back, against numbers recorded from the released code at small sizes."

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)

from ibllm.bind import BindNetwork
from ibllm.checkpoints import official
from ibllm.checkpoints.adapter import (
    BIND,
    adapter_weights,
    llama_weights,
    load_adapter,
    load_llama,
    load_tokenizer,
    rotary_rows,
    with_biases,
    with_lora,
)
from ibllm.checkpoints.imagebind import IMAGEBIND, imagebind_weights, load_imagebind
from ibllm.checkpoints.official import PUBLISHED, download_official, export_official, load_official
from ibllm.checkpoints.weights import read_weights, translate, write_weights
from ibllm.config import ImageBindConfig, ModelConfig
from ibllm.encoders import ImageBind
from ibllm.llama import GatedInjection, base_model
from ibllm.model import ImageBindLLM, load, mix
from ibllm.objectives import freeze, prepare_stage_one, prepare_stage_two

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = [
    "llama_adapter_tiny_finetune",
    "llama_adapter_tiny_finetune_partial",
    "llama_adapter_tiny_finetune_legacy",
    "llama_adapter_tiny_pretrain",
]
pytestmark = pytest.mark.filterwarnings("ignore:adapter. it does not tell:UserWarning")  # ours


def test_fixtures_are_the_recorded_files():
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and path.name != "MANIFEST.json"]
    assert {str(path.relative_to(GOLDEN)) for path in files} == manifest.keys()
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == manifest[str(path.relative_to(GOLDEN))]["sha256"], path


class Recorded:
    "One recorded adapter: tensors, numbers and the model loaded from them."

    def __init__(self, name: str) -> None:
        folder = GOLDEN / name
        self.meta = json.loads((folder / "meta.json").read_text())
        self.base = GOLDEN / Path(self.meta["base_checkpoint"]).parent
        self.file = folder / "adapter.safetensors"
        self.weights = load_file(self.file)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.tolerance = {key: self.meta["tolerance"][key] for key in ("atol", "rtol")}
        self.llm, self.bind, self.injection = load_adapter(self.file, self.base)

    def values(self, feature: Tensor) -> Tensor:
        return self.injection.gated_values(self.bind(mix([feature], [1.0])), self.llm)

    def close(self, ours: Tensor, name: str) -> bool:
        return torch.allclose(ours, self.outputs[name], **self.tolerance)

    def generate(self, prompt: Tensor, values: Tensor, **options):
        "What the decoder inside writes after one prompt [T]; greedily, unless `options` say more."
        ids = prompt[None]  # [1, T]
        greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        greedy["attention_mask"] = torch.ones_like(ids)
        return base_model(self.llm).generate(ids, gated_values=values, **greedy | options)


def short(name: str) -> str:
    return name.removeprefix("llama_adapter_tiny_")


@pytest.fixture(scope="module", params=ADAPTERS, ids=short)
def recorded(request):
    return Recorded(request.param)


# --- the adapter ----------------------------------------------------------------------------------


@torch.no_grad()
def test_bind_features(recorded):
    features = {}
    for name in ("", "_audio", "_text", "_video"):
        features[name] = recorded.inputs[f"visual/features{name}"]
    one = mix([features[""]], [1.0])
    assert recorded.close(one[:, None], "visual/mixed")
    assert recorded.close(recorded.bind(one)[:, None], "visual/bind_out")
    several = mix([features[""], features["_audio"], features["_text"]], [0.7, 0.4, 1.0])
    assert recorded.close(several[:, None], "visual/multi_mixed")
    assert recorded.close(recorded.bind(several)[:, None], "visual/multi_bind_out")
    video = recorded.bind(mix([features["_video"]], [0.3]))
    assert recorded.close(video[:, None], "visual/video_only_weight_0.3_bind_out")


def training_loss(recorded) -> tuple[Tensor, Tensor]:
    "Logits [B, T, vocabulary] and loss of the recorded training batch."
    ids, labels = recorded.inputs["train/tokens"], recorded.inputs["train/labels"]
    values = recorded.values(recorded.inputs["train/features"])
    logits = recorded.llm(ids, gated_values=values).logits
    words = logits[:, :-1].flatten(0, 1)  # [B * (T - 1), vocabulary]
    return logits, F.cross_entropy(words, labels[:, 1:].flatten(), ignore_index=0)


def test_logits_loss_and_gradients(recorded):
    recorded.llm.requires_grad_(True)
    logits, loss = training_loss(recorded)
    assert recorded.close(logits, "train/logits")
    assert recorded.close(loss, "train/loss")
    loss.backward()
    norm = recorded.llm.get_decoder().norm.weight.grad
    recorded.llm.requires_grad_(False)
    if "train/grad/llama.norm.weight" in recorded.outputs:
        assert recorded.close(norm, "train/grad/llama.norm.weight")
    for part in (recorded.llm, recorded.bind, recorded.injection):
        part.zero_grad()


@pytest.mark.parametrize("name", ADAPTERS, ids=short)
def test_every_gradient(name):
    recorded = Recorded(name)
    parts = recorded.llm.requires_grad_(True), recorded.bind, recorded.injection
    training_loss(recorded)[1].backward()
    for part in parts:
        for p in part.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = adapter_weights(*parts)  # a gradient has its parameter's layout
    norms = recorded.meta["grad_l2_norms_for_train_batch"]
    assert norms.keys() <= gradients.keys()
    assert norms.keys() == set(recorded.meta["trainable_parameters"])
    for weight, norm in norms.items():
        assert gradients[weight].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5)
    whole = [key for key in recorded.outputs if key.startswith("train/grad/")]
    assert len(whole) >= 2
    assert all(recorded.close(gradients[key[len("train/grad/") :]], key) for key in whole)


@torch.no_grad()
def test_plain_language_model(recorded):
    logits = recorded.llm(recorded.inputs["gen/prompt"][None]).logits[:, -1]
    assert recorded.close(logits, "plain_no_adapter/last_logits")


@torch.no_grad()
def test_greedy_generation(recorded):
    prompt = recorded.inputs["gen/prompt"]
    values = recorded.values(recorded.inputs["gen/features"])
    count, start = len(recorded.outputs["gen/tokens"]), len(prompt)
    details = {"return_dict_in_generate": True, "output_logits": True}
    result = recorded.generate(prompt, values, max_new_tokens=count, **details)
    assert torch.equal(result.sequences[0, start:], recorded.outputs["gen/tokens"])
    assert recorded.close(torch.cat(result.logits), "gen/step_logits")
    eos = recorded.meta["gen_eos_id"]
    ended = recorded.generate(prompt, values, max_new_tokens=count, eos_token_id=eos)
    tokens = ended[0, start:]
    assert tokens[-1] == eos and torch.equal(tokens[:-1], recorded.outputs["gen_eos/tokens"])


@torch.no_grad()
def test_generation_from_a_mixture(recorded):
    features = [recorded.inputs["gen/features"], recorded.inputs["visual/features_audio"][:1]]
    values = recorded.injection.gated_values(recorded.bind(mix(features, [0.7, 0.4])), recorded.llm)
    prompt = recorded.inputs["gen/prompt"]
    tokens = recorded.generate(prompt, values, max_new_tokens=6)
    assert torch.equal(tokens[0, len(prompt) :], recorded.outputs["gen_multi/tokens"])


@torch.no_grad()
def test_ragged_batch(recorded):
    prompts = [recorded.inputs[f"gen_batch/prompt_{i}"] for i in range(2)]
    values = recorded.values(recorded.inputs["gen_batch/features"])
    length = max(map(len, prompts))
    ids = torch.stack([F.pad(p, (length - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])
    tokens = base_model(recorded.llm).generate(
        ids,
        attention_mask=mask,
        gated_values=values,
        max_new_tokens=8,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )
    for i in range(2):
        assert torch.equal(tokens[i, length:], recorded.outputs[f"gen_batch/tokens_{i}"])
    # from the end of the shorter prompt on; the longer is forced
    steps = recorded.outputs["gen_batch/step_logits"]
    first = min(map(len, prompts))
    rows = []
    for i, prompt in enumerate(prompts):
        rows.append(torch.cat([prompt, steps[len(prompt) - first :, i].argmax(-1)]))
    logits = recorded.llm(torch.stack(rows), gated_values=values).logits
    assert recorded.close(logits[:, first - 1 : -1].transpose(0, 1), "gen_batch/step_logits")


@pytest.mark.parametrize("case", ["default", "hot", "p1"])
@torch.no_grad()
def test_sampling_is_the_released_codes(recorded, case, monkeypatch):
    """Probabilities of all tokens in the four recorded steps, on `generate`'s own path.

    The model's settings are the default case's; the others name theirs. Transformers' own
    `top_k` of 50 would show in two of them."""
    model, written = whole(recorded), recorded.outputs["gen/tokens"]
    feature = mix([recorded.inputs["gen/features"]], [1.0])
    options = {} if case == "default" else recorded.meta[f"top_p/{case}"]
    found = []
    for step in range(4):
        ids = torch.cat([recorded.inputs["gen/prompt"], written[:step]])[None]  # [1, T]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        monkeypatch.setattr(type(model), "tokenize", lambda *_, batch=batch: batch)
        request = model.request(feature, "x", **options | {"max_new_tokens": 1})
        details = {"return_dict_in_generate": True, "output_scores": True}
        result = base_model(model.llm).generate(**request, **details)
        found.append(torch.softmax(result.scores[0][0], -1))  # [vocabulary]
    expected = recorded.outputs[f"top_p/{case}/sorted_filtered"]
    ordered = torch.stack(found).sort(descending=True).values
    assert recorded.close(ordered, f"top_p/{case}/sorted_filtered")
    assert torch.equal(ordered > 0, expected > 0)  # the same number of words is left
    if case == "p1":
        assert (expected > 0).all() and expected.shape[1] == 96


CHECKED = {
    "train/logits",
    "train/loss",
    "train/loss_when_no_labels",  # in test_golden_training
    "plain_no_adapter/last_logits",
    "gen/tokens",
    "gen/step_logits",
    "gen_eos/tokens",
    "gen_multi/tokens",
    "gen_batch/tokens_0",
    "gen_batch/tokens_1",
    "gen_batch/step_logits",
    "visual/mixed",
    "visual/bind_out",
    "visual/multi_mixed",
    "visual/multi_bind_out",
    "visual/video_only_weight_0.3_bind_out",
    "top_p/default/sorted_filtered",
    "top_p/hot/sorted_filtered",
    "top_p/p1/sorted_filtered",
}


def test_every_recorded_output_is_checked(recorded):
    assert {key for key in recorded.outputs if not key.startswith("train/grad/")} == CHECKED


def test_what_the_file_shows(recorded):
    dims, meta = recorded.meta["dims"], recorded.meta
    assert recorded.injection.gates.shape == (dims["query_layer"], dims["n_heads"])
    assert (recorded.bind.blocks[0].gate.bias is not None) == meta["legacy_bridge"]
    assert hasattr(recorded.llm, "peft_config") == (meta["phase"] == "finetune")
    if meta["phase"] == "finetune":
        lora = recorded.llm.peft_config["default"]
        assert lora.r == lora.lora_alpha == dims["rank"]


def test_adapter_there_and_back(recorded):
    again = adapter_weights(recorded.llm, recorded.bind, recorded.injection)
    assert again.keys() == recorded.weights.keys() == set(recorded.meta["adapter_keys"])
    first = recorded.llm.config.num_hidden_layers - len(recorded.injection.gates)
    unused = {f"llama.layers.{i}.attention.gate" for i in range(first)}
    for name, w in again.items():
        if name in unused:
            assert w.shape == recorded.weights[name].shape and not w.any()
        else:
            assert torch.equal(w, recorded.weights[name])


def equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(w, b[name]) and w.dtype == b[name].dtype for name, w in a.items())


def equal_state(a: nn.Module, b: nn.Module) -> bool:
    return equal_weights(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_export_load_is_exact(recorded, suffix, dtype, tmp_path):
    first = load_adapter(recorded.file, recorded.base, dtype)
    write_weights(adapter_weights(*first), tmp_path / f"x{suffix}")
    second = load_adapter(tmp_path / f"x{suffix}", recorded.base, dtype)
    assert all(equal_state(a, b) for a, b in zip(first, second))


def says(llm: nn.Module, bind: BindNetwork, injection: GatedInjection, recorded) -> Tensor:
    "Logits for the recorded training batch, of a decoder as it was handed out."
    feature = mix([recorded.inputs["train/features"]], [1.0])
    values = injection.gated_values(bind(feature), llm)
    return llm(recorded.inputs["train/tokens"], gated_values=values).logits


@torch.no_grad()
def test_base_in_every_form(recorded, tmp_path):
    load_llama(recorded.base).save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)  # as transformers loads it: not enabled
    for llama in (tmp_path, str(tmp_path), load_llama(recorded.base), plain):
        adapted = load_adapter(recorded.file, llama)
        assert recorded.close(says(*adapted, recorded), "train/logits")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["meta", "hugging face"])
def test_llama_is_handed_out_with_injection_enabled(layout, tmp_path):
    "A decoder without it swallows `gated_values` in silence, and refuses them in `generate`."
    source = GOLDEN / "llama_base_tiny"
    if layout != "meta":
        load_llama(source).save_pretrained(tmp_path)
        source = tmp_path
    llm, ids = load_llama(source), torch.tensor([[1, 5, 9]])
    values = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    plain = llm(ids).logits
    assert torch.equal(llm(ids, gated_values=0 * values).logits, plain)
    assert not torch.allclose(llm(ids, gated_values=values).logits, plain, atol=0.1)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids)}
    written = llm.generate(ids, gated_values=values, **options)
    assert written[0, -1] == llm(ids, gated_values=values).logits[0, -1].argmax()


def test_decoder_that_cannot_be_injected_is_not_handed_out(tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got GPT2LMHeadModel, wants a decoder whose"):
        load_llama(tmp_path)


def test_file_straight_from_training(recorded, tmp_path):
    weights = {
        "image_bind.trunk.weight": torch.ones(2),
        "llma.layers.0.attention.wq.weight": torch.ones(2),
    }
    for name, w in recorded.weights.items():
        weights[name.replace("llama.", "llma.", 1)] = w.half() if "gate" in name else w
    content = {
        "model": weights,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, tmp_path / "x.pth")
    _, bind, injection = load_adapter(tmp_path / "x.pth", recorded.base)
    assert injection.gates.dtype == torch.float32
    assert torch.allclose(injection.gates, recorded.injection.gates, atol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(bind.parameters(), recorded.bind.parameters()))


def refused(weights, base, message: str) -> None:
    "`load_adapter` must refuse them in one line that matches `message`."
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(weights, base)
    assert "\n" not in str(error.value)


def test_report_of_what_does_not_fit(recorded):
    def without(pattern: str) -> dict[str, Tensor]:
        return {n: w for n, w in recorded.weights.items() if not re.search(pattern, n)}

    count, layers, base = len(recorded.weights), recorded.meta["dims"]["n_layers"], recorded.base
    missing, end = r"1 missing \(image_bind_f1_2.weight\)", f", wants exactly {count}$"
    refused(without("f1_2.weight"), base, f"^adapter: got {count - 1} tensors, {missing}{end}")
    norms = rf"{layers} missing \({layers} of llama.layers.\*.ffn_norm.weight\){end}"
    refused(without("ffn_norm"), base, norms)
    extra, unexpected = {"llama.extra_norm": torch.ones(1)}, r"1 unexpected \(llama.extra_norm\)"
    refused(recorded.weights | extra, base, f"^adapter: got {count + 1} tensors, {unexpected}{end}")
    small = recorded.weights | {"llama.norm.weight": torch.ones(3)}
    refused(small, base, rf"1 of another shape \(llama.norm.weight \[3\] for \[\d+\]\){end}")
    refused(without("f1_2.weight") | extra, base, f"{missing}; {unexpected}{end}")
    for pattern in ("gate", "prefix_query", "image_bind_proj.weight"):
        refused(without(pattern), base, "^adapter: got no gates, queries or bind network")


# --- the right base -------------------------------------------------------------------------------


def test_base_of_another_size():
    got, wants = "width 32, 6 layers and 2 heads", "64, 4 and 4, as the adapter was made for"
    file = GOLDEN / f"{ADAPTERS[0]}/adapter.safetensors"
    refused(file, GOLDEN / "llama_base_tiny_b", f"^llama: got {got}, wants {wants}$")


def test_base_of_another_family_or_already_adapted(recorded):
    config = MistralConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    wants = "wants a LlamaForCausalLM without PEFT$"
    refused(recorded.file, MistralForCausalLM(config), f"^llama: got MistralForCausalLM, {wants}")
    if hasattr(recorded.llm, "peft_config"):
        refused(recorded.file, recorded.llm, f"^llama: got PeftModel.*, {wants}")


def test_vocabulary_of_the_released_adapters():
    with init_empty_weights(include_buffers=True):
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32001))
        weights = adapter_weights(llm, BindNetwork(1024, 4096), GatedInjection(4096, 32, 32))
    refused(weights, llm, "^llama: got a vocabulary of 32001, wants 32000, as the adapter was ")


def test_first_stage_adapter_refuses_another_base():
    llm = load_llama(GOLDEN / "llama_base_tiny")
    llm.model.layers[0].input_layernorm.weight.data.add_(0.1)
    file, changed = GOLDEN / f"{ADAPTERS[3]}/adapter.safetensors", "layers.0.input_layernorm.weight"
    refused(file, llm, f"^llama: got another model.{changed} than the adapter's, wants the LLaMA")


def test_base_that_cannot_be_told_is_named(recorded, recwarn):
    load_adapter(recorded.file, recorded.base)
    load_adapter(recorded.weights, load_llama(recorded.base))
    said = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    if recorded.meta["phase"] == "pretrain":
        assert not said  # its norms tell
    else:
        assert len(said) == 2 and recorded.base.name in said[0] and "LlamaForCausalLM" in said[1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_recorded_fingerprint_refuses_another_base(recorded, suffix, tmp_path, recwarn):
    model = whole(recorded)
    path = export_official(model, tmp_path, suffix)["adapter"]
    recwarn.clear()
    for dtype in (None, torch.bfloat16, torch.float16):
        load_adapter(path, recorded.base, dtype)
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    other = load_llama(recorded.base)
    other.model.layers[1].self_attn.v_proj.weight.data.mul_(1.1)
    refused(path, other, "^llm: got another language model than the adapter was trained with")


def test_saved_model_refuses_another_base(tmp_path):
    recorded = Recorded(ADAPTERS[1])
    whole(recorded).save_pretrained(tmp_path)
    load(tmp_path)
    other = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    other.model.embed_tokens.weight.data.normal_()
    other.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="^llm: got another language model"):
        load(tmp_path)


# --- LLaMA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_base_tiny", "llama_base_tiny_b"])
def test_llama_there_and_back(name, tmp_path):
    folder = GOLDEN / name
    llm, weights = load_llama(folder), load_file(folder / "consolidated.00.safetensors")
    weights.pop("rope.freqs", None)
    assert equal_weights(llama_weights(llm), weights)
    params = json.loads((folder / "params.json").read_text())
    assert llm.config.rms_norm_eps == params["norm_eps"]
    llm.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(load_llama(tmp_path)(ids).logits, llm(ids).logits)


def test_llama_dtype_and_context():
    llm = load_llama(GOLDEN / "llama_base_tiny", dtype=torch.bfloat16, context=64)
    assert llm.dtype == torch.bfloat16 and llm.config.max_position_embeddings == 64


def test_grouped_heads_and_another_rotary_base_there_and_back(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        initializer_range=0.5,
    )
    llm = LlamaForCausalLM(config).eval()
    write_weights(llama_weights(llm), tmp_path / "consolidated.00.safetensors")
    params = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    params |= {"vocab_size": 30, "rope_theta": 500.0}
    (tmp_path / "params.json").write_text(json.dumps(params))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load_llama(tmp_path)(ids).logits, llm(ids).logits)


def copy_base(folder: Path) -> dict[str, Tensor]:
    shutil.copytree(GOLDEN / "llama_base_tiny", folder, dirs_exist_ok=True)
    return load_file(folder / "consolidated.00.safetensors")


def llama_refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_llama(folder)
    assert "\n" not in str(error.value)


def test_llama_refuses_other_tensors(tmp_path):
    weights, file = copy_base(tmp_path), tmp_path / "consolidated.00.safetensors"
    save_file({n: w for n, w in weights.items() if n != "norm.weight"}, file)
    report = r"38 tensors, 1 missing \(norm.weight\), wants exactly 39"
    llama_refused(tmp_path, f"^llama: got {report}$")
    save_file(weights | {"layers.9.attention.wq.weight": torch.ones(64, 64)}, file)
    llama_refused(tmp_path, r"1 unexpected \(layers.9.attention.wq.weight\), wants exactly 39$")
    save_file({"model.norm.weight": torch.ones(2)}, file)
    names = "tok_embeddings.weight, layers.0.feed_forward.w1.weight"
    llama_refused(tmp_path, f"^llama: got no {names}, wants tensors under Meta's names$")
    save_file(weights, tmp_path / "consolidated.01.safetensors")
    llama_refused(tmp_path, "^source: got 2 consolidated files in .*, wants one")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"dim": 64, "experts": 8}', r"got unknown keys \['experts'\], wants some of "),
        ("[", "got .*params.json', wants JSON with whole numbers for dim, n_layers, n_heads$"),
        ("[]", "got .*params.json', wants JSON with whole numbers for "),
        ('{"dim": "x"}', "got .*params.json', wants JSON with whole numbers for "),
        ('{"dim": 64}', "got no n_heads, n_layers, norm_eps, wants the keys "),
        (
            '{"dim": 64, "n_layers": 999999999, "n_heads": 4, "norm_eps": 1e-6}',
            "got n_layers 1e.09, wants 4, as many as the weights have$",
        ),
    ],
)
def test_llama_refuses_other_parameters(content, message, tmp_path):
    copy_base(tmp_path)
    (tmp_path / "params.json").write_text(content)
    llama_refused(tmp_path, f"^params.json: {message}")


@pytest.mark.parametrize("place", ["7B", "."])
def test_tokenizer_of_a_meta_folder(place, tmp_path):
    copy_base(tmp_path / "7B")
    missing = "^source: got no tokenizer.model in .*7B' or above, wants Meta's"
    with pytest.raises(FileNotFoundError, match=missing):
        load_tokenizer(tmp_path / "7B")
    shutil.copy(GOLDEN / "dataset_tiny/tokenizer.model", tmp_path / place)
    words = load_tokenizer(str(tmp_path / "7B"))
    ids = words("the  dog's\nsleep ☂")["input_ids"]
    assert (words.bos_token_id, words.eos_token_id, ids[0]) == (1, 2, 1)
    assert words.decode(ids, skip_special_tokens=True) == "the  dog's\nsleep ☂"


@pytest.mark.parametrize("shape", [(12,), (12, 5), (24, 3)])
def test_rotary_rows_are_a_permutation(shape):
    x = torch.randn(shape)
    assert torch.equal(rotary_rows(rotary_rows(x, 3), 3, back=True), x)
    assert not torch.equal(rotary_rows(x, 3), x)


# --- the encoder ----------------------------------------------------------------------------------


OTHER_TOWERS = ("vision", "text", "audio", "depth", "thermal", "imu")


def encoder_config() -> ImageBindConfig:
    "Of the recorded encoder."
    meta = json.loads((GOLDEN / "imagebind_tiny/meta.json").read_text())
    a, trunk = meta["constructor_arguments"], meta["point_trunk_config"]
    towers = {}
    for name in OTHER_TOWERS:
        towers[name] = {
            "width": a[f"{name}_embed_dim"],
            "blocks": a[f"{name}_num_blocks"],
            "heads": a[f"{name}_num_heads"],
        }
    for name in ("vision", "depth", "thermal"):
        towers[name]["size"] = (112, 112)
    towers["text"]["vocabulary"] = meta["changed_constants"]["text_vocab (official 49408)"]
    towers["point"] = {
        "width": trunk["trans_dim"],
        "blocks": trunk["depth"],
        "heads": trunk["num_heads"],
        "groups": trunk["num_group"],
        "group_size": trunk["group_size"],
        "group_widths": (128, 256, 512, trunk["encoder_dims"]),
    }
    return ImageBindConfig.from_dict({"feature_dim": a["out_embed_dim"], **towers})


WEIGHTS = GOLDEN / "imagebind_tiny/weights.safetensors"


@torch.no_grad()
def test_encoder_there_and_back():
    encoder = load_imagebind(WEIGHTS, encoder_config())
    again = imagebind_weights(encoder)
    assert equal_weights(again, load_file(WEIGHTS))
    assert equal_state(encoder, load_imagebind(again, encoder_config()))
    images = load_file(GOLDEN / "imagebind_tiny/inputs.safetensors")["vision_image"].float()
    expected = load_file(GOLDEN / "imagebind_tiny/outputs.safetensors")["vision_image/normalized"]
    assert torch.allclose(encoder.released("image", images), expected, atol=2e-5)


def hints() -> ImageBindConfig:
    "Only what the tensors do not show."
    known = encoder_config()
    towers = {name: {"heads": getattr(known, name).heads} for name in (*OTHER_TOWERS, "point")}
    towers["point"] |= {"groups": known.point.groups, "group_size": known.point.group_size}
    return ImageBindConfig.from_dict(towers)


def test_sizes_are_read_off_the_tensors():
    encoder = load_imagebind(WEIGHTS, hints())
    assert encoder.config == encoder_config()
    assert equal_state(encoder, load_imagebind(WEIGHTS, encoder_config()))


@pytest.mark.parametrize(
    "tower, sizes",
    [
        ("vision", {"size": (56, 56), "blocks": 1, "mlp_ratio": 2}),
        ("vision", {"kernel": 7, "stride": 7, "kernel_frames": 1}),
        ("audio", {"channels": 2}),
        ("imu", {"samples": 160, "channels": 3}),
        ("depth", {"width": 32, "blocks": 3}),
        ("text", {"vocabulary": 77, "context": 9}),
        ("point", {"group_widths": (4, 8, 12, 16), "projection_width": 20}),
    ],
)
def test_every_size_is_read(tower, sizes):
    config = encoder_config()
    for name, value in sizes.items():
        setattr(getattr(config, tower), name, value)
    given = hints()
    if "stride" in sizes:
        given.vision.stride = 7
    assert load_imagebind(imagebind_weights(ImageBind(config)), given).config == config


def encoder_refused(weights, config: ImageBindConfig | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_imagebind(weights, config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_encoder_without_the_point_trunk():
    config = encoder_config()
    config.point = None
    weights = load_file(WEIGHTS)
    encoder_refused(weights, config, r"^imagebind: got \d+ tensors, \d+ unexpected \(")
    rest = {name: w for name, w in weights.items() if "point" not in name}
    assert "point" not in load_imagebind(rest, config).towers
    encoder_refused(rest, encoder_config(), r"missing \(modality_heads.point.0.bias, ")


def test_report_in_the_files_own_names():
    weights = load_file(WEIGHTS)
    count = len(weights)
    for block in (0, 1):
        del weights[f"modality_trunks.audio.blocks.{block}.norm_1.weight"]
    weights["modality_heads.imu.0.bias"] = torch.zeros(3)
    report = (
        rf"got {count - 2} tensors, "
        r"2 missing \(2 of modality_trunks.audio.blocks.\*.norm_1.weight\); "
        r"1 of another shape \(modality_heads.imu.0.bias \[3\] for \[16\]\)"
    )
    encoder_refused(weights, encoder_config(), f"^imagebind: {report}, wants exactly {count}$")


def test_another_model_needs_its_heads():
    got = "none for another model than ImageBind-Huge .vision is 32 wide for 1280."
    for weights in (WEIGHTS, load_file(WEIGHTS)):
        encoder_refused(weights, None, f"^config: got {got}, wants an `ImageBindConfig`")


@pytest.mark.parametrize("point", [True, False])
def test_full_size_encoder_needs_no_config(point):
    config = ImageBindConfig() if point else ImageBindConfig(point=None)
    with torch.device("meta"):
        weights = imagebind_weights(ImageBind(config))
    assert load_imagebind(weights).config == config
    del weights["modality_trunks.text.blocks.3.mlp.fc1.bias"]
    encoder_refused(weights, None, r"1 missing \(modality_trunks.text.blocks.3.mlp.fc1.bias\), ")


def test_every_name_has_one_translation():
    with torch.device("meta"):
        names = ImageBind(ImageBindConfig()).state_dict().keys()
    back = translate(names, IMAGEBIND, back=True)
    assert back.keys() == names and len(set(back.values())) == len(names)
    assert len(translate(back.values(), IMAGEBIND)) == len(names)
    assert translate(["image_bind_f1_4.weight"], BIND) == {}


LOADING = """
import re, sys, torch
from ibllm.checkpoints import load_imagebind
from ibllm.config import ImageBindConfig, VisionConfig
def megabytes():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) / 1024
before = megabytes()
rest = dict.fromkeys(("text", "audio", "point", "depth", "thermal", "imu"))
encoder = load_imagebind(sys.argv[1], ImageBindConfig(vision=VisionConfig(), **rest))
loaded = megabytes()
for weights in encoder.parameters():
    weights.amax()  # reads every number, makes no copy (a sum in float64 would)
print(before, loaded, megabytes())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux"
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loading_holds_nothing_twice(suffix, tmp_path):
    rest = dict.fromkeys(("text", "audio", "point", "depth", "thermal", "imu"))
    with torch.device("meta"):
        weights = imagebind_weights(ImageBind(ImageBindConfig(**rest)))
    kept = {}
    for name, w in weights.items():
        block = re.search(r"blocks\.(\d+)\.", name)
        if not block or int(block[1]) < 4:
            kept[name] = torch.ones(w.shape)
    path = tmp_path / f"x{suffix}"  # four of 32 blocks, 320 MB
    write_weights(kept, path)
    size = path.stat().st_size / 2**20
    done = subprocess.run(
        [sys.executable, "-c", LOADING, path], check=True, capture_output=True, text=True
    )
    before, loaded, used = map(float, done.stdout.split())
    assert size > 300 and loaded - before < 0.25 * size  # mapped, not read
    assert 0.9 * size < used - before < 1.1 * size  # read when used, once


# --- the whole system -----------------------------------------------------------------------------


def words() -> PreTrainedTokenizerBase:
    from test_model import tokenizer

    return tokenizer()


def whole(recorded: Recorded) -> ImageBindLLM:
    "The system around a recorded adapter, with a random encoder of its width."
    small = {"width": 8, "blocks": 1, "heads": 2}
    config = ImageBindConfig.from_dict(
        {
            "feature_dim": recorded.bind.project.in_features,
            "vision": {**small, "size": (28, 28)},
            "imu": {**small, "samples": 16},
            **dict.fromkeys(("text", "audio", "point", "depth", "thermal")),
        }
    )
    encoder = imagebind_weights(ImageBind(config))
    return load_official(encoder, recorded.file, recorded.base, tokenizer=words(), config=config)


def test_whole_system_loads_answers_and_saves(tmp_path, monkeypatch):
    recorded = Recorded(ADAPTERS[1])  # its features have the width of the small encoder
    index = GOLDEN / "cache_tiny/knn.index"
    model = load_official(
        WEIGHTS, recorded.file, recorded.base, index, words(), config=encoder_config()
    )
    assert len(model.cache) == 512 and not any(p.is_meta for p in model.parameters())
    assert all(
        torch.equal(w, recorded.bind.state_dict()[n]) for n, w in model.bind.named_parameters()
    )
    ids, feature = recorded.inputs["train/tokens"], mix([recorded.inputs["train/features"]], [1.0])
    with torch.no_grad():
        logits = model(ids, feature).logits
    assert recorded.close(logits, "train/logits")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for usual in (model.llm.generation_config, base_model(again.llm).generation_config):
        assert (usual.do_sample, usual.temperature, usual.top_p) == (True, 0.1, 0.75)
        assert usual.top_k == 0 and usual.max_new_tokens == 256
    with torch.no_grad():
        assert torch.equal(again(ids, feature).logits, logits)
    prompt = recorded.inputs["gen/prompt"][None]
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    monkeypatch.setattr(type(again), "tokenize", lambda *_: batch)
    feature = mix([recorded.inputs["gen/features"]], [1.0])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    tokens = base_model(again.llm).generate(**again.request(feature, "x", **options))
    assert torch.equal(tokens[0, prompt.shape[1] :], recorded.outputs["gen/tokens"][:6])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_whole_system_exported_and_loaded_is_the_same(recorded, suffix, tmp_path):
    model = whole(recorded)
    paths = export_official(model, tmp_path / "new" / "folder", suffix)
    assert [path.name for path in paths.values()] == [f"imagebind_huge{suffix}", f"adapter{suffix}"]
    config = model.encoder.config
    again = load_official(**paths, llama=recorded.base, tokenizer=words(), config=config)
    assert equal_state(model, again) and again.config == model.config
    assert set(read_weights(paths["adapter"])) == set(recorded.meta["adapter_keys"])


def test_exported_files_have_the_released_form(tmp_path):
    paths = export_official(whole(Recorded(ADAPTERS[0])), tmp_path)
    assert set(torch.load(paths["adapter"], weights_only=True)) == {"model", "fingerprint"}
    assert "modality_heads.vision.0.bias" in torch.load(paths["imagebind"], weights_only=True)


def test_what_we_trained_becomes_a_released_adapter(tmp_path):
    base, recorded = GOLDEN / "llama_base_tiny", Recorded(ADAPTERS[3])
    torch.manual_seed(0)
    llm = freeze(with_biases(load_llama(base)))
    prepare_stage_one(llm, recorded.bind, recorded.injection)
    first = adapter_weights(llm, recorded.bind, recorded.injection)
    stage_two = prepare_stage_two(llm, recorded.bind, recorded.injection, rank=2)
    for p in stage_two.llm.parameters():
        p.data.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    second = adapter_weights(stage_two.llm, recorded.bind, recorded.injection)
    assert set(first) == set(recorded.weights)
    assert set(second) == set(Recorded(ADAPTERS[0]).weights)
    with torch.no_grad():
        trained = says(stage_two.llm, recorded.bind, recorded.injection, recorded)
        assert torch.allclose(says(*load_adapter(second, base), recorded), trained, atol=1e-5)
    deep = BindNetwork(32, 64, num_blocks=4)
    with pytest.raises(ValueError, match="^bind: got 4 blocks, wants at most 3"):
        adapter_weights(llm, deep, recorded.injection)


def parts_refused(recorded: Recorded, message: str, kind=ValueError, llama=None, tokenizer=None):
    with pytest.raises(kind, match=message):
        load_official(
            WEIGHTS,
            recorded.file,
            llama or recorded.base,
            tokenizer=tokenizer,
            config=encoder_config(),
        )


def test_parts_that_disagree():
    width = "^imagebind: got features of width 16, wants 32, the adapter's"
    parts_refused(Recorded(ADAPTERS[0]), width, tokenizer=words())
    recorded = Recorded(ADAPTERS[1])
    many = "^tokenizer: got 400 tokens, wants LLaMA's; its vocabulary has 96"
    parts_refused(recorded, many, tokenizer=load_tokenizer(GOLDEN / "dataset_tiny"))
    parts_refused(recorded, "^tokenizer: got none, wants LLaMA's", llama=load_llama(recorded.base))
    parts_refused(recorded, "^source: got no tokenizer.model in", FileNotFoundError)


def parameters(module: nn.Module) -> int:
    return sum(w.numel() for w in module.state_dict().values())


def test_full_size_counts():
    with init_empty_weights(include_buffers=True):
        encoder, flat = ImageBind(ImageBindConfig()), ImageBind(ImageBindConfig(point=None))
        bind, legacy = BindNetwork(1024, 4096), BindNetwork(1024, 4096, norm="layer")
        injection = GatedInjection(4096, 32, 32)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32000))
        first = adapter_weights(llm, bind, injection)
        second = adapter_weights(with_lora(with_biases(llm), 16), bind, injection)
    assert (parameters(encoder), parameters(flat)) == (1_223_565_617, 1_200_786_990)
    millions = {name: round(parameters(tower) / 1e6, 1) for name, tower in encoder.towers.items()}
    assert millions == {
        "vision": 632.8,
        "text": 354.0,
        "audio": 86.2,
        "point": 22.8,
        "depth": 21.9,
        "thermal": 86.2,
        "imu": 19.6,
    }
    assert (parameters(bind), parameters(legacy)) == (608_190_464, 608_313_344)
    assert (len(first), len(second)) == (112, 720)
    lora = sum(w.numel() for name, w in second.items() if "lora" in name)
    assert round(lora / 1e6, 1) == 40.0
    assert second["llama.layers.31.feed_forward.lora_w2_l1.weight"].shape == (16, 11008)
    with init_empty_weights():
        model = ImageBindLLM(ModelConfig(), llm, words())
    assert parameters(model.bind) == 608_190_464
    assert parameters(model.injection) == 32 * (4096 + 32)


# --- downloads ------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A Hub that notes what is asked for; its files have the right sizes (times `scale`), all holes."
    hub = SimpleNamespace(asked=[], scale=1.0)
    sizes = {f.file: f.gigabytes * 1e9 for f in PUBLISHED.values()}

    def download(repository: str, file: str, revision: str) -> str:
        hub.asked.append((repository, file, revision))
        with (tmp_path / file).open("wb") as sparse:
            sparse.truncate(round(hub.scale * sizes[file]))
        return str(tmp_path / file)

    monkeypatch.setattr(official, "hf_hub_download", download)
    return hub


def test_download_says_first_what_it_fetches(hub, capsys, monkeypatch):
    parts = ("imagebind", "knn")
    paths = download_official(parts, dict.fromkeys(parts, COMMIT))
    expected = [(PUBLISHED[part].repository, PUBLISHED[part].file, COMMIT) for part in parts]
    assert hub.asked == expected
    assert [path.name for path in paths.values()] == ["imagebind_w3D.pth", "knn.index"]
    assert list(paths) == list(parts)
    said = capsys.readouterr().out
    assert "4.89 GB" in said and "13.30 GB" in said and "18.2 GB go to " in said
    assert "CC BY-NC-SA 4.0" in said and "at 012345678" in said and "llama: 13.5 GB, not" in said

    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(official, "hf_hub_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_official(("adapter",), {"adapter": COMMIT})
    assert "adapter: 2.60 GB" in capsys.readouterr().out  # said before anything was fetched


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), COMMIT + "0", ""])
def test_nothing_is_downloaded_without_a_commit(hub, revision):
    wants = "wants the commit .40 hexadecimal digits."
    with pytest.raises(ValueError, match=f"^revisions: got .* for 'knn', {wants}"):
        download_official(("imagebind", "knn"), {"imagebind": COMMIT, "knn": revision})
    with pytest.raises(ValueError, match=r"^parts: got \['llama'\], wants some of"):
        download_official(("llama",))
    assert not hub.asked


def test_recorded_commits_are_whole():
    assert all(re.fullmatch("[0-9a-f]{40}", f.revision or COMMIT) for f in PUBLISHED.values())


def test_file_of_another_size_is_refused(hub):
    hub.scale = 0.9
    with pytest.raises(ValueError, match="^adapter: got 7B.pth of 2.34 GB, wants 2.60 GB$"):
        download_official(("adapter",), {"adapter": COMMIT})


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    command = f"`hf download {PUBLISHED['adapter'].repository} 7B.pth --revision {COMMIT} "
    message = f"^adapter: got no copy here and no way to the Hub, wants the path, .*{command}"
    with pytest.raises(ConnectionError, match=message):
        download_official(("adapter",), {"adapter": COMMIT})


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_there_and_back(suffix, tmp_path):
    weights = {"a": torch.randn(2, 3).half(), "b": torch.arange(4)}
    write_weights(weights, tmp_path / f"w{suffix}")
    assert equal_weights(read_weights(tmp_path / f"w{suffix}"), weights)
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


def test_old_style_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth")["a"], torch.ones(2))


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    "One adapter in both formats, as bytes, and where its damaged copies go."
    folder, files = tmp_path_factory.mktemp("sound"), {}
    weights = load_file(GOLDEN / f"{ADAPTERS[1]}/adapter.safetensors")
    for suffix in (".pth", ".safetensors"):
        write_weights(weights, folder / f"x{suffix}", fingerprint="1 2")
        files[suffix] = (folder / f"x{suffix}").read_bytes()
    return files, folder


@settings(max_examples=60, deadline=10_000)
@given(data=st.data(), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_damaged_files_get_one_line(sound_files, data, suffix):
    files, folder = sound_files
    content = bytearray(files[suffix])
    edge = data.draw(st.sampled_from([2000, len(content) - 1]))  # names and shapes are at the front
    for place in data.draw(st.lists(st.integers(0, edge), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (folder / f"bad{suffix}").write_bytes(content[:cut])
    for read in (lambda path: load_adapter(path, GOLDEN / "llama_base_tiny_b"), load_imagebind):
        try:
            read(folder / f"bad{suffix}")
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "modality_trunks.audio.blocks.99999999999.norm_1.weight",
        "modality_trunks.audio.blocks.x.norm_1.weight",
        "modality_preprocessors.imu.pos_embed",
        "point_trunk.pc_projection",
        "modality_heads.vision.2.weight",
        "modality_trunks.text.blocks.0.attn.out_proj.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 5)])
def test_wild_claims_get_one_line(name, shape):
    for weights in ({name: torch.zeros(shape)}, load_file(WEIGHTS) | {name: torch.zeros(shape)}):
        encoder_refused(weights, hints(), r"^\w+: got .*\d.*, wants ")


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path("harm").write_text, ("done",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_files(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    with pytest.raises(FileNotFoundError, match="^path: got .*, which is no file, wants a file"):
        read_weights(path)
    for content in (b"", b"not weights", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^path: got .*, which .*, wants a file of") as error:
            read_weights(path)
        assert "\n" not in str(error.value)
    for content in (Harmful(), {"model": Harmful()}, [1, 2], {"model": {"a": 1}}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="^path: got .*, which .*, wants a file of"):
            read_weights(tmp_path / "bad.pth")
    assert not Path("harm").exists()
