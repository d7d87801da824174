"""A Google Cloud Storage of one process: the few requests of its JSON API that TensorStore makes.

python -m tests.data.fake_gcs     # prints its port; keeps what is uploaded in memory
"""

import http.server
import json
import threading
import urllib.parse


class _Objects:
    """Contents and generation of every object."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contents: dict[str, tuple[bytes, int]] = {}
        self.uploads = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together; small writes would wait for each other
    disable_nagle_algorithm = True
    objects: _Objects

    def do_GET(self) -> None:
        path, query = self._target()
        parts = path.split("/o", 1)
        if len(parts) == 2 and parts[1].startswith("/"):
            self._read(urllib.parse.unquote(parts[1][1:]))
        else:
            self._list(query)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, query = self._target()
        with self.objects.lock:
            self.objects.uploads += 1
            generation = self.objects.uploads
            self.objects.contents[query["name"]] = body, generation
        self._answer(200, json.dumps({"name": query["name"], "generation": str(generation)}))

    def do_DELETE(self) -> None:
        name = urllib.parse.unquote(self._target()[0].split("/o/", 1)[1])
        with self.objects.lock:
            found = self.objects.contents.pop(name, None)
        self._answer(204 if found else 404)

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _target(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def _read(self, name: str) -> None:
        with self.objects.lock:
            found = self.objects.contents.get(name)
        if found is None:
            return self._answer(404)
        body, generation = found
        status, headers = 200, {"x-goog-generation": str(generation)}
        if asked := self.headers.get("Range"):
            begin, end = asked.removeprefix("bytes=").split("-")
            size = len(body)
            first = int(begin) if begin else max(size - int(end), 0)
            last = min(int(end), size - 1) if begin and end else size - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            status, body = 206, body[first : last + 1]
        return self._answer(status, body, headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, start = query.get("prefix", ""), query.get("startOffset", "")
        end = query.get("endOffset")
        with self.objects.lock:
            names = sorted(
                name
                for name in self.objects.contents
                if name.startswith(prefix) and name >= start and (end is None or name < end)
            )
            items = [
                {"name": name, "size": str(len(self.objects.contents[name][0]))} for name in names
            ]
        self._answer(200, json.dumps({"items": items}))

    def _answer(
        self, status: int, body: str | bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serves until the process ends."""
    handler = type("Handler", (_Handler,), {"objects": _Objects()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
