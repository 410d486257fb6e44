"""A server in this process, on a free port, and what its model says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from course_lib.chat.answer_queue import AnswerQueue
from course_lib.chat.listen import Server, bind, url_of
from course_lib.chat.serve import build_app
from course_lib.chat.served import Served
from course_lib.data.templates import choose_template


@dataclass
class Running:
    """A server that clients can reach; `lines` is what it said of answers."""

    url: str
    served: Served
    queue: AnswerQueue
    server: Server
    lines: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def said(self, words: str, *, within: float = 10) -> bool:
        """Whether it says so in time."""
        return eventually(lambda: any(words in line for line in self.lines), within=within)


def eventually(condition: Any, *, within: float = 10) -> bool:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(loaded: tuple[Any, Any], *, waiting: int = 32, template: str = "auto", **options: Any) -> Iterator[Running]:
    """Serve a loaded model; the server is gone afterwards."""
    model, tokenizer = loaded
    served = Served(model, tokenizer, template=choose_template(tokenizer, template), name="tiny")
    queue = AnswerQueue(waiting=waiting)
    listener = bind("127.0.0.1", 0)
    lines: list[str] = []
    ready = threading.Event()
    server = Server(build_app(served, queue, say=lines.append, **options), queue, ready=ready.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    url = url_of(listener)
    thread.start()
    assert ready.wait(10)
    try:
        yield Running(url, served, queue, server, lines)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def model_says(loaded: tuple[Any, Any], text: str, *, end: bool = True, delay: float = 0.0) -> Iterator[None]:
    """Make the model write this text, over and over unless it ends, whoever asks; generation itself is the real one."""
    with model_writes(loaded, [text], end=end, delay=delay):
        yield


@contextmanager
def model_writes(
    loaded: tuple[Any, Any], texts: Sequence[str], *, end: bool = True, delay: float = 0.0
) -> Iterator[None]:
    """As `model_says`, with one text an answer; the last one for all that follow."""
    import torch

    model, tokenizer = loaded
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    scripts = [[*ids, tokenizer.eos_token_id] if end else ids * 1000 for ids in written]
    answer, position = -1, 0

    def force(module: Any, inputs: Any, kwargs: Any, output: Any) -> Any:
        nonlocal answer, position
        if kwargs["input_ids"].shape[1] > 1:  # a prompt: a new answer begins
            answer, position = min(answer + 1, len(scripts) - 1), 0
        time.sleep(delay)
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, scripts[answer][position % len(scripts[answer])]] = 0.0
        position += 1
        return output

    hook = model.register_forward_hook(force, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
