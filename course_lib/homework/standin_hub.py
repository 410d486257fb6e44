"""A Hugging Face Hub inside this process, for huggingface_hub itself: its requests are answered here, and nothing leaves the machine.

Protocol: huggingface_hub's `hf_api.py` and `_commit_api.py`; every file is asked for inline, none through LFS or Xet.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ENDPOINT = "https://huggingface.co"


@dataclass
class Repository:
    """What was published."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class StandInHub:
    """Repositories by name, and the tokens that came with requests."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def answer(self, request: Any) -> Any:
        """What the Hub would answer to an httpx2 request."""
        import httpx2

        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        path, body = request.url.path, request.read()
        if request.method == "POST" and path == "/api/validate-yaml":
            return httpx2.Response(200, json={"errors": [], "warnings": []}, request=request)
        if not token:
            return httpx2.Response(401, json={"error": "Invalid username or password."}, request=request)
        self.tokens.add(token)
        if request.method == "POST" and path == "/api/repos/create":
            status, created = self._create(json.loads(body))
            return httpx2.Response(status, json=created, request=request)
        match = re.fullmatch(
            r"/api/models/([\w.-]+/[\w.-]+)(?:/(preupload|commit)/main|/revision/main|/tree/main.*)?", path
        )
        if match is None or match[1] not in self.repositories:
            headers = {"X-Error-Code": "RepoNotFound"}
            return httpx2.Response(404, json={"error": "Repository not found"}, headers=headers, request=request)
        if match[2] == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return httpx2.Response(200, json={"files": files}, request=request)
        if match[2] == "commit":
            return httpx2.Response(200, json=self._commit(match[1], body), request=request)
        return httpx2.Response(200, json={"id": match[1], "sha": "0" * 40, "siblings": [], "tags": []}, request=request)

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or 'learner'}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(
            name, Repository(private=bool(asked.get("private") or asked.get("visibility") == "private"))
        )
        return status, {"url": f"{ENDPOINT}/{name}", "name": name, "id": name}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        repository = self.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
        commit = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{ENDPOINT}/{name}/commit/{commit}", "commitOid": commit}


@contextmanager
def standing_in() -> Iterator[StandInHub]:
    """Let huggingface_hub talk to a new stand-in, and to nothing else, while the block runs."""
    import httpx2
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    hub, factory, offline = StandInHub(), _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub.answer)))
    try:
        yield hub
    finally:
        constants.HF_HUB_OFFLINE = offline
        huggingface_hub.set_client_factory(factory)
