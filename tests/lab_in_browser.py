"""A real JupyterLab in a real browser: a server of its own, and pages with one notebook open."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TESTS = Path(__file__).parent


class JupyterLab:
    """A running JupyterLab on the loopback, whose files and settings are in `root`. Its kernels are this Python."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port

    def use_theme(self, name: str) -> None:
        """Pages that are opened from now on have this theme, no box with news, and all cells in the page, seen or not."""
        quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
        self._set("apputils-extension", "themes", {"theme": name})
        self._set("apputils-extension", "notification", quiet)
        self._set("notebook-extension", "tracker", {"windowingMode": "none"})

    def _set(self, extension: str, plugin: str, values: dict[str, Any]) -> None:
        folder = self.root / "settings" / "@jupyterlab" / extension
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{plugin}.jupyterlab-settings").write_text(json.dumps(values), encoding="utf-8")

    def write(self, name: str, *cells: str) -> None:
        """Write a notebook of code cells."""
        import nbformat

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / "files" / name)

    def open(self, page: Page, name: str) -> None:
        """Show a notebook alone, with its kernel started and idle."""
        page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/auto-{Path(name).stem}/tree/{name}?reset")
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell", timeout=60_000)
        wait_until_idle(page)


_SESSION = "window.jupyterapp.shell.currentWidget.sessionContext"


def wait_until_idle(page: Page) -> None:
    """Wait for the kernel of the notebook that is shown; the page's own indicator says idle before there is a kernel."""
    page.wait_for_function(f"{_SESSION}?.session?.kernel?.connectionStatus === 'connected'")
    page.evaluate(f"{_SESSION}.ready.then(() => {_SESSION}.session.kernel.info).then(() => null)")
    page.wait_for_function(f"{_SESSION}.session.kernel.status === 'idle'")


def run_all(page: Page, *, seconds: float = 120) -> None:
    """Run > Run All Cells, to its end; an exception in a cell is an AssertionError here."""
    start_all(page)
    wait_until_run(page, seconds=seconds)


def start_all(page: Page) -> None:
    """Run > Run All Cells; does not wait."""
    page.evaluate(
        "() => { window.ran = undefined; window.jupyterapp.commands.execute('notebook:run-all-cells').then((well) => { window.ran = well === true; }); }"
    )


def wait_until_run(page: Page, *, seconds: float = 120) -> None:
    """Wait until all cells that `start_all` started have run."""
    page.wait_for_function("window.ran !== undefined", timeout=1000 * seconds)
    if not page.evaluate("window.ran"):  # the cells after the one that raised were not run, so its output is the last
        raise AssertionError(page.locator(".jp-OutputArea-output").last.inner_text()[-1500:])


@contextmanager
def jupyter_lab(root: Path) -> Iterator[JupyterLab]:
    """Start a server; end it with its kernels."""
    (root / "files").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = JupyterLab(root, port)
    lab.use_theme("JupyterLab Light")
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "IPYTHONDIR": str(root / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "COURSE_SCALE": "tiny",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={root / 'files'}",
    ]
    command += ["--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"]
    with (root / "log.txt").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, root / "log.txt")
            yield lab
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-2000:]}") from None
            time.sleep(0.2)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed chromium; the test is skipped where there is none, or no Playwright to drive it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make .venv/.dev")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(BROWSER_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def new_page(browser: Browser, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """A page without cookies or cache of its own; waits are at most half a minute."""
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(30_000)
    try:
        yield context.new_page()
    finally:
        context.close()


def serious_faults(page: Page, selector: str) -> list[str]:
    """What axe-core finds within `selector` and calls serious or critical, one line each; skips where axe is not installed."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-playwright-python: make .venv/.dev")
    page.evaluate(axe.AXE_SCRIPT)
    found = page.evaluate("selector => axe.run(selector)", selector)
    assert found["passes"], f"axe looked at nothing: is {selector} there?"
    return [
        f"{fault['id']} ({fault['impact']}): {node['html'][:200]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
