"""What a learner published, looked at by its address: an adapter's repository on a Hub, and an app or a server that answers.

Nothing is loaded or run: names, configuration, card and the header of the weights are read, and a server is asked one question.
Formats: https://huggingface.co/docs/hub/api, https://huggingface.co/docs/safetensors, peft's adapter_config.json,
https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from course_lib.chat.api_client import check_url
from course_lib.errors import CourseError, InputError
from course_lib.export.secrets import PATTERNS
from course_lib.files import write_text
from course_lib.homework.checks import CheckFailed, fail, short
from course_lib.homework.checks_advanced import UNWANTED, WANTED, card
from course_lib.homework.public_http import Answer, fetch
from course_lib.models import is_repository

if TYPE_CHECKING:
    from nbformat import NotebookNode

HUB = "https://huggingface.co"
QUESTION = "Who are you?"
SECONDS_TO_ANSWER = 40.0  # a small model on a processor writes about 20 tokens a second
AT_ONCE = 8  # submissions
LARGEST_HEADER = 2**20  # bytes of a safetensors header; an adapter's has about 100 a tensor


@dataclass(frozen=True)
class Finding:
    """What was found at an address; `says` is one line."""

    address: str
    good: bool
    says: str


def look(adapter: str = "", server: str = "", *, private: bool = False) -> dict[str, Finding]:
    """Look at the addresses that are given; keys are adapter and server. It never raises for what it finds there.

    Args:
        adapter: `owner/name` on the Hub (`HF_ENDPOINT` names another one), or the address of a repository's page.
        server: the address of an app, or of an OpenAI-compatible server.
        private: connect to addresses of this machine and its network, too.
    """
    found = {}
    for what, address, seen in (("adapter", adapter, _adapter), ("server", server, _server)):
        address = address.strip()
        if not address:
            continue
        try:
            good, says = True, seen(address, private)
        except (CheckFailed, CourseError) as error:
            good, says = False, str(error)
        except Exception as error:  # what strangers answer must not stop the others' turn
            good, says = False, f"what came cannot be made sense of ({type(error).__name__})"
        found[what] = Finding(_line(address), good, _line(says))
    return found


def _line(text: str) -> str:
    """Strangers' text on one line, with nothing in it that a terminal obeys."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))[:300]


def addresses(notebook: NotebookNode) -> dict[str, str]:
    """What a submission says in lines `ADAPTER = "..."` and `SERVER = "..."`; it is read, not run."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for name, _, address in re.findall(
                r"^(ADAPTER|SERVER)[ \t]*=[ \t]*(['\"])([^'\"\n]{1,300})\2", cell.source, flags=re.MULTILINE
            ):
                found[name.lower()] = address
    return found


def look_at_class(
    root: Path,
    assignment: str,
    given: dict[str, dict[str, str]],
    *,
    private: bool = False,
    done: Callable[[str], None] = lambda student: None,
) -> None:
    """Look at the addresses of many students, some at once, and write what was found to `grades/ASSIGNMENT.online.json`."""

    def one(student: str) -> dict[str, Any]:
        found = look(**given[student], private=private)
        done(student)
        return {what: asdict(finding) for what, finding in found.items()}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = dict(zip(given, pool.map(one, given), strict=True))
    write_text(online_file(root, assignment), json.dumps(rows, indent=1, ensure_ascii=False))


def online_file(root: Path, assignment: str) -> Path:
    """Where findings are kept."""
    return root / "grades" / f"{assignment}.online.json"


def _adapter(address: str, private: bool) -> str:
    endpoint, name = _repository(address)
    private = private or endpoint == _endpoint()  # the Hub that this machine was told to use
    host = urlsplit(endpoint).netloc
    answer = fetch(f"{endpoint}/api/models/{name}", private=private)
    if answer.status in (401, 403, 404):
        fail(f"{host} shows no repository {name}: is it still private, or is its name another?")
    info = _json(answer, host)
    try:
        names = [str(one["rfilename"]) for one in info["siblings"]]
    except (KeyError, TypeError):
        raise CourseError(f"{host} answers, but not as a Hub does") from None
    if info.get("gated"):
        fail(f"{name} is gated: others have to ask for it")
    if missing := [one for one in WANTED if one not in names]:
        fail(f"{missing[0]} is not in {name}: an adapter needs it")
    for one in names:
        if reason := _reason_to_keep_back(one):
            fail(f"{short(one)} was published: {reason}")

    def file(wanted: str, **options: Any) -> Answer:
        answer = fetch(f"{endpoint}/{name}/resolve/main/{wanted}", private=private, **options)
        if answer.status not in (200, 206):
            fail(f"{wanted} cannot be downloaded (HTTP {answer.status})")
        return answer

    text = file("README.md", most=2**16).body
    for kind, pattern in PATTERNS.items():
        if re.search(pattern, text):
            fail(f"README.md holds {kind}: revoke it, everybody can read it")
    config = _json(file("adapter_config.json"), "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not config.get("peft_type") or not isinstance(base, str):
        fail("adapter_config.json is none of peft's: peft_type and base_model_name_or_path are wanted")
    if not is_repository(base):
        fail("adapter_config.json names a base that others do not have: it should be a repository", short(base))
    card(text.decode(errors="replace"), base)
    tensors, size = _weights(file)
    return f"{name}: {config['peft_type']} on {base}, {tensors} tensors, {size / 1e6:.1f} MB, with its card"


def _weights(file: Callable[..., Answer]) -> tuple[int, int]:
    """Tensors and bytes of the weights, from the beginning of the file."""
    name = "adapter_model.safetensors"
    start = file(name, byte_range=(0, LARGEST_HEADER - 1), most=LARGEST_HEADER)
    if start.body.startswith(b"version https://git-lfs"):
        fail(f"{name} is a pointer of git-lfs, not the weights: push it with git-lfs, or upload it anew")
    length = int.from_bytes(start.body[:8], "little")
    try:
        header = json.loads(start.body[8 : 8 + length])
        ends = {key: one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"}
        size = 8 + length + max(ends.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        fail(f"{name} is damaged, or no safetensors file: its header cannot be read")
    whole = start.headers.get("content-range", "").rpartition("/")[2] or start.headers.get("content-length", "")
    if whole.isdecimal() and int(whole) != size:
        fail(f"{name} has {whole} bytes, and its header says {size}: it did not arrive whole")
    if not any("lora_" in key for key in ends):
        fail(f"{name} holds no LoRA tensors", short(sorted(ends)[:3]))
    return len(ends), size


def _server(address: str, private: bool) -> str:
    url = check_url(address if "://" in address else f"https://{address}")
    parts = urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}"
    if match := re.match(r"/spaces/([\w.-]+/[\w.-]+)", parts.path):
        return _space(origin, match[1], private)
    for base in dict.fromkeys((url, f"{url}/v1")):
        answer = fetch(f"{base}/models", private=private)
        if answer.status in (401, 403):
            fail(
                "the server asks for a key: nobody but you can try it; open it while it is graded, or show it yourself"
            )
        models = _models(answer)
        if models:
            return _ask(base, models[0], private)
    health = fetch(f"{url}/_stcore/health", private=private)
    if health.status == 200 and health.body.strip() == b"ok":
        return "a streamlit app answers: open it and ask"
    page = fetch(url, private=private)
    if page.status != 200:
        fail(
            f"neither an app nor a server with OpenAI's API is here (HTTP {page.status}); a server's address often ends in /v1"
        )
    if "html" not in page.headers.get("content-type", ""):
        fail("what answers is neither a page nor OpenAI's API; a server's address often ends in /v1")
    return "a web page answers: open it and ask"


def _space(origin: str, name: str, private: bool) -> str:
    """A Space, of whose page the Hub says whether its app runs."""
    answer = fetch(f"{origin}/api/spaces/{name}", private=private or origin == _endpoint())
    if answer.status in (401, 403, 404):
        fail(f"{urlsplit(origin).netloc} shows no Space {name}: is it still private, or is its name another?")
    runtime = _json(answer, "the Hub").get("runtime")
    stage = str(runtime.get("stage") if isinstance(runtime, dict) else "unknown")[:30]
    if stage not in ("RUNNING", "SLEEPING"):
        fail(f"the app of the Space {name} does not run: {stage}")
    return f"the Space {name} is {stage.lower()}: open it and ask"


def _models(answer: Answer) -> list[str]:
    try:
        return [one["id"] for one in json.loads(answer.body)["data"] if isinstance(one["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _ask(base: str, model: str, private: bool) -> str:
    wanted = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}
    answer = fetch(
        f"{base}/chat/completions", post=json.dumps(wanted).encode(), seconds=SECONDS_TO_ANSWER, private=private
    )
    if answer.status != 200:
        fail(f"the server lists {short(model)}, and does not answer a question (HTTP {answer.status})")
    try:
        said = _json(answer, "the server")["choices"][0]["message"]["content"]
    except (KeyError, TypeError, IndexError):
        said = None
    if not isinstance(said, str) or not said.strip():
        fail(f"the server's answer to {QUESTION!r} is empty, or not of OpenAI's form", short(answer.body[:80]))
    return f"{QUESTION} {short(said)}"


def _json(answer: Answer, who: str) -> dict[str, Any]:
    if answer.status != 200 and answer.status != 206:
        raise CourseError(f"{who} answers with HTTP {answer.status}")
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CourseError(f"{who}: JSON is wanted, and something else came")
    return value


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def _repository(address: str) -> tuple[str, str]:
    """The Hub and `owner/name`."""
    if is_repository(address):
        return _endpoint(), address
    url = check_url(address if "://" in address else f"https://{address}")
    parts = urlsplit(url)
    name = "/".join(parts.path.strip("/").split("/")[:2])
    if not is_repository(name) or name.startswith(("spaces/", "datasets/")):
        raise InputError(f"{short(address)} is no address of a model's repository: owner/name, or that of its page")
    return f"{parts.scheme}://{parts.netloc}", name


def _reason_to_keep_back(name: str) -> str:
    """Why a file should not have been published, or nothing."""
    if name in UNWANTED:
        return UNWANTED[name]
    if name.split("/")[-1].startswith(".env"):
        return UNWANTED[".env"]
    return "a state of the training is of no use to others" if name.startswith("checkpoint-") else ""
