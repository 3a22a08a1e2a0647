"""A stand-in for the model hub on loopback: the part of its API that huggingface_hub downloads with. It records what is asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class HubRepository:
    """Files of a repository by revision; a commit is named after its files."""

    revisions: dict[str, dict[str, bytes]]
    is_gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit."""
        commits = {self.commit(files): files for files in self.revisions.values()}
        if revision in commits:
            return revision
        return self.commit(self.revisions[revision]) if revision in self.revisions else None

    def files(self, commit: str) -> dict[str, bytes]:
        """Return the files of a commit."""
        return next(files for files in self.revisions.values() if self.commit(files) == commit)

    @staticmethod
    def commit(files: dict[str, bytes]) -> str:
        """Return the commit with these files."""
        return hashlib.sha1(repr([(name, _etag(content)) for name, content in sorted(files.items())]).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories, what was asked of them, and how the server misbehaves."""

    repositories: dict[str, HubRepository] = field(default_factory=dict)
    """By owner/name; data sets by datasets/owner/name."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte and number of bytes of each body that was sent."""
    breaks_at: int | None = None
    """Byte of a file at which its transfers break off."""
    num_breaks: int = 0
    """How often that happens, over all files."""
    refused_token: str | None = None
    on_request: Callable[[], object] = lambda: None
    """Called before each request is answered, and recorded."""
    endpoint: str = ""

    def asked_files(self) -> set[str]:
        """Return the files that were asked for, without their revision."""
        paths = [path for method, path in self.requests if "/resolve/" in path and method == "GET"]
        return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}

    def forget(self) -> None:
        """Forget what was asked, and behave."""
        self.requests.clear()
        self.sent.clear()
        self.num_breaks, self.refused_token = 0, None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:
        return

    def _answer(self, *, with_body: bool) -> None:
        self.hub.on_request()
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.hub.refused_token and self.headers.get("Authorization") == f"Bearer {self.hub.refused_token}":
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        is_api = path.startswith("api/")
        place = path.removeprefix("api/models/")
        place = place.removeprefix("api/") if place.startswith("api/datasets/") else place
        prefix = "datasets/" if place.startswith("datasets/") else ""
        owner, name, *rest = place.removeprefix(prefix).split("/")
        repository = self.hub.repositories.get(f"{prefix}{owner}/{name}")
        if repository is None:
            return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        kind, where = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        known = [r for r in (*repository.revisions, *map(repository.commit, repository.revisions.values()))]
        revision = max((r for r in known if f"{where}/".startswith(f"{r}/")), key=len, default=None)
        commit = None if revision is None else repository.commit_of(revision)
        if revision is None or commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.files(commit)
        if is_api and kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode())
        if is_api:
            entries = [{"type": "file", "path": file, "size": len(b), "oid": _etag(b)} for file, b in files.items()]
            return self._send(200, json.dumps(entries).encode())
        return self._file(repository, files, where.removeprefix(f"{revision}/"), commit, with_body)

    def _file(self, repository: HubRepository, files: dict[str, bytes], file: str, commit: str, with_body: bool) -> None:
        if repository.is_gated and self.headers.get("Authorization") != "Bearer hf_accepted":
            return self._send(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        whole = files[file]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_etag(whole)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        body = whole[first:]
        self._head(206 if first else 200, len(body), headers)
        if with_body:
            is_broken = self.hub.num_breaks > 0 and self.hub.breaks_at is not None and len(whole) > self.hub.breaks_at
            self.hub.num_breaks -= is_broken
            part = whole[first : self.hub.breaks_at] if is_broken else body
            self.hub.sent.append((file, first, len(part)))
            self.wfile.write(part)
            self.close_connection = len(part) < len(body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve a hub without repositories on a free port of loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: str) -> None:
    """Let huggingface_hub, which reads its environment when it is imported, use this endpoint and cache without a token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
