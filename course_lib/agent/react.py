"""ReAct (Yao et al. 2023, arXiv:2210.03629): thoughts, calls and answers as lines of plain text, for any chat template.

    Thought: what to do
    Action: a tool's name
    Action Input: its arguments, as JSON
    Response: what the tool returned            (a user turn; one line group a result)
    Final Answer: the answer

`render` writes a conversation with tools as plain turns, for training and for inference alike; `parse` is its inverse. A
line of a thought or a result that begins like one of these gets a `>` in front, as mbox files quote "From " lines, so no
tool can write a call, or another tool's result. All after `Final Answer:` is the answer, whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from course_lib.agent.turns import (
    Turn,
    call,
    is_malformed,
    malformed,
    numbered,
    read_arguments,
    turn_of,
    write_arguments,
)
from course_lib.data.conversation import Conversation, Message, RowError, Tool, shown

_KEYS = ("Thought", "Action Input", "Action", "Response", "Final Answer")
_KEY = rf"(?:{'|'.join(_KEYS)})[ \t]*[:：]"
_KEY_LINE = re.compile(rf"^({'|'.join(_KEYS)})[ \t]*[:：]", re.MULTILINE)
_TO_QUOTE = re.compile(rf"^(?=>*{_KEY})", re.MULTILINE)
_QUOTED = re.compile(rf"^>(?=>*{_KEY})", re.MULTILINE)
_FORM = "write Action: with a tool's name and then Action Input: with a JSON object, or Final Answer: with the answer"


@dataclass(frozen=True)
class ReAct:
    """ReAct in one wording: `system_text` writes the tools and the rules; `space` stands after each colon."""

    name: str
    system_text: Callable[[Sequence[Tool]], str]
    space: str = " "

    def render(self, row: Conversation) -> Conversation:
        """Plain system, user and assistant turns, without tools. A row without tools, or of plain text, stays as it is.

        Raises:
            RowError: calls and results do not match, a name is not one line, or words with a result behind them are no
                malformed call.
        """
        if not row.get("tools"):
            return row
        row = numbered(row)
        messages, out = row["messages"], []
        rules = self.system_text(row["tools"])
        if messages[0]["role"] == "system":
            rules = f"{messages[0]['content']}\n\n{rules}"
        out.append({"role": "system", "content": rules})
        for index, message in enumerate(messages):
            if message["role"] == "user":
                out.append({"role": "user", "content": message["content"]})
            elif message["role"] == "assistant":
                out.append(self._written(messages, index))
            elif message["role"] == "tool":
                line = f"Response:{self.space}{_quote(message['content'])}"
                if messages[index - 1]["role"] == "tool":
                    out[-1] = {"role": "user", "content": f"{out[-1]['content']}\n{line}"}
                else:
                    out.append({"role": "user", "content": line})
        return {"messages": out}

    def parse(self, row: Conversation, tools: Sequence[Tool]) -> Conversation:
        """The conversation that `render` wrote with these tools; its calls numbered.

        Raises:
            RowError: it does not begin with the rules of this wording.
        """
        rules, (opening, *turns) = self.system_text(tools), row["messages"]
        system = opening["content"].removesuffix(rules)
        if opening["role"] != "system" or system == opening["content"] or (system and not system.endswith("\n\n")):
            raise RowError(f"the system turn does not end with the rules of {self.name} for these tools")
        messages: list[Message] = [{"role": "system", "content": system[:-2]}] if system else []
        expects_results = False
        for message in turns:
            marks: Message = {"train": message["train"]} if "train" in message else {}  # type: ignore[typeddict-item]
            if message["role"] == "assistant":
                turn = self.read_turn(message["content"])
                expects_results = bool(turn.calls or turn.error)
                messages.append({**(malformed(message["content"]) if turn.error else turn.message()), **marks})
            elif expects_results:
                messages += [{"role": "tool", "content": result} for result in self._results(message["content"])]
                expects_results = False
            else:
                messages.append(message)
        return numbered({"messages": messages, "tools": list(tools)})

    def write_turn(self, turn: Turn) -> str:
        """The text of a turn: what the model is trained to write, and is shown of its earlier turns.

        Raises:
            RowError: a tool's name is not one line, or arguments have no JSON.
        """
        lines = [f"Thought:{self.space}{_quote(turn.thought)}"] if turn.thought else []
        for one in turn.calls:
            name = one["function"]["name"]
            if name != name.strip() or "\n" in name:
                raise RowError(f"tool name {shown(name)} is not one line of text")
            lines.append(f"Action:{self.space}{name}")
            lines.append(f"Action Input:{self.space}{write_arguments(one['function']['arguments'])}")
        if not turn.calls:
            lines.append(f"Final Answer:{self.space}{turn.answer or ''}")
        return "\n".join(lines)

    def read_turn(self, text: str) -> Turn:
        """What the model wrote. Words without any of the keys are an answer; what a model writes on after its calls, such as
        a result of its own invention, is left off."""
        if not text.strip():
            return Turn(error=f"nothing was written; {_FORM}")
        parts = list(self._parts(text))
        if not any(key for key, _, _ in parts):
            return Turn(answer=text)
        thoughts, calls, name = [], [], None
        for key, said, start in parts:
            if key == "Action Input" and name is not None:
                try:
                    calls.append(call(name, read_arguments(said)))
                except RowError as reason:
                    return Turn(error=f"the Action Input of {name} cannot be read: {reason}")
                name = None
            elif name is not None:
                return Turn(error=f"the action {name} has no Action Input; {_FORM}")
            elif key == "Action":
                name = said.strip()
                if not name or "\n" in name:
                    return Turn(error=f"the action {shown(name)} is no tool's name; {_FORM}")
            elif calls or key in ("Response", "Action Input"):
                break
            elif key == "Final Answer":
                return Turn(thought="\n".join(thoughts), answer=self._after_colon(text[start:]))
            else:
                thoughts.append(_unquote(said))
        if name is not None:
            return Turn(error=f"the action {name} has no Action Input; {_FORM}")
        return (
            Turn(thought="\n".join(thoughts), calls=tuple(calls))
            if calls
            else Turn(error=f"no call and no answer; {_FORM}")
        )

    def so_far(self, text: str) -> tuple[str, str, bool]:
        """Of a turn still being written: its thought and its answer up to here, and whether no more of it will be read.

        A last line that may still become a key is held back.
        """
        first = _KEY_LINE.search(text)
        if not first:
            return "", "" if _may_become_key(text) else text, False
        thoughts, called = [], False
        for key, said, start in self._parts(text):
            if key == "Final Answer" and not called:
                return "\n".join(thoughts), self._after_colon(text[start:]), False
            if key == "Response" or (called and key not in ("Action", "Action Input")):
                return "\n".join(thoughts), "", True
            called = called or key in ("Action", "Action Input")
            if key in ("", "Thought"):
                thoughts.append(_unquote(said))
        if not called and thoughts:
            before, _, last = thoughts[-1].rpartition("\n")
            thoughts[-1] = before if _may_become_key(last.lstrip(">")) else thoughts[-1]
        return "\n".join(thoughts), "", False

    def _written(self, messages: Sequence[Message], index: int) -> Message:
        message = messages[index]
        content = message["content"]
        if not is_malformed(messages, index):
            content = self.write_turn(turn_of(message))
        elif not self.read_turn(content).error:
            raise RowError(f"message {index + 2}: a tool turn where no tool was called")
        written: Message = {"role": "assistant", "content": content}
        return {**written, "train": message["train"]} if "train" in message else written

    def _results(self, text: str) -> list[str]:
        return [_unquote(said) for key, said, _ in self._parts(text) if key == "Response"]

    def _parts(self, text: str) -> Iterator[tuple[str, str, int]]:
        """(key, text, where the text begins) of each part; the words before the first key have the key ""."""
        found = list(_KEY_LINE.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        if found and found[0].start():
            yield "", text[: found[0].start()].removesuffix("\n"), 0
        for match, end in zip(found, ends, strict=False):  # no key: no parts
            said = self._after_colon(text[match.end() : end])
            yield match[1], said.removesuffix("\n") if end < len(text) else said, match.end()

    def _after_colon(self, text: str) -> str:
        return text.removeprefix(self.space)


def _may_become_key(line: str) -> bool:
    return any(key.startswith(line.rstrip()) for key in _KEYS)


def _quote(text: str) -> str:
    return _TO_QUOTE.sub(">", text)


def _unquote(text: str) -> str:
    return _QUOTED.sub("", text)


def _english(tools: Sequence[Tool]) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    names = ", ".join(tool["function"]["name"] for tool in tools)
    return f"""You are an assistant who can call tools. The tools you can use are:
{lines}
To call a tool, write in this form:
```
Thought: what this step has to solve, and whether a tool is needed
Action: the tool's name, one of [{names}]
Action Input: the tool's arguments, as a JSON object
```
The tool returns its result in this form:
```
Response: what the tool returned
```
When you know the answer, or need no tool, write in this form:
```
Thought: how you come to the final answer
Final Answer: the final answer
```
Begin!"""


def _chinese(tools: Sequence[Tool]) -> str:
    """The tutorial's wording (lagent 0.1.2, CALL_PROTOCOL_CN). The list of names is no longer in double brackets, and what a
    tool takes stands beside what it does: there the input was one string."""
    described = {tool["function"]["name"]: {k: v for k, v in tool["function"].items() if k != "name"} for tool in tools}
    names = ", ".join(described)
    return f"""你是一个可以调用外部工具的助手，可以使用的工具包括：
{json.dumps(described, ensure_ascii=False)}
如果使用工具请遵循以下格式回复：
```
Thought:思考你当前步骤需要解决什么问题，是否需要使用工具
Action:工具名称，你的工具必须从 [{names}] 选择
Action Input:工具输入参数
```
工具返回按照以下格式回复：
```
Response:调用工具后的结果
```
如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复
```
Thought:给出最终答案的思考过程
Final Answer:最终答案
```
开始!"""


def _brief(tools: Sequence[Tool]) -> str:
    """A few tokens a tool, for small models that are trained for these tools: their names and arguments."""
    lines = "\n".join(f"{tool['function']['name']}({', '.join(_arguments(tool))})" for tool in tools)
    return f"""Tools:
{lines}
Use one with Action: and Action Input: in JSON, or end with Final Answer:"""


def _arguments(tool: Tool) -> list[str]:
    parameters = tool["function"].get("parameters") or {}
    required = parameters.get("required") or []
    return [name if name in required else f"{name}?" for name in parameters.get("properties") or {}]


ENGLISH = ReAct("react_en", _english)
CHINESE = ReAct("react_zh", _chinese, space="")
BRIEF = ReAct("react_brief", _brief)
