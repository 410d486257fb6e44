"""Invariant 9: a write that fails leaves the old file whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.errors import CourseError, InputError
from course_lib.files import atomic_file, atomic_folder, lock, read_text, write_text


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


def test_torch_hides_a_full_disk_and_the_message_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save: "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"."""
    import torch

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(CourseError, match=r"f\.pt: was not written") as caught, atomic_file(tmp_path / "f.pt"):
        torch.save({"a": torch.zeros(1000)}, "/dev/full")
    assert caught.value.exit_code == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    with pytest.raises(CourseError, match="the disk is full"), atomic_folder(tmp_path / "d"):
        torch.save({"a": torch.zeros(1000)}, "/dev/full")
    assert not list(tmp_path.iterdir())


def test_a_limit_on_file_sizes_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: the limit cannot be raised again."""
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from course_lib.files import atomic_folder\n"
        "from course_lib.errors import CourseError\n"
        "from safetensors.torch import save_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "for save in (save_file, torch.save):\n"
        "    try:\n"
        "        with atomic_folder(Path('d')) as folder:\n"
        "            save({'a': torch.zeros(10_000)}, folder / 'a')\n"
        "    except CourseError as error:\n"
        "        print(error.exit_code, error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "1 d: was not written (File too large); what was there before is unchanged",
        "1 d: was not written (Input/output error); what was there before is unchanged",
    ]


@pytest.mark.parametrize("place", ["/proc/absent/f", "/dev/null/f", "x" * 300, "a/" + "x" * 300 + "/f"])
def test_places_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        write_text(place, "x")
    with pytest.raises(InputError, match="cannot be written"), atomic_folder(place):
        pass
    with pytest.raises(InputError, match="cannot be written"), lock(Path(place)):
        pass


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors makes its files readable to their owner alone."""
    import torch
    from safetensors.torch import save_file

    before = os.umask(0o022)
    try:
        for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
            os.umask(umask)
            with atomic_folder(tmp_path / "d") as folder:
                (folder / "sub").mkdir()
                save_file({"a": torch.zeros(1)}, folder / "sub" / "a.safetensors")
            assert (tmp_path / "d" / "sub" / "a.safetensors").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_a_folder_is_kept_for_one_process_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from course_lib.files import lock\n"
        f"with lock(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is at work here"), lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path), pytest.raises(InputError, match="another run"), lock(tmp_path):
        pass  # within one process too: two trainings of one notebook
    with lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty$"),
        (b"\n \n", "is empty$"),
        ("a: 1\n".encode("utf-16"), r"is UTF-16 text; convert it: iconv -f utf-16 -t utf-8 f\.yaml > f-utf8\.yaml"),
        ("a: 1\n".encode("utf-16-le"), "is UTF-16 text; convert it: iconv -f utf-16le"),
        ("a: 1\n".encode("utf-16-be"), "is UTF-16 text; convert it: iconv -f utf-16be"),
        (b"a: 1\nb: \0\0", "holds NUL bytes at line 2"),
        (bytes(100), "holds NUL bytes at line 1"),
        (b"\xef\xbb\xbfab\xe9", "byte 0xE9 at line 1, column 3"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_text(path)
