"""A Hugging Face Hub on this machine: what huggingface_hub asks of one when it uploads, what others read there, with faults on demand.

Protocol: huggingface_hub's _commit_api.py and lfs.py; git-lfs's batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).
"""

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

TOKEN = "hf_" + "aB3dE5gH7" * 4
PART = 50_000  # bytes of a part of a large file
LARGE = 20_000  # bytes from which a file goes by LFS


@dataclass
class Repository:
    """`files` by name; `commits` are the names that each one changed."""

    private: bool
    sdk: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


@dataclass
class Hub:
    """The server's state. `faults` maps a pattern of "METHOD path" to a status, or to cut, which hangs up; `stored` is LFS content."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: dict[str, int | str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    url: str = ""

    def sent(self) -> list[str]:
        """The PUTs so far: one a file, or a part of one."""
        return [request for request in self.requests if request.startswith("PUT")]


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = next((fault for pattern, fault in self.hub.faults.items() if re.search(pattern, request)), None)
        if fault == "cut":
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if isinstance(fault, int):
            self._reply(fault, {"error": "told to fail"})
        elif not self._open(path) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply(401, {"error": "Invalid username or password."})
        elif self.command == "GET" and (match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/main/(.+)", path)):
            self._send_file(self.hub.repositories[f"models/{match[1]}"], match[2])
        elif self.command == "GET" and (match := re.fullmatch(r"/lfs/(\w+)", path)):
            self._send(self.hub.stored[match[1]])
        else:
            self._route(path, body)

    def _open(self, path: str) -> bool:
        """Whether it is shown to everybody: LFS, whose addresses are secrets, and what is read of a public repository."""
        match = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+)(?:/resolve/|/revision/|$)", path)
        repository = self.hub.repositories.get(f"models/{match[1]}") if match else None
        public = repository is not None and not repository.private
        return path.startswith("/lfs/") or (self.command == "GET" and public)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, value: Any = None, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repository: Repository, name: str) -> None:
        if (content := repository.files.get(name)) is None:
            self._reply(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        elif (oid := hashlib.sha256(content).hexdigest()) in self.hub.stored:
            self._reply(302, Location=f"{self.hub.url}/lfs/{oid}")
        else:
            self._send(content)

    def _send(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
            if name in hub.repositories:
                self._reply(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return
            hub.repositories[name] = Repository(
                private=wanted.get("visibility") == "private" or bool(wanted.get("private")), sdk=wanted.get("sdk")
            )
            self._reply(200, {"url": f"{hub.url}/{name.removeprefix('models/')}"})
        elif path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/preupload/main", path):
            self._reply(200, {"files": self._modes(hub.repositories[match[1]], json.loads(body)["files"])})
        elif match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._lfs_actions(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            self._reply(200, {"transfer": "multipart", "objects": objects})
        elif match := re.fullmatch(r"/lfs/part/(\w+)/(\d+)", path):
            hub.parts.setdefault(match[1], {})[int(match[2])] = body
            self._reply(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        elif match := re.fullmatch(r"/lfs/complete/(\w+)", path):
            told = [part["partNumber"] for part in json.loads(body)["parts"]]
            self._store(match[1], b"".join(hub.parts[match[1]][number] for number in told))
        elif path == "/lfs/verify":
            told = json.loads(body)
            right = len(hub.stored.get(told["oid"], b"")) == told["size"]
            hub.verified.append(told["oid"])
            self._reply(200 if right else 422)
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            self._store(match[1], body)
        elif match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)(/revision/main)?", path):
            self._tell(match[1])
        else:
            self._reply(404, {"error": "not found"})

    def _tell(self, name: str) -> None:
        if name not in self.hub.repositories:
            self._reply(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return
        sha = f"{len(self.hub.repositories[name].commits):040x}"
        siblings = [{"rfilename": file} for file in sorted(self.hub.repositories[name].files)]
        self._reply(200, {"id": name.split("/", 1)[1], "sha": sha, "siblings": siblings})

    def _modes(self, repository: Repository, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = []
        for file in files:
            large = file["size"] >= LARGE
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (there := repository.files.get(file["path"])) is not None:
                answer["oid"] = hashlib.sha256(there).hexdigest() if large else _blob_id(there)
            answers.append(answer)
        return answers

    def _lfs_actions(self, oid: str, size: int) -> dict[str, Any]:
        url = self.hub.url
        if oid in self.hub.stored:
            return {"oid": oid, "size": size}
        verify = {"href": f"{url}/lfs/verify", "header": {}}
        if size <= PART:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{url}/lfs/{oid}"}, "verify": verify}}
        numbers = range(1, -(-size // PART) + 1)
        header = {"chunk_size": str(PART), **{f"{number:05d}": f"{url}/lfs/part/{oid}/{number}" for number in numbers}}
        upload = {"href": f"{url}/lfs/complete/{oid}", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            self._reply(400, {"error": "the content has another sha256"})
            return
        self.hub.stored[oid] = content
        self._reply(200)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository, changed = self.hub.repositories[name], {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.stored[value["oid"]]
        repository.files |= changed
        repository.commits.append(sorted(changed))
        oid = f"{len(repository.commits):040x}"
        self._reply(
            200,
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{name.removeprefix('models/')}/commit/{oid}",
            },
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Start the server; `url` is its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a connection that was cut is no news
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()
