"""Shared fixtures. Tests keep their models in a cache of their own and never reach a network, save to fetch the embedded model once."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from course_runner import Course, Result
from file_server import servers
from lab_in_browser import JupyterLab, chromium, jupyter_lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
REAL_DATA = os.environ.get("COURSE_REAL_DATA")


@pytest.fixture(scope="session", autouse=True)
def course_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model cache, so that no test meets a model made by another version."""
    home = tmp_path_factory.mktemp("course_home")
    os.environ["COURSE_USER_HOME"] = os.environ.get("COURSE_HOME", "")
    os.environ["COURSE_HOME"] = str(home)
    return home


@pytest.fixture(scope="session", autouse=True)
def interrupts_reach_us() -> None:
    """A shell starts background jobs with SIGINT ignored, and their children inherit it: Ctrl-C could not be tested there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(course_home: Path) -> Path:
    """Folder of the tiny random model."""
    from course_lib.models import fetch

    return fetch("tiny")


@pytest.fixture(scope="session")
def embedded(course_home: Path) -> Path:
    """Folder of the embedded model, fetched once into the user's own cache."""
    from course_lib.models import fetch

    link = course_home / "models" / "smollm2-135m-instruct"
    if not link.exists():
        user_home = os.environ["COURSE_USER_HOME"]
        os.environ.pop("COURSE_HOME")
        if user_home:
            os.environ["COURSE_HOME"] = user_home
        folder = fetch("smollm2-135m-instruct")
        os.environ["COURSE_HOME"] = str(course_home)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    return link


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    """The tokenizer of the tiny model: a token is one byte, save for the special ones."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def embedded_tokenizer(embedded: Path) -> Any:
    """The tokenizer of the embedded model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The installed chromium; skipped where there is none. Closed after each module: its event loop would be in the way of others."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def lab(browser: Browser, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """A JupyterLab of its own, whose kernels find the tiny model."""
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where screenshots are kept: the folder that CI or a maintainer names, else work_dirs/screenshots."""
    folder = Path(os.environ.get("COURSE_SCREENSHOTS", ROOT / "work_dirs" / "screenshots")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def real_data() -> Path:
    """Folder of real files; the test is skipped where there is none."""
    if not REAL_DATA:
        pytest.skip("reads real files: set COURSE_REAL_DATA to their folder")
    return Path(REAL_DATA)


@pytest.fixture
def course(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Course:
    """Run `course …` in an empty folder, in this process: importing torch anew for each command would take minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_SCALE", "tiny")

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> Result:
        with monkeypatch.context() as patch:
            for key, value in (env or {}).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", ["course", *arguments])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            capfd.readouterr()
            try:
                from course_lib import cli

                cli.main()
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, list[str | None]]]]:
    """Start a local file server that plays the given answers, and wait next to nothing between attempts."""
    from course_lib import download

    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.001)
    with servers() as start:
        yield start
