"""Training against numbers recorded from the released code.

Labels, schedule, weight decay, order of examples, loss."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ibllm.checkpoints.adapter import (
    BIND,
    TUNED,
    load_adapter,
    load_llama,
    load_tokenizer,
    with_biases,
)
from ibllm.checkpoints.weights import translate
from ibllm.llama import enable_injection
from ibllm.model import ALPACA, mix, prompt_text
from ibllm.objectives import (
    IGNORE,
    NextTokenLoss,
    prepare_stage_one,
    prepare_stage_two,
    released_example,
    released_exercise,
    released_groups,
    sub_epoch,
)
from ibllm.training import learning_rate

GOLDEN = Path(__file__).parent / "golden"
RECIPE = json.loads((GOLDEN / "training_tiny/recipe.json").read_text())
DATA = json.loads((GOLDEN / "dataset_tiny/meta.json").read_text())
EXPECTED = load_file(GOLDEN / "dataset_tiny/outputs.safetensors")
PARTS = ("tokens", "labels", "mask")
pytestmark = pytest.mark.filterwarnings("ignore:adapter. it does not tell:UserWarning")  # ours


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    shutil.copy(GOLDEN / "dataset_tiny/tokenizer.model", folder)
    shutil.copy(GOLDEN / "llama_base_tiny/params.json", folder)
    return load_tokenizer(folder)


# Examples


@pytest.mark.parametrize("item", DATA["items"], ids=lambda item: item["key"])
def test_tokens_and_labels(item, words):
    instruction, context, answer = released_exercise(item["source"])
    if not item["has_image"]:
        instruction = str((instruction,))  # the released code's mistake
    words.chat_template = ALPACA
    prompt = prompt_text(words, (instruction, context)).removeprefix(words.bos_token or "")
    assert prompt == item["official_prompt_text"]
    example = released_example(words, prompt, answer, item["max_words"])
    tokens, labels, mask = (EXPECTED[f"{item['key']}/{part}"] for part in PARTS)
    assert torch.equal(example["ids"], tokens)
    assert torch.equal(example["labels"].masked_fill(example["labels"] == IGNORE, 0), labels)
    assert (example["labels"] != IGNORE).sum() == item["n_label_tokens"]
    assert mask.sum() == item["n_tokens"]


def test_every_recorded_example_is_checked():
    names = set()
    for item in DATA["items"]:
        names |= {f"{item['key']}/{part}" for part in PARTS}
    assert set(EXPECTED) == names


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn(words):
    with pytest.raises(ValueError, match="^length: got 1, wants at least 2"):
        released_example(words, "a", "b", 1)
    said = "^item: got keys .'text'., wants texts: a caption, two conversations, or"
    with pytest.raises(ValueError, match=said):
        released_exercise({"text": "x"})


# Recipe


@pytest.mark.parametrize("case", RECIPE["lr_schedule"], ids=lambda case: case["name"])
def test_schedule_and_scaled_groups(case):
    peak = case["blr"] * case["batch"] / 256
    assert peak == pytest.approx(case["peak_lr"])
    for epoch, *rates in case["fractional_epoch__lr__lr_of_a_group_with_lr_scale_0.1"]:
        shape = epoch, case["epochs"], case["warmup_epochs"]
        ours = [learning_rate(*shape, scale * peak) for scale in (1, 0.1)]
        assert ours == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(
    "draw", RECIPE["sub_epoch_sampler"]["draws"], ids=lambda d: f"rank{d['rank']}-{d['epoch']}"
)
def test_order_of_examples(draw):
    s = RECIPE["sub_epoch_sampler"]
    place = draw["rank"], s["replicas"]
    order = sub_epoch(s["dataset_size"], draw["epoch"], s["split_epoch"], s["seed"], *place)
    assert order == draw["indices"]


@pytest.mark.parametrize("examples, pieces, world", [(53, 5, 2), (10, 5, 2), (12, 1, 1), (7, 7, 1)])
def test_a_pass_reads_nothing_twice(examples, pieces, world):
    read = []
    for epoch in range(pieces):
        for rank in range(world):
            read += sub_epoch(examples, epoch, pieces, 3, rank, world)
    assert len(set(read)) == len(read) == examples // (pieces * world) * pieces * world
    with pytest.raises(ValueError, match="^examples: got 9, wants at least 10"):
        sub_epoch(9, 0, 5, 0, 0, 2)


def released_name(name):
    "The released name of an objective's parameter, with N for the layer."
    if name == "injection.queries":
        return "prefix_query.weight"
    if name == "injection.gates":
        return "llama.layers.N.attention.gate"
    if name.startswith("bind."):
        return translate([name[5:]], BIND, back=True)[name[5:]]
    ours = name.removeprefix("llm.base_model.model.").replace(".modules_to_save.default", "")
    return re.sub(r"\d+(?=\.[af])", "N", "llama." + translate([ours], TUNED, back=True)[ours])


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_weight_decay_spares_what_the_released_code_spares(phase):
    stage_one = load_adapter(
        GOLDEN / "llama_adapter_tiny_pretrain/adapter.safetensors", GOLDEN / "llama_base_tiny"
    )
    if phase == "pretrain":
        objective = prepare_stage_one(*stage_one)
    else:
        llm = with_biases(load_llama(GOLDEN / "llama_base_tiny"))
        objective = prepare_stage_two(llm, *stage_one[1:])
    names = {
        id(p): released_name(name) for name, p in objective.named_parameters() if p.requires_grad
    }
    groups = released_groups(objective, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    recorded = RECIPE["weight_decay_groups"][phase]
    assert decayed == set(recorded["decay"]) and spared == set(recorded["no_decay"])
    assert sum(len(group["params"]) for group in groups) == len(names)


# Loss


@pytest.mark.parametrize("form", ["finetune", "finetune_partial", "finetune_legacy", "pretrain"])
def test_loss(form):
    folder = GOLDEN / f"llama_adapter_tiny_{form}"
    meta = json.loads((folder / "meta.json").read_text())
    inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
    adapted = load_adapter(
        folder / "adapter.safetensors", GOLDEN / Path(meta["base_checkpoint"]).parent
    )
    enable_injection(adapted.llm)
    labels = inputs["train/labels"].masked_fill(inputs["train/labels"] == 0, IGNORE)
    feature = mix([inputs["train/features"]], [1.0])
    objective = NextTokenLoss(*adapted)
    loss = objective(inputs["train/tokens"], labels, feature)
    assert torch.allclose(loss, outputs["train/loss"], atol=1e-5)
    nothing = objective(inputs["train/tokens"], torch.full_like(labels, IGNORE), feature)
    assert torch.equal(nothing, outputs["train/loss_when_no_labels"])
    nothing.backward()
    assert not adapted.bind.project.weight.grad.any()
