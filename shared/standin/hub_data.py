"""What the stand-in Hub holds: small repositories shaped like the real ones, columns, layout and gates included.

The texts lie readable in ``hub/*.md``. Parquet files are made from them when first asked for, with pyarrow; where that
is not installed, only those repositories answer 503.

========================================  =========================================================================
``databricks/databricks-dolly-15k``       one ``.jsonl``
``OpenAssistant/oasst1``                  parquet, splits train and validation
``bigcode/the-stack``                     parquet, ``data/python``; gated
``bigcode/the-stack-smol``                json lines, ``data/python/data.json``; gated
``bigcode/the-stack-smol-xs``             has a loading script, so it does not load
``codeparrot/github-code-clean``          has a loading script; parquet under ``refs/convert/parquet``
``standin/tiny-adapter``                  a model repository
``Qwen/Qwen3-8B`` and others              the committed tiny model under their names, :mod:`shared.standin.hub_models`
========================================  =========================================================================

What was pushed is in :mod:`shared.standin.hub_store`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson

TEXTS = Path(__file__).resolve().parent / "hub"
PARQUET_REF = "refs/convert/parquet"


class UnavailableError(Exception):
    """pyarrow is not installed here."""


@dataclass
class Snapshot:
    """The files of a repository at one revision.

    Attributes:
        files: content by path.
        large: paths that Git LFS keeps; their ETag is the SHA-256 of the content.
        sha: the commit; made from the files when none is given.
    """

    files: dict[str, bytes]
    large: frozenset[str] = frozenset()
    sha: str = ""

    def __post_init__(self) -> None:
        if not self.sha:
            digest = hashlib.sha1()
            for name in sorted(self.files):
                digest.update(f"{name}\0{self.oid(name)}\n".encode())
            self.sha = digest.hexdigest()

    def oid(self, name: str) -> str:
        """Git's id of a file; of the pointer to it when it is large."""
        data = pointer(self.files[name]) if name in self.large else self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def etag(self, name: str) -> str:
        """What changes when the content of a file does, as the Hub has it."""
        return hashlib.sha256(self.files[name]).hexdigest() if name in self.large else self.oid(name)


def pointer(data: bytes) -> bytes:
    """What Git keeps in place of a large file."""
    oid = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()


@dataclass
class Repository:
    """A repository.

    Attributes:
        refs: its snapshots by branch or other ref.
        commits: those that have no ref (any more); by hash.
        gated: its terms must be accepted first.
        private: it is not there for anyone but its owner.
        any_commit: every commit hash is one of ``main``'s.
    """

    refs: dict[str, Snapshot]
    commits: dict[str, Snapshot] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    any_commit: bool = False

    def at(self, revision: str) -> Snapshot | None:
        """The snapshot of a ref or a commit."""
        heads = {snapshot.sha: snapshot for snapshot in self.refs.values()}
        found = self.refs.get(revision.removeprefix("refs/heads/")) or heads.get(revision) or self.commits.get(revision)
        if found is None and self.any_commit and _COMMIT.fullmatch(revision):
            return replace(self.refs["main"], sha=revision)
        return found


_COMMIT = re.compile(r"[0-9a-f]{40}")


def repository(kind: str, repo_id: str) -> Repository | None:
    """A repository by kind (``dataset``, ``model``) and id; None when there is none.

    Raises:
        UnavailableError: it holds parquet files and pyarrow is not installed.
    """
    build = _REPOSITORIES.get((kind, repo_id))
    return build() if build else None


def namespaces() -> set[str]:
    """The users and organizations that own these repositories."""
    return {repo_id.partition("/")[0] for _, repo_id in _REPOSITORIES}


# ---------------------------------------------------------------- texts

_HEADING = re.compile(r"^## (.*)$", re.M)


@cache
def _sections(name: str) -> list[tuple[str, str]]:
    """Heading and body of every ``##`` section of a file in ``hub/``."""
    parts = _HEADING.split((TEXTS / name).read_text("utf-8"))
    return list(zip(parts[1::2], (body.strip("\n") for body in parts[2::2]), strict=True))


def dolly_rows() -> list[dict[str, str]]:
    """``instruction, context, response, category``; context is ``""`` for about a third."""
    rows = []
    for category, body in _sections("dolly.md"):
        instruction, *rest = body.split("\n")
        context = "\n".join(line[2:] for line in rest if line.startswith("> "))
        response = "\n".join(line for line in rest if line and not line.startswith("> "))
        rows.append({"instruction": instruction, "context": context, "response": response, "category": category})
    return rows


def oasst_rows() -> list[dict[str, Any]]:
    """All columns of the real data set; an assistant's message has the prompter's before it as its parent."""
    rows: list[dict[str, Any]] = []
    parent = None
    for number, (heading, text) in enumerate(_sections("oasst1.md")):
        role, language, *marks = heading.split()
        message_id = _uuid(f"message {number}")
        if role == "prompter":
            parent = message_id
        reviewed = "unreviewed" not in marks
        rows.append(
            {
                "message_id": message_id,
                "parent_id": parent if role == "assistant" else None,
                "user_id": _uuid(f"user {number % 17}"),
                "created_date": f"2023-02-{1 + number % 28:02d}T12:00:00.000000+00:00",
                "text": text,
                "role": role,
                "lang": language,
                "review_count": 3 if reviewed else 0,
                "review_result": "rejected" not in marks if reviewed else None,
                "deleted": "deleted" in marks,
                "rank": 0 if role == "assistant" else None,
                "synthetic": False,
                "model_name": None,
                "detoxify": dict.fromkeys(_DETOXIFY, 0.0005) if reviewed else None,
                "message_tree_id": parent or message_id,
                "tree_state": "ready_for_export",
                "emojis": {"name": ["+1"], "count": [1]} if number % 3 == 0 else None,
                "labels": {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]} if reviewed else None,
            }
        )
    return rows


_DETOXIFY = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


def _uuid(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"


def code_files(name: str) -> list[dict[str, str]]:
    """``repo, path, license, language, content`` of every file in ``hub/<name>.md``."""
    files = []
    for heading, body in _sections(f"{name}.md"):
        repo, path, licence, language = heading.split()
        content = body.split("\n", 1)[1].rpartition("```")[0]
        files.append({"repo": repo, "path": path, "license": licence, "language": language, "content": content})
    return files


def stack_rows() -> list[dict[str, Any]]:
    """The columns of ``bigcode/the-stack`` v1.0."""
    rows = []
    for file in code_files("code_stack"):
        content = file["content"]
        lengths = [len(line) for line in content.splitlines()]
        rows.append(
            {
                "content": content,
                "avg_line_length": round(sum(lengths) / len(lengths), 6),
                "max_line_length": max(lengths),
                "alphanum_fraction": round(sum(map(str.isalnum, content)) / len(content), 6),
                "licenses": [file["license"]],
                "repository_name": file["repo"],
                "path": file["path"],
                "size": len(content.encode()),
                "lang": file["language"],
            }
        )
    return rows


def github_rows() -> list[dict[str, Any]]:
    """The columns of ``codeparrot/github-code-clean``."""
    return [
        {
            "code": file["content"],
            "repo_name": file["repo"],
            "path": file["path"],
            "language": file["language"],
            "license": file["license"],
            "size": len(file["content"].encode()),
        }
        for file in code_files("code_github")
    ]


# ---------------------------------------------------------------- files


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def _parquet(rows: list[dict[str, Any]], columns: Callable[[Any], Any] | None = None) -> bytes:
    """The rows as parquet; the same rows give the same bytes. ``columns`` makes the schema from the pyarrow module."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UnavailableError("this repository needs pyarrow: make setup") from None
    table = pa.Table.from_pylist(rows, schema=columns(pa) if columns else None)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", row_group_size=1000)
    return buffer.getvalue()


def _oasst_columns(pa: Any) -> Any:
    text, whole = pa.string(), pa.int32()
    detoxify = pa.struct([(name, pa.float64()) for name in _DETOXIFY])
    emojis = pa.struct([("name", pa.list_(text)), ("count", pa.list_(whole))])
    labels = pa.struct([("name", pa.list_(text)), ("value", pa.list_(pa.float64())), ("count", pa.list_(whole))])
    return pa.schema(
        [
            *((name, text) for name in ("message_id", "parent_id", "user_id", "created_date", "text", "role", "lang")),
            ("review_count", whole), ("review_result", pa.bool_()), ("deleted", pa.bool_()), ("rank", whole),
            ("synthetic", pa.bool_()), ("model_name", text), ("detoxify", detoxify), ("message_tree_id", text),
            ("tree_state", text), ("emojis", emojis), ("labels", labels),
        ]
    )  # fmt: skip


def _card(licence: str, title: str) -> bytes:
    return f"---\nlicense: {licence}\nlanguage:\n- en\n---\n\n# {title}\n\nA small stand-in.\n".encode()


_SCRIPT = b'raise RuntimeError("a loading script of the stand-in: datasets 4 and later never run it")\n'

# ---------------------------------------------------------------- repositories


@cache
def _dolly() -> Repository:
    files = {"README.md": _card("cc-by-sa-3.0", "databricks-dolly-15k")}
    return Repository({"main": Snapshot({**files, "databricks-dolly-15k.jsonl": _json_lines(dolly_rows())})})


@cache
def _oasst() -> Repository:
    rows = oasst_rows()
    files = {
        "README.md": _card("apache-2.0", "OpenAssistant Conversations"),
        "data/train-00000-of-00001-b42a775f407cee45.parquet": _parquet(rows[:-4], _oasst_columns),
        "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": _parquet(rows[-4:], _oasst_columns),
    }
    return Repository({"main": Snapshot(files)})


@cache
def _stack() -> Repository:
    files = {
        "README.md": _card("other", "The Stack"),
        "data/python/train-00000-of-00001.parquet": _parquet(stack_rows()),
    }
    return Repository({"main": Snapshot(files)}, gated=True)


@cache
def _stack_smol() -> Repository:
    files = {"README.md": _card("other", "The Stack, smol"), "data/python/data.json": _json_lines(stack_rows())}
    return Repository({"main": Snapshot(files)}, gated=True)


@cache
def _stack_smol_xs() -> Repository:
    files = {"README.md": _card("other", "The Stack, smol xs"), "the-stack-smol-xs.py": _SCRIPT}
    return Repository({"main": Snapshot({**files, "data/python/data.json": _json_lines(stack_rows()[:2])})})


@cache
def _github() -> Repository:
    rows = github_rows()
    main = {"README.md": _card("apache-2.0", "GitHub code, clean"), "github-code-clean.py": _SCRIPT}
    chosen = {
        "all-all": rows,
        "all-mit": [row for row in rows if row["license"] == "mit"],
        "all-apache-2.0": [row for row in rows if row["license"] == "apache-2.0"],
        "Python-all": [row for row in rows if row["language"] == "Python"],
    }
    parquet = {f"{name}/partial-train/0000.parquet": _parquet(some) for name, some in chosen.items()}
    return Repository({"main": Snapshot(main), PARQUET_REF: Snapshot(parquet)})


@cache
def _adapter() -> Repository:
    """A LoRA adapter of one layer whose weights are all zero, in the layout that mlx-lm writes."""
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 1, "scale": 20.0, "dropout": 0.0}}
    name = "model.layers.0.self_attn.q_proj.lora_"
    header = {
        f"{name}a": {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]},
        f"{name}b": {"dtype": "F32", "shape": [1, 4], "data_offsets": [16, 32]},
    }
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    files = {
        "README.md": _card("mit", "A tiny adapter"),
        "adapter_config.json": orjson.dumps(config, option=orjson.OPT_INDENT_2),
        "adapters.safetensors": len(head).to_bytes(8, "little") + head + bytes(32),
    }
    return Repository({"main": Snapshot(files)})


_REPOSITORIES: dict[tuple[str, str], Callable[[], Repository]] = {
    ("dataset", "databricks/databricks-dolly-15k"): _dolly,
    ("dataset", "OpenAssistant/oasst1"): _oasst,
    ("dataset", "bigcode/the-stack"): _stack,
    ("dataset", "bigcode/the-stack-smol"): _stack_smol,
    ("dataset", "bigcode/the-stack-smol-xs"): _stack_smol_xs,
    ("dataset", "codeparrot/github-code-clean"): _github,
    ("model", "standin/tiny-adapter"): _adapter,
}
