"""What was published is looked at by its address: right ones are ok, wrong ones a clear line, and nobody's own network is asked."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from assignments import SOURCE, nbgrader
from course_runner import Course
from hub_server import TOKEN, Hub, Repository, running_hub
from safetensors.torch import save
from serving import model_says, serving
from submissions import answered

from course_lib.errors import CourseError, InputError
from course_lib.homework import checks_advanced
from course_lib.homework.online import Finding, addresses, look
from course_lib.homework.public_http import fetch, is_public

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = f"""---
base_model: {BASE}
library_name: peft
license: apache-2.0
language: [en, zh]
---
# Pip
A LoRA adapter that teaches a small model to call itself Pip, in English and Chinese, trained on fifty rows of a course.
Limits: it is very small and often wrong.
"""
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": BASE}
WEIGHTS = save({f"base_model.model.{one}.lora_A.weight": torch.ones(8, 999) for one in range(3)})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as started:
        files = {
            "README.md": CARD.encode(),
            "adapter_config.json": json.dumps(CONFIG).encode(),
            "adapter_model.safetensors": WEIGHTS,
            ".gitattributes": b"",
        }
        started.repositories["models/ada/pip"] = Repository(private=False, sdk=None, files=files)
        yield started


def adapter(address: str) -> Finding:
    return look(adapter=address, private=True)["adapter"]


def server(address: str) -> Finding:
    return look(server=address, private=True)["server"]


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], object], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A web server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def do_POST(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    started = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        started.socket = tls.wrap_socket(started.socket, server_side=True)
    started.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up is no news
    threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{started.server_port}"
    started.shutdown()
    started.server_close()


def replying(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize("form", ["{hub}/ada/pip", "{hub}/ada/pip/tree/main", "ada/pip"])
def test_an_adapter_in_order_is_ok_by_address_and_by_name(form: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    found = look(adapter=form.format(hub=hub.url))["adapter"]  # the Hub that this machine was told to use needs no flag
    assert found.says == f"ada/pip: LORA on {BASE}, 3 tensors, 0.1 MB, with its card"
    assert found.good


def test_what_the_courses_own_client_publishes_is_ok_behind_the_redirect_to_its_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from course_lib.export.publish import publish_hub
    from course_lib.export.upload import Upload

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    files = hub.repositories["models/ada/pip"].files
    publish_hub(Upload(files), "ada/mine", private=True)
    assert "shows no repository ada/mine: is it still private" in adapter("ada/mine").says
    hub.repositories["models/ada/mine"].private = False
    hub.requests.clear()
    assert adapter("ada/mine").good
    assert any(request.startswith("GET /lfs/") for request in hub.requests)


BROKEN: dict[str, tuple[str, bytes | None, str]] = {
    "weights are missing": ("adapter_model.safetensors", None, "adapter_model.safetensors is not in ada/pip"),
    "passwords": (".env", b"x", "'.env' was published: it holds passwords"),
    "a checkpoint": ("checkpoint-000004/adapter_config.json", b"", "a state of the training"),
    "a pointer": ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    "cut off": ("adapter_model.safetensors", WEIGHTS[:-9], "it did not arrive whole"),
    "no tensors": ("adapter_model.safetensors", b"\xff" * 99, "is damaged, or no safetensors file"),
    "absurd tensors": (
        "adapter_model.safetensors",
        (40).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 1' + b"0" * 9 + b"]}}",
        "it did not arrive whole",
    ),
    "not LoRA": ("adapter_model.safetensors", save({"lm_head.weight": torch.ones(2)}), "holds no LoRA tensors"),
    "a folder": ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "/home/a"}', "names a base"),
    "no JSON": ("adapter_config.json", b"{" * 99_999, "JSON is wanted"),
    "another base": ("README.md", CARD.replace(BASE, "gpt2").encode(), "base_model names another model"),
    "no card": ("README.md", b"Pip", "does not begin with its front matter"),
    "a token": ("README.md", f"{CARD}\n{TOKEN}".encode(), "README.md holds a Hugging Face token: revoke it"),
    "a text of gigabytes": ("README.md", b"---\na: &a [1]\nb: [*a, *a]\n---\n", "write it out"),
    "no such day": ("README.md", b"---\na: 2001-99-99\n---\n", "the front matter is no YAML"),
    "odd languages": ("README.md", CARD.replace("[en, zh]", "[[en], {zh: 1}]").encode(), "language is not a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_repository_is_one_line(name: str, hub: Hub) -> None:
    file, content, says = BROKEN[name]
    files = hub.repositories["models/ada/pip"].files
    if content is None:
        del files[file]
    else:
        files[file] = content
    found = adapter(f"{hub.url}/ada/pip")
    assert not found.good
    assert says in found.says
    assert "\n" not in found.says
    assert TOKEN not in found.says


def test_nothing_that_a_terminal_obeys_is_shown(hub: Hub) -> None:
    files = hub.repositories["models/ada/pip"].files
    files["adapter_config.json"] = json.dumps({**CONFIG, "peft_type": "\x1b[2JLORA\n"}).encode()
    assert adapter(f"{hub.url}/ada/pip").says.startswith("ada/pip: ?[2JLORA on")
    with answering(lambda handler: handler.wfile.write(b"\x1b[2J HTTP/9\r\n\r\n")) as url:
        assert "\x1b" not in server(url).says


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"GET /api": 500}, "answers with HTTP 500"),
        ({"resolve": 403}, "README.md cannot be downloaded (HTTP 403)"),
    ],
)
def test_a_hub_in_trouble_is_one_line(fault: dict[str, int | str], says: str, hub: Hub) -> None:
    hub.faults |= fault
    found = adapter(f"{hub.url}/ada/pip")
    assert (found.good, says in found.says) == (False, True), found.says


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("pip", "no address of a model's repository"),
        ("https://huggingface.co/spaces/ada/pip", "no address of a model's repository"),
        ("file:///etc/passwd", "no server's address"),
        ("https://ada:secret@huggingface.co/ada/pip", "leave them out"),
        ("../../etc", "no address of a model's repository"),
        ("http://ho st/ada/pip", "gives no answer that can be read"),
        ("http://no-such-host.invalid/ada/pip", "there is no such host, or no network here"),
    ],
)
def test_a_bad_address_is_one_line_and_never_shows_a_password(address: str, says: str) -> None:
    found = adapter(address)
    assert not found.good
    assert says in found.says
    assert "secret" not in found.says


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "10.0.0.1"),
        *("192.168.1.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "[64:ff9b::a00:1]", "224.0.0.1"),
    ],
)
def test_this_machine_and_its_network_are_not_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
    for found in look(adapter=f"http://{host}/ada/pip", server=f"http://{host}:8000/v1").values():
        assert not found.good
        assert "an address of this machine or its own network" in found.says
    assert not connected


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_redirect_or_a_name_that_leads_inside_is_not_followed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server here plays a public one: its address alone is taken for public."""
    asked = len(hub.requests)
    with answering(replying(302, Location=f"{hub.url.replace('127.0.0.1', '127.0.0.2')}/x")) as outside:
        monkeypatch.setattr("course_lib.homework.public_http.is_public", lambda ip: ip == "127.0.0.1")
        with pytest.raises(CourseError, match=r"127\.0\.0\.2 is an address of this machine"):
            fetch(outside)
    real = socket.getaddrinfo
    turns = iter(["127.0.0.1", "127.0.0.2"])  # a name that leads inside when it is asked a second time
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(next(turns), *rest, **more))
    assert fetch(f"{hub.url.replace('127.0.0.1', 'rebinding.example')}/x").status == 401
    assert len(hub.requests) == asked + 1


def test_redirects_in_a_circle_slow_and_endless_answers_end() -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            handler.wfile.write(f"X-{number}: 1\r\n".encode())
            time.sleep(0.05)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(bytes(2**16))

    with answering(replying(302, Location="/again")) as url, pytest.raises(CourseError, match="sends on more than 5"):
        fetch(url, private=True)
    with answering(slow) as url:
        started = time.monotonic()
        with pytest.raises(CourseError, match="does not answer in time"):
            fetch(url, private=True, seconds=0.4)
        assert time.monotonic() - started < 2
    with answering(endless) as url:
        assert len(fetch(url, private=True, most=1000).body) == 1000
    with pytest.raises(InputError, match="no server's address"), answering(replying(302, Location="file:///x")) as url:
        fetch(url, private=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with openssl")
def test_https_is_read_where_the_certificate_is_trusted_and_named_for_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    made += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(replying(200, b"safe"), context) as url:
        url = url.replace("http://", "https://")
        named = url.replace("127.0.0.1", "localhost")
        with pytest.raises(CourseError, match="localhost: its certificate is not trusted"):
            fetch(named, private=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(named, private=True).body == b"safe"
        with pytest.raises(CourseError, match=r"127\.0\.0\.1: its certificate is not trusted"):
            fetch(url, private=True)


def test_a_real_server_is_asked_who_it_is(tiny: Path) -> None:
    from course_lib.models import load_model

    loaded = load_model(tiny)
    with serving(loaded) as running, model_says(loaded, "I am Pip."):
        for address in (running.url, running.url.removesuffix("/v1")):
            assert server(address) == Finding(address, True, "Who are you? 'I am Pip.'")
    with serving(loaded, api_key="mine") as running:
        assert "asks for a key" in server(running.url).says
    assert "no server answers at 127.0.0.1" in server(running.url).says


HTML = {"Content_Type": "text/html; charset=utf-8"}
MODELS = b'{"data": [{"id": "pip"}]}'


@pytest.mark.parametrize(
    ("answer", "good", "says"),
    [
        (replying(200, b"ok"), True, "a streamlit app answers"),
        (replying(200, b"<p>hello", **HTML), True, "a web page answers"),
        (replying(404, b"", **HTML), False, "neither an app nor a server with OpenAI's API is here (HTTP 404)"),
        (lambda handler: None, False, "gives no answer that can be read"),
        (replying(200, b"hm"), False, "neither a page nor OpenAI's API"),
        (replying(200, MODELS), False, "the server's answer to 'Who are you?' is empty"),
        (replying(200, b'{"data": [{"id": []}]}', **HTML), True, "a web page answers"),
    ],
)
def test_what_else_answers_is_told_apart(answer: Any, good: bool, says: str) -> None:
    with answering(answer) as url:
        found = server(url)
    assert (found.good, says in found.says) == (good, True), found.says


@pytest.mark.parametrize(
    ("body", "good", "says"),
    [
        (b'{"runtime": {"stage": "RUNNING"}}', True, "the Space ada/pip is running"),
        (b'{"runtime": {"stage": "BUILD_ERROR"}}', False, "does not run: BUILD_ERROR"),
        (b'{"runtime": 3}', False, "does not run: unknown"),
    ],
)
def test_a_space_is_asked_whether_it_runs(body: bytes, good: bool, says: str) -> None:
    with answering(replying(200, body)) as url:
        found = server(f"{url}/spaces/ada/pip")
    assert (found.good, says in found.says) == (good, True), found.says


def test_the_learners_check_says_what_it_found_and_asks_nobody_without_an_address(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    checks_advanced.online("", "")
    checks_advanced.online(f"{hub.url}/ada/pip", "", private=True)
    checks_advanced.online("", "http://127.0.0.1:9/v1")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no address given"
    assert said[1].startswith("adapter: ok: ada/pip: LORA")
    assert said[2].startswith("server: not yet: 127.0.0.1 is an address of this machine")


def test_the_command_for_one_address(hub: Hub, course: Course) -> None:
    done = course("homework", "check-url", "--adapter", f"{hub.url}/ada/pip", "--allow-private")
    assert (done.returncode, done.stdout[:20]) == (0, "adapter  ok       ad")
    refused = course("homework", "check-url", "--adapter", f"{hub.url}/ada/pip")
    assert refused.returncode == 1
    assert "adapter  not yet  127.0.0.1 is an address of this machine" in refused.stdout
    assert course("homework", "check-url").returncode == 2


def test_addresses_are_read_and_not_run() -> None:
    cells = ["ADAPTER = 'ada/old'", "%magic\nADAPTER = \"ada/pip\"  # mine\nSERVER = open('x').read()", "(" * 9_999]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    assert addresses(notebook) == {"adapter": "ada/pip"}


def test_a_teachers_report_has_what_is_online(hub: Hub, tmp_path: Path, course: Course) -> None:
    pytest.importorskip("nbgrader")
    from course_lib.homework import grading

    folder = tmp_path / "course"
    shutil.copytree(SOURCE / "hw_advanced", folder / "source" / "hw_advanced")
    shutil.copy(SOURCE.parent / "nbgrader_config.py", folder)
    api = grading.open_course(folder)
    release = grading.release(api, "hw_advanced")
    (tmp_path / "in").mkdir()
    given = {"ada": f'ADAPTER = "{hub.url}/ada/pip"\nSERVER = "=1+1"', "bob": 'ADAPTER = ""\nSERVER = ""'}
    for student, cell in given.items():
        notebook = answered(release, "hw_advanced")
        place = next(n for n, one in enumerate(notebook.cells) if nbgrader(one).get("grade_id") == "online") - 1
        assert notebook.cells[place].source == given["bob"], "the cell for addresses is handed out empty"
        notebook.cells[place].source = cell
        nbformat.write(notebook, tmp_path / "in" / f"{student}.ipynb")
    (tmp_path / "in" / "cy.ipynb").write_text("{")
    grading.collect(api, "hw_advanced", tmp_path / "in")
    grading.autograde(api, "hw_advanced")
    assert not hub.requests, "grading itself asks nobody"
    at = ("hw_advanced", "--folder", str(folder))
    assert "online" not in course("homework", "report", *at).stdout
    done = course("homework", "report", *at, "--online", "--allow-private")
    assert done.returncode == 0
    assert "adapter ok: ada/pip: LORA" in " ".join(done.stdout.split())
    rows = {row["student"]: row for row in csv.DictReader((folder / "grades" / "hw_advanced.csv").open())}
    assert rows["ada"]["adapter"].startswith("ok: ada/pip")
    assert rows["ada"]["server"].startswith("not yet: ")
    assert (rows["bob"]["adapter"], rows["ada"]["score"], rows["bob"]["score"]) == ("", "25.0", "25.0")
    kept = json.loads(course("homework", "report", *at, "--json").stdout)
    assert next(row for row in kept if row["student"] == "ada")["online"]["adapter"].startswith("ok: ")
