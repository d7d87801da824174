"""An HTTP server of a test, on this machine alone."""

import abc
import http.server
import threading
from collections.abc import Mapping
from typing import Self


class LoopbackHandler(http.server.BaseHTTPRequestHandler):
    """Answers without a word on standard error; a client that has gone is no mistake."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet; two would wait for each other

    def log_message(self, *args: object) -> None:
        pass

    def send(self, status: int, text: str, headers: Mapping[str, str] | tuple = ()) -> None:
        data = text.encode()
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client did not wait


class LoopbackServer(abc.ABC):
    """`with SomeServer(...) as server`; subclasses say how a request is handled.

    Attributes:
      url: its base URL, which ends in /v1.
    """

    url: str

    @abc.abstractmethod
    def handler(self) -> type[LoopbackHandler]:
        """The class that answers requests."""

    def __enter__(self) -> Self:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
