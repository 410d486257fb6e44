"""`course serve` as a process: what it refuses at the door, how it ends, and what vLLM is started with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from course_runner import Course

from course_lib.chat.api_client import ApiAnswer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others than this machine could use the model; give a key"),
        (["--host", "0.0.0.0", "--api-key", " "], "give a key"),
        (["--api-key", "two words"], "the API key must be of ASCII letters"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: no such host"),
        (["--host", "203.0.113.7", "--api-key", "k"], "cannot be listened on"),
        (["--engine", "vlm"], "--engine vlm: choose course or vllm"),
        (["--engine", "vllm"], "--engine vllm: vLLM is not installed here; pip install vllm"),
        (["--tensor-parallel-size", "2"], "are for --engine vllm"),
        (["--engine", "vllm", "--waiting", "3"], "--waiting 3: is for --engine course"),
        (["--bits", "5"], "--bits 5: choose 4 or 8"),
        (["--adapter", "nowhere"], "nowhere: no such folder"),
        (["--template", "chatlm"], "did you mean chatglm3, chatml?"),
        (["--port", "70000"], "--port': Input should be less than or equal to 65535"),
    ],
)
def test_a_wrong_option_is_one_line(course: Course, arguments: list[str], says: str) -> None:
    result = course("serve", "tiny", "--port", "0", *arguments, env={"COURSE_API_KEY": ""})
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded(course: Course) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = course("serve", "no-such-model", "--port", str(port))
    assert (result.returncode, result.stderr) == (
        2,
        f"course: --port {port}: is in use on 127.0.0.1; choose another, or 0 for a free one\n",
    )


@pytest.mark.parametrize(
    ("module", "command", "says"),
    [
        (
            "uvicorn",
            "serve",
            "serving needs uvicorn; in the project's folder, pip install -c constraints.txt -e '.[serve]'",
        ),
        (
            "streamlit",
            "app",
            "the web app needs streamlit and openai; in the project's folder, pip install -c constraints.txt -e '.[app]'",
        ),
    ],
)
def test_what_is_not_installed_is_told_in_one_line(
    course: Course, monkeypatch: pytest.MonkeyPatch, module: str, command: str, says: str
) -> None:
    import course_lib.chat

    monkeypatch.delattr(course_lib.chat, "listen", raising=False)
    monkeypatch.delitem(sys.modules, "course_lib.chat.listen", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    result = course(command, "tiny", "--port", "0")
    assert (result.returncode, result.stderr) == (2, f"course: {says}\n")


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its URL, which it says when it is ready."""
    command = [sys.executable, "-m", "course_lib.cli", "serve", "tiny", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert process.stderr is not None
        ready = process.stderr.readline()
        assert ready.startswith("serving tiny at http://127.0.0.1:"), ready
        yield process, ready.split()[3]
    finally:
        process.kill()
        process.wait()


def long_stream(url: str, key: str = "none") -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
    # Greedily the tiny model never ends by itself.
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1900, stream=True)
    for _ in range(3):
        next(stream)
    return stream


@pytest.mark.parametrize(("number", "status", "says"), [(signal.SIGINT, 130, "course: interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")])  # fmt: skip
def test_a_signal_ends_it_within_seconds_and_clients_are_told(tiny: Path, number: int, status: int, says: str) -> None:
    with served(COURSE_API_KEY="from-the-environment") as (process, url):
        stream = long_stream(url, key="from-the-environment")
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(stream)
        assert process.wait(10) == status
        assert process.stderr is not None
        left = process.stderr.read()
        assert left.endswith(says)
        assert "Traceback" not in left


def test_a_server_killed_in_mid_stream_is_a_clear_error(tiny: Path) -> None:
    with served() as (process, url):
        stream = long_stream(url)
        in_the_page = ApiAnswer(url, "", model="tiny", messages=HELLO, max_tokens=1900)
        process.kill()
        with pytest.raises(openai.APIConnectionError, match="Connection error"):
            list(stream)
        assert in_the_page.wait(10)
        assert str(in_the_page.failure).startswith(f"no server answers at {url}")
        with pytest.raises(openai.APIConnectionError):
            long_stream(url)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny", "--url", "http://127.0.0.1:1/v1"], "tiny and --url http://127.0.0.1:1/v1: name a model, or a server"),
        (["--adapter", "mine"], "--adapter, --bits and --template are for a MODEL"),
        (["--url", "127.0.0.1:8000"], "'127.0.0.1:8000' is no server's address; it has the form http://"),
        (["no-such-model", "--port", "0"], "model 'no-such-model' is unknown"),
    ],
)
def test_what_the_app_refuses(course: Course, arguments: list[str], says: str) -> None:
    result = course("app", *arguments)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert result.stderr.startswith(f"course: {says}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_app_and_the_server_beside_it_end_together(tiny: Path, number: int, status: int) -> None:
    command = [sys.executable, "-m", "course_lib.cli", "app", "tiny", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as app:
        assert app.stderr is not None
        line = app.stderr.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        url = line.split()[-1]
        with pytest.raises(openai.AuthenticationError):  # only the page knows the key
            openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list()
        children = psutil.Process(app.pid).children(recursive=True)
        assert len(children) == 2
        app.send_signal(number)
        assert app.wait(20) == status
        assert not psutil.wait_procs(children, timeout=5)[1]
        assert "Traceback" not in app.stderr.read()


def test_vllm_gets_model_adapter_and_gpus_and_the_key_unseen(tiny: Path, tmp_path: Path) -> None:
    """With a stand-in for vLLM that prints what it was started with."""
    import peft

    from course_lib.models import load_model

    model, _ = load_model(tiny)
    peft.get_peft_model(model, peft.LoraConfig(r=12, target_modules=["q_proj"])).save_pretrained(tmp_path / "mine")
    package = tmp_path / "stand_in" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['VLLM_API_KEY']]))"
    )
    command = [sys.executable, "-m", "course_lib.cli", "serve", str(tiny), "--engine", "vllm", "--port", "0"]
    command += ["--adapter", str(tmp_path / "mine"), "--template", "chatml", "--bits", "4"]
    command += ["--tensor-parallel-size", "2", "--data-parallel-size", "4", "--trust-remote-code"]
    paths = os.pathsep.join([str(tmp_path / "stand_in"), *sys.path])
    environment = os.environ | {"COURSE_API_KEY": "secret", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    arguments, key = json.loads(done.stdout)
    assert (arguments[:2], key) == (["serve", str(tiny)], "secret")
    flags = {"--enable-lora", "--trust-remote-code"}
    assert flags <= set(arguments)
    options = dict(zip(*[iter(arg for arg in arguments[2:] if arg not in flags)] * 2, strict=True))
    assert (options["--tensor-parallel-size"], options["--data-parallel-size"]) == ("2", "4")
    assert options["--lora-modules"] == f"tiny+mine={tmp_path / 'mine'}"
    assert options["--max-lora-rank"] == "16"
    assert options["--quantization"] == "bitsandbytes"
    assert Path(options["--chat-template"]).name == "chatml.jinja"
    assert options["--host"] == "127.0.0.1"
    assert "secret" not in " ".join(arguments)
