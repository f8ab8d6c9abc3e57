"""The Hugging Face Hub: repository info, trees, files by revision and range, refs, whoami.

Enough for ``load_dataset`` (streaming or not), ``hf_hub_download`` and ``snapshot_download``; endpoints and headers as
``huggingface_hub`` 2.4 and ``datasets`` 5.2 ask for them. What can be read is in :mod:`shared.standin.hub_data`,
:mod:`shared.standin.hub_models` and :mod:`shared.standin.hub_store`; writing is in :mod:`shared.standin.hub_write`.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, unquote

from shared.standin import hub_data, hub_models, hub_store, hub_write
from shared.standin.hub_data import Repository, Snapshot, UnavailableError, pointer
from shared.standin.wire import BAD_KEY, RefusedError, Reply, Request

NOT_ACCEPTED = "unaccepted-key"
"""A token of someone else, who has not accepted the terms of any gated repository."""

_API = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?$")
_RESOLVE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")
_NO_OID = "0" * 40


def handle(request: Request) -> Reply:
    """The answer to one request."""
    path = request.path
    if request.key == BAD_KEY:
        return _error(401, "", "Invalid credentials in Authorization header")
    try:
        if path == "/api/whoami-v2":
            return _whoami(request)
        if reply := hub_write.handle(request):
            return reply
        if match := _API.match(path):
            kind, repo_id, verb, revision, rest = (unquote(part) if part else "" for part in match.groups())
            return _api(request, kind, repo_id, verb, revision, rest)
        if match := _RESOLVE.match(path):
            kind, repo_id, revision, name = (unquote(part) if part else "" for part in match.groups())
            return _resolve(request, kind or "model", repo_id, revision, name)
    except UnavailableError as error:
        return _error(503, "", str(error))
    except RefusedError as error:
        return _error(error.status, error.kind, error.message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A body of the right outline whose parts have the wrong types.
        return _error(400, "", f"malformed request: {type(error).__name__} {error}")
    return _error(404, "", f"{request.method} {path} is not served here")


def _error(status: int, code: str, message: str) -> Reply:
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return Reply(status, {"error": message}, headers)


def _whoami(request: Request) -> Reply:
    if not request.key:
        return _error(401, "", "Invalid username or password.")
    role = "read" if request.key == hub_write.READ_ONLY else "write"
    token = {"accessToken": {"displayName": "standin", "role": role}}
    name = "someone" if request.key == NOT_ACCEPTED else hub_write.USER
    return Reply(200, {"type": "user", "id": name, "name": name, "fullname": "Stand-in", "orgs": [], "auth": token})


def _found(request: Request, kind: str, repo_id: str, revision: str) -> tuple[Repository, Snapshot]:
    repository = (
        hub_data.repository(kind, repo_id)
        or hub_models.repository(kind, repo_id)
        or hub_store.repository(kind, repo_id)
    )
    # A private repository is not even said to be there.
    if repository is None or (repository.private and request.key in ("", NOT_ACCEPTED)):
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    snapshot = repository.at(revision or "main")
    if snapshot is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repository, snapshot


# ---------------------------------------------------------------- /api


def _api(request: Request, kind: str, repo_id: str, verb: str, revision: str, rest: str) -> Reply:
    repository, snapshot = _found(request, kind, repo_id, revision)
    if verb in ("", "revision"):
        return Reply(200, _info(repo_id, repository, snapshot))
    if verb == "refs":
        converts = [
            {"name": name.rpartition("/")[2], "ref": name, "targetCommit": repository.refs[name].sha}
            for name in repository.refs
            if name != "main"
        ]
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.refs["main"].sha}
        return Reply(200, {"branches": [branch], "converts": converts, "tags": []})
    if verb == "tree":
        return _tree(snapshot, rest, request.query.get("recursive", "").lower() in ("true", "1"))
    if verb == "paths-info" and request.method == "POST":
        if "json" in request.headers.get("content-type", ""):
            paths = request.json.get("paths", [])
        else:
            paths = parse_qs(request.body.decode()).get("paths", [])
        entries = (_entry(snapshot, path) for path in paths)
        return Reply(200, [entry for entry in entries if entry is not None])
    return _error(404, "", f"{request.method} {request.path} is not served here")


def _info(repo_id: str, repository: Repository, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "_id": "0" * 24,
        "id": repo_id,
        "sha": snapshot.sha,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": "2026-01-01T00:00:00.000Z",
        "lastModified": "2026-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": name} for name in sorted(snapshot.files)],
    }


def _entry(snapshot: Snapshot, path: str) -> dict[str, Any] | None:
    path = path.rstrip("/")
    if path in snapshot.files:
        size = len(snapshot.files[path])
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": snapshot.oid(path)}
        if path in snapshot.large:
            small = len(pointer(snapshot.files[path]))
            entry["lfs"] = {"oid": snapshot.etag(path), "size": size, "pointerSize": small}
        return entry
    if any(name.startswith(f"{path}/") for name in snapshot.files):
        return {"type": "directory", "path": path, "size": 0, "oid": _NO_OID}
    return None


def _tree(snapshot: Snapshot, under: str, recursive: bool) -> Reply:
    prefix = f"{under.rstrip('/')}/" if under else ""
    paths: set[str] = set()
    for name in snapshot.files:
        if name.startswith(prefix):
            parts = name[len(prefix) :].split("/")
            depths = range(1, len(parts) + 1) if recursive else (1,)
            paths.update(prefix + "/".join(parts[:depth]) for depth in depths)
    if under and not paths:
        return _error(404, "EntryNotFound", f"{under} does not exist")
    return Reply(200, [_entry(snapshot, path) for path in sorted(paths)])


# ---------------------------------------------------------------- files


def _resolve(request: Request, kind: str, repo_id: str, revision: str, name: str) -> Reply:
    repository, snapshot = _found(request, kind, repo_id, revision)
    if repository.gated and not request.key:
        return _error(401, "GatedRepo", f"Access to {kind} {repo_id} is restricted. You must be authenticated.")
    if repository.gated and request.key == NOT_ACCEPTED:
        return _error(403, "GatedRepo", f"Access to {kind} {repo_id} is restricted and you are not in the list.")
    if name not in snapshot.files:
        return _error(404, "EntryNotFound", f"{name} does not exist")
    data = snapshot.files[name]
    headers = {
        "ETag": f'"{snapshot.etag(name)}"',
        "X-Repo-Commit": snapshot.sha,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    span = _RANGE.match(request.headers.get("range", ""))
    if span is None or request.method == "HEAD":
        return Reply(200, data, headers)
    first, last = span.groups()
    if first:
        start, end = int(first), min(int(last) if last else len(data) - 1, len(data) - 1)
    else:
        start, end = max(0, len(data) - int(last or 0)), len(data) - 1
    if start >= len(data):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
