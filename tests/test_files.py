"""Invariant 9: a write that fails leaves the old file whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.errors import CourseError, InputError
from course_lib.files import atomic_file, atomic_folder, read_text, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with atomic_folder(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(folder) as new:
        (new / "b").write_text("2")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["a"]
    with atomic_folder(folder) as new:
        (new / "c").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_clear_line(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")
    with pytest.raises(CourseError, match="the disk is full.*unchanged") as caught, atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value.exit_code == 1
    assert path.read_text() == "old"


def test_a_real_full_disk(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(CourseError, match="the disk is full"), atomic_file(tmp_path / "f"), full.open("w") as file:
        file.write("x" * 100_000)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "file" / "below.txt", "x")


def test_latin_1_is_named_with_the_command_that_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes('["ok",\n "caf\xe9"]'.encode("latin-1"))
    with pytest.raises(
        InputError, match=r"byte 0xE9 at line 2, column 6.*iconv -f latin1 -t utf-8 rows\.json > rows-utf8\.json"
    ):
        read_text(path)
