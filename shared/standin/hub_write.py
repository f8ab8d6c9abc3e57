"""The Hub's write side: create, settings, preupload, commit, and Git LFS's batch, upload and verify.

As ``huggingface_hub`` 2.4 asks for them with ``HF_HUB_DISABLE_XET=1``; Xet's own protocol is not spoken. Large and
binary files must go through LFS, as on the real Hub: a commit that holds one inline is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from fnmatch import fnmatch
from typing import Any
from urllib.parse import unquote

import orjson

from shared.standin import hub_data, hub_models, hub_store
from shared.standin.wire import RefusedError, Reply, Request

USER = "standin"
"""Whose every token is."""
READ_ONLY = "read-only-key"
"""A token that may not write."""
OTHERS = hub_data.namespaces() | {repo_id.partition("/")[0] for repo_id in hub_models.MODELS}
"""Organizations that :data:`USER` is no member of; of every other name it is."""
LARGE = ("*.safetensors", "*.parquet", "*.bin", "*.npz", "*.npy", "*.gguf", "*.zip", "*.gz")
LARGE_BYTES = 10_000_000
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()
"""The file of the first commit of every repository."""

_WRITE = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit|settings)(?:/([^/]+))?$")
_BATCH = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$")
_OBJECT = re.compile(r"/lfs/(upload|verify)/([0-9a-f]{64})$")
_announced: dict[str, int] = {}
"""Size by SHA-256 of what may be uploaded: the address of an upload is its permission, as with a signed URL."""


def handle(request: Request) -> Reply | None:
    """The answer to a request that writes; None for one that does not.

    Raises:
        RefusedError: it is refused.
    """
    path = request.path
    if path == "/api/repos/create" and request.method == "POST":
        return _create(request)
    if path == "/api/validate-yaml" and request.method == "POST":
        return Reply(200, {"errors": [], "warnings": []})
    if (match := _OBJECT.match(path)) and request.method in ("PUT", "POST"):
        return _upload(request, match[2]) if match[1] == "upload" else _verify(request, match[2])
    if (match := _BATCH.match(path)) and request.method == "POST":
        _writable(request, "dataset" if match[1] else "model", unquote(match[2]))
        return _batch(request)
    if (match := _WRITE.match(path)) and request.method in ("POST", "PUT"):
        kind, repo_id, verb, revision = match[1], unquote(match[2]), match[3], unquote(match[4] or "main")
        _writable(request, kind, repo_id)
        if verb == "settings":
            return _settings(request, kind, repo_id)
        if revision != "main":
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return _preupload(request, kind, repo_id) if verb == "preupload" else _commit(request, kind, repo_id)
    return None


def _check_token(request: Request) -> None:
    if not request.key:
        raise RefusedError(401, "Invalid username or password.")
    if request.key == READ_ONLY:
        raise RefusedError(403, "you need a token with the role write; this one has the role read")


def _writable(request: Request, kind: str, repo_id: str) -> None:
    _check_token(request)
    if repo_id.partition("/")[0] in OTHERS:
        raise RefusedError(403, f"you have no write access to {kind} {repo_id}")
    if hub_store.repository(kind, repo_id) is None:
        raise RefusedError(404, "Repository not found", "RepoNotFound")


# ---------------------------------------------------------------- repositories


def _create(request: Request) -> Reply:
    _check_token(request)
    asked = request.json
    kind, name = asked.get("type") or "model", asked.get("name")
    repo_id = f"{asked.get('organization') or USER}/{name}"
    if kind not in ("model", "dataset") or not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise RefusedError(400, f"no repository can be made of the kind {kind!r} with the name {name!r}")
    if repo_id.partition("/")[0] in OTHERS:
        raise RefusedError(403, f'you do not have the rights to create a {kind} under the namespace of "{repo_id}"')
    private = asked.get("visibility") == "private"
    url = _page(request, kind, repo_id)
    if not hub_store.create(kind, repo_id, private=private, files={".gitattributes": GIT_ATTRIBUTES}):
        return Reply(409, {"error": f"You already created this {kind} repo", "url": url})
    return Reply(200, {"url": url, "name": repo_id, "id": "0" * 24})


def _settings(request: Request, kind: str, repo_id: str) -> Reply:
    asked, wanted = request.json, {}
    if "visibility" in asked:
        wanted["private"] = asked["visibility"] == "private"
    if "gated" in asked:
        wanted["gated"] = asked["gated"] in ("auto", "manual")
    hub_store.change(kind, repo_id, wanted)
    return Reply(200, wanted)


def _page(request: Request, kind: str, repo_id: str) -> str:
    return f"http://{request.headers.get('host', '127.0.0.1')}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


# ---------------------------------------------------------------- commits


def _preupload(request: Request, kind: str, repo_id: str) -> Reply:
    """How each file is to be sent, and what is there under its name already."""
    repository = hub_store.repository(kind, repo_id)
    assert repository is not None
    main, answers = repository.refs["main"], []
    for file in request.json["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        answer = {
            "path": path,
            "uploadMode": "lfs" if _is_large(path, file["size"], sample) else "regular",
            "shouldIgnore": False,
        }
        if path in main.files:
            answer["oid"] = main.etag(path)
        answers.append(answer)
    return Reply(200, {"files": answers})


def _is_large(path: str, size: int, sample: bytes) -> bool:
    return size > LARGE_BYTES or b"\0" in sample or any(fnmatch(path.rpartition("/")[2], one) for one in LARGE)


def _commit(request: Request, kind: str, repo_id: str) -> Reply:
    try:
        lines = [orjson.loads(line) for line in request.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files, gone = _changes([line for line in lines if line["key"] != "header"])
    except (orjson.JSONDecodeError, binascii.Error, KeyError, TypeError, StopIteration) as error:
        raise RefusedError(400, f"malformed commit: {type(error).__name__} {error}") from None
    sha = hub_store.commit(kind, repo_id, header.get("parentCommit"), str(header["summary"]), files, gone)
    if sha is None:
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    url = f"{_page(request, kind, repo_id)}/commit/{sha}"
    return Reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _changes(lines: list[dict[str, Any]]) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """Contents to put in by path, kept, with whether they are large; and paths to remove."""
    files: dict[str, tuple[str, bool]] = {}
    gone: list[str] = []
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise RefusedError(400, f"not a path in a repository: {path!r}")
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            if data and _is_large(path, len(data), data[:512]):  # the client sends an empty file inline always
                raise RefusedError(400, f"{path} is large or binary: it must be uploaded with Git LFS")
            files[path] = hub_store.keep(data), False
        elif key == "lfsFile":
            data_or_none = hub_store.blob(value["oid"])
            if data_or_none is None or len(data_or_none) != value.get("size", len(data_or_none)):
                raise RefusedError(400, f"{path}: its content was not uploaded, or has another size")
            files[path] = value["oid"], True
        elif key in ("deletedFile", "deletedFolder"):
            gone.append(path.rstrip("/") + "/" if key == "deletedFolder" else path)
        else:
            raise RefusedError(400, f"a commit cannot hold {key!r}")
    return files, gone


# ---------------------------------------------------------------- Git LFS


def _batch(request: Request) -> Reply:
    asked = request.json
    if asked.get("operation") != "upload" or "basic" not in asked.get("transfers", ["basic"]):
        raise RefusedError(400, "only uploads with the transfer 'basic' are served here")
    base, objects = f"http://{request.headers.get('host', '127.0.0.1')}/lfs", []
    for item in asked["objects"]:
        oid, size = str(item["oid"]), int(item["size"])
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid):
            answer["error"] = {"code": 422, "message": f"not a SHA-256: {oid}"}
        elif hub_store.blob(oid) is None:  # what is there is not asked for again
            _announced[oid] = size
            answer["actions"] = {name: {"href": f"{base}/{name}/{oid}"} for name in ("upload", "verify")}
        objects.append(answer)
    return Reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})


def _upload(request: Request, oid: str) -> Reply:
    if _announced.get(oid) is None:
        raise RefusedError(403, "this address was not given out, or has expired")
    if len(request.body) != _announced[oid] or hashlib.sha256(request.body).hexdigest() != oid:
        raise RefusedError(400, f"the content is not the one announced: {len(request.body)} bytes")
    hub_store.keep(request.body)
    return Reply(200, b"")


def _verify(request: Request, oid: str) -> Reply:
    data = hub_store.blob(oid)
    if data is None or len(data) != request.json.get("size"):
        raise RefusedError(404, f"object {oid} was not uploaded")
    return Reply(200, {})
