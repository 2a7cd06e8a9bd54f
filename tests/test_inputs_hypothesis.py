"""Every loader survives every file: a tensor, or one line that names the file, in 10 s and 2 GB.

The examples are the same in every run; `settings(derandomize=False, max_examples=10_000)` looks for
new ones.
"""

import io
import re
import struct
import warnings
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import OpenEXR
import pytest
import soundfile
import torch
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import within
from PIL import Image

from ibllm.config import InputConfig
from ibllm.inputs.processor import LOADERS, Processor
from ibllm.inputs.sources import InputError

torch.set_num_threads(1)
FOLDER = TemporaryDirectory()
settings.register_profile(
    "files",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
files = settings.get_profile("files")


class Words:
    "As much of a tokenizer as `load_text` needs."

    bos_token_id, eos_token_id = 1, 2

    def __len__(self):
        return 3

    def __call__(self, texts, **_):
        return {"input_ids": [[0] * len(text.encode()) for text in texts]}


PROCESSOR = Processor(InputConfig(image_size=16, points=64), Words())


def load(modality, data, kind):
    "The tensor of a file, or None where it was refused in one line that names it."
    path = Path(FOLDER.name, f"recording.{kind}")
    path.write_bytes(data)
    try:
        with within(), warnings.catch_warnings():
            warnings.simplefilter("error")
            x = PROCESSOR(modality, path)
        assert len(x) == 1 and x.isfinite().all()
        return x
    except InputError as error:
        text = str(error)
        assert text.startswith(f"{path}: got ") and ", wants " in text, text
        assert "\n" not in text and len(text) < 300 + len(str(path)), text


# Good files, a few kilobytes each

PIXELS = np.arange(18 * 32 * 3, dtype=np.uint8).reshape(18, 32, 3)
MAP = (
    np.linspace(28_000, 30_000, 24 * 32).reshape(24, 32).astype(np.uint16)
)  # hundredths of a kelvin, or millimetres
WAVE = 0.3 * np.sin(np.arange(2000) / 5)
CLOUD = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def film(kind, codec="mpeg4", pixels="yuv420p", sound=None, side=1):
    with io.BytesIO() as file:
        with av.open(file, "w", format=kind) as container:
            shape = dict(width=32 * side, height=18 * side)
            stream = (
                container.add_stream(codec, rate=10, pix_fmt=pixels, **shape) if codec else None
            )
            track = container.add_stream(sound, rate=16_000, layout="mono") if sound else None
            for shift in range(4 if stream else 0):
                picture = av.VideoFrame.from_ndarray(
                    np.roll(PIXELS, shift, 1).repeat(side, 0).repeat(side, 1), "rgb24"
                )
                container.mux(stream.encode(picture))
            if stream:
                container.mux(stream.encode())
            if track:
                wave = av.AudioFrame.from_ndarray(
                    np.float32(WAVE)[None], format="fltp", layout="mono"
                )
                wave.sample_rate = 16_000
                for piece in av.AudioResampler("fltp", "mono", 16_000, frame_size=1024).resample(
                    wave
                ):
                    container.mux(track.encode(piece))
                container.mux(track.encode())
        return file.getvalue()


def written(write, *arguments):
    "What `write` writes into an open file."
    write(file := io.BytesIO(), *arguments)
    return file.getvalue()


def sound(file, kind):
    soundfile.write(file, WAVE, 8000, format=kind)


def exr(**header):
    path = Path(FOLDER.name, "map.exr")
    OpenEXR.File(header, {"Z": np.float32(MAP / 1e4)}).write(str(path))
    return path.read_bytes()


def pcd(points, form, rows, kind="F", size=4):
    fields = f"FIELDS x y z\nSIZE {size} 4 4\nTYPE {kind} F F\nCOUNT 1 1 1\n"
    head = "VERSION 0.7\n" + fields + "WIDTH 9\nHEIGHT 1\n"
    return (head + f"POINTS {points}\nDATA {form}\n").encode() + rows


@lru_cache
def good_files():
    "{(modality, kind): contents}."
    picture, deep = Image.fromarray(PIXELS), Image.fromarray(MAP)
    box, rows = trimesh.creation.box(), "".join(f"{x} {y} {z}\n" for x, y, z in CLOUD).encode()
    found = {
        ("image", kind): written(picture.save, kind)
        for kind in (
            "png",
            "jpeg",
            "gif",
            "webp",
            "tiff",
            "bmp",
            "ppm",
            "jpeg2000",
            "avif",
            "tga",
            "ico",
            "pcx",
        )
    }
    found |= {
        ("video", "mp4"): film("mp4"),
        ("video", "mkv"): film("matroska", "ffv1", "bgr0"),
        ("video", "gif"): film("gif", "gif", "rgb8"),
        ("video", "ts"): film("mpegts", "mpeg2video"),
    }
    found |= {
        ("audio", kind): written(sound, kind.upper())
        for kind in ("wav", "flac", "ogg", "mp3", "aiff")
    }
    found |= {
        ("audio", "m4a"): film("mp4", None, sound="aac"),
        ("audio", "mov"): film("mov", sound="aac"),
    }
    found |= {
        ("point", kind): box.export(file_type=kind)
        for kind in ("ply", "obj", "off", "stl", "stl_ascii")
    }
    found |= {
        ("point", "xyz"): rows,
        ("point", "pts"): b"40\n" + rows,
        ("point", "pcd"): pcd(40, "ascii", rows),
        ("point", "binary.pcd"): pcd(40, "binary", CLOUD.tobytes()),
        ("point", "npy"): written(np.save, CLOUD),
        ("point", "npz"): written(lambda file: np.savez_compressed(file, points=CLOUD)),
        ("point", "pt"): written(lambda file: torch.save(torch.tensor(CLOUD), file)),
        ("point", "old.pt"): written(
            lambda file: torch.save(torch.tensor(CLOUD), file, _use_new_zipfile_serialization=False)
        ),
    }
    for modality in ("depth", "thermal"):
        found |= {(modality, kind): written(deep.save, kind) for kind in ("png", "tiff")}
        found |= {
            (modality, "npy"): written(np.save, MAP / 1e4),
            (modality, "exr"): exr(),
            (modality, "tiled.exr"): exr(
                type=OpenEXR.tiledimage,
                tiles=OpenEXR.TileDescription(),
                compression=OpenEXR.PIZ_COMPRESSION,
            ),
        }
    reading = b"0.%d,1,2,3,.1,.2,.3\n"
    found |= {
        ("imu", "csv"): b"t,ax,ay,az,gx,gy,gz\n" + b"".join(reading % i for i in range(10, 90)),
        ("imu", "npy"): written(np.save, CLOUD[:6]),
    }
    return found | {("text", "txt"): "a red ball rolls &amp; a bell rings, schön".encode()}


def contents(data):
    return data.encode() if isinstance(data, str) else data


GOOD = sorted(good_files())
any_file = st.sampled_from(GOOD)


@pytest.mark.parametrize("modality,kind", GOOD)
def test_good_files_load(modality, kind):
    assert load(modality, contents(good_files()[modality, kind]), kind.split("_")[0]) is not None


# Broken files

EXTREMES = [0, 1, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1]


@st.composite
def broken(draw):
    "(modality, kind, contents) of a good file after some accidents."
    modality, kind = draw(any_file)
    data = bytearray(contents(good_files()[modality, kind]))
    for accident in draw(
        st.lists(
            st.sampled_from(["cut", "byte", "claim", "digits", "drop"]), min_size=1, max_size=3
        )
    ):
        place = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 100)))
        if accident == "cut":
            del data[place:]
        if accident == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        if accident == "byte":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
        if accident == "claim":
            form = draw(st.sampled_from("<H >H <I >I <Q >Q".split()))
            size = struct.calcsize(form)
            data[place : place + size] = struct.pack(
                form, draw(st.sampled_from(EXTREMES)) % 2 ** (8 * size)
            )
        if accident == "digits":
            number = str(
                draw(st.sampled_from([-1, 10**11, 10**30, "nan", "1e400", *EXTREMES]))
            ).encode()
            data = data[:place] + re.sub(rb"\d+", number, data[place:], count=1)
    return modality, kind, bytes(data)


@settings(files, max_examples=2000)
@given(broken())
def test_broken_files(case):
    modality, kind, data = case
    load(modality, data, kind.split("_")[0])


@pytest.mark.parametrize("modality,kind", GOOD)
def test_empty_files(modality, kind):
    assert load(modality, b"", kind) is None


@settings(files, max_examples=300)
@given(
    st.sampled_from(sorted(LOADERS)),
    any_file,
    st.integers(0, 12),
    st.binary(max_size=300),
    st.text(max_size=4),
)
def test_noise_behind_the_first_bytes_of_a_format(modality, origin, keep, noise, kind):
    load(modality, contents(good_files()[origin])[:keep] + noise, re.sub(r"[^\w.]", "", kind))


# Mislabelled files

PICTURES = {("image", kind) for _, kind in GOOD}
PICTURES |= {("depth", "png"), ("depth", "tiff"), ("thermal", "png"), ("thermal", "tiff")}
READ_BY = dict(
    image=PICTURES, thermal=PICTURES | {("point", "npy"), ("imu", "npy")}, text=set(GOOD)
)


@settings(files, max_examples=600)
@given(any_file, any_file, st.sampled_from(sorted(LOADERS)))
def test_mislabelled_files(origin, label, modality):
    "What is inside counts, not the name; a loader refuses what is not its own."
    found = load(modality, contents(good_files()[origin]), label[1].split("_")[0])
    if origin[0] == modality == "point":
        return  # some of these formats can only be told by their names
    if origin[0] == modality:
        assert found is not None
    if modality in ("image", "imu") and origin[0] != modality:
        assert found is None or origin in READ_BY.get(modality, ()) or origin[1] in ("gif", "npy")
    if modality in ("audio", "video") and origin[0] in ("point", "imu", "text"):
        assert found is None


# Huge claims

claims = st.sampled_from([*EXTREMES, 10**11, 10**18])


def png_part(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width, height, bits=16, colour=0, rows=b""):
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = png_part(b"IHDR", head), png_part(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_part(b"IEND", b"")


@settings(files, max_examples=150)
@given(st.sampled_from(["image", "depth", "thermal", "video", "audio"]), st.data())
def test_pictures_that_claim_a_size(modality, data):
    sides = [data.draw(claims) % 2**32 for _ in range(2)]
    bits, colour = data.draw(
        st.sampled_from([(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (8, 4), (16, 6)])
    )
    assert (
        load(modality, png(*sides, bits, colour, bytes(2000)), "png") is None or max(sides) <= 255
    )


@pytest.mark.parametrize("modality", ["image", "depth", "thermal"])
def test_pictures_that_unpack_to_much(modality):
    "The largest picture that is read, and one that is not, from 130 kB."
    side = 8190 if modality == "image" else 5790
    assert (
        load(modality, png(side, side, rows=(bytes(1) + b"\x70\x70" * side) * side), "png")
        is not None
    )
    assert load(modality, png(side + 5, side + 5, rows=b""), "png") is None


def test_films_of_large_frames():
    "7680 x 4320, the most that is read."
    data = film("mp4", "libx264", "yuv420p", side=240)
    assert load("video", data, "mp4").shape == (1, 15, 3, 2, 16, 16)


def npy(shape, dtype):
    return written(
        lambda file: np.lib.format.write_array_header_1_0(
            file, dict(descr=dtype, fortran_order=False, shape=shape)
        )
    )


@settings(files, max_examples=200)
@given(
    st.sampled_from(["point", "depth", "thermal", "imu", "image", "audio"]),
    st.lists(claims, max_size=4),
    st.sampled_from(["<f4", "<f8", "<f2", "<i8", "|u1", "|O", "|V0", "<U9", "|b1"]),
    st.booleans(),
)
def test_arrays_that_claim_a_shape(modality, shape, dtype, zipped):
    data = npy(tuple(shape), dtype) + bytes(100)
    if zipped:
        with zipfile.ZipFile(archive := io.BytesIO(), "w") as entries:
            entries.writestr("points.npy", data)
        data = archive.getvalue()
    load(modality, data, "npz" if zipped else "npy")


@settings(files, max_examples=100)
@given(claims, claims, st.sampled_from(["F", "U", "I"]), st.sampled_from([1, 2, 4, 8, 10**9]))
def test_clouds_that_claim_a_count(count, faces, kind, size):
    ply = (
        f"ply\nformat %s 1.0\nelement vertex {count}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    stl = bytes(80) + struct.pack("<I", count % 2**32) + bytes(100)
    off = b"OFF\n%d %d 0\n0 0 0\n" % (count, faces)
    for name, data in (
        ("ply", (ply % "ascii").encode() + b"1 2 3\n"),
        ("off", off),
        ("stl", stl),
        ("ply", (ply % "binary_little_endian").encode() + bytes(24)),
        ("pts", b"%d\n1 2 3\n4 5 6\n" % count),
        ("pcd", pcd(count, "binary", bytes(24), kind, size)),
        ("pcd", pcd(count, "ascii", b"1 2 3\n4 5 6\n")),
        ("obj", b"v 1 2 3\nf 1 2 %d\n" % count),
    ):
        assert load("point", data, name) is None or count <= 2


@settings(files, max_examples=100)
@given(claims, claims, claims, st.integers(0, 16))
def test_sounds_that_claim_a_length(length, rate, channels, cut):
    format = struct.pack("<HHIIHH", 1, channels % 2**16, rate % 2**32, rate * 2 % 2**32, 2, 16)
    head = b"RIFF" + struct.pack("<I", (length + 36) % 2**32) + b"WAVEfmt \x10\0\0\0" + format
    load("audio", head + b"data" + struct.pack("<I", length % 2**32) + bytes(1000 - cut), "wav")
    flac = bytearray(good_files()["audio", "flac"])
    flac[18:26] = struct.pack(
        ">Q", rate % 2**20 << 44 | channels % 8 << 41 | 15 << 36 | length % 2**36
    )
    load("audio", bytes(flac), "flac")


@settings(files, max_examples=150)
@given(
    st.sampled_from(["exr", "tiled.exr"]), st.lists(claims, min_size=4, max_size=4), claims, claims
)
def test_maps_that_claim_a_window(kind, window, width, height):
    data = bytearray(good_files()["depth", kind])
    for name, form, numbers in (
        ("dataWindow\0box2i\0", "<4I", window),
        ("tiles\0tiledesc\0", "<2I", (width, height)),
    ):
        place = data.find(name.encode()) + len(name) + 4
        if name.encode() in data:
            struct.pack_into(form, data, place, *(number % 2**32 for number in numbers))
    load("depth", bytes(data), "exr")


def test_archives_that_unpack_to_much():
    for name, kind in (("points.npy", "npz"), ("archive/data.pkl", "pt")):
        with zipfile.ZipFile(
            file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as archive:
            with archive.open(name, "w") as entry:
                for _ in range(200):
                    entry.write(bytes(2**20))
        assert load("point", file.getvalue(), kind) is None


# Text: any characters, any numbers


@settings(files, max_examples=150)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text_file(text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    for modality, kind in (
        ("text", "txt"),
        ("imu", "csv"),
        ("point", "xyz"),
        ("point", "obj"),
        ("point", "off"),
    ):
        load(modality, data, kind)


@settings(files, max_examples=200)
@given(
    st.lists(
        st.lists(
            st.floats() | st.integers() | st.text("0123456789eE+-._ ", max_size=6),
            min_size=3,
            max_size=8,
        ),
        max_size=6,
    ),
    st.permutations(["ax", "ay", "az", "gx", "gy", "gz", "t"]),
)
def test_any_table(rows, names):
    lines = "\n".join(",".join(map(str, row)) for row in rows)
    load("imu", f"{','.join(names)}\n{lines}\n".encode(), "csv")
    load("point", lines.encode(), "xyz")
