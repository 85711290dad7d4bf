"""A small Hub on the loopback interface: repositories with branches, LFS uploads, commits and range requests.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})

It can be told to fail: `hub.fail("PUT", "/lfs/", status=503, times=2)`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in commits if commit.sha == revision), None)


@dataclass
class Fault:
    """What happens to the next `times` matching requests, instead of a response.

    Attributes:
        status: HTTP status of the response.
        cut_after: close the connection after this many bytes of the body.
        wrong_bytes: respond with the same number of bytes, but different content.
        stall_after: send this many bytes of the body, and then nothing until the client disconnects.
        answer_lost: process the request, but respond with `status`.
        skip: this many matching requests are handled normally first.
    """

    method: str
    path: str
    times: int
    status: int | None = None
    cut_after: int | None = None
    wrong_bytes: bool = False
    stall_after: int | None = None
    answer_lost: bool = False
    skip: int = 0


@dataclass
class State:
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    before_commit: list = field(default_factory=list)  # called once each when a commit comes in
    stalled: threading.Event = field(default_factory=threading.Event)  # a client waits for the rest of a file
    lock: threading.RLock = field(default_factory=threading.RLock)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def oid(path: str, content: bytes) -> str:
    return sha256(content) if path.endswith(LFS_SUFFIXES) else git_oid(content)


def make_commit(parent: Commit | None, message: str, files: dict[str, bytes]) -> Commit:
    text = json.dumps([parent and parent.sha, message, {path: sha256(content) for path, content in files.items()}])
    return Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_: object) -> None:
        pass

    # Responses

    def answer(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, code: str, message: str = "") -> None:
        self.answer(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code})

    def meet_fault(self) -> Fault | None:
        """The fault that applies to this request; faults with a status are handled here."""
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, self.path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    # Requests

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "PUT" else b""
        with self.state.lock:
            self.state.requests.append((self.command, unquote(url.path), self.headers.get("Range")))
        self.fault = self.meet_fault()
        if self.fault is not None and self.fault.status is not None and not self.fault.answer_lost:
            self.close_connection = self.command == "PUT"  # its body was not read
            return self.error(self.fault.status, "Fault", "a fault of the test")
        is_open = self.command in ("GET", "HEAD") or self.path.startswith(("/lfs/", "/api/validate-yaml"))
        if not is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.error(401, "Unauthorized", "Invalid username or password.")
        for method, pattern, action in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, url.path)):
                return action(self, *map(unquote, match.groups()))
        return self.error(404, "RouteNotFound", self.path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repository(self, name: str) -> Repository | None:
        repository = self.state.repositories.get(name)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not authorized):
            self.error(404 if authorized else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def commit(self, name: str, revision: str) -> Commit | None:
        repository = self.repository(name)
        if repository is None:
            return None
        found = repository.find(revision)
        if found is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": "user"})

    def create_repository(self) -> None:
        options = json.loads(self.body)
        name = f"{options.get('organization') or 'user'}/{options['name']}"
        with self.state.lock:
            if name in self.state.repositories:
                url = f"http://{self.headers['Host']}/{name}"
                return self.answer(409, {"error": "You already created this model repo", "url": url})
            empty = make_commit(None, "initial commit", {".gitattributes": b""})
            self.state.repositories[name] = Repository(options.get("visibility") == "private", {"main": [empty]})
        self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})

    def create_branch(self, name: str, branch: str) -> None:
        repository = self.repository(name)
        if repository is None:
            return
        if branch.startswith("refs/"):
            return self.error(400, "BadRequest", f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            return self.error(409, "Conflict", "Reference already exists")
        repository.branches[branch] = list(repository.branches["main"])
        self.answer(200, {})

    def info(self, name: str, revision: str = "main") -> None:
        commit = self.commit(name, revision)
        if commit is not None:
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            private = self.state.repositories[name].private
            self.answer(200, {"id": name, "sha": commit.sha, "siblings": siblings, "private": private, "tags": []})

    def tree(self, name: str, revision: str, _path: str = "") -> None:
        commit = self.commit(name, revision)
        if commit is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                for path, content in sorted(commit.files.items())
            ]
            self.answer(200, entries)

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = oid(path, commit.files[path]) if path in commit.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if self.repository(name) is None:
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.state.uploads:
                href = f"http://{self.headers['Host']}/lfs/{entry['oid']}"
                entry = {**entry, "actions": {"upload": {"href": href, "header": {}}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_lfs(self, name: str) -> None:
        length = int(self.headers["Content-Length"])
        if self.fault is not None and self.fault.cut_after is not None:
            self.rfile.read(min(length, self.fault.cut_after))
            self.connection.close()
            self.close_connection = True
            return
        content = self.rfile.read(length)
        if sha256(content) != name:
            return self.error(400, "BadRequest", "another SHA-256")
        self.state.uploads[name] = content
        self.answer(200, {})

    def receive_commit(self, name: str, revision: str) -> None:
        base = self.commit(name, revision)
        if base is None:
            return
        while self.state.before_commit:
            self.state.before_commit.pop()()
        repository = self.state.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.state.lock:
            base = repository.find(revision)
            if header.get("parentCommit") not in (None, base.sha):
                return self.error(412, "PreconditionFailed", "A commit has happened since.")
            files = dict(base.files)
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "deletedFile":
                    del files[path]
                elif line["key"] == "lfsFile":
                    files[path] = self.state.uploads[line["value"]["oid"]]
                else:
                    files[path] = base64.b64decode(line["value"]["content"])
            commit = make_commit(base, header["summary"], files)
            url = f"http://{self.headers['Host']}/{name}"
            answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
            if "create_pr" in self.query:
                number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
                repository.branches[f"refs/pr/{number}"] = [*repository.branches[revision], commit]
                answer["pullRequestUrl"] = f"{url}/discussions/{number}"
            else:
                repository.branches[revision].append(commit)
        if self.fault is not None and self.fault.answer_lost:
            return self.error(self.fault.status, "Fault", "a fault of the test")
        self.answer(200, answer)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        if path not in commit.files:
            return self.error(404, "EntryNotFound", f"{path} does not exist")
        content = commit.files[path]
        headers = {
            "ETag": f'"{oid(path, content)}"',
            "X-Repo-Commit": commit.sha,
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            headers["Content-Range"] = f"bytes {match[1]}-{len(content) - 1}/{len(content)}"
            content, status = content[int(match[1]) :], 206
        if self.fault is not None and self.fault.wrong_bytes:
            content = content[:-4] + bytes(byte ^ 1 for byte in content[-4:])
        if self.fault is not None and self.command == "GET":
            sent = self.fault.cut_after if self.fault.stall_after is None else self.fault.stall_after
            if sent is not None:
                return self.send_part(status, content, headers, sent)
        self.answer(status, content, headers)

    def send_part(self, status: int, content: bytes, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content[:length])
        self.wfile.flush()
        if self.fault.stall_after is not None:
            self.state.stalled.set()
            self.connection.recv(1)  # returns when the client has gone
        self.connection.close()
        self.close_connection = True


REPO = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(.+)", Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(.+)", Handler.receive_commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", Handler.put_lfs),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)/?(.*)", Handler.tree),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)


class HubServer:
    def __init__(self) -> None:
        self.state = State()
        handler = type("BoundHandler", (Handler,), {"state": self.state})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables that make huggingface_hub use this server, with its own cache."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # Xet is another protocol, for which there is no server here
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def use_in_this_process(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Like `environment`, but for the huggingface_hub that is already imported here. Faster than a new process."""
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", self.endpoint)  # of functions, made when imported
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made at its first use, for the Hub of that time
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def host(self, name: str, folder: Path) -> None:
        """Puts a folder's files into a new repository, as if they had been pushed."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.state.repositories[name] = Repository(False, {"main": [make_commit(None, "Upload model", files)]})

    def fail(self, method: str, path: str, times: int = 1, **what: object) -> None:
        self.state.faults.append(Fault(method, path, times, **what))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.state.repositories[name].find(revision).files

    def requests(self, method: str, path: str) -> list[tuple[str, str, str | None]]:
        return [request for request in self.state.requests if request[0] == method and re.search(path, request[1])]
