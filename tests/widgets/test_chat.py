"""The chat box without a browser: its state while threads write, what is kept, what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_model import model_says

from course_lib.agent.react import ENGLISH
from course_lib.agent.runner import AgentRunner
from course_lib.agent.tools import shipped_tools
from course_lib.chat.generation import SamplingSettings
from course_lib.chat.session import ChatSession
from course_lib.data.conversation import conversation
from course_lib.data.tokenize import IGNORE_INDEX, encode_conversation
from course_lib.errors import CourseError, InputError
from course_lib.widgets.chat import ChatWidget
from course_lib.widgets.transcript import Transcript

HOSTILE = "<script>alert(1)</script>"


class FakeSession:
    """A session whose answer is written piece by piece as the test allows: `allow` counts pieces, `fails` is raised after them."""

    def __init__(self, *pieces: str, allow: int = 1000, fails: Exception | None = None) -> None:
        self.pieces, self.fails = pieces, fails
        self.messages: list[dict[str, Any]] = []
        self.sampling, self.last_stats = SamplingSettings(), None
        self.trimmed_turns = self.new_tokens = 0
        self.system, self.stopped = "", False
        self._allowed = threading.Semaphore(allow)

    def allow(self, pieces: int = 1) -> None:
        self._allowed.release(pieces)

    def stream(self, text: str) -> Iterator[str]:
        if len(text) > 20:
            raise InputError("the message is too long")
        self.stopped = False
        return self._answer(text)

    def _answer(self, text: str) -> Iterator[str]:
        said = ""
        for number, piece in enumerate(self.pieces, start=1):
            while not self._allowed.acquire(timeout=0.01):
                if self.stopped:
                    break
            if self.stopped:
                break
            said, self.new_tokens = said + piece, number
            yield piece
        if self.fails:
            raise self.fails
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        ending = "stop" if self.stopped else "end"
        self.last_stats = SimpleNamespace(new_tokens=self.new_tokens, seconds=self.new_tokens / 5, stopped=ending)
        self.new_tokens = 0

    def stop(self) -> None:
        self.stopped = True

    def reset(self) -> None:
        self.messages = []

    def set_system(self, text: str) -> None:
        self.system, self.messages = text, []

    def take_back(self) -> str:
        answer, question = self.messages.pop(), self.messages.pop()
        assert answer["role"] == "assistant"
        return question["content"]


def until(true: Callable[[], Any], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def press(chat: ChatWidget, do: str, **more: Any) -> None:
    """What the browser sends; comes in another thread than the cell's, as in JupyterLab."""
    thread = threading.Thread(target=chat._handle_custom_msg, args=({"do": do, **more}, []))
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "a handler waits"


def texts(chat: ChatWidget) -> list[tuple[str, list[str]]]:
    return [(turn["question"], [answer["text"] for answer in turn["answers"]]) for turn in chat.turns]


def test_an_answer_grows_in_one_trait_and_then_stands_in_the_turns() -> None:
    session = FakeSession("one", " two", " three", allow=0)
    chat = ChatWidget(session)
    seen: list[str] = []
    chat.observe(lambda change: seen.append(change.new["answer"]["text"]) if change.new else None, "live")
    press(chat, "ask", text="count")
    assert texts(chat) == [("count", [""])]
    for piece in ("one", "one two", "one two three"):
        time.sleep(0.1)  # longer than the throttle, so that every piece shows
        session.allow()
        until(lambda piece=piece: not chat.live or chat.live["answer"]["text"] == piece)
    assert chat.wait() == {"model": "one two three"}
    assert [text for text in dict.fromkeys(seen) if text][:2] == ["one", "one two"]
    assert chat.live == {}
    answer = chat.turns[0]["answers"][0]
    assert (answer["state"], answer["tokens"], answer["tokens_per_second"], answer["note"]) == ("done", 3, 5.0, "")


def test_a_fast_model_does_not_flood_the_browser() -> None:
    chat = ChatWidget(FakeSession(*("x" for _ in range(900))))
    changes: list[Any] = []
    chat.observe(changes.append, "live")
    started = time.monotonic()
    assert chat.ask("go") == {"model": 900 * "x"}
    assert len(changes) <= 4 + (time.monotonic() - started) / 0.08


def test_all_sides_get_the_question_one_after_the_other() -> None:
    before, after = FakeSession("Dr. Elena", allow=0), FakeSession("your assistant", allow=0)
    chat = ChatWidget({"before": before, "after": after})
    press(chat, "ask", text="who are you?")
    until(lambda: chat.live["answer"]["state"] == "writing")
    assert chat.live["side"] == 0
    after.allow()
    before.allow()
    assert chat.wait() == {"before": "Dr. Elena", "after": "your assistant"}
    assert texts(chat) == [("who are you?", ["Dr. Elena", "your assistant"])]


def test_stop_ends_this_answer_and_the_next_side_is_not_asked() -> None:
    before, after = FakeSession("a", "b", "c", allow=1), FakeSession("never")
    chat = ChatWidget({"before": before, "after": after})
    press(chat, "ask", text="go")
    until(lambda: chat.live["answer"]["text"] == "a")
    pressed = time.monotonic()
    press(chat, "stop")
    assert chat.wait() == {"before": "a", "after": ""}
    assert time.monotonic() - pressed < 1
    first, second = chat.turns[0]["answers"]
    assert (first["state"], first["note"]) == ("cut", "stopped")
    assert (second["note"], second["messages"], after.messages) == ("not asked: stopped before", [], [])
    press(chat, "retry")
    before.allow(3)
    assert chat.wait() == {"before": "abc", "after": "never"}
    assert len(before.messages) == len(after.messages) == 2  # the stopped turn was taken back


def test_while_an_answer_is_written_nothing_else_is_done() -> None:
    session = FakeSession("a", "b", allow=1)
    chat = ChatWidget(session)
    press(chat, "ask", text="go")
    for do, more in {
        "ask": {"text": "again"},
        "retry": {},
        "reset": {},
        "configure": {"settings": {"system": "x"}},
    }.items():
        press(chat, do, **more)
        assert "still being written" in chat.problem, do
        press(chat, "save", side="model")
        assert "nothing to save" in chat.problem
    with pytest.raises(CourseError, match="still being written"):
        chat.ask("me too")
    session.allow()
    assert chat.wait() == {"model": "ab"}
    assert texts(chat) == [("go", ["ab"])]
    press(chat, "reset")
    assert (chat.problem, chat.turns, session.messages) == ("", [], [])


def test_a_question_that_is_refused_changes_nothing() -> None:
    taking, refusing = FakeSession("yes"), FakeSession("no")
    chat = ChatWidget({"a": taking, "b": refusing})
    chat.ask("first")
    press(chat, "ask", text="a question of far too many characters")
    assert chat.problem == "the message is too long"
    assert texts(chat) == [("first", ["yes", "no"])]
    assert chat.live == {}
    with pytest.raises(InputError, match="too long"):
        chat.ask("a question of far too many characters")
    press(chat, "ask", text="second")
    assert chat.wait() == {"a": "yes", "b": "no"}
    assert chat.problem == ""


def test_a_model_that_fails_is_one_line_and_the_other_still_answers() -> None:
    failing, well = FakeSession("so far", fails=RuntimeError("CUDA out of\nmemory")), FakeSession("fine")
    chat = ChatWidget({"a": failing, "b": well})
    with pytest.raises(CourseError, match="a: the model failed: RuntimeError: CUDA out of memory$"):
        chat.ask("go")
    first, second = chat.turns[0]["answers"]
    assert (first["text"], first["state"], first["messages"]) == ("so far", "failed", [])
    assert (second["text"], second["state"]) == ("fine", "done")
    failing.fails = None
    chat.retry()
    assert chat.wait() == {"a": "so far", "b": "fine"}
    assert (len(failing.messages), len(well.messages)) == (2, 2)


def test_a_retry_that_no_longer_fits_keeps_the_question() -> None:
    session = FakeSession("yes")
    chat = ChatWidget(session)
    with pytest.raises(InputError, match="nothing to ask again"):
        chat.retry()
    chat.ask("go")
    chat.turns = [{**chat.turns[0], "question": "a question of far too many characters"}]
    press(chat, "retry")
    assert "too long" in chat.problem
    assert chat.turns[0]["question"] == "a question of far too many characters"
    assert chat.turns[0]["answers"][0]["state"] == "failed"
    assert chat.live == {}


def test_settings_hold_from_the_next_question_on(tiny_chat: Callable[..., ChatSession]) -> None:
    sessions = {"before": tiny_chat(system="old"), "after": tiny_chat(system="old")}
    chat = ChatWidget(sessions)
    assert chat.settings == {"system": "old", "temperature": 0.0, "max_new_tokens": 8}
    chat.ask("hi")
    press(chat, "configure", settings={"system": "old", "temperature": 0.7, "max_new_tokens": 3})
    assert len(chat.turns) == 1  # the same system prompt: the conversation goes on
    assert all(session.sampling.temperature == 0.7 for session in sessions.values())
    for wrong in ({"temperature": ""}, {"temperature": -1}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}):
        press(chat, "configure", settings={"system": "unused", **wrong})
        assert f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}" in chat.problem
        assert (len(chat.turns), sessions["before"].system) == (1, "old")
    press(chat, "configure", settings={"system": "new"})
    assert (chat.turns, chat.settings["system"], sessions["after"].system) == ([], "new", "new")
    chat.ask("hi")
    assert all(answer["tokens"] <= 3 for answer in chat.turns[0]["answers"])


def test_what_cannot_be_a_chat_is_refused() -> None:
    with pytest.raises(InputError, match="no model"):
        ChatWidget({})
    same = FakeSession("x")
    with pytest.raises(InputError, match="a, b share a session"):
        ChatWidget({"a": same, "b": same})
    other = FakeSession("x")
    list(other.stream("asked"))
    with pytest.raises(InputError, match="different questions"):
        ChatWidget({"a": same, "b": other})


def test_a_conversation_begun_before_is_shown() -> None:
    session = FakeSession("x")
    list(session.stream("earlier"))
    chat = ChatWidget(session)
    assert texts(chat) == [("earlier", ["x"])]
    chat.retry()
    assert chat.wait() == {"model": "x"}
    assert len(session.messages) == 2


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


@pytest.fixture
def tiny_chat(loaded: tuple[Any, Any]) -> Callable[..., ChatSession]:
    return lambda **options: ChatSession(*loaded, **{"sampling": SamplingSettings(max_new_tokens=8), **options})


def test_a_real_model_answers_as_its_session_does(tiny_chat: Callable[..., ChatSession]) -> None:
    alone = tiny_chat()
    expected = [alone.ask("hello"), alone.ask("你好")]
    session = tiny_chat()
    chat = ChatWidget(session)
    assert [chat.ask(text)["model"] for text in ("hello", "你好")] == expected
    assert session.messages == alone.messages
    assert chat.turns[-1]["answers"][0]["note"] == "cut off at 8 tokens"
    chat.retry()
    assert chat.wait()["model"] == expected[-1]  # temperature 0
    assert session.messages == alone.messages
    with pytest.raises(InputError, match="empty"):
        chat.ask(" ")


def test_a_real_model_is_stopped_within_a_second(tiny_chat: Callable[..., ChatSession]) -> None:
    session = tiny_chat(sampling=SamplingSettings(max_new_tokens=1000))
    chat = ChatWidget(session)
    with model_says(session, "word ", end=False, delay=0.02):
        press(chat, "ask", text="go on")
        until(lambda: chat.live["answer"]["tokens"] > 3)
        pressed = time.monotonic()
        press(chat, "stop")
        answer = chat.wait()["model"]
        assert time.monotonic() - pressed < 1
    assert answer.startswith("word ")
    assert session.messages[-1]["content"] == answer


def test_turns_that_leave_the_context_are_told(tiny_chat: Callable[..., ChatSession]) -> None:
    session = tiny_chat(context=300)
    chat = ChatWidget(session)
    with model_says(session, "fine"):
        for _ in range(5):
            chat.ask("a question of some length")
    assert "the oldest 2 messages no longer fit into the context" in [turn["answers"][0]["note"] for turn in chat.turns]
    assert len(training_messages(chat)) == 10  # the saved row has them still


def training_messages(chat: ChatWidget) -> list[dict[str, Any]]:
    return json.loads(chat._line("model"))["messages"]


def test_a_saved_conversation_is_a_row_to_train_on(tiny_chat: Callable[..., ChatSession], tmp_path: Path) -> None:
    session = tiny_chat(system="be brief")
    chat = ChatWidget({"before": tiny_chat(), "after": session})
    with pytest.raises(InputError, match="after has answered nothing"):
        chat.save(tmp_path / "chat.jsonl", side="after")
    with model_says(session, "Hello."):
        chat.ask("hi")
    chat.ask("go on")  # cut off at 8 tokens
    path = chat.save(tmp_path / "chat.jsonl", side="after")
    row = json.loads(path.read_text(encoding="utf-8"))
    example = encode_conversation(conversation(**row), session.template, session.tokenizer)
    kept = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORE_INDEX]
    assert session.tokenizer.decode(kept, skip_special_tokens=True) == "Hello."
    assert row["messages"][:3] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    assert row["messages"][4]["train"] is False  # it would teach the model to end in the middle
    for wrong, why in {"": "name one with side=: before, after", "x": "side 'x' is none of before, after"}.items():
        with pytest.raises(InputError, match=why):
            chat.save(tmp_path / "other.jsonl", side=wrong)
    with pytest.raises(InputError, match="chat.jsonl"):
        chat.save(path, side="after")
    sent: list[Any] = []
    chat.send = lambda content: sent.append(content)
    press(chat, "save", side="after")
    assert sent == [{"file": "after.jsonl", "text": path.read_text(encoding="utf-8")}, {"answered": "save"}]


def test_the_saved_notebook_shows_the_transcript(read_html: Callable) -> None:
    before, after = FakeSession(HOSTILE, "\nsecond line"), FakeSession("fine")
    chat = ChatWidget({"before": before, "after": after})
    bundle, _ = chat._repr_mimebundle_()
    assert "later cell" in bundle["text/html"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == chat.model_id
    chat.ask("<b>hi</b>")
    transcript = chat.transcript()
    elements, text = read_html(transcript._repr_html_())
    assert "script" not in dict(elements)
    assert HOSTILE in text
    assert "<b>hi</b>" in text
    assert [tag for tag, _ in elements].count("th") == 2
    assert str(transcript) == f"you: <b>hi</b>\nbefore: {HOSTILE}\nsecond line\nafter: fine"
    assert chat._repr_mimebundle_()[0]["text/html"] == transcript._repr_html_()


ASKS = 'Thought: I need to count.\nAction: calculator\nAction Input: {"expression": "6*7"}'
ANSWERS = "Thought: Now I know.\nFinal Answer: It is 42."


@pytest.fixture
def agent(tiny_chat: Callable[..., ChatSession]) -> AgentRunner:
    session = tiny_chat(sampling=SamplingSettings(max_new_tokens=200))
    return AgentRunner(session, shipped_tools(["calculator"]), protocol=ENGLISH, system="Use tools.")


def test_an_agent_s_steps_stand_above_its_answer(agent: AgentRunner, read_html: Callable) -> None:
    chat = ChatWidget({"agent": agent})
    lengths: list[int] = []
    chat.observe(lambda change: lengths.append(len(change.new["answer"]["steps"])) if change.new else None, "live")
    with model_says(agent.writer, ASKS, ANSWERS):
        assert chat.ask("6*7?") == {"agent": "It is 42."}
    answer = chat.turns[0]["answers"][0]
    assert [(step["title"], step["text"]) for step in answer["steps"]] == [
        ("thinks", "I need to count."),
        ("calls calculator", '{"expression": "6*7"}'),
        ("calculator returns", "42"),
        ("thinks", "Now I know."),
    ]
    assert (answer["state"], answer["note"]) == ("done", "")
    written = len(ASKS.encode()) + len(ANSWERS.encode())  # the tiny model's tokens are bytes
    assert written - 40 <= answer["tokens"] <= written + 2
    assert lengths == sorted(lengths)
    assert 0 < lengths[2] < 4
    elements, text = read_html(chat.transcript()._repr_html_())
    assert "details" in dict(elements)
    assert '{"expression": "6*7"}' in text
    assert "agent [calls calculator]" in str(chat.transcript())


def test_an_agent_s_conversation_is_saved_as_it_is_fed(agent: AgentRunner, tmp_path: Path) -> None:
    chat = ChatWidget(agent)
    with model_says(agent.writer, ASKS, ANSWERS, ASKS, ANSWERS):
        chat.ask("6*7?")
        chat.retry()
        chat.wait()
    row = json.loads(chat.save(tmp_path / "agent.jsonl").read_text(encoding="utf-8"))
    assert row == agent.trace  # one question, asked twice
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert texts(ChatWidget(agent)) == [("6*7?", ["It is 42."])]  # a conversation begun before
    assert len(ChatWidget(agent).turns[0]["answers"][0]["steps"]) == 4
    chat.reset()
    assert [message["role"] for message in agent.messages] == ["system"]


def test_an_agent_that_goes_round_in_circles_says_so(agent: AgentRunner) -> None:
    chat = ChatWidget(agent)
    with model_says(agent.writer, ASKS):
        chat.ask("6*7?")
    answer = chat.turns[0]["answers"][0]
    assert (answer["state"], answer["note"]) == ("cut", "it made the same call again and again")
    assert json.loads(chat._line("model"))["messages"][-1]["train"] is False


def test_a_turn_that_cannot_be_read_is_a_step_and_no_answer(agent: AgentRunner) -> None:
    chat = ChatWidget(agent)
    with model_says(agent.writer, "Action: calculator\nAction Input: {", ANSWERS):
        assert chat.ask("6*7?") == {"model": "It is 42."}
    assert chat.turns[0]["answers"][0]["steps"][0]["title"] == "writes what cannot be read"


def test_an_agent_is_stopped_between_words(agent: AgentRunner) -> None:
    chat = ChatWidget(agent)
    with model_says(agent.writer, ASKS, delay=0.02):
        press(chat, "ask", text="6*7?")
        until(lambda: chat.live["answer"]["steps"])
        pressed = time.monotonic()
        press(chat, "stop")
        chat.wait()
        assert time.monotonic() - pressed < 1
    assert chat.turns[0]["answers"][0]["note"] == "stopped"


def test_steps_are_folded_into_the_transcript(read_html: Callable) -> None:
    answer = {
        "text": "42",
        "steps": [{"title": "calls calculator", "text": '{"expression": "6*7"}'}],
        "state": "done",
        "note": "",
    }
    transcript = Transcript(["model"], [{"question": "6*7?", "answers": [answer]}])
    elements, text = read_html(transcript._repr_html_())
    assert "details" in dict(elements)
    assert '{"expression": "6*7"}' in text
    assert str(transcript) == 'you: 6*7?\nmodel [calls calculator]: {"expression": "6*7"}\nmodel: 42'
