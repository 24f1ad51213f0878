"""A bucket in memory: gs:// of fsspec, and an HTTP server with its objects for tensorstore.

Of the JSON API of Google Cloud Storage (cloud.google.com/storage/docs/json_api/v1) only what
tensorstore asks for: media uploads, reads, listings and removals, with conditions on generations.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from fsspec.implementations.memory import MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """Objects in memory under gs://; like a bucket's they cannot be appended to."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode, f"appended to {path}"
        return super()._open(path, mode, **options)


def content_of(name):
    file = FakeBucket.store.get(name)
    return None if file is None else file.getvalue()


def generation(content):
    """Of an object: a positive number that changes with its content; 0 without one."""
    if content is None:
        return 0
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") + 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        bucket, name, query = self._asked()
        if name is None:
            return self._answer(200, self._listing(bucket, query))
        content = content_of(f"/{bucket}/{name}")
        if content is None:
            return self._answer(404)
        if code := self._refused(content, query):
            return self._answer(code)
        headers = {"x-goog-generation": str(generation(content))}
        first, last = 0, len(content) - 1
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206 if asked else 200, content[first : last + 1], headers)

    def do_POST(self):
        bucket, name, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"/{bucket}/{name or query['name']}"
        if code := self._refused(content_of(name), query):
            return self._answer(code)
        FakeBucket().pipe_file(name, content)
        self._answer(200, {"name": name, "generation": str(generation(content))})

    def do_DELETE(self):
        bucket, name, query = self._asked()
        name = f"/{bucket}/{name}"
        content = content_of(name)
        if content is None:
            return self._answer(404)
        if code := self._refused(content, query):
            return self._answer(code)
        FakeBucket().rm(name)
        self._answer(204)

    def _asked(self):
        url = urlsplit(self.path)
        found = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
        name = None if found[2] is None else unquote(found[2])
        return found[1], name, {k: v[0] for k, v in parse_qs(url.query).items()}

    def _refused(self, content, query):
        """The status of a condition on the generation that does not hold."""
        now = str(generation(content))
        if query.get("ifGenerationMatch", now) != now:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == now else 0

    def _listing(self, bucket, query):
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = sorted(n.removeprefix(f"/{bucket}/") for n in FakeBucket.store
                       if n.startswith(f"/{bucket}/{query.get('prefix', '')}"))
        return {"items": [{"name": n, "size": str(len(content_of(f"/{bucket}/{n}")))}
                          for n in names if start <= n < end]}

    def _answer(self, code, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve():
    """Starts the server on a free port; returns it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
