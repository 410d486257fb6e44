"""A local file server that misbehaves in the ways real ones do: it plays the answers a test gives it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Plays `answers` in turn, the last one for ever; `seen` keeps the Range header of each request."""

    protocol_version = "HTTP/1.1"
    answers: list[Answer]
    seen: list[str | None]

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Range"))
        (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(self)

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True


def whole(content: bytes = CONTENT, etag: str = '"one"') -> Answer:
    """A correct server: Range and If-Range, 206, 200 and 416 as they should be."""

    def answer(handler: Handler) -> None:
        wanted = handler.headers.get("Range")
        if wanted and handler.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                handler.reply(416, Content_Range=f"bytes */{len(content)}")
            else:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                handler.reply(206, content[start:], ETag=etag, Content_Range=span)
        else:
            handler.reply(200, content, ETag=etag)

    return answer


def broken(at: int, etag: str = '"one"', content: bytes = CONTENT) -> Answer:
    """A connection that breaks off after `at` bytes."""
    return lambda handler: handler.reply(200, content[:at], length=len(content), ETag=etag)


def status(code: int, **headers: str) -> Answer:
    """An answer with a status code and nothing else."""
    return lambda handler: handler.reply(code, b"no", **headers)


@contextmanager
def servers() -> Iterator[Callable[..., tuple[str, list[str | None]]]]:
    """Yield a function that starts a server playing the given answers; it returns its URL and the Range headers it will have seen."""
    running = []

    def start(*answers: Answer) -> tuple[str, list[str | None]]:
        handler = type("Played", (Handler,), {"answers": list(answers), "seen": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *_: None  # a client that hangs up on a lie is no news
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}/model.bin", handler.seen

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
