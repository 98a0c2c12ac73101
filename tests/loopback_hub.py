"""A Hub on 127.0.0.1 for tests: the routes that huggingface_hub, transformers and datasets use, kept in memory.

    with LoopbackHub() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("tester/model")
        subprocess.run([...], env=hub.environment())   # a client that finds this Hub, with an empty cache
        hub.files("tester/model"), hub.commits("tester/model"), hub.requests

It refuses what the real Hub refuses: writes without a token (401) or outside the user's namespaces (403), a second
repo of one name (409), a stale parent (412), bad metadata (400), uploads whose sha256 or size is wrong (400).
"""

import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import ROUTES, Answer, Commit, Refusal, Repo, Request


@dataclass
class Fault:
    """An answer to give instead of the true one: a status, or "drop" (close the line), or "hang" (never answer)."""

    pattern: str
    status: int | str
    times: int
    message: str


class LoopbackHub:
    """The server, as a context manager. `token` may write to the namespaces `tester` and `lab`."""

    token = "hf_dummy"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._caches = Path(tempfile.mkdtemp(prefix="loopback-hub-"))
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._caches, ignore_errors=True)

    def environment(self, token: str | None = "hf_dummy", **more: str) -> dict[str, str]:
        """The environment of a client process that sees only this Hub, with an empty cache of its own."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_", "PYTHON"))
        }
        wanted = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": tempfile.mkdtemp(dir=self._caches),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | wanted | ({"HF_TOKEN": token} if token else {}) | more

    def fail_next(self, pattern: str, status: int | str, times: int = 1, message: str = "told to fail") -> None:
        """Answer the next `times` requests whose "METHOD path" matches `pattern` with `status`.

        A status of 500 and above comes with an HTML body, as gateways send it; "drop" closes the connection without
        an answer, and "hang" keeps it open without one.
        """
        with self.lock:
            self._faults.append(Fault(pattern, status, times, message))

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        if (kind, repo_id) not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Path and content of every file at a revision."""
        return {path: blob.content for path, blob in self.repo(repo_id, kind).at(revision).files.items()}

    def commits(self, repo_id: str, kind: str = "models") -> list[Commit]:
        """The history, oldest first, without the commit that the creation of the repo makes."""
        return self.repo(repo_id, kind).history[1:]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # Answers go out as two writes; without this Nagle's algorithm and delayed acknowledgements cost 40 ms each.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """The request log is `hub.requests`; nothing goes to the terminal."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.hub, parse_qs(url.query), self.headers, self._body())
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
        fault = self.hub.take_fault(f"{self.command} {url.path}")
        if fault is None:
            self._send(self._route(request, url.path))
        elif isinstance(fault.status, int):
            page = f"<html><h1>{fault.status}</h1></html>".encode() if fault.status >= 500 else None
            kind = {"Content-Type": "text/html"} if page else {}
            self._send(Answer(page or {"error": fault.message}, fault.status, kind))
        else:
            if fault.status == "hang":
                self.hub.closing.wait(30)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _route(self, request: Request, path: str) -> Answer:
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command:
                names = {name: value and unquote(value) for name, value in match.groupdict().items()}
                try:
                    with self.hub.lock:
                        return function(request, **names)
                except Refusal as refusal:
                    return Answer({"error": refusal.message}, refusal.status, refusal.headers)
        return Answer({"error": f"no route for {self.command} {path}"}, 404)

    def _send(self, answer: Answer) -> None:
        body = answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
