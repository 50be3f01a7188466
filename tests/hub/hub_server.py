"""A hub of one repository on this machine: the endpoints that the hub's client uses to push and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "somebody/blocks"


class HubServer:
    """Its ``files`` are those of the latest commit. ``refusal`` is the message with which it refuses commits."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.downloaded: set[str] = set()
        self.is_there, self.is_private = False, False
        self.refusal = ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                assert self.headers["Authorization"] == "Bearer hf_of_a_test"
                self._answer(*server.post(urlsplit(self.path).path, body))

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                name = path.partition("/resolve/")[2].partition("/")[2]
                if name:
                    self._send_file(name)
                else:
                    self._answer(*server.get(path))

            do_HEAD = do_GET

            def _send_file(self, name: str) -> None:
                content = server.files[name]
                server.downloaded.add(name)
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", server.commit)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def _answer(self, status: int, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def commit(self) -> str:
        return f"{len(self.commits):040x}"

    def post(self, path: str, body: str) -> tuple[int, Any]:
        """Status and JSON."""
        if path == "/api/repos/create":
            if self.is_there:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{REPOSITORY}"}
            self.is_there, self.is_private = True, json.loads(body).get("visibility") == "private"
            self.files[".gitattributes"] = b""
            return 200, {"url": f"{self.url}/{REPOSITORY}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        assert path == f"/api/models/{REPOSITORY}/commit/main", path
        if self.refusal:
            return 403, {"error": self.refusal}
        operations = [json.loads(line) for line in body.splitlines()]
        self.commits.append(operations)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{REPOSITORY}/commit/{self.commit}", "commitOid": self.commit}

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON."""
        if not (self.is_there and path.startswith(f"/api/models/{REPOSITORY}")):
            return 404, {"error": "Repository not found"}
        if "/tree/" in path:
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in self.files.items()}
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": oids[name]}
                for name, content in self.files.items()
            ]
        siblings = [{"rfilename": name} for name in self.files]
        return 200, {"id": REPOSITORY, "sha": self.commit, "private": self.is_private, "siblings": siblings}
