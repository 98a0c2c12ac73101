"""What the loopback Hub stores, and its routes: what each checks, changes and answers."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

from hub_metadata import check_card


USERS = {
    "hf_dummy": {"name": "tester", "role": "write", "orgs": [{"name": "lab", "roleInOrg": "write"}]},
    "hf_reader": {"name": "tester", "role": "read", "orgs": []},
}
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".parquet", ".arrow", ".pt", ".pth")
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILE_REPO = r"(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it went through LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """The history of one repo, oldest commit first; `refs` are its branches and tags."""

    id: str
    private: bool = False
    history: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        listing = "".join(f"{path}\0{blob.sha256}\n" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.history)}\n{title}\n{listing}".encode()).hexdigest()
        self.history.append(Commit(oid, title, files))
        self.refs[branch] = oid
        return self.history[-1]

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        for commit in self.history:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Refusal(Exception):
    """An error answer: JSON body, and the headers from which the client makes its exception."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Hub(Protocol):
    """What the routes need of the server."""

    endpoint: str
    repos: dict[tuple[str, str], Repo]
    uploads: dict[str, bytes]

    def repo(self, repo_id: str, kind: str = "models") -> Repo: ...


@dataclass
class Request:
    """One request, as the routes see it."""

    hub: Hub
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def user(self) -> dict[str, Any]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            raise Refusal(401, "Invalid username or password.")
        if token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def writer(self, repo_id: str) -> dict[str, Any]:
        user = self.user()
        allowed = {user["name"], *(org["name"] for org in user["orgs"] if org["roleInOrg"] != "read")}
        if user["role"] == "read" or repo_id.split("/")[0] not in allowed:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return user

    def readable(self, repo_id: str, kind: str | None) -> Repo:
        repo = self.hub.repo(repo_id, kind or "models")
        if repo.private:
            try:
                self.writer(repo_id)
            except Refusal:
                raise Refusal(401, "Repository not found", "RepoNotFound") from None
        return repo


@dataclass
class Answer:
    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, path: str) -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Answer:
    user = request.user()
    access = {"accessToken": {"displayName": "test", "role": user["role"]}}
    return Answer({"type": "user", "name": user["name"], "orgs": user["orgs"], "auth": access})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    errors, warnings = check_card(request.json()["content"])
    answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(answer, 400 if errors else 200)


def _named(request: Request) -> tuple[str, str]:
    body = request.json()
    owner = body.get("organization") or request.user()["name"]
    return body.get("type", "model") + "s", f"{owner}/{body['name']}"


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> Answer:
    kind, repo_id = _named(request)
    request.writer(repo_id)
    url = f"{request.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
    if (kind, repo_id) in request.hub.repos:
        return Answer({"error": "You already created this repo", "url": url}, 409)
    repo = Repo(repo_id, private=request.json().get("visibility") == "private")
    repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
    request.hub.repos[kind, repo_id] = repo
    return Answer({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Answer:
    kind, repo_id = _named(request)
    request.writer(repo_id)
    request.hub.repo(repo_id, kind)
    del request.hub.repos[kind, repo_id]
    return Answer({})


@route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, kind: str, repo: str, revision: str) -> Answer:
    request.writer(repo)
    present = request.hub.repo(repo, kind).at(revision).files
    answer = []
    for file in request.json()["files"]:
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
        entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answer.append(entry | ({"oid": present[file["path"]].etag} if file["path"] in present else {}))
    return Answer({"files": answer})


@route("POST", rf"/{FILE_REPO}\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, kind: str | None, repo: str) -> Answer:
    request.writer(repo)
    request.hub.repo(repo, kind or "models")
    objects = []
    for entry in request.json()["objects"]:
        links = {name: {"href": f"{request.hub.endpoint}/lfs/{name}/{entry['oid']}"} for name in ("upload", "verify")}
        missing = entry["oid"] not in request.hub.uploads
        objects.append({"oid": entry["oid"], "size": entry["size"]} | ({"actions": links} if missing else {}))
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The sha256 of the upload differs from its oid")
    request.hub.uploads[oid] = request.body
    return Answer({})


@route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
def lfs_verify(request: Request, oid: str) -> Answer:
    if len(request.hub.uploads.get(oid, b"")) != request.json()["size"]:
        raise Refusal(400, "The size of the upload differs from the announced one")
    return Answer({})


@route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)")
def commit(request: Request, kind: str, repo: str, revision: str) -> Answer:
    request.writer(repo)
    store = request.hub.repo(repo, kind)
    head = store.at(revision)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, head.oid):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(request.hub, files, line["key"], line["value"])
    errors, _ = check_card(files["README.md"].content.decode()) if "README.md" in files else ([], [])
    if errors:
        raise Refusal(400, "; ".join(errors))
    made = store.commit(revision, header["summary"], files)
    return Answer({"commitOid": made.oid, "commitUrl": f"{request.hub.endpoint}/{repo}/commit/{made.oid}"})


def _apply(hub: Hub, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"], validate=True), False)
    elif key == "lfsFile":
        content = hub.uploads.get(value["oid"])
        if content is None or len(content) != value.get("size", len(content)):
            raise Refusal(400, f"LFS object of {path} is missing or has another size")
        files[path] = Blob(content, True)
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise Refusal(400, f"Unknown operation {key}")


@route("POST", f"/api/{REPO}/(?:branch|tag)/(?P<revision>[^/]+)")
def create_ref(request: Request, kind: str, repo: str, revision: str) -> Answer:
    request.writer(repo)
    store = request.hub.repo(repo, kind)
    body = json.loads(request.body or b"{}")
    # For a tag the revision of the route is its target and the body names it; for a branch it is the other way round.
    name, start = (body["tag"], revision) if "tag" in body else (revision, body.get("startingPoint") or "main")
    if name in store.refs:
        raise Refusal(409, f"Reference already exists: {name}")
    store.refs[name] = store.at(start).oid
    return Answer({})


@route("GET", f"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def info(request: Request, kind: str, repo: str, revision: str | None) -> Answer:
    store = request.readable(repo, kind)
    at = store.at(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(at.files)]
    fixed = {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}
    dates = {"createdAt": DATE, "lastModified": DATE}
    return Answer({"id": repo, "sha": at.oid, "private": store.private, "siblings": siblings, **fixed, **dates})


@route("GET", f"/api/{REPO}/refs")
def refs(request: Request, kind: str, repo: str) -> Answer:
    store = request.readable(repo, kind)
    branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in store.refs.items()]
    return Answer({"branches": branches, "tags": [], "converts": []})


@route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(request: Request, kind: str, repo: str, revision: str, folder: str | None) -> Answer:
    files = request.readable(repo, kind).at(revision).files
    prefix = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    recursive = request.flag("recursive")
    folders = {
        str(parent)
        for path in inside
        for parent in list(Path(path).parents)[:-1]
        if str(parent).startswith(prefix) and (recursive or "/" not in str(parent)[len(prefix) :])
    }
    listed = {path: blob for path, blob in inside.items() if recursive or "/" not in path[len(prefix) :]}
    return Answer(
        [_folder_entry(path) for path in sorted(folders)] + [_entry(*item) for item in sorted(listed.items())]
    )


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    pointer = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid, **pointer}


@route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Request, kind: str, repo: str, revision: str) -> Answer:
    files = request.readable(repo, kind).at(revision).files
    as_json = "json" in (request.headers.get("Content-Type") or "")
    paths = request.json()["paths"] if as_json else parse_qs(request.body.decode())["paths"]
    known = [_entry(path, files[path]) for path in paths if path in files]
    folders = [_folder_entry(path) for path in paths if any(name.startswith(f"{path}/") for name in files)]
    return Answer(known + folders)


@route("GET", f"/{FILE_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
@route("HEAD", f"/{FILE_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Request, kind: str | None, repo: str, revision: str, path: str) -> Answer:
    at = request.readable(repo, kind).at(revision)
    headers = {"X-Repo-Commit": at.oid}
    if path not in at.files:
        missing = Refusal(404, "Entry not found", "EntryNotFound")
        missing.headers |= headers
        raise missing
    blob = at.files[path]
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if part is None:
        return Answer(blob.content, 200, headers)
    start, end = int(part[1]), int(part[2] or len(blob.content) - 1)
    span = {"Content-Range": f"bytes {start}-{end}/{len(blob.content)}"}
    return Answer(blob.content[start : end + 1], 206, headers | span)
