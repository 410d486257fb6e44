"""What runs in a child keeps its limits: each layer by itself, and all together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course_lib.agent import isolation, lock_down
from course_lib.agent.isolation import Ended, isolation_in_force, run_child

linux = pytest.mark.skipif(sys.platform != "linux", reason="system calls are forbidden on Linux alone")
LAYERS = isolation_in_force()


def run(code: str, seconds: float = 3) -> Ended:
    return run_child("python_child.py", {"code": code}, seconds=seconds)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("6 * 7", "42\n"),
        ("import math, statistics, datetime, json, random, re\nprint(math.sqrt(16))", "4.0\n"),
        ("open('a.txt', 'w').write('hi')\nprint(open('a.txt').read())", "hi\n"),
        ("x = 1\nx", "1\n"),
        ("None", ""),
        ("print('你好')", "你好\n"),
        ("def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nf(20)", "6765\n"),
    ],
)
def test_ordinary_code_runs(code: str, output: str) -> None:
    assert run(code) == Ended(output, 0)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1/0", "ZeroDivisionError: division by zero (line 1)"),
        ("x = (", "SyntaxError"),
        ("\n\nboom", "NameError: name 'boom' is not defined (line 3)"),
        ("'a' * 10**10", "MemoryError"),
        ("import os\nos.fork()", "not allowed here: os.fork"),
        ("import os\nos.system('ls')", "not allowed here: os.system"),
        ("import subprocess\nsubprocess.run(['ls'])", "not allowed here: subprocess.Popen"),
        ("import socket\nsocket.socket()", "not allowed here: socket"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "not allowed here"),
        ("open('/etc/passwd').read()", "not allowed here: to read outside"),
        ("open('../../../../etc/passwd').read()", "not allowed here: to read outside"),
        ("import os\nos.symlink('/etc/passwd', 'link')\nopen('link').read()", "not allowed here: os.symlink"),
        ("import os\nos.listdir('/')", "not allowed here: to read outside"),
        ("import os\nos.kill(os.getppid(), 9)", "not allowed here: os.kill"),
        ("import ctypes\nctypes.CDLL(None).fork()", "not allowed here: ctypes"),
        ("import course_lib\ncourse_lib.__version__", "Error: "),
        ("f = open('big', 'wb')\nfor _ in range(100): f.write(b'x' * 10**6)", "File too large"),
    ],
)
def test_hostile_code_is_refused_with_a_reason(code: str, says: str) -> None:
    ended = run(code)
    assert says in ended.output
    assert ended.status == 1


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("while True: pass", "time limit of 1 seconds"),
        ("import time\ntime.sleep(100)", "time limit of 1 seconds"),
        ("while True: print('x' * 1000)", "bytes of output"),
        ("n = 0\nwhile True:\n    open(str(n), 'w').write('x'); n += 1", "200 files"),
        ("n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 10**6); n += 1", "20 MB"),
    ],
)
def test_code_that_takes_too_much_is_killed(code: str, limit: str) -> None:
    started = time.perf_counter()
    ended = run(code, seconds=1)
    assert limit in ended.limit
    assert time.perf_counter() - started < 4
    assert len(ended.output) <= isolation.OUTPUT


def test_a_stop_kills_the_child() -> None:
    started = time.perf_counter()
    ended = run_child("python_child.py", {"code": "while True: pass"}, seconds=30, stopped=lambda: True)
    assert ended.limit == "a stop by the user"
    assert time.perf_counter() - started < 2


def test_nothing_of_the_environment_and_no_folder_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "sk-secret-value")
    ended = run("import os\nprint(dict(os.environ), os.getcwd())")
    assert "sk-secret" not in ended.output
    assert not Path(ended.output.split()[-1]).exists()


# Without the hook, by the kernel alone: code that got around Python's own functions meets these.
KERNEL_ALONE = """
import os, sys, errno
sys.path.insert(0, {package!r})
import ctypes, lock_down
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
files = {landlock} and lock_down._restrict_files(libc, {folder!r}, ["/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix])
assert lock_down._forbid_system_calls(libc, writing=files)
import socket
def attempt(name, action):
    try:
        action()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "DONE")
attempt("fork", os.fork)
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {{}}))
attempt("socket", socket.socket)
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("chmod", lambda: os.chmod({outside!r}, 0))
attempt("utime", lambda: os.utime({outside!r}))
attempt("write", lambda: open({outside!r}, "w"))
attempt("append", lambda: open({outside!r}, "a"))
attempt("truncate", lambda: os.truncate({outside!r}, 0))
attempt("unlink", lambda: os.unlink({outside!r}))
attempt("rename", lambda: os.rename({outside!r}, "moved"))
attempt("symlink", lambda: os.symlink({outside!r}, "link"))
attempt("link", lambda: os.link({outside!r}, "link"))
attempt("mkdir", lambda: os.mkdir({outside!r} + ".d"))
attempt("inside", lambda: open("inside", "w").write("x"))
attempt("read", lambda: open({outside!r}).read())
"""


@linux
@pytest.mark.parametrize("landlock", [True, False])
def test_the_kernel_alone_holds_it_with_and_without_landlock(landlock: bool, tmp_path: Path) -> None:
    if lock_down.SYSTEM_CALLS not in LAYERS or (landlock and lock_down.FILES not in LAYERS):
        pytest.skip(f"this kernel has only: {', '.join(LAYERS)}")
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("untouched")
    folder.mkdir()
    package = str(Path(lock_down.__file__).parent)
    code = KERNEL_ALONE.format(package=package, landlock=landlock, folder=str(folder), outside=str(outside))
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=20, check=False
    )
    assert not done.stderr
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert outcomes.pop("inside") == ("DONE" if landlock else "EPERM")
    assert outcomes.pop("read") == ("EACCES" if landlock else "DONE")
    assert len(outcomes) == 15
    assert set(outcomes.values()) <= {"EPERM", "EACCES", "EXDEV"}, outcomes
    assert outside.read_text() == "untouched"


AUDIT_ALONE = """
import os, sys
sys.path.insert(0, {package!r})
import lock_down
lock_down._limit(memory=2**29, seconds=5, file_size=1000)
lock_down._add_audit_hook(os.getcwd(), [])
for action in (os.fork, lambda: os.system("true"), lambda: open({outside!r}, "w"), lambda: os.unlink({outside!r}), lambda: open("/etc/passwd")):
    try:
        action()
    except PermissionError as error:
        print(error)
open("inside", "w").write("x")
"""


def test_where_the_kernel_has_nothing_pythons_own_functions_still_refuse(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("untouched")
    folder.mkdir()
    code = AUDIT_ALONE.format(package=str(Path(lock_down.__file__).parent), outside=str(outside))
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout.count("not allowed here") == 5, done.stdout + done.stderr
    assert not done.stderr
    assert outside.read_text() == "untouched"
    assert (folder / "inside").read_text() == "x"


@linux
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may have as many processes as it likes")
def test_the_limit_of_processes_alone_contains_a_fork_bomb(tmp_path: Path) -> None:
    package = str(Path(lock_down.__file__).parent)
    code = f"import os, sys\nsys.path.insert(0, {package!r})\nimport lock_down\nlock_down._limit(memory=2**29, seconds=5, file_size=1)\nos.fork()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
    )
    assert "BlockingIOError" in done.stderr


def test_no_layer_needs_root() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("asked by root, for an ordinary user")
    package = str(Path(lock_down.__file__).parent)
    code = (
        f"import os, sys\nsys.path.insert(0, {package!r})\nimport lock_down, ctypes, resource\nos.setgid(65534); os.setuid(65534)\n"
        "print(lock_down.lock_down('/tmp', ['/usr'], memory=2**29, seconds=5, file_size=1))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.strip() == str(list(LAYERS)), done.stderr
