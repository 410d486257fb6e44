"""The model of this app: app.json says which. Made by `course publish`."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

SETTINGS: dict[str, Any] = json.loads(Path(__file__).with_name("app.json").read_text(encoding="utf-8"))


def load() -> tuple[Any, Any]:
    """Return the model, with its adapter where it is one, and the tokenizer."""
    base = SETTINGS["base"] or SETTINGS["model"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    if SETTINGS["chat_template"]:
        tokenizer.chat_template = SETTINGS["chat_template"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="auto")
    if SETTINGS["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, SETTINGS["model"])
    return model.eval(), tokenizer


def answer(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], *, temperature: float, max_new_tokens: int
) -> Iterator[str]:
    """Yield the answer piece by piece."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    own = model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    stops |= {*tokenizer.convert_tokens_to_ids(SETTINGS["stop"])} - {tokenizer.unk_token_id}

    def generate() -> None:
        try:
            model.generate(
                **inputs,
                streamer=streamer,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops - {None}),
                **sampling,
            )
        finally:
            streamer.end()  # else a failure would leave the reader waiting

    Thread(target=generate, daemon=True).start()
    yield from streamer
