"""The encoders against the recorded published model, and inputs they must refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from ibllm.config import ImageBindConfig, VisionConfig
from ibllm.encoders import ImageBind, group_points, resize_positions

GOLDEN = Path(__file__).parent / "golden" / "imagebind_tiny"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCE = META["tolerance"]

# released name -> ours; tried in order, every match is applied
RENAME = [
    (r"^modality_preprocessors\.(\w+)\.", r"towers.\1.stem."),
    (r"^modality_trunks\.(\w+)\.", r"towers.\1.transformer."),
    (r"^modality_heads\.(\w+)\.", r"towers.\1.head."),
    (r"^modality_postprocessors\.(\w+)\.1\.", r"towers.\1."),
    (r"^point_trunk\.pc_projection$", "towers.point.projection"),
    (r"^point_trunk\.point_encoder\.blocks\.", "towers.point.transformer."),
    (r"^point_trunk\.point_encoder\.norm\.", "towers.point.norm."),
    (r"^point_trunk\.point_encoder\.", "towers.point.stem."),
    (r"\.stem\.mask$", ".causal_mask"),
    (r"\.(pos_embedding_helper\.)?pos_embed(?=$|\.\d)", ".position"),
    (r"\.token_embedding\.", ".embedding."),
    (r"\.cls_token$", ".class_token"),
    (r"\.cls_pos$", ".class_position"),
    (r"\.(rgbt|depth)_stem\.proj\.(1\.)?weight$", ".weight"),
    (r"\.(rgbt|depth|imu)_stem\.norm_layer\.", ".norm."),
    (r"\.imu_stem\.proj\.", ".projection."),
    (r"\.pre_transformer_layer\.0\.", ".norm."),
    (r"\.norm_?1\.", ".attention_norm."),
    (r"\.norm_?2\.", ".mlp_norm."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attention.qkv.\1"),
    (r"\.attn\.bias_k$", ".attention.bias_key"),
    (r"\.attn\.bias_v$", ".attention.bias_value"),
    (r"\.attn\.(out_proj|proj)\.", ".attention.output."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.mlp\.fc1\.", ".expand."),
    (r"\.mlp\.fc2\.", ".contract."),
    (r"\.head\.(proj\.)?0\.", ".head.norm."),
    (r"\.head\.(proj\.)?[123]\.", ".head.projection."),
    (r"\.encoder\.first_conv\.0\.", ".encoder.conv_1."),
    (r"\.encoder\.first_conv\.1\.", ".encoder.batch_norm_1."),
    (r"\.encoder\.first_conv\.3\.", ".encoder.conv_2."),
    (r"\.encoder\.second_conv\.0\.", ".encoder.conv_3."),
    (r"\.encoder\.second_conv\.1\.", ".encoder.batch_norm_2."),
    (r"\.encoder\.second_conv\.3\.", ".encoder.conv_4."),
    (r"\.reduce_dim\.", ".projection."),
]


def rename(key):
    for pattern, replacement in RENAME:
        key = re.sub(pattern, replacement, key)
    return key


def golden_config():
    "The recorded model's dimensions, as a config."
    a, side, trunk = META["constructor_arguments"], 112, META["point_trunk_config"]
    tower = {
        n: dict(width=a[f"{n}_embed_dim"], blocks=a[f"{n}_num_blocks"], heads=a[f"{n}_num_heads"])
        for n in ("vision", "text", "audio", "depth", "thermal", "imu")
    }
    for name in ("vision", "depth", "thermal"):
        tower[name]["size"] = (side, side)
    tower["text"]["vocabulary"] = META["changed_constants"]["text_vocab (official 49408)"]
    tower["point"] = dict(
        width=trunk["trans_dim"],
        blocks=trunk["depth"],
        heads=trunk["num_heads"],
        groups=trunk["num_group"],
        group_size=trunk["group_size"],
        group_widths=(128, 256, 512, trunk["encoder_dims"]),
    )
    return ImageBindConfig.from_dict(dict(feature_dim=a["out_embed_dim"], **tower))


@pytest.fixture(scope="module")
def model():
    model = ImageBind(golden_config()).eval()
    model.load_state_dict(
        {rename(k): v for k, v in load_file(GOLDEN / "weights.safetensors").items()}
    )
    return model


@pytest.fixture(scope="module")
def inputs():
    return {
        k: v if k == "text" else v.float()
        for k, v in load_file(GOLDEN / "inputs.safetensors").items()
    }


@pytest.fixture(scope="module")
def outputs():
    return load_file(GOLDEN / "outputs.safetensors")


CASES = dict(
    vision_image="image",
    vision_clips_5d="image",
    vision_video_6d="video",
    text="text",
    audio_clips="audio",
    audio_single="audio",
    depth="depth",
    thermal="thermal",
    imu="imu",
    point="point",
)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden(model, inputs, outputs, case):
    x, modality = inputs[case], CASES[case]
    assert_close(model.released(modality, x), outputs[f"{case}/normalized"], **TOLERANCE)
    assert_close(model.prenorm(modality, x), outputs[f"{case}/prenorm"], **TOLERANCE)
    feature = F.normalize(outputs[f"{case}/normalized"], dim=-1)
    assert_close(model.encode(modality, x), feature, **TOLERANCE)


@torch.no_grad()
def test_golden_point_trunk_and_random_start(model, inputs, outputs):
    points, start = inputs["point"], outputs["point_random_start/start_index"]
    centres, _ = group_points(points, 16, 8)
    assert torch.equal(centres, outputs["point/centers"])
    assert_close(model.tower("point").trunk(points), outputs["point/trunk"], **TOLERANCE)
    for kind, function in (("normalized", model.released), ("prenorm", model.prenorm)):
        expected = outputs[f"point_random_start/{kind}"]
        assert_close(function("point", points, start=start), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "name, case", [("vision", "vision_image"), ("audio", "audio_single"), ("imu", "imu")]
)
@torch.no_grad()
def test_golden_tokens(model, inputs, outputs, name, case):
    tower = model.towers[name]
    tokens = tower.stem(inputs[case])
    assert_close(tokens[0, :5], outputs[f"debug/{name}_tokens"], **TOLERANCE)
    if name != "imu":
        assert_close(tower.transformer(tokens)[0, :5], outputs[f"debug/{name}_trunk"], **TOLERANCE)


def test_every_golden_output_is_checked(outputs):
    checked = {f"{case}/{kind}" for case in CASES for kind in ("normalized", "prenorm")}
    checked |= {"point/centers", "point/trunk"}
    checked |= {f"point_random_start/{kind}" for kind in ("normalized", "prenorm", "start_index")}
    checked |= {f"debug/{name}_tokens" for name in ("vision", "audio", "imu")}
    checked |= {f"debug/{name}_trunk" for name in ("vision", "audio")}
    assert checked == set(outputs)


@pytest.mark.parametrize("point, keys", [(True, 1476), (False, 1311)])
def test_published_number_of_keys(point, keys):
    config = ImageBindConfig() if point else ImageBindConfig(point=None)
    with torch.device("meta"):
        assert len(ImageBind(config).state_dict()) == keys


GOOD = {
    "image": (1, 3, 112, 112),
    "video": (1, 1, 3, 2, 112, 112),
    "audio": (1, 1, 128, 204),
    "point": (1, 20, 3),
    "depth": (1, 1, 112, 112),
    "thermal": (1, 1, 112, 112),
    "imu": (1, 6, 2000),
}
BAD_SHAPES = [
    ("image", (3, 112, 112)),
    ("image", (1, 1, 112, 112)),
    ("image", (1, 1, 1, 3, 112, 112)),
    ("image", (0, 3, 112, 112)),
    ("image", (2, 0, 3, 112, 112)),
    ("image", (1, 3, 112, 126)),
    ("image", (1, 3, 8, 8)),
    ("video", (1, 3, 112, 112)),
    ("video", (1, 1, 3, 4, 112, 112)),
    ("audio", (1, 128, 204)),
    ("audio", (1, 1, 128, 100)),
    ("point", (1, 20, 4)),
    ("point", (1, 15, 3)),
    ("point", (20, 3)),
    ("depth", (1, 3, 112, 112)),
    ("thermal", (1, 1, 112, 100)),
    ("imu", (1, 2000, 6)),
    ("imu", (1, 6, 1999)),
]


@pytest.mark.parametrize("modality, shape", BAD_SHAPES)
def test_refuses_shapes(model, modality, shape):
    with pytest.raises(
        ValueError, match="^(size|video|point|image|audio|depth|thermal|imu): got .*, wants "
    ) as error:
        model.encode(modality, torch.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("modality", GOOD)
def test_refuses_values_and_types(model, modality):
    x = torch.ones(GOOD[modality])
    for bad in (x.to(torch.uint8), x.long(), x * torch.nan, x * torch.inf, x.tolist(), None):
        with pytest.raises(ValueError, match=f"^{modality}: got .*, wants"):
            model.encode(modality, bad)
    with pytest.raises(ValueError, match=f"^{modality}: got ndarray, wants"):
        model.encode(modality, x.numpy())


BAD_IDS = [
    torch.zeros(1, 78, dtype=torch.long),
    torch.tensor([[-1]]),
    torch.tensor([[512]]),
    torch.tensor([1]),
    torch.ones(1, 5),
    torch.zeros(0, 5, dtype=torch.long),
    torch.zeros(1, 0, dtype=torch.long),
]


@pytest.mark.parametrize("ids", BAD_IDS)
def test_refuses_ids(model, ids):
    with pytest.raises(ValueError, match="^text: got"):
        model.encode("text", ids)


@pytest.mark.parametrize("modality", ["vision", "IMAGE", "", None, 3, ["image"]])
def test_refuses_modalities(model, modality):
    with pytest.raises(ValueError, match="^modality: got .*, wants one of image, video, text"):
        model.encode(modality, torch.zeros(1))


def test_refuses_configs():
    for values, start in (
        (dict(sound={}), "config: got unknown keys"),
        (dict(audio=dict(stripe=3)), "audio: got unknown keys"),
        (dict(audio=dict(width=30)), "width: got 30, wants a multiple of `heads`, 12"),
        (dict(vision=dict(frames=3)), "frames: got 3, wants a multiple of 2"),
        (dict(depth=dict(size=[8, 8])), r"size: got \(8, 8\), wants at least one patch, 16 x 16"),
    ):
        with pytest.raises(ValueError, match=f"^{start}"), torch.device("meta"):
            ImageBind(ImageBindConfig.from_dict(values))


def test_towers_are_optional():
    absent = dict.fromkeys(("vision", "text", "point", "depth", "thermal", "imu"))
    audio = dict(width=16, blocks=1, heads=2, size=[20, 30], kernel=8, stride=5)
    only = ImageBind(ImageBindConfig.from_dict(dict(feature_dim=8, audio=audio, **absent)))
    assert list(only.towers) == ["audio"]
    assert only.encode("audio", torch.randn(3, 1, 20, 30)).shape == (3, 8)
    with pytest.raises(ValueError, match="^modality: got 'image', wants one of audio$"):
        only.encode("image", torch.zeros(1, 3, 8, 8))


def test_more_frames_than_a_tube():
    config = VisionConfig(
        width=16, blocks=1, heads=2, size=(16, 16), kernel=8, stride=8, frames=4, kernel_frames=2
    )
    model = ImageBind(ImageBindConfig(8, config, *[None] * 6)).eval()
    stills = torch.randn(2, 3, 16, 16)
    frozen = stills[:, :, None].expand(-1, -1, 4, -1, -1)
    assert_close(model.encode("image", stills), model.encode("video", frozen))
    clip, stem = torch.randn(2, 3, 4, 16, 16), model.tower("video").stem
    expected = F.conv3d(clip, stem.weight, stride=(2, 8, 8)).flatten(2).transpose(1, 2)
    assert_close(stem.cut(clip), expected, atol=1e-5, rtol=1e-4)


def test_other_square_sizes(model):
    assert_close(resize_positions(torch.ones(1, 17, 3), (1, 4, 4), (1, 7, 7)), torch.ones(1, 50, 3))
    table = torch.randn(1, 17, 3)
    assert_close(resize_positions(table, (1, 4, 4), (1, 4, 4)), table)
    for modality in ("image", "depth", "thermal"):
        x = torch.randn(2, 3 if modality == "image" else 1, 144, 144)
        assert_close(model.encode(modality, x).norm(dim=1), torch.ones(2))


def test_float_types_are_converted(model, inputs):
    for modality, case in dict(image="vision_image", point="point", imu="imu").items():
        double, single = inputs[case].double(), inputs[case]
        assert_close(model.encode(modality, double), model.encode(modality, single))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_autocast_agrees(model, inputs, case):
    full = model.encode(CASES[case], inputs[case])
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode(CASES[case], inputs[case])
    assert F.cosine_similarity(half.float(), full).min() > 0.99


def test_training_mode_is_random_and_eval_is_not(inputs):
    model = ImageBind(golden_config())
    for modality in ("imu", "point"):
        x = inputs[modality]
        model.train()
        assert not torch.equal(model.encode(modality, x), model.encode(modality, x))
        model.eval()
        assert torch.equal(model.encode(modality, x), model.encode(modality, x))


def test_a_repeated_point_is_no_obstacle(model):
    assert model.encode("point", torch.zeros(2, 30, 3)).isfinite().all()
