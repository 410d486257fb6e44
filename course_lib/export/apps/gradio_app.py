"""Chat with a fine-tuned model in Gradio: python app.py. Made by `course publish`."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from model import SETTINGS, answer, load

model, tokenizer = load()


def text_of(content: Any) -> str:
    """The text of a message, which Gradio keeps as text or as parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def reply(question: str, history: list[dict[str, Any]], system: str, temperature: float, length: int) -> Iterator[str]:
    """Yield the answer so far, longer each time."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
    messages.append({"role": "user", "content": question})
    text = ""
    for piece in answer(model, tokenizer, messages, temperature=temperature, max_new_tokens=int(length)):
        text += piece
        yield text


app = gr.ChatInterface(
    reply,
    title=SETTINGS["title"],
    additional_inputs=[
        gr.Textbox(label="System prompt"),
        gr.Slider(0, 1.5, value=0, label="Temperature"),
        gr.Slider(16, 1024, value=256, step=1, label="Tokens at most"),
    ],
)

if __name__ == "__main__":
    app.launch()
