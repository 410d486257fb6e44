"""Run All Cells on every notebook, in a real JupyterLab in a real browser, at tiny scale: no cell raises, every widget draws, a chat answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab_in_browser import JupyterLab, new_page, run_all

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.notebook]
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_a_cell_that_raises_is_seen(lab: JupyterLab, browser: Browser) -> None:
    lab.write("raises.ipynb", "import sys; print('only a warning', file=sys.stderr)", "1 / 0", "2")
    with new_page(browser) as page:
        lab.open(page, "raises.ipynb")
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            run_all(page)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all_cells_ends_without_an_error(lab: JupyterLab, browser: Browser, path: Path) -> None:
    files = lab.root / "files"
    for beside in ("data", "benchmarks/results"):  # what notebooks read by relative path
        shutil.copytree(ROOT / beside, files / beside, dirs_exist_ok=True)
    (files / "notebooks").mkdir(exist_ok=True)
    shutil.copy(path, files / "notebooks" / path.name)
    with new_page(browser) as page:
        lab.open(page, f"notebooks/{path.name}")
        run_all(page, seconds=500)
        assert page.locator(".jp-OutputArea-output:has-text('Error displaying widget')").count() == 0
        if "ChatWidget(" in path.read_text(encoding="utf-8"):
            ask_the_chat(page)


def ask_the_chat(page: Page) -> None:
    """The question that the notebook's code asked is there with its answers; one typed into the box is answered too."""
    from playwright.sync_api import expect

    chat = page.locator(".course-chat")
    turns = chat.locator(".course-chat-turns > li")
    expect(turns).to_have_count(1)
    box = chat.locator(".course-chat-ask textarea")
    box.fill("And what is your name?")
    box.press("Enter")
    expect(turns).to_have_count(2)
    expect(chat).to_have_attribute("data-busy", "false", timeout=60_000)
    notes = turns.locator(".course-chat-answer > .course-note").all_inner_texts()
    assert notes
    assert all("tokens/s" in note for note in notes), notes
