"""The web app, a page that streamlit runs: a client of any server with OpenAI's chat API.

`course app` starts it. COURSE_URL is the server's address and COURSE_API_KEY its key; the key can be given in the page too.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from course_lib.chat.api_client import ApiAnswer, list_models
from course_lib.errors import CourseError

SECONDS_A_FRAME = 0.05
_IMAGE = re.compile(r"!(?=\[[^\]]*\]\()")


@dataclass
class Pending:
    """A question and the answer that is being written."""

    question: str
    answer: ApiAnswer


@dataclass
class Conversation:
    """What is shown. Like an answer being written it outlives the runs of this script, of which two may overlap for a moment."""

    messages: list[dict[str, str]]
    pending: Pending | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self) -> None:
        """End the pending answer; keep it as far as it came, with its question, or neither where nothing was written."""
        with self.lock:
            pending, self.pending = self.pending, None
        if pending is None:
            return
        pending.answer.stop()
        if text := pending.answer.text:
            self.messages += [{"role": "user", "content": pending.question}, {"role": "assistant", "content": text}]

    def clear(self) -> None:
        """Forget everything."""
        self.keep()
        self.messages = []


def main() -> None:
    """Draw the page; streamlit calls this anew whenever something was pressed or written."""
    st.set_page_config(page_title="Course chat")  # an icon of its own would be fetched from another host
    st.title("Chat")
    chat: Conversation = st.session_state.setdefault("chat", Conversation([]))
    url = os.environ.get("COURSE_URL", "http://127.0.0.1:8000/v1")
    with st.sidebar:
        # What the environment holds is not written into the page.
        key = st.text_input("API key", type="password", help="Only where COURSE_API_KEY is not the right one.")
        key = key or os.environ.get("COURSE_API_KEY", "")
    try:
        models = _models(url, key)
    except CourseError as error:
        _show_kept(chat)
        st.error(_sentence(error), icon=":material/error:")
        st.button("Try again")
        st.stop()
    with st.sidebar:
        settings = _settings(models)
        system = st.text_area("System prompt", help="Holds from the next message on.")
    opening = [{"role": "system", "content": system}] if system.strip() else []

    def ask(question: str) -> None:
        chat.keep()
        messages = [*opening, *chat.messages, {"role": "user", "content": question}]
        chat.pending = Pending(question, ApiAnswer(url, key, messages=messages, **settings))

    if question := st.chat_input("Write a message"):
        ask(question)
    if chat.pending and chat.pending.answer.wait(0) and not chat.pending.answer.failure:
        chat.keep()
    with st.sidebar:
        _tools(chat, opening)
    _show_kept(chat)
    if not chat.messages and not chat.pending:
        st.caption(f"{settings['model']} at {url}. Write a message below.")
    if pending := chat.pending:
        _show("user", pending.question)
        _follow(chat, pending)
        if failure := pending.answer.failure:
            st.error(_sentence(failure), icon=":material/error:")
            st.button("Try again", on_click=ask, args=(pending.question,))
        else:
            st.rerun()


@st.cache_data(ttl=10, show_spinner=False)
def _models(url: str, key: str) -> list[str]:
    return list_models(url, key)


def _settings(models: list[str]) -> dict[str, Any]:
    """The model and how its tokens are chosen, as the API has them."""
    settings: dict[str, Any] = {
        "model": st.selectbox("Model", models),
        "max_tokens": st.number_input("Most tokens", 1, 32768, 256, help="Where an answer is cut."),
        "temperature": st.number_input("Temperature", 0.0, 2.0, 0.0, 0.1, help="0 always takes the likeliest token."),
    }
    if settings["temperature"] > 0:
        settings["top_p"] = st.number_input(
            "Top p", 0.05, 1.0, 1.0, 0.05, help="Only the likeliest tokens of this share."
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, None, help="The same one gives the same answer.")
        settings |= {} if seed is None else {"seed": seed}
    return settings


def _tools(chat: Conversation, opening: list[dict[str, str]]) -> None:
    st.button("New chat", icon=":material/refresh:", on_click=chat.clear, width="stretch")
    st.download_button(
        "Download transcript",
        data=json.dumps({"messages": [*opening, *chat.messages]}, ensure_ascii=False) + "\n",
        file_name="transcript.jsonl",
        mime="application/jsonl",
        icon=":material/download:",
        disabled=not chat.messages,
        width="stretch",
        on_click="ignore",
    )


def _follow(chat: Conversation, pending: Pending) -> None:
    """Show an answer as it comes, to its end. Whatever is pressed meanwhile begins another run of the script, and ends this one."""
    with st.chat_message("assistant"):
        shown = st.empty()
    button = st.empty()
    if not pending.answer.wait(0):
        button.button("Stop", icon=":material/stop:", on_click=chat.keep)
    while True:
        ended = pending.answer.wait(SECONDS_A_FRAME)
        shown.markdown(_shown(pending.answer.text) or "…")
        if ended:
            break
    button.empty()
    if not pending.answer.failure and chat.pending is pending:
        chat.keep()


def _show_kept(chat: Conversation) -> None:
    for message in chat.messages:
        _show(message["role"], message["content"])


def _show(role: str, text: str) -> None:
    with st.chat_message(role):
        st.markdown(_shown(text))


def _shown(text: str) -> str:
    """Markdown without pictures: a browser would fetch them from wherever the model says."""
    return _IMAGE.sub(r"\\!", text)


def _sentence(error: Exception) -> str:
    said = str(error)
    return _shown(said[:1].upper() + said[1:] + ".").replace("$", r"\$")


if __name__ == "__main__":
    main()
