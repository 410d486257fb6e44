"""A model that writes what a test wants, through the real generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.chat.session import ChatSession


@contextmanager
def model_says(session: ChatSession, *texts: str, end: bool = True, delay: float = 0.0) -> Iterator[None]:
    """Make the model write these texts, one an answer and the last for ever; generation itself is the real one.

    Without `end`, an answer is its text over and over. `delay` is seconds a token.
    """
    import torch

    scripts = [session.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    scripts = [[*ids, session.tokenizer.eos_token_id] if end else ids for ids in scripts]
    answer = position = -1

    def force(module: Any, inputs: Any, options: Any, output: Any) -> Any:
        nonlocal answer, position
        begins = options["input_ids"].shape[1] > 1  # a prompt
        answer, position = (answer + 1, 0) if begins else (answer, position + 1)
        script = scripts[min(answer, len(scripts) - 1)]
        time.sleep(delay)
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, script[position % len(script)]] = 0.0
        return output

    hook = session.model.register_forward_hook(force, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
