"""A page on this machine that follows a training: a small server on the loopback address, behind a token."""

import json
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

from unvanish.report.following import Following
from unvanish.report.html import live_page

HOST = "127.0.0.1"


class LiveServer:
    """Serves the page and the folder's records, each only with the token; as a context manager it runs in a thread.

        with LiveServer(Following("flows")) as server:
            print(server.url)

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, following: Following, port: int = 0) -> None:
        self.following = following
        self.token = secrets.token_urlsafe(24)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((HOST, port), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """What to open in a browser, with the token."""
        return f"http://{HOST}:{self._server.server_port}/?token={self.token}"

    def serve(self) -> None:
        """Serve until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, host: str | None) -> tuple[HTTPStatus, str, bytes]:
        """(status, content type, body) of one request.

        A Host header other than the loopback's is refused too: otherwise another site's page could send requests after
        pointing its host name at this machine (DNS rebinding).
        """
        asked = urlsplit(path)
        token = parse_qs(asked.query).get("token", [""])[0]
        names = {f"{name}:{self._server.server_port}" for name in (HOST, "localhost")}
        if host not in names or not secrets.compare_digest(token.encode(), self.token.encode()):
            return HTTPStatus.FORBIDDEN, "text/plain", b"the address needs the token that unvanish live printed\n"
        if asked.path == "/":
            return HTTPStatus.OK, "text/html", live_page(self.following.folder.name).encode()
        if asked.path == "/state":
            with self._lock:
                state = self.following.state()
            return HTTPStatus.OK, "application/json", json.dumps(state, allow_nan=False).encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, body = answer(self.path, self.headers.get("Host"))
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("Referrer-Policy", "no-referrer")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Requests are not logged, because their address contains the token."""

        return Handler
