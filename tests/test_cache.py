"The visual cache against numbers recorded from the published system, and against bad input."
import json
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from ibllm.cache import VisualCache

GOLDEN = Path(__file__).parent / "golden" / "cache_tiny"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCE = META["tolerance"]


@pytest.fixture(scope="module")
def golden(): return {**load_file(GOLDEN / "inputs.safetensors"), **load_file(GOLDEN / "outputs.safetensors")}


@pytest.fixture(scope="module")
def published_index(): return VisualCache.load(GOLDEN / "knn.index")


def features(n=6, width=16, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"case{case['case']}")
def test_recorded_cases(case, golden, published_index):
    name, k = f"case{case['case']}", case["cache_size"]
    query = F.normalize(golden["queries"], dim=1) / (1 + 1e-6)
    result = published_index.enhance(query, k=k, temperature=case["cache_t"], weight=case["cache_weight"])
    assert torch.allclose(result, golden[f"{name}/enhanced"], **TOLERANCE)
    similarities, ids = published_index.search(query, k)
    assert torch.equal(ids, golden[f"{name}/top_indices"])
    assert torch.allclose(similarities, golden[f"{name}/top_scores"], **TOLERANCE)


def test_index_built_here_equals_the_recorded_one(golden, published_index):
    query = F.normalize(golden["queries"], dim=1)
    built = VisualCache.build(golden["matrix"])
    assert torch.allclose(built.enhance(query), published_index.enhance(query), **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 30), temperature=st.floats(0, 100), weight=st.floats(0, 1))
def test_batch_equals_one_at_a_time_and_is_unit(seed, k, temperature, weight):
    cache, query = VisualCache.build(features(30, seed=seed)), features(4, seed=seed + 1)
    together = cache.enhance(query, k, temperature, weight)
    alone = torch.cat([cache.enhance(row[None], k, temperature, weight) for row in query])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-5)


def test_retrieved_is_consistent():
    memory = features(20)
    found = VisualCache.build(memory).retrieve(features(3, seed=1), k=5)
    assert torch.allclose(found.weights.sum(1), torch.ones(3), atol=1e-6)
    assert (found.similarities.diff(dim=1) <= 0).all()
    average = (found.weights[..., None] * memory[found.ids]).sum(1)
    assert torch.allclose(found.prototype, F.normalize(average, dim=1), atol=1e-6)


def test_build_normalises_and_accepts_half_precision():
    memory = features(12)
    longer, cache = VisualCache.build(3 * memory), VisualCache.build(memory)
    assert torch.allclose(longer.enhance(memory), cache.enhance(memory), atol=1e-6)
    assert VisualCache.build(memory.bfloat16()).enhance(memory.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat", "SQ8", "IVF2,Flat", "L2norm,Flat"])
@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
def test_any_index_with_reconstruction_survives_the_disk(factory, metric, tmp_path):
    memory = features(120).numpy()
    index = faiss.index_factory(16, factory, metric)
    index.train(memory)
    index.add(memory)
    faiss.write_index(index, str(tmp_path / "x.index"))
    cache = VisualCache.load(tmp_path / "x.index")
    assert cache.made_from == "x.index" and len(cache) == 120
    exact = VisualCache.build(torch.from_numpy(memory)).enhance(torch.from_numpy(memory[:4]), k=1, weight=1.0)
    assert torch.allclose(cache.enhance(torch.from_numpy(memory[:4]), k=1, weight=1.0), exact, atol=0.02)


def test_index_without_vectors_is_refused():
    index = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    index.add_with_ids(features(10).numpy(), np.arange(10))
    with pytest.raises(ValueError, match="^index: IndexIDMap cannot give its vectors back$"):
        VisualCache(index).enhance(features(1))


def test_too_few_neighbours_in_the_searched_cells():
    index = faiss.index_factory(16, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(features(200).numpy())
    index.add(features(200).numpy())
    with pytest.raises(ValueError, match="^k: the index found fewer than 200 neighbours"):
        VisualCache(index).search(features(1), 200)


def test_save_load_round_trip(tmp_path):
    cache = VisualCache.build(features(), made_from="six vectors")
    cache.save(tmp_path / "a.index")
    again = VisualCache.load(tmp_path / "a.index")
    assert again.made_from == "six vectors" and (len(again), again.width) == (6, 16)
    assert torch.equal(again.enhance(features(2, seed=3), k=3), cache.enhance(features(2, seed=3), k=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    VisualCache.build(features()).save(tmp_path / "a.index")
    before = (tmp_path / "a.index").read_bytes()
    def half(index, name):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(faiss, "write_index", half)
    with pytest.raises(OSError, match="disk full"): VisualCache.build(features(9)).save(tmp_path / "a.index")
    assert (tmp_path / "a.index").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]


BAD = {
    "k below one": (dict(k=0), "^k: got 0, wants an integer from 1 to 6"),
    "k above the memory": (dict(k=7), "^k: got 7, wants an integer from 1 to 6"),
    "k not whole": (dict(k=2.5), "^k: got 2.5, wants an integer"),
    "weight negative": (dict(weight=-0.1), "^weight: got -0.1, wants a number from 0 to 1$"),
    "weight above one": (dict(weight=1.01), "^weight: got 1.01"),
    "weight nan": (dict(weight=float("nan")), "^weight: got nan"),
    "temperature negative": (dict(temperature=-1), "^temperature: got -1, wants a number of at least 0$"),
    "temperature nan": (dict(temperature=float("nan")), "^temperature: got nan"),
    "temperature infinite": (dict(temperature=float("inf")), "^temperature: got inf"),
    "width": (dict(feature=torch.ones(1, 5)), "^feature: got width 5, wants 16"),
    "one dimension": (dict(feature=torch.ones(16)), r"^feature: got \(16,\), wants a tensor \[B, 16\]"),
    "not a tensor": (dict(feature=[[1.0]]), "^feature: got list, wants a tensor"),
    "nan": (dict(feature=torch.full((1, 16), float("nan"))), "^feature: got NaN or infinite values"),
    "zero": (dict(feature=torch.zeros(1, 16)), "^feature: got a zero vector"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_enhance_refuses(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        VisualCache.build(features()).enhance(**{"feature": features(1, seed=1), "k": 3} | arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("memory, message", [
    (torch.ones(0, 4), "^features: got an empty memory"), (torch.zeros(2, 4), "^features: got a zero vector"),
    (torch.full((2, 4), float("inf")), "^features: got NaN or infinite"),
    (torch.ones(4), r"^features: got \(4,\), wants"),
    (np.ones((2, 4)), "^features: got ndarray, wants a tensor")])
def test_build_refuses(memory, message):
    with pytest.raises(ValueError, match=message): VisualCache.build(memory)


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="^path: no file"): VisualCache.load(tmp_path / "absent.index")
    for content in (b"", b"not an index", b"\x00" * 4096):
        (tmp_path / "bad.index").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(ValueError, match="is not a FAISS index$") as error:
                VisualCache.load(tmp_path / "bad.index", mmap=mmap)
            assert "\n" not in str(error.value)
    VisualCache.build(features()).save(tmp_path / "a.index")
    record = tmp_path / "a.index.json"
    record.write_text(record.read_text().replace('"count": 6', '"count": 7'))
    with pytest.raises(ValueError, match="holds 6 features of width 16, its record says 7 of width 16$"):
        VisualCache.load(tmp_path / "a.index")
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "empty.index"))
    with pytest.raises(ValueError, match="empty memory"): VisualCache.load(tmp_path / "empty.index")
