"""A Hub on the loopback: the part of the HTTP API of huggingface.co that huggingface_hub speaks when models are pushed
and loaded.

Source: the requests that huggingface_hub 2.4 makes and the answers that it reads (hf_api.py, _commit_api.py, lfs.py,
file_download.py, utils/_http.py), the git-lfs batch API, and docs/hub/api of huggingface.co. Everything is in memory.

    hub = Hub()                                    # listens at hub.url
    hub.users["hf_secret"] = User("ada", {"lab": "write"})
    hub.fail("POST .*/commit/", status(503, 2), lost)   # the next two requests of that kind, each in its way
    hub.requests                                   # what was asked, as in "POST /api/repos/create 200"
"""

import contextlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from hub_pages import Pages
from hub_store import Refusal, Repo, User


class Fault(NamedTuple):
    """What happens to a request instead of its answer, or before it."""

    kind: str
    code: int = 0
    headers: dict[str, str] = {}
    seconds: float = 0.0
    message: str = ""
    call: Callable[[], None] | None = None


def status(code: int, retry_after: int | None = None, message: str = "not now", **headers: str) -> Fault:
    """An answer of another kind; nothing is done."""
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return Fault("status", code, headers, message=message)


cut = Fault("cut")  # the connection ends in the middle of the request
lost = Fault("lost")  # the request is carried out, and the connection ends before the answer
half = Fault("half")  # the connection ends in the middle of the answer


def meanwhile(call: Callable[[], None]) -> Fault:
    """Something else happens first."""
    return Fault("meanwhile", call=call)


def slow(seconds: float) -> Fault:
    """An answer that takes its time."""
    return Fault("slow", seconds=seconds)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has not waited is to be expected
            super().handle_error(request, client_address)


class Hub:
    """The server, on a thread of its own.

    Args:
        listener: a bound socket to serve on; a free port of the loopback if not given.
        part_size: bytes above which an LFS file is uploaded in parts of that size.
        page_size: entries of one page of a tree.
    """

    def __init__(self, listener: socket.socket | None = None, *, part_size: int = 2**20, page_size: int = 1000):
        self.server = Server(("127.0.0.1", 0), Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.server.socket.close()
            self.server.socket = listener.dup()
            self.server.server_address = listener.getsockname()
            self.server.server_activate()
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Objects are stored elsewhere: another host name is another origin, to which no token may travel.
        self.storage = f"http://localhost:{self.server.server_address[1]}"
        self.part_size, self.page_size = part_size, page_size
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.reset()
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def reset(self) -> None:
        """Forget everything."""
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[tuple[re.Pattern[str], list[Fault]]] = []
        self.requests: list[str] = []
        self.authorized: list[str] = []  # requests that bore a token
        self.uploaded: list[str] = []  # objects that came in, by sha256

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, pattern: str, *faults: Fault) -> None:
        """Let the next requests whose "METHOD /path" matches meet these faults, one each."""
        self.faults.append((re.compile(pattern), list(faults)))

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for pattern, faults in self.faults:
                if faults and pattern.match(request):
                    return faults.pop(0)
        return None


class Handler(Pages, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header and its body are two packets

    def log_message(self, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub  # type: ignore[attr-defined]

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {url.path}"
        fault = self.hub.next_fault(request) or Fault("none")
        if fault.kind == "cut":
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1000))
            return self._hang_up()
        self.data = self._read_body()
        if fault.kind == "slow":
            requests = self.hub.requests
            self.hub.closing.wait(fault.seconds)
            if self.hub.requests is not requests:  # `reset` since: this test has ended
                return self._hang_up()
        if fault.call is not None:
            fault.call()
        if self.headers.get("Authorization"):
            self.hub.authorized.append(f"{self.command} {self.headers['Host']} {url.path}")
        try:
            if fault.kind == "status":
                refusal = Refusal(fault.code, fault.message)
                refusal.headers |= fault.headers
                raise refusal
            with self.hub.lock:
                answer = self._route(url.path)
        except Refusal as refusal:
            body = fault.message if fault.message.startswith("<") else json.dumps(refusal.body)
            answer = refusal.code, body.encode(), refusal.headers
        code, body, headers = answer
        self.hub.requests.append(f"{request} {code}")
        if fault.kind == "lost":
            return self._hang_up()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.kind == "half":
            self.wfile.write(body[: len(body) // 2])
            return self._hang_up()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client has not waited
                self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
