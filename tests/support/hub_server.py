"""A hub on this machine that speaks the part of the protocol of huggingface.co that pushing and loading need.

Repositories are in memory. Small files are sent within the commit (``regular``), those from ``Hub.large`` bytes on by
Git LFS before it, and are fetched by way of a redirection, as from the hub's own storage.
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
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Files of the newest commit, by path."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, str] = field(default_factory=dict)  # SHA-256 of the files that came by LFS
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Of the newest commit, 40 hexadecimal digits."""
        return hashlib.sha1(json.dumps(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server has.

    Attributes:
        url: of the server.
        repositories: by ``models/owner/name`` or ``datasets/owner/name``.
        large: bytes from which on files are sent by LFS.
        objects: what was sent so, by its SHA-256.
    """

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: int = 2**40
    objects: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of the base class
        pass

    def _send(self, code: int, content: bytes | Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _repository(self, name: str) -> Repository | None:
        """The repository, or None after an answer that there is none for this user."""
        found = self.server.hub.repositories.get(name)
        allowed = found is not None and (not found.private or self._logged_in())
        if not allowed:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/paths-info/[^/]+", path):
            if (repository := self._repository(match[1])) is not None:
                asked = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
                self._send(200, [entry for entry in self._tree(repository) if entry["path"] in asked])
        elif not self._logged_in():
            self._send(401, {"error": "Invalid username or password."})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/(preupload|commit)/[^/]+", path):
            if (repository := self._repository(match[1])) is not None:
                (self._preupload if match[2] == "preupload" else self._commit)(repository, match[1], body)
        else:
            self._send(404, {"error": path})

    def _create(self, asked: dict[str, Any]) -> None:
        kind = asked.get("type") or "model"
        name = f"{asked['organization']}/{asked['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        there = self.server.hub.repositories
        if f"{kind}s/{name}" in there:
            self._send(409, {"error": "You already created this repo", "url": f"{self.server.hub.url}/{prefix}{name}"})
            return
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        there[f"{kind}s/{name}"] = Repository(private)
        self._send(200, {"url": f"{self.server.hub.url}/{prefix}{name}", "name": name})

    def _preupload(self, repository: Repository, name: str, body: bytes) -> None:
        large = self.server.hub.large
        modes = {one["path"]: "lfs" if one["size"] >= large else "regular" for one in json.loads(body)["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._send(200, {"files": files})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.hub.url}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        content, sha = self._body(), self.path.removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == sha
        self.server.hub.objects[sha] = content
        self._send(200)

    def _commit(self, repository: Repository, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        for line in lines:
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                path, sha = line["value"]["path"], line["value"]["oid"]
                repository.files[path], repository.large[path] = self.server.hub.objects[sha], sha
        repository.commits.append(lines[0]["value"]["summary"])
        url = f"{self.server.hub.url}/{name.removeprefix('models/')}/commit/{repository.sha}"
        self._send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/.*)?", path):
            if (repository := self._repository(match[1])) is not None:
                self._send(200, self._tree(repository) if match[2] == "tree" else self._info(repository, match[1]))
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name = match[1] if match[1].startswith("datasets/") else f"models/{match[1]}"
            if (repository := self._repository(name)) is not None:
                self._file(repository, match[2])
        elif match := re.fullmatch(r"/lfs/(\w{64})", path):
            self._content(self.server.hub.objects[match[1]], {"ETag": f'"{match[1]}"'})
        else:
            self._send(404 if path != "/" else 200, {"error": path})

    do_HEAD = do_GET  # noqa: N815 -- the server looks for this name

    def _info(self, repository: Repository, name: str) -> dict[str, Any]:
        identity = name.partition("/")[2]
        files = [{"rfilename": path} for path in sorted(repository.files)]
        known = {"id": identity, "sha": repository.sha, "private": repository.private, "siblings": files}
        return {"_id": identity, "tags": [], "downloads": 0, "likes": 0, **known}

    def _tree(self, repository: Repository) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(repository.files.items())
        ]

    def _file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        commit = {"X_Repo_Commit": repository.sha}
        if sha := repository.large.get(path):
            linked = {"X_Linked_Etag": f'"{sha}"', "X_Linked_Size": str(len(content))}
            storage = self.server.hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's
            self._send(302, Location=f"{storage}/lfs/{sha}", **linked, **commit)
        else:
            self._content(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit})

    def _content(self, content: bytes, known: dict[str, str]) -> None:
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            part = content[first : last + 1]
            self._send(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(content)}", **known)
        else:
            self._send(200, content, Accept_Ranges="bytes", **known)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub on a free port of the loopback interface."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()


def log_in(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the libraries use this hub as its user, with a cache of their own; they read the environment only once."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
