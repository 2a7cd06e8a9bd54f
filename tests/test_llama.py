"The gated injection on LLaMA and on decoders with grouped heads, biases and sliding windows."

import copy
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ibllm.llama import (
    GatedInjection,
    check_base,
    check_values,
    enable_injection,
    merged,
    read_llm,
    value_fingerprint,
)

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama grouped, wide heads": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=3, head_dim=8)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None)
    ),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    llm = DECODERS[name]().eval().requires_grad_(False)
    for p_name, p in llm.named_parameters():
        if p_name.endswith("bias"):
            p.data.normal_()
    return llm


def open_injection(layers=None):
    torch.manual_seed(7)
    injection = GatedInjection(24, 3, 6, layers)
    torch.nn.init.normal_(injection.gates)
    return injection


@pytest.fixture(params=DECODERS, ids=lambda name: name.replace(" ", "_"))
def name(request):
    return request.param


IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(1))
BIND = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)


def logits_by_hand(llm, ids, injection, bind):
    "The whole decoder written out, the injected value included; only weights are taken from `llm`."
    model, config = llm.model, llm.config
    x, skipped = model.embed_tokens(ids), config.num_hidden_layers - len(injection.gates)
    rotary = model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    future = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
    for index, layer in enumerate(model.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        groups = q.shape[1] // k.shape[1]
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        heads = torch.softmax(q @ k.mT * attention.head_dim**-0.5 + future, dim=-1) @ v
        if index >= skipped:
            row = index - skipped
            value = (bind + injection.queries[row]) @ attention.v_proj.weight.T
            value = value.unflatten(-1, (-1, attention.head_dim)).repeat_interleave(groups, 1)
            heads = heads + (injection.gates[row].tanh()[:, None] * value)[:, :, None]
        x = x + attention.o_proj(heads.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return llm.lm_head(model.norm(x))


@torch.no_grad()
def test_plain_and_zero_gates_are_bit_equal(name):
    plain = make(name)
    llm = enable_injection(copy.deepcopy(plain))
    for mask in (None, torch.tensor([[0, 0] + [1] * 5, [1] * 7, [0] + [1] * 6])):
        expected = plain(IDS, attention_mask=mask).logits
        values = GatedInjection(24, 3, 6).gated_values(BIND, llm)
        assert torch.equal(llm(IDS, attention_mask=mask).logits, expected)
        assert torch.equal(llm(IDS, attention_mask=mask, gated_values=values).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 1, 2])
def test_random_gates_equal_the_decoder_by_hand(name, layers):
    llm, injection = enable_injection(make(name)), open_injection(layers)
    logits = llm(IDS, gated_values=injection.gated_values(BIND, llm)).logits
    assert torch.allclose(logits, logits_by_hand(llm, IDS, injection, BIND), atol=2e-4, rtol=1e-4)
    assert (logits - llm(IDS).logits).abs().max() > 0.5


@torch.no_grad()
def test_left_padded_row_equals_batch_of_one(name):
    llm = enable_injection(make(name))
    values = open_injection().gated_values(BIND, llm)
    mask = MASK.clone()
    mask[1, :3] = 0
    options = dict(max_new_tokens=6, min_new_tokens=6)
    together = llm.generate(IDS * mask, attention_mask=mask, gated_values=values, **options)
    for row, start in enumerate((0, 3, 0)):
        one = slice(row, row + 1)
        alone = llm.generate(
            IDS[one, start:], attention_mask=MASK[one, start:], gated_values=values[one], **options
        )
        assert torch.equal(together[row, 7:], alone[0, 7 - start :])


@torch.no_grad()
def test_cached_generation_equals_full_recomputation(name):
    llm = enable_injection(make(name))
    values = open_injection().gated_values(BIND, llm)
    options = dict(attention_mask=MASK, max_new_tokens=8, min_new_tokens=8)
    cached = llm.generate(IDS, gated_values=values, **options)
    anew = llm.generate(IDS, gated_values=values, use_cache=False, **options)
    assert torch.equal(cached, anew)
    assert not torch.equal(cached, llm.generate(IDS, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)], ids=str
)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no_cache"])
def test_one_request_equals_its_row_of_eight(name, dtype, tolerance, cached):
    """Eight prompts of length 2 to 9, padded on the left, read to the end and then six more tokens.

    With and without the cache of keys and values: the same logits as alone, relative to their
    spread."""
    llm, draw = enable_injection(make(name).to(dtype)), torch.Generator().manual_seed(5)
    ids = torch.randint(3, 61, (8, 9), generator=draw)
    more = torch.randint(3, 61, (8, 6), generator=draw)
    mask = (torch.arange(9) >= torch.arange(8)[:, None]).long()
    values = open_injection().gated_values(torch.randn(8, 24, generator=draw), llm)

    def read(row, start):
        inside = dict(gated_values=values[row])
        prompt, seen = ids[row, start:], mask[row, start:]
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        if not cached:
            whole = torch.cat([prompt, more[row]], 1)
            everything = torch.cat([seen, torch.ones_like(more[row])], 1)
            positions = (everything.cumsum(1) - 1).clamp(min=0)
            output = llm(whole, attention_mask=everything, position_ids=positions, **inside)
            return output.logits[:, -7:].float()
        output = llm(prompt, attention_mask=seen, position_ids=positions, use_cache=True, **inside)
        steps = [output.logits[:, -1:]]
        for i in range(6):
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            output = llm(
                more[row, i : i + 1],
                attention_mask=seen,
                position_ids=seen.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
                **inside,
            )
            steps.append(output.logits)
        return torch.cat(steps, 1).float()

    together = read(slice(0, 8), 0)
    alone = torch.cat([read(slice(i, i + 1), i) for i in range(8)])
    assert ((alone - together).abs().max() / together.std()) < tolerance
    without = llm(ids, attention_mask=mask).logits[:, -1].float()
    assert ((together[:, 0] - without).abs().max() / together.std()) > 0.5  # the injection matters


@torch.no_grad()
def test_beams_and_several_answers_follow_their_row(name):
    llm = enable_injection(make(name))
    values = open_injection().gated_values(BIND, llm)
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=3, num_return_sequences=2)
    together = llm.generate(IDS, attention_mask=MASK, gated_values=values, **options)
    for row in range(3):
        alone = llm.generate(
            IDS[row : row + 1],
            attention_mask=MASK[:1],
            gated_values=values[row : row + 1],
            **options,
        )
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    torch.manual_seed(0)
    sampled = llm.generate(
        IDS,
        attention_mask=MASK,
        gated_values=values,
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=2,
    )
    assert sampled.shape == (12, 9)


def lora(llm, **options):
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options
    )
    return get_peft_model(llm, config)


@pytest.mark.parametrize("enable_first", [True, False])
def test_lora_does_not_touch_the_injected_values(name, enable_first):
    bare, injection = make(name), open_injection()
    expected = injection.gated_values(BIND, enable_injection(make(name)))
    llm = lora(enable_injection(bare)) if enable_first else enable_injection(lora(bare))
    assert torch.equal(injection.gated_values(BIND, llm), expected)
    with_lora = llm(IDS, gated_values=expected).logits
    with llm.disable_adapter():
        without_lora = llm(IDS, gated_values=expected).logits
    assert not torch.allclose(with_lora, without_lora, atol=0.1)
    assert torch.allclose(
        without_lora, enable_injection(make(name))(IDS, gated_values=expected).logits, atol=1e-5
    )
    values = expected.detach()
    beams = llm.generate(
        input_ids=IDS, attention_mask=MASK, gated_values=values, max_new_tokens=2, num_beams=2
    )
    assert beams.shape[0] == 3


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # old releases know no other name
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_learns_and_nothing_else(checkpointing):
    llm, injection = lora(enable_injection(make("qwen2"))), open_injection()
    bind = BIND.clone().requires_grad_()

    def gradients():
        llm.zero_grad()
        injection.zero_grad()
        bind.grad = None
        llm(IDS, labels=IDS, gated_values=injection.gated_values(bind, llm)).loss.backward()
        return [bind.grad.clone(), injection.gates.grad.clone(), injection.queries.grad.clone()]

    plain = gradients()
    assert all(g.abs().sum(-1).min() > 0 for g in plain)
    assert all(p.grad is None for n, p in llm.named_parameters() if "lora" not in n)
    if checkpointing:
        llm.train()
        llm.gradient_checkpointing_enable()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients()))


def test_merged_lora_is_refused():
    llm = lora(enable_injection(make("llama")))
    llm.merge_adapter()
    with pytest.raises(ValueError, match="^llm: got LoRA merged into `v_proj`"):
        open_injection().gated_values(BIND, llm)


def adapters(llm):
    return {name: layer for name, layer in llm.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def test_lora_can_be_merged_for_a_while():
    llm, injection = lora(enable_injection(make("qwen2"))), open_injection()
    values = injection.gated_values(BIND, llm)
    expected, before = llm(IDS, gated_values=values).logits, copy.deepcopy(llm.state_dict())
    with pytest.raises(KeyError), merged(llm) as same:
        with merged(llm):
            pass
        assert same is llm and all(
            layer.merged != name.endswith("v_proj") for name, layer in adapters(llm).items()
        )
        assert torch.equal(injection.gated_values(BIND, llm), values)
        assert torch.allclose(llm(IDS, gated_values=values).logits, expected, atol=1e-4)
        raise KeyError("whatever goes wrong inside")
    assert not any(layer.merged for layer in adapters(llm).values())
    assert all(torch.equal(p, before[n]) for n, p in llm.state_dict().items())
    assert torch.equal(llm(IDS, gated_values=values).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tied", "dora", "lora_bias", "two adapters", "disabled"])
def test_whatever_is_merged_speaks_as_before_and_is_put_back(kind):
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=kind == "tied")
    ).eval()
    options = {"dora": dict(use_dora=True), "lora_bias": dict(lora_bias=True)}.get(kind, {})
    targets = ["q_proj", "k_proj", "o_proj"]
    targets += ["embed_tokens", "lm_head"] if kind == "tied" else []
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the weight that two layers share
        llm = get_peft_model(llm, config)
    if kind == "two adapters":
        llm.add_adapter("second", config)
        llm.base_model.set_adapter(["default", "second"])
    if kind == "disabled":
        llm.base_model.disable_adapter_layers()
    expected, before = llm(IDS).logits, copy.deepcopy(llm.state_dict())
    with merged(llm):
        assert torch.allclose(llm(IDS).logits, expected, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in llm.state_dict().items())
    assert torch.equal(llm(IDS).logits, expected)


@torch.no_grad()
def test_offloaded_weights_are_read_and_not_merged():
    llm, injection = lora(enable_injection(make("qwen2"))), open_injection()
    values = injection.gated_values(BIND, llm)
    expected = llm(IDS, gated_values=values).logits
    cpu_offload(llm.get_base_model(), execution_device=torch.device("cpu"))
    value = adapters(llm)["base_model.model.model.layers.0.self_attn.v_proj"]
    assert value.get_base_layer().bias.is_meta
    assert torch.allclose(injection.gated_values(BIND, llm), values, atol=1e-6)
    with merged(llm):
        assert torch.allclose(llm(IDS, gated_values=values).logits, expected, atol=1e-5)


@torch.no_grad()
def test_threads_do_not_see_each_other():
    llm = enable_injection(make("llama"))
    values = open_injection().gated_values(BIND, llm)
    results = {}

    @torch.no_grad()
    def logits(i):
        return llm(IDS[i : i + 1], gated_values=values[i : i + 1]).logits

    def work(i):
        for _ in range(20):
            results[i] = logits(i)

    expected = [logits(i) for i in range(3)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(3))


@torch.no_grad()
def test_saved_model_is_an_ordinary_one(tmp_path):
    llm = enable_injection(make("qwen2"))
    llm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is Qwen2ForCausalLM and again.config._attn_implementation == "sdpa"
    assert isinstance(llm, Qwen2ForCausalLM) and llm.config.architectures == ["Qwen2ForCausalLM"]
    assert torch.equal(again(IDS).logits, llm(IDS).logits)


@torch.no_grad()
def test_copies_and_repeated_enabling_are_independent():
    llm = enable_injection(enable_injection(make("llama")))
    twin = copy.deepcopy(llm)
    values = open_injection().gated_values(BIND, llm)
    expected = llm(IDS, gated_values=values).logits
    twin.lm_head.weight.zero_()
    assert torch.equal(llm(IDS, gated_values=values).logits, expected)
    assert not twin(IDS, gated_values=values).logits.any()
    answers = twin.generate(IDS, attention_mask=MASK, gated_values=values, max_new_tokens=1)
    assert answers.shape == (3, 8)


@torch.no_grad()
def test_bfloat16_model_with_float32_adapter():
    llm, injection = enable_injection(make("llama").bfloat16()), open_injection()
    values = injection.gated_values(BIND, llm)
    assert values.dtype == torch.float32
    assert llm(IDS, gated_values=values).logits.dtype == torch.bfloat16
    exact = injection.gated_values(BIND, enable_injection(make("llama")))
    assert torch.allclose(values, exact, atol=0.05, rtol=0.05)


def test_misspelt_arguments_are_still_refused():
    with pytest.raises(ValueError, match="gated_vales"):
        enable_injection(make("llama")).generate(IDS, gated_vales=BIND)


@pytest.mark.parametrize("shape", [(1, 3, 6, 4), (3, 3, 5, 4), (3, 3, 6, 8), (3, 6, 4)])
def test_wrong_shapes_are_refused(shape):
    llm, wanted = enable_injection(make("llama")), r"\(3, layers, 6, 4\)"
    with pytest.raises(ValueError, match=f"^gated_values: got shape .*, wants {wanted}$"):
        llm(IDS, gated_values=torch.ones(shape))


def test_more_rows_than_layers_are_refused():
    with pytest.raises(ValueError, match="^gated_values: got 4 layers, wants at most 3"):
        enable_injection(make("llama"))(IDS, gated_values=torch.ones(3, 4, 6, 4))


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_wrong_number_of_layers_is_refused(layers):
    with pytest.raises(ValueError, match=f"^layers: got {layers}, wants 1 to 3"):
        GatedInjection(24, 3, 6, layers)


# --- whatever would ignore the values ---


def not_enabled():
    return make("llama")


def wrapped():
    return lora(make("qwen2"))


def set_back():
    llm = enable_injection(make("mistral"))
    llm.set_attn_implementation("sdpa")
    return llm


@pytest.mark.parametrize("build", [not_enabled, wrapped, set_back])
def test_a_decoder_that_would_ignore_the_values_is_refused(build):
    llm, injection = build(), open_injection()
    refusal = "^llm: got .*ForCausalLM without injection, wants one that `enable_injection` has"
    with pytest.raises(ValueError, match=refusal):
        injection.gated_values(BIND, llm)
    values = injection.gated_values(BIND, enable_injection(llm))
    assert not torch.equal(llm(IDS, gated_values=values).logits, llm(IDS).logits)


@pytest.mark.parametrize("other", [torch.nn.Linear(1, 1), LlamaConfig(**SIZES), None])
def test_what_is_no_decoder_is_refused(other):
    with pytest.raises(ValueError, match="^llm: got .* without injection"):
        open_injection().gated_values(BIND, other)
    with pytest.raises(ValueError, match="^llm: got .*, wants a decoder whose layers have"):
        enable_injection(other)


def test_a_decoder_whose_attention_cannot_be_exchanged_is_refused():
    sizes = dict(d_model=8, ffn_dim=8, num_layers=1, attention_heads=2, vocab_size=9)
    llm = XGLMForCausalLM(XGLMConfig(**sizes))
    with pytest.raises(ValueError, match="^llm: got XGLM.*whose attention function can be exch"):
        enable_injection(llm)
    assert type(llm) is XGLMForCausalLM


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_is_enabled(name, dtype, tmp_path):
    llm = make(name).to(dtype)
    llm.save_pretrained(tmp_path)
    asked = dict(attention_mask=MASK, max_new_tokens=1)
    again, values = read_llm(tmp_path, "folder: 'x'", dtype=dtype), torch.ones(3, 3, 6, 1)
    assert again.dtype == dtype and isinstance(again, type(llm))
    values = values.expand(-1, -1, -1, again.model.layers[0].self_attn.head_dim)
    expected = enable_injection(llm)(IDS, gated_values=values).logits
    logits = again(IDS, gated_values=values).logits
    assert torch.allclose(logits, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
    assert again.generate(IDS, gated_values=values, **asked).shape == (3, 8)


def test_what_cannot_be_read_is_refused(tmp_path):
    LlamaConfig(**SIZES | {"num_hidden_layers": 10**6}).save_pretrained(tmp_path / "deep")
    sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "fused")
    (tmp_path / "empty").mkdir()
    for folder, reason in {
        "deep": "num_hidden_layers: got 1000000, wants at most 1000",
        "fused": "got GPT2LMHeadModel, wants a decoder",
        "empty": "",
    }.items():
        with pytest.raises(ValueError, match="^folder: got 'x', which cannot be loaded") as error:
            read_llm(tmp_path / folder, "folder: 'x'")
        assert reason in str(error.value) and "\n" not in str(error.value)


# --- LoRA that was merged for good ---

CHANGED = "^llm: got value matrices other than the injection was made for"


@pytest.mark.parametrize("wrapped_before", [True, False])
def test_lora_merged_for_good_is_found(name, wrapped_before):
    llm = make(name)
    if wrapped_before:
        llm = lora(llm)
        recorded = value_fingerprint(llm)
    else:
        recorded = value_fingerprint(llm)
        llm = lora(llm)
    assert check_values(llm, recorded)
    with merged(llm):
        assert check_values(llm, recorded)
    llm.merge_adapter()
    with pytest.raises(ValueError, match="^llm: got LoRA merged into `v_proj`"):
        check_values(llm, recorded)
    llm.unmerge_adapter()
    assert check_values(llm, recorded)
    base = llm.merge_and_unload()
    for model in (llm, base, copy.deepcopy(base).bfloat16()):
        with pytest.raises(ValueError, match=CHANGED):
            check_values(model, recorded)


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_a_little_lora_is_found_too(size):
    llm = lora(make("llama"))
    recorded = value_fingerprint(llm)
    for layer in adapters(llm).values():
        layer.lora_B["default"].weight.data *= size
    llm.merge_and_unload()
    with pytest.raises(ValueError, match=CHANGED):
        check_values(llm, recorded)


def test_lora_elsewhere_may_be_merged_for_good():
    llm = make("llama")
    recorded = value_fingerprint(llm)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    llm = get_peft_model(llm, config).merge_and_unload()
    assert check_values(llm, recorded)


def test_lora_may_be_taken_off_unmerged():
    llm = lora(make("llama"))
    recorded = value_fingerprint(llm)
    assert check_values(llm.unload(), recorded)


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.float16] * 2])
def test_rounding_is_no_change(name, dtypes):
    llm = make(name)
    recorded = value_fingerprint(llm)
    for dtype in (*dtypes, torch.bfloat16, torch.float32):
        assert check_values(llm.to(dtype), recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_unmerging_rounds_off_is_no_change(name, dtype):
    llm = lora(make(name).to(dtype))
    recorded = value_fingerprint(llm)
    for _ in range(3):
        llm.merge_adapter()
        llm.unmerge_adapter()
        assert check_values(llm, recorded)


def test_values_that_are_not_in_memory_cannot_be_compared():
    llm = make("llama")
    recorded = value_fingerprint(llm)
    assert value_fingerprint(copy.deepcopy(llm).to("meta")) is None
    assert not check_values(copy.deepcopy(llm).to("meta"), recorded)
    assert not check_values(llm, None)


@pytest.mark.parametrize("recorded", ["a b", "1 2 x", 5, ["1"]])
def test_broken_fingerprints_are_refused(recorded):
    for check in (check_values, check_base):
        with pytest.raises(ValueError, match="^fingerprint: got .*, wants the text that"):
            check(make("llama"), recorded)


@pytest.mark.parametrize("recorded", ["1", "1 2 3", "nan " * 12])
def test_fingerprints_of_others_are_refused(recorded):
    with pytest.raises(ValueError, match=CHANGED):
        check_values(make("llama"), recorded)
    with pytest.raises(ValueError, match="^llm: got another language model"):
        check_base(make("llama"), recorded)
