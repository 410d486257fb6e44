"""Every named template writes the text in golden/NAME.txt, trains the answers alone, and feeds inference a prefix of it.

The golden files were checked against the template each `.jinja` file cites. In them ⟦ and ⟧ stand around what is trained.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from course_lib.data.conversation import RowError
from course_lib.data.system_prompts import system_prompt, system_prompts
from course_lib.data.templates import (
    DESCRIPTIONS,
    STOP_TEXTS,
    TEMPLATE_FOLDER,
    ChatTemplate,
    Rendered,
    choose_template,
    named_template,
    render,
    render_prompt,
)
from course_lib.data.tokenize import IGNORE_INDEX, encode_conversation
from course_lib.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
NAMES = list(STOP_TEXTS)
WITH_TOOLS = ["qwen_chat", "qwen3_chat", "internlm2_chat", "llama3_chat", "mistral", "chatglm3"]
WITHOUT_TOOLS = [name for name in NAMES if name not in WITH_TOOLS]
WITHOUT_BOS = ["smollm2", "chatml", "qwen_chat", "qwen3_chat", "zephyr", "phi3", "chatglm3", "baichuan2_chat"]
ANY_ROLE = ["smollm2", "chatml", "internlm2_chat"]  # the role's name is written as it is
# what is trained of an answer: the words, the white space that inference leaves the model to write, and the end
ANSWERS = {
    "smollm2": "{}<|im_end|>",
    "chatml": "{}<|im_end|>",
    "qwen_chat": "{}<|im_end|>",
    "qwen3_chat": "{}<|im_end|>",
    "internlm_chat": "{}<eoa>",
    "internlm2_chat": "{}<|im_end|>",
    "llama2_chat": " {} </s>",
    "llama3_chat": "{}<|eot_id|>",
    "mistral": " {}</s>",
    "zephyr": "{}</s>",
    "gemma": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "chatglm3": "\n {}<|user|>",  # the last one ends in </s>
    "baichuan2_chat": "{}</s>",
    "deepseek": " {}</s>",
    "minicpm": "{}</s>",
    "vicuna": " {}</s>",
    "alpaca": "{}</s>",
    "default": "{}</s>",
}

ONE_TURN = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "再加一？"}, {"role": "assistant", "content": "等于 5。"}]
SYSTEM = {"role": "system", "content": "You count well."}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"degrees": 22}'}
TOOL_USE = [
    {"role": "user", "content": "Weather in Köln?"},
    CALLING,
    RESULT,
    {"role": "assistant", "content": "22 degrees."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Gladly."},
]
CASES: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": (ONE_TURN, None),
    "two turns": (TWO_TURNS, None),
    "system": ([SYSTEM, *TWO_TURNS], None),
    "empty system": ([{"role": "system", "content": ""}, *ONE_TURN], None),
    "tools": (TOOL_USE, [WEATHER]),
    "system and tools": ([SYSTEM, *TOOL_USE], [WEATHER]),
}


def cases(name: str) -> list[str]:
    return [case for case in CASES if name in WITH_TOOLS or "tools" not in case]


@pytest.fixture(scope="session")
def stand_in(tiny: Path) -> Any:
    """The tiny model's tokenizer with the special tokens of a Llama family."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny, bos_token="<s>", eos_token="</s>")


def marked(rendered: Rendered) -> str:
    """The text with ⟦ and ⟧ around what is trained."""
    pieces, position = [], 0
    for start, end in rendered.answers:
        pieces += [rendered.text[position:start], "⟦", rendered.text[start:end], "⟧"]
        position = end
    return "".join([*pieces, rendered.text[position:]])


def golden(name: str) -> dict[str, str]:
    """Case -> text. A case begins after a line `=== CASE ===`; the line break before the next one is not part of it."""
    _, *parts = re.split(r"^=== (.+) ===\n", (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {case: text.removesuffix("\n") for case, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_text_and_trained_spans_equal_the_golden_file(stand_in: Any, name: str) -> None:
    expected = golden(name)
    assert list(expected) == [*cases(name), "prompt"]
    template = named_template(name)
    for case in cases(name):
        messages, tools = CASES[case]
        assert marked(render(messages, template, stand_in, tools)) == expected[case], case
    assert marked(render_prompt([SYSTEM, *TWO_TURNS[:3]], template, stand_in)) == expected["prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_trained_is_the_answer_and_what_ends_it_and_nothing_else(stand_in: Any, name: str) -> None:
    first = ANSWERS[name].format("It is 4.")
    last = ANSWERS[name].format("等于 5。").replace("<|user|>", "</s>")
    rendered = render([SYSTEM, *TWO_TURNS], named_template(name), stand_in)
    assert [rendered.text[start:end] for start, end in rendered.answers] == [first, last]
    example = encode_conversation({"messages": [SYSTEM, *TWO_TURNS]}, named_template(name), stand_in)
    assert stand_in.decode([label for label in example.labels if label != IGNORE_INDEX]) == first + last
    assert stand_in.decode(example.input_ids) == rendered.text


@pytest.mark.parametrize("name", NAMES)
def test_what_inference_is_fed_is_how_the_training_text_begins(stand_in: Any, name: str) -> None:
    template = named_template(name)
    for case in cases(name):
        messages, tools = CASES[case]
        rendered = render(messages, template, stand_in, tools)
        starts = iter(rendered.answers)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = render_prompt(messages[:index], template, stand_in, tools)
                assert rendered.text.startswith(prompt.text), (case, index)
                assert len(prompt.text) == next(starts)[0], (case, index)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_bos_and_it_comes_first(stand_in: Any, name: str) -> None:
    for case in cases(name):
        messages, tools = CASES[case]
        text = render(messages, named_template(name), stand_in, tools).text
        exchanges = sum(message["role"] == "user" for message in messages)
        count = 0 if name in WITHOUT_BOS else exchanges if name == "llama2_chat" else 1
        assert text.count("<s>") == count, case
        assert text.startswith("<s>") == bool(count), case


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_tools_are_refused_where_the_family_has_no_form_for_them(stand_in: Any, name: str) -> None:
    template = named_template(name)
    refusal = f"template {name} has no form for tools"
    for messages, tools in (
        (ONE_TURN, [WEATHER]),
        ([TWO_TURNS[0], CALLING], None),
        ([*ONE_TURN, RESULT, ONE_TURN[1]], None),
    ):
        with pytest.raises(RowError, match=refusal):
            render(messages, template, stand_in, tools)
    with pytest.raises(RowError, match=refusal):
        render_prompt(ONE_TURN[:1], template, stand_in, [WEATHER])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANY_ROLE])
def test_a_role_the_family_does_not_know_is_refused(stand_in: Any, name: str) -> None:
    with pytest.raises(RowError, match=rf"template {name} (has no form for the role critic|wants user and assistant)"):
        render([*ONE_TURN, {"role": "critic", "content": "no"}], named_template(name), stand_in)


@pytest.mark.parametrize("name", ["llama2_chat", "gemma", "mistral"])
def test_turns_out_of_order_are_refused_as_in_the_official_template(stand_in: Any, name: str) -> None:
    with pytest.raises(RowError, match="alternation"):
        render([TWO_TURNS[0], *TWO_TURNS[2:], *ONE_TURN[1:]], named_template(name), stand_in)


@pytest.mark.parametrize("name", NAMES)
def test_stop_texts_hold_what_ends_an_answer(stand_in: Any, name: str) -> None:
    stops = STOP_TEXTS[name]
    for case in cases(name):
        rendered = render(CASES[case][0], named_template(name), stand_in, CASES[case][1])
        for start, end in rendered.answers:
            assert rendered.text[start:end].endswith((*stops, stand_in.eos_token)), case
    first = render(TWO_TURNS, named_template(name), stand_in)
    assert first.text[slice(*first.answers[0])].endswith((stops[0], stand_in.eos_token))


@pytest.mark.parametrize(
    ("name", "several", "words"),
    [
        ("internlm2_chat", False, True),
        ("llama3_chat", False, False),
        ("chatglm3", False, True),
        ("mistral", True, False),
        ("qwen_chat", True, True),
        ("qwen3_chat", True, True),
    ],
)
def test_a_form_of_calls_the_family_lacks_is_refused(stand_in: Any, name: str, several: bool, words: bool) -> None:
    two_calls = [TOOL_USE[0], {**CALLING, "tool_calls": [CALL, CALL]}]
    with_words = [TOOL_USE[0], {**CALLING, "content": "Let me see."}]
    for messages, known in ((two_calls, several), (with_words, words)):
        if known:
            rendered = render(messages, named_template(name), stand_in, [WEATHER])
            trained = rendered.text[slice(*rendered.answers[0])]
            assert trained.count("get_weather") == len(messages[1]["tool_calls"])
            assert messages[1]["content"] in trained
        else:
            with pytest.raises(RowError, match=f"template {name} "):
                render(messages, named_template(name), stand_in, [WEATHER])


def test_chatglm3_writes_arguments_as_python(stand_in: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": True, "b": None, "c": 1.5, "d": ["x"]}}}
    messages = [TOOL_USE[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = render(messages, named_template("chatglm3"), stand_in).text
    assert 'f\n ```python\ntool_call(a=True, b=None, c=1.5, d=["x"])\n```</s>' in text


@pytest.mark.parametrize("missing", ["id", "tool_call_id"])
def test_mistral_wants_ids_of_nine_letters(stand_in: Any, missing: str) -> None:
    call = {key: value for key, value in CALL.items() if key != missing}
    result = {key: value for key, value in RESULT.items() if key != missing}
    with pytest.raises(RowError, match="nine letters or digits"):
        render(
            [TOOL_USE[0], {**CALLING, "tool_calls": [call]}, result, TOOL_USE[3]], named_template("mistral"), stand_in
        )


def own(tokenizer: Any, source: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return tokenizer


def without_marks(name: str) -> str:
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", named_template(name).source)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizers_own_template_is_replaced_by_its_marked_twin(stand_in: Any, name: str) -> None:
    assert choose_template(own(stand_in, without_marks(name))).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_that_carries_a_named_template_has_its_stop_texts(stand_in: Any, name: str) -> None:
    """As a merged model does; a template by itself does not say what ends a turn."""
    assert choose_template(own(stand_in, named_template(name).source)) == named_template(name)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("qwen_chat", "<tool_response>", "<result>"),  # differs in tools alone
        ("internlm2_chat", "environment", "plugin"),
        ("chatml", "message['content'] + '<|im_end|>\\n'", "message['content'] | trim + '<|im_end|>\\n'"),
        ("qwen3_chat", "system is not none", "system"),  # differs in the empty system text
        ("zephyr", "['system', 'user']", "['user']"),  # refuses a system turn
    ],
)
def test_a_template_that_only_looks_alike_is_kept(stand_in: Any, name: str, old: str, new: str) -> None:
    assert old in without_marks(name)
    tokenizer = own(stand_in, without_marks(name).replace(old, new))
    assert choose_template(tokenizer).name == "the tokenizer's own"


def test_an_own_template_that_drops_tools_is_found_out(stand_in: Any) -> None:
    source = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(name="the tokenizer's own", source=source, stop_texts=())
    assert render(TWO_TURNS, template, stand_in).text.startswith("user:What")
    for messages, tools in ((ONE_TURN, [WEATHER]), (TOOL_USE, None)):
        with pytest.raises(RowError, match="leaves out tool or call 'get_weather'"):
            render(messages, template, stand_in, tools)
    with pytest.raises(RowError, match="leaves out tool or call 'get_weather'"):
        render_prompt(ONE_TURN[:1], template, stand_in, [WEATHER])


def test_an_own_template_whose_expressions_fail_refuses_the_row(stand_in: Any) -> None:
    template = ChatTemplate(name="own", source="{{ messages[0]['content'] + 1 }}", stop_texts=())
    with pytest.raises(RowError, match="own template refuses the conversation"):
        render(ONE_TURN, template, stand_in)


def test_the_catalogue_and_the_files_are_the_same() -> None:
    assert {path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")} == set(NAMES) == set(ANSWERS) == set(DESCRIPTIONS)
    for name in NAMES:
        source = named_template(name).source
        assert re.match(r"\{#-.*Source", source, flags=re.DOTALL), name
        assert named_template(name).marked
        assert DESCRIPTIONS[name]


def test_system_prompts_by_name() -> None:
    names = ["alpaca", "medical", "medical_zh", "lawyer", "coder", "sql", "arxiv_title", "colorist", "doctor"]
    assert list(system_prompts()) == names
    for name in names:
        assert system_prompt(name).strip() == system_prompt(name) != ""
        assert "\n" not in system_prompt(name)
    with pytest.raises(InputError, match="system prompt 'medcal' is unknown: choose alpaca, .*did you mean medical"):
        system_prompt("medcal")
