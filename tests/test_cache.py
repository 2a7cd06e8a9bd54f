"The cache against numbers recorded from the published system, kills, full disks and bad input."

import copy
import errno
import json
import pickle
import resource
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ibllm.cache
from ibllm.cache import FORMS, VisualCache, Whitening
from ibllm.encoders import encoder_fingerprint
from ibllm.shards import Shards, embed_images, write_shard

GOLDEN = Path(__file__).parent / "golden" / "cache_tiny"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCE = META["tolerance"]


@pytest.fixture(scope="module")
def golden():
    return {**load_file(GOLDEN / "inputs.safetensors"), **load_file(GOLDEN / "outputs.safetensors")}


@pytest.fixture(scope="module")
def published_index():
    return VisualCache.load(GOLDEN / "knn.index")


def features(n=6, width=16, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"case{case['case']}")
def test_recorded_cases(case, golden, published_index):
    name, k = f"case{case['case']}", case["cache_size"]
    query = F.normalize(golden["queries"], dim=1) / (1 + 1e-6)
    result = published_index.enhance(
        query, k=k, temperature=case["cache_t"], weight=case["cache_weight"]
    )
    assert torch.allclose(result, golden[f"{name}/enhanced"], **TOLERANCE)
    similarities, ids = published_index.search(query, k)
    assert torch.equal(ids, golden[f"{name}/top_indices"])
    assert torch.allclose(similarities, golden[f"{name}/top_scores"], **TOLERANCE)


def test_index_built_here_equals_the_recorded_one(golden, published_index):
    query = F.normalize(golden["queries"], dim=1)
    built = VisualCache.build(golden["matrix"])
    assert torch.allclose(built.enhance(query), published_index.enhance(query), **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    k=st.integers(1, 30),
    temperature=st.floats(0, 100),
    weight=st.floats(0, 1),
)
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
    query = torch.from_numpy(memory[:4])
    exact = VisualCache.build(torch.from_numpy(memory)).enhance(query, k=1, weight=1.0)
    assert torch.allclose(cache.enhance(query, k=1, weight=1.0), exact, atol=0.02)


def test_index_without_vectors_is_refused():
    index = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    index.add_with_ids(features(10).numpy(), np.arange(10))
    with pytest.raises(
        ValueError, match="^index: got IndexIDMap, which cannot give its vectors back, wants"
    ):
        VisualCache(index).enhance(features(1))


def test_too_few_neighbours_in_the_searched_cells():
    index = faiss.index_factory(16, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(features(200).numpy())
    index.add(features(200).numpy())
    with pytest.raises(
        ValueError, match="^k: got 200, more neighbours than the index found, wants"
    ):
        VisualCache(index).search(features(1), 200)


def test_save_load_round_trip(tmp_path):
    cache = VisualCache.build(features(), made_from="six vectors")
    cache.save(tmp_path / "a.index")
    again = VisualCache.load(tmp_path / "a.index")
    assert again.made_from == "six vectors" and (len(again), again.width) == (6, 16)
    query = features(2, seed=3)
    assert torch.equal(again.enhance(query, k=3), cache.enhance(query, k=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    VisualCache.build(features()).save(tmp_path / "a.index")
    before = (tmp_path / "a.index").read_bytes()

    def half(index, writer):
        next(tmp_path.glob("*.part")).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(faiss, "write_index", half)
    with pytest.raises(
        OSError, match="path: got .*a.index.*, wants a file that can be .*disk full"
    ):
        VisualCache.build(features(9)).save(tmp_path / "a.index")
    assert (tmp_path / "a.index").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]


# Forms


def clustered(n, width=32, seed=0):
    "Unit features in a few dozen cells of unequal size, most of their variance in few directions."
    draw = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1).pow(-0.5)
    centres = torch.randn(40, width, generator=torch.Generator().manual_seed(9)) * spread
    which = (40 * torch.rand(n, generator=draw) ** 2).long()
    return F.normalize(
        1 / width**0.5 + centres[which] + 0.5 * torch.randn(n, width, generator=draw) * spread,
        dim=1,
    )


@pytest.fixture(scope="module")
def large():
    return clustered(6000)


@pytest.fixture(scope="module")
def away():
    "Queries off the memory's manifold: other features, shifted by a constant gap."
    return F.normalize(clustered(300, seed=1) + torch.linspace(-0.3, 0.3, 32), dim=1)


def size_per_feature(cache):
    return len(faiss.serialize_index(cache.index)) / len(cache)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_enhances_like_the_exact_one(form, large, away):
    exact, cache = VisualCache.build(large, "exact"), VisualCache.build(large, form)
    cosine = F.cosine_similarity(cache.enhance(away), exact.enhance(away))
    if form == "hnsw":
        assert cosine.mean() > 0.98  # what it is at FAISS's own setting, `efSearch=16`
    else:
        assert cosine.mean() > 0.999 and cosine.quantile(0.01) > 0.995
    nearest, several = cache.retrieve(away, k=1), cache.retrieve(away)
    assert F.cosine_similarity(nearest.prototype, large[nearest.ids[:, 0]]).min() > 0.99
    assert (several.similarities.diff(dim=1) <= 1e-5).all()


def test_compact_forms_are_compact(large):
    sizes = {form: size_per_feature(VisualCache.build(large, form)) / (4 * 32) for form in FORMS}
    assert sizes["exact"] < 1.01 and sizes["half"] < 0.51 and sizes["8bit"] < 0.26
    assert sizes["ivf-pq"] < 0.6 < 1 < sizes["hnsw"]  # a vector of 32 numbers costs more than them


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 17, 40, 1000])
def test_every_form_takes_any_count(form, count, large):
    cache = VisualCache.build(large[:count], form)
    assert len(cache) == count and cache.form == form
    found = cache.retrieve(large[:count], k=1)
    assert F.cosine_similarity(found.prototype, large[:count]).min() > 0.97


@pytest.mark.parametrize("form", FORMS)
def test_every_form_survives_the_disk(form, large, away, tmp_path):
    cache = VisualCache.build(large[:2000], form, made_from="clusters", path=tmp_path / "a.index")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]
    for mmap in (False, True):
        again = VisualCache.load(tmp_path / "a.index", mmap=mmap)
        assert torch.equal(again.enhance(away), cache.enhance(away)) and again.form == form


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_pickled_copied_and_kept_by_torch(form, large, away, tmp_path):
    cache = VisualCache.build(large[:2000], form, "clusters", "0.5 1")
    torch.save({"memory": cache}, tmp_path / "kept.pt")
    twins = [pickle.loads(pickle.dumps(cache, protocol)) for protocol in (2, 5)]
    twins.append(copy.deepcopy(cache))
    twins.append(torch.load(tmp_path / "kept.pt", weights_only=False)["memory"])
    twins.append(pickle.loads(pickle.dumps(twins[0])))
    expected = cache.retrieve(away, k=7)
    for twin in twins:
        assert vars(twin).keys() == vars(cache).keys() and twin.index is not cache.index
        assert repr(twin) == repr(cache) and twin.fingerprint == "0.5 1"
        assert all(map(torch.equal, twin.retrieve(away, k=7), expected))
        assert torch.equal(twin.search(away, 3)[1], cache.search(away, 3)[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_of_a_mapped_memory_needs_no_file(form, large, away, tmp_path):
    VisualCache.build(large[:2000], form, path=tmp_path / "a.index")
    mapped = VisualCache.load(tmp_path / "a.index", mmap=True)
    expected, written = mapped.enhance(away), pickle.dumps(mapped)
    del mapped
    (tmp_path / "a.index").unlink()
    assert torch.equal(pickle.loads(written).enhance(away), expected)


def test_a_copy_is_a_memory_of_its_own(large, away, tmp_path):
    cache = VisualCache.build(large[:2000], "ivf-pq")
    faiss.ParameterSpace().set_index_parameters(cache.index, "nprobe=7,k_factor_rf=3")
    twin, expected = copy.deepcopy(cache), cache.enhance(away)
    faiss.ParameterSpace().set_index_parameters(cache.index, "nprobe=1,k_factor_rf=1")
    cache.index.add(large[2000:3000].numpy())
    assert len(twin) == 2000 and torch.equal(twin.enhance(away), expected)
    twin.save(tmp_path / "a.index")
    assert json.loads((tmp_path / "a.index.json").read_text())["search"] == "nprobe=7,k_factor_rf=3"


# FAISS's own setting


def threshold():
    return faiss.cvar.distance_compute_blas_threshold


def test_importing_leaves_faiss_as_it_is():
    code = """
import faiss
before = faiss.cvar.distance_compute_blas_threshold
import ibllm.cache
print(before, faiss.cvar.distance_compute_blas_threshold)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = told.stdout.split()
    assert before == after


@pytest.fixture(params=[100, 128_000])
def usual(request):
    "FAISS's threshold, set to something of our own: above ours, or below it."
    before = threshold()
    faiss.cvar.distance_compute_blas_threshold = request.param
    yield request.param
    faiss.cvar.distance_compute_blas_threshold = before


class Watched:
    "An index that notes the threshold whenever it is used."

    def __init__(self, index, seen):
        self.__dict__.update(index=index, seen=seen)

    def __getattr__(self, name):
        if name in ("train", "add", "search_and_reconstruct"):
            self.seen.append((name, threshold()))
        return getattr(self.index, name)


def test_searches_and_builds_put_the_threshold_back(usual, large, away, monkeypatch):
    seen, made = [], ibllm.cache._empty_index
    monkeypatch.setattr(ibllm.cache, "_empty_index", lambda *a: Watched(made(*a), seen))
    cache = VisualCache.build(large)
    assert threshold() == usual
    cache.enhance(away)
    assert threshold() == usual
    names = ["train", "add", "search_and_reconstruct"]
    assert seen == [(name, min(usual, 4096)) for name in names]
    index = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    index.add_with_ids(features(10).numpy(), np.arange(10))
    with pytest.raises(ValueError, match="cannot give its vectors back"):
        VisualCache(index).enhance(features(1))
    assert threshold() == usual


def test_searches_side_by_side_put_the_threshold_back(usual, large, away):
    cache, started = VisualCache.build(large), threading.Barrier(4)
    expected, found = cache.enhance(away), []

    def ask():
        started.wait()
        found.extend(cache.enhance(away) for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert threshold() == usual and len(found) == 80
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_a_process_with_the_lower_threshold(form, large, away, monkeypatch):
    cache = VisualCache.build(large, form)
    found = [cache.enhance(away[:n]) for n in (1, 64, 300)]
    monkeypatch.setattr(ibllm.cache, "_as_product", nullcontext)
    usual = threshold()
    faiss.cvar.distance_compute_blas_threshold = min(4096, usual)
    try:
        expected = [cache.enhance(away[:n]) for n in (1, 64, 300)]
    finally:
        faiss.cvar.distance_compute_blas_threshold = usual
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("form", ["ivf-8bit", "ivf-pq", "hnsw"])
@pytest.mark.parametrize("count, width", [(1, 8), (300, 32), (700, 32), (3000, 64), (4200, 128)])
def test_whatever_was_saved_can_be_loaded(form, count, width, tmp_path):
    VisualCache.build(clustered(count, width), form, path=tmp_path / "a.index")
    for mmap in (False, True):
        assert len(VisualCache.load(tmp_path / "a.index", mmap=mmap)) == count


def test_the_record_says_how_this_memory_is_searched(large, tmp_path):
    cache = VisualCache.build(large[:2000], "ivf-pq")
    faiss.ParameterSpace().set_index_parameters(cache.index, "nprobe=7,k_factor_rf=3")
    cache.save(tmp_path / "a.index")
    assert json.loads((tmp_path / "a.index.json").read_text())["search"] == "nprobe=7,k_factor_rf=3"


def test_form_by_default(large, monkeypatch):
    monkeypatch.setattr(ibllm.cache, "LARGE", 5999)
    assert VisualCache.build(large).form == ibllm.cache.COMPACT
    assert VisualCache.build(large[:5999]).form == "exact"


def test_unknown_form(large):
    with pytest.raises(ValueError, match="^form: got 'pq', wants one of exact, half, 8bit"):
        VisualCache.build(large, "pq")


# Building


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_the_same_memory(form, tmp_path, monkeypatch):
    monkeypatch.setattr(ibllm.shards, "CHUNK", 256)
    memory = clustered(1500)
    for number, rows in enumerate(memory.split(512)):
        write_shard(rows, tmp_path / "safe", number)
        (tmp_path / "npy").mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{number}.npy", rows.numpy())
    sources = [
        memory,
        memory.split(512),
        iter(memory.split(100)),
        tmp_path / "safe",
        str(tmp_path / "npy"),
        Shards(tmp_path / "npy"),
    ]
    built = [faiss.serialize_index(VisualCache.build(source, form).index) for source in sources]
    assert all((one == built[0]).all() for one in built)


def test_shards_may_be_half_precision_and_of_unequal_size(tmp_path):
    memory = clustered(100).half()
    for number, rows in enumerate(memory.split([1, 60, 39])):
        write_shard(rows, tmp_path, number)
    assert [len(shard) for shard in Shards(tmp_path)] == [1, 60, 39]
    query = clustered(3, seed=2)
    expected = VisualCache.build(memory).enhance(query)
    assert torch.allclose(VisualCache.build(tmp_path).enhance(query), expected)


def test_a_generator_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(ibllm.shards, "CHUNK", 256)
    alive = weakref.WeakSet()

    def chunks():
        for seed in range(20):
            chunk = clustered(128, seed=seed)
            alive.add(chunk)
            assert len(alive) <= 4
            yield chunk

    assert len(VisualCache.build(chunks())) == 20 * 128


KILLED = """
import os, random, signal, sys
from pathlib import Path
import faiss, torch
torch.set_num_threads(1); faiss.omp_set_num_threads(1)
import ibllm.cache, ibllm.files, ibllm.shards
form, shards, path = sys.argv[1:]
ibllm.shards.CHUNK = 64
ours = {room.__file__ for room in (ibllm.cache, ibllm.files, ibllm.shards)}
def die_after(lines):
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in ours: return None
        lines -= event == "line"
        if not lines: os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
def stored(file): return faiss.read_index(str(file)).ntotal
random.seed(form)
died = -signal.SIGKILL
while died == -signal.SIGKILL:
    child = os.fork()
    if not child:
        die_after(random.randint(1, 2000))
        ibllm.cache.VisualCache.build(shards, form, path=path)
        os._exit(0)
    random.random()  # the next child draws another number
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    unfinished = [stored(file) for file in Path(path).parent.glob("*.building")]
    print(max(unfinished or [6000 * Path(path).exists()]))
    complete = {file.name for file in Path(path).parent.iterdir()} == {"a.index", "a.index.json"}
    if complete and died == -signal.SIGKILL: died = 0  # killed when all was done
sys.exit(died)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_build_goes_on_to_the_same_bytes(form, tmp_path, monkeypatch):
    "Killed again and again, at lines of code drawn by chance, until one attempt lives to the end."
    memory, folder = clustered(6000), tmp_path / "killed"
    folder.mkdir()
    for number, rows in enumerate(memory.split(1000)):
        write_shard(rows, tmp_path / "shards", number)
    arguments = [form, tmp_path / "shards", folder / "a.index"]
    told = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    states = [int(line) for line in told.stdout.split()]
    assert states == sorted(states) and any(0 < n < 6000 for n in states), states
    monkeypatch.setattr(ibllm.shards, "CHUNK", 64)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # as those that were killed
    try:
        VisualCache.build(memory, form, path=tmp_path / "a.index")
    finally:
        faiss.omp_set_num_threads(threads)
    assert sorted(p.name for p in folder.iterdir()) == ["a.index", "a.index.json"]
    for name in ("a.index", "a.index.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_other_features_left_unfinished_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(ibllm.shards, "CHUNK", 256)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ibllm.cache.VisualCache, "save", stop)
        VisualCache.build(clustered(1000, seed=1), path=tmp_path / "a.index")
    assert [p.suffix for p in tmp_path.iterdir()] == [".building"]
    again = VisualCache.build(clustered(1000), path=tmp_path / "a.index")
    expected = VisualCache.build(clustered(1000)).enhance(clustered(5))
    assert torch.equal(again.enhance(clustered(5)), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.index", "a.index.json"]


# From images


def encode(images):
    return torch.stack([torch.tensor([float(image), 1.0]) for image in images])


def test_images_become_shards_in_order(tmp_path):
    for rank in (2, 0, 1):
        embed_images(list(range(1, 51)), encode, tmp_path, "0.5 1", rank, 3, size=7, batch=3)
    assert torch.equal(torch.cat(list(Shards(tmp_path))), encode(range(1, 51)))
    assert VisualCache.build(tmp_path).fingerprint == "0.5 1"
    assert all(not p.name.endswith(".part") for p in tmp_path.iterdir())


def test_images_are_encoded_once_and_what_is_missing_again(tmp_path):
    seen = []

    def watched(images):
        return seen.extend(images) or encode(images)

    embed_images(list(range(1, 51)), watched, tmp_path, size=10)
    (tmp_path / "000003.safetensors").unlink()
    with pytest.raises(ValueError, match="^features: got 4 shards in folder .*, wants 5$"):
        Shards(tmp_path)
    embed_images(list(range(1, 51)), watched, tmp_path, size=10)
    assert seen == [*range(1, 51), *range(31, 41)]


def test_shards_of_other_images_are_refused(tmp_path):
    embed_images(["1", "2"], encode, tmp_path)
    for images, fingerprint in ((["1", "3"], ""), (["1"], ""), (["1", "2"], "0.5")):
        with pytest.raises(
            ValueError,
            match="^folder: got .* with features of other images, encoder or size, wants",
        ):
            embed_images(images, encode, tmp_path, fingerprint)
    with pytest.raises(ValueError, match="^images: got none"):
        embed_images(tmp_path, encode, tmp_path / "none")


def test_a_folder_of_pictures_is_read_in_order_of_path(tmp_path):
    for name in ("b/1.PNG", "a/2.jpg", "a/1.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    seen = []

    def watched(paths):
        return seen.extend(paths) or torch.ones(len(paths), 2)

    embed_images(tmp_path, watched, tmp_path / "shards")
    assert [str(p.relative_to(tmp_path)) for p in seen] == ["a/1.webp", "a/2.jpg", "b/1.PNG"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("0.npy", b"no array"),
        ("0.safetensors", b"no tensors"),
        ("0.npy", b""),
        ("0.safetensors", b""),
        ("shards.json", b"["),
        ("shards.json", b"[]"),
    ],
)
def test_broken_shards_are_refused(name, content, tmp_path):
    write_shard(clustered(10), tmp_path, 1)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match="^features: got shard 0.*, wants|^path: got 'shards.json', wants a record"
    ) as error:
        VisualCache.build(tmp_path)
    assert "\n" not in str(error.value)


def test_shards_with_objects_or_other_tensors_are_refused(tmp_path):
    np.save(tmp_path / "0.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="^features: got shard 0.npy without features"):
        VisualCache.build(tmp_path)
    (tmp_path / "0.npy").unlink()
    save_file({"weights": clustered(3)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="^features: got shard 0.safetensors without features"):
        VisualCache.build(tmp_path)
    with pytest.raises(ValueError, match="^features: got 0 shards in folder .*, wants 1$"):
        VisualCache.build(tmp_path / "absent")


# The encoder that made it


def test_fingerprint_tells_encoders_apart_and_survives_half_precision(tmp_path):
    torch.manual_seed(0)
    nn = torch.nn
    first, second = (nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 4)) for _ in range(2))
    made = VisualCache.build(clustered(9), fingerprint=encoder_fingerprint(first))
    made.save(tmp_path / "a.index")
    cache = VisualCache.load(tmp_path / "a.index")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cache.check_encoder(encoder_fingerprint(copy.deepcopy(first).to(dtype)))
    for other in (second, first[:1]):
        with pytest.raises(
            ValueError, match="^fingerprint: got that of another encoder than the one that made"
        ):
            cache.check_encoder(encoder_fingerprint(other))
    cache.check_encoder("")
    VisualCache.build(clustered(9)).check_encoder(encoder_fingerprint(first))
    assert encoder_fingerprint(copy.deepcopy(first).to("meta")) == ""


def test_only_its_own_shards_count(tmp_path):
    embed_images([1, 2, 3], encode, tmp_path, size=2)
    write_shard(torch.ones(1, 2), tmp_path, 7)
    assert [path.name for path in Shards(tmp_path).paths] == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    (tmp_path / "000001.safetensors").unlink()
    with pytest.raises(ValueError, match="^features: got 1 shards in folder .*, wants 2$"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda images: encode(images)[1:],
            "^encode: got 1 features of 2 images, wants one for each$",
        ),
        (
            lambda images: encode(images) / (4 - images[-1]),
            "^encode: got NaN or infinite values in row 2, wants finite",
        ),
        (lambda images: torch.full((3, 2), torch.nan), "^encode: got 3 features of 2 images"),
        (lambda images: images, "^encode: got list, wants a tensor"),
    ],
)
def test_features_are_checked_as_they_are_made(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        embed_images([1, 2, 3, 4], wrong, tmp_path, size=2)
    assert not (tmp_path / "000001.safetensors").exists()


def test_features_do_not_keep_what_made_them():
    weight = torch.ones(2, requires_grad=True)
    made = ibllm.shards._encoded(lambda images: encode(images) * weight, [1, 2], 0)
    assert not made.requires_grad and torch.equal(made, encode([1, 2]))


# The disk


@contextmanager
def full_disk(room):
    "Files cannot grow beyond `room` bytes: a write fails half way, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("room", [0, 100, 9_000, 40_000])
def test_a_full_disk_leaves_the_old_memory(form, room, tmp_path):
    VisualCache.build(clustered(9), made_from="nine").save(tmp_path / "a.index")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    large = VisualCache.build(clustered(1500), form)
    with (
        full_disk(room),
        pytest.raises(OSError, match="path: got .*a.index', wants a file that can be") as error,
    ):
        large.save(tmp_path / "a.index")
    assert error.value.errno == errno.EFBIG and "\n" not in str(error.value)
    with full_disk(room), pytest.raises(OSError, match="path: got .*, wants a file that can be"):
        VisualCache.build(clustered(1500), form, path=tmp_path / "a.index")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_record_that_cannot_be_written_leaves_the_old_memory(tmp_path, monkeypatch):
    VisualCache.build(clustered(9), made_from="nine").save(tmp_path / "a.index")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OSError, match="path: got .*a.index', wants a file that can be .*No space left"
    ):
        VisualCache.build(clustered(10), made_from="ten").save(tmp_path / "a.index")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_index_under_the_record_of_another_is_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        VisualCache.build(clustered(9, seed=seed)).save(tmp_path / f"{name}.index")
    (tmp_path / "b.index").replace(tmp_path / "a.index")
    with pytest.raises(
        ValueError,
        match="^path: got .*a.index', which is not the file that its record was .*, wants",
    ):
        VisualCache.load(tmp_path / "a.index")


def test_a_full_disk_is_named_when_shards_are_written(tmp_path):
    with (
        full_disk(4_000),
        pytest.raises(
            OSError, match="^folder: got .*000000.safetensors', wants a file that can be"
        ),
    ):
        write_shard(clustered(1500), tmp_path, 0)
    with full_disk(4_000), pytest.raises(OSError, match="wants a file that can be written"):
        VisualCache.build(iter(clustered(1500).split(100)), path=tmp_path / "a.index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_truncated_index_is_refused(form, mmap, tmp_path):
    VisualCache.build(clustered(300), form, path=tmp_path / "a.index")
    whole = (tmp_path / "a.index").read_bytes()
    (tmp_path / "a.index.json").rename(tmp_path / "record")
    assert len(VisualCache.load(tmp_path / "a.index", mmap=mmap)) == 300
    for share in (0.01, 0.3, 0.6, 0.99):
        (tmp_path / "cut.index").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            ValueError, match="^path: got .*cut.index', wants a FAISS index, whole$"
        ):
            VisualCache.load(tmp_path / "cut.index", mmap=mmap)
    (tmp_path / "record").rename(tmp_path / "cut.index.json")
    with pytest.raises(
        ValueError, match="^path: got .* of .* bytes, wants .*, as its record says$"
    ):
        VisualCache.load(tmp_path / "cut.index")


MAPPED = """
import sys
from pathlib import Path
from ibllm.cache import VisualCache
def private():
    "Bytes that this process shares with no other and with no file."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"): return int(line.split()[1]) * 1024
before = private()
cache = VisualCache.load(sys.argv[1], mmap=sys.argv[2] == "True")
print(private() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("form", ["exact", "half", "8bit", "ivf-8bit", "hnsw"])
def test_a_mapped_memory_stays_in_its_file(form, tmp_path):
    path = tmp_path / "a.index"
    VisualCache.build(clustered(20_000, width=256), form, path=path)

    def taken(mmap):
        command = [sys.executable, "-c", MAPPED, str(path), str(mmap)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    mapped, loaded = taken(True), taken(False)
    assert loaded > 0.8 * path.stat().st_size and mapped < 0.4 * path.stat().st_size


# A GPU, played by the index itself


@pytest.mark.parametrize("form", ["exact", "half", "ivf-8bit"])
def test_searching_on_a_gpu_takes_the_vectors_from_main_memory(form, large, away, monkeypatch):
    cache, asked = VisualCache.build(large, form), []

    class Searcher:
        def search(self, query, k):
            return asked.append(len(query)) or cache.index.search(query, k)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *_: Searcher(), raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    expected = cache.enhance(away)
    assert torch.allclose(cache.to("cuda").enhance(away), expected, atol=1e-6) and asked == [300]
    with pytest.raises(ValueError, match="^k: got 5000, wants at most 2048"):
        cache.enhance(away, k=5000)
    with pytest.raises(ValueError, match="^device: got 'cuda:1', wants one of the 1 GPUs"):
        cache.to("cuda:1")
    assert cache.enhance(away[:7]).shape == (7, 32)
    assert asked == [300, 7], "still on the GPU it was on"
    for twin in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert twin.searcher is None and torch.equal(twin.enhance(away), expected)
    assert cache.searcher is not None and asked == [300, 7], "copies are searched on the CPU"
    assert torch.equal(cache.to("cpu").enhance(away), expected) and asked == [300, 7]


def test_gpu_is_refused_where_there_is_none(large, monkeypatch):
    cache = VisualCache.build(large)
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(RuntimeError, match="^device: got 'cuda', wants the package faiss-gpu"):
        cache.to("cuda")

    def refuse(*_):
        raise RuntimeError("not supported")

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    with pytest.raises(
        ValueError, match=r"cannot search this memory \(exact\): not supported, wants a memory in"
    ):
        cache.to("cuda:1")
    assert len(cache.enhance(large[:2])) == 2


# Settings for each row


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_settings_for_each_row_are_calls_of_their_own(seed, data):
    cache, query = VisualCache.build(features(30, seed=seed)), features(4, seed=seed + 1)
    values = st.integers(1, 30), st.floats(0, 100), st.floats(0, 1)  # k, temperature, weight
    each = [data.draw(st.lists(one, min_size=4, max_size=4)) for one in values]
    together = cache.enhance(query, *each)
    alone = [cache.enhance(row, *own) for row, *own in zip(query.split(1), *each)]
    # A similarity is rounded to 6e-8, which the softmax multiplies by up to 100, the temperature.
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


# Bad input

BAD = {
    "k below one": (dict(k=0), "^k: got 0, wants an integer from 1 to 6"),
    "k above the memory": (dict(k=7), "^k: got 7, wants an integer from 1 to 6"),
    "k not whole": (dict(k=2.5), "^k: got 2.5, wants an integer"),
    "weight negative": (dict(weight=-0.1), "^weight: got -0.1, wants a number from 0 to 1$"),
    "weight above one": (dict(weight=1.01), "^weight: got 1.01"),
    "weight nan": (dict(weight=float("nan")), "^weight: got nan"),
    "k for other rows": (
        dict(k=[1, 2, 3]),
        "^k: got 3 values, wants one, or one for each of the 2 features$",
    ),
    "k of a row": (dict(k=[1, 7]), r"^k: got \[1, 7\], wants an integer from 1 to 6"),
    "k in words": (dict(k="ten"), "^k: got 'ten', wants an integer from 1 to 6"),
    "no weight": (dict(weight=None), "^weight: got None, wants a number from 0 to 1$"),
    "many weights": (
        dict(feature=features(99), weight=torch.full((99,), 2.0)),
        "^weight: got tensor",
    ),
    "no k": (dict(k=[]), "^k: got 0 values"),
    "weight for other rows": (
        dict(weight=torch.ones(5)),
        "^weight: got 5 values, wants one, or one for each",
    ),
    "temperature of a row": (
        dict(temperature=[1, -1]),
        r"^temperature: got \[1, -1\], wants a number of at least 0$",
    ),
    "temperature negative": (
        dict(temperature=-1),
        "^temperature: got -1, wants a number of at least 0$",
    ),
    "temperature nan": (dict(temperature=float("nan")), "^temperature: got nan"),
    "temperature infinite": (dict(temperature=float("inf")), "^temperature: got inf"),
    "width": (dict(feature=torch.ones(1, 5)), "^feature: got width 5, wants 16"),
    "one dimension": (
        dict(feature=torch.ones(16)),
        r"^feature: got \(16,\), wants a tensor \[B, 16\]",
    ),
    "not a tensor": (dict(feature=[[1.0]]), "^feature: got list, wants a tensor"),
    "nan": (
        dict(feature=torch.full((1, 16), float("nan"))),
        "^feature: got NaN or infinite values",
    ),
    "zero": (
        dict(feature=torch.eye(16)[:2] * torch.tensor([[1], [0]])),
        "^feature: got a zero vector in row 1, wants",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_enhance_refuses(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        VisualCache.build(features()).enhance(
            **{"feature": features(2, seed=1), "k": 3} | arguments
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "memory, message",
    [
        (torch.ones(0, 4), "^features: got an empty memory"),
        (torch.zeros(2, 4), "^features: got a zero vector"),
        (torch.full((2, 4), float("inf")), "^features: got NaN or infinite"),
        (torch.ones(4), r"^features: got \(4,\), wants"),
        (np.ones((2, 4)), "^features: got ndarray, wants a tensor"),
        ([], "^features: got an empty memory"),
        (iter([]), "^features: got an empty memory"),
        ([torch.ones(2, 4), torch.ones(4)], r"^features: got \(4,\), wants"),
        ([torch.ones(2, 4), torch.ones(1, 5)], "^features: got width 5, wants 4"),
        (iter([torch.ones(2, 4), torch.ones(1, 5)]), "^features: got width 5, wants 4"),
        (
            [torch.ones(9, 4), torch.ones(9, 4) / 0],
            "^features: got NaN or infinite values in row 9",
        ),
    ],
)
def test_build_refuses(memory, message):
    with pytest.raises(ValueError, match=message) as error:
        VisualCache.build(memory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_one_bad_row_among_many_is_named(form, large):
    for bad, message in ((0.0, "a zero vector"), (float("nan"), "NaN or infinite values")):
        memory = large.clone()
        memory[4321] = bad
        with pytest.raises(ValueError, match=f"^features: got {message} in row 4321, wants"):
            VisualCache.build(memory.split(1000), form)


def test_load_refuses(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="^path: got .*absent.index', wants a file that exists$"
    ):
        VisualCache.load(tmp_path / "absent.index")
    for content in (b"", b"not an index", b"\x00" * 4096):
        (tmp_path / "bad.index").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(
                ValueError, match="^path: got .*bad.index', wants a FAISS index, whole$"
            ) as error:
                VisualCache.load(tmp_path / "bad.index", mmap=mmap)
            assert "\n" not in str(error.value)
    VisualCache.build(features()).save(tmp_path / "a.index")
    record = tmp_path / "a.index.json"
    record.write_text(record.read_text().replace('"count": 6', '"count": 7'))
    with pytest.raises(
        ValueError, match="with 6 features of width 16, wants 7 of width 16, as its record says$"
    ):
        VisualCache.load(tmp_path / "a.index")
    text = record.read_text().replace('"count": 7', '"count": 6')
    record.write_text(text.replace('"fingerprint": ""', '"fingerprint": 5'))
    with pytest.raises(
        ValueError, match="^path: got .* with 5 as fingerprint in its record, wants text$"
    ):
        VisualCache.load(tmp_path / "a.index")
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "empty.index"))
    with pytest.raises(ValueError, match="empty memory"):
        VisualCache.load(tmp_path / "empty.index")


# Whitening


def power(matrix, exponent):
    "Power of a symmetric matrix, to which the mean of its diagonal is added."
    values, vectors = np.linalg.eigh(matrix + matrix.diagonal().mean() * np.eye(len(matrix)))
    return vectors @ np.diag(values**exponent) @ vectors.T


def test_whitening_is_its_formula(large, away):
    whitening, x, m = Whitening.fit(away, large), away.double().numpy(), large.double().numpy()
    moved = (x - x.mean(0)) @ power(np.cov(x.T), -0.5) @ power(np.cov(m.T), 0.5) + m.mean(0)
    expected = F.normalize(torch.from_numpy(moved), dim=1).float()
    assert torch.allclose(whitening(away), expected, atol=1e-5)
    alone = torch.cat([whitening(row) for row in away.split(1)])
    assert torch.allclose(alone, whitening(away), atol=1e-6)


def test_whitening_gives_a_modality_the_mean_and_spread_of_the_memory(large, away):
    gap = (away.mean(0) - large.mean(0)).norm()
    moved = Whitening.fit(away, large)(away)
    assert (moved.mean(0) - large.mean(0)).norm() < 0.2 * gap
    wanted = torch.cov(large.T)
    before = (torch.cov(away.T) - wanted).norm()
    assert (torch.cov(moved.T) - wanted).norm() < before
    same = Whitening.fit(large, large)(large)
    assert F.cosine_similarity(same, large).min() > 0.999  # nothing to correct


@pytest.mark.parametrize("form", FORMS)
def test_whitening_takes_the_memory_in_any_form(form, large, away):
    expected = Whitening.fit(away, large)(away)
    moved = Whitening.fit(away, VisualCache.build(large, form))(away)
    assert F.cosine_similarity(moved, expected).min() > 0.999


def test_whitening_keeps_dtype(large, away):
    assert Whitening.fit(away, large)(away.half()).dtype == torch.float16


@pytest.mark.parametrize(
    "features, memory, message",
    [
        (
            clustered(31),
            clustered(99),
            "^features: got 31, wants at least 32, one for each of their dimensions$",
        ),
        (
            clustered(99, width=16),
            clustered(99),
            "^features: got width 16, wants 32, the width of this memory$",
        ),
        (clustered(99) / 0, clustered(99), "^features: got NaN or infinite values in row 0"),
        (clustered(99), torch.ones(4), r"^memory: got \(4,\), wants a tensor"),
        ([[1.0]], clustered(99), "^features: got list, wants a tensor"),
    ],
)
def test_whitening_refuses(features, memory, message):
    with pytest.raises(ValueError, match=message) as error:
        Whitening.fit(features, memory)
    assert "\n" not in str(error.value)


def test_whitening_refuses_features_of_another_width(large, away):
    with pytest.raises(ValueError, match="^feature: got width 16, wants 32"):
        Whitening.fit(away, large)(features(2))
