"""MCP servers as tools: over standard input and output, with a server that fails in the ways servers do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import Script, steps

from course_lib.agent.events import Returned
from course_lib.agent.mcp_tools import McpServer
from course_lib.agent.react import ENGLISH
from course_lib.agent.runner import AgentRunner
from course_lib.agent.tools import run_tool
from course_lib.errors import InputError

pytest.importorskip("mcp")
COMMAND = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    with McpServer(COMMAND, call_seconds=2) as running:
        yield running


def test_the_tools_of_a_server_are_listed_called_and_used_by_the_runner(server: McpServer) -> None:
    tools = {tool.name: tool for tool in server.tools}
    assert [*tools] == ["double", "fail", "slow", "leave", "hostile"]
    assert tools["double"].description == "Double a number."
    assert tools["double"].parameters["properties"]["number"]["type"] == "integer"
    assert run_tool(tools["double"], {"number": 21}).text == "42"
    agent = AgentRunner(Script(steps(("double", '{"number": 4}')), "Final Answer: 8"), server.tools, protocol=ENGLISH)
    assert agent.ask("q") == "8"
    agent = AgentRunner(Script(steps(("double", '{"number": "x"}')), "Final Answer: 8"), server.tools, protocol=ENGLISH)
    returned = next(event for event in agent.stream("q") if isinstance(event, Returned))
    assert "'x' is not of type 'integer'" in returned.text


def test_a_tool_that_fails_hangs_or_says_odd_things_becomes_text(
    server: McpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = {tool.name: tool for tool in server.tools}
    failed = run_tool(tools["fail"], {})
    assert failed.failed
    assert "Error executing tool fail" in failed.text
    late = run_tool(tools["slow"], {})
    assert "error: the MCP server" in late.text
    assert late.seconds < 5
    hostile = run_tool(tools["hostile"], {}).text
    assert "\x1b" not in hostile
    assert len(hostile) < 2200
    assert run_tool(tools["double"], {"number": 1}).text == "2"


def test_a_server_gets_no_keys_and_one_that_is_lost_is_an_error_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "sk-0123456789")
    with McpServer(COMMAND, call_seconds=5) as running:
        tools = {tool.name: tool for tool in running.tools}
        whole = tools["hostile"].run()
        assert whole.endswith("no key")
        for name, arguments in (("leave", {}), ("double", {"number": 1})):
            outcome = run_tool(tools[name], arguments)
            assert outcome.failed
            assert "the MCP server" in outcome.text
            assert outcome.seconds < 6


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-program-xyz", "cannot be used as an MCP server"),
        ("", "cannot be used as an MCP server"),
        (f"{sys.executable} -c 'raise SystemExit(\"bad config\")'", "it said: bad config"),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", "no answer within 1.5 seconds"),
        (f"{sys.executable} -c \"print('hello' * 1000)\"", "cannot be used as an MCP server|no answer within"),
        ("python 'unbalanced", "No closing quotation"),
    ],
)
def test_what_is_no_server_is_told(command: str, says: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InputError, match=says):
        McpServer(command, start_seconds=1.5)
    assert time.perf_counter() - started < 6
