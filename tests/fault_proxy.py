"""An HTTP proxy on loopback that does harm on purpose between a client and a real server."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """What a client asked for. number: how many came before; range: the header's value."""

    number: int
    method: str
    path: str
    range: str


@dataclass(frozen=True)
class Fault:
    """What becomes of a reply. status: answer this instead; cut: end the body after so many bytes, by `reset` or by closing."""

    status: int | None = None
    cut: int | None = None
    reset: bool = False


class FaultProxy:
    """Forward to 127.0.0.1:`port`, with the fault that `fault(request)` says. Keeps the requests since `harm` was called."""

    def __init__(self, port: int) -> None:
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    request = Request(len(proxy.requests), self.command, self.path, self.headers.get("Range", ""))
                    proxy.requests.append(request)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                upstream.request(self.command, self.path, body or None, dict(self.headers))
                reply = upstream.getresponse()
                data = reply.read()
                upstream.close()
                self.answer(reply, data, proxy.fault(request) or Fault())

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

            def answer(self, reply: http.client.HTTPResponse, data: bytes, fault: Fault) -> None:
                if fault.status is not None:
                    data = b"<Error><Code>AccessDenied</Code></Error>" if fault.status == 403 else b"<Error><Code>SlowDown</Code></Error>"
                    self.send_response(fault.status)
                else:
                    self.send_response(reply.status)
                    for name, value in reply.getheaders():
                        if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                            self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(data[: fault.cut])
                if fault.cut is not None and fault.cut < len(data):
                    self.wfile.flush()
                    if fault.reset:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_WR) if not fault.reset else self.connection.close()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def harm(self, fault: Callable[[Request], Fault | None]) -> None:
        """Begin anew with another fault."""
        self.fault = fault
        self.requests.clear()

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
