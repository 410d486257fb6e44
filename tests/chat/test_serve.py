"""`course serve` through the official `openai` client: what is answered, refused, cancelled, and kept apart."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, eventually, model_says, serving

from course_lib.chat import serve as serve_module
from course_lib.chat.generation import SamplingSettings, StopTexts
from course_lib.chat.session import ChatSession

HELLO = [{"role": "user", "content": "hello"}]
LONG = {"model": "tiny", "messages": HELLO, "max_tokens": 1500}


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


@pytest.fixture(scope="module")
def running(loaded: tuple[Any, Any]) -> Iterator[Running]:
    with serving(loaded) as running:
        yield running


def ask(running: Running, **options: Any) -> Any:
    return running.client().chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 8, **options})


def streamed(running: Running, **options: Any) -> tuple[str, list[Any]]:
    chunks = list(ask(running, stream=True, **options))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


def post(running: Running, body: bytes | str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    """Status, body and headers of a request that the client would not send."""
    connection = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json", **(headers or {})})
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response.headers


def test_an_answer_is_what_the_chat_gives(running: Running, loaded: tuple[Any, Any]) -> None:
    session = ChatSession(*loaded, system="be brief", sampling=SamplingSettings(max_new_tokens=8))
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    expected = session.ask("hello")
    answer = ask(running, messages=messages)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == session.last_stats.prompt_tokens
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, session.last_stats.prompt_tokens + 8)
    again = ask(
        running, messages=[*messages, {"role": "assistant", "content": expected}, {"role": "user", "content": "and?"}]
    )
    assert again.choices[0].message.content == session.ask("and?")


def test_a_stream_is_the_same_answer_in_pieces(running: Running) -> None:
    plain = ask(running)
    text, chunks = streamed(running, stream_options={"include_usage": True})
    assert text == plain.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == plain.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any(chunk.usage for chunk in streamed(running)[1])


def test_chinese_and_emoji_arrive_whole(running: Running, loaded: tuple[Any, Any]) -> None:
    with model_says(loaded, "你好,世界 👋🏽\n"):
        assert streamed(running, max_tokens=100)[0] == "你好,世界 👋🏽\n"
        answer = ask(running, max_tokens=100)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("你好,世界 👋🏽\n", "stop")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [("three", "one two ", 13), (["x", "wo", "three"], "one t", 7), ("four", "one two three", 14)],
)
def test_an_answer_ends_before_a_stop_text(
    running: Running, loaded: tuple[Any, Any], stop: Any, text: str, tokens: int
) -> None:
    with model_says(loaded, "one two three"):  # a token a character, and one for the end
        answer = ask(running, stop=stop, max_tokens=100)
        assert streamed(running, stop=stop, max_tokens=100)[0] == answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens


@given(
    text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_a_stop_text_is_found_however_the_pieces_fall(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    finder = StopTexts(stops)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    passed, given_in = "", ""
    for piece in pieces:
        given_in += piece
        passed += finder.certain(piece)
        # The first piece that completes a stop text decides: what was written up to there is searched.
        starts = [start for stop in stops if (start := given_in.find(stop)) >= 0]
        assert finder.found == bool(starts)
        if starts:
            assert passed == given_in[: min(starts)]
            return
    assert passed + finder.rest() == text


def test_sampling_settings_are_honoured(running: Running, loaded: tuple[Any, Any]) -> None:
    warm = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 20}
    expected = ChatSession(*loaded, sampling=SamplingSettings(1.5, 0.9, 5, 20, seed=7)).ask("hello")
    assert ask(running, **warm, extra_body={"top_k": 5}).choices[0].message.content == expected
    others = {ask(running, **{**warm, "seed": seed}).choices[0].message.content for seed in range(3)}
    assert len(others) == 3
    greedy = [ask(running, max_tokens=20, **options).choices[0].message.content for options in ({}, {"temperature": 0})]
    assert greedy[0] == greedy[1] not in others


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": "  \n"}]}, "the message is empty"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "last message is from system"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "last message is from assistant"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "content is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "only text can be read"),
        ({"messages": [*HELLO, {"role": "system", "content": "s"}, *HELLO]}, "system turn must come first"),
        ({"messages": {"role": "user"}}, "messages is an object, not an array"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1 up"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"max_tokens": 5000}, "with 5000 tokens of answer it does not fit into the context of 2048"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "prompt is too long: 30"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -5}, "seed is -5"),
        ({"stop": [""]}, "stop is"),
        ({"stop": ["x"] * 17}, "stop holds 17 texts"),
        ({"n": 2}, "n 2 is not supported"),
        ({"logprobs": True}, "logprobs True is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty 0.5 is not supported"),
        ({"tool_choice": "required"}, "tool_choice 'required' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no form for tools that can be read back"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls False is not supported"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "a", "content": "3"}]}, "a tool turn that follows no turn"),
        ({"tools": [{"type": "function"}]}, "tool 1 is not"),
        ({"extra_body": {"temprature": 1}}, "'temprature' is unknown; did you mean temperature"),
        ({"extra_body": {"stream": "yes"}}, "stream is 'yes'; it must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(running: Running, options: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(running, **options)
    assert says in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.mark.parametrize(
    ("template", "before", "after", "key"),
    [
        ("qwen_chat", "<tool_call>\n", "\n</tool_call>", "arguments"),
        ("internlm2_chat", "<|action_start|><|plugin|>\n", "<|action_end|>", "parameters"),
    ],
)
def test_tools_are_rendered_and_calls_are_read_back(
    loaded: tuple[Any, Any], template: str, before: str, after: str, key: str
) -> None:
    call = before + json.dumps({"name": "get_weather", key: {"city": "Oslo"}}) + after
    with serving(loaded, template=template) as running:
        asked = {"tools": [WEATHER], "max_tokens": 400, "tool_choice": "auto"}
        untooled = ask(running, max_tokens=1).usage.prompt_tokens
        with model_says(loaded, "I look.\n" + call):
            choice = ask(running, **asked).choices[0]
            text, chunks = streamed(running, **asked)
        assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
        assert text == "I look."
        (sent,) = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
        for one in (choice.message.tool_calls[0], sent[0]):
            assert (one.function.name, json.loads(one.function.arguments)) == ("get_weather", {"city": "Oslo"})
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "-3 degrees"}
        history = [*HELLO, choice.message.model_dump(exclude_none=True), result]
        with model_says(loaded, " -3 < 0 \n"):
            last = ask(running, **{**asked, "messages": history})
            assert (
                streamed(running, **{**asked, "messages": history})[0]
                == last.choices[0].message.content
                == " -3 < 0 \n"
            )
        assert last.choices[0].finish_reason == "stop"
        assert last.usage.prompt_tokens > ask(running, tools=[WEATHER], max_tokens=1).usage.prompt_tokens > untooled
        with model_says(loaded, before + "{not JSON" + after):
            broken = ask(running, **asked).choices[0]
        assert (broken.message.content, broken.message.tool_calls) == (before + "{not JSON" + after, None)
        assert ask(running, **{**asked, "max_tokens": 1, "tool_choice": "none"}).usage.prompt_tokens == untooled


def test_special_tokens_are_left_out_of_words_but_seen_where_they_may_mark_calls(loaded: tuple[Any, Any]) -> None:
    with serving(loaded, template="qwen_chat") as running, model_says(loaded, "a<|im_start|>b"):
        assert ask(running).choices[0].message.content == "ab"
        assert ask(running, tools=[WEATHER]).choices[0].message.content == "a<|im_start|>b"


def test_settings_that_ask_for_nothing_are_taken(running: Running) -> None:
    plain = ask(running).choices[0].message.content
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "user": "u",
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert ask(running, messages=parts, **neutral, extra_body={"logit_bias": None}).choices[0].message.content == plain


def test_the_prompt_may_fill_the_context_to_the_last_token(running: Running) -> None:
    prompt = ask(running, max_tokens=1).usage.prompt_tokens
    room = 2048 - prompt
    fills = [{"role": "user", "content": "hello" + "x" * (room - 3)}]
    assert ask(running, messages=fills, max_tokens=3).usage.total_tokens == 2048
    assert ask(running, messages=fills, max_tokens=None).usage.total_tokens == 2048
    with pytest.raises(openai.BadRequestError) as caught:
        ask(running, messages=fills, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"


def test_bodies_that_no_client_sends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, status in (("{", 400), ("[1]", 400), ("[" * 100_000, 400), (b"\xff", 400), ('{"messages": NaN}', 400)):
        assert post(running, body)[0] == status, body[:20]
    assert post(running, json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}))[0] == 400
    assert post(running, "{}", {"content-type": "text/plain"})[0] == 415  # what a foreign page may send without asking
    monkeypatch.setattr(serve_module, "LARGEST_BODY", 100)
    status, body, _ = post(running, " " * 101)
    assert (status, body["error"]["message"]) == (413, "the request is larger than 100 bytes")


def test_names_and_paths(running: Running) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: ask(running, model="gpt-4"),
        lambda: client.embeddings.create(model="tiny", input="a"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert (
        post(running, json.dumps({"messages": HELLO, "max_tokens": 1}))[0] == 200
    )  # without a name: the one that is served


def test_who_has_not_the_key_learns_nothing(loaded: tuple[Any, Any]) -> None:
    with serving(loaded, api_key="right") as running:
        assert (
            running.client(api_key="right").chat.completions.create(**{**LONG, "max_tokens": 2}).usage.completion_tokens
            == 2
        )
        for key in ("wrong", "right2"):
            with pytest.raises(openai.AuthenticationError) as caught:
                running.client(api_key=key).models.list()
            assert "key is wrong" in caught.value.body["message"]
            assert caught.value.code == "invalid_api_key"
        assert post(running, "{}", {"authorization": "Bearer r\xefght"})[0] == 401
        assert post(running, "{}", {"authorization": "Basic right"})[0] == 401
        status, body, headers = post(running, "{}")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert "asks for an API key" in body["error"]["message"]
        connection = http.client.HTTPConnection(urlsplit(running.url).netloc)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}


def test_without_a_key_only_own_names_of_this_host_are_served(loaded: tuple[Any, Any]) -> None:
    with serving(loaded, own_names=("127.0.0.1", "[::1]")) as running:
        assert ask(running).usage.completion_tokens == 8
        for host, status in (("[::1]:8000", 400), ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("[", 403)):
            assert post(running, "{}", {"host": host})[0] == status, host


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(loaded: tuple[Any, Any], stream: bool) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01):  # 15 s, if nobody ends it
        body = json.dumps({**LONG, "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        address = urlsplit(running.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(head % len(body) + body)
            assert eventually(
                lambda: any(answer.generation and answer.generation.new_tokens for answer in running.queue._answers)
            )
        left = time.monotonic()
        assert running.said("its client left")
        assert ask(running, max_tokens=2).usage.completion_tokens == 2
        assert time.monotonic() - left < 10  # 15 s and more, if nobody ended the first


def test_a_stream_that_is_closed_ends_its_answer(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01):
        stream = ask(running, stream=True, max_tokens=1500)
        for _, _chunk in zip(range(4), stream, strict=False):
            pass
        stream.close()
        assert running.said("its client left")


def test_who_leaves_while_waiting_is_never_answered(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01):
        first = ask(running, stream=True, max_tokens=1500)
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            running.client(timeout=0.3).chat.completions.create(**LONG)
        assert running.said("a client left before its turn came")
        first.close()
        assert running.said("its client left")
        assert len(running.lines) == 2


def test_who_finds_no_place_is_told_when_to_come_again(loaded: tuple[Any, Any]) -> None:
    with serving(loaded, waiting=1) as running, model_says(loaded, "word ", end=False, delay=0.01):
        streams = [ask(running, stream=True, max_tokens=1500) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            ask(running)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert "too many clients: 2 clients" in caught.value.body["message"]
        for stream in streams:
            stream.close()
        assert running.client(max_retries=5).chat.completions.create(**{**LONG, "max_tokens": 2}).usage


def test_a_model_that_fails_says_so_and_the_next_is_answered(running: Running, loaded: tuple[Any, Any]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such\nkernel")

    hook = loaded[0].register_forward_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError, match="the model failed: RuntimeError: no such kernel"):
            ask(running)
        with pytest.raises(openai.APIError, match="the model failed: RuntimeError: no such kernel"):
            streamed(running)
    finally:
        hook.remove()
    assert ask(running).usage.completion_tokens == 8


def test_a_server_that_ends_says_so(loaded: tuple[Any, Any]) -> None:
    with serving(loaded) as running, model_says(loaded, "word ", end=False, delay=0.01), ThreadPoolExecutor(1) as pool:
        stream = ask(running, stream=True, max_tokens=1500)
        chunks = iter(stream)
        next(chunks)
        waiting = pool.submit(ask, running)
        assert eventually(lambda: len(running.queue._answers) == 2)
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(chunks)
        with pytest.raises(openai.InternalServerError, match="the server is being stopped"):
            waiting.result(10)


def test_who_does_not_read_holds_nobody_up_and_is_dropped(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "SECONDS_TO_READ", 1)
    monkeypatch.setattr(serve_module._Completion, "_events", _megabytes)
    with serving(loaded, waiting=1) as running:
        address = urlsplit(running.url)
        body = json.dumps({**LONG, "max_tokens": 2, "stream": True}).encode()
        with socket.create_connection((address.hostname, address.port)) as client:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            assert eventually(lambda: running.queue._here == 1)
            assert ask(running, max_tokens=2).usage.completion_tokens == 2  # meanwhile
            assert eventually(lambda: running.queue._here == 0, within=10)


async def _megabytes(self: Any, *_: Any) -> Any:
    while True:
        yield b"x" * 2**20


def test_twenty_clients_at_once_get_their_own_answers(loaded: tuple[Any, Any]) -> None:
    """Each asks with a seed of its own; half of them stream."""
    options = [{"seed": seed, "temperature": 1.0, "max_tokens": 12, "messages": _question(seed)} for seed in range(20)]
    with serving(loaded) as running:
        alone = [ask(running, **one).choices[0].message.content for one in options]
        start = threading.Barrier(20)

        def client(number: int) -> str:
            start.wait()
            if number % 2:
                return streamed(running, **options[number])[0]
            return ask(running, **options[number]).choices[0].message.content

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(client, range(20))) == alone
        assert len(set(alone)) == 20
        # the last client has its answer a moment before the server has put its place back
        assert eventually(lambda: (running.queue._here, running.queue._answers) == (0, set()))


def _question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number} times {number}?"}]
