"Configurations: JSON and back, and every kind of value that does not belong there."

import copy
import enum
import json
import math
import pickle
from dataclasses import asdict, fields, is_dataclass

import numpy as np
import pytest

import ibllm.config
from ibllm.config import (
    LARGEST,
    BindConfig,
    CacheSettings,
    Config,
    ImageBindConfig,
    InputConfig,
    ModelConfig,
    TextConfig,
    TowerConfig,
    VisionConfig,
)

CLASSES = [
    kind
    for kind in vars(ibllm.config).values()
    if isinstance(kind, type) and issubclass(kind, Config) and kind is not Config
]
FIELDS = [(kind, field) for kind in CLASSES for field in fields(kind)]


class Five(enum.IntEnum):
    FIVE = -5


def by_class(value):
    return getattr(value, "__name__", None) or getattr(value, "name", None)


@pytest.mark.parametrize("kind", CLASSES, ids=by_class)
def test_json_and_back(kind):
    config = kind()
    again = kind.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and asdict(again) == asdict(config)
    assert kind.from_dict({}) == config == copy.deepcopy(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_changed_values_come_back():
    config = ModelConfig()
    config.encoder.imu = None
    config.encoder.depth.size = [32, 48]
    config.inputs.audio_high_hz = 4000
    config.bind = BindConfig(num_blocks=0, norm="layer")
    config.cache.k, config.layers = 0, 3
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config != ModelConfig()
    assert again.encoder.depth.size == (32, 48) and list(again.encoder.towers)[-1] == "thermal"


@pytest.mark.parametrize("kind, field", FIELDS, ids=by_class)
def test_a_field_is_checked_when_made_and_when_set(kind, field):
    "Whatever is of another type, made with it or changed to it; what was there stays."
    for wrong in ({"a": 1}, [[1.0]], object(), math.nan, 10**10_000, b"x", np.float64("nan")):
        with pytest.raises(ValueError, match=f"^{field.name}: got .*, wants "):
            kind(**{field.name: wrong})
        with pytest.raises(ValueError, match=f"^{field.name}: got .*, wants "):
            kind.from_dict({field.name: wrong})
        config = kind()
        with pytest.raises(ValueError, match=f"^{field.name}: got .*, wants "):
            setattr(config, field.name, wrong)
        assert config == kind()


WRONG = {
    int: [True, 1.0, "1", None, 0, -1, LARGEST + 1, 2**70, Five.FIVE, np.int64(3)],
    float: [True, "1", None, math.nan, math.inf, -math.inf, 1e30, 1e300, 10**31, -(10**40)],
    bool: [0, 1, "True", None, 1.0],
    str: [None, 5, b"rms", ["rms"]],
    tuple: [(1,), (1, 2, 3, 4, 5), "ab", None, 3, (None, None), ("1", "2"), (True, True), [[1], 2]],
}
OF_TYPE = {
    int: (TowerConfig, "width"),
    float: (InputConfig, "depth_scale"),
    bool: (CacheSettings, "whiten"),
    str: (BindConfig, "norm"),
    tuple: (VisionConfig, "size"),
}
CASES = [(kind, value) for kind, values in WRONG.items() for value in values]
CASES += [(tuple, value) for value in [(0, 1), (1.0, 2.0), (LARGEST + 1, 1), (math.nan, 1)]]


@pytest.mark.parametrize("of_type, value", CASES, ids=lambda value: str(value)[:12])
def test_wrong_values(of_type, value):
    kind, name = OF_TYPE[of_type]
    config = kind()
    for attempt in (lambda: kind(**{name: value}), lambda: setattr(config, name, value)):
        with pytest.raises(ValueError, match=f"^{name}: got .*, wants ") as error:
            attempt()
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert config == kind()


@pytest.mark.parametrize("value", [(math.nan, 1.0), (1.0, math.inf), (True, 1.0), (1, "2"), (1,)])
def test_wrong_values_in_a_tuple_of_floats(value):
    with pytest.raises(ValueError, match="^depth_range: got .*, wants 2 values, each a finite"):
        InputConfig(depth_range=value)
    with pytest.raises(ValueError, match="^depth_range: got .*, wants 2 values, each a finite"):
        InputConfig.from_dict({"depth_range": list(value)})


def test_what_json_writes_otherwise_is_taken():
    config = InputConfig.from_dict({"depth_range": [0, 2], "audio_rate": 8000, "audio_std": 9})
    assert config.depth_range == (0.0, 2.0) and type(config.depth_range[0]) is float
    assert type(config.audio_std) is float and type(config.audio_rate) is int
    assert TowerConfig(logit_scale=None).logit_scale is None
    assert CacheSettings(k=0).k == 0


TOGETHER = [
    (InputConfig, "video_crops", 2),
    (InputConfig, "image_size", 100_000),
    (InputConfig, "points", LARGEST * 1024),
    (InputConfig, "audio_clips", LARGEST),
    (TowerConfig, "blocks", 1001),
    (TowerConfig, "drop_path", 1.0),
    (TowerConfig, "dropout", -0.1),
    (TowerConfig, "logit_scale", 0),
    (TextConfig, "logit_scale", None),
    (BindConfig, "num_blocks", 1001),
    (CacheSettings, "temperature", -1.0),
    (CacheSettings, "weight", 1.5),
]


@pytest.mark.parametrize("kind, name, value", TOGETHER)
def test_what_the_type_does_not_show_is_checked_too(kind, name, value):
    config = kind()
    for attempt in (lambda: kind(**{name: value}), lambda: setattr(config, name, value)):
        with pytest.raises(ValueError, match=f"^{name}: got .*, wants ") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert config == kind()


@pytest.mark.parametrize(
    "values, start",
    [
        (None, "config: got None, wants a dict"),
        ([], r"config: got \[\], wants a dict"),
        ({"bnd": {}}, r"config: got unknown keys \['bnd'\], wants some of"),
        ({1: {}, None: 3}, r"config: got unknown keys \['1', 'None'\]"),
        ({"bind": None}, "bind: got None, wants BindConfig"),
        ({"bind": []}, r"bind: got \[\], wants a dict"),
        ({"encoder": {"text": {"widht": 3}}}, r"text: got unknown keys \['widht'\]"),
        ({"encoder": {"text": {"width": None}}}, "width: got None, wants a whole number"),
        ({"encoder": None}, "encoder: got None, wants ImageBindConfig"),
        ({f"key {i}": i for i in range(10**5)}, "config: got unknown keys"),
    ],
    ids=range(10),
)
def test_wrong_dicts(values, start):
    with pytest.raises(ValueError, match=f"^{start}") as error:
        ModelConfig.from_dict(values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_tower_may_be_left_out_and_nothing_else():
    assert "text" not in ImageBindConfig.from_dict({"text": None}).towers
    with pytest.raises(ValueError, match="^text: got TowerConfig.*, wants TextConfig or None"):
        ImageBindConfig(text=TowerConfig())


def test_unknown_fields_cannot_be_set():
    config = BindConfig()
    with pytest.raises(ValueError, match="^blocks: got an unknown field, wants one of num_blocks"):
        config.blocks = 3
    assert not hasattr(config, "blocks")


def test_no_class_is_forgotten():
    assert len(CLASSES) == 14 and all(map(is_dataclass, CLASSES))
