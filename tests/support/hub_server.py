"""A stand-in for the Hugging Face hub: the part of its API by which models are pushed and loaded, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants

TOKEN = "hf_of_the_stand_in"
LFS_BYTES = 20_000
"""Files from this size on are large ones, as are weights of any size."""


@dataclass
class Repository:
    """A model repository: the files of every commit, the last one being the head."""

    is_private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def at(self, revision: str) -> dict[str, bytes]:
        return self.files if revision == "main" else self.commits[int(revision, 16)]

    @property
    def head(self) -> str:
        return f"{len(self.commits) - 1:040x}"


class Hub:
    """What the server holds.

    Attributes:
        repositories: By OWNER/NAME.
        large: Contents of large files by their SHA-256.
        requests: Method and path of every request, in order.
        refused: Paths that are answered with a status and a text instead, by a pattern.
        damages: Names of files whose content is stored with one byte changed.
        role: Of the token.
        organizations: Of the user, by name: the user's role.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refused: dict[str, tuple[int, str]] = {}
        self.damages: set[str] = set()
        self.role = "write"
        self.organizations: dict[str, str] = {}


def is_large(name: str, size: int) -> bool:
    return name.endswith(".safetensors") or size >= LFS_BYTES


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, content: Any = None, status: int = 200, body: bytes | None = None, **headers: Any) -> None:
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path, length = unquote(urlsplit(self.path).path), int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, (status, text) in self.hub.refused.items():
            if re.search(pattern, path):
                return self._answer({"error": text}, status, X_Error_Message=text)
        if self.command == "PUT":
            self.hub.large[path.rpartition("/")[2]] = body
            return self._answer(body=b"")
        if not path.startswith(("/api/validate-yaml",)) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, method in (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/commit/main", self._commit),
            (r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>\w+)", self._tree),
            (r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>\w+))?", self._info),
            (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<file>.+)", self._resolve),
        ):
            if (found := re.fullmatch(pattern, path)) is not None:
                return method(body, **{key: value or "main" for key, value in found.groupdict().items()})
        return self._answer({"error": f"the stand-in has no {path}"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _whoami(self, body: bytes) -> None:
        organizations = [{"name": name, "roleInOrg": role} for name, role in self.hub.organizations.items()]
        token = {"role": self.hub.role}
        self._answer({"type": "user", "name": "me", "auth": {"accessToken": token}, "orgs": organizations})

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories.setdefault(name, Repository(is_private))
        self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def _validate(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str) -> None:
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        self._answer(
            {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": modes[is_large(each["path"], each["size"])],
                        "shouldIgnore": False,
                    }
                    for each in files
                ]
            }
        )

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                assert value.get("parentCommit", repository.head) == repository.head
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert hashlib.sha256(self.hub.large[value["oid"]]).hexdigest() == value["oid"]
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        for damaged in self.hub.damages & files.keys():
            files[damaged] = bytes([files[damaged][0] ^ 1]) + files[damaged][1:]
        repository.commits.append(files)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repository.head}", "commitOid": repository.head})

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"size": len(content), "blobId": blob, **({"lfs": lfs} if is_large(name, len(content)) else {})}

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repositories[name].at(revision)
        self._answer(
            [
                {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
                for path, content in files.items()
            ]
        )

    def _info(self, body: bytes, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [
            {"rfilename": path, **self._entry(path, content)} for path, content in repository.at(revision).items()
        ]
        sha = repository.head if revision == "main" else revision
        self._answer({"id": name, "sha": sha, "private": repository.is_private, "tags": [], "siblings": siblings})

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories[name]
        content = repository.at(revision).get(file)
        if content is None:
            return self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        sha = repository.head if revision == "main" else revision
        self._answer(body=content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)


def use_in_library(patch: Any, url: str, token: str = TOKEN) -> None:
    """Makes the library of this process take the stand-in for the hub; `patch` is pytest's MonkeyPatch."""
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # the hub's newer storage
    }.items():
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setenv("HF_TOKEN", token)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs a stand-in on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
