"""Checks of the advanced homework: publish the adapter, deploy the app. Servers are stand-ins inside this process."""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from course_lib.homework.checks import call, cases, fail, short

WANTED = ("README.md", "adapter_config.json", "adapter_model.safetensors")
UNWANTED = {
    ".env": "it holds passwords",
    "checkpoint-000012/optimizer.pt": "the optimizer's state is of no use to others",
    "checkpoint-000012/adapter_model.safetensors": "an adapter half trained",
    "data/rows.jsonl": "data of people who were not asked",
    "training_args.bin": "a pickle: who loads it runs what is in it",
    "metrics.jsonl": "a record of the run, not of the model",
    ".git/config": "it may hold a token",
}
TOKEN = "hf_" + "aB3dE5gH7" * 4


def card(text: Any, base: str) -> None:
    """A model card that tools can read, and people."""
    if text is ...:
        raise NotImplementedError
    if not isinstance(text, str) or not text.strip():
        fail("a card is text", short(text))
    if not text.startswith("---\n"):
        fail(
            "the card does not begin with its front matter: the first line is --- alone, with nothing before it",
            short(text[:40]),
        )
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3:
        fail("the front matter has no end: a second line of ---")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(parts[1])):
            fail(
                "the front matter refers to a part of itself with *: write it out"
            )  # a few of them are a text of gigabytes
        data = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        fail("the front matter is no YAML: is there a space behind every colon?", short(str(error)))
    if not isinstance(data, dict):
        fail("the front matter is no list of `key: value`", short(parts[1]))
    if "base_model" not in data:
        fail("base_model is missing: nobody could tell what the adapter belongs on", short(data))
    if data["base_model"] not in (base, [base]):
        fail(
            "base_model names another model: an adapter on another base computes nonsense, without an error",
            short(data["base_model"]),
        )
    if data.get("library_name") != "peft":
        fail(
            "library_name is not peft: the Hub would offer code that loads a whole model",
            short(data.get("library_name")),
        )
    if not data.get("license"):
        fail("license is missing: without one nobody may use it", short(data))
    languages = data.get("language")
    if not isinstance(languages, list) or not {"en", "zh"} <= {one for one in languages if isinstance(one, str)}:
        fail("language is not a list of en and zh: your assistant speaks both", short(languages))
    body = parts[2].strip()
    if len(body.split()) < 20:
        fail(
            f"the card says only {len(body.split())} words to people: what is it, and what can it not do?", short(body)
        )
    if not re.search(r"limit|not suitable|may be wrong|do not use|cannot|often wrong|局限|不适", body.lower()):
        fail("the card does not say what the model cannot do", short(body))


def chosen(choose: Callable[[list[str]], Any], *, seed: int | None = None) -> None:
    """Which files of a work dir are published."""
    names = [*WANTED, *UNWANTED]
    if more := cases(seed):
        names += [f"checkpoint-{more.randint(100, 999):06}/adapter_config.json", f".env.{more.randint(1, 9)}"]
        more.shuffle(names)
    given = call(choose, list(names))
    if isinstance(given, str) or not all(isinstance(one, str) for one in given):
        fail("a list of file names is wanted", short(given))
    for name in given:
        if name not in names:
            fail("a name that is not among the files", short(name))
        if name not in WANTED:
            reason = UNWANTED.get(name, "it holds passwords" if name.startswith(".env") else "an adapter half trained")
            fail(f"{name} would be published: {reason}")
    if missing := [name for name in WANTED if name not in given]:
        fail(f"{missing[0]} is left out: an adapter needs it")


def published(publish: Callable[..., Any], *, seed: int | None = None) -> None:
    """Publishing to a Hub that stands in, twice, through huggingface_hub."""
    from course_lib.homework.standin_hub import standing_in

    name = f"learner/assistant-{seed or 0}"
    with tempfile.TemporaryDirectory() as folder:
        for file in (*WANTED, *UNWANTED):
            path = Path(folder) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"content of {file}")
        with standing_in() as hub:
            url = call(publish, folder, name, TOKEN)
            if name not in hub.repositories:
                made = ", ".join(hub.repositories) or "none"
                fail(f"no repository of that name was made; made: {made}", name)
            repository = hub.repositories[name]
            if not repository.private:
                fail("the repository is public: make it private, look at it, and then open it")
            if wrong := [file for file in repository.files if file in UNWANTED]:
                fail(f"{wrong[0]} was published: {UNWANTED[wrong[0]]}")
            if missing := [file for file in WANTED if file not in repository.files]:
                fail(f"{missing[0]} was not published")
            if any(TOKEN.encode() in content for content in repository.files.values()):
                fail("the token stands in a published file")
            if hub.tokens != {TOKEN}:
                fail("the token that was used is not the one that was given: is one written into the code?")
            if not isinstance(url, str) or name not in url:
                fail("the address of the repository is wanted back", short(url))
            first = len(repository.commits)
            if first != len(set(repository.commits)) or first > 1:
                fail(f"{first} commits for three files: one is enough, and half of them never stands alone")
            call(publish, folder, name, TOKEN)  # a second time, as after a mended card


def online(adapter: str, server: str, *, private: bool = False) -> None:
    """Say what is found at the addresses; costs no points, and asks nobody where none is given.

    With `private`, addresses of this machine and its network are looked at, too: others cannot reach them.
    """
    from course_lib.homework.online import look

    found = look(adapter, server, private=private)
    for what, finding in found.items():
        print(f"{what}: {'ok' if finding.good else 'not yet'}: {finding.says}")
    if not found:
        print("no address given")


def request(make: Callable[..., Any], *, seed: int | None = None) -> None:
    """What a chat app sends to an OpenAI-compatible server."""
    word = f"word{seed}" if seed else "red"
    history = [{"role": "user", "content": f"Remember {word}."}, {"role": "assistant", "content": "I will."}]
    kept = json.dumps(history)
    body = call(make, history, "Which word?", system="Be brief.")
    if json.dumps(history) != kept:
        fail("the history that was given is changed: the app would show the question twice", short(history))
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        fail('a dict with "messages" is wanted: the body of the request', short(body))
    messages = body["messages"]
    if messages and messages[-1].get("content") != "Which word?":
        fail("the question is not the last message: the model would answer something else", short(messages))
    if messages[-1].get("role") != "user":
        fail("the question is the user's", short(messages[-1]))
    if not any(word in one.get("content", "") for one in messages):
        fail("what was said before is left out: the server remembers nothing between requests", short(messages))
    if [one["role"] for one in messages].count("system") != 1 or messages[0]["role"] != "system":
        fail("the system text comes once, and first", short([one["role"] for one in messages]))
    if [one["role"] for one in messages] != ["system", "user", "assistant", "user"]:
        fail("the turns are not in the order in which they were said", short([one["role"] for one in messages]))
    if body.get("stream") is not True:
        fail("stream is not true: the reader would look at nothing until the last word", short(body.get("stream")))
    without = call(make, [], "Hello", system="")
    if any(one["role"] == "system" for one in without["messages"]):
        fail("an empty system text is sent as a turn: leave it out", short(without["messages"]))


def stream(read: Callable[[Iterator[str]], Any], *, seed: int | None = None) -> None:
    """Server-sent events put together again."""
    pieces = ["Paris", " is", " the", "\n", "capital", "."]
    if more := cases(seed):
        pieces = [f" {more.random():.6f}" for _ in range(9)]
    lines = [
        _event({"role": "assistant"}),
        "",
        *(line for piece in pieces for line in (_event({"content": piece}), "")),
    ]
    lines[4:4] = [": ping", ""]  # a comment, which keeps the connection open
    lines += [
        _event({}),
        "",
        'data: {"choices": [], "usage": {"total_tokens": 9}}',
        "",
        "data: [DONE]",
        "",
        _event({"content": " AFTER"}),
    ]
    given, wanted = call(read, iter(lines)), "".join(pieces)
    if not isinstance(given, str):
        given = "".join(given)
    shown = f"yours {short(given)}"
    if given == wanted:
        return
    if "AFTER" in given:
        fail("what comes behind [DONE] is read: it ends the answer", shown)
    if given.strip() == wanted.strip() or given.replace("\n", "") == wanted.replace("\n", ""):
        fail("white space of the pieces is lost: they are put together as they are", shown)
    if "".join(given.split()) == "".join(wanted.split()):
        fail("something was put between the pieces, or taken from them: they are joined with nothing", shown)
    if "None" in given:
        fail("a piece without content is no text: the first one has a role alone, the last nothing", shown)
    fail(
        "the answer is not that of the stream: each line `data: ` holds JSON, whose choices[0].delta.content is the next piece",
        shown,
    )


def _event(delta: dict[str, str]) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]})


def app(source: Any) -> None:
    """The source of a streamlit chat app, read, not run."""
    if source is ...:
        raise NotImplementedError
    if not isinstance(source, str):
        fail("the source is text", short(source))
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        fail(f"the app does not even start: {error.msg}, line {error.lineno}", short(error.text))
    text = ast.unparse(tree)
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if any(re.search(r"\b(sk-|hf_)[A-Za-z0-9]{8,}", one) for one in literals):
        fail("a key stands in the source: everybody who sees the repository has it; read it from the environment")
    if "streamlit" not in text:
        fail("streamlit is not imported")
    if not re.search(r"environ|getenv|st\.secrets", text):
        fail("the address and the key of the server come from nowhere: read them from the environment or st.secrets")
    if "session_state" not in text:
        fail(
            "the conversation is not kept in st.session_state: streamlit runs the script again for every message, and it would be forgotten"
        )
    if not re.search(r"\.chat_input\(", text):
        fail("there is no st.chat_input to type into")
    if not re.search(r"\.chat_message\(", text):
        fail("nothing shows who says what: st.chat_message does")
    if re.search(r"\.(write|write_stream|markdown)\(", text) is None:
        fail("the answer is never shown")
    if re.search(r"unsafe_allow_html=True", text):
        fail("what a model writes is shown as HTML: it could write a script")
