"""JSON tool calls: what each template writes is what is read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from agent_traces import TOOLS, exchanges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course_lib.agent.native import _FORMS, Native
from course_lib.agent.protocol import choose_protocol
from course_lib.agent.react import CHINESE
from course_lib.agent.turns import Turn, call, turn_of
from course_lib.data.conversation import RowError
from course_lib.data.templates import STOP_TEXTS, ChatTemplate, named_template, render
from course_lib.errors import InputError

WITH_JSON_CALLS = ["qwen_chat", "qwen3_chat", "internlm2_chat", "llama3_chat", "mistral"]
OPENINGS = ("<tool_call>", "<|action_start|>", "[TOOL_CALLS]", "{", "<|python_tag|>")


def written_turns(row: dict[str, Any], template: ChatTemplate, tokenizer: Any) -> list[str]:
    rendered = render(row["messages"], template, tokenizer, row["tools"])
    ends = (template.stop_texts[0], tokenizer.eos_token)
    texts = [rendered.text[start:end] for start, end in rendered.answers]
    return [text.removesuffix(next(end for end in ends if text.endswith(end))) for text in texts]


@pytest.mark.parametrize("name", WITH_JSON_CALLS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=exchanges(st.just("")))
def test_what_the_template_writes_is_read_back_and_written_alike(
    name: str, one: list[dict[str, Any]], tokenizer: Any
) -> None:
    template = named_template(name)
    native = Native.of(template, tokenizer)
    if any(text in message["content"] for message in one if message["role"] == "assistant" for text in OPENINGS):
        return  # words that spell a call are read as one, for the template writes them so
    row = native.render({"messages": one, "tools": TOOLS})
    try:
        texts = written_turns(row, template, tokenizer)
    except RowError:  # several calls in one turn, or white space that the template strips
        return
    again = copy.deepcopy(row)
    for text, place in zip(
        texts, [i for i, m in enumerate(again["messages"]) if m["role"] == "assistant"], strict=True
    ):
        turn, expected = native.read_turn(text), turn_of(one[place])
        if expected.calls:
            assert turn == Turn(thought=expected.thought, calls=expected.calls)
            again["messages"][place] = turn.message()
        elif not turn.error:
            assert turn.answer == (expected.answer.strip() if native.strips else expected.answer)
    assert written_turns(native.render(again), template, tokenizer) == texts


@pytest.mark.parametrize(("name", "words"), [("qwen_chat", "I look.\n"), ("internlm2_chat", "I look.\n")])
def test_words_beside_a_call_are_its_thought(name: str, words: str, tokenizer: Any) -> None:
    template = named_template(name)
    native = Native.of(template, tokenizer)
    turn = Turn(thought=words, calls=(call("search", {"query": "a </tool_call> b"}),))
    row = native.render({"messages": [{"role": "user", "content": "q"}, turn.message()], "tools": TOOLS})
    assert native.read_turn(written_turns(row, template, tokenizer)[0]) == turn


def test_what_each_template_can_hold(tokenizer: Any) -> None:
    forms = {name: Native.of(named_template(name), tokenizer) for name in WITH_JSON_CALLS}
    assert {name: (form.words, form.several, form.strips) for name, form in forms.items()} == {
        "qwen_chat": (True, True, False),
        "qwen3_chat": (True, True, False),
        "internlm2_chat": (True, False, False),
        "llama3_chat": (False, False, True),
        "mistral": (False, True, True),
    }


@pytest.mark.parametrize("name", [name for name in STOP_TEXTS if name not in WITH_JSON_CALLS])
def test_templates_without_json_calls_are_refused_and_auto_takes_react(name: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no form for tool calls in JSON; choose a ReAct protocol"):
        Native.of(named_template(name), tokenizer)
    assert choose_protocol("auto", named_template(name), tokenizer).name == "react"


def test_auto_is_native_where_the_template_has_tools(tokenizer: Any) -> None:
    assert choose_protocol("auto", named_template("qwen_chat"), tokenizer).name == "native"
    assert choose_protocol("react_zh", named_template("qwen_chat"), tokenizer) is CHINESE


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("qwen_chat", "<tool_call>\n", "cannot be read"),
        ("qwen_chat", '<tool_call>\n{"name": "search", "arguments": {"a": NaN}}\n</tool_call>', "NaN is not JSON"),
        ("qwen_chat", '<tool_call>\n{"arguments": {}}\n</tool_call>', "not an object with name and arguments"),
        ("qwen_chat", '<tool_call>\n{"name": "search"}\n</tool_call>', "not a JSON object"),
        ("qwen_chat", "<tool_call>" + "[" * 50_000, "cannot be read"),
        ("mistral", '[TOOL_CALLS] [{"name": "search", "arguments": "no"}]', "cannot be read"),
        ("llama3_chat", '{"name": "search", "parameters": [1]}', "are an array"),
        ("llama3_chat", '{"name": "\\ud800", "parameters": {}}', "lone surrogate"),
        ("internlm2_chat", " \n", "nothing was written"),
    ],
)
def test_a_malformed_call_says_what_was_wrong(name: str, text: str, says: str, tokenizer: Any) -> None:
    error = Native.of(named_template(name), tokenizer).read_turn(text).error
    assert says in error
    assert len(error) < 500


@pytest.mark.parametrize(
    ("name", "text", "turn"),
    [
        (
            "qwen_chat",
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            Turn(calls=(call("f", {"a": 1}),)),
        ),
        ("llama3_chat", '<|python_tag|>{"name": "f", "parameters": {}}', Turn(calls=(call("f", {}),))),
        ("llama3_chat", '{"weather": "fine"}', Turn(answer='{"weather": "fine"}')),
        ("mistral", " Hello.", Turn(answer="Hello.")),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "f", "arguments": {}},{"name": "g", "arguments": {}}]',
            Turn(calls=(call("f", {}), call("g", {}))),
        ),
    ],
)
def test_what_models_write_that_is_not_quite_the_form(name: str, text: str, turn: Turn, tokenizer: Any) -> None:
    assert Native.of(named_template(name), tokenizer).read_turn(text) == turn


@given(cut=st.integers(0, 60))
def test_the_beginning_of_a_call_is_not_shown_as_words(cut: int) -> None:
    text = 'I look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    _, shown, done = Native(_FORMS[0]).so_far(text[:cut])
    assert "I look.\n".startswith(shown)
    assert not done


@given(
    parts=st.lists(
        st.sampled_from(
            [
                *OPENINGS,
                "</tool_call>",
                '"name": "f"',
                ', "arguments": ',
                '"parameters": ',
                "{}",
                "}",
                "[",
                "]",
                "\n",
                "x",
                "NaN",
            ]
        ),
        max_size=10,
    )
)
def test_whatever_a_model_writes_is_read(parts: list[str]) -> None:
    for form in _FORMS:
        turn = Native(form).read_turn("".join(parts))
        assert bool(turn.error) + bool(turn.calls) + (turn.answer is not None) == 1
        Native(form).so_far("".join(parts))
