"""`course serve` and `course app`: a model for other programs, and for people with a browser."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from course_lib.errors import InputError, install_extra

WAITING = 32  # clients in line
DEFAULT_URL = "http://127.0.0.1:8000/v1"
KeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="COURSE_API_KEY", show_envvar=True, help="what clients must send")
]
AdapterOption = Annotated[Path | None, typer.Option(help="an adapter's folder")]
BitsOption = Annotated[int | None, typer.Option(help="load the model in 4 or 8 bits")]
TemplateOption = Annotated[str, typer.Option(help="chat template; auto takes the adapter's or the model's own")]


def serve(
    model: Annotated[str, typer.Argument(help="a model's name or folder")],
    adapter: AdapterOption = None,
    bits: BitsOption = None,
    template: TemplateOption = "auto",
    host: Annotated[str, typer.Option(help="whom to listen to; others than this machine need a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key: KeyOption = None,
    waiting: Annotated[
        int, typer.Option(min=0, help="clients that may wait in line; more are told to come again")
    ] = WAITING,
    engine: Annotated[str, typer.Option(help="course, or vllm where it is installed")] = "course",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="vllm: GPUs a layer is split over")] = 1,
    data_parallel_size: Annotated[int, typer.Option(min=1, help="vllm: copies of the model")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the Python code in the model's folder")
    ] = False,
) -> None:
    """Serve a model by OpenAI's chat API, until Ctrl-C."""
    if engine not in ("course", "vllm"):
        raise InputError(f"--engine {engine}: choose course or vllm")
    if engine == "course" and max(tensor_parallel_size, data_parallel_size) > 1:
        raise InputError("--tensor-parallel-size and --data-parallel-size are for --engine vllm")
    if engine == "vllm" and waiting != WAITING:
        raise InputError(f"--waiting {waiting}: is for --engine course; vLLM has its own queue")
    if bits not in (None, 4, 8):
        raise InputError(f"--bits {bits}: choose 4 or 8")
    api_key = _checked_key(api_key)
    listen = _import_listen()
    from course_lib.adapter_record import check_adapter, recorded_template
    from course_lib.data.templates import named_template
    from course_lib.models import model_folder

    listener = listen.bind(host, port)
    if not listen.is_loopback(listener) and api_key is None:
        raise InputError(
            f"--host {host}: others than this machine could use the model; give a key with --api-key or COURSE_API_KEY"
        )
    folder = model_folder(model)
    name = folder.resolve().name
    if adapter is not None:
        check_adapter(adapter, folder)
        name = f"{name}+{adapter.resolve().name}"
        template = recorded_template(adapter, template)
    if template != "auto":
        named_template(template)  # it exists, before a large model is loaded
    if engine == "vllm":
        from course_lib.chat.vllm import vllm_command

        command = vllm_command(
            folder,
            name=name,
            host=host,
            port=listener.getsockname()[1],
            adapter=adapter,
            bits=bits,
            template=template,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
        )
        listener.close()
        environment = os.environ | ({"VLLM_API_KEY": api_key} if api_key else {})
        os.execve(command[0], command, environment)
    from course_lib.chat.answer_queue import AnswerQueue
    from course_lib.chat.serve import build_app
    from course_lib.chat.served import Served
    from course_lib.data.templates import choose_template
    from course_lib.models import load_model

    loaded, tokenizer = load_model(
        folder, dtype={None: "auto", 4: "nf4", 8: "int8"}[bits], adapter=adapter, trust_remote_code=trust_remote_code
    )
    served = Served(loaded, tokenizer, template=choose_template(tokenizer, template), name=name)
    queue = AnswerQueue(waiting=waiting)
    own_names = listen.LOOPBACK_NAMES if api_key is None else ()
    app = build_app(served, queue, api_key=api_key, own_names=own_names, say=_say)
    ready = f"serving {name} at {listen.url_of(listener)} (Ctrl-C ends it)"
    listen.Server(app, queue, ready=lambda: _say(ready)).run([listener])


def app(
    model: Annotated[str | None, typer.Argument(help="a model's name or folder; a server is started for it")] = None,
    url: Annotated[str | None, typer.Option(help=f"a server that runs already; default: {DEFAULT_URL}")] = None,
    adapter: AdapterOption = None,
    bits: BitsOption = None,
    template: TemplateOption = "auto",
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; 0 takes a free one")] = 8501,
    api_key: KeyOption = None,
) -> None:
    """Chat in the browser, with a model or with any server that has OpenAI's chat API, until Ctrl-C."""
    if model and url:
        raise InputError(f"{model} and --url {url}: name a model, or a server that runs already")
    if not model and (adapter or bits or template != "auto"):
        raise InputError("--adapter, --bits and --template are for a MODEL; a server that runs already has its own")
    api_key = _checked_key(api_key)
    listen = _import_listen()
    if not all(map(_is_installed, ("streamlit", "openai"))):
        raise InputError(f"the web app needs streamlit and openai; {install_extra('app')}")
    from course_lib.chat.api_client import check_url
    from course_lib.chat.web_app import end_on_sigterm, run_page, started_server

    url = check_url(url or DEFAULT_URL)
    with listen.bind("127.0.0.1", port) as free:
        port = free.getsockname()[1]
    end_on_sigterm()
    if model is None:
        run_page(url, api_key or "", port=port, say=_say)
        return
    options = ["--template", template]
    options += ["--adapter", str(adapter)] if adapter else []
    options += ["--bits", str(bits)] if bits else []
    api_key = api_key or secrets.token_urlsafe(24)
    with started_server([model, *options], api_key, say=_say) as url:
        run_page(url, api_key, port=port, say=_say)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # what is being imported, or kept from it, has no spec
        return sys.modules[module] is not None


def _import_listen():
    try:
        from course_lib.chat import listen
    except ImportError as error:
        raise InputError(f"serving needs {error.name}; {install_extra('serve')}") from None
    return listen


def _checked_key(key: str | None) -> str | None:
    """The key, or None for an empty one.

    Raises:
        InputError: no HTTP header can carry it.
    """
    key = (key or "").strip()
    if not all(33 <= ord(character) <= 126 for character in key):
        raise InputError("the API key must be of ASCII letters, digits and signs, without spaces")
    return key or None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
