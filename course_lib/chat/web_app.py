"""The processes of the web app: the page, and where a model is named a server beside it. They end with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from course_lib.errors import CourseError, InputError

PAGE = Path(__file__).with_name("streamlit_app.py")
SECONDS_TO_END = 10
_SETTINGS = {
    "server.headless": "true",
    "server.address": "127.0.0.1",
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "type",
}


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception, so that the processes it started end too."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def run_page(url: str, api_key: str, *, port: int, say: Callable[[str], None]) -> None:
    """Serve the page on a port of this machine until Ctrl-C; it talks to the server at `url`.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        CourseError: streamlit ended by itself.
    """
    settings = [f"--{name}={value}" for name, value in {**_SETTINGS, "server.port": str(port)}.items()]
    environment = os.environ | {"COURSE_URL": url, "COURSE_API_KEY": api_key}
    command = [sys.executable, "-m", "streamlit", "run", str(PAGE), *settings]
    with _process(command, environment, stdout=subprocess.DEVNULL) as page:
        say(f"open http://127.0.0.1:{port} in a browser (Ctrl-C ends it); it talks to {url}")
        status = page.wait()
    raise CourseError(f"the page ended by itself, with status {status}; what streamlit says stands above")


@contextmanager
def started_server(arguments: Sequence[str], api_key: str, *, say: Callable[[str], None]) -> Iterator[str]:
    """Run `course serve ARGUMENTS` on a free port and give its URL; what it says is passed on.

    Raises:
        InputError, CourseError: it ended before it served; the message is what it said.
    """
    command = [sys.executable, "-m", "course_lib.cli", "serve", *arguments, "--port", "0"]
    with _process(command, os.environ | {"COURSE_API_KEY": api_key}, stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        last = ""
        for line in server.stderr:
            if last:
                say(last)
            last = line.rstrip()
            if last.startswith("serving "):
                break
        else:
            kind = InputError if server.wait() == InputError.exit_code else CourseError
            raise kind(last.removeprefix("course: ") or f"the server ended with status {server.returncode}")
        threading.Thread(target=_pass_on, args=(server, say), daemon=True).start()
        yield last.split()[3]


def _pass_on(server: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    assert server.stderr is not None
    for line in server.stderr:
        say(line.rstrip())


@contextmanager
def _process(command: Sequence[str], environment: dict[str, str], **streams: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.DEVNULL, **streams) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
