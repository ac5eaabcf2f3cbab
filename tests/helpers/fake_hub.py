"""A Hugging Face hub in this process: it answers what `huggingface_hub` really sends, and keeps what arrives.

It speaks as much of the hub's HTTP interface as an upload and a download need: who am I, repositories and branches, the check
of a card's metadata, uploads of large files by Git LFS, commits as lines of JSON, and files of a revision.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_aTokenThatNobodyElseHas"
USER, GROUP = "me", "laboratory"
# of the hub's list, as many as tests name
LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "other"}


@dataclass
class Repository:
    """A repository of the hub.

    Attributes:
        private: Whether others may see it.
        branches: Name -> commits, each the files of the repository by their names.
        large: SHA-256 -> contents of the large files that have arrived.
    """

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})
    large: dict[str, bytes] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit of main."""
        return self.branches["main"][-1]


@dataclass
class FakeHub:
    """A hub that runs.

    Attributes:
        url: Its address.
        repositories: By `OWNER/NAME`.
        writable: Owners whose repositories the token may write.
        requests: (method, path, content) of each request, in the order in which they arrived.
        failures: Part of a path -> statuses with which the next requests to it fail.
        token: The token that it takes.
        xet: Where its newer storage is, as the storage's own library names it: `local://` and a folder. Its contents are not
            known to this hub, which takes its commits on trust.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    writable: set[str] = field(default_factory=lambda: {USER, GROUP})
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    token: str = TOKEN
    xet: str = ""

    def asked(self, part: str) -> int:
        """How many requests had `part` in their path."""
        return sum(part in path for _, path, _ in self.requests)


class RefusalError(Exception):
    """An answer that is none."""

    def __init__(self, status: int, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def sha_of(files: dict[str, bytes], count: int) -> str:
    """The name of a commit."""
    digest = hashlib.sha1(str(count).encode())
    for name, content in sorted(files.items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self._content()
        self.hub.requests.append((self.command, path, content))
        try:
            for part, statuses in self.hub.failures.items():
                if part in path and statuses:
                    raise RefusalError(statuses.pop(0), "as the test asked for")
            for method, pattern, answer in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    return answer(self, content, *found.groups())
            raise RefusalError(404, f"no such route: {self.command} {path}")
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _authorise(self, owner: str | None = None) -> None:
        """Raises RefusalError for a request without the token, and for one that writes what is another's."""
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise RefusalError(401, "Invalid username or password.")
        if owner is not None and owner not in self.hub.writable:
            raise RefusalError(403, f"you have no rights to write what is {owner}'s")

    def _repository(self, name: str, revision: str | None = None) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        if revision is not None and revision not in found.branches:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # -- answers ------------------------------------------------------------------------------------------------------

    def who_am_i(self, _: bytes) -> None:
        self._authorise()
        self._json({"type": "user", "name": USER, "orgs": [{"name": GROUP, "type": "org"}]})

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        owner = asked.get("organization") or USER
        self._authorise(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json({"url": f"{self.hub.url}/{name}"})

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        repository = self._repository(name, revision or "main")
        if repository.private:
            self._authorise()
        commits = repository.branches[revision or "main"]
        files = [{"rfilename": name} for name in commits[-1]]
        sha = sha_of(commits[-1], len(commits))
        self._json({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": files})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        self._authorise(name.split("/")[0])
        repository = self._repository(name)
        if branch in repository.branches:
            raise RefusalError(409, "Reference already exists")
        repository.branches[branch] = [repository.files]
        self._json({})

    def validate(self, content: bytes) -> None:
        text = json.loads(content)["content"]
        found = re.match(r"---\n(.*?)\n---\n", text, re.S)
        wrong = []
        try:
            data = yaml.safe_load(found[1]) if found else {}
            if data.get("license", "other") not in LICENSES:
                wrong = [{"message": f'"license" must be one of [{", ".join(sorted(LICENSES))}]'}]
            # an index without a value is one that no page can show
            for model in data.get("model-index", []):
                assert all(metric["value"] is not None for r in model["results"] for metric in r["metrics"])
        except (yaml.YAMLError, KeyError, AssertionError) as error:
            wrong = [{"message": f"invalid metadata: {error}"}]
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, content: bytes, name: str, revision: str) -> None:
        self._authorise(name.split("/")[0])
        here = self._repository(name, revision).branches[revision][-1]
        answers = []
        for file in json.loads(content)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in here:
                old = here[file["path"]]
                answer["oid"] = hashlib.sha256(old).hexdigest() if mode == "lfs" else git_hash(old)
            answers.append(answer)
        self._json({"files": answers, "commitOid": "0" * 40})

    def lfs_batch(self, content: bytes, name: str) -> None:
        self._authorise(name.split("/")[0])
        repository = self._repository(name)
        objects = []
        for wanted in json.loads(content)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.large:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{name}/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify/{name}"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, content: bytes, name: str, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "the content is not what was announced")
        self._repository(name).large[oid] = content
        self._send(200, b"")

    def xet_token(self, _: bytes, name: str, __: str) -> None:
        self._authorise(name.split("/")[0])
        told = {"casUrl": self.hub.xet, "accessToken": "of xet", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": self.hub.xet,
            "X-Xet-Access-Token": "of xet",
            "X-Xet-Token-Expiration": str(told["exp"]),
        }
        self._send(200, json.dumps(told).encode(), headers)

    def lfs_verify(self, content: bytes, name: str) -> None:
        asked = json.loads(content)
        if len(self._repository(name).large.get(asked["oid"], b"")) != asked["size"]:
            raise RefusalError(404, "no such object")
        self._json({})

    def commit(self, content: bytes, name: str, revision: str) -> None:
        self._authorise(name.split("/")[0])
        repository = self._repository(name, revision)
        files = dict(repository.branches[revision][-1])
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if self.hub.xet:
                    repository.large.setdefault(value["oid"], b"")
                if value["oid"] not in repository.large:
                    raise RefusalError(400, f"{value['path']} has not been uploaded")
                files[value["path"]] = repository.large[value["oid"]]
        repository.branches[revision].append(files)
        sha = sha_of(files, len(repository.branches[revision]))
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository.private:
            self._authorise()
        commits = [
            (sha_of(files, number), files) for b in repository.branches.values() for number, files in enumerate(b, 1)
        ]
        newest = repository.branches.get(revision, [{}])[-1]
        sha, files = next((c for c in commits if c[0] == revision or c[1] is newest), ("", None))
        if files is None:
            raise RefusalError(404, "Invalid rev id", "RevisionNotFound")
        if file not in files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_hash(files[file])}"', "Accept-Ranges": "bytes"}
        self._send(200, files[file], headers | {"Content-Type": "application/octet-stream"})


_NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.who_am_i),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(.+))?", Handler.info),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", rf"/lfs/{_NAME}/(\w+)", Handler.lfs_put),
    ("GET", rf"/api/models/{_NAME}/xet-(?:write|read)-token/(.+)", Handler.xet_token),
    ("POST", rf"/lfs-verify/{_NAME}", Handler.lfs_verify),
    ("GET", rf"/{_NAME}/resolve/(.+?)/(.+)", Handler.resolve),
    ("HEAD", rf"/{_NAME}/resolve/(.+?)/(.+)", Handler.resolve),
]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub on a port of this machine while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
