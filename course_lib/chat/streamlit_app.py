"""The web app, a page that streamlit runs: a client of any server with OpenAI's chat API.

`course app` starts it. COURSE_URL is the server's address and COURSE_API_KEY its key; the key can be given in the page too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from course_lib.chat.api_client import ApiAnswer, list_models
from course_lib.errors import CourseError

LOOK_UP_SECONDS = 0.2  # how soon Stop is seen while nothing comes
_IMAGE = re.compile(r"!(?=\[[^\]]*\]\()")


@dataclass
class Conversation:
    """What is shown. `question` waits for its answer; `failure` says why it has none."""

    messages: list[dict[str, str]]
    question: str = ""
    failure: str = ""

    @property
    def busy(self) -> bool:
        return bool(self.question and not self.failure)

    def answered(self, text: str) -> None:
        """Keep question and answer, or neither where nothing was written."""
        if text:
            self.messages += [{"role": "user", "content": self.question}, {"role": "assistant", "content": text}]
        self.question = self.failure = ""


def main() -> None:
    """Draw the page; streamlit calls this anew whenever something was pressed or written."""
    st.set_page_config(page_title="Course chat", page_icon=":material/chat:")
    st.title("Chat")
    chat: Conversation = st.session_state.setdefault("chat", Conversation([]))
    url = os.environ.get("COURSE_URL", "http://127.0.0.1:8000/v1")
    with st.sidebar:
        key = st.text_input(
            "API key",
            value=os.environ.get("COURSE_API_KEY", ""),
            type="password",
            help=f"What the server at {url} asks for; empty if it asks for none.",
            disabled=chat.busy,
        )
    try:
        models = _models(url, key)
    except CourseError as error:
        st.error(_sentence(error), icon=":material/error:")
        st.button("Try again")
        st.stop()
    with st.sidebar:
        asked = _settings(models, disabled=chat.busy)
        system = st.text_area("System prompt", disabled=chat.busy, help="Holds from the next message on.")
        opening = [{"role": "system", "content": system}] if system.strip() else []
        if st.button("New chat", icon=":material/refresh:", disabled=chat.busy or not chat.messages, width="stretch"):
            st.session_state["chat"] = Conversation([])
            st.rerun()
        st.download_button(
            "Download transcript",
            data=json.dumps({"messages": [*opening, *chat.messages]}, ensure_ascii=False) + "\n",
            file_name="transcript.jsonl",
            mime="application/jsonl",
            icon=":material/download:",
            disabled=chat.busy or not chat.messages,
            help="One row in the form `messages`, ready for training.",
            width="stretch",
            on_click="ignore",
        )
    for message in chat.messages:
        _show(message["role"], message["content"])
    if not chat.messages and not chat.question:
        st.caption(f"{asked['model']} at {url}. Write a message below.")
    if chat.question:
        _show("user", chat.question)
    if chat.failure:
        st.error(chat.failure, icon=":material/error:")
        st.button("Try again", on_click=lambda: setattr(chat, "failure", ""))
    if question := st.chat_input("Write a message", disabled=chat.busy):
        chat.question, chat.failure = question, ""
        st.rerun()
    if chat.busy:
        _answer(chat, ApiAnswer(url, key, messages=[*opening, *_history(chat)], **asked))
        st.rerun()


@st.cache_data(ttl=10, show_spinner=False)
def _models(url: str, key: str) -> list[str]:
    return list_models(url, key)


def _settings(models: list[str], *, disabled: bool) -> dict[str, Any]:
    """The model and how its tokens are chosen, as the API has them."""
    model = st.selectbox("Model", models, disabled=disabled)
    temperature = st.slider(
        "Temperature", 0.0, 2.0, 0.0, 0.1, disabled=disabled, help="0 always takes the likeliest token."
    )
    top_p = st.slider("Top p", 0.05, 1.0, 1.0, 0.05, disabled=disabled or temperature == 0)
    max_tokens = st.number_input("Most tokens", 1, 32768, 256, disabled=disabled, help="Where an answer is cut.")
    seed = st.number_input(
        "Seed", 0, 2**31 - 1, None, disabled=disabled or temperature == 0, help="The same one gives the same answer."
    )
    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    if temperature > 0:
        sampling |= {"top_p": top_p} | ({} if seed is None else {"seed": seed})
    return {"model": model, **sampling}


def _history(chat: Conversation) -> list[Mapping[str, str]]:
    return [*chat.messages, {"role": "user", "content": chat.question}]


def _answer(chat: Conversation, answer: ApiAnswer) -> None:
    """Show an answer as it comes. Stop, or a page that is left, ends this run of the script; what was read stays."""
    text = failure = ""
    with st.chat_message("assistant"):
        shown = st.empty()
    st.button("Stop", icon=":material/stop:", type="primary")
    try:
        with answer:
            shown.markdown("…")
            for piece in answer.pieces(patience=LOOK_UP_SECONDS):
                text += piece
                shown.markdown(_shown(text) or "…")
    except CourseError as error:
        failure = _sentence(error)
    finally:
        if failure:
            chat.failure = failure
        else:
            chat.answered(text)


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
