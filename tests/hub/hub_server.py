"""
A small Hub on the loopback interface, for the unmodified `huggingface_hub` client: repositories, commits, branches,
pull requests, LFS uploads, downloads with ranges, tokens, and faults on order. Everything is in memory.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "ada"
# No real tokens; markers that are looked for wherever text comes out.
TOKEN = "hf_" + "MARKER" * 5 + "zzzz"
OTHER_TOKEN = "hf_" + "SOMEONEELSE" * 3


@dataclass
class Fault:
    """
    What happens to the next `times` requests whose line matches `pattern`.

    Args:
        pattern (`str`): Searched in `"METHOD path"`.
        status (`int`): The answer; 0 cuts the connection after half of the body.
        headers (`dict`): Of the answer.
        times (`int`): How often.
    """

    pattern: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Repository:
    """Commits `sha -> {path: content}` and the refs that point at them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        state = [len(self.messages), ref, message, sorted((name, git_oid(content)) for name, content in files.items())]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".bin"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = [
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(.+?/.+?)/branch/(.+)", "branch"),
        ("POST", r"/api/models/(.+?/.+?)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/(.+?/.+?)/commit/(.+)", "commit"),
        ("GET", r"/api/models/(.+?/.+?)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/(.+?/.+?)/revision/(.+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("POST", r"/(.+?/.+?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w+)", "lfs_put"),
        ("GET|HEAD", r"/(.+?/.+?)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def log_message(self, *args):
        pass

    def answer(self, status: int, body=b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        if not isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, code: str, text: str) -> None:
        self.answer(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}"
        hub.requests.append((line, {name.lower(): value for name, value in self.headers.items()}))
        self.cut = False
        for fault in hub.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                if fault.status:
                    return self.answer(fault.status, {"error": "fault"}, fault.headers)
                self.cut = True
                break
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, name)(*map(unquote, match.groups()))
        self.error(404, "EntryNotFound", "no such route")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    # Who may

    def user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return self.server.hub.tokens.get(token, "") if scheme == "Bearer" else None

    def repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, or `None` after an answer that says why not, as the Hub words it."""
        repository, user = self.server.hub.repositories.get(repo_id), self.user()
        owner = repo_id.split("/")[0]
        if user == "" or (write and user is None):
            self.error(401, "", "Invalid username or password.")
        elif repository is None or (repository.private and user != owner):
            self.error(401 if user is None else 404, "RepoNotFound", "Repository not found")
        elif write and user != owner:
            self.error(403, "", "Forbidden: you don't have the rights")
        else:
            return repository
        return None

    # Writing

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        self.answer(200 if content.startswith("---\n") else 400, {"errors": [], "warnings": []})

    def create(self):
        wanted, user = json.loads(self.body), self.user()
        if not user:
            return self.error(401, "", "Invalid username or password.")
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        if not repo_id.startswith(user + "/"):
            return self.error(403, "", "Forbidden: you don't have the rights")
        repositories, url = self.server.hub.repositories, f"{self.server.hub.url}/{repo_id}"
        if repo_id in repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        repositories[repo_id] = Repository(wanted.get("visibility") == "private")
        repositories[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        self.answer(200, {"url": url, "name": repo_id})

    def branch(self, repo_id, name):
        if repository := self.repository(repo_id, write=True):
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            if name in repository.refs:
                return self.error(409, "", "Reference already exists")
            repository.refs[name] = repository.resolve(start)
            self.answer(200, {})

    def preupload(self, repo_id, revision):
        if repository := self.repository(repo_id, write=True):
            have = repository.commits.get(repository.resolve(revision), {})
            modes = []
            for entry in json.loads(self.body)["files"]:
                path, mode = entry["path"], "lfs" if is_lfs(entry["path"]) else "regular"
                old = have.get(path)
                oid = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
                modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": modes})

    def lfs_batch(self, repo_id):
        if self.repository(repo_id, write=True):
            objects = json.loads(self.body)["objects"]
            for entry in objects:
                if entry["oid"] not in self.server.hub.blobs:
                    entry["actions"] = {"upload": {"href": f"{self.server.hub.url}/lfs/{entry['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "", "content does not match its name")
        self.server.hub.blobs[oid] = self.body
        self.answer(200)

    def commit(self, repo_id, revision):
        if not (repository := self.repository(repo_id, write=True)):
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files = dict(repository.commits[repository.resolve(revision)])
        message = lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        answer = {}
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.hub.url}/{repo_id}/discussions/{number}"
        sha = repository.commit(revision, files, message)
        answer |= {"success": True, "commitOid": sha, "commitUrl": f"{self.server.hub.url}/{repo_id}/commit/{sha}"}
        self.answer(200, answer)

    # Reading

    def revision(self, repo_id, revision) -> tuple[str, dict[str, bytes]] | None:
        if repository := self.repository(repo_id):
            if sha := repository.resolve(revision):
                return sha, repository.commits[sha]
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def info(self, repo_id, revision="main"):
        if found := self.revision(repo_id, revision):
            sha, files = found
            private = self.server.hub.repositories[repo_id].private
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": repo_id, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision):
        if found := self.revision(repo_id, revision):
            entries = []
            for path, content in found[1].items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                if is_lfs(path):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self.answer(200, entries)

    def resolve(self, repo_id, revision, path):
        if not (found := self.revision(repo_id, revision)):
            return
        sha, files = found
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            text = "Entry not found"
            return self.answer(404, {"error": text}, {**headers, "X-Error-Code": "EntryNotFound"})
        content, status = files[path], 200
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)}"'
        if is_lfs(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted.group(1)), min(int(wanted.group(2) or 1 << 60), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if not self.cut:
            return self.answer(status, content, headers)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True


class HubServer:
    """`with HubServer({"token": "user"}) as hub:` serves at `hub.url`; `faults` are orders, `requests` a log."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.server.shutdown()
        self.server.server_close()

    def lines(self, pattern: str) -> list[str]:
        """The request lines that match."""
        return [line for line, _ in self.requests if re.search(pattern, line)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]
