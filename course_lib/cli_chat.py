"""`course chat`: its options, and what they start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from course_lib.cli_agent import AgentOption, McpOption, ProtocolOption, ToolsOption, TurnsOption, chat_as_agent
from course_lib.errors import InputError

if TYPE_CHECKING:
    from course_lib.chat.session import ChatSession


def chat(
    model: Annotated[str, typer.Argument(help="a model's name or folder")],
    adapter: Annotated[Path | None, typer.Option(help="an adapter's folder")] = None,
    bits: Annotated[int | None, typer.Option(help="load the model in 4 or 8 bits")] = None,
    template: Annotated[str, typer.Option(help="chat template; auto takes the model's own")] = "auto",
    system: Annotated[str, typer.Option(help="system prompt")] = "",
    once: Annotated[
        str | None, typer.Option("--once", metavar="TEXT", help="answer one question on stdout and end")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 means no limit")] = 0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    max_new_tokens: Annotated[int, typer.Option()] = 512,
    seed: Annotated[int | None, typer.Option(help="makes sampled answers repeatable")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the Python code in the model's folder")
    ] = False,
    agent: AgentOption = False,
    tools: ToolsOption = None,
    protocol: ProtocolOption = None,
    mcp: McpOption = None,
    max_turns: TurnsOption = 8,
) -> None:
    """Talk to a model: streams its answers; reads questions from standard input where that is no terminal."""
    from course_lib.adapter_record import recorded_template
    from course_lib.chat.session import ChatSession, SamplingSettings
    from course_lib.chat.terminal import answer_once, chat_terminal

    dtypes = {None: "auto", 4: "nf4", 8: "int8"}
    if bits not in dtypes:
        raise InputError(f"--bits {bits}: choose 4 or 8")
    sampling = SamplingSettings(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )

    def load() -> ChatSession:
        from course_lib.models import load_model

        loaded, tokenizer = load_model(model, dtype=dtypes[bits], adapter=adapter, trust_remote_code=trust_remote_code)
        trained_with = recorded_template(adapter, template)
        return ChatSession(loaded, tokenizer, template=trained_with, system=system, sampling=sampling)

    if agent:
        options = {"tools": tools, "protocol": protocol, "mcp": mcp or [], "max_turns": max_turns}
        chat_as_agent(load, model=model, adapter=adapter, once=once, **options)
    elif given := [name for name, value in (("tools", tools), ("protocol", protocol), ("mcp", mcp)) if value]:
        raise InputError(f"--{given[0]} is for an agent: add --agent")
    elif once is not None:
        answer_once(load(), once)
    else:
        chat_terminal(load())
