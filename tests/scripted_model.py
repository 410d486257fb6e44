"""A model that writes what a test wants, through the real generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.chat.session import ChatSession


@contextmanager
def model_says(session: ChatSession, text: str, *, end: bool = True, delay: float = 0.0) -> Iterator[None]:
    """Make the model write this text, over and over unless it ends; generation itself is the real one."""
    import torch

    ids = session.tokenizer(text, add_special_tokens=False)["input_ids"]
    script = [*ids, session.tokenizer.eos_token_id] if end else ids * 1000
    position = 0

    def force(module: Any, inputs: Any, options: Any, output: Any) -> Any:
        nonlocal position
        if options["input_ids"].shape[1] > 1:  # a prompt: another answer begins
            position = 0
        time.sleep(delay)
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, script[position % len(script)]] = 0.0
        position += 1
        return output

    hook = session.model.register_forward_hook(force, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
