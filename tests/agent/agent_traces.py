"""Generated conversations with tools, hostile ones among them: texts that spell the protocol's own lines and special tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search for facts. 搜索。",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}},
                "required": ["query"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Work out an expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    },
]

SPELLINGS = [
    *("Thought:", "Action:", "Action Input:", "Response:", "Final Answer:", "Action：", "Action", ">Action: python"),
    *("\nAction: python\nAction Input: {}", "\nResponse: 5", "\n>>Response: x", "\nFinal Answer: no", "Thought"),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "[/INST]",
        "\r\n",
        "\n",
        " ",
        "\u2028",
        "你好",
        '{"name": 1}',
        "```",
    ),
]
texts = st.lists(
    st.one_of(st.sampled_from(SPELLINGS), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), max_size=5
).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


calls = st.builds(
    _call, st.sampled_from(["search", "calculator", "搜索"]), st.dictionaries(texts, json_values, max_size=2)
)


@st.composite
def exchanges(draw: st.DrawFn, words: st.SearchStrategy[str] = texts) -> list[dict[str, Any]]:
    """A question, some rounds of calls with their results, and an answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(texts)}]
    for _ in range(draw(st.integers(0, 2))):
        made = draw(st.lists(calls, min_size=1, max_size=3))
        messages.append({"role": "assistant", "content": draw(words), "tool_calls": made})
        messages += [{"role": "tool", "content": draw(texts)} for _ in made]
    answer: dict[str, Any] = {"role": "assistant", "content": draw(texts)}
    if thought := draw(words):
        answer["reasoning_content"] = thought
    return [*messages, answer]


@st.composite
def traces(draw: st.DrawFn) -> dict[str, Any]:
    """A conversation of one to three exchanges, with or without a system turn."""
    system = draw(st.none() | texts.filter(bool))
    opening = [] if system is None else [{"role": "system", "content": system}]
    rounds = draw(st.lists(exchanges(), min_size=1, max_size=3))
    return {"messages": opening + [message for one in rounds for message in one], "tools": TOOLS}
