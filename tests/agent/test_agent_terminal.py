"""The agent in a terminal and over pipes: what goes where, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from course_runner import Course
from scripted import Script, model_writes, steps

from course_lib.adapter_record import recorded_protocol
from course_lib.agent.protocol import choose_protocol
from course_lib.agent.react import ENGLISH
from course_lib.agent.runner import AgentRunner, agent_of
from course_lib.agent.terminal import agent_once, agent_terminal, open_tools
from course_lib.agent.tools import shipped_tools, tool_from
from course_lib.chat.session import ChatSession
from course_lib.errors import CourseError, InputError

ADD = "Thought: I add.\n" + steps(("calculator", '{"expression": "931 + 26"}'))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def agent(*texts: str) -> AgentRunner:
    return AgentRunner(Script(*texts), shipped_tools(["calculator"]), protocol=ENGLISH)


def test_once_writes_the_answer_alone_to_stdout_and_the_steps_to_stderr() -> None:
    output, notices = io.StringIO(), io.StringIO()
    agent_once(agent("Thought: hm", ADD, "Final Answer: 9\x1b[2J57"), "q", output_stream=output, notice_stream=notices)
    assert output.getvalue() == "957\n"
    lines = notices.getvalue().splitlines()
    assert lines[0].startswith("could not be read: Thought: hm: no call and no answer")
    assert lines[1:3] == ["thought: I add.", 'call: calculator {"expression": "931 + 26"}']
    assert lines[3].startswith("result: 957")


def test_no_answer_is_a_failure() -> None:
    output = io.StringIO()
    with pytest.raises(CourseError, match=r"found no answer \(the most turns it may take, after 8 turns\)"):
        agent_once(agent("Thought: hm"), "q", output_stream=output, notice_stream=io.StringIO())
    assert output.getvalue() == "I found no answer within 8 turns.\n"


def test_pipes_answer_a_line_each_with_commands_between(tmp_path: Path) -> None:
    output, notices = io.StringIO(), io.StringIO()
    path = tmp_path / "trace.jsonl"
    questions = io.StringIO(f"/stats\none\n/save {path}\n/reset\n/system Be brief.\ntwo\n/nonsense\n")
    runner = agent(ADD, "Final Answer: 957", "Final Answer: two")
    with pytest.raises(InputError, match="1 of its lines failed.*nonsense"):
        agent_terminal(runner, input_stream=questions, output_stream=output, notice_stream=notices)
    assert output.getvalue() == "957\ntwo\n"
    assert notices.getvalue().startswith("protocol react_en; tools: calculator\n")
    assert "no answer yet" in notices.getvalue()
    assert [message["role"] for message in json.loads(path.read_text())["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [message["content"] for message in runner.messages] == ["Be brief.", "two", "two"]


def test_a_terminal_shows_the_answer_as_it_is_written_once() -> None:
    output = Terminal()
    agent_once(agent(ADD, "Final Answer: nine hundred"), "q", output_stream=output, notice_stream=io.StringIO())
    assert output.getvalue() == "nine hundred\n"


def test_words_before_a_native_call_are_followed_by_a_line_break(tiny: Path) -> None:
    from course_lib.models import load_model

    session = ChatSession(*load_model(tiny), template="qwen_chat", context=8000)
    runner = agent_of(session, shipped_tools(["calculator"]), protocol="auto")
    assert runner.protocol.name == "native"
    output = Terminal()
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "931 + 26"}}\n</tool_call>'
    with model_writes(session, f"I add.\n{call}", "It is 957."):
        agent_once(runner, "q", output_stream=output, notice_stream=io.StringIO())
    assert output.getvalue() == "I add.\n\nIt is 957.\n"


def test_the_protocol_is_the_recorded_one_else_what_the_template_has(tmp_path: Path, tiny: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert recorded_protocol("tiny", adapter) == "auto"
    (adapter / "course.json").write_text('{"protocol": "react_brief"}')
    assert recorded_protocol("tiny", adapter) == "react_brief"
    assert recorded_protocol(str(adapter)) == "react_brief"
    from transformers import AutoTokenizer

    from course_lib.data.templates import choose_template

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    assert choose_protocol("auto", choose_template(tokenizer), tokenizer).name == "react"


def test_tools_by_name_and_from_a_server() -> None:
    pytest.importorskip("mcp")
    command = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"
    with open_tools("clock, search", [command]) as tools:
        assert [tool.name for tool in tools][:3] == ["clock", "search", "double"]
    with open_tools("") as tools:
        assert tools == []


def test_the_command_answers_over_a_pipe_and_once(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    done = course(
        "chat", "tiny", "--agent", "--max-turns", "1", "--max-new-tokens", "4", "--once", "hi", "--tools", "clock"
    )
    assert done.returncode in (0, 1)  # what the random model writes is no answer, or one
    assert done.stdout.endswith("\n")
    done = course("chat", "tiny", "--agent", "--max-turns", "1", "--max-new-tokens", "4", stdin="hi\n/exit\n")
    assert "protocol react; tools: search, calculator, solve, clock, convert_units" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--agent", "--tools", "serch"], "tool 'serch' is unknown"),
        (["--agent", "--protocol", "reakt"], "agent protocol 'reakt' is unknown"),
        (["--agent", "--protocol", "native"], "has no form for tool calls in JSON"),
        (["--agent", "--max-turns", "0"], "--max-turns 0: it must be 1 or more"),
        (["--agent", "--mcp", "no-such-program-xyz"], "cannot be used as an MCP server"),
        (["--tools", "search"], "--tools is for an agent: add --agent"),
    ],
)
def test_wrong_options_are_told_in_one_line(course: Course, options: list[str], says: str) -> None:
    done = course("chat", "tiny", "--once", "hi", *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_tools_odd_result_does_not_reach_the_terminal() -> None:
    def page() -> str:
        """Read a page."""
        return "\x1b[2J" + "long " * 400

    notices = io.StringIO()
    runner = AgentRunner(Script(steps(("page", "{}")), "Final Answer: x"), [tool_from(page)], protocol=ENGLISH)
    agent_once(runner, "q", output_stream=io.StringIO(), notice_stream=notices)
    assert "\x1b" not in notices.getvalue()
    assert max(map(len, notices.getvalue().splitlines())) < 350


SLOW_AGENT = """
import sys, time
sys.path.insert(0, {tests!r})
from scripted import Script, steps
from course_lib.agent.react import ENGLISH
from course_lib.agent.runner import AgentRunner
from course_lib.agent.terminal import agent_terminal
from course_lib.agent.tools import tool_from

def wait() -> str:
    \"\"\"Wait.\"\"\"
    time.sleep(30)
    return ""

agent_terminal(AgentRunner(Script(steps(("wait", "{{}}")), "Final Answer: done"), [tool_from(wait, seconds=60)], protocol=ENGLISH))
print("left")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_c_stops_a_tool_and_the_chat_goes_on() -> None:
    pexpect = pytest.importorskip("pexpect")
    code = SLOW_AGENT.format(tests=str(Path(__file__).parent))
    child = pexpect.spawn(sys.executable, ["-c", code], timeout=30, encoding="utf-8")
    child.expect("you> ")
    child.sendline("one")
    child.expect("call: wait")
    child.sendintr()
    child.expect(r"\[stopped\]")
    child.expect("you> ")
    child.sendline("two")
    child.expect("done\r\n")
    child.sendeof()
    child.expect("left")
    child.close()
