"""The stand-in Hub's write side and its model repositories, through ``huggingface_hub`` itself, unmodified."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from shared.standin import hub_models, start
from tests.conftest import ROOT, closed_environment, environment_of

PIN = "b968826d9c46dd6066d109eabc6255188de91218"

# huggingface_hub reads its endpoint when it is imported, so what uses it runs in a process of its own.
HEAD = r"""
import hashlib, io, json, os
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api, found = HfApi(token="standin"), {}
def failure(action):
    try:
        return {"value": str(action())}
    except Exception as error:
        response = getattr(error, "response", None)
        return {"error": type(error).__name__, "status": getattr(response, "status_code", 0), "text": str(error)}
def hashes(folder):
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    paths = [path for path in paths if ".cache" not in path]
    return {os.path.relpath(path, folder): hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}
"""


def in_process(code: str, url: str, home: Path, *arguments: str) -> Any:
    """What ``code`` put into ``found``, run after :data:`HEAD` in a process of its own."""
    environment = closed_environment() | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
    }
    source = HEAD + textwrap.dedent(code) + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- models


def test_the_tiny_model_is_served_under_the_names_of_the_large_ones_at_any_commit(
    _standin_server: tuple[str, Path], tmp_path: Path
) -> None:
    code = """
    pin = "b968826d9c46dd6066d109eabc6255188de91218"
    found["pinned"] = hashes(snapshot_download("Qwen/Qwen3-8B", revision=pin))
    some = snapshot_download("mlx-community/Qwen3-4B-Instruct-2507-8bit", revision="f" * 40, allow_patterns=["*.json"])
    found["other"], found["other folder"] = hashes(some), some
    found["file"] = hf_hub_download("mlx-community/Qwen3-8B-4bit", "config.json", revision="0" * 40)
    found["main"] = api.model_info("Qwen/Qwen3-8B").sha
    found["echo"] = [entry.path for entry in api.list_repo_tree("Qwen/Qwen3-8B", revision=pin) if entry.lfs]
    found["branch"] = failure(lambda: snapshot_download("Qwen/Qwen3-8B", revision="dev"))
    """
    found = in_process(code, _standin_server[0], tmp_path)
    here = {name: hashlib.sha256((hub_models.TINY / name).read_bytes()).hexdigest() for name in hub_models.FILES}
    assert {name: found["pinned"][name] for name in here} == here
    assert set(found["other"]) == {name for name in here if name.endswith(".json")}
    assert found["other folder"].endswith(f"/snapshots/{'f' * 40}")
    assert f"/snapshots/{'0' * 40}/" in found["file"]
    assert found["main"] == PIN
    assert found["echo"] == ["model.safetensors"]
    assert found["branch"]["error"] == "RevisionNotFoundError"


# ---------------------------------------------------------------- pushes

PUSH = """
import sys
folder = sys.argv[1]
found["created"] = str(api.create_repo("acme/adapter", private=True))
found["again"] = failure(lambda: api.create_repo("acme/adapter", private=True))
found["still"] = str(api.create_repo("acme/adapter", private=True, exist_ok=True))
found["first"] = api.upload_folder(repo_id="acme/adapter", folder_path=folder, commit_message="one").oid
found["same"] = api.upload_folder(repo_id="acme/adapter", folder_path=folder, commit_message="two").oid
entries = api.list_repo_tree("acme/adapter", recursive=True)
found["lfs"] = {entry.path: entry.lfs.sha256 if entry.lfs else None for entry in entries if hasattr(entry, "lfs")}
os.remove(os.path.join(folder, "old.txt"))
open(os.path.join(folder, "README.md"), "a").write("more")
found["changed"] = api.upload_folder(
    repo_id="acme/adapter", folder_path=folder, commit_message="three", delete_patterns=["*"]).oid
found["now"] = hashes(snapshot_download("acme/adapter", revision=found["changed"], token="standin"))
found["local"] = hashes(folder)
found["before"] = sorted(hashes(snapshot_download("acme/adapter", revision=found["first"], token="standin")))
found["private"] = api.model_info("acme/adapter").private
found["no token"] = failure(lambda: HfApi(token=False).model_info("acme/adapter"))
found["stranger"] = failure(lambda: snapshot_download("acme/adapter", token="unaccepted-key"))
found["no token create"] = failure(lambda: HfApi(token=False).create_repo("acme/other"))
found["bad key"] = failure(lambda: HfApi(token="bad-key").create_repo("acme/other"))
found["read only"] = failure(lambda: HfApi(token="read-only-key").create_repo("acme/other"))
found["not ours"] = failure(lambda: api.create_repo("Qwen/Qwen3-9B"))
found["foreign"] = failure(
    lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="Qwen/Qwen3-8B"))
found["nowhere"] = failure(
    lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="acme/nothing"))
add = [CommitOperationAdd("x.txt", b"x")]
found["stale"] = failure(lambda: api.create_commit(
    "acme/adapter", add, commit_message="late", parent_commit=found["first"]))
found["branch"] = failure(lambda: api.create_commit("acme/adapter", add, commit_message="x", revision="dev"))
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def pushed(state: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One session of pushes against a stand-in that then ends."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "README.md").write_text("# An adapter\n")
    (folder / "old.txt").write_text("to go\n")
    (folder / "empty.txt").write_text("")
    (folder / "mlx").mkdir()
    (folder / "mlx" / "adapters.safetensors").write_bytes(os.urandom(300_000))
    (folder / "image.png").write_bytes(b"\x89PNG\0\0 not really")
    with environment_of(closed_environment() | {"STANDIN_STATE": str(state)}), start() as url:
        found: dict[str, Any] = in_process(PUSH, url, tmp_path_factory.mktemp("hf"), str(folder))
    found["folder"] = str(folder)
    return found


def test_a_pushed_folder_downloads_with_the_same_hashes(pushed: dict[str, Any]) -> None:
    now = dict(pushed["now"])
    assert now.pop(".gitattributes")  # the Hub's own, which every repository has
    assert now == pushed["local"]
    assert "old.txt" in pushed["before"] and "old.txt" not in now  # a commit stays what it was
    assert pushed["private"] is True


def test_binary_files_go_through_lfs_and_texts_do_not(pushed: dict[str, Any]) -> None:
    large = {path for path, digest in pushed["lfs"].items() if digest}
    assert large == {"mlx/adapters.safetensors", "image.png"}
    assert pushed["lfs"]["mlx/adapters.safetensors"] == pushed["local"]["mlx/adapters.safetensors"]


def test_the_same_bytes_make_no_second_commit(pushed: dict[str, Any]) -> None:
    assert pushed["same"] == pushed["first"] != pushed["changed"]
    assert all(len(pushed[name]) == 40 for name in ("first", "changed"))


def test_an_existing_repository_is_a_409(pushed: dict[str, Any]) -> None:
    assert pushed["again"]["status"] == 409
    assert pushed["still"] == pushed["created"]


def test_a_private_repository_is_not_there_for_anyone_else(pushed: dict[str, Any]) -> None:
    for who in ("no token", "stranger"):
        assert pushed[who]["error"] == "RepositoryNotFoundError", who
    assert pushed["no token"]["status"] == 404


def test_who_may_not_write_is_told_so(pushed: dict[str, Any]) -> None:
    assert [pushed[name]["status"] for name in ("no token create", "bad key", "read only", "not ours", "foreign")] == [
        401, 401, 403, 403, 403,
    ]  # fmt: skip
    assert pushed["nowhere"]["error"] == "RepositoryNotFoundError"
    assert pushed["stale"]["status"] == 412
    assert pushed["branch"]["error"] == "RevisionNotFoundError"


def test_a_later_stand_in_has_what_an_earlier_one_was_given(
    pushed: dict[str, Any], state: Path, tmp_path: Path
) -> None:
    code = """
    found["now"] = hashes(snapshot_download("acme/adapter", token="standin"))
    api.create_repo("acme/pairs", repo_type="dataset")
    data = b"{}" + bytes([0])
    for repo in ("acme/pairs",):
        api.upload_file(path_or_fileobj=data, path_in_repo="data/a.parquet", repo_id=repo, repo_type="dataset")
    api.update_repo_settings("acme/pairs", repo_type="dataset", gated="auto")
    found["open"] = failure(lambda: HfApi(token=False).dataset_info("acme/pairs").gated)
    found["gated"] = failure(
        lambda: hf_hub_download("acme/pairs", "data/a.parquet", repo_type="dataset", token="unaccepted-key"))
    found["mine"] = failure(
        lambda: hf_hub_download("acme/pairs", "data/a.parquet", repo_type="dataset", token="standin"))
    found["not a model"] = failure(lambda: api.model_info("acme/pairs"))
    """
    with environment_of(closed_environment() | {"STANDIN_STATE": str(state)}), start() as url:
        found = in_process(code, url, tmp_path)
    assert found["now"] == pushed["now"]
    assert found["open"] == {"value": "auto"}
    assert found["gated"]["error"] == "GatedRepoError"
    assert Path(found["mine"]["value"]).read_bytes() == b"{}\0"
    assert found["not a model"]["error"] == "RepositoryNotFoundError"


def test_without_a_directory_pushes_end_with_the_process(tmp_path: Path) -> None:
    code = """
    api.create_repo("acme/brief")
    found["oid"] = api.upload_file(path_or_fileobj=b"hello", path_in_repo="a.txt", repo_id="acme/brief").oid
    found["text"] = open(hf_hub_download("acme/brief", "a.txt", revision=found["oid"])).read()
    """
    with environment_of(closed_environment()), start() as url:
        assert in_process(code, url, tmp_path)["text"] == "hello"
    with environment_of(closed_environment()), start() as url:
        code = 'found["gone"] = failure(lambda: api.model_info("acme/brief"))'
        assert in_process(code, url, tmp_path)["gone"]["error"] == "RepositoryNotFoundError"


def test_a_commit_cannot_smuggle_a_large_file_or_a_content_that_was_not_uploaded(tmp_path: Path) -> None:
    code = """
    import base64, urllib.request, urllib.error
    url = os.environ["HF_ENDPOINT"]
    def post(path, data, method="POST"):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        request = urllib.request.Request(url + path, data, {"Authorization": "Bearer standin"}, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return [answer.status, json.loads(answer.read() or b"null")]
        except urllib.error.HTTPError as error:
            return [error.code, json.loads(error.read())]
    def commit(key, **value):
        header = {"key": "header", "value": {"summary": "s", "description": ""}}
        lines = [header, {"key": key, "value": value}]
        return post("/api/models/acme/raw/commit/main", "\\n".join(map(json.dumps, lines)).encode())
    api.create_repo("acme/raw")
    content = base64.b64encode(b"a" + bytes([0])).decode()
    found["inline"] = commit("file", path="w.safetensors", content=content, encoding="base64")
    found["absent"] = commit("lfsFile", path="w.safetensors", algo="sha256", oid="0" * 64, size=4)
    found["outside"] = commit("file", path="../x", content="", encoding="base64")
    found["broken"] = post("/api/models/acme/raw/commit/main", b"{not json")
    oid = hashlib.sha256(b"data").hexdigest()
    found["unannounced"] = post(f"/lfs/upload/{oid}", b"data", "PUT")
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 4}]}
    found["announced"] = post("/acme/raw.git/info/lfs/objects/batch", batch)
    found["wrong"] = post(f"/lfs/upload/{oid}", b"dato", "PUT")
    found["unverified"] = post(f"/lfs/verify/{oid}", {"oid": oid, "size": 4})
    found["right"] = post(f"/lfs/upload/{oid}", b"data", "PUT")
    found["verified"] = post(f"/lfs/verify/{oid}", {"oid": oid, "size": 4})
    found["known"] = post("/acme/raw.git/info/lfs/objects/batch", batch)[1]["objects"][0].get("actions")
    found["malformed"] = post("/api/models/acme/raw/preupload/main", {"files": [{}]})
    """
    with environment_of(closed_environment()), start() as url:
        found = in_process(code, url, tmp_path)
    status = {name: answer[0] for name, answer in found.items() if isinstance(answer, list)}
    refused = ("inline", "absent", "outside", "broken", "wrong", "malformed")
    assert {name: status[name] for name in refused} == dict.fromkeys(refused, 400)
    assert (status["unannounced"], status["unverified"], status["right"], status["verified"]) == (403, 404, 200, 200)
    assert "was not uploaded" in found["absent"][1]["error"]
    assert found["known"] is None
