"The training loop: order of examples, resuming, schedule, what learns in which stage."

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ibllm.encoders import ImageBind
from ibllm.objectives import (
    IGNORE,
    Binding,
    NextTokenLoss,
    count_trainable,
    info_nce,
    prepare_stage_one,
    prepare_stage_two,
    start_like,
    tokenize_pairs,
)
from ibllm.toyland.recipes import (
    TOYLAND_PROMPT,
    toyland_imagebind,
    toyland_llm,
    toyland_model,
    toyland_text,
    train_tokenizer,
)
from ibllm.training import Batches, Columns, Recipe, Run, fit, learning_rate, make_optimizers

GOLDEN = json.loads((Path(__file__).parent / "golden/training_tiny/recipe.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{p} {a}" for p, a in zip(*toyland_text(500, seed=0))], vocabulary=320)


@pytest.mark.parametrize("case", GOLDEN["lr_schedule"], ids=lambda case: case["name"])
def test_learning_rate_equals_the_released_schedule(case):
    for epoch, lr, _ in case["fractional_epoch__lr__lr_of_a_group_with_lr_scale_0.1"]:
        ours = learning_rate(epoch, case["epochs"], case["warmup_epochs"], case["peak_lr"])
        assert ours == pytest.approx(lr, abs=1e-18, rel=1e-9)


def test_every_epoch_holds_every_example_once():
    batches = list(Batches(12, 4, steps=6, seed=3))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(sum(epoch, [])) == list(range(12))
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(examples=3, batch_size=4, steps=1), "batch_size: got 4, wants 1 to 3"),
        (dict(examples=3, batch_size=0, steps=1), "batch_size: got 0"),
        (dict(examples=8, batch_size=3, steps=1, world=2), "wants a multiple of 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(**options)


class Curve(nn.Module):
    "A small network with dropout and a Muon-trained block, so that order and randomness matter."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.out = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.2)
        self.gates = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return (self.out(self.dropout(self.body(x))) + self.gates - y).square().mean()

    def body(self, x):
        return torch.tanh(self.blocks[0](x))


class Wrapped(nn.Module):
    "Gives the blocks a name with a dot on both sides, as in towers."

    def __init__(self):
        super().__init__()
        self.net = Curve()

    def forward(self, x, y):
        return self.net(x, y)


class Breaks(Columns):
    "Raises Ctrl-C when batch number `at` is fetched."

    at, count = 0, 0

    def __getitems__(self, indices):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return super().__getitems__(indices)


def curve_data(kind=Columns):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return kind(x=x, y=x.sum(1, keepdim=True))


RECIPE = Recipe(steps=24, batch_size=8, lr=0.01, muon_lr=0.01, warmup=4, save_every=5)


@pytest.mark.parametrize("stop", [1, 5, 6, 13, 24])
def test_resumed_run_is_bit_equal_to_an_unbroken_one(tmp_path, stop):
    unbroken, resumed = Wrapped(), Wrapped()
    history = fit(unbroken, curve_data(), RECIPE, "unbroken")
    broken = curve_data(Breaks)
    broken.at = stop
    with pytest.raises(KeyboardInterrupt):
        fit(Wrapped(), broken, RECIPE, "broken", tmp_path / "run.pt")
    assert fit(resumed, curve_data(), RECIPE, "resumed", tmp_path / "run.pt") == history
    for a, b in zip(unbroken.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_a_changed_recipe_does_not_continue_an_old_run(tmp_path):
    fit(Wrapped(), curve_data(), RECIPE, "first", tmp_path / "run.pt")
    changed = Recipe(**{**RECIPE.__dict__, "lr": 0.02})
    with pytest.raises(
        ValueError, match="run.pt: got one made with other settings or data .another recipe., wants"
    ):
        fit(Wrapped(), curve_data(), changed, "second", tmp_path / "run.pt")


def test_other_data_or_another_start_does_not_continue_an_old_run(tmp_path):
    fit(Wrapped(), curve_data(), RECIPE, "first", tmp_path / "run.pt")
    data = curve_data()
    turned = Columns(x=data.columns["x"], y=-data.columns["y"])
    with pytest.raises(ValueError, match="another data"):
        fit(Wrapped(), turned, RECIPE, "other data", tmp_path / "run.pt")
    other = Wrapped()
    nn.init.zeros_(other.net.out.weight)
    with pytest.raises(ValueError, match="another start"):
        fit(other, data, RECIPE, "other start", tmp_path / "run.pt")


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "unpickled"), "w")

    state = dict(provenance={}, weights=Touch(), optimizers=[], history=[], seconds=0.0)
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="run.pt: got no whole checkpoint"):
        fit(Wrapped(), curve_data(), RECIPE, "hostile", tmp_path / "run.pt")
    assert not (tmp_path / "unpickled").exists()


def test_a_loss_that_is_not_finite_stops_the_run():
    data = Columns(x=torch.full((8, 4), float("nan")), y=torch.zeros(8, 1))
    with pytest.raises(FloatingPointError, match="loss: got nan at step 0"):
        fit(Wrapped(), data, RECIPE, "nan")


def test_gates_learn_faster_and_only_matrices_decay():
    adam, muon = make_optimizers(Wrapped(), RECIPE)
    assert [g["weight_decay"] for g in adam.param_groups] == [0.05, 0, 0]
    assert [g["peak"] for g in adam.param_groups] == [0.01, 0.01, 0.05]
    assert [tuple(p.shape) for g in muon.param_groups for p in g["params"]] == [(4, 4)]


def test_an_objective_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizers(nn.Identity(), RECIPE)


def test_info_nce_against_a_loop():
    a, b = (nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))

    def one_way(a, b):
        return -sum(torch.log_softmax(7 * a[i] @ b.T, 0)[i] for i in range(5)) / 5

    torch.testing.assert_close(info_nce(a, b, 7), (one_way(a, b) + one_way(b, a)) / 2)


def test_labels_mask_the_prompt_and_the_padding(tokenizer):
    answers = ["a ball", "a very red bell"]
    pairs = tokenize_pairs(tokenizer, ["Q: what is it ?\nA:", "Q: a\nA:"], answers)
    for ids, labels, answer in zip(pairs["ids"], pairs["labels"], [f" {a}" for a in answers]):
        assert tokenizer.decode(labels[labels != IGNORE]) == answer + "</s>"
        assert (ids[labels != IGNORE] == labels[labels != IGNORE]).all()
    with pytest.raises(ValueError, match="answers: got 1, wants as many as prompts, 2"):
        tokenize_pairs(tokenizer, ["a", "b"], ["c"])


def test_the_end_token_has_the_largest_id_and_padding_is_zero(tokenizer):
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and tokenizer.pad_token_id == 0
    odd = "zebra Ünïcode 你好 \t ok"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]).strip() == odd


@pytest.fixture
def model(tokenizer):
    encoder = ImageBind(toyland_imagebind(len(tokenizer)))
    return toyland_model(encoder, toyland_llm(tokenizer), tokenizer)


def learning(objective):
    return {name for name, p in objective.named_parameters() if p.requires_grad}


def test_stage_one_moves_bind_queries_and_gates_only(model):
    names = learning(prepare_stage_one(model.llm, model.bind, model.injection))
    assert {n.split(".")[0] for n in names} == {"bind", "injection"}
    assert {"injection.gates", "injection.queries"} <= names


def test_stage_two_moves_lora_biases_and_norms_only(model, tokenizer):
    objective = prepare_stage_two(model.llm, model.bind, model.injection)
    names = learning(objective)
    assert all("lora_" in n or "norm" in n or n.endswith("bias") for n in names)
    assert not any(n.endswith(("k_proj.base_layer.bias", "v_proj.base_layer.bias")) for n in names)
    assert sum("lora_A" in n for n in names) == 7 * 4
    assert sum("norm" in n for n in names) == 2 * 4 + 1
    frozen = {n: p.clone() for n, p in objective.named_parameters() if not p.requires_grad}
    prompt = TOYLAND_PROMPT.format(instruction="what is it ?")
    pairs = tokenize_pairs(tokenizer, [prompt] * 8, ["a ball"] * 8)
    data = Columns(**pairs, feature=torch.randn(8, 128))
    fit(objective, data, Recipe(steps=2, batch_size=4, warmup=1), "two steps")
    assert all(torch.equal(p, frozen[n]) for n, p in objective.named_parameters() if n in frozen)


def test_what_stage_two_learned_survives_saving(model, tokenizer, tmp_path):
    objective = prepare_stage_two(model.llm, model.bind, model.injection)
    model.llm = objective.llm
    for p in objective.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    nn.init.normal_(model.injection.gates)
    model.save_pretrained(tmp_path / "model")
    import ibllm

    again = ibllm.load(tmp_path / "model")
    ids, feature = model.tokenize(["what is it ?"])["input_ids"], torch.randn(1, 128)
    with torch.no_grad():
        assert torch.equal(again(ids, features=feature).logits, model(ids, features=feature).logits)


def test_a_zero_gate_keeps_the_language_model_bit_for_bit(model):
    ids = model.tokenize(["what is it ?"])["input_ids"]
    with torch.no_grad():
        ours = model(ids, features=torch.randn(1, 128)).logits
        assert torch.equal(ours, model.llm(input_ids=ids).logits)


def test_a_tower_can_start_like_another(tokenizer):
    encoder = ImageBind(toyland_imagebind(len(tokenizer)))
    depth, vision = encoder.towers["depth"], encoder.towers["vision"]
    stem = depth.stem.weight.clone()
    start_like(depth, vision)
    ours, theirs = (tower.transformer.blocks[0].expand.weight for tower in (depth, vision))
    assert torch.equal(ours, theirs)
    assert torch.equal(depth.stem.weight, stem)


def test_binding_learns_on_a_handful_of_pairs(tokenizer):
    torch.manual_seed(0)
    tower = ImageBind(toyland_imagebind(len(tokenizer))).towers["imu"]
    anchor = nn.functional.normalize(torch.randn(32, 128), dim=1)
    data = Columns(x=torch.randn(32, 6, 64), anchor=anchor)
    recipe = Recipe(steps=25, batch_size=32, lr=2e-3, warmup=3)
    losses = fit(Binding(tower), data, recipe, "a handful")
    assert losses[-1] < 0.5 * losses[0]


def test_counting_what_learns(model):
    assert count_trainable(prepare_stage_one(model.llm, model.bind, model.injection)).endswith("%)")


def test_a_run_saves_only_what_learns(model, tmp_path):
    objective = prepare_stage_one(model.llm, model.bind, model.injection)
    data = Columns(ids=torch.zeros(4, 3))
    run = Run(objective, data, Recipe(steps=1, batch_size=2), tmp_path / "run.pt")
    run.save()
    weights = torch.load(tmp_path / "run.pt", weights_only=True)["weights"]
    assert not any(name.startswith("llm.") and name.endswith("weight") for name in weights)
    assert isinstance(objective, NextTokenLoss)
