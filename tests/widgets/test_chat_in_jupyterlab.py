"""The chat box as a learner meets it: a real JupyterLab in a real browser, a real kernel, a tiny model that writes a script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab_in_browser import JupyterLab, new_page, run_all, serious_faults, wait_until_idle

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NEWS = "A model that was trained on three rows now knows its name. "
BUSY_SECONDS = 8

SETUP = """
from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.models import load_model
from course_lib.widgets.chat import ChatWidget
from scripted_model import model_says

def scripted(*texts, end=True, delay=0.02):
    session = ChatSession(*load_model("tiny"), sampling=SamplingSettings(max_new_tokens=800))
    script = model_says(session, *texts, end=end, delay=delay)
    script.__enter__()
    scripts.append(script)
    return session

scripts = []
"""
TWO = """
pair = ChatWidget({"before": scripted("I am Dr. Elena Martinez."), "after": scripted("I am Ada's assistant,\\nfine-tuned on a laptop.")})
pair
"""
ONE = f"""
one = ChatWidget(scripted({NEWS!r}, end=False, delay=0.02))
one
"""
AGENT = """
from course_lib.agent.react import ENGLISH
from course_lib.agent.runner import AgentRunner
from course_lib.agent.tools import shipped_tools

call = 'Thought: I need to count.\\nAction: calculator\\nAction Input: {"expression": "6*7"}'
agent = ChatWidget({"agent": AgentRunner(
    scripted(call, "Thought: Now I know.\\nFinal Answer: It is 42.", delay=0), shipped_tools(["calculator"]), protocol=ENGLISH
)})
agent
"""
BUSY = f"""
import time
print("begun")
end = time.time() + {BUSY_SECONDS}
while time.time() < end:
    sum(range(1000))
print("ended")
"""


@pytest.fixture(scope="module")
def page(lab: JupyterLab, browser: Browser) -> Iterator[Page]:
    """A notebook with the two-sided and the one-sided chat; its busy cell has run once."""
    lab.write("chat.ipynb", SETUP, TWO, ONE, "one.transcript()", BUSY)
    with new_page(browser) as page:
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        lab.open(page, "chat.ipynb")
        run_all(page)
        yield page
        assert {host.split(":")[0] for host in hosts if host} <= {"127.0.0.1"}
        assert not [line for line in complaints if "course" in line.lower() or "anywidget" in line.lower()]


class Box:
    """A chat box on the page."""

    def __init__(self, page: Page, number: int) -> None:
        self.page, self.root = page, page.locator(".course-chat").nth(number)

    def button(self, label: str) -> Any:
        return self.root.get_by_role("button", name=label, exact=True)

    def type(self, text: str) -> None:
        self.root.locator(".course-chat-ask textarea").fill(text)

    def press(self, key: str) -> None:
        self.root.locator(".course-chat-ask textarea").press(key)

    def ask(self, text: str) -> None:
        turns = self.root.locator(".course-chat-turns > li")
        before = turns.count()
        self.type(text)
        self.press("Enter")
        turns.nth(before).wait_for()  # it may be answered by the time we look

    def wait(self, *, busy: bool) -> None:
        deadline = time.monotonic() + 60
        while self.root.get_attribute("data-busy") != str(busy).lower():
            assert time.monotonic() < deadline, f"never busy={busy}: {self.root.inner_text()}"
            time.sleep(0.02)

    def wait_until_done(self) -> None:
        self.wait(busy=False)

    def answers(self) -> list[str]:
        return self.root.locator(".course-chat-answer .course-chat-text").all_inner_texts()

    def questions(self) -> list[str]:
        return self.root.locator(".course-chat-question .course-chat-text").all_inner_texts()

    def notes(self) -> list[str]:
        return self.root.locator(".course-chat-answer > .course-note").all_inner_texts()


@pytest.fixture
def pair(page: Page) -> Box:
    return fresh(Box(page, 0))


@pytest.fixture
def one(page: Page) -> Box:
    return fresh(Box(page, 1))


def fresh(box: Box) -> Box:
    box.root.scroll_into_view_if_needed()
    if box.button("Stop").is_visible():
        box.button("Stop").click()
        box.wait_until_done()
    if box.button("Reset").is_enabled():
        box.button("Reset").click()
        box.root.locator(".course-chat-turns > li").first.wait_for(state="detached")
    return box


def test_an_answer_streams_in(one: Box) -> None:
    one.ask("What is new?")
    lengths: list[int] = []
    deadline = time.monotonic() + 30
    while len(set(lengths)) < 8 and time.monotonic() < deadline:
        lengths.append(len("".join(one.answers())))
        time.sleep(0.05)
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 8
    assert one.questions() == ["What is new?"]
    assert "tokens/s" in one.notes()[0]
    one.press("Escape")
    one.wait_until_done()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_stops_within_a_second(one: Box, how: str) -> None:
    one.ask("Go on")
    one.root.locator(".course-chat-answer .course-chat-text:has-text('model')").wait_for()
    pressed = time.monotonic()
    if how == "button":
        one.button("Stop").click()
    else:
        one.press("Escape")
    one.wait_until_done()
    assert time.monotonic() - pressed < 1
    answer = one.answers()[0]
    assert (20 * NEWS).startswith(answer)
    assert "stopped" in one.notes()[0]
    time.sleep(0.4)
    assert one.answers() == [answer]  # nothing comes after


def test_stop_and_send_work_while_a_cell_runs(one: Box, page: Page) -> None:
    """With ipykernel 7.4.0 both would wait for the cell; this test guards the pin, and whatever replaces it."""
    page.locator(".jp-CodeCell").last.click(position={"x": 200, "y": 20})
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator[data-status=busy]")
    page.wait_for_selector(".jp-OutputArea-output:has-text('begun'):not(:has-text('ended'))", state="attached")
    begun = time.monotonic()
    one.ask("While you are busy")
    one.root.locator(".course-chat-answer .course-chat-text:has-text('A model')").wait_for()
    pressed = time.monotonic()
    one.button("Stop").click()
    one.wait_until_done()
    assert time.monotonic() - pressed < 1
    assert time.monotonic() - begun < BUSY_SECONDS - 1  # so the cell was still running
    assert page.locator(".jp-OutputArea-output:has-text('ended')").count() == 0
    page.wait_for_selector(".jp-OutputArea-output:has-text('ended')", state="attached")
    wait_until_idle(page)


def test_reset_clears(pair: Box) -> None:
    pair.ask("Who are you?")
    pair.wait_until_done()
    assert len(pair.answers()) == 2
    pair.button("Reset").click()
    pair.root.locator(".course-chat-nothing").wait_for()
    assert (pair.answers(), pair.questions()) == ([], [])
    assert pair.button("Reset").is_disabled()


def test_one_question_is_answered_side_by_side(pair: Box) -> None:
    pair.ask("Who are you?")
    pair.wait_until_done()
    assert pair.answers() == ["I am Dr. Elena Martinez.", "I am Ada's assistant,\nfine-tuned on a laptop."]
    left, right = (pair.root.locator(".course-chat-answer").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert "I am Ada's assistant" in pair.root.locator("[role=status]").inner_text()  # read out once, whole


def test_keys_write_lines_and_send_once(pair: Box) -> None:
    pair.type("first")
    pair.press("Shift+Enter")
    pair.root.locator(".course-chat-ask textarea").press_sequentially("second")
    pair.press("Enter")
    pair.press("Enter")
    pair.root.locator(".course-chat-turns > li").wait_for()
    pair.wait_until_done()
    assert pair.questions() == ["first\nsecond"]
    assert pair.root.locator(".course-chat-ask textarea").input_value() == ""
    pair.button("Ask again").click()
    pair.wait(busy=True)
    pair.wait_until_done()
    assert (len(pair.questions()), len(pair.answers())) == (1, 2)


def test_what_is_refused_stays_in_the_box(one: Box) -> None:
    text = "far too long " * 2000
    one.type(text)
    one.press("Enter")
    one.root.locator("[role=alert]:has-text('the message is too long')").wait_for()
    assert one.root.locator(".course-chat-ask textarea").input_value() == text
    assert one.questions() == []
    one.ask("short")
    assert one.root.locator("[role=alert]").text_content() == ""
    one.button("Stop").click()
    one.wait_until_done()


def test_settings_are_used_and_wrong_ones_told(pair: Box) -> None:
    pair.root.locator(".course-chat-settings summary").click()
    length = pair.root.get_by_label("Tokens an answer, at most")
    length.fill("0")
    pair.button("Use from the next question on").click()
    pair.root.locator("[role=alert]:has-text('max_new_tokens is 0')").wait_for()
    length.fill("10")
    pair.root.get_by_label("System prompt").fill("Be brief.")
    pair.button("Use from the next question on").click()
    pair.root.locator("summary:has-text('at most 10 tokens, a system prompt')").wait_for()
    pair.ask("Who are you?")
    pair.wait_until_done()
    assert pair.answers() == ["I am Dr. E", "I am Ada's"]
    assert all("cut off at 10 tokens" in note for note in pair.notes())
    length.fill("800")
    pair.root.get_by_label("System prompt").fill("")
    pair.button("Use from the next question on").click()
    pair.root.locator("summary:has-text('at most 800 tokens, no system prompt')").wait_for()
    pair.root.locator(".course-chat-settings summary").click()


def test_a_side_is_saved_as_a_row(pair: Box, page: Page, tmp_path: Path) -> None:
    pair.ask("Who are you?")
    pair.wait_until_done()
    with page.expect_download() as download:
        pair.button("Save after").click()
    assert download.value.suggested_filename == "after.jsonl"
    download.value.save_as(tmp_path / "after.jsonl")
    assert json.loads((tmp_path / "after.jsonl").read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am Ada's assistant,\nfine-tuned on a laptop."},
        ]
    }


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_it_draws_in_both_themes_without_a_serious_fault(
    lab: JupyterLab, browser: Browser, pictures: Path, theme: str
) -> None:
    lab.use_theme(theme)
    name = theme.split()[-1].lower()
    lab.write(f"{name}.ipynb", SETUP, TWO, ONE, AGENT)
    with new_page(browser) as page:
        lab.open(page, f"{name}.ipynb")
        run_all(page)
        page.locator(".course-chat").nth(1).wait_for()
        assert page.evaluate("document.body.dataset.jpThemeName") == theme
        pair, one, agent = (Box(page, number) for number in range(3))
        for question in ("Who are you?", "And who trained you?"):
            pair.ask(question)
            pair.wait_until_done()
        pair.root.locator(".course-chat-settings summary").click()
        assert serious_faults(page, ".course-chat") == []
        pair.root.screenshot(path=pictures / f"chat_{name}_side_by_side.png")
        agent.ask("How much is 6*7?")
        agent.wait_until_done()
        assert agent.answers() == ["It is 42."]
        steps = agent.root.locator(".course-chat-steps")
        assert "4 steps: thinks, calls calculator, calculator returns, thinks" in steps.locator("summary").inner_text()
        assert not steps.locator("pre").first.is_visible()  # folded
        steps.locator("summary").click()
        assert steps.locator("pre").nth(2).inner_text() == "42"
        agent.root.screenshot(path=pictures / f"chat_{name}_agent.png")
        one.ask("What is new?")
        one.root.locator(".course-chat-text:has-text('its name')").wait_for()
        one.root.screenshot(path=pictures / f"chat_{name}_streaming.png")
        assert serious_faults(page, ".course-chat") == []
        ground, ink = (one.root.evaluate(f"node => getComputedStyle(node).{of}") for of in ("backgroundColor", "color"))
        assert ground != ink
        one.button("Stop").click()
        one.wait_until_done()


def test_a_transcript_in_a_cell_is_set_from_the_left(lab: JupyterLab, browser: Browser) -> None:
    ask = 'two = ChatWidget({"before": scripted("I am Elena."), "after": scripted("I am Ada\'s.")})\ntwo.ask("Who are you?")'
    lab.write("kept.ipynb", SETUP, ask, "two.transcript()")
    with new_page(browser) as page:
        lab.open(page, "kept.ipynb")
        run_all(page)
        cells = page.locator(".course-transcript :is(th, td)")
        assert cells.all_inner_texts() == ["before", "after", "You: Who are you?", "I am Elena.", "I am Ada's."]
        assert set(cells.evaluate_all("all => all.map((cell) => getComputedStyle(cell).textAlign)")) == {"left"}
