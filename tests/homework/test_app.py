"""The app of the advanced homework's solution, which its check only reads, run by streamlit's test harness against a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from assignments import nbgrader, notebook
from serving import model_says, serving


def solved_app() -> str:
    cell = next(cell for cell in notebook("hw_advanced").cells if nbgrader(cell).get("grade_id") == "app")
    names: dict[str, Any] = {}
    exec(cell.source, names)
    return names["APP"]


def test_the_app_answers_and_remembers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    from course_lib.models import load_model

    loaded = load_model(tiny)
    with serving(loaded, api_key="mine") as running:
        monkeypatch.setenv("SERVER", running.url)
        monkeypatch.setenv("SERVER_KEY", "mine")
        shown = AppTest.from_string(solved_app(), default_timeout=30).run()
        assert not shown.exception
        with model_says(loaded, "I am Pip."):
            shown.chat_input[0].set_value("Who are you?").run()
        with model_says(loaded, "Pip, as I said."):
            shown.chat_input[0].set_value("And your name?").run()
        assert not shown.exception
        assert [one.markdown[0].value for one in shown.chat_message] == [
            *("Who are you?", "I am Pip.", "And your name?", "Pip, as I said."),
        ]
        assert [turn["role"] for turn in shown.session_state["history"]] == ["user", "assistant"] * 2
        tokens = [int(line.split()[0]) for line in running.lines if line.split()[0].isdigit()]
        assert tokens[1] > tokens[0], "the second request holds what was said before"
