"""A ModelScope on this machine: what modelscope_hub asks of one when it uploads a folder, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "ms-0a1b2c3d-1111-2222-3333-0a1b2c3d4e5f"


@dataclass
class ModelScope:
    """The server's state: repositories as they were asked for, their files, stored blobs; `faults` as in hub_server."""

    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int | str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ModelScope

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        request = f"{self.command} {self.path}"
        self.state.requests.append(request)
        fault = next((fault for pattern, fault in self.state.faults.items() if re.search(pattern, request)), None)
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(fault, int):
            self._reply(fault, {"Code": fault, "Success": False, "Message": "told to fail"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply(401, {"Code": 10010205002, "Success": False, "Message": "token is wrong"})
        else:
            self._route(body)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(self, body: bytes) -> None:
        state, data = self.state, {}
        if self.path == "/api/v1/models":
            wanted = json.loads(body)
            name = f"{wanted['Path']}/{wanted['Name']}"
            if name in state.repositories:
                self._reply(400, {"Code": 10010201009, "Success": False, "Message": "model already exists"})
                return
            state.repositories[name] = wanted
        elif self.path.endswith("/info/lfs/objects/batch"):
            data = {"objects": [self._action(one) for one in json.loads(body)["objects"]]}
        elif self.path.startswith("/blob/"):
            oid = self.path.removeprefix("/blob/")
            if hashlib.sha256(body).hexdigest() != oid:
                self._reply(400, {"Code": 400, "Success": False, "Message": "the content has another sha256"})
                return
            state.stored[oid] = body
        elif "/commit/" in self.path:
            for action in json.loads(body)["actions"]:
                lfs = action["type"] == "lfs"
                content = state.stored[action["sha256"]] if lfs else base64.b64decode(action["content"])
                state.files[action["path"]] = content
        self._reply(200, {"Code": 200, "Success": True, "Data": data})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.state.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.state.url}/blob/{wanted['oid']}"}}}


@contextmanager
def running_modelscope() -> Iterator[ModelScope]:
    """Start the server; `url` is its address."""
    state = ModelScope()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()
