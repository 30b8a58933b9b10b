"""A Hugging Face Hub on this machine: the routes that the real client calls, over repositories in memory.

python tests/hub_server.py me/pocket=examples/pocket   # prints its address, and serves until its input closes
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_me": "me", "hf_you": "you"}


@dataclass
class Repository:
    """Commits are folders: the content of each file by its path. Branches and tags are names of commits."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, branch, files):
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]


class Refusal(Exception):
    """An answer other than 200, with the code by which the client knows it."""

    def __init__(self, status, code="", message=""):
        super().__init__(status)
        self.status, self.code, self.message = status, code, message


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by id.
        requests: every request so far: method, path, token and the range asked for.
        moved: new ids of repositories by their old ones.
        fault: called with each request's handler when its headers are read. It may raise `Refusal`, raise anything
            else to hang up in the middle of an upload, or set on the handler

            - `mute` to hang up when the request is done,
            - `cut` to the number of bytes after which an answer breaks off,
            - `claim` to a false size,
            - `forged` to headers in place of the true ones,
            - `content` to a body in place of the true one,
            - `flood` to bytes that are sent again and again, without a size, until the client hangs up,
            - `slow` to `headers` or `body`, which then come byte by byte, or to `silent`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {}
        self.requests = []
        self.moved = {}
        self.stopped = threading.Event()
        self.fault = lambda handler: None
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id, files, **settings):
        repository = self.repositories[repo_id] = Repository(**settings)
        repository.commit("main", dict(files))
        return repository

    def start(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def shutdown(self):
        self.stopped.set()
        super().shutdown()

    def handle_error(self, request, client_address):
        """Clients that hang up, and answers cut off on purpose, are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer(
            {
                r"/api/models": self.list_models,
                r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?": self.model_info,
                r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)": self.tree,
                r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)": self.resolve,
            }
        )

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(
            {
                r"/api/repos/create": self.create,
                r"/api/validate-yaml": self.validate,
                r"/api/models/(?P<id>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)": self.branch,
                r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)": self.preupload,
                r"/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)": self.commit,
                r"/api/models/(?P<id>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)": self.paths_info,
            }
        )

    def _answer(self, routes):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if url.path != "/api/agent-harnesses":  # which the client asks on its own account, without a token
            self.server.requests.append((self.command, url.path, self.token, self.headers.get("Range")))
        self.mute, self.cut, self.claim = False, None, None
        self.forged, self.content, self.flood, self.slow = {}, None, None, None
        refusal = None
        try:
            self.server.fault(self)
        except Refusal as error:
            refusal = error
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if refusal:
                raise refusal
            if answer := self._moved():
                routes = {re.escape(url.path): lambda: answer}
            for pattern, route in routes.items():
                if match := re.fullmatch(pattern, url.path):
                    answer = route(**{name: unquote(value or "main") for name, value in match.groupdict().items()})
                    break
            else:
                raise Refusal(404)
        except Refusal as refusal:
            content = json.dumps({"error": refusal.message}).encode()
            answer = refusal.status, content, {"X-Error-Code": refusal.code}
        if not isinstance(answer, tuple):
            answer = 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        self._send(*answer)

    def _send(self, status, content, headers):
        if self.mute:
            self.close_connection = True
            return
        if self.slow == "silent":
            self.server.stopped.wait()
        content = content if self.content is None else self.content
        size = len(content) if self.claim is None or self.command != "HEAD" else self.claim
        flood = self.flood if self.command != "HEAD" else None
        self.send_response(status)
        length = {} if flood else {"Content-Length": str(size)}
        for name, value in {**headers, **length, **self.forged}.items():
            self.send_header(name, value)
        if self.slow == "headers":
            self.wfile = _Slow(self.wfile, self.server.stopped)
        self.end_headers()
        if self.slow == "body":
            self.wfile = _Slow(self.wfile, self.server.stopped)
        if self.command != "HEAD":
            self.wfile.write(content[: self.cut])
        while flood and not self.server.stopped.is_set():
            self.wfile.write(flood)
        if self.cut is not None or self.flood:
            self.close_connection = True

    def _moved(self):
        """The answer for a repository that has another name now."""
        for old, new in self.server.moved.items():
            if f"/{old}" in self.path:
                return 307, b"", {"Location": self.path.replace(f"/{old}", f"/{new}", 1)}

    def _repository(self, id, write=False):
        """A repository that the token may read, or write."""
        repository = self.server.repositories.get(id)
        user = TOKENS.get(self.token)
        owner = user == id.split("/")[0]
        if repository is None or (repository.private and not owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not owner:
            raise Refusal(403 if user else 401, "", "You may not write here")
        return repository

    def _commit_of(self, repository, rev):
        sha = repository.branches.get(rev, rev)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha

    def create(self):
        request = json.loads(self.body)
        user = TOKENS.get(self.token)
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if (request.get("organization") or user) != user:
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        id = f"{user}/{request['name']}"
        answer = {"url": f"{self.server.endpoint}/{id}", "id": id}
        if id in self.server.repositories:
            return 409, json.dumps(answer | {"error": "You already created this model repo"}).encode(), {}
        private = request.get("private") or request.get("visibility") == "private"
        self.server.add(id, {".gitattributes": b""}, private=bool(private))
        return answer

    def validate(self):
        license = _front_matter({"README.md": json.loads(self.body)["content"].encode()}).get("license", "mit")
        if license in ("mit", "cc-by-4.0"):
            return {"errors": [], "warnings": []}
        errors = [{"message": '"license" must be one of [mit, cc-by-4.0]'}]
        return 400, json.dumps({"errors": errors, "warnings": []}).encode(), {"Content-Type": "application/json"}

    def branch(self, id, rev):
        repository = self._repository(id, write=True)
        if rev in repository.branches:
            raise Refusal(409, "", "Reference already exists")
        repository.branches[rev] = repository.branches["main"]
        return {}

    def preupload(self, id, rev):
        repository = self._repository(id)
        held = repository.commits[self._commit_of(repository, rev)]
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": _oid(held.get(file["path"]))}
            for file in json.loads(self.body)["files"]
        ]
        return {"files": files, "commitOid": "0" * 40}

    def commit(self, id, rev):
        pull_request = self.query.get("create_pr") == ["1"]
        repository = self._repository(id, write=not pull_request)
        sha = self._commit_of(repository, rev)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", sha) != sha:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[sha])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        branch = f"refs/pr/{len(repository.commits)}" if pull_request else rev
        sha = repository.commit(branch, files)
        url = f"{self.server.endpoint}/{id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{branch.split('/')[-1]}"} if pull_request else {})

    def model_info(self, id, rev):
        repository = self._repository(id)
        sha = self._commit_of(repository, rev)
        files = repository.commits[sha]
        card = _front_matter(files)
        base = card.get("base_model") or []
        bases = [base] if isinstance(base, str) else base
        tags = [*card.get("tags", []), card.get("library_name", "")]
        tags += [f"base_model:{card.get('base_model_relation')}:{base}" for base in bases]
        siblings = [{"rfilename": path} for path in files]
        if "blobs" in self.query:
            siblings = [sibling | {"size": len(files[sibling["rfilename"]])} for sibling in siblings]
        return {
            "_id": id,
            "id": id,
            "modelId": id,
            "sha": sha,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": card or None,
            "siblings": siblings,
        }

    def list_models(self):
        wanted = set(self.query.get("filter", []))
        user = TOKENS.get(self.token)
        visible = [id for id, held in self.server.repositories.items() if not held.private or user == id.split("/")[0]]
        models = [self.model_info(id, "main") for id in visible]
        found = [model for model in models if wanted <= set(model["tags"])][: int(self.query.get("limit", [1000])[0])]
        return found if "cardData" in self.query else [model | {"cardData": None} for model in found]

    def _entry(self, path, content):
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def tree(self, id, rev):
        repository = self._repository(id)
        return [self._entry(*file) for file in repository.commits[self._commit_of(repository, rev)].items()]

    def paths_info(self, id, rev):
        paths = parse_qs(self.body.decode()).get("paths", [])
        return [entry for entry in self.tree(id, rev) if entry["path"] in paths]

    def resolve(self, id, rev, path):
        repository = self._repository(id)
        user = TOKENS.get(self.token)
        if repository.gated and user != id.split("/")[0]:
            raise Refusal(403 if user else 401, "GatedRepo", "Access to the model is restricted")
        sha = self._commit_of(repository, rev)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        content = repository.commits[sha].get(path)
        if content is None:
            return 404, b"", headers | {"X-Error-Code": "EntryNotFound"}
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if first > last:
                raise Refusal(416, "", "Range Not Satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers


class _Slow:
    """A file that is written byte by byte, a hundred in a second, until the server stops."""

    def __init__(self, file, stopped):
        self.file, self.stopped = file, stopped

    def write(self, data):
        for byte in data:
            if self.stopped.wait(0.01):
                raise ConnectionAbortedError
            self.file.write(bytes([byte]))

    def __getattr__(self, name):
        return getattr(self.file, name)


def _oid(content):
    """What git calls a file of this content."""
    return None if content is None else hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def _front_matter(files):
    match = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
    try:
        return yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}


def main():
    server = HubServer().start()
    for argument in sys.argv[1:]:
        repo_id, folder = argument.split("=", 1)
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        server.add(repo_id, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    print(server.endpoint, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
