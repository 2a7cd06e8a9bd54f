"Published layouts, there and back, against numbers recorded from the released code at small sizes."
import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ibllm.checkpoints import (BIND, IMAGEBIND, adapter_weights, imagebind_weights, llama_weights, load_adapter,
                               load_imagebind, load_llama, load_published, read_weights, rotary_rows, translate,
                               write_weights)
from ibllm.encoders import ImageBind, ImageBindConfig
from ibllm.llama import base_model, enable_injection
from ibllm.model import load, mix

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = ["llama_adapter_tiny_finetune", "llama_adapter_tiny_finetune_partial", "llama_adapter_tiny_finetune_legacy",
            "llama_adapter_tiny_pretrain"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls a renamed property of transformers


class Recorded:
    "One recorded adapter: tensors, numbers and the model loaded from them."
    def __init__(self, name):
        folder = GOLDEN / name
        self.meta = json.loads((folder / "meta.json").read_text())
        self.base = GOLDEN / Path(self.meta["base_checkpoint"]).parent
        self.file, self.weights = folder / "adapter.safetensors", load_file(folder / "adapter.safetensors")
        self.inputs, self.outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
        self.tolerance = {key: self.meta["tolerance"][key] for key in ("atol", "rtol")}
        self.llm, self.bind, self.injection = load_adapter(self.file, self.base)
        enable_injection(self.llm)

    def values(self, feature): return self.injection.gated_values(self.bind(mix([feature], [1.0])), self.llm)

    def close(self, ours, name): return torch.allclose(ours, self.outputs[name], **self.tolerance)


@pytest.fixture(scope="module", params=ADAPTERS, ids=lambda name: name.removeprefix("llama_adapter_tiny_"))
def recorded(request): return Recorded(request.param)


# --- the adapter ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_bind_features(recorded):
    features = {name: recorded.inputs[f"visual/features{name}"] for name in ("", "_audio", "_text", "_video")}
    one = mix([features[""]], [1.0])
    bound = recorded.bind(one)
    assert recorded.close(one[:, None], "visual/mixed") and recorded.close(bound[:, None], "visual/bind_out")
    several = mix([features[""], features["_audio"], features["_text"]], [0.7, 0.4, 1.0])
    assert recorded.close(several[:, None], "visual/multi_mixed")
    assert recorded.close(recorded.bind(several)[:, None], "visual/multi_bind_out")
    video = recorded.bind(mix([features["_video"]], [0.3]))
    assert recorded.close(video[:, None], "visual/video_only_weight_0.3_bind_out")


def test_logits_loss_and_gradients(recorded):
    ids, labels = recorded.inputs["train/tokens"], recorded.inputs["train/labels"]
    recorded.llm.requires_grad_(True)
    logits = recorded.llm(ids, gated_values=recorded.values(recorded.inputs["train/features"])).logits
    assert recorded.close(logits, "train/logits")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    assert recorded.close(loss, "train/loss")
    loss.backward()
    norm = recorded.llm.get_decoder().norm.weight.grad
    recorded.llm.requires_grad_(False)
    if "train/grad/llama.norm.weight" in recorded.outputs: assert recorded.close(norm, "train/grad/llama.norm.weight")
    recorded.llm.zero_grad(), recorded.bind.zero_grad(), recorded.injection.zero_grad()


@torch.no_grad()
def test_plain_language_model(recorded):
    logits = recorded.llm(recorded.inputs["gen/prompt"][None]).logits[:, -1]
    assert recorded.close(logits, "plain_no_adapter/last_logits")


@torch.no_grad()
def test_greedy_generation(recorded):
    prompt, values = recorded.inputs["gen/prompt"][None], recorded.values(recorded.inputs["gen/features"])
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
    count = len(recorded.outputs["gen/tokens"])
    result = base_model(recorded.llm).generate(prompt, gated_values=values, max_new_tokens=count, eos_token_id=None,
                                               return_dict_in_generate=True, output_logits=True, **options)
    assert torch.equal(result.sequences[0, prompt.shape[1]:], recorded.outputs["gen/tokens"])
    assert recorded.close(torch.cat(result.logits), "gen/step_logits")
    eos = recorded.meta["gen_eos_id"]
    ended = base_model(recorded.llm).generate(prompt, gated_values=values, max_new_tokens=count, eos_token_id=eos,
                                              **options)
    tokens = ended[0, prompt.shape[1]:]
    assert tokens[-1] == eos and torch.equal(tokens[:-1], recorded.outputs["gen_eos/tokens"])


@torch.no_grad()
def test_generation_from_a_mixture(recorded):
    features = [recorded.inputs["gen/features"], recorded.inputs["visual/features_audio"][:1]]
    values = recorded.injection.gated_values(recorded.bind(mix(features, [0.7, 0.4])), recorded.llm)
    prompt = recorded.inputs["gen/prompt"][None]
    tokens = base_model(recorded.llm).generate(prompt, attention_mask=torch.ones_like(prompt), gated_values=values,
                                               max_new_tokens=6, eos_token_id=None, pad_token_id=0, do_sample=False)
    assert torch.equal(tokens[0, prompt.shape[1]:], recorded.outputs["gen_multi/tokens"])


@torch.no_grad()
def test_ragged_batch(recorded):
    prompts = [recorded.inputs[f"gen_batch/prompt_{i}"] for i in range(2)]
    length = max(map(len, prompts))
    ids = torch.stack([F.pad(p, (length - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])
    tokens = base_model(recorded.llm).generate(
        ids, attention_mask=mask, gated_values=recorded.values(recorded.inputs["gen_batch/features"]), max_new_tokens=8,
        eos_token_id=None, pad_token_id=0, do_sample=False)
    for i in range(2): assert torch.equal(tokens[i, length:], recorded.outputs[f"gen_batch/tokens_{i}"])


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
    assert all(torch.equal(w, recorded.weights[name]) for name, w in again.items() if name not in unused)
    assert all(again[name].shape == recorded.weights[name].shape and not again[name].any() for name in unused)


def test_file_straight_from_training(recorded, tmp_path):
    extra = {"image_bind.trunk.weight": torch.ones(2), "llama.layers.0.attention.wq.weight": torch.ones(2)}
    weights = {name.replace("llama.", "llma.", 1): w.half() if "gate" in name else w
               for name, w in (recorded.weights | extra).items()}
    content = {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "x.pth")
    llm, bind, injection = load_adapter(tmp_path / "x.pth", recorded.base)
    assert injection.gates.dtype == torch.float32
    assert torch.allclose(injection.gates, recorded.injection.gates, atol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(bind.parameters(), recorded.bind.parameters()))


def test_missing_unknown_and_misshapen_adapter_tensors(recorded):
    def refuse(weights, message):
        with pytest.raises(ValueError, match=message) as error: load_adapter(weights, recorded.base)
        assert "\n" not in str(error.value)
    for name in ("llama.norm.weight", "image_bind_f1_2.weight"):
        refuse({n: w for n, w in recorded.weights.items() if n != name}, r"^adapter: 1 tensors missing")
    refuse(recorded.weights | {"llama.extra_norm": torch.ones(1)}, r"^adapter: 1 tensors unknown \(first: extra_norm\)")
    refuse(recorded.weights | {"llama.norm.weight": torch.ones(3)}, r"^adapter: 1 tensors of another shape")
    refuse({n: w for n, w in recorded.weights.items() if "gate" not in n}, "^adapter: got no gates")


def test_adapter_for_another_size():
    with pytest.raises(ValueError, match="^adapter: .*of another shape|^llama: got"):
        load_adapter(GOLDEN / f"{ADAPTERS[0]}/adapter.safetensors", GOLDEN / "llama_base_tiny_b")


def test_first_stage_adapter_refuses_another_base():
    llm = load_llama(GOLDEN / "llama_base_tiny")
    llm.model.layers[0].input_layernorm.weight.data.add_(0.1)
    with pytest.raises(ValueError, match="^llama: its model.layers.0.input_layernorm.weight is not the adapter's"):
        load_adapter(GOLDEN / f"{ADAPTERS[3]}/adapter.safetensors", llm)


# --- LLaMA ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama_base_tiny", "llama_base_tiny_b"])
def test_llama_there_and_back(name, tmp_path):
    llm, weights = load_llama(GOLDEN / name), load_file(GOLDEN / name / "consolidated.00.safetensors")
    again = llama_weights(llm)
    assert again.keys() == weights.keys() - {"rope.freqs"} and all(torch.equal(w, weights[n]) for n, w in again.items())
    assert llm.config.rms_norm_eps == json.loads((GOLDEN / name / "params.json").read_text())["norm_eps"]
    llm.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad(): assert torch.equal(load_llama(tmp_path)(ids).logits, llm(ids).logits)


def test_llama_dtype_and_context():
    llm = load_llama(GOLDEN / "llama_base_tiny", dtype=torch.bfloat16, context=64)
    assert llm.dtype == torch.bfloat16 and llm.config.max_position_embeddings == 64


def test_grouped_heads_there_and_back(tmp_path):
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)).eval()
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
    save_file({n: w for n, w in weights.items() if n != "norm.weight"}, tmp_path / "consolidated.00.safetensors")
    with pytest.raises(ValueError, match=r"^llama: 1 tensors missing \(first: model.norm.weight\)$"):
        load_llama(tmp_path)
    save_file(weights | {"layers.9.attention.wq.weight": torch.ones(64, 64)}, tmp_path / "consolidated.00.safetensors")
    with pytest.raises(ValueError, match="^llama: 1 tensors unknown"): load_llama(tmp_path)
    save_file(weights, tmp_path / "consolidated.01.safetensors")
    with pytest.raises(ValueError, match="^source: got 2 consolidated files"): load_llama(tmp_path)
    (tmp_path / "consolidated.01.safetensors").unlink()
    (tmp_path / "params.json").write_text('{"dim": 64, "experts": 8}')
    with pytest.raises(ValueError, match=r"^params.json: got unknown keys \['experts'\]$"): load_llama(tmp_path)


@pytest.mark.parametrize("shape", [(12,), (12, 5), (24, 3)])
def test_rotary_rows_are_a_permutation(shape):
    x = torch.randn(shape)
    assert torch.equal(rotary_rows(rotary_rows(x, 3), 3, back=True), x) and not torch.equal(rotary_rows(x, 3), x)


# --- the encoder ------------------------------------------------------------------------------------------------------

def encoder_config():
    meta = json.loads((GOLDEN / "imagebind_tiny/meta.json").read_text())
    a, trunk = meta["constructor_arguments"], meta["point_trunk_config"]
    towers = {n: dict(width=a[f"{n}_embed_dim"], blocks=a[f"{n}_num_blocks"], heads=a[f"{n}_num_heads"])
              for n in ("vision", "text", "audio", "depth", "thermal", "imu")}
    for name in ("vision", "depth", "thermal"): towers[name]["size"] = (112, 112)
    towers["text"]["vocabulary"] = meta["changed_constants"]["text_vocab (official 49408)"]
    towers["point"] = dict(width=trunk["trans_dim"], blocks=trunk["depth"], heads=trunk["num_heads"],
                           groups=trunk["num_group"], group_size=trunk["group_size"],
                           group_widths=(128, 256, 512, trunk["encoder_dims"]))
    return ImageBindConfig.from_dict(dict(feature_dim=a["out_embed_dim"], **towers))


@torch.no_grad()
def test_encoder_there_and_back():
    path = GOLDEN / "imagebind_tiny/weights.safetensors"
    encoder, weights = load_imagebind(path, encoder_config()), load_file(path)
    again = imagebind_weights(encoder)
    assert again.keys() == weights.keys() and all(torch.equal(w, weights[name]) for name, w in again.items())
    images = load_file(GOLDEN / "imagebind_tiny/inputs.safetensors")["vision_image"].float()
    expected = load_file(GOLDEN / "imagebind_tiny/outputs.safetensors")["vision_image/normalized"]
    assert torch.allclose(encoder.released("image", images), expected, atol=2e-5)


def test_encoder_without_a_tower():
    config = encoder_config()
    config.point = None
    weights = load_file(GOLDEN / "imagebind_tiny/weights.safetensors")
    with pytest.raises(ValueError, match="^imagebind: .* tensors unknown"): load_imagebind(weights, config)
    rest = {n: w for n, w in weights.items() if not n.startswith("point_trunk") and ".point." not in n}
    assert "point" not in load_imagebind(rest, config).towers
    with pytest.raises(ValueError, match="^imagebind: .* tensors missing .* of another shape"): load_imagebind(rest)


def test_every_name_has_one_translation():
    with torch.device("meta"): names = ImageBind(ImageBindConfig()).state_dict().keys()
    back = translate(names, IMAGEBIND, back=True)
    assert back.keys() == names and len(set(back.values())) == len(names)
    assert len(translate(back.values(), IMAGEBIND)) == len(names) and translate(["image_bind_f1_4.weight"], BIND) == {}


# --- the whole system -------------------------------------------------------------------------------------------------

def test_whole_system_loads_answers_and_saves(tmp_path, monkeypatch):
    from test_model import tokenizer
    words = tokenizer()
    config = encoder_config()
    recorded = Recorded(ADAPTERS[1])  # its features have the width of the small encoder
    weights = GOLDEN / "imagebind_tiny/weights.safetensors"
    model = load_published(weights, recorded.file, recorded.base, words, config=config)
    assert model.llm.generation_config.temperature == 0.1 and model.llm.generation_config.top_p == 0.75
    feature, ids = recorded.inputs["train/features"], recorded.inputs["train/tokens"]
    with torch.no_grad(): assert recorded.close(model(ids, mix([feature], [1.0])).logits, "train/logits")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad(): assert recorded.close(again(ids, mix([feature], [1.0])).logits, "train/logits")
    prompt = recorded.inputs["gen/prompt"][None]
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    monkeypatch.setattr(type(again), "tokenize", lambda *_: batch)
    request = again._request(mix([recorded.inputs["gen/features"]], [1.0]), "x", {})
    request |= dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
    with torch.no_grad(): tokens = base_model(again.llm).generate(**request)
    assert torch.equal(tokens[0, prompt.shape[1]:], recorded.outputs["gen/tokens"][:6])


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


class Harmful:
    def __reduce__(self): return (Path("harm").write_text, ("done",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_files(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    with pytest.raises(FileNotFoundError, match="^path: no file"): read_weights(path)
    for content in (b"", b"not weights", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^path: ") as error: read_weights(path)
        assert "\n" not in str(error.value)
    for content in (Harmful(), {"model": Harmful()}, [1, 2], {"model": {"a": 1}}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="^path: "): read_weights(tmp_path / "bad.pth")
    assert not Path("harm").exists()
