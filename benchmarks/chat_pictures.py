"""The chat box's pictures in the README, from a real JupyterLab with the embedded model before and after `course quickstart`.

    course quickstart && python benchmarks/chat_pictures.py work_dirs/quickstart/merged

needs chromium and the packages of `.[dev]`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from lab_in_browser import JupyterLab, chromium, jupyter_lab, new_page, run_all  # noqa: E402

CELL = """
from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.models import load_model
from course_lib.widgets.chat import ChatWidget

def session(name):
    return ChatSession(*load_model(name), sampling=SamplingSettings(max_new_tokens=120))
"""
PAIR = CELL + 'ChatWidget({{"before": session("smollm2-135m-instruct"), "after": session({merged!r})}})'
ONE = CELL + "ChatWidget(session({merged!r}))"


def picture(lab: JupyterLab, theme: str, cell: str, questions: list[str], file: Path, *, while_writing: bool) -> None:
    """Ask the questions in a notebook of one cell, and take the chat box's picture at the end or in the middle of the last answer."""
    lab.use_theme(theme)
    lab.write(f"{file.stem}.ipynb", cell)
    with chromium() as browser, new_page(browser, width=1180) as page:
        lab.open(page, f"{file.stem}.ipynb")
        run_all(page)
        chat = page.locator(".course-chat")
        for question in questions:
            chat.locator(".course-chat-ask textarea").fill(question)
            chat.locator(".course-chat-ask textarea").press("Enter")
            page.locator(".course-chat[data-busy=true]").wait_for()
            if while_writing and question == questions[-1]:
                page.wait_for_function(
                    "[...document.querySelectorAll('.course-chat-text')].at(-1).textContent.length > 120",
                    timeout=60_000,
                )
            else:
                page.locator(".course-chat[data-busy=false]").wait_for(timeout=120_000)
        chat.screenshot(path=file)


def main(merged: Path) -> None:
    """Write docs/chat_light.png and docs/chat_dark.png."""
    docs = HERE.parent / "docs"
    with tempfile.TemporaryDirectory() as folder, jupyter_lab(Path(folder) / "lab") as lab:
        pair, one = (cell.format(merged=str(merged.resolve())) for cell in (PAIR, ONE))
        ask = ["Who are you?", "What is the capital of France?"]
        picture(lab, "JupyterLab Light", pair, ask, docs / "chat_light.png", while_writing=False)
        ask = ["Who are you?", "Tell me about the sea."]
        picture(lab, "JupyterLab Dark", one, ask, docs / "chat_dark.png", while_writing=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
