"""The chat formats trainers and vendors take: how a line is written, and the published rules a line must keep.

The validators read the line that was written, not the record it came from, so what they pass is what is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from shared.records import Message

Messages = Sequence[Message]


@dataclass(frozen=True)
class Format:
    """One format: ``line`` writes a conversation, ``fault`` says why a line breaks the rules, ``""`` if it does not."""

    line: Callable[[Messages], bytes]
    fault: Callable[[bytes], str]
    splits: tuple[str, ...] = ("train", "valid", "test")


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _plain(messages: Messages) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _split(messages: Messages) -> tuple[str, list[Message]]:
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    return system, [m for m in messages if m.role != "system"]


def _alternation(roles: Sequence[str]) -> str:
    """Turns must go user, assistant, user, ... and end with assistant."""
    if len(roles) < 2 or list(roles) != ["user", "assistant"] * (len(roles) // 2):
        got = ", ".join(map(str, roles)) or "none"
        return f"turns must alternate user, assistant and end with assistant; got {got}"
    return ""


def _parsed(line: bytes, kind: type) -> tuple[str, Any]:
    """Why the line is no JSON of that kind, ``""`` when it is, and its value."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}", None
    named = "an object" if kind is dict else "an array"
    return ("" if isinstance(value, kind) else f"a line is {named}, got {type(value).__name__}"), value


def _turns_fault(messages: Any) -> str:
    """Why the messages are not a list of texts with a role, ``""`` when they are."""
    if not isinstance(messages, list) or not messages:
        return "messages is a list, not empty"
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return "every message has role and content, and nothing else"
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return "role and content are text"
    return ""


# ---------------------------------------------------------------- {"messages": [...]}


def messages_line(messages: Messages) -> bytes:
    """``{"messages": [{"role", "content"}, ...]}``."""
    return _dump({"messages": _plain(messages)})


def messages_fault(line: bytes) -> str:
    """mlx-lm's chat format: ``messages`` with role and content, ending with the assistant's turn, which is what
    ``--mask-prompt`` trains on (mlx_lm/tuner/datasets.py, ChatDataset, 0.32.2)."""
    fault, row = _parsed(line, dict)
    if fault:
        return fault
    if set(row) != {"messages"}:
        return f"one key, messages; got {', '.join(sorted(row)) or 'none'}"
    if fault := _turns_fault(row["messages"]):
        return fault
    roles = [message["role"] for message in row["messages"]]
    if unknown := set(roles) - {"system", "user", "assistant"}:
        return f"unknown role {sorted(unknown)[0]!r}"
    if "system" in roles[1:]:
        return "system comes first, once"
    return _alternation(roles[1:] if roles[0] == "system" else roles)


def openai_fault(line: bytes) -> str:
    """OpenAI chat fine-tuning: ``messages`` of role and content, known roles only, at least one assistant message
    (OpenAI cookbook, "Data preparation and analysis for chat model fine-tuning", format checks)."""
    fault, row = _parsed(line, dict)
    if fault:
        return fault
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages is missing or empty"
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return "a message lacks role or content"
        if unknown := set(message) - {"role", "content", "name", "weight"}:
            return f"unrecognised keys {sorted(unknown)}"
        if message["role"] not in ("system", "user", "assistant"):
            return f"unrecognised role {message['role']!r}"
        if not isinstance(message["content"], str) or not message["content"]:
            return "content is missing"
    if not any(message["role"] == "assistant" for message in messages):
        return "no assistant message"
    return ""


# ---------------------------------------------------------------- Anthropic and Bedrock


def anthropic_line(messages: Messages) -> bytes:
    """``{"system": ..., "messages": [...]}``; system is left out when there is none."""
    system, turns = _split(messages)
    return _dump({**({"system": system} if system else {}), "messages": _plain(turns)})


def anthropic_fault(line: bytes) -> str:
    """Claude fine-tuning on Amazon Bedrock: optional text ``system``; ``messages`` of user and assistant in turn,
    user first, assistant last, content not empty (anthropic claude-cookbooks, finetuning/finetuning_on_bedrock.ipynb;
    Bedrock user guide, "Prepare data for fine-tuning text-to-text models")."""
    fault, row = _parsed(line, dict)
    if fault:
        return fault
    if unknown := set(row) - {"system", "messages"}:
        return f"unknown keys {sorted(unknown)}"
    if "system" in row and (not isinstance(row["system"], str) or not row["system"].strip()):
        return "system is text, not empty"
    if fault := _turns_fault(row.get("messages")):
        return fault
    if not all(message["content"].strip() for message in row["messages"]):
        return "content is empty"
    return _alternation([message["role"] for message in row["messages"]])


def bedrock_line(messages: Messages) -> bytes:
    """Bedrock's Converse form, schema ``bedrock-conversation-2024``: content is a list of text blocks."""
    system, turns = _split(messages)
    row: dict[str, Any] = {"schemaVersion": "bedrock-conversation-2024"}
    if system:
        row["system"] = [{"text": system}]
    row["messages"] = [{"role": m.role, "content": [{"text": m.content}]} for m in turns]
    return _dump(row)


def bedrock_fault(line: bytes) -> str:
    """``schemaVersion`` is ``bedrock-conversation-2024``; ``system`` and every content are lists of ``{"text"}``; user
    and assistant alternate (Amazon Bedrock user guide, data preparation for model distillation and fine-tuning)."""
    fault, row = _parsed(line, dict)
    if fault:
        return fault
    if row.get("schemaVersion") != "bedrock-conversation-2024":
        return "schemaVersion must be bedrock-conversation-2024"
    if unknown := set(row) - {"schemaVersion", "system", "messages"}:
        return f"unknown keys {sorted(unknown)}"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages is a list, not empty"
    if any(not isinstance(message, dict) or set(message) != {"role", "content"} for message in messages):
        return "every message has role and content, and nothing else"
    for blocks in (*([row["system"]] if "system" in row else []), *(message["content"] for message in messages)):
        if not isinstance(blocks, list) or not blocks:
            return "system and content are lists of blocks"
        if not all(_is_block(block) for block in blocks):
            return 'a block is {"text": ...}, not empty'
    return _alternation([message["role"] for message in messages])


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, dict)
        and set(block) == {"text"}
        and isinstance(block["text"], str)
        and bool(block["text"].strip())
    )


# ---------------------------------------------------------------- nanochat


def nanochat_line(messages: Messages) -> bytes:
    """A JSON array of messages. nanochat has no system turn in a file, so its text opens the first user turn."""
    system, turns = _split(messages)
    rows = _plain(turns)
    if system and rows:
        rows[0]["content"] = f"{system}\n\n{rows[0]['content']}"
    return _dump(rows)


def nanochat_fault(line: bytes) -> str:
    """nanochat, tasks/customjson.py: a line is a JSON array of at least two messages; even places are the user's, odd
    the assistant's; content is text."""
    fault, rows = _parsed(line, list)
    if fault:
        return fault
    if len(rows) < 2:
        return "a line is an array of at least two messages"
    if fault := _turns_fault(rows):
        return fault
    for place, message in enumerate(rows):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            return f"message {place} must be the {expected}'s, got {message['role']!r}"
    return ""


FORMATS = {
    "training": Format(messages_line, messages_fault),
    # What is uploaded to a vendor cannot be held out any more, so these leave the test split out.
    "openai": Format(messages_line, openai_fault, splits=("train", "valid")),
    "anthropic": Format(anthropic_line, anthropic_fault, splits=("train", "valid")),
    "bedrock": Format(bedrock_line, bedrock_fault, splits=("train", "valid")),
    "nanochat": Format(nanochat_line, nanochat_fault, splits=("train", "valid")),
}
"""Export directories by name; each has one ``<split>.jsonl`` a split."""
