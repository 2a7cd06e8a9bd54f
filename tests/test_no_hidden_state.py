"A model answers the same whoever else asks, whatever went wrong before, and however often."

import gc
import threading
from functools import partial

import numpy as np
import pytest
import torch
from limits import LINUX, resident

import ibllm
from ibllm.config import CacheSettings
from ibllm.toyland.sensors import AUDIO_RATE, record
from ibllm.toyland.world import draw_things

QUESTION = "describe it ."


@pytest.fixture(scope="module")
def model():
    return ibllm.load("toyland")


@pytest.fixture(scope="module")
def requests():
    "Requests of many modalities, mixtures and settings: (inputs, prompt, options)."
    things = draw_things(6, seed=5)
    seen = record(things, 5)

    def bell(i):
        return seen["audio"][i].numpy(), AUDIO_RATE

    settings = CacheSettings(k=5, weight=0.9)
    both = {"depth": seen["depth"][3].numpy(), "audio": bell(3)}
    weights = {"depth": 0.3, "audio": 0.7}
    return [
        ({"image": seen["image"][0].numpy()}, QUESTION, {}),
        ({"image": seen["image"][1].numpy()}, "what is it ?", {"cache": False}),
        ({"audio": bell(2)}, QUESTION, {"cache": settings}),
        (both, QUESTION, {"scale": 0.8, "weights": weights}),
        ({"point": seen["point"][4].numpy()}, "which colour has it ?", {}),
        ({}, "what is it ?", {}),
        (None, "what is it ?", {}),
        ({"thermal": seen["thermal"][5].numpy()}, QUESTION, {"num_beams": 2}),
    ]


def ask(model, request):
    inputs, prompt, options = request
    return model.generate(inputs, prompt, max_new_tokens=12, do_sample=False, **options)


@pytest.fixture(scope="module")
def alone(model, requests):
    return [ask(model, request) for request in requests]


def side_by_side(*works):
    "Run each in a thread of its own, all started together; an error in one is raised here."
    barrier, found = threading.Barrier(len(works)), [None] * len(works)

    def run(i):
        barrier.wait()
        try:
            found[i] = works[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found


def test_requests_differ(alone):
    assert len({tuple(answer) for answer in alone}) > 4


@pytest.mark.parametrize("first", range(8))
def test_two_threads_get_the_answers_they_get_alone(first, model, requests, alone):
    second = (first + 3) % len(requests)

    def several(i):
        return [ask(model, requests[i]) for _ in range(4)]

    answers = side_by_side(partial(several, first), partial(several, second))
    assert answers == [[alone[first]] * 4, [alone[second]] * 4]


def test_a_stream_beside_a_request(model, requests, alone):
    def stream():
        pieces = model.stream(*requests[0][:2], max_new_tokens=12, do_sample=False)
        return "".join(pieces).strip()

    assert side_by_side(stream, lambda: ask(model, requests[2])) == [alone[0][0], alone[2]]


MAP = {"depth": np.ones((32, 32))}
BROKEN = {
    "missing file": lambda m: m.generate({"image": "nothing.png"}, QUESTION),
    "wrong shape": lambda m: m.generate({"image": np.zeros(5, np.uint8)}, QUESTION),
    "half a mixture": lambda m: m.generate({**MAP, "audio": "nothing.wav"}, QUESTION),
    "empty prompt": lambda m: m.generate({}, " "),
    "no such cache setting": lambda m: m.generate(MAP, QUESTION, cache={"j": 1}),
    "too many neighbours": lambda m: m.generate(MAP, QUESTION, cache=CacheSettings(k=10**6)),
    "no such weight": lambda m: m.generate(MAP, QUESTION, weights={"audio": 1.0}),
    "unknown option": lambda m: m.generate({}, QUESTION, flavour="sweet"),
    "out of the middle": lambda m: m.generate({}, QUESTION, stopping_criteria=[stop]),
    "stream": lambda m: [*m.stream({}, QUESTION, stopping_criteria=[stop])],
}


def stop(ids, scores, **_):
    if ids.shape[1] > 12:
        raise ArithmeticError("in the middle of an answer")
    return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_after_an_error_the_model_answers_as_before(broken, model, requests, alone):
    with pytest.raises((ValueError, OSError, ArithmeticError, TypeError)):
        broken(model)
    assert [ask(model, request) for request in requests[:4]] == alone[:4]


def state(model):
    "All that could remember a request: hooks, plain attributes of all parts, settings, weights."
    hooks, plain = 0, {}
    for name, part in model.named_modules():
        for key, value in vars(part).items():
            if key.endswith("_hooks"):
                hooks += len(value)
            if isinstance(value, (bool, int, float, str, tuple, list, type(None))):
                plain[f"{name}.{key}"] = repr(value)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return hooks, plain, model.llm.generation_config.to_dict(), weights


def test_a_request_leaves_nothing_behind(model, requests):
    threads, (hooks, plain, settings, weights) = threading.active_count(), state(model)
    modules = [name for name, _ in model.named_modules()]
    for request in requests:
        ask(model, request)
    [*model.stream({}, QUESTION, max_new_tokens=3)]
    after = state(model)
    assert after[:3] == (hooks, plain, settings)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, weights[name]) for name, value in after[3].items())
    assert threading.active_count() == threads and torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not LINUX, reason="reads memory from Linux")
def test_memory_stays_flat_over_a_thousand_requests(model, requests):
    def some(n):
        for i in range(n):
            model.generate(*requests[i % 6][:2], max_new_tokens=2, do_sample=False)
        gc.collect()
        return resident()

    settled = some(50)
    assert some(1000) < 1.05 * settled


def random_states():
    import random

    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_random_generators_move_only_when_sampling(model, requests):
    before = random_states()
    for request in requests:
        ask(model, request)
    [*model.stream({}, QUESTION, max_new_tokens=3, do_sample=False)]
    assert random_states() == before
    model.generate({}, QUESTION, max_new_tokens=3, do_sample=True)
    assert torch.get_rng_state().tolist() != before[0] and random_states()[1:] == before[1:]


def test_sampling_is_repeatable_from_a_seed(model, requests):
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}

    def sample():
        torch.manual_seed(7)
        return [model.generate(*request[:2], **options) for request in requests]

    assert sample() == sample()
