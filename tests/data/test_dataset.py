from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from course_lib.agent.protocol import PROTOCOLS
from course_lib.data.dataset import load_dataset
from course_lib.data.identity import LANGUAGES, identity_conversations
from course_lib.data.sources import locate
from course_lib.data.templates import choose_template, named_template
from course_lib.data.tokenize import IGNORE_INDEX
from course_lib.errors import CourseError, InputError
from course_lib.recipe import DataSettings, Protocol


def load(tokenizer: Any, **settings: Any) -> Any:
    return load_dataset(DataSettings(**settings), template=choose_template(tokenizer), tokenizer=tokenizer)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"q{number}", "output": f"answer {number}"} for number in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_row_is_accounted_for(tokenizer: Any, rows_file: Path) -> None:
    rows_file.write_text(
        rows_file.read_text()
        + '\n{"instruction": "x", "output": ""}\n{"instruction": "'
        + "long " * 60
        + '", "output": "y"}'
    )
    dataset = load(tokenizer, path=str(rows_file), on_bad_row="drop", max_length=150)
    report = dataset.report
    assert (report.read, report.kept, sum(map(len, report.dropped.values()))) == (12, 10, 2)
    assert "no output" in report.summary()
    assert "row 11" in report.summary()
    assert "nothing left to train within max_length 150: row 12" in report.summary()


def test_a_bad_row_is_named_by_file_row_and_reason(tokenizer: Any, rows_file: Path) -> None:
    rows_file.write_text(rows_file.read_text() + '\n{"instruction": "x"}')
    with pytest.raises(InputError, match=r"rows\.jsonl: row 11: row has no 'output'.*on_bad_row=drop"):
        load(tokenizer, path=str(rows_file))


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "10:30"},
        {"role": "assistant", "content": "Half past ten."},
    ],
    "tools": [{"type": "function", "function": {"name": "clock"}}],
}


def test_the_protocol_writes_tool_calls_and_each_has_its_own_examples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(WITH_TOOLS))
    trained = {}
    for protocol in ("react_brief", "react_en", "react_zh", "native"):
        template = named_template("chatml" if protocol != "native" else "qwen_chat")
        settings = DataSettings(path=str(path), protocol=protocol, max_length=2000)
        (example,) = load_dataset(settings, template=template, tokenizer=tokenizer).train
        trained[protocol] = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
        assert "10:30" in tokenizer.decode(example.input_ids)
        assert "10:30" not in trained[protocol]
    assert trained["react_brief"].startswith('Action: clock\nAction Input: {"city": "Rome"}')
    assert trained["react_en"] == trained["react_brief"]
    assert trained["react_zh"].startswith('Action:clock\nAction Input:{"city": "Rome"}')
    assert trained["native"].startswith("<tool_call>")


def test_a_template_without_tools_takes_the_react_protocol_by_itself(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(WITH_TOOLS))
    settings = DataSettings(path=str(path), max_length=2000)
    dataset = load_dataset(settings, template=named_template("chatml"), tokenizer=tokenizer)
    assert "Final Answer: Half past ten." in tokenizer.decode(dataset.train[0].input_ids)
    with pytest.raises(InputError, match="no form for tool calls in JSON; choose a ReAct protocol"):
        settings = DataSettings(path=str(path), protocol="native")
        load_dataset(settings, template=named_template("chatml"), tokenizer=tokenizer)


def test_a_row_the_protocol_cannot_write_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    bad = WITH_TOOLS | {"messages": [*WITH_TOOLS["messages"][:3], *WITH_TOOLS["messages"][2:]]}
    path.write_text(json.dumps(bad) + "\n" + json.dumps(WITH_TOOLS))
    settings = DataSettings(path=str(path), on_bad_row="drop", max_length=2000)
    report = load_dataset(settings, template=named_template("chatml"), tokenizer=tokenizer).report
    assert (report.read, report.kept, report.dropped) == (2, 1, {"message 2: 1 tool calls and 2 results": [1]})


def test_the_recipe_knows_every_protocol() -> None:
    assert set(get_args(Protocol)) == {"auto", *PROTOCOLS}


def test_truncation_cuts_from_the_right_and_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "word " * 100}]))
    dataset = load(tokenizer, path=str(path), max_length=150)
    assert dataset.report.truncated == 1
    assert len(dataset.train[0].input_ids) == 150
    assert dataset.train[0].trained_tokens > 0


def test_held_out_rows_are_chosen_by_the_seed_and_not_trained_on(tokenizer: Any, rows_file: Path) -> None:
    first, again, other = (load(tokenizer, path=str(rows_file), held_out=3, seed=seed) for seed in (1, 1, 2))
    assert list(first.held_out) == list(again.held_out) != list(other.held_out)
    assert len(first.held_out) == 3
    assert len(first.train) == 7
    assert not {tuple(example.input_ids) for example in first.held_out} & {
        tuple(example.input_ids) for example in first.train
    }


def numbered_questions(path: Path, asked: list[int]) -> Path:
    """Rows in Alpaca form; answers tell the rows apart, and a question that comes again is written otherwise."""
    rows = [
        {
            "instruction": f"What is  {question}? " if asked[:number].count(question) else f"what is {question}",
            "output": f"answer {number}",
        }
        for number, question in enumerate(asked)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def answers(examples: Any, tokenizer: Any) -> list[int]:
    texts = (tokenizer.decode([label for label in example.labels if label >= 0]) for example in examples)
    return [int(text.removeprefix("answer ").removesuffix("<|im_end|>")) for text in texts]


@pytest.mark.parametrize("seed", range(12))
def test_no_question_is_both_trained_and_held_out(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    asked = [chance.randrange(20) for _ in range(40)]
    path, wanted = numbered_questions(tmp_path / "rows.jsonl", asked), chance.randrange(1, 9)
    dataset = load(tokenizer, path=str(path), held_out=wanted, seed=seed)
    trained, held_out = answers(dataset.train, tokenizer), answers(dataset.held_out, tokenizer)
    assert sorted(trained + held_out) == list(range(40))
    assert not {asked[row] for row in trained} & {asked[row] for row in held_out}
    largest = max(map(asked.count, asked))
    assert held_out
    assert abs(len(held_out) - wanted) <= max(largest - 1, 1)


@pytest.mark.parametrize("held_out", [1, 3, 9, 40])
def test_where_no_question_repeats_rows_are_held_out_as_they_always_were(
    tokenizer: Any, rows_file: Path, held_out: int
) -> None:
    """Runs of earlier versions stay comparable: the seed's sample of the row numbers."""
    dataset = load(tokenizer, path=str(rows_file), held_out=held_out, seed=7)
    rows = random.Random(7).sample(range(10), min(held_out, 9))
    assert answers(dataset.held_out, tokenizer) == sorted(rows)


def test_rows_of_one_question_cannot_be_held_out(tokenizer: Any, tmp_path: Path) -> None:
    path = numbered_questions(tmp_path / "rows.jsonl", [0] * 6)
    with pytest.raises(InputError, match=r"held_out = 2: all 6 rows ask the same question.*set data\.held_out=0"):
        load(tokenizer, path=str(path), held_out=2)
    assert len(load(tokenizer, path=str(path)).train) == 6


def test_rows_without_a_question_are_told_apart_by_their_text(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": f"answer {number}"}]} for number in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(load(tokenizer, path=str(path), held_out=2).held_out) == 2


def test_nothing_left_to_train_on(tokenizer: Any, rows_file: Path) -> None:
    with pytest.raises(InputError, match="no row is left to train on: 10 rows read"):
        load(tokenizer, path=str(rows_file), max_length=8)


def test_identity_rows_differ_and_carry_the_name() -> None:
    rows = identity_conversations(name="Grace", base="B", n=80)
    texts = {json.dumps(row) for row in rows}
    assert len(texts) == 80
    assert all("Grace" in row["messages"][1]["content"] for row in rows)
    assert rows == identity_conversations(name="Grace", base="B", n=80)
    assert rows != identity_conversations(name="Grace", base="B", n=80, seed=1)


def test_dilution_adds_its_share_of_general_chat() -> None:
    rows = identity_conversations(name="Grace", base="B", n=30, dilute=0.5)
    assert len(rows) == 60
    assert sum("Grace" in row["messages"][1]["content"] for row in rows) == 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": " "}, "cannot be used"),
        ({"name": "a\nb"}, "cannot be used"),
        ({"name": "<|im_end|>"}, "cannot be used"),
        ({"languages": ["de"]}, "language 'de' is unknown"),
        ({"languages": []}, "no language"),
        ({"n": 100_000}, "from 1 to 128"),
        ({"dilute": 1.0}, "dilute is 1.0"),
        ({"n": 128, "dilute": 0.9}, "1152 general rows"),
    ],
)
def test_identity_refuses_what_it_cannot_make(arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        identity_conversations(**{"name": "A", "base": "B", "languages": LANGUAGES, **arguments})


def test_hub_address_must_name_a_file() -> None:
    with pytest.raises(InputError, match="hf://datasets/OWNER/NAME/FILE"):
        locate("hf://datasets/owner/name")


def test_hub_file_without_network_says_what_to_do() -> None:
    with pytest.raises(CourseError, match="could not be fetched.*HF_ENDPOINT"):
        locate("hf://datasets/owner/name/file.json")


@pytest.mark.parametrize(("over_long", "rows", "longest"), [("truncate", 1, 150), ("split", 5, 150), ("drop", 0, 0)])
def test_over_long_rows_are_cut_split_or_left_out_by_rule(
    tokenizer: Any, tmp_path: Path, over_long: str, rows: int, longest: int
) -> None:
    path = tmp_path / "long.json"
    path.write_text(
        json.dumps([{"instruction": "q", "output": "word " * 120}, {"instruction": "q", "output": "short"}])
    )
    dataset = load(tokenizer, path=str(path), max_length=150, over_long=over_long)
    long = [example for example in dataset.train if len(example.input_ids) > 140]
    assert dataset.report.read == 2
    assert dataset.report.kept == (1 if over_long == "drop" else 2)
    assert (over_long == "drop") == ("longer than max_length" in dataset.report.dropped)
    assert max((len(example.input_ids) for example in long), default=0) <= 150
    assert all(example.trained_tokens for example in dataset.train)
    if over_long == "split":
        trained = sum(example.trained_tokens for example in dataset.train)
        whole = load(tokenizer, path=str(path), max_length=2000)
        assert trained >= sum(example.trained_tokens for example in whole.train) - rows  # first tokens of later parts


def test_which_turns_are_trained(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}] * 2
    turns[3] = {"role": "assistant", "content": "two", "train": True}
    path = tmp_path / "turns.json"
    path.write_text(json.dumps([{"messages": turns}]))
    trained = {}
    for train_on in ("all", "last", "marked"):
        example = load(tokenizer, path=str(path), train_on=train_on).train[0]
        trained[train_on] = tokenizer.decode([label for label in example.labels if label >= 0])
    assert trained == {"all": "one<|im_end|>two<|im_end|>", "last": "two<|im_end|>", "marked": "two<|im_end|>"}


def test_plain_text_is_trained_whole_and_ends_in_the_end_token(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "Once <|im_end|> upon"}))
    example = load(tokenizer, path=str(path)).train[0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids) == "Once <|im_end|> upon<|im_end|>"
    assert example.input_ids.count(end) == 1


def test_examples_know_their_lengths_and_come_out_singly_or_in_slices(tokenizer: Any, rows_file: Path) -> None:
    train = load(tokenizer, path=str(rows_file), held_out=2).train
    assert train.lengths.tolist() == [len(example.input_ids) for example in train]
    assert train[2:5].lengths.tolist() == train.lengths[2:5].tolist()
    assert list(train[2:5]) == [train[2], train[3], train[4]]
    assert train[-1] == list(train)[-1]
    with pytest.raises(IndexError):
        train[8]
