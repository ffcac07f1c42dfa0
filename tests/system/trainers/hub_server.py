"""A server on loopback that speaks what huggingface_hub needs to create a repository and to upload files to it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = "hf_loopback"


class Hub:
    """What the server knows.

    Attributes:
        endpoint: its URL.
        repositories: name → path → contents, as committed.
        created: what was asked of each new repository.
        refuse: a part of the paths that get a 403.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.refuse: str | None = None

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        """Returns the status and the answer, as JSON."""
        if path.startswith("/objects/"):  # the storage of large files, which has no token
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if self.refuse is not None and self.refuse in path:
            return 403, {"error": "Forbidden: this token may not write."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "someone", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if "/preupload/" in path:
            files = [
                {"path": each["path"], "uploadMode": _mode(each["path"]), "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]}
        if method == "POST" and "/commit/" in path:
            return self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        return 404, {"error": f"{method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.endpoint}/{name}"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **url}
        self.created.append(asked)
        self.repositories[name] = {}
        return 200, url

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.endpoint}/objects/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href}}}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                contents = self.objects[value["oid"]]
                if hashlib.sha256(contents).hexdigest() != value["oid"] or len(contents) != value["size"]:
                    return 400, {"error": "another object was uploaded"}
                self.repositories[name][value["path"]] = contents
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.endpoint}/{name}/commit/{'1' * 40}"}


def _mode(path: str) -> str:
    """As the Hub's .gitattributes say."""
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    """Yields a server that runs."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, answer = hub.answer(self.command, path, self.headers.get("Authorization"), body)
            contents = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            self.wfile.write(contents)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
