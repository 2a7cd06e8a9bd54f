"""On an NVIDIA GPU: what the processor says, training that can be continued, and memories that
FAISS searches there."""

import faiss
import pytest
import torch
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

from ibllm import load
from ibllm.cache import FORMS, VisualCache
from ibllm.config import MODALITIES
from ibllm.encoders import extract_features
from ibllm.files import project_folder
from ibllm.llama import merged
from ibllm.objectives import NextTokenLoss, prepare_stage_one, prepare_stage_two
from ibllm.toyland.recipes import before_stage_two, caption_pairs, read_recording, toyland_model
from ibllm.toyland.scoring import caption_accuracy, score_captions
from ibllm.toyland.sensors import record
from ibllm.toyland.world import draw_things
from ibllm.training import Columns, Recipe, fit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU"
)
faiss_gpu = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources"), reason="this FAISS is not faiss-gpu"
)
THINGS = draw_things(24, seed=3)


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    "Convolutions in float32, not TF32."
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def cpu():
    return load("toyland")


@pytest.fixture(scope="module")
def gpu():
    return load("toyland", device="cuda")


def features_of(model):
    "Unit features of what every modality records of `THINGS`, where the model is."
    return {
        modality: extract_features(
            model.encoder, modality, read_recording(model.processor, modality, recording)
        )
        for modality, recording in record(THINGS, 3, MODALITIES).items()
    }


@pytest.fixture(scope="module")
def features(cpu):
    return features_of(cpu)


# The model


def test_every_sense_is_encoded_alike(gpu, features):
    for modality, there in features_of(gpu).items():
        assert there.device.type == "cuda" and torch.allclose(
            there.cpu(), features[modality], atol=1e-4
        ), modality


@pytest.mark.parametrize("cache", [False, True])
def test_answers_are_the_processors(cpu, gpu, features, cache):
    asked = [
        (modality, question)
        for modality in MODALITIES
        for question in ("describe it .", "what is it ?")
    ]
    said = [
        [
            model.answer(
                model.enhance(features[modality].to(where), cache), question, do_sample=False
            )
            for modality, question in asked
        ]
        for model, where in ((cpu, "cpu"), (gpu, "cuda"))
    ]
    same = [a == b for here, there in zip(*said) for a, b in zip(here, there)]
    assert sum(same) >= 0.99 * len(same), (
        "two words as likely as each other may change places by rounding"
    )


def test_features_from_the_processor_are_taken_too(gpu, features):
    assert gpu.answer(features["audio"][:2], "what is it ?", do_sample=False) == gpu.answer(
        features["audio"][:2].cuda(), "what is it ?", do_sample=False
    )


def test_files_are_read_mixed_and_streamed(cpu, gpu):
    picture, sound = (
        record(THINGS, 3, (modality,))[modality][0] for modality in ("image", "audio")
    )
    inputs = dict(image=(picture, 0.7), audio=((sound, 8_000), 0.3))
    expected = cpu.generate(inputs, "describe it .", do_sample=False)[0]
    assert gpu.generate(inputs, "describe it .", do_sample=False)[0] == expected
    assert "".join(gpu.stream(inputs, "describe it .", do_sample=False)).strip() == expected


def test_merged_lora_answers_the_same(gpu, features):
    expected = gpu.answer(features["image"], "describe it .", do_sample=False)
    with merged(gpu.llm):
        again = gpu.answer(features["image"], "describe it .", do_sample=False)
    assert sum(a == b for a, b in zip(again, expected)) >= 0.95 * len(expected), "but for rounding"
    right = score_captions(expected, THINGS)
    for name, hits in caption_accuracy(gpu, features["image"].cuda(), THINGS).items():
        assert (hits == right[name]).float().mean() >= 0.95


def test_half_precision_and_automatic_placement(cpu, features):
    expected = cpu.answer(features["image"], "what is it ?", do_sample=False)
    for options in (
        dict(device="cuda", dtype=torch.bfloat16),
        dict(device_map="auto"),
        dict(device="cuda", device_map="auto"),
    ):
        model = load("toyland", **options)
        assert next(model.llm.parameters()).device.type == "cuda"
        said = model.answer(features["image"], "what is it ?", do_sample=False)
        assert sum(a == b for a, b in zip(said, expected)) >= 0.8 * len(said), options


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and PEFT warn of each other
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(cpu, features, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    expected = cpu.answer(features["image"], "what is it ?", do_sample=False)
    options = dict(quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    for device in ("cuda", "cpu"):  # of all but the language model
        model = load("toyland", device=device, device_map="auto", **options)
        said = model.answer(features["image"], "what is it ?", do_sample=False)
        assert sum(a == b for a, b in zip(said, expected)) >= 0.7 * len(said)
        with merged(model.llm):
            assert model.answer(features["image"], "what is it ?", do_sample=False) == said
    with pytest.raises(ValueError, match="^llm: got quantised weights"):
        model.save_pretrained(tmp_path)
    stage_two = NextTokenLoss(model.llm, model.bind.cuda(), model.injection.cuda())
    for name, p in model.llm.named_parameters():
        p.requires_grad_("lora_" in name)
    losses = fit(
        stage_two,
        pairs(cpu, features),
        Recipe(20, 12, lr=2e-3, warmup=2),
        "LoRA on quantised weights",
    )
    assert sum(losses[-5:]) < sum(losses[:5])


def test_saved_from_the_gpu_and_loaded_without_one(cpu, gpu, tmp_path):
    gpu.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(p, cpu.state_dict()[name]) for name, p in again.state_dict().items())


# Training


def begin(cpu):
    "A model before stage 1, and the objective of that stage."
    untuned = before_stage_two(project_folder() / "data" / "toyland").llm
    model = toyland_model(cpu.encoder, untuned, cpu.tokenizer)
    return model, prepare_stage_one(model.llm, model.bind, model.injection)


def pairs(model, features):
    return caption_pairs(THINGS, model.tokenizer, features["image"], 0)


def test_both_stages_learn_and_continue(cpu, features, tmp_path, monkeypatch):
    recipe = Recipe(60, 12, lr=5e-3, warmup=5, save_every=20)
    model, stage_one = begin(cpu)
    whole = fit(stage_one, pairs(cpu, features), recipe, "whole")
    assert model.bind.project.weight.device.type == "cuda" and sum(whole[-5:]) < sum(whole[:5])

    class Stopped(Exception):
        pass

    _, stage_one = begin(cpu)

    def forward(**batch):
        if len(seen) == 33:
            raise Stopped
        seen.append(1)
        return stage_one.__class__.forward(stage_one, **batch)

    seen = []
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stage_one, "forward", forward)
        fit(stage_one, pairs(cpu, features), recipe, "stopped", tmp_path / "one.pt")
    model, stage_one = begin(cpu)
    continued = fit(stage_one, pairs(cpu, features), recipe, "continued", tmp_path / "one.pt")
    assert continued == pytest.approx(whole, rel=1e-3)
    stage_two = prepare_stage_two(model.llm, model.bind, model.injection)
    losses = fit(stage_two, pairs(cpu, features), Recipe(20, 12, lr=2e-3, warmup=2), "stage 2")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_columns_may_be_on_either_side(cpu, features):
    columns = pairs(cpu, features).columns
    there = Columns(**{name: column.cuda() for name, column in columns.items()})
    recipe = Recipe(3, 8, lr=1e-3, warmup=1)
    assert fit(begin(cpu)[1], there, recipe, "there") == pytest.approx(
        fit(begin(cpu)[1], pairs(cpu, features), recipe, "here"), rel=1e-4
    )


# The memory


@pytest.fixture(scope="module")
def memory():
    "20,000 unit vectors in clusters, and 300 queries near them."
    torch.manual_seed(0)
    centres = torch.randn(200, 64)
    vectors = F.normalize(
        centres[torch.randint(200, (20_300,))] + 0.5 * torch.randn(20_300, 64), dim=1
    )
    return vectors[:20_000], vectors[20_000:]


@faiss_gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_memory_is_searched_on_the_gpu_or_refused(memory, form):
    vectors, queries = memory
    cache = VisualCache.build(vectors, form)
    expected = cache.enhance(queries)
    if form not in ("exact", "half", "ivf-8bit"):
        with pytest.raises(
            ValueError, match=rf"^device: got .* where FAISS cannot search this memory \({form}\)"
        ):
            cache.to("cuda")
        return
    found = cache.to("cuda").enhance(queries.cuda())
    assert cache.searcher is not None and found.device.type == "cuda"
    assert F.cosine_similarity(found.cpu(), expected).min() > 0.999
    assert torch.equal(cache.to("cpu").enhance(queries), expected)


@faiss_gpu
def test_more_neighbours_than_a_gpu_finds(memory):
    vectors, queries = memory
    cache = VisualCache.build(vectors).to("cuda")
    assert cache.enhance(queries[:2], k=2_048).shape == (2, 64)
    with pytest.raises(ValueError, match="^k: got 5000"):
        cache.enhance(queries[:2], k=5_000)
    with pytest.raises(ValueError, match="^device: got 'cuda:64'"):
        cache.to("cuda:64")


@faiss_gpu
def test_a_model_with_its_memory_on_the_gpu(gpu, features):
    feature = features["audio"].cuda()
    expected = gpu.enhance(feature, True)
    gpu.cache.to("cuda")
    try:
        assert torch.allclose(gpu.enhance(feature, True), expected, atol=1e-5)
    finally:
        gpu.cache.to("cpu")
