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
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TopPLogitsWarper,
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
from ibllm.llama import GatedInjection, base_model, enable_injection
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
    here = {
        str(path.relative_to(GOLDEN)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.name != "MANIFEST.json"
    }
    assert here == {name: entry["sha256"] for name, entry in manifest.items()}


class Recorded:
    "One recorded adapter: tensors, numbers and the model loaded from them."

    def __init__(self, name):
        folder = GOLDEN / name
        self.meta = json.loads((folder / "meta.json").read_text())
        self.base = GOLDEN / Path(self.meta["base_checkpoint"]).parent
        self.file, self.weights = (
            folder / "adapter.safetensors",
            load_file(folder / "adapter.safetensors"),
        )
        self.inputs, self.outputs = (
            load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs")
        )
        self.tolerance = {key: self.meta["tolerance"][key] for key in ("atol", "rtol")}
        self.llm, self.bind, self.injection = load_adapter(self.file, self.base)
        enable_injection(self.llm)

    def values(self, feature):
        return self.injection.gated_values(self.bind(mix([feature], [1.0])), self.llm)

    def close(self, ours, name):
        return torch.allclose(ours, self.outputs[name], **self.tolerance)


@pytest.fixture(
    scope="module", params=ADAPTERS, ids=lambda name: name.removeprefix("llama_adapter_tiny_")
)
def recorded(request):
    return Recorded(request.param)


# --- the adapter ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bind_features(recorded):
    features = {
        name: recorded.inputs[f"visual/features{name}"]
        for name in ("", "_audio", "_text", "_video")
    }
    one = mix([features[""]], [1.0])
    bound = recorded.bind(one)
    assert recorded.close(one[:, None], "visual/mixed") and recorded.close(
        bound[:, None], "visual/bind_out"
    )
    several = mix([features[""], features["_audio"], features["_text"]], [0.7, 0.4, 1.0])
    assert recorded.close(several[:, None], "visual/multi_mixed")
    assert recorded.close(recorded.bind(several)[:, None], "visual/multi_bind_out")
    video = recorded.bind(mix([features["_video"]], [0.3]))
    assert recorded.close(video[:, None], "visual/video_only_weight_0.3_bind_out")


def test_logits_loss_and_gradients(recorded):
    ids, labels = recorded.inputs["train/tokens"], recorded.inputs["train/labels"]
    recorded.llm.requires_grad_(True)
    logits = recorded.llm(
        ids, gated_values=recorded.values(recorded.inputs["train/features"])
    ).logits
    assert recorded.close(logits, "train/logits")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    assert recorded.close(loss, "train/loss")
    loss.backward()
    norm = recorded.llm.get_decoder().norm.weight.grad
    recorded.llm.requires_grad_(False)
    if "train/grad/llama.norm.weight" in recorded.outputs:
        assert recorded.close(norm, "train/grad/llama.norm.weight")
    recorded.llm.zero_grad(), recorded.bind.zero_grad(), recorded.injection.zero_grad()


@pytest.mark.parametrize(
    "name", ADAPTERS, ids=lambda name: name.removeprefix("llama_adapter_tiny_")
)
def test_every_gradient(name):
    recorded = Recorded(name)
    parts = recorded.llm.requires_grad_(True), recorded.bind, recorded.injection
    ids, labels = recorded.inputs["train/tokens"], recorded.inputs["train/labels"]
    logits = recorded.llm(
        ids, gated_values=recorded.values(recorded.inputs["train/features"])
    ).logits
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0
    ).backward()
    for part in parts:
        for p in part.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = adapter_weights(*parts)  # a gradient has its parameter's layout
    norms = recorded.meta["grad_l2_norms_for_train_batch"]
    assert (
        norms.keys() <= gradients.keys()
        and set(recorded.meta["trainable_parameters"]) == norms.keys()
    )
    for weight, norm in norms.items():
        assert gradients[weight].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5)
    whole = [key for key in recorded.outputs if key.startswith("train/grad/")]
    assert len(whole) >= 2 and all(
        recorded.close(gradients[key[len("train/grad/") :]], key) for key in whole
    )


@torch.no_grad()
def test_plain_language_model(recorded):
    logits = recorded.llm(recorded.inputs["gen/prompt"][None]).logits[:, -1]
    assert recorded.close(logits, "plain_no_adapter/last_logits")


@torch.no_grad()
def test_greedy_generation(recorded):
    prompt, values = (
        recorded.inputs["gen/prompt"][None],
        recorded.values(recorded.inputs["gen/features"]),
    )
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
    count = len(recorded.outputs["gen/tokens"])
    result = base_model(recorded.llm).generate(
        prompt,
        gated_values=values,
        max_new_tokens=count,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert torch.equal(result.sequences[0, prompt.shape[1] :], recorded.outputs["gen/tokens"])
    assert recorded.close(torch.cat(result.logits), "gen/step_logits")
    eos = recorded.meta["gen_eos_id"]
    ended = base_model(recorded.llm).generate(
        prompt, gated_values=values, max_new_tokens=count, eos_token_id=eos, **options
    )
    tokens = ended[0, prompt.shape[1] :]
    assert tokens[-1] == eos and torch.equal(tokens[:-1], recorded.outputs["gen_eos/tokens"])


@torch.no_grad()
def test_generation_from_a_mixture(recorded):
    features = [recorded.inputs["gen/features"], recorded.inputs["visual/features_audio"][:1]]
    values = recorded.injection.gated_values(recorded.bind(mix(features, [0.7, 0.4])), recorded.llm)
    prompt = recorded.inputs["gen/prompt"][None]
    tokens = base_model(recorded.llm).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        gated_values=values,
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )
    assert torch.equal(tokens[0, prompt.shape[1] :], recorded.outputs["gen_multi/tokens"])


@torch.no_grad()
def test_ragged_batch(recorded):
    prompts = [recorded.inputs[f"gen_batch/prompt_{i}"] for i in range(2)]
    length = max(map(len, prompts))
    ids = torch.stack([F.pad(p, (length - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])
    tokens = base_model(recorded.llm).generate(
        ids,
        attention_mask=mask,
        gated_values=recorded.values(recorded.inputs["gen_batch/features"]),
        max_new_tokens=8,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )
    for i in range(2):
        assert torch.equal(tokens[i, length:], recorded.outputs[f"gen_batch/tokens_{i}"])
    steps = recorded.outputs[
        "gen_batch/step_logits"
    ]  # from the end of the shorter prompt on; the longer is forced
    first = min(map(len, prompts))
    rows = torch.stack(
        [torch.cat([p, steps[len(p) - first :, i].argmax(-1)]) for i, p in enumerate(prompts)]
    )
    logits = recorded.llm(
        rows, gated_values=recorded.values(recorded.inputs["gen_batch/features"])
    ).logits
    assert recorded.close(logits[:, first - 1 : -1].transpose(0, 1), "gen_batch/step_logits")


@pytest.mark.parametrize("case", ["default", "hot", "p1"])
def test_top_p_keeps_the_same_tokens(recorded, case):
    settings = recorded.meta[f"top_p/{case}"]
    scores = recorded.outputs["gen/step_logits"][:4] / settings["temperature"]
    kept = TopPLogitsWarper(settings["top_p"])(None, scores) if settings["top_p"] < 1 else scores
    ordered = torch.softmax(kept, -1).sort(descending=True).values
    assert recorded.close(ordered, f"top_p/{case}/sorted_filtered")


def test_every_recorded_output_is_checked(recorded):
    checked = {
        "train/logits",
        "train/loss",
        "plain_no_adapter/last_logits",
        "gen/tokens",
        "gen/step_logits",
        "gen_eos/tokens",
        "gen_multi/tokens",
        "gen_batch/tokens_0",
        "gen_batch/tokens_1",
        "gen_batch/step_logits",
    }
    checked |= {
        f"visual/{part}"
        for part in (
            "mixed",
            "bind_out",
            "multi_mixed",
            "multi_bind_out",
            "video_only_weight_0.3_bind_out",
        )
    }
    checked |= {f"top_p/{case}/sorted_filtered" for case in ("default", "hot", "p1")}
    checked |= {"train/loss_when_no_labels"}  # in test_golden_training
    assert checked == {key for key in recorded.outputs if not key.startswith("train/grad/")}


def test_what_the_file_shows(recorded):
    dims, meta = recorded.meta["dims"], recorded.meta
    assert recorded.injection.gates.shape == (dims["query_layer"], dims["n_heads"])
    assert (recorded.bind.blocks[0].gate.bias is not None) == meta["legacy_bridge"]
    assert hasattr(recorded.llm, "peft_config") == (meta["phase"] == "finetune")
    if meta["phase"] == "finetune":
        lora = recorded.llm.peft_config["default"]
        assert lora.r == lora.lora_alpha == dims["rank"]


def test_adapter_there_and_back(recorded, tmp_path):
    again = adapter_weights(recorded.llm, recorded.bind, recorded.injection)
    assert again.keys() == recorded.weights.keys() == set(recorded.meta["adapter_keys"])
    first = recorded.llm.config.num_hidden_layers - len(recorded.injection.gates)
    unused = {f"llama.layers.{i}.attention.gate" for i in range(first)}
    assert all(
        torch.equal(w, recorded.weights[name]) for name, w in again.items() if name not in unused
    )
    assert all(
        again[name].shape == recorded.weights[name].shape and not again[name].any()
        for name in unused
    )


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(w, b[name]) and w.dtype == b[name].dtype for name, w in a.items()
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_export_load_is_exact(recorded, suffix, dtype, tmp_path):
    first = load_adapter(recorded.file, recorded.base, dtype)
    write_weights(adapter_weights(*first), tmp_path / f"x{suffix}")
    second = load_adapter(tmp_path / f"x{suffix}", recorded.base, dtype)
    assert all(equal_state(a, b) for a, b in zip(first, second))


@torch.no_grad()
def test_base_in_every_form(recorded, tmp_path):
    load_llama(recorded.base).save_pretrained(tmp_path)
    ids, feature = recorded.inputs["train/tokens"], mix([recorded.inputs["train/features"]], [1.0])
    for llama in (tmp_path, str(tmp_path), load_llama(recorded.base)):
        llm, bind, injection = load_adapter(recorded.file, llama)
        logits = enable_injection(llm)(
            ids, gated_values=injection.gated_values(bind(feature), llm)
        ).logits
        assert recorded.close(logits, "train/logits")


def test_file_straight_from_training(recorded, tmp_path):
    extra = {
        "image_bind.trunk.weight": torch.ones(2),
        "llama.layers.0.attention.wq.weight": torch.ones(2),
    }
    weights = {
        name.replace("llama.", "llma.", 1): w.half() if "gate" in name else w
        for name, w in (recorded.weights | extra).items()
    }
    content = {
        "model": weights,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, tmp_path / "x.pth")
    llm, bind, injection = load_adapter(tmp_path / "x.pth", recorded.base)
    assert injection.gates.dtype == torch.float32
    assert torch.allclose(injection.gates, recorded.injection.gates, atol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(bind.parameters(), recorded.bind.parameters()))


def refuse(weights, base, message):
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(weights, base)
    assert "\n" not in str(error.value)


def test_report_of_what_does_not_fit(recorded):
    def without(pattern):
        return {n: w for n, w in recorded.weights.items() if not re.search(pattern, n)}

    count, layers, base = len(recorded.weights), recorded.meta["dims"]["n_layers"], recorded.base
    refuse(
        without("f1_2.weight"),
        base,
        rf"^adapter: wants {count} tensors; 1 missing \(image_bind_f1_2.weight\)$",
    )
    refuse(
        without("ffn_norm"),
        base,
        rf"{layers} missing \({layers} of llama.layers.\*.ffn_norm.weight\)$",
    )
    extra = recorded.weights | {"llama.extra_norm": torch.ones(1)}
    refuse(extra, base, rf"^adapter: wants {count} tensors; 1 unexpected \(llama.extra_norm\)$")
    refuse(
        recorded.weights | {"llama.norm.weight": torch.ones(3)},
        base,
        r"1 of another shape \(llama.norm.weight \[3\] for \[\d+\]\)$",
    )
    refuse(
        without("f1_2.weight") | {"llama.extra_norm": torch.ones(1)},
        base,
        "1 missing .*; 1 unexpected ",
    )
    for pattern in ("gate", "prefix_query", "image_bind_proj.weight"):
        refuse(without(pattern), base, "^adapter: got no gates, queries or bind network")


# --- the right base ---------------------------------------------------------------------------------------------------


def test_base_of_another_size():
    refuse(
        GOLDEN / f"{ADAPTERS[0]}/adapter.safetensors",
        GOLDEN / "llama_base_tiny_b",
        "^llama: got width 32, 6 layers and 2 heads, wants 64, 4 and 4, as the adapter was made for$",
    )


def test_base_of_another_family_or_already_adapted(recorded):
    mistral = MistralForCausalLM(
        MistralConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    refuse(
        recorded.file,
        mistral,
        "^llama: got MistralForCausalLM, wants a LlamaForCausalLM without PEFT",
    )
    if hasattr(recorded.llm, "peft_config"):
        refuse(recorded.file, recorded.llm, "^llama: got PeftModel")


def test_vocabulary_of_the_released_adapters():
    with init_empty_weights(include_buffers=True):
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32001))
        weights = adapter_weights(llm, BindNetwork(1024, 4096), GatedInjection(4096, 32, 32))
    refuse(
        weights, llm, "^llama: got a vocabulary of 32001, wants 32000, as the adapter was made for$"
    )


def test_first_stage_adapter_refuses_another_base():
    llm = load_llama(GOLDEN / "llama_base_tiny")
    llm.model.layers[0].input_layernorm.weight.data.add_(0.1)
    refuse(
        GOLDEN / f"{ADAPTERS[3]}/adapter.safetensors",
        llm,
        "^llama: its model.layers.0.input_layernorm.weight is not the adapter's",
    )


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
    refuse(path, other, "^llm: got another language model than the adapter was trained with")


def test_saved_model_refuses_another_base(tmp_path):
    recorded = Recorded(ADAPTERS[1])
    whole(recorded).save_pretrained(tmp_path)
    load(tmp_path)
    other = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    other.model.embed_tokens.weight.data.normal_()
    other.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="^llm: got another language model"):
        load(tmp_path)


# --- LLaMA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_base_tiny", "llama_base_tiny_b"])
def test_llama_there_and_back(name, tmp_path):
    llm, weights = (
        load_llama(GOLDEN / name),
        load_file(GOLDEN / name / "consolidated.00.safetensors"),
    )
    again = llama_weights(llm)
    assert again.keys() == weights.keys() - {"rope.freqs"} and all(
        torch.equal(w, weights[n]) for n, w in again.items()
    )
    assert (
        llm.config.rms_norm_eps
        == json.loads((GOLDEN / name / "params.json").read_text())["norm_eps"]
    )
    llm.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(load_llama(tmp_path)(ids).logits, llm(ids).logits)


def test_llama_dtype_and_context():
    llm = load_llama(GOLDEN / "llama_base_tiny", dtype=torch.bfloat16, context=64)
    assert llm.dtype == torch.bfloat16 and llm.config.max_position_embeddings == 64


def test_grouped_heads_there_and_back(tmp_path):
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
        )
    ).eval()
    write_weights(llama_weights(llm), tmp_path / "consolidated.00.safetensors")
    params = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=30)
    (tmp_path / "params.json").write_text(json.dumps(params))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load_llama(tmp_path)(ids).logits, llm(ids).logits)


def copy_base(folder):
    shutil.copytree(GOLDEN / "llama_base_tiny", folder, dirs_exist_ok=True)
    return load_file(folder / "consolidated.00.safetensors")


def test_llama_refuses(tmp_path):
    weights = copy_base(tmp_path)
    save_file(
        {n: w for n, w in weights.items() if n != "norm.weight"},
        tmp_path / "consolidated.00.safetensors",
    )
    with pytest.raises(ValueError, match=r"^llama: wants 39 tensors; 1 missing \(norm.weight\)$"):
        load_llama(tmp_path)
    save_file(
        weights | {"layers.9.attention.wq.weight": torch.ones(64, 64)},
        tmp_path / "consolidated.00.safetensors",
    )
    with pytest.raises(ValueError, match=r"1 unexpected \(layers.9.attention.wq.weight\)$"):
        load_llama(tmp_path)
    save_file(weights, tmp_path / "consolidated.01.safetensors")
    with pytest.raises(ValueError, match="^source: got 2 consolidated files"):
        load_llama(tmp_path)
    (tmp_path / "consolidated.01.safetensors").unlink()
    (tmp_path / "params.json").write_text('{"dim": 64, "experts": 8}')
    with pytest.raises(ValueError, match=r"^params.json: got unknown keys \['experts'\]$"):
        load_llama(tmp_path)
    for content in ("[", "[]", '{"dim": "x"}'):
        (tmp_path / "params.json").write_text(content)
        with pytest.raises(ValueError, match="^params.json: .* is not JSON with whole numbers"):
            load_llama(tmp_path)
    (tmp_path / "params.json").write_text(
        '{"dim": 64, "n_layers": 999999999, "n_heads": 4, "norm_eps": 1e-6}'
    )
    with pytest.raises(
        ValueError, match="^params.json: got n_layers 999999999, the weights have 5"
    ):
        load_llama(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 64}')
    with pytest.raises(ValueError, match=r"^params.json: wants the keys \['n_heads', "):
        load_llama(tmp_path)
    shutil.copy(GOLDEN / "llama_base_tiny/params.json", tmp_path)
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "consolidated.00.safetensors")
    with pytest.raises(ValueError, match="^llama: wants tensors under Meta's names; 2 missing"):
        load_llama(tmp_path)


@pytest.mark.parametrize("place", ["7B", "."])
def test_tokenizer_of_a_meta_folder(place, tmp_path):
    copy_base(tmp_path / "7B")
    with pytest.raises(FileNotFoundError, match="^llama: no tokenizer.model in .*7B' or above"):
        load_tokenizer(tmp_path / "7B")
    shutil.copy(GOLDEN / "dataset_tiny/tokenizer.model", tmp_path / place)
    words = load_tokenizer(str(tmp_path / "7B"))
    ids = words("the  dog's\nsleep ☂")["input_ids"]
    assert (words.bos_token_id, words.eos_token_id, ids[0]) == (1, 2, 1)
    assert words.decode(ids, skip_special_tokens=True) == "the  dog's\nsleep ☂"


@pytest.mark.parametrize("shape", [(12,), (12, 5), (24, 3)])
def test_rotary_rows_are_a_permutation(shape):
    x = torch.randn(shape)
    assert torch.equal(rotary_rows(rotary_rows(x, 3), 3, back=True), x) and not torch.equal(
        rotary_rows(x, 3), x
    )


# --- the encoder ------------------------------------------------------------------------------------------------------


def encoder_config():
    meta = json.loads((GOLDEN / "imagebind_tiny/meta.json").read_text())
    a, trunk = meta["constructor_arguments"], meta["point_trunk_config"]
    towers = {
        n: dict(width=a[f"{n}_embed_dim"], blocks=a[f"{n}_num_blocks"], heads=a[f"{n}_num_heads"])
        for n in ("vision", "text", "audio", "depth", "thermal", "imu")
    }
    for name in ("vision", "depth", "thermal"):
        towers[name]["size"] = (112, 112)
    towers["text"]["vocabulary"] = meta["changed_constants"]["text_vocab (official 49408)"]
    towers["point"] = dict(
        width=trunk["trans_dim"],
        blocks=trunk["depth"],
        heads=trunk["num_heads"],
        groups=trunk["num_group"],
        group_size=trunk["group_size"],
        group_widths=(128, 256, 512, trunk["encoder_dims"]),
    )
    return ImageBindConfig.from_dict(dict(feature_dim=a["out_embed_dim"], **towers))


WEIGHTS = GOLDEN / "imagebind_tiny/weights.safetensors"


@torch.no_grad()
def test_encoder_there_and_back():
    encoder, weights = load_imagebind(WEIGHTS, encoder_config()), load_file(WEIGHTS)
    again = imagebind_weights(encoder)
    assert again.keys() == weights.keys() and all(
        torch.equal(w, again[name]) for name, w in weights.items()
    )
    assert equal_state(encoder, load_imagebind(again, encoder_config()))
    images = load_file(GOLDEN / "imagebind_tiny/inputs.safetensors")["vision_image"].float()
    expected = load_file(GOLDEN / "imagebind_tiny/outputs.safetensors")["vision_image/normalized"]
    assert torch.allclose(encoder.released("image", images), expected, atol=2e-5)


def hints():
    "Only what the tensors do not show."
    whole = encoder_config()
    towers = {
        name: dict(heads=getattr(whole, name).heads)
        for name in ("vision", "text", "audio", "depth", "thermal", "imu", "point")
    }
    towers["point"] |= dict(groups=whole.point.groups, group_size=whole.point.group_size)
    return ImageBindConfig.from_dict(towers)


def test_sizes_are_read_off_the_tensors():
    encoder = load_imagebind(WEIGHTS, hints())
    assert encoder.config == encoder_config()
    assert equal_state(encoder, load_imagebind(WEIGHTS, encoder_config()))


@pytest.mark.parametrize(
    "tower, sizes",
    [
        ("vision", dict(size=(56, 56), blocks=1, mlp_ratio=2)),
        ("vision", dict(kernel=7, stride=7, kernel_frames=1)),
        ("audio", dict(channels=2)),
        ("imu", dict(samples=160, channels=3)),
        ("depth", dict(width=32, blocks=3)),
        ("text", dict(vocabulary=77, context=9)),
        ("point", dict(group_widths=(4, 8, 12, 16), projection_width=20)),
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


def test_encoder_without_the_point_trunk():
    config = encoder_config()
    config.point = None
    weights = load_file(WEIGHTS)
    with pytest.raises(ValueError, match=r"^imagebind: wants \d+ tensors; \d+ unexpected \("):
        load_imagebind(weights, config)
    rest = {
        n: w for n, w in weights.items() if not n.startswith("point_trunk") and ".point." not in n
    }
    assert "point" not in load_imagebind(rest, config).towers
    with pytest.raises(ValueError, match=r"missing \(modality_heads.point.0.bias, "):
        load_imagebind(rest, encoder_config())


def test_report_in_the_files_own_names():
    weights = load_file(WEIGHTS)
    for name in (
        "modality_trunks.audio.blocks.0.norm_1.weight",
        "modality_trunks.audio.blocks.1.norm_1.weight",
    ):
        del weights[name]
    weights["modality_heads.imu.0.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError,
        match=(
            r"^imagebind: wants \d+ tensors; 2 missing \(2 of modality_trunks.audio.blocks.\*.norm_1.weight\); "
            r"1 of another shape \(modality_heads.imu.0.bias \[3\] for \[16\]\)$"
        ),
    ):
        load_imagebind(weights, encoder_config())


def test_another_model_needs_its_heads():
    for weights in (WEIGHTS, load_file(WEIGHTS)):
        with pytest.raises(
            ValueError,
            match="^config: this is not ImageBind-Huge .vision is 32 wide for 1280., and",
        ):
            load_imagebind(weights)


@pytest.mark.parametrize("point", [True, False])
def test_full_size_encoder_needs_no_config(point):
    config = ImageBindConfig() if point else ImageBindConfig(point=None)
    with torch.device("meta"):
        weights = imagebind_weights(ImageBind(config))
    assert load_imagebind(weights).config == config
    del weights["modality_trunks.text.blocks.3.mlp.fc1.bias"]
    with pytest.raises(
        ValueError, match=r"1 missing \(modality_trunks.text.blocks.3.mlp.fc1.bias\)$"
    ):
        load_imagebind(weights)


def test_every_name_has_one_translation():
    with torch.device("meta"):
        names = ImageBind(ImageBindConfig()).state_dict().keys()
    back = translate(names, IMAGEBIND, back=True)
    assert back.keys() == names and len(set(back.values())) == len(names)
    assert (
        len(translate(back.values(), IMAGEBIND)) == len(names)
        and translate(["image_bind_f1_4.weight"], BIND) == {}
    )


LOADING = """
import re, sys, torch
from ibllm.checkpoints import load_imagebind
from ibllm.encoders import ImageBindConfig, VisionConfig
def megabytes(): return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = megabytes()
rest = dict.fromkeys(("text", "audio", "point", "depth", "thermal", "imu"))
encoder = load_imagebind(sys.argv[1], ImageBindConfig(vision=VisionConfig(), **rest))
loaded = megabytes()
for weights in encoder.parameters(): weights.amax()  # reads every number, makes no copy (a sum in float64 would)
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
    kept = {
        name: torch.ones(w.shape)
        for name, w in weights.items()
        if int((re.findall(r"blocks\.(\d+)\.", name) or "0")[0]) < 4
    }
    path = tmp_path / f"x{suffix}"  # four of 32 blocks, 320 MB
    write_weights(kept, path)
    size = path.stat().st_size / 2**20
    done = subprocess.run(
        [sys.executable, "-c", LOADING, path], check=True, capture_output=True, text=True
    )
    before, loaded, used = map(float, done.stdout.split())
    assert size > 300 and loaded - before < 0.25 * size  # mapped, not read
    assert 0.9 * size < used - before < 1.1 * size  # read when used, once


# --- the whole system -------------------------------------------------------------------------------------------------


def whole(recorded):
    "The system around a recorded adapter, with a random encoder of its width."
    from test_model import tokenizer

    small = dict(width=8, blocks=1, heads=2)
    rest = dict.fromkeys(("text", "audio", "point", "depth", "thermal"))
    width = recorded.bind.project.in_features
    encoder = ImageBind(
        ImageBindConfig.from_dict(
            dict(
                feature_dim=width,
                vision=dict(small, size=(28, 28)),
                imu=dict(small, samples=16),
                **rest,
            )
        )
    )
    return load_official(
        imagebind_weights(encoder),
        recorded.file,
        recorded.base,
        tokenizer=tokenizer(),
        config=encoder.config,
    )


def test_whole_system_loads_answers_and_saves(tmp_path, monkeypatch):
    from test_model import tokenizer

    recorded = Recorded(ADAPTERS[1])  # its features have the width of the small encoder
    index = GOLDEN / "cache_tiny/knn.index"
    model = load_official(
        WEIGHTS, recorded.file, recorded.base, index, tokenizer(), config=encoder_config()
    )
    assert (
        model.llm.generation_config.temperature == 0.1 and model.llm.generation_config.top_p == 0.75
    )
    assert len(model.cache) == 512 and not any(p.is_meta for p in model.parameters())
    feature, ids = recorded.inputs["train/features"], recorded.inputs["train/tokens"]
    with torch.no_grad():
        logits = model(ids, mix([feature], [1.0])).logits
    assert recorded.close(logits, "train/logits")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, mix([feature], [1.0])).logits, logits)
    prompt = recorded.inputs["gen/prompt"][None]
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    monkeypatch.setattr(type(again), "tokenize", lambda *_: batch)
    request = again._request(mix([recorded.inputs["gen/features"]], [1.0]), "x", {})
    request |= dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
    with torch.no_grad():
        tokens = base_model(again.llm).generate(**request)
    assert torch.equal(tokens[0, prompt.shape[1] :], recorded.outputs["gen/tokens"][:6])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_whole_system_exported_and_loaded_is_the_same(recorded, suffix, tmp_path):
    from test_model import tokenizer

    model = whole(recorded)
    paths = export_official(model, tmp_path / "new" / "folder", suffix)
    assert [path.name for path in paths.values()] == [f"imagebind_huge{suffix}", f"adapter{suffix}"]
    again = load_official(
        **paths, llama=recorded.base, tokenizer=tokenizer(), config=model.encoder.config
    )
    assert equal_state(model, again) and again.config == model.config
    assert set(read_weights(paths["adapter"])) == set(recorded.meta["adapter_keys"])


def test_exported_files_have_the_released_form(tmp_path):
    paths = export_official(whole(Recorded(ADAPTERS[0])), tmp_path)
    adapter, encoder = (
        torch.load(paths[part], weights_only=True) for part in ("adapter", "imagebind")
    )
    assert set(adapter) == {"model", "fingerprint"} and "modality_heads.vision.0.bias" in encoder


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
    assert set(first) == set(recorded.weights) and set(second) == set(Recorded(ADAPTERS[0]).weights)
    ids, feature = recorded.inputs["train/tokens"], mix([recorded.inputs["train/features"]], [1.0])

    def logits(llm, bind, injection):
        return enable_injection(llm)(
            ids, gated_values=injection.gated_values(bind(feature), llm)
        ).logits

    with torch.no_grad():
        trained = logits(stage_two.llm, recorded.bind, recorded.injection)
        assert torch.allclose(logits(*load_adapter(second, base)), trained, atol=1e-5)
    deep = BindNetwork(32, 64, num_blocks=4)
    with pytest.raises(ValueError, match="^bind: got 4 blocks"):
        adapter_weights(llm, deep, recorded.injection)


def test_parts_that_disagree():
    from test_model import tokenizer

    recorded, config = Recorded(ADAPTERS[0]), encoder_config()
    with pytest.raises(
        ValueError, match="^imagebind: got features of width 16, wants 32, the adapter's"
    ):
        load_official(WEIGHTS, recorded.file, recorded.base, tokenizer=tokenizer(), config=config)
    recorded = Recorded(ADAPTERS[1])
    with pytest.raises(
        ValueError, match="^tokenizer: got 400 tokens, wants LLaMA's; its vocabulary has 96"
    ):
        words = load_tokenizer(GOLDEN / "dataset_tiny")
        load_official(WEIGHTS, recorded.file, recorded.base, tokenizer=words, config=config)
    with pytest.raises(ValueError, match="^tokenizer: got none, wants LLaMA's"):
        load_official(WEIGHTS, recorded.file, load_llama(recorded.base), config=config)
    with pytest.raises(FileNotFoundError, match="^llama: no tokenizer.model in"):
        load_official(WEIGHTS, recorded.file, recorded.base, config=config)


def parameters(module):
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
    assert millions == dict(
        vision=632.8, text=354.0, audio=86.2, point=22.8, depth=21.9, thermal=86.2, imu=19.6
    )
    assert (parameters(bind), parameters(legacy)) == (608_190_464, 608_313_344)
    assert (len(first), len(second)) == (112, 720)
    lora = sum(w.numel() for name, w in second.items() if "lora" in name)
    assert round(lora / 1e6, 1) == 40.0
    assert second["llama.layers.31.feed_forward.lora_w2_l1.weight"].shape == (16, 11008)
    with init_empty_weights():
        whole = ImageBindLLM(ModelConfig(), llm, words())
    assert parameters(whole.bind) == 608_190_464 and parameters(whole.injection) == 32 * (4096 + 32)


def words():
    from test_model import tokenizer

    return tokenizer()


# --- downloads --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A Hub that notes what is asked for, and has files of the right sizes (times `scale`) that take no room."
    hub, sizes = (
        SimpleNamespace(asked=[], scale=1.0),
        {f.file: f.gigabytes * 1e9 for f in PUBLISHED.values()},
    )

    def download(repository, file, revision):
        hub.asked.append((repository, file, revision))
        with (tmp_path / file).open("wb") as sparse:
            sparse.truncate(round(hub.scale * sizes[file]))
        return str(tmp_path / file)

    monkeypatch.setattr(official, "hf_hub_download", download)
    return hub


def test_download_says_first_what_it_fetches(hub, capsys, monkeypatch):
    paths = download_official(("imagebind", "knn"), dict(imagebind=COMMIT, knn=COMMIT))
    assert hub.asked == [
        (PUBLISHED[part].repository, PUBLISHED[part].file, COMMIT) for part in ("imagebind", "knn")
    ]
    assert {part: path.name for part, path in paths.items()} == {
        "imagebind": "imagebind_w3D.pth",
        "knn": "knn.index",
    }
    said = capsys.readouterr().out
    for text in (
        "4.89 GB",
        "13.30 GB",
        "18.2 GB go to ",
        "CC BY-NC-SA 4.0",
        "at 012345678",
        "llama: 13.5 GB, not",
    ):
        assert text in said

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(official, "hf_hub_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_official(("adapter",), dict(adapter=COMMIT))
    assert "adapter: 2.60 GB" in capsys.readouterr().out  # said before anything was fetched


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), COMMIT + "0", ""])
def test_nothing_is_downloaded_without_a_commit(hub, revision):
    with pytest.raises(
        ValueError, match="^revisions: got .* for 'knn', wants the commit .40 hexadecimal digits."
    ):
        download_official(("imagebind", "knn"), dict(imagebind=COMMIT, knn=revision))
    with pytest.raises(ValueError, match=r"^parts: got \['llama'\], wants some of"):
        download_official(("llama",))
    assert not hub.asked


def test_recorded_commits_are_whole():
    assert all(re.fullmatch("[0-9a-f]{40}", f.revision or COMMIT) for f in PUBLISHED.values())


def test_file_of_another_size_is_refused(hub):
    hub.scale = 0.9
    with pytest.raises(ValueError, match="^adapter: 7B.pth has 2.34 GB, wants 2.60$"):
        download_official(("adapter",), dict(adapter=COMMIT))


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError,
        match=(
            f"^adapter: no copy here and no way to the Hub; .*`hf download {PUBLISHED['adapter'].repository} 7B.pth "
            f"--revision {COMMIT} "
        ),
    ):
        download_official(("adapter",), dict(adapter=COMMIT))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_there_and_back(suffix, tmp_path):
    weights = {"a": torch.randn(2, 3).half(), "b": torch.arange(4)}
    write_weights(weights, tmp_path / f"w{suffix}")
    again = read_weights(tmp_path / f"w{suffix}")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], w) and again[n].dtype == w.dtype for n, w in weights.items())
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


def test_old_style_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth")["a"], torch.ones(2))


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    "One adapter in both formats, as bytes, and where its damaged copies go."
    folder, weights = (
        tmp_path_factory.mktemp("sound"),
        load_file(GOLDEN / f"{ADAPTERS[1]}/adapter.safetensors"),
    )
    for suffix in (".pth", ".safetensors"):
        write_weights(weights, folder / f"x{suffix}", fingerprint="1 2")
    return {
        suffix: (folder / f"x{suffix}").read_bytes() for suffix in (".pth", ".safetensors")
    }, folder


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
        with pytest.raises(
            ValueError, match=r"^(imagebind: wants|config: this is not|\w+: got \d+)"
        ) as error:
            load_imagebind(weights, hints())
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


class Harmful:
    def __reduce__(self):
        return (Path("harm").write_text, ("done",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_files(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    with pytest.raises(FileNotFoundError, match="^path: no file"):
        read_weights(path)
    for content in (b"", b"not weights", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^path: ") as error:
            read_weights(path)
        assert "\n" not in str(error.value)
    for content in (Harmful(), {"model": Harmful()}, [1, 2], {"model": {"a": 1}}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="^path: "):
            read_weights(tmp_path / "bad.pth")
    assert not Path("harm").exists()
