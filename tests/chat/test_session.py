"""ChatSession: what the model is fed, what is remembered, and how an answer ends."""

from __future__ import annotations

import gc
import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_model import model_says

from course_lib.chat.generation import AnswerStreamer, logits_processors
from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.data.tokenize import encode_conversation, encode_prompt
from course_lib.errors import CourseError, InputError

EIGHT = SamplingSettings(max_new_tokens=8)
MIXED = "你好,世界 👋🏽 é\n\tend"


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


@pytest.fixture
def chat(loaded: tuple[Any, Any]) -> Callable[..., ChatSession]:
    def make(**options: Any) -> ChatSession:
        return ChatSession(*loaded, **{"sampling": EIGHT, **options})

    return make


def test_the_prompt_of_every_turn_is_a_prefix_of_what_training_sees(chat: Callable[..., ChatSession]) -> None:
    session = chat(system="be brief", sampling=SamplingSettings(max_new_tokens=64))
    prompts = []
    for question in ("hello", "你好", "and?\n"):
        before = encode_prompt(
            [*session.messages, {"role": "user", "content": question}], session.template, session.tokenizer
        )
        with model_says(session, MIXED):
            assert session.ask(question) == MIXED
        assert session.last_stats.prompt_tokens == len(before)
        prompts.append(before + session.tokenizer(MIXED, add_special_tokens=False)["input_ids"])
    trained = encode_conversation({"messages": session.messages}, session.template, session.tokenizer).input_ids
    for prompt in prompts:
        assert trained[: len(prompt)] == prompt
        assert trained[len(prompt)] == session.tokenizer.eos_token_id
    assert session.prompt_tokens() == len(encode_prompt(session.messages, session.template, session.tokenizer))


def test_what_is_generated_is_what_generate_gives(chat: Callable[..., ChatSession]) -> None:
    import torch

    session = chat()
    prompt = encode_prompt([{"role": "user", "content": "hi"}], session.template, session.tokenizer)
    output = session.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    expected = session.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    assert session.ask("hi") == expected
    assert session.last_stats.new_tokens == output.shape[1] - len(prompt)
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"] == expected


def test_chinese_and_emoji_arrive_whole(chat: Callable[..., ChatSession]) -> None:
    session = chat(sampling=SamplingSettings(max_new_tokens=100))
    with model_says(session, MIXED):
        pieces = list(session.stream("hi"))
    assert "".join(pieces) == MIXED
    assert not any("\ufffd" in piece for piece in pieces)
    assert {"你", "好", "👋"} <= set(pieces)
    assert session.last_stats.stopped == "end"


def test_an_answer_cut_within_a_character_shows_that(chat: Callable[..., ChatSession]) -> None:
    session = chat(sampling=SamplingSettings(max_new_tokens=5))
    with model_says(session, "你好"):
        assert list(session.stream("hi")) == ["你", "\ufffd"]
    assert session.last_stats.stopped == "length"


def test_sentencepiece_lines_keep_their_indentation() -> None:
    """The reason for a streamer of our own: transformers' writes `def f:` and three spaces here."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁def", "▁f", ":", "<0x0A>", "▁▁▁", "▁return", "<0xE4>", "<0xBD>", "<0xA0>"]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    streamer = AnswerStreamer(PreTrainedTokenizerFast(tokenizer_object=backend))
    streamer.put(torch.tensor([[0, 0]]))
    for token in range(1, 10):
        streamer.put(torch.tensor([token]))
    streamer.end()
    pieces = []
    while not streamer.pieces.empty():
        pieces.append(streamer.pieces.get())
    assert "".join(pieces) == "def f:\n    return你"
    assert pieces[-1] == "你"


def test_trimming_drops_the_oldest_pairs_and_keeps_the_system_turn(
    chat: Callable[..., ChatSession], tmp_path: Path
) -> None:
    session = chat(system="be brief", context=200)
    with model_says(session, "yes"):
        for number in range(6):
            session.ask(f"question number {number}")
    assert session.messages[0] == {"role": "system", "content": "be brief"}
    assert [message["role"] for message in session.messages[1:3]] == ["user", "assistant"]
    assert session.messages[-2]["content"] == "question number 5"
    assert session.trimmed_turns == 12 - (len(session.messages) - 1) > 0
    assert session.last_stats.prompt_tokens + 8 <= 200
    saved = json.loads(session.save(tmp_path / "all.jsonl").read_text(encoding="utf-8"))["messages"]
    questions = [message["content"] for message in saved if message["role"] == "user"]
    assert questions == [f"question number {number}" for number in range(6)]
    session.reset()
    assert (session.messages, session.trimmed_turns) == ([{"role": "system", "content": "be brief"}], 0)


def test_context_is_the_models_unless_given(chat: Callable[..., ChatSession]) -> None:
    assert chat().context == 2048
    assert chat(context=100).context == 100
    with pytest.raises(InputError, match="context is 0"):
        chat(context=0)


def test_a_message_too_long_is_refused_with_the_numbers(chat: Callable[..., ChatSession]) -> None:
    session = chat(context=150)
    session.ask("hi")
    before = list(session.messages)
    with pytest.raises(InputError, match=r"too long: 397 tokens .* max_new_tokens is 8, but the context is 150"):
        session.stream("x" * 300)
    assert session.messages == before
    assert session.trimmed_turns == 0


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_refused(chat: Callable[..., ChatSession], text: str) -> None:
    with pytest.raises(InputError, match="empty"):
        chat().stream(text)


def test_a_broken_character_is_refused(chat: Callable[..., ChatSession]) -> None:
    session = chat()
    with pytest.raises(InputError, match="character 2"):
        session.ask("a\udcff")
    assert session.messages == []


def test_stop_from_another_thread_ends_within_a_second(chat: Callable[..., ChatSession]) -> None:
    session = chat(sampling=SamplingSettings(max_new_tokens=1500))
    asked_at = 0.0

    def stop() -> None:
        nonlocal asked_at
        while session.new_tokens < 20:
            time.sleep(0.001)
        asked_at = time.perf_counter()
        session.stop()

    with model_says(session, "word ", end=False, delay=0.01):
        threading.Thread(target=stop, daemon=True).start()
        answer = session.ask("talk")
    assert time.perf_counter() - asked_at < 1
    assert answer.startswith("word word")
    assert session.messages[-1] == {"role": "assistant", "content": answer}
    assert session.last_stats.stopped == "stop"
    assert session.last_stats.new_tokens < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    session.stop()  # nothing to stop: must not end the next answer
    assert session.ask("again")
    assert session.last_stats.stopped != "stop"


def test_a_stream_left_early_keeps_what_was_read(chat: Callable[..., ChatSession]) -> None:
    session = chat(sampling=SamplingSettings(max_new_tokens=1500))
    with model_says(session, "ab", end=False, delay=0.001):
        for piece in session.stream("talk"):
            assert piece == "a"
            break
        gc.collect()
        assert session.messages[-1] == {"role": "assistant", "content": "a"}
        assert session.last_stats.stopped == "stop"
        held = session.stream("and on")
        assert [next(held), next(held)] == ["a", "b"]
        session.reset()  # a stream still held but not being read is closed as well
        assert list(held) == []
    assert session.messages == []
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_two_answers_at_once_are_refused(chat: Callable[..., ChatSession]) -> None:
    session = chat(sampling=SamplingSettings(max_new_tokens=1500))
    with model_says(session, "ab", end=False, delay=0.05):
        reader = threading.Thread(target=session.ask, args=("talk",))
        reader.start()
        time.sleep(0.2)
        with pytest.raises(CourseError, match="still being written"):
            session.ask("me too")
        session.stop()
        reader.join()
    assert len(session.messages) == 2


@pytest.mark.parametrize("at_token", [0, 3])
def test_an_error_in_the_model_reaches_the_caller(chat: Callable[..., ChatSession], at_token: int) -> None:
    session = chat()
    session.ask("hi")
    before, stats = list(session.messages), session.last_stats
    calls = 0

    def fail(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > at_token:
            raise RuntimeError("out of luck")

    hook = session.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            session.ask("again")
    finally:
        hook.remove()
    assert session.messages == before
    assert session.last_stats == stats
    assert session.ask("once more") is not None


def test_keyboard_interrupt_keeps_what_was_read(chat: Callable[..., ChatSession]) -> None:
    """A notebook's stop button interrupts wherever the main thread is: mostly waiting for the next piece."""
    session = chat()
    with model_says(session, "abcdefgh"):
        stream = session.stream("talk")
        assert next(stream) == "a"
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    assert session.messages[-1]["content"] == "a"


def test_a_seed_repeats_and_leaves_the_global_generators_alone(chat: Callable[..., ChatSession]) -> None:
    import torch

    def answer(seed: int | None) -> str:
        sampling = SamplingSettings(temperature=1.0, top_p=0.95, top_k=40, max_new_tokens=24, seed=seed)
        return chat(sampling=sampling).ask("hi")

    state = torch.random.get_rng_state()
    first = answer(7)
    torch.rand(3)
    assert answer(7) == first
    assert answer(8) != first
    assert answer(None) != answer(None)
    torch.random.set_rng_state(state)
    answer(7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gumbel_noise_samples_the_softmax() -> None:
    import torch

    logits = torch.tensor([[2.0, 1.0, 0.0, -float("inf")]])
    processors = logits_processors(SamplingSettings(temperature=0.5, seed=0), torch.device("cpu"))
    draws = torch.cat([processors(None, logits.clone()).argmax(-1) for _ in range(4000)])
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(frequency, torch.softmax(logits[0] / 0.5, dim=0), atol=0.03, rtol=0)


def test_top_k_one_is_greedy(chat: Callable[..., ChatSession]) -> None:
    greedy = chat().ask("hi")
    assert chat(sampling=SamplingSettings(temperature=2.0, top_k=1, max_new_tokens=8)).ask("hi") == greedy


def test_no_warnings_whatever_the_checkpoint_recommends(
    chat: Callable[..., ChatSession], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    session = chat()
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
    own = session.model.generation_config
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096, "num_beams": 2}
    for key, value in recommended.items():
        monkeypatch.setattr(own, key, value)
    expected = chat().ask("hi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.ask("hi") == expected
        chat(sampling=SamplingSettings(temperature=1.0, repetition_penalty=1.2, max_new_tokens=4)).ask("hi")
    assert caplog.text == ""


def test_a_checkpoints_own_end_tokens_count(
    chat: Callable[..., ChatSession], monkeypatch: pytest.MonkeyPatch, loaded: tuple[Any, Any]
) -> None:
    model, tokenizer = loaded
    end = tokenizer("!", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    session = chat()
    with model_says(session, "a!b"):
        session.ask("hi")
    assert (session.last_stats.new_tokens, session.last_stats.stopped) == (2, "end")


def test_stats(chat: Callable[..., ChatSession]) -> None:
    session = chat()
    assert session.last_stats is None
    with model_says(session, "abc"):
        session.ask("hi")
    stats = session.last_stats
    assert (stats.new_tokens, stats.stopped) == (4, "end")
    assert stats.tokens_per_second == pytest.approx(4 / stats.seconds)


def test_an_empty_answer_is_a_turn_too(chat: Callable[..., ChatSession]) -> None:
    session = chat()
    with model_says(session, ""):
        assert session.ask("hi") == ""
    assert session.messages[-1] == {"role": "assistant", "content": ""}
    assert isinstance(session.ask("go on"), str)


def test_system_turn(chat: Callable[..., ChatSession]) -> None:
    session = chat(system="one")
    session.ask("hi")
    session.set_system("two")
    assert session.messages == [{"role": "system", "content": "two"}]
    session.ask("hi")
    session.reset()
    assert session.messages == [{"role": "system", "content": "two"}]
    session.set_system("")
    assert (session.messages, session.system, session.prompt_tokens()) == ([], "", 0)


def test_save_is_a_row_to_train_on_and_never_overwrites(chat: Callable[..., ChatSession], tmp_path: Path) -> None:
    session = chat(system="be brief", sampling=SamplingSettings(max_new_tokens=64))
    path = tmp_path / "chat.jsonl"
    with pytest.raises(InputError, match="nothing was said"):
        session.save(path)
    with model_says(session, MIXED):
        session.ask("你好")
    assert session.save(path) == path
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") == 1
    assert "你好" in text
    assert json.loads(text) == {"messages": session.messages}
    with pytest.raises(InputError, match="already exists"):
        session.save(path)
    assert path.read_text(encoding="utf-8") == text


def test_a_template_that_refuses_is_told(chat: Callable[..., ChatSession]) -> None:
    from dataclasses import replace

    session = chat()
    session.template = replace(session.template, source="{{ raise_exception('no system turn') }}")
    with pytest.raises(InputError, match="no system turn"):
        session.ask("hi")
    with pytest.raises(InputError, match="unknown"):
        chat(template="chatmk")


def test_a_peft_model_and_a_model_in_training(chat: Callable[..., ChatSession], tiny: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from course_lib.models import load_model

    model, tokenizer = load_model(tiny)
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    session = ChatSession(peft_model, tokenizer, sampling=EIGHT)
    assert session.context == 2048
    assert session.ask("hi") == chat().ask("hi")  # a fresh adapter changes nothing, once dropout is off
    assert peft_model.training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_sampling_settings_out_of_range(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} is {value!r}; it must be"):
        SamplingSettings(**{name: value})


def test_sampling_settings_are_frozen() -> None:
    settings = SamplingSettings(temperature=1, seed=0)
    with pytest.raises(AttributeError):
        settings.temperature = 0.5


def test_a_question_is_taken_back_with_its_answer(chat: Callable[..., ChatSession]) -> None:
    session = chat(system="be brief")
    first = session.ask("one")
    session.ask("two")
    assert session.take_back() == "two"
    assert [message["content"] for message in session.messages] == ["be brief", "one", first]
    assert session.take_back() == "one"
    with pytest.raises(InputError, match="nothing was asked"):
        session.take_back()
    assert session.ask("one") == first


def test_tokens_are_counted_while_the_answer_is_written(chat: Callable[..., ChatSession]) -> None:
    session = chat()
    assert session.new_tokens == 0
    with model_says(session, "abcdefgh", delay=0.01):
        counts = [session.new_tokens for _ in session.stream("hi")]
    assert counts[-1] == session.last_stats.new_tokens == 8
    assert counts == sorted(counts)
    assert session.new_tokens == 0
