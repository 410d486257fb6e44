"""Child processes that may use little time, memory and disk, no network, and no files but Python's own and an empty folder.

The child locks itself down (`lock_down.py`, which names the layers); here it is started with a bare environment, watched, and
killed when it takes too long, prints too much or fills its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

MEMORY = 512 * 2**20  # bytes of address space
FOLDER_SIZE = 20_000_000  # bytes in all files of the working folder
FOLDER_FILES = 200
OUTPUT = 100_000  # bytes read; more ends the child
_TOO_MUCH_OUTPUT = f"the limit of {OUTPUT} bytes of output"
_LOOK_EVERY = 0.02  # seconds
_HERE = Path(__file__).parent
_LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")  # of sysconfig.get_paths()
_SYSTEM_FILES = ("/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")


@dataclass(frozen=True)
class Ended:
    """How a child ended: what it printed, its exit status (minus the signal that killed it), and the limit it hit, "" for none."""

    output: str
    status: int
    limit: str = ""


def run_child(
    script: str,
    request: Mapping[str, Any],
    *,
    seconds: float,
    memory: int = MEMORY,
    stopped: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run one of the `*_child.py` beside this file, with the request as JSON on its standard input.

    Args:
        seconds: wall time; processor time is limited to one second more.
        stopped: asked now and then; once it is true the child is killed.
    """
    whole = {
        "readable": python_files(),
        "memory": memory,
        "seconds": int(seconds) + 1,
        "file_size": FOLDER_SIZE,
        **request,
    }
    with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as folder:
        environment = {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "HOME": folder,
            "TMPDIR": folder,
            "OPENBLAS_NUM_THREADS": "1",
        }
        if sys.platform == "win32":
            environment["SYSTEMROOT"] = os.environ.get("SYSTEMROOT", "")
        child = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(_HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,  # no terminal, and one signal reaches all it may have started
        )
        assert child.stdin is not None and child.stdout is not None  # noqa: PT018
        output = _Output(child.stdout)
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(whole).encode())
                child.stdin.close()
            limit = _watch(child, output, Path(folder), seconds=seconds, stopped=stopped)
        finally:
            _kill(child)
            child.wait()
            output.thread.join(timeout=2)
    limit = limit or (_TOO_MUCH_OUTPUT if output.full else _limit_of(child.returncode))
    return Ended(output.text(), child.returncode, limit)


@cache
def isolation_in_force() -> tuple[str, ...]:
    """The layers that hold a child of this machine, as `lock_down` names them; found by asking one."""
    ended = run_child("python_child.py", {}, seconds=20)
    try:
        return tuple(json.loads(ended.output))
    except ValueError:
        return ()


def _watch(
    child: subprocess.Popen[bytes], output: _Output, folder: Path, *, seconds: float, stopped: Callable[[], bool]
) -> str:
    """Wait for the end; return the limit that was hit."""
    ends = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_LOOK_EVERY)
            return ""
        if time.monotonic() > ends:
            return f"the time limit of {seconds:g} seconds"
        if output.full:
            return _TOO_MUCH_OUTPUT
        if _too_much_in(folder):
            return f"the limit of {FOLDER_FILES} files or {FOLDER_SIZE // 10**6} MB"
        if stopped():
            return "a stop by the user"


def _too_much_in(folder: Path) -> bool:
    size = files = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            files += 1
            size += path.lstat().st_size
            if files > FOLDER_FILES or size > FOLDER_SIZE:
                return True
    return False


def _limit_of(status: int) -> str:
    xcpu, xfsz = getattr(signal, "SIGXCPU", None), getattr(signal, "SIGXFSZ", None)
    return (
        {xcpu: "the limit of processor time", xfsz: "the limit of a file's size"}.get(-status, "") if status < 0 else ""
    )


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()


class _Output:
    """What a child prints, read on a thread; no more than `OUTPUT` bytes are kept, and then nothing is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.full = False
        self._read = bytearray()
        self._stream = stream
        self.thread = threading.Thread(target=self._work, name="child output", daemon=True)
        self.thread.start()

    def text(self) -> str:
        return self._read[:OUTPUT].decode("utf-8", "replace")

    def _work(self) -> None:
        with self._stream:
            while piece := self._stream.read1(65536):  # type: ignore[attr-defined]
                self._read += piece
                if len(self._read) > OUTPUT:
                    self.full = True
                    return


@cache
def python_files() -> list[str]:
    """Python's own files: its libraries and what the system's loader reads; not the project, not the home."""
    paths = sysconfig.get_paths()
    installed = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    shared = {f"{sys.base_prefix}/lib", f"{sys.prefix}/lib"}  # conda keeps what numpy links to there
    libraries = {Path(path).resolve() for path in ({paths[name] for name in _LIBRARIES} | installed | shared)}
    return [*map(str, sorted(path for path in libraries if path.exists())), *_SYSTEM_FILES]
