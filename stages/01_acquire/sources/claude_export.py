"""A claude.ai data export: what the human wrote, in any packaging the export has had.

Read: a folder, a zip (of zips, of folders), or a JSON file; the single zip with ``conversations.json``, and the newer
manifest with one zip per category. Never opened: ``users.json`` and the other categories.

A message's text is its content blocks of type ``text``; the flat ``text`` field, which mixes in thinking and
placeholders, counts only where there are no blocks (exports of 2023 and 2024). Where messages have parents, the
branch that ends at the current leaf is read, and messages on other branches are rejects.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from prose import Sizes, code_share
from pydantic import Field

from shared.errors import SettingsError
from shared.stage import shown
from sources import ROOT, Acquire, Candidate, Candidates, Source

_CONVERSATIONS = re.compile(r"conversations[\w.-]*\.json", re.IGNORECASE)
_DESIGN_CHATS = re.compile(r"design_chats[\w.-]*\.(json|zip)", re.IGNORECASE)
_PLACEHOLDER = "```\nThis block is not supported on your current device yet.\n```"
_MAX_DEPTH = 4
_ASK_AGAIN = "export again from the account's privacy settings, and give the file as it arrives"


class ClaudeExport(Source):
    """``kind = "claude_export"``.

    Attributes:
        path: folder, zip or JSON file, from the repository's root or absolute.
        sizes: how long a message is.
        max_code_share: a message with more than this share of its characters on lines of code is left out, 0 to 1;
            see :func:`prose.code_share`.
        attachments: whether pasted text is taken too, as messages of category ``attachment``.
        language: ISO 639-1 code of what the messages are written in.
        licence: SPDX expression the user gives to messages that are their own; 02 merge must allow it.
        optional: a missing path is noted in the report and not an error.
        max_megabytes: what all the files read may hold together once unpacked, in millions of bytes.
    """

    kind: Literal["claude_export"]
    domain: Literal["prose"] = "prose"
    path: str = Field(min_length=1)
    sizes: Sizes = Sizes(min_chars=100, max_chars=2_000)
    max_code_share: float = Field(default=0.3, ge=0, le=1)
    attachments: bool = True
    language: str = Field(default="en", pattern=r"^[a-z]{2,3}$")
    licence: str = Field(min_length=1)
    optional: bool = False
    max_megabytes: int = Field(default=1_000, ge=1)


def read(source: ClaudeExport, acquire: Acquire) -> Candidates:
    """The human messages of every conversation, files in the byte order of their names.

    Raises:
        SettingsError: the path is not there and not optional, is no export, or is one without conversations.
    """
    path = ROOT / source.path
    if not path.exists():
        if not source.optional:
            raise SettingsError(
                f"source {source.name!r}: there is no {source.path}",
                "put the export there, correct path, or set optional = true",
            )
        acquire.note(source, absent=source.path)
        return _candidates(source, [])
    documents = list(_documents(path, _Allowance(source)))
    conversations = [
        (file, number, item) for file, items in documents for number, item in enumerate(_conversations(file, items))
    ]
    if not conversations:
        raise SettingsError(f"{shown(path)} is an empty export: it holds no conversation", _ASK_AGAIN)
    acquire.note(source, files=len(documents), conversations=len(conversations))
    return _candidates(source, conversations)


# ---------------------------------------------------------------- messages


def _candidates(source: ClaudeExport, conversations: list[tuple[str, int, Any]]) -> Candidates:
    for file, number, conversation in conversations:
        messages = conversation.get("chat_messages") if isinstance(conversation, dict) else None
        if not isinstance(messages, list):
            yield Candidate(f"{file}#{number}", reason="not_a_conversation", detail="it has no chat_messages")
            continue
        branch = _branch(conversation, messages)
        for position, message in enumerate(messages):
            if not isinstance(message, dict):
                yield Candidate(f"{file}#{number}.{position}", reason="not_a_message", detail=type(message).__name__)
            elif message.get("sender") in ("human", "user"):
                key = str(message.get("uuid") or f"{number}.{position}")
                on_branch = branch is None or position in branch
                for name, category, text in _texts(message, source.attachments):
                    yield _judged(source, f"{file}#{key}{name}", category, text, on_branch)


def _judged(source: ClaudeExport, origin: str, category: str, text: str, on_branch: bool) -> Candidate:
    reason, detail, sizes = "", "", source.sizes
    if not on_branch:
        reason, detail = "other_branch", "edited or asked again; the branch that ends the conversation is read"
    elif not text:
        reason, detail = "empty", "no text of its own (an image, a file, or nothing)"
    elif problem := _unfit(text):
        return Candidate(origin, reason=problem[0], detail=problem[1])
    elif len(text) < sizes.min_chars:
        reason, detail = "too_short", f"{len(text):,} characters; at least {sizes.min_chars:,}"
    elif len(text) > sizes.max_chars:
        return Candidate(origin, reason="too_long", detail=f"{len(text):,} characters; at most {sizes.max_chars:,}")
    elif (share := code_share(text)) > source.max_code_share:
        reason, detail = "code_heavy", f"{share:.2f} of it is code; at most {source.max_code_share:.2f}"
    return Candidate(origin, text, source.language, category, source.licence, reason, detail)


def _unfit(text: str) -> tuple[str, str] | None:
    if "\0" in text:
        return "binary", f"NUL character at {text.index(chr(0)):,}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "not_utf8", f"half a surrogate pair at {error.start:,}"
    return None


def _texts(message: dict[str, Any], attachments: bool) -> Iterator[tuple[str, str, str]]:
    """``(suffix of the origin, category, text)`` of what one message holds: its own text, then what was pasted."""
    blocks = message.get("content")
    if isinstance(blocks, list) and blocks:
        parts = [
            _string(block.get("text")) for block in blocks if isinstance(block, dict) and block.get("type") == "text"
        ]
        text = "\n\n".join(part.strip() for part in parts if part.strip())
    else:
        text = _string(message.get("text")).replace(_PLACEHOLDER, "").strip()
    pasted = message.get("attachments") if attachments else None
    contents = [
        _string(item.get("extracted_content")).strip()
        for item in (pasted if isinstance(pasted, list) else ())
        if isinstance(item, dict)
    ]
    if text or not any(contents):
        yield "", "message", text
    for number, content in enumerate(contents):
        if content:
            yield f":attachment-{number}", "attachment", content


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _branch(conversation: dict[str, Any], messages: list[Any]) -> set[int] | None:
    """Positions of the messages on the current branch; ``None`` when no message has a parent, so all are on it."""
    by_uuid = {
        message["uuid"]: (position, message)
        for position, message in enumerate(messages)
        if isinstance(message, dict) and isinstance(message.get("uuid"), str)
    }
    parents = {message.get("parent_message_uuid") for _, message in by_uuid.values()}
    if parents <= {None, ""}:
        return None
    leaf = by_uuid.get(str(conversation.get("current_leaf_message_uuid")))
    if leaf is None:
        leaves = [entry for uuid, entry in by_uuid.items() if uuid not in parents]
        leaf = max(leaves, key=lambda entry: (str(entry[1].get("created_at") or ""), entry[0]), default=None)
    on_branch: set[int] = set()
    while leaf is not None and leaf[0] not in on_branch:
        on_branch.add(leaf[0])
        leaf = by_uuid.get(str(leaf[1].get("parent_message_uuid")))
    return on_branch


def _conversations(file: str, items: Any) -> list[Any]:
    """The conversations of one JSON document.

    Raises:
        SettingsError: it is another product's export, or none at all.
    """
    if isinstance(items, dict):
        items = items["conversations"] if isinstance(items.get("conversations"), list) else [items]
    if not isinstance(items, list):
        raise SettingsError(f"{file} is no claude.ai export: expected a list of conversations", _ASK_AGAIN)
    objects = [item for item in items if isinstance(item, dict)]
    if not items or any(isinstance(item.get("chat_messages"), list) for item in objects):
        return items
    if any("mapping" in item for item in objects):
        raise SettingsError(
            f"{file} is a ChatGPT export (its conversations have a mapping); this source reads exports of claude.ai",
            'convert it to documents (one text file per message) and use kind = "documents"',
        )
    if any("messages" in item for item in objects):
        raise SettingsError(_design_chats(file), _ASK_AGAIN)
    raise SettingsError(f"{file} is no claude.ai export: none of its {len(items)} items has chat_messages", _ASK_AGAIN)


def _design_chats(file: str) -> str:
    return f"{file} holds design chats, which this source does not read; it reads the category conversations"


# ---------------------------------------------------------------- packaging


@dataclass
class _Allowance:
    """What may still be unpacked, so that a zip bomb is refused before it fills the memory."""

    source: ClaudeExport

    def __post_init__(self) -> None:
        self.left = self.source.max_megabytes * 1_000_000

    def take(self, stream: io.BufferedIOBase | Any, name: str) -> bytes:
        data: bytes = stream.read(self.left + 1)
        if len(data) > self.left:
            raise SettingsError(
                f"{name}: the export is above {self.source.max_megabytes} MB once unpacked",
                f"if it is really yours, raise max_megabytes of source {self.source.name!r}",
            )
        self.left -= len(data)
        return data


def _documents(path: Path, allowance: _Allowance) -> Iterator[tuple[str, Any]]:
    """``(name, JSON)`` of every conversations file under a path; the name is relative to the path's own folder.

    Raises:
        SettingsError: nothing that looks like an export is there, or a file of it cannot be read.
    """
    base = path if path.is_dir() else path.parent
    seen: list[str] = []
    found = 0
    for file in _files(path):
        name = file.relative_to(base).as_posix()
        with open(file, "rb") as stream:
            is_zip = zipfile.is_zipfile(stream)
            stream.seek(0)
            if is_zip:
                inner = list(_unpacked(stream, name, allowance, seen, 1))
            elif file == path or _CONVERSATIONS.fullmatch(file.name):
                inner = [(name, allowance.take(stream, name))]
            else:
                seen.append(name)
                continue
        found += len(inner)
        yield from ((inner_name, _json(inner_name, data)) for inner_name, data in inner)
    if not found:
        design = next((name for name in seen if _DESIGN_CHATS.fullmatch(PurePosixPath(name).name)), None)
        what = (
            _design_chats(design) if design else f"{shown(path)} is no claude.ai export: it has no conversations.json"
        )
        raise SettingsError(what, _ASK_AGAIN)


def _files(path: Path) -> Iterator[Path]:
    """The path itself, or the files of a folder in the byte order of their paths; symbolic links are not followed."""
    if not path.is_dir():
        yield path
        return
    inside = [Path(folder) / name for folder, _, names in os.walk(path, followlinks=False) for name in names]
    for file in sorted(inside, key=os.fsencode):
        if file.suffix.lower() in (".zip", ".json") and not file.is_symlink():
            yield file


def _unpacked(
    stream: Any, name: str, allowance: _Allowance, seen: list[str], depth: int
) -> Iterator[tuple[str, bytes]]:
    """The conversations files in a zip, and in the zips in it. Member names are read as names, never as paths."""
    if depth > _MAX_DEPTH:
        raise SettingsError(f"{name}: zips are nested more than {_MAX_DEPTH} deep", _ASK_AGAIN)
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in sorted(archive.infolist(), key=lambda info: info.filename):
                inner, last = f"{name}/{member.filename}", PurePosixPath(member.filename).name
                if _CONVERSATIONS.fullmatch(last):
                    with archive.open(member) as file:
                        yield inner, allowance.take(file, inner)
                elif last.lower().endswith(".zip") and not _DESIGN_CHATS.fullmatch(last):
                    with archive.open(member) as file:
                        data = allowance.take(file, inner)
                    yield from _unpacked(io.BytesIO(data), inner, allowance, seen, depth + 1)
                else:
                    seen.append(inner)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error) as error:
        # RuntimeError: encrypted; NotImplementedError: a compression Python lacks.
        raise SettingsError(f"{name} cannot be unpacked: {error}", _ASK_AGAIN) from None


def _json(name: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not UTF-8: {error.reason} at byte {error.start:,}", _ASK_AGAIN) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise SettingsError(f"{name} is not JSON: {error}", _ASK_AGAIN) from None
