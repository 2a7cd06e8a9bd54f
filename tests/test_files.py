"Files: written whole or not at all, records read or refused, and refusals that quote anything."

import os
import threading
from pathlib import Path

import pytest

from ibllm.files import (
    check_name,
    loading,
    make_folder,
    project_folder,
    read_record,
    refuse,
    shown,
    write_atomically,
)


class Broken:
    def __repr__(self):
        raise RuntimeError("no repr")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        ("a\nb", r"'a\nb'"),
        ([1, None], "[1, None]"),
        (10**10_000, "something of type int"),
        (nested(100_000), "something of type list"),
        (Broken(), "something of type Broken"),
        ("x" * 10**8, "'" + 59 * "x"),
        (b"x" * 10**8, "b'" + 58 * "x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_can_be_shown(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError])
def test_a_refusal_is_one_line_of_one_form(kind):
    with pytest.raises(kind, match="^k: got 'a b', wants a whole number$") as error:
        try:
            int("a b")
        except ValueError:
            refuse("k", shown("a b"), "a whole number", kind)
    assert isinstance(error.value.__context__, ValueError)


def test_outside_a_checkout(tmp_path, monkeypatch):
    assert project_folder() == Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^working folder: got .*, wants one inside"):
        project_folder()


def fails(part):
    part.write_text("ha")
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, "old"])
def test_failed_writing_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "note.txt"
    if before:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])
    write_atomically(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["note.txt"]


def test_writers_in_two_threads_do_not_mix(tmp_path):
    path, together = tmp_path / "note.txt", threading.Barrier(2)

    def slowly(letter):
        def write(part):
            with part.open("w") as file:
                file.write(letter * 1000)
                together.wait(10)
                file.write(letter * 1000)

        write_atomically(path, write)

    threads = [threading.Thread(target=slowly, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 2000, "b" * 2000) and os.listdir(tmp_path) == ["note.txt"]


def test_folders_are_made(tmp_path):
    assert make_folder(str(tmp_path / "a" / "b")).is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("folder", ["\0", "\ud800", None, 5, "file", "file/inside", "x" * 300])
def test_folders_that_cannot_be_made(tmp_path, folder):
    (tmp_path / "file").write_text("")
    place = f"{tmp_path}/{folder}" if isinstance(folder, str) else folder
    with pytest.raises((OSError, ValueError, TypeError), match="place: got .*, wants") as error:
        make_folder(place, "place")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "results_2", "ä.b-c", "x" * 100])
def test_names(name):
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\n", "a\0", "-a", "x" * 101, None, 5])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="^name: got .*, wants the name of a file"):
        check_name(name)


def test_records(tmp_path):
    assert read_record(tmp_path / "absent.json") == {}
    (tmp_path / "record.json").write_text('{"a": [1, {"b": "\u00e4"}]}', encoding="utf-8")
    assert read_record(tmp_path / "record.json") == {"a": [1, {"b": "ä"}]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"null", b'{"a": 1}}', b"\xff\xfe{}", b"[" * 10**6, b"9" * 10_000],
    ids=lambda content: repr(content[:9]),
)
def test_broken_records(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match="^path: got 'record.json', wants a record") as error:
        read_record(tmp_path / "record.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("it\nis torn"), "it is torn"),
        (KeyError("w"), "'w'"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 999), "x" * 200),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_libraries_become_one_line(error, reason):
    with pytest.raises(ValueError) as found, loading("folder: 'a: b'", "weights"):
        raise error
    assert str(found.value) == (
        f"folder: got 'a: b', which cannot be loaded ({reason}), wants weights"
    )


def test_interrupts_are_no_broken_files():
    with pytest.raises(KeyboardInterrupt), loading("folder: 'x'", "weights"):
        raise KeyboardInterrupt
