"""Where a server listens, and its life: from a free port to Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from course_lib.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from course_lib.chat.answer_queue import AnswerQueue

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
SECONDS_TO_END = 5  # after Ctrl-C; a client that does not read is then left


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before minutes go into loading a model; it answers nothing yet. Port 0 takes a free one.

    Raises:
        InputError: the host's name is unknown or is none of this machine, or the port is in use or not for this user.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(
            f"--host {host}: no such host; use 127.0.0.1, or 0.0.0.0 for all of this machine's addresses"
        ) from None
    listener = socket.socket(family, kind, protocol)
    if sys.platform != "win32":  # there it would share a port that is in use
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: is in use on {host}; choose another, or 0 for a free one") from None
        raise InputError(f"--host {host} --port {port}: cannot be listened on ({error.strerror})") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """The address clients are given as `base_url`."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Server(uvicorn.Server):
    """`run([listener])` serves until Ctrl-C or SIGTERM, which then take their usual course; answers being written end with an error.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """

    def __init__(self, app: ASGIApp, queue: AnswerQueue, *, ready: Callable[[], None] = lambda: None) -> None:
        """`ready` is called when the first client may come."""
        quiet = {"log_level": "error", "access_log": False, "server_header": False}
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", ws="none", proxy_headers=False, timeout_graceful_shutdown=SECONDS_TO_END, **quiet
            )
        )
        self.queue, self.ready = queue, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.close()
        await super().shutdown(sockets)
