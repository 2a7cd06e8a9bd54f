"""Bad sources: one line that says what was found and what was wanted.

Quickly, in little memory, and without running anything."""

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from limits import within
from PIL import Image

from ibllm.config import InputConfig
from ibllm.inputs.processor import Processor
from ibllm.inputs.sources import InputError
from ibllm.inputs.text import load_text

torch.set_num_threads(1)
FILES = Path(__file__).parent / "golden" / "preprocess" / "files"
PNG, WAV, MP4, NPY = (
    (FILES / f).read_bytes()
    for f in ("landscape.png", "mono_16k_7s.wav", "clip_6400ms.mp4", "cloud.npy")
)
NOISE = np.random.default_rng(1).bytes(200_000)
PROCESSOR = Processor(InputConfig(image_size=32))


def png_part(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width, height):
    "A small file that claims any size."
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = png_part(b"IHDR", head), png_part(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_part(b"IEND", b"")


def wav(claim, rate=16_000, channels=1, samples=1000):
    head = struct.pack(
        "<IHHIIHH", 16, 1, channels, rate, rate * channels * 2 % 2**32, channels * 2, 16
    )
    return (
        b"RIFF"
        + struct.pack("<I", (claim + 36) % 2**32)
        + b"WAVEfmt "
        + head
        + b"data"
        + struct.pack("<I", claim)
        + b"\1\0" * samples
    )


def sound(kind, keep=None):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, format=kind)
    return file.getvalue()[:keep]


def flac_claiming_days():
    data = bytearray(sound("FLAC"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return bytes(data)


def npy(shape, kind="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=kind, fortran_order=False, shape=shape))
    return file.getvalue()


def npy_with_pickle():
    file = io.BytesIO()
    np.save(file, np.array([[Touch()] * 3] * 3, object), allow_pickle=True)
    return file.getvalue()


def npz_bomb():
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("points.npy", "w") as entry,
    ):
        entry.write(npy((20_000_000, 3)))
        for _ in range(240):
            entry.write(bytes(10**6))
    return file.getvalue()


class Touch:
    "Unpickling it leaves a file behind."

    path = "unpickled.txt"

    def __reduce__(self):
        return open, (self.path, "w")


def pt(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


AXES = b"property float x\nproperty float y\nproperty float z\n"
PLY = b"ply\nformat %s 1.0\nelement vertex %d\n" + AXES + b"%send_header\n"
FIELDS = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
PCD = b"VERSION 0.7\n" + FIELDS + b"WIDTH 9\nHEIGHT 1\nPOINTS %d\nDATA %s\n"
PLAYLIST = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://%s\n#EXT-X-ENDLIST\n"
    % os.fsencode(FILES / "clip_6400ms.mp4")
)
CONCAT = b"ffconcat version 1.0\nfile %s\n" % os.fsencode(FILES / "clip_6400ms.mp4")
GIF = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2"
MOTION, HEAD = np.zeros((6, 10)), b"ax,ay,az,gx,gy,gz\n"

CASES = {
    "image": [
        (b"", "empty"),
        (b"x", "no known picture"),
        (PNG[:3000], "truncated"),
        (png(60_000, 60_000), "exceeds limit"),
        (png(20_000, 5_000), "exceeds limit"),
        (png(2**31 - 1, 2**31 - 1), "exceeds limit"),
        (png(1, 60_000), "one side"),
        (png(0, 5), "picture"),
        (GIF, "exceeds limit"),
        (WAV, "picture"),
        (MP4, "picture"),
        (NOISE, "picture"),
        (NPY, "picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known picture"),
        (np.zeros((0, 3, 3), np.uint8), "shape (0, 3, 3)"),
        (np.zeros(5, np.uint8), "wants [H, W]"),
        (np.zeros((3, 32, 32), np.uint8), "channels go last"),
        (np.zeros((9, 900, 3), np.uint8), "one side"),
        (np.full((4, 4, 3), 300), "from 300 to 300"),
        (np.full((4, 4, 3), -1.0), "floats in [0, 1]"),
        (np.zeros((4, 4), bool), "pixels of bool"),
        (np.full((4, 4), np.nan), "floats in [0, 1]"),
        (np.array([["a"]]), "uint8"),
        (np.zeros((4, 4, 3), complex), "complex"),
        ([], "empty list"),
    ],
    "audio": [
        (b"", "empty"),
        (b"x", "wants a sound"),
        (WAV[:50], "cut off"),
        (WAV[:-20_000], "cut off"),
        (wav(10**6), "cut off"),
        (wav(2**31), "cut off"),
        (wav(2000, 1), "rate of 1"),
        (wav(2000, 0), "sound"),
        (wav(2000, 2**32 - 1), "sound"),
        (wav(2000, channels=1000), "1000 channels"),
        (wav(0, samples=0), "no samples"),
        (flac_claiming_days(), "wants a sound cut to"),
        (sound("FLAC", -30_000), "sound"),
        (sound("OGG", 5000), "sound"),
        (sound("MP3", 5000), "sound"),
        (MP4, "no sound track"),
        (PNG, "no sound track"),
        (NOISE, "sound"),
        (NPY, "sound"),
        (PLAYLIST, "sound"),
        (CONCAT, "sound"),
        (np.zeros(0), "shape (0,)"),
        (np.zeros(10), "400 at least"),
        (np.full(8000, np.nan), "NaN"),
        (np.full(8000, 3e4), "divide by 32768"),
        (np.zeros(8000, np.uint8), "uint8"),
        (np.zeros((8000, 2)), "400 at least"),
        (np.zeros((2, 2, 2, 2)), "[samples]"),
        ((np.zeros(8000), 0), "rate of 0"),
        ((np.zeros(8000), "a"), "rate of 'a'"),
        ((np.zeros(8000), 8000.5), "whole number"),
        ((np.zeros(8000), 8000, 3), "tuple of 3"),
        (np.array(["a"]), "floats"),
    ],
    "video": [
        (b"", "empty"),
        (b"x", "video"),
        (MP4[:5000], "video"),
        (MP4[5000:], "video"),
        (MP4[: len(MP4) // 2], "video"),
        (WAV, "no video stream"),
        (GIF, "video"),
        (NOISE, "video"),
        (NPY, "video"),
        (PLAYLIST, "video"),
        (CONCAT, "video"),
        ((np.zeros((2, 3, 4), np.uint8), 5), "[T, H, W, 3]"),
        ((np.zeros((2, 3, 4, 3)), 5), "float64"),
        ((np.zeros((0, 3, 4, 3), np.uint8), 3), "shape (0,"),
        ((np.zeros((2, 3, 4, 3), np.uint8), 0), "rate of 0"),
        ((np.zeros((2, 3, 4, 3), np.uint8), None), "rate of None"),
        ((np.zeros((2, 2, 500, 3), np.uint8), 5), "one side"),
        ((5, 5), "got int"),
    ],
    "point": [
        (b"", "empty"),
        (b"x", "xyz format"),
        (NPY[:200], "cut off"),
        (npy((10**12, 3)), "claims shape"),
        (npy((9, 3), "|O"), "wants a whole npy file"),
        (npy_with_pickle(), "npy format"),
        (pt({"a": Touch()}), "Weights only"),
        (pickle.dumps(Touch()), "xyz format"),
        (pt(torch.zeros(1).expand(10**10, 3)), "claims shape"),
        (pt([1]), "holds a list"),
        (npz_bomb(), "unpacks to"),
        (b"PK\3\4", "zip"),
        (PLY % (b"ascii", 10**11, b"") + b"1 2 3\n", "cut off"),
        (PLY % (b"binary_little_endian", 10**11, b"") + bytes(9), "ply format"),
        (
            PLY
            % (
                b"binary_little_endian",
                3,
                b"element face 4000000000\nproperty list uchar int vertex_indices\n",
            )
            + bytes(36),
            "cut off",
        ),
        (b"ply\n", "ply format"),
        (b"OFF\n99999999999 9999999999 0\n0 0 0\n", "off format"),
        (b"OFF\n", "off format"),
        (PCD % (10**11, b"binary") + bytes(24), "pcd format"),
        (PCD % (3, b"ascii") + b"1 2 3\n", "1 of 3"),
        (PCD % (3, b"binary_compressed"), "save it as binary"),
        (b"5\n1 2 3\n", "1 lines of numbers, wants 5"),
        (b"1 2\n3 4\n", "[N, 3]"),
        (b"1 2 x\n", "xyz format"),
        (b"nan nan nan\n1 2 3\n", "NaN"),
        (b"1 2 3\n", "in one place"),
        (NOISE, "xyz format"),
        (PNG, "xyz format"),
        (np.zeros((0, 3)), "shape (0, 3)"),
        (np.zeros((5, 2)), "[N, 3]"),
        (np.zeros(3), "[N, 3]"),
        (np.full((5, 3), np.inf), "infinite"),
        (np.array([[0, 0, 5e36], [0, 0, 1]]), "huge"),
        (np.array([["a"] * 3]), "[N, 3]"),
    ],
    "depth": [
        (b"", "empty"),
        (b"x", "depth map"),
        (PNG, "8-bit"),
        (png(60_000, 60_000), "exceeds limit"),
        (png(8000, 8000), "million at most"),
        (npy((10**12, 3)), "claims shape"),
        (npy_with_pickle(), "depth map"),
        (npy((9, 1, 1), "|u1") + bytes(9), "one recording"),
        (b"\x76\x2f\x31\x01" + bytes(50), "depth map"),
        (WAV, "depth map"),
        (np.zeros((4, 4)), "no pixel"),
        (np.full((4, 4), np.nan), "no pixel"),
        (np.full((4, 4), -1.0), "down to -1"),
        (np.full((4, 4), 2000.0), "millimetres"),
        (np.full((4, 4), 2, np.uint16), "depth_unit too small"),
        (np.zeros((4, 4), np.uint8), "8-bit"),
        (np.zeros(4), "[H, W]"),
        (np.zeros((2, 2), complex), "complex"),
        (np.ones((4, 400)), "one side"),
    ],
    "thermal": [
        (b"", "empty"),
        (b"x", "thermal map"),
        (png(60_000, 60_000), "exceeds limit"),
        (npy((10**12, 3)), "claims shape"),
        (WAV, "thermal map"),
        (np.full((4, 4), 293.0), "kelvin"),
        (np.linspace(0, 1, 16).reshape(4, 4), "look scaled"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), 5, np.uint16), "hundredths of a kelvin"),
        (np.full((4, 4), -300.0), "from -300"),
        (np.zeros(4), "[H, W]"),
    ],
    "imu": [
        (b"", "empty"),
        (b"x", "wants the columns"),
        (b"1,2,3,4,5,6\n" * 4, "wants the columns"),
        (HEAD, "0 lines"),
        (HEAD + b"1,2,3,4,5\n" * 2, "2 lines of 5"),
        (HEAD + b"1,2,3,4,5,x\n", "IMU recording"),
        (b"t," + HEAD + b"0,1,2,3,4,5,6\n" * 2, "does not increase"),
        (npy((10**12, 6)), "claims shape"),
        (PNG, "IMU recording"),
        (npy((9, 6, 1)) + bytes(216), "one recording"),
        (b"t," + HEAD + b"0,1,2,3,4,5,6\n10,1,2,3,4,5,6\n", "t in seconds"),
        (b"t," + HEAD + b"nan,1,2,3,4,5,6\n1,1,2,3,4,5,6\n", "does not increase"),
        (np.zeros((5, 10)), "[6, T]"),
        (np.zeros((10, 6)), "channels go first"),
        (np.full((6, 10), 1e300), "infinite"),
        (np.zeros((6, 0)), "[6, T]"),
        (np.zeros(6), "[6, T]"),
        (MOTION * np.nan, "NaN"),
        (MOTION + 1e4, "mm/s²"),
        (MOTION + 60, "degrees per second"),
        ((MOTION, 0), "rate of 0"),
        ((MOTION, "x"), "rate of 'x'"),
    ],
}


def numbered():
    "(modality, number) of every case."
    for modality, cases in CASES.items():
        for number in range(len(cases)):
            yield modality, number


def is_refusal(text):
    "Whether an error has the one form of all refusals, on one line."
    return "\n" not in text and re.fullmatch(r".+?: got .+, wants .+", text)


@pytest.mark.parametrize("modality, number", [*numbered()])
def test_bad_source(modality, number, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    source, expected = CASES[modality][number]
    with within(), warnings.catch_warnings(), pytest.raises(ValueError) as failure:
        warnings.simplefilter("error")
        PROCESSOR(modality, source)
    text = str(failure.value)
    assert expected in text and is_refusal(text) and len(text) < 300
    assert not any(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("modality", CASES)
def test_bad_file_is_named(modality, tmp_path):
    path = tmp_path / "mislabelled.png"
    path.write_bytes(NOISE)
    with pytest.raises(ValueError, match="mislabelled.png: "):
        PROCESSOR(modality, path)
    with pytest.raises(ValueError, match="mislabelled.png: "):
        PROCESSOR(modality, [str(path)])
    with pytest.raises(ValueError, match="mislabelled.png: "), path.open("rb") as file:
        PROCESSOR(modality, file)
    with pytest.raises(ValueError, match="not a file"):
        PROCESSOR(modality, tmp_path)
    with pytest.raises(ValueError, match="opened as text"):
        PROCESSOR(modality, io.StringIO("x"))
    for missing in (tmp_path / "none.png", "none.png", "x" * 5000, "\0"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            PROCESSOR(modality, missing)
    for wrong in (None, 5, {}, (path, 5, 5)):
        with pytest.raises((TypeError, ValueError)) as failure:
            PROCESSOR(modality, wrong)
        assert is_refusal(str(failure.value))


@pytest.mark.parametrize("modality", CASES)
def test_damaged_files_raise_nothing_else(modality):
    "Files with bytes changed either load or raise ValueError."
    good = dict(
        image=PNG,
        audio=WAV[:44] + WAV[44:4000],
        video=MP4,
        point=NPY,
        depth=depth_png(),
        thermal=depth_png(),
        imu=HEAD + b"1,2,3,4,5,6\n" * 5,
    )[modality]
    change = np.random.default_rng(0)
    for _ in range(12):
        data = bytearray(good)
        for _ in range(change.integers(1, 9)):
            data[change.integers(min(len(data), 400))] = change.integers(256)
        try:
            assert PROCESSOR(modality, bytes(data)).isfinite().all()
        except ValueError as error:
            assert is_refusal(str(error))


def depth_png():
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 29_000, np.uint16)).save(file, "png")
    return file.getvalue()


class Words:
    "As much of a tokenizer as a text without words needs."

    bos_token_id, eos_token_id = 1, 2

    def __len__(self):
        return 3

    def __call__(self, texts, **_):
        return {"input_ids": [[] for _ in texts]}


def test_text_errors(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: got None, wants the text encoder's"):
        PROCESSOR("text", "a dog")
    with pytest.raises(ValueError, match="modality: got 'smell', wants one of image, video"):
        PROCESSOR("smell", "a rose")
    with pytest.raises(ValueError, match="^text: got an empty list, wants"):
        load_text([], InputConfig(), Words())
    with pytest.raises(ValueError, match="characters"):
        load_text("x" * 2_000_000, InputConfig(), Words())
    for text in ("&#" + "9" * 5000 + ";", "half a character: \ud800"):
        with pytest.raises(ValueError, match="^text: got what cannot be read"):
            load_text(text, InputConfig(), Words())
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        load_text(tmp_path / "t.txt", InputConfig(), Words())
    with pytest.raises(TypeError, match="^source: got int, wants a text"):
        load_text(5, InputConfig(), Words())


PATHS = [
    "bell.wav",
    "notes.txt",
    "sounds/bell",
    "sounds\\bell",
    "./a.m4a",
    "/no/such/folder/",
    "a&amp;b.mp3",
    "schön.jpeg",
    "half\ud800.png",
    "zero\0.png",
    "bell(1).wav",
    "x" * 5000 + ".txt",
]
TEXTS = [
    "",
    " ",
    "bell",
    "a bell rings.",
    "ring!",
    "hear bell.wav",
    "bell.wav and/or sounds/bell",
    "bell.wav\n",
    "wait...",
    "name.longer1",
    "3.5",
    "1/2",
    "24.12.2024",
    "etc.",
]


@pytest.mark.parametrize("text", PATHS)
def test_a_path_as_text_is_refused_whether_there_is_a_file_or_not(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bell.wav").touch()
    for source in (text, ["a dog", text]):
        with pytest.raises(InputError) as failure:
            load_text(source, InputConfig(), Words())
        said = str(failure.value)
        assert is_refusal(said) and len(said) < 300
        assert said.startswith("text: got ") and "looks like the name of a file" in said


@pytest.mark.parametrize("text", TEXTS)
def test_other_texts_are_texts(text):
    assert load_text(text, InputConfig(), Words()).shape == (1, 77)


def test_only_a_string_is_taken_for_a_path(tmp_path, monkeypatch):
    "What is in a file or bytes is read whatever it says; a missing `Path` is a missing file."
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "words.txt"
    path.write_text("bell.wav")
    for source in (path, b"bell.wav", io.BytesIO(b"bell.wav")):
        assert load_text(source, InputConfig(), Words()).shape == (1, 77)
    with pytest.raises(FileNotFoundError, match="no such file, wants the path of a text"):
        load_text(Path("bell.wav"), InputConfig(), Words())


def test_folders_without_a_processor_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="^folder: got .* without processor_config"):
            Processor.from_pretrained(folder)
    for folder in (None, 5, b"x"):
        with pytest.raises(TypeError, match="^folder: got .*, wants the path of a folder"):
            Processor.from_pretrained(folder)
    file = tmp_path / "processor_config.json"
    for text in ("", "[]", "{", '{"image_size": -1}', '{"smell_size": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError) as failure:
            Processor.from_pretrained(tmp_path)
        assert is_refusal(str(failure.value))
    with pytest.raises(OSError, match="folder: got .*, wants a folder that can be written"):
        Processor().save_pretrained(file)
    assert [*tmp_path.iterdir()] == [file]


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    "Nor is code in the folder run."
    Processor().save_pretrained(tmp_path)
    (tmp_path / "text_tokenizer").mkdir()
    auto = {"AutoTokenizer": ["evil.Words", None]}
    settings = {"tokenizer_class": "Words", "auto_map": auto}
    (tmp_path / "text_tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "text_tokenizer" / "evil.py").write_text(code)
    with pytest.raises(ValueError, match="^folder: got .*tokenizer.*, wants a tokenizer"):
        Processor.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_config_errors():
    with pytest.raises(ValueError, match="video_crops: got 2"):
        InputConfig(video_crops=2)


def test_a_wave_of_unknown_length_is_read():
    endless = wav(2**32 - 1)
    x = PROCESSOR("audio", endless[:4] + b"\xff" * 4 + endless[8:])
    assert x.shape == (1, 3, 1, 128, 204)
