"""Steps with tools: what the model is asked, how its words are judged, and the figures, each beside another computation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from course_runner import Course

from course_lib.agent import evaluation
from course_lib.agent.evaluation import is_grounded, step_table, tool_steps
from course_lib.agent.protocol import choose_protocol
from course_lib.comparison import Evaluation, RowResult, ToolStep, compare, interval
from course_lib.data.conversation import Conversation
from course_lib.data.templates import named_template
from course_lib.data.tokenize import encode_conversations
from course_lib.errors import InputError
from course_lib.evaluation import evaluate
from course_lib.models import load_model


def tool(name: str, *arguments: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [tool("calculator", "expression"), tool("clock", "city")]


def called(name: str, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ROWS: list[Conversation] = [
    {
        "messages": [
            said("user", "What is 6 times 7, and what time is it in Rome?"),
            called("calculator", expression="6 * 7") | {"content": "a plan"},
            said("tool", "42"),
            called("clock", city="Rome"),
            said("tool", "10:30"),
            said("assistant", "It is 42, and 10:30 in Rome."),
        ],
        "tools": TOOLS,
    },
    {"messages": [said("user", "你好"), said("assistant", "你好！")], "tools": TOOLS},
    {
        "messages": [
            said("user", "罗马几点？"),
            said("assistant", "Action: clock", train=False),
            said("tool", "Action: clock has no Action Input"),
            called("clock", city="罗马"),
        ],
        "tools": TOOLS,
    },
]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> dict[str, Any]:
    model, tokenizer = load_model(tiny, dtype="float32")
    return {"model": model, "tokenizer": tokenizer}


class Script:
    """In place of the model: writes the texts it is given, and keeps the prompts."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], end: int) -> None:
        self.tokenizer, self.texts, self.end = tokenizer, iter(texts), end
        self.prompts: list[list[int]] = []

    def __call__(self, model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[list[int]]:
        self.prompts += prompts
        return [[*self.tokenizer(next(self.texts), add_special_tokens=False)["input_ids"], self.end] for _ in prompts]


WRITTEN = [  # the first steps of all rows, then the second of those that have one, then the third
    'Thought: my own\nAction: calculator\nAction Input: {"expression": "6 * 7"}',
    "Action: calculator\nAction Input: {}",
    "Final Answer: it is late",
    'Action: clock\nAction Input: {"city": "rome"}',
    "Final Answer: 42 and 10:30.",
]


def scripted(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], protocol: str) -> Any:
    template = named_template("chatml")
    script = Script(loaded["tokenizer"], texts, end=loaded["tokenizer"].eos_token_id)
    monkeypatch.setattr(evaluation, "continue_in_batches", script)
    monkeypatch.setattr(evaluation, "stop_ids", lambda *of: [loaded["tokenizer"].eos_token_id])
    chosen = choose_protocol(protocol, template, loaded["tokenizer"])
    return tool_steps(**loaded, rows=ROWS, template=template, protocol=chosen), script, template, chosen


def test_every_assistant_turn_is_judged_after_right_turns_before_it(
    loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, script, *_ = scripted(loaded, monkeypatch, WRITTEN, "react_brief")
    judged = [
        [(step.tool, step.right_tool, step.right_arguments, step.answered, step.grounded) for step in steps]
        for steps in rows
    ]
    assert judged == [
        [
            ("calculator", True, True, None, None),
            ("clock", True, False, None, None),
            ("", None, None, True, True),
        ],
        [("", None, None, False, None)],  # a call where an answer was due
        [("clock", False, False, None, None)],  # and the other way round
    ]
    assert [step.text for steps in rows for step in steps] == [WRITTEN[place] for place in (0, 3, 4, 1, 2)]
    assert rows[0][0].expected == 'calculator {"expression": "6 * 7"}'
    assert all(step.stopped for steps in rows for step in steps)
    third = loaded["tokenizer"].decode(script.prompts[-1])
    assert "Thought: my own" in third  # a right call stands as the model wrote it
    assert "a plan" not in third  # and the row's own thought nowhere, for it would tell what comes next
    assert '"rome"' not in third
    assert '"Rome"' in third  # a wrong one as it should have been


@pytest.mark.parametrize("protocol", ["react", "react_brief", "react_en", "react_zh"])
def test_prompts_are_prefixes_of_what_is_trained(
    loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """The model writes what it should, and is then fed what it was trained on, token for token."""
    template = named_template("chatml")
    chosen = choose_protocol(protocol, template, loaded["tokenizer"])
    written = [
        [
            turn["content"]
            for turn in chosen.render(row)["messages"]
            if turn["role"] == "assistant" and turn.get("train", True)
        ]
        for row in ROWS
    ]
    in_turn = [steps[place] for place in range(3) for steps in written if place < len(steps)]
    rows, script, *_ = scripted(loaded, monkeypatch, in_turn, protocol)
    assert all(step.right_arguments or step.answered for steps in rows for step in steps)
    trained = encode_conversations(ROWS, template, loaded["tokenizer"], protocol=chosen)
    asked = [trained[row] for place in range(3) for row in range(3) if place < len(written[row])]
    for example, prompt in zip(asked, script.prompts, strict=True):
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt)] != -100
        assert example.labels[len(prompt) - 1] == -100


@pytest.mark.parametrize(
    ("answer", "grounded"),
    [
        ("It is 42.1648 km.", True),
        ("26.2 miles are 42.1648 km.", True),
        ("It is 42.16 km.", False),  # a number that no one returned
        ("It is 42.1648 km, or 42164.8 m.", False),
        ("It is far.", False),  # the number that was returned is missing
        ("", False),
    ],
)
def test_numbers_must_be_those_returned(answer: str, grounded: bool) -> None:
    found = is_grounded(
        answer,
        reference="26.2 mi are 42.1648 km.",
        question="How far is 26.2 mi in km?",
        results=["26.2 mi = 42.1648 km"],
    )
    assert found == grounded


def test_words_must_be_mostly_those_returned() -> None:
    of = {
        "reference": "It is Canberra, chosen as capital in 1908.",
        "question": "What is the capital of Australia?",
        "results": ["Australia has Canberra, a planned city chosen in 1908, as its capital.", "nothing"],
    }
    assert is_grounded("Canberra, chosen in 1908.", **of)
    assert not is_grounded("Canberra.", **of)  # the year is missing
    assert not is_grounded("Sydney, in 1908.", **of)
    zh = {"reference": "答案是堪培拉。", "question": "澳大利亚的首都？", "results": ["澳大利亚的首都是堪培拉"]}
    assert is_grounded("首都是堪培拉", **zh)
    assert not is_grounded("首都是悉尼", **zh)
    assert is_grounded("It has 1,200 rows", reference="1200 rows", question="how many?", results=["1,200 rows"])


def steps(*right: bool, tool: str = "clock", question: str = "q") -> tuple[ToolStep, ...]:
    calls = [ToolStep(question, "e", "t", tool, True, right_tool=True, right_arguments=one) for one in right]
    return (*calls, ToolStep(question, "e", "t", "", True, answered=True))


def test_figures_are_counts_of_steps_and_their_intervals_hold_them() -> None:
    before = Evaluation(tuple(RowResult(n, 1.0, 1, steps=steps(False, False)) for n in range(20)))
    rights = [(n % 2 == 0, n % 4 != 0) for n in range(20)]
    after = Evaluation(tuple(RowResult(n, 1.0, 1, steps=steps(*right)) for n, right in enumerate(rights)))
    share = sum(map(sum, rights)) / 40
    assert (before["right_tool"], before["right_arguments"]) == (1.0, 0.0)
    assert after["right_arguments"] == pytest.approx(share)
    low, high = interval(after, "right_arguments")
    assert 0 < low < share < high < 1
    change = compare(before, after)["right_arguments"]
    assert (change.difference, change.significant) == (pytest.approx(share), True)
    # before is 0 in every draw, so the interval is that of after, but for the draws
    assert (change.low, change.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    assert "40 steps with tools" not in str(after)
    assert "60 steps with tools" in str(after)


def test_steps_of_other_rows_are_not_compared() -> None:
    one, other = (Evaluation((RowResult(0, 1.0, 1, steps=steps(*right)),)) for right in ((True,), (True, True)))
    with pytest.raises(InputError, match="not of the same rows"):
        compare(one, other)


def test_the_table_groups_by_language_calls_and_tool() -> None:
    rows = [steps(True), steps(True, False), steps(False, tool="calculator", question="几点？")]
    table = step_table(Evaluation(tuple(RowResult(n, 1.0, 1, steps=one) for n, one in enumerate(rows))))
    figures = {title: of.get("right_arguments") for title, of in table.as_dict().items()}
    assert figures == {
        "all": 0.5,
        "other languages, 1 calls": 1.0,
        "other languages, 2 calls": 0.5,
        "Chinese, 1 calls": 0.0,
        "calculator": 0.0,
        "clock": pytest.approx(2 / 3),
    }
    assert "2 of 4, 50%" in repr(table)
    assert "2 of 3, 67%" in table._repr_html_()
    with pytest.raises(InputError, match="no steps with tools"):
        step_table(Evaluation((RowResult(0, 1.0, 1),)))


def test_rows_with_tools_are_measured_by_their_steps_and_others_by_their_answers(loaded: dict[str, Any]) -> None:
    plain: Conversation = {"messages": [said("user", "Hi"), said("assistant", "Hello!")]}
    told: list[tuple[str, int, int]] = []
    options = {"template": named_template("chatml"), "max_new_tokens": 3, **loaded}
    protocol = choose_protocol("react_brief")
    found = evaluate(
        rows=[*ROWS, plain], generate=5, protocol=protocol, progress=lambda *of: told.append(of), **options
    )
    assert [len(row.steps) for row in found.rows] == [3, 1, 1, 0]
    assert [row.answer is not None for row in found.rows] == [False, False, False, True]
    assert ("tool steps", 5, 5) in told
    assert not any(row.steps for row in evaluate(rows=ROWS, generate=0, protocol=protocol, **options).rows)


def test_course_evaluate_shows_the_steps(course: Course, tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    options = ("--data", str(path), "--max-new-tokens", "4", "--protocol", "react_brief")
    result = course("evaluate", "tiny", *options)
    assert result.returncode == 0, result.stderr
    assert "right tool and arguments" in result.stdout
    assert "0 of 3, 0%" in result.stdout
    assert 'expected   calculator {"expression": "6 * 7"}' in result.stdout
    result = course("evaluate", "tiny", *options, "--json")
    assert len(json.loads(result.stdout)["held_out"]["after"]["rows"][0]["steps"]) == 3
    result = course("evaluate", "tiny", *options[:-1], "reakt")
    assert result.returncode == 2
    assert "did you mean react" in result.stderr
