"""What a submission may not do, each by itself: refused, or ended with a reason; nothing outside is touched."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytest.importorskip("nbgrader")
from course_lib.agent.isolation import isolation_in_force
from course_lib.agent.lock_down import FILES, SYSTEM_CALLS
from course_lib.homework.contained import LIBRARY, Contained

held = pytest.mark.skipif(
    sys.platform != "linux" or not {FILES, SYSTEM_CALLS} <= set(isolation_in_force()),
    reason="this system has fewer layers",
)


def run(*cells: str, **limits: Any) -> tuple[list[str], str]:
    """What each cell printed or raised, and the limit that ended the run."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    contained = Contained(timeout=20, **limits) if "timeout" not in limits else Contained(**limits)
    contained.preprocess(notebook, {})
    return ["".join(_text(output) for output in cell.outputs) for cell in notebook.cells], contained.ended


def _text(output: nbformat.NotebookNode) -> str:
    return output.get("text") or f"{output.get('ename')}: {output.get('evalue')}"


def test_honest_code_runs() -> None:
    """torch, the library, files of its own, threads, and what a run writes with its modes."""
    outputs, ended = run(
        "import torch; print(int(torch.ones(3) @ torch.ones(3)))",
        "from course_lib.data.templates import named_template; print(named_template('chatml').stop_texts[0])",
        "import shutil; open('a.txt', 'w').write('hi'); shutil.copy2('a.txt', 'b.txt'); print(open('b.txt').read())",
        "import threading; t = threading.Thread(target=print, args=('in a thread',)); t.start(); t.join()",
        "import os; print(sorted(os.environ))",
    )
    assert [output.strip() for output in outputs[:4]] == ["3", "<|im_end|>", "hi", "in a thread"]
    assert "TOKEN" not in outputs[4]
    assert ended == ""


@held
def test_everything_outside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    precious = tmp_path / "precious.txt"
    precious.write_text("untouched")
    source = str(LIBRARY / "notebooks")
    attempts = {
        "delete": f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        "unlink": f"import os; os.unlink({str(precious)!r})",
        "write": f"open({str(precious)!r}, 'w')",
        "read the source": f"import os; os.listdir({source!r})",
        "read a file": "open('/etc/passwd')",
        "fork": "import os; os.fork()",
        "fork by libc": "import ctypes; assert ctypes.CDLL(None).fork() != -1, 'refused'",
        "subprocess": "import subprocess; subprocess.run(['ls'])",
        "shell": "import os; assert os.system('ls') == 0",
        "connect": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "internet socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('.socket-1')",
        "kill": "import os; os.kill(os.getppid(), 9)",
        "link": f"import os; os.symlink({str(precious)!r}, 'link')",
        "secret": "import os; os.environ['HF_TOKEN']",
    }
    outputs, ended = run(*attempts.values(), f"import os; os.chmod({str(precious)!r}, 0)", "print('alive')")
    went_through = [name for name, output in zip(attempts, outputs, strict=False) if "Error" not in output]
    assert not went_through
    assert outputs[-1] == "alive\n"
    assert ended == ""
    assert precious.read_text() == "untouched"
    assert precious.stat().st_mode & 0o777 != 0


def test_a_cell_that_sleeps_is_interrupted_and_the_others_run() -> None:
    outputs, ended = run("x = 1", "import time; time.sleep(100)", "print(x)", timeout=2)
    assert "Timeout" in outputs[1]
    assert (outputs[2], ended) == ("1\n", "")


def test_a_notebook_that_takes_too_long_in_all_is_ended() -> None:
    deaf = "import time\nwhile True:\n    try:\n        time.sleep(100)\n    except KeyboardInterrupt:\n        pass"
    started = time.perf_counter()
    outputs, ended = run(deaf, "print(1)", "print(2)", timeout=2, total_timeout=5)
    assert "went on when its time was up" in ended or "5 s for the whole notebook" in ended
    assert "not run" in outputs[-1]
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("cell", "limit"),
    [
        ("while True: print('x' * 10**5)", "MB of output"),
        ("n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(10**6)); n += 1", "MB of files"),
        ("import os; os._exit(0)", "it ended itself"),
    ],
)
def test_what_takes_too_much_is_ended_and_what_ran_before_stands(cell: str, limit: str) -> None:
    outputs, ended = run("print('before')", cell, "print('after')", folder_size=20_000_000)
    assert outputs[0] == "before\n"
    assert limit in ended
    assert limit in outputs[1]
    assert "not run" in outputs[2]


def test_too_much_memory_is_an_error_of_its_cell() -> None:
    outputs, _ = run("x = bytearray(3 * 2**30)", "print('alive')", memory=2 * 2**30)
    assert "MemoryError" in outputs[0]
    assert outputs[1] == "alive\n"
