"""A server on this machine that answers as the Hugging Face hub does, for `huggingface_hub`."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def oid(content):
    """What git calls a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Token -> whether it may write.
TOKENS = {"Bearer hf_writer": True, "Bearer hf_reader": False}


class Hub(ThreadingHTTPServer):
    """Serves models, and takes new ones.

    Attributes:
        folders: Repository -> the folder that it serves.
        asked: Every file whose contents were sent.
        taken: Repository -> {file: contents} of what it was sent.
        private: Repositories that were made private.
        large: Ending of files that go through LFS.
        stored: SHA-256 -> contents of what came through LFS.
    """

    def __init__(self, folders):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.asked = folders, []
        self.taken, self.private, self.stored = {}, set(), {}
        self.large = ".safetensors"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code,
                    X_Error_Message=code, Content_Type="application/json")

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo == "org/gated":
            return self.refuse(403, "GatedRepo")
        if repo not in self.server.folders:
            return self.refuse(404, "RepoNotFound")
        folder = self.server.folders[repo]
        revision, _, file = path.partition(f"{repo}/")[2].partition("/")[2].partition("/")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if path.startswith("api/models/"):
            files = {p.relative_to(folder).as_posix(): p.read_bytes()
                     for p in sorted(folder.rglob("*")) if p.is_file()}
            found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files],
                     "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
            if f"{repo}/tree/" in path:
                found = [{"type": "file", "path": f, "size": len(x), "oid": oid(x)}
                         for f, x in files.items()]
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        content = (folder / file).read_bytes()
        if self.command == "GET":
            self.server.asked.append(f"{repo}/{file}")
        return self.answer(200, content, X_Repo_Commit=COMMIT,
                           ETag=f'"{oid(content)}"')

    do_HEAD = do_GET

    def answer_json(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        content, name = self.read(), self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != name:
            return self.refuse(400, "BadHash")
        self.server.stored[name] = content
        return self.answer(200)

    def do_POST(self):
        path, content = self.path.partition("?")[0].strip("/"), self.read()
        may_write = TOKENS.get(self.headers.get("Authorization"))
        if may_write is None:
            return self.refuse(401, "Unauthorized")
        if not may_write:
            return self.refuse(403, "Forbidden")
        if path == "api/repos/create":
            return self.create(json.loads(content))
        if path == "api/validate-yaml":
            front = json.loads(content)["content"].split("\n---\n")[0].removeprefix("---\n")
            return self.answer_json({"errors": [] if yaml.safe_load(front) else ["empty"],
                                     "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer_json({"transfer": "basic", "objects": [
                {**x, "actions": {"upload": {"href": f"{self.server.url}/store/{x['oid']}"}}}
                for x in json.loads(content)["objects"]
            ]})
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo not in self.server.taken:
            return self.refuse(404, "RepoNotFound")
        if "/preupload/" in path:
            return self.answer_json({"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(self.server.large) else "regular"}
                for f in json.loads(content)["files"]
            ]})
        return self.commit(repo, content)

    def create(self, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo}", "id": repo, "name": repo}
        if repo in self.server.taken:
            return self.answer_json({**url, "error": "You already created this model repo"}, 409)
        self.server.taken[repo] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        return self.answer_json(url)

    def commit(self, repo, content):
        for line in map(json.loads, content.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.taken[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.server.taken[repo][value["path"]] = self.server.stored[value["oid"]]
        self.answer_json({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}",
                          "commitOid": COMMIT})
