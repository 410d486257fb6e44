"""The web app, a page that streamlit runs: a client of any server with OpenAI's chat API.

`course app` starts it. COURSE_URL is the server's address and COURSE_API_KEY its key; the key can be given in the page too.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

import streamlit as st

from course_lib.agent.events import Answered, Called, Event, Malformed, Returned, Thought, replay
from course_lib.agent.tools import TOOL_NAMES, shipped_tools
from course_lib.agent.turns import numbered, write_arguments
from course_lib.chat.api_agent import API_PROTOCOLS, AgentAnswer, ApiWriter
from course_lib.chat.api_client import ApiAnswer, list_models
from course_lib.data.conversation import Message, Tool
from course_lib.errors import CourseError

SECONDS_A_FRAME = 0.05
_IMAGE = re.compile(r"!(?=\[[^\]]*\]\()")


@dataclass
class Pending:
    """A question and the answer that is being written."""

    question: str
    answer: ApiAnswer | AgentAnswer


@dataclass
class Conversation:
    """What is shown. Like an answer being written it outlives the runs of this script, of which two may overlap for a moment."""

    messages: list[Message]  # without a system turn
    tools: dict[str, Tool] = field(default_factory=dict)  # what the agent had, by name
    pending: Pending | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self) -> None:
        """End the pending answer; keep it as far as it came, with its question, or neither where nothing was written."""
        with self.lock:
            pending, self.pending = self.pending, None
        if pending is None:
            return
        pending.answer.stop()
        self.messages += pending.answer.messages()

    def clear(self) -> None:
        """Forget everything."""
        self.keep()
        self.messages, self.tools = [], {}

    def said(self) -> list[Message]:
        """Questions and answers alone, for a model without tools."""
        turns = [message for message in self.messages if message["role"] == "user" or message["role"] == "assistant"]
        last = [turn for turn, after in zip_longest(turns, turns[1:]) if not after or turn["role"] != after["role"]]
        return [{"role": turn["role"], "content": turn["content"]} for turn in last]

    def row(self, system: str) -> dict[str, Any]:
        """The conversation as a row to train on."""
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        if not self.tools:
            return {"messages": [*opening, *self.messages]}
        return {**numbered({"messages": [*opening, *self.messages], "tools": list(self.tools.values())})}


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
        system = st.text_area("System prompt", help="Holds from the next message on.").strip()
        agent = _agent_settings()

    def ask(question: str) -> None:
        chat.keep()
        if agent is not None:
            writer = ApiWriter(url, key, **settings)
            chat.tools |= {tool.name: tool.schema for tool in agent["tools"]}
            answer = AgentAnswer(writer, question, system=system, history=chat.messages, **agent)
        else:
            opening = [{"role": "system", "content": system}] if system else []
            messages = [*opening, *chat.said(), {"role": "user", "content": question}]
            answer = ApiAnswer(url, key, messages=messages, **settings)
        chat.pending = Pending(question, answer)

    if question := st.chat_input("Write a message"):
        ask(question)
    if chat.pending and chat.pending.answer.wait(0) and not chat.pending.answer.failure:
        chat.keep()
    with st.sidebar:
        _buttons(chat, system)
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


def _agent_settings() -> dict[str, Any] | None:
    """Tools and protocol of an agent; None where none is wanted."""
    if not st.toggle("Agent", help="The model may call tools, which run on the machine of this page."):
        return None
    names = [name for name in TOOL_NAMES if st.checkbox(name, value=name != "python")]
    protocol = st.selectbox("Form of tool calls", API_PROTOCOLS, help="native: as the model's own template has them.")
    try:
        return {"tools": shipped_tools(names), "protocol": protocol}
    except CourseError as error:
        st.error(_sentence(error), icon=":material/error:")
        st.stop()


def _buttons(chat: Conversation, system: str) -> None:
    st.button("New chat", icon=":material/refresh:", on_click=chat.clear, width="stretch")
    st.download_button(
        "Download transcript",
        data=json.dumps(chat.row(system), ensure_ascii=False) + "\n",
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
        steps, shown = st.empty(), st.empty()
    button = st.empty()
    if not pending.answer.wait(0):
        button.button("Stop", icon=":material/stop:", on_click=chat.keep)
    drawn = 0
    while True:
        ended = pending.answer.wait(SECONDS_A_FRAME)
        if len(pending.answer.steps) > drawn:
            drawn = len(pending.answer.steps)
            with steps.container():
                _show_steps(pending.answer.steps[:drawn])
        shown.markdown(_shown(pending.answer.text) or "…")
        if ended:
            break
    button.empty()
    if not pending.answer.failure and chat.pending is pending:
        chat.keep()


def _show_kept(chat: Conversation) -> None:
    starts = [place for place, message in enumerate(chat.messages) if message["role"] == "user"]
    for start, end in pairwise([*starts, len(chat.messages)]):
        _show("user", chat.messages[start]["content"])
        events = list(replay({"messages": chat.messages[start + 1 : end]}))
        with st.chat_message("assistant"):
            _show_steps([event for event in events if not isinstance(event, Answered)])
            for event in events:
                if isinstance(event, Answered):
                    st.markdown(_shown(event.text))


def _show_steps(steps: list[Event]) -> None:
    if steps:
        with st.expander(f"{len(steps)} steps"):
            for step in steps:
                st.text(_step(step))


def _step(event: Event) -> str:
    match event:
        case Thought(text):
            return f"Thought: {text}"
        case Called(name, arguments):
            return f"Call: {name} {write_arguments(arguments)}"
        case Returned(name, text, failed):
            return f"{'Failed' if failed else 'Result'}: {text}"
        case Malformed(text, error):
            return f"Not understood: {text}\n{error}"
    return ""


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
