"""`course chat MODEL --agent`: the options of an agent, and what they start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from course_lib.chat.session import ChatSession

AgentOption = Annotated[bool, typer.Option("--agent", help="let the model call tools")]
ToolsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="of search, calculator, solve, clock, convert_units, python; default: all but python"
    ),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option(
        help="native, react, react_en, react_zh or react_brief; default: the one it was trained with, or native, or react"
    ),
]
McpOption = Annotated[
    list[str] | None,
    typer.Option("--mcp", metavar="COMMAND", help="start an MCP server and use its tools; may be given several times"),
]
TurnsOption = Annotated[int, typer.Option(help="turns the model may take for a question")]


def chat_as_agent(
    load: Callable[[], ChatSession],
    *,
    model: str,
    adapter: Path | None,
    tools: str | None,
    protocol: str | None,
    mcp: list[str],
    max_turns: int,
    once: str | None,
) -> None:
    """Chat with an agent; wrong options are told before the model is loaded."""
    from course_lib.adapter_record import recorded_protocol
    from course_lib.agent.runner import agent_of
    from course_lib.agent.terminal import agent_once, agent_terminal, check_options, open_tools

    check_options(protocol, max_turns)
    with open_tools(tools, mcp) as opened:
        session = load()
        runner = agent_of(session, opened, protocol=protocol or recorded_protocol(model, adapter), max_turns=max_turns)
        if once is not None:
            agent_once(runner, once)
        else:
            agent_terminal(runner)
