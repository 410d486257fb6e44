"""The web app: its page run by streamlit's own test harness, and in a real browser against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, eventually, model_says, model_writes, serving

from course_lib.agent.tools import shipped_tools
from course_lib.chat.api_agent import AgentAnswer, ApiWriter
from course_lib.chat.api_client import ApiAnswer, check_url, list_models
from course_lib.chat.web_app import PAGE
from course_lib.errors import CourseError, InputError

NOWHERE = "http://127.0.0.1:9/v1"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the page's script against a server."""
    from streamlit.testing.v1 import AppTest

    def run(url: str, key: str = "") -> Any:
        monkeypatch.setenv("COURSE_URL", url)
        monkeypatch.setenv("COURSE_API_KEY", key)
        return AppTest.from_file(str(PAGE), default_timeout=30).run()

    return run


def test_a_missing_server_is_a_message_in_the_page(page: Callable[..., Any]) -> None:
    shown = page(NOWHERE)
    assert not shown.exception
    assert [error.value for error in shown.error] == [
        f"No server answers at {NOWHERE}; start one with: course serve MODEL."
    ]


def test_a_wrong_key_is_a_message_in_the_page_and_the_right_one_opens_it(
    page: Callable[..., Any], loaded: tuple[Any, Any]
) -> None:
    with serving(loaded, api_key="right") as running, model_says(loaded, "hi"):
        shown = page(running.url, "wrong")
        assert [error.value for error in shown.error] == [
            f"The server at {running.url} refuses the API key; give the right one, here or as COURSE_API_KEY."
        ]
        shown.text_input[0].set_value("right").run()
        assert not shown.error
        assert shown.selectbox[0].options == ["tiny"]


def test_a_conversation_goes_on_and_is_kept(page: Callable[..., Any], loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running:
        shown = page(running.url)
        shown.text_area[0].set_value("be brief").run()
        with model_says(loaded, "a ![picture](http://evil.example/x.png)"):
            shown.chat_input[0].set_value("hello").run()
        assert not shown.exception
        assert [message.markdown[0].value for message in shown.chat_message] == [
            "hello",
            "a \\![picture](http://evil.example/x.png)",
        ]
        assert eventually(lambda: len(running.lines) == 1)  # written a moment after the answer is there
        first = int(running.lines[-1].split()[0])
        with model_says(loaded, "again"):
            shown.chat_input[0].set_value("and?").run()
        assert [message.markdown[0].value for message in shown.chat_message][2:] == ["and?", "again"]
        assert eventually(lambda: len(running.lines) == 2)
        assert int(running.lines[-1].split()[0]) > first  # the history went along


def test_what_the_server_refuses_is_told_and_can_be_tried_again(
    page: Callable[..., Any], loaded: tuple[Any, Any]
) -> None:
    with serving(loaded) as running:
        shown = page(running.url)
        shown.number_input[0].set_value(5000).run()
        shown.chat_input[0].set_value("hello").run()
        assert "does not fit into the context of 2048" in shown.error[0].value
        shown.number_input[0].set_value(20).run()
        (again,) = [button for button in shown.button if button.label == "Try again"]
        with model_says(loaded, "now"):
            again.click().run()
        assert [message.markdown[0].value for message in shown.chat_message] == ["hello", "now"]
        assert not shown.error


@pytest.mark.parametrize("protocol", ["react_en", "native"])
def test_an_agent_calls_tools_here_and_the_steps_are_shown_and_kept(
    page: Callable[..., Any], loaded: tuple[Any, Any], protocol: str
) -> None:
    call, answer = (
        'Thought: multiply\nAction: calculator\nAction Input: {"expression": "6*7"}',
        "Final Answer: It is 42.",
    )
    if protocol == "native":
        call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
        answer = "It is 42."
    with serving(loaded, template="qwen_chat") as running:
        shown = page(running.url)
        shown.toggle[0].set_value(True).run()
        shown.number_input[0].set_value(200).run()
        shown.selectbox[1].set_value(protocol)
        for box in shown.checkbox:
            box.set_value(box.label == "calculator")  # all of them do not fit into the tiny model's context
        shown.run()
        with model_writes(loaded, [call, answer]):
            shown.chat_input[0].set_value("What is 6 times 7?").run()
        assert not shown.exception
        assert not shown.error, shown.error[0].value
        assert shown.chat_message[1].markdown[-1].value == "It is 42."
        steps = [text.value for text in shown.chat_message[1].expander[0].text]
        assert steps == [
            *(["Thought: multiply"] if protocol == "react_en" else []),
            'Call: calculator {"expression": "6*7"}',
            "Result: 42",
        ]
        chat = shown.session_state["chat"]
        row = chat.row("")
        assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
        assert row["messages"][1]["tool_calls"][0]["id"] == row["messages"][2]["tool_call_id"]
        assert "calculator" in {tool["function"]["name"] for tool in row["tools"]}
        shown.toggle[0].set_value(False).run()
        with model_says(loaded, "Bye."):
            shown.chat_input[0].set_value("Thanks").run()  # without tools, the same conversation goes on
        assert not shown.error, shown.error[0].value
        assert [message.markdown[-1].value for message in shown.chat_message] == [
            "What is 6 times 7?", "It is 42.", "Thanks", "Bye.",
        ]  # fmt: skip


def test_stopping_an_agent_ends_its_turn_at_the_server(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "Final Answer: on and on ", end=False, delay=0.01):
        writer = ApiWriter(running.url, "", model="tiny", max_tokens=500)
        asked = {"tools": shipped_tools(["calculator"]), "protocol": "react_en", "system": "", "history": []}
        agent = AgentAnswer(writer, "hello", **asked)
        assert eventually(lambda: agent.text.startswith("on and"))
        agent.stop()
        assert running.said("its client left")
        assert [message["role"] for message in agent.messages()] == ["user", "assistant"]
        agent = AgentAnswer(ApiWriter(NOWHERE, "", model="tiny"), "hello", **asked)
        assert agent.wait(10)
        assert "no server answers" in str(agent.failure)
        assert agent.messages() == []


def test_stopping_an_answer_ends_it_at_the_server(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01):
        first = ApiAnswer(running.url, "", model="tiny", messages=HELLO, max_tokens=1500)
        assert eventually(lambda: first.text.startswith("word"))
        second = ApiAnswer(running.url, "", model="tiny", messages=HELLO)  # waits in line
        assert eventually(lambda: running.queue._here == 2)
        for answer, says in ((second, "a client left before its turn came"), (first, "its client left")):
            answer.stop()
            assert running.said(says)
            assert answer.wait(5)
            assert answer.failure is None
            answer.stop()


def test_a_server_that_breaks_off_is_told_so_and_what_came_is_there(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01):
        answer = ApiAnswer(running.url, "", model="tiny", messages=HELLO, max_tokens=1500)
        assert eventually(lambda: answer.text.startswith("word"))
        for connection in list(running.server.server_state.connections):
            running.server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
        assert answer.wait(10)
        assert str(answer.failure) == f"the connection to {running.url} broke off in mid-answer"
        assert running.said("its client left")


def test_what_went_wrong_is_told_in_a_line(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(CourseError, match="no server answers at http://127.0.0.1:9/v1"):
        list_models(NOWHERE, "")
    with serving(loaded) as running:
        assert list_models(running.url, "") == ["tiny"]
        with pytest.raises(CourseError, match="GET /models: Not Found"):
            list_models(running.url.removesuffix("/v1"), "")
        answer = ApiAnswer(running.url, "", model="gpt-4", messages=HELLO)
        assert answer.wait(10)
        assert "the server says: model 'gpt-4' is not served here" in str(answer.failure)
    for wrong in ("", "127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:port", "http://[::1"):
        with pytest.raises(InputError, match=r"is no server's address"):
            check_url(wrong)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running(loaded: tuple[Any, Any]) -> Iterator[Running]:
    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def address(running: Running) -> Iterator[str]:
    """Where `course app` shows its page."""
    command = [sys.executable, "-m", "course_lib.cli", "app", "--url", running.url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COURSE_API_KEY": ""}) as app:
        assert app.stderr is not None
        yield app.stderr.readline().split()[1]
        app.terminate()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_in_a_browser(
    chromium: Any,
    running: Running,
    loaded: tuple[Any, Any],
    address: str,
    scheme: Any,
    pictures: Path,
    tmp_path: Path,
) -> None:
    """An answer streams in, Stop stops it, the transcript is what was said; nobody else is contacted; axe finds no serious fault."""
    context = chromium.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 800})
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    page.on("pageerror", lambda error: errors.append(str(error)))
    assert eventually(lambda: _opens(page, address), within=30)
    box = page.get_by_test_id("stChatInputTextArea")
    messages = page.get_by_test_id("stChatMessage")
    with model_says(loaded, "Paris is the **capital** of France.", delay=0.01):
        box.fill("What is the capital of France?")
        box.press("Enter")
        page.get_by_text("capital of France.", exact=False).nth(0).wait_for()
        page.get_by_role("button", name="Stop").wait_for(state="hidden")
    assert "Paris is the capital of France." in messages.nth(1).inner_text()
    assert messages.nth(1).locator("strong").inner_text() == "capital"
    lines = len(running.lines)
    with model_says(loaded, "on and on ", end=False, delay=0.02):
        box.fill("Go on")
        box.press("Enter")
        messages.nth(3).get_by_text("on and on on and").wait_for()
        assert _serious_faults(page) == []  # while an answer comes
        page.get_by_role("button", name="Stop").click()
        assert eventually(lambda: any("its client left" in line for line in running.lines[lines:]))
        page.get_by_role("button", name="Stop").wait_for(state="hidden")
    written = messages.nth(3).inner_text()
    assert "on and on on and" in written
    page.screenshot(path=pictures / f"web_app_{scheme}.png")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download transcript").click()
    download.value.save_as(tmp_path / "transcript.jsonl")
    (row,) = map(json.loads, (tmp_path / "transcript.jsonl").read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    assert row["messages"][1]["content"] == "Paris is the **capital** of France."
    assert len(running.lines) == lines + 1  # Stop asks for nothing more
    assert _serious_faults(page) == []
    dark = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
    page.get_by_role("button", name="New chat").click()
    messages.nth(0).wait_for(state="detached")
    _ask_an_agent(page, loaded)
    page.get_by_text("Call: calculator").wait_for()
    assert _serious_faults(page) == []
    page.screenshot(path=pictures / f"web_app_agent_{scheme}.png")
    assert (hosts, errors) == ({"127.0.0.1"}, [])
    context.close()


def _ask_an_agent(page: Any, loaded: tuple[Any, Any]) -> None:
    page.get_by_test_id("stSidebar").get_by_text("Agent", exact=True).click()
    for name in ("search", "solve", "clock", "convert_units"):  # all of them do not fit into the tiny model's context
        label = page.get_by_test_id("stCheckbox").filter(has_text=name)
        label.click()
        label.locator("input:not(:checked)").wait_for(state="attached")
    call = 'Thought: multiply\nAction: calculator\nAction Input: {"expression": "6*7"}'
    with model_writes(loaded, [call, "Final Answer: It is 42."]):
        page.get_by_test_id("stChatInputTextArea").fill("What is 6 times 7?")
        page.get_by_test_id("stChatInputTextArea").press("Enter")
        page.get_by_text("It is 42.", exact=True).wait_for()
        page.get_by_role("button", name="Stop").wait_for(state="hidden")
    page.get_by_text("3 steps").click()


def _serious_faults(page: Any) -> list[tuple[str, str]]:
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    return [(one["id"], node["html"][:200]) for one in serious for node in one["nodes"]]


def _opens(page: Any, address: str) -> bool:
    """Whether the page is there; streamlit takes seconds to listen."""
    from playwright.sync_api import Error

    try:
        page.goto(address)
    except Error:
        return False
    page.get_by_test_id("stChatInputTextArea").wait_for()
    return True
