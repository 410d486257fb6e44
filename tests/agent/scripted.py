"""Models that write what a test says: one without a model at all, and the tiny model led by the hand."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from course_lib.chat.session import ChatSession
from course_lib.data.conversation import Conversation


class Script:
    """A writer that plays texts, the last one for ever, in pieces of three characters; `fed` is what it was given."""

    def __init__(self, *texts: str, room: int = 10**9) -> None:
        self.texts, self.room, self.stopped = list(texts), room, False
        self.fed: list[Conversation] = []

    def fits(self, row: Conversation) -> bool:
        return len(str(row)) <= self.room

    def stream_turn(self, row: Conversation) -> Generator[str, None, None]:
        self.fed.append(row)
        self.stopped = False
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        return self._pieces(text)

    def _pieces(self, text: str) -> Generator[str, None, None]:
        for start in range(0, len(text), 3):
            if self.stopped:
                return
            yield text[start : start + 3]

    def stop(self) -> None:
        self.stopped = True


@contextmanager
def model_writes(session: ChatSession, *texts: str) -> Iterator[None]:
    """Make the model write these turns, each with the token that ends it; generation itself is the real one."""
    import torch

    script: list[int] = []
    for text in texts:
        script += [*session.tokenizer(text, add_special_tokens=False)["input_ids"], session.tokenizer.eos_token_id]
    position = 0

    def force(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal position
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, script[min(position, len(script) - 1)]] = 0.0
        position += 1
        return output

    hook = session.model.register_forward_hook(force)
    try:
        yield
    finally:
        hook.remove()


def steps(*parts: Sequence[Any]) -> str:
    """A ReAct turn of (name, arguments as JSON text) pairs."""
    return "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in parts)
