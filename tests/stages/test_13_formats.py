"""13 format: what is written keeps each vendor's rules, and every way to break a rule is found."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from shared.records import Message
from tests.conversations import stage_module

FORMATS = stage_module("13_format", "formats").FORMATS

U, A, S = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "system", "content": "Be."},
)
BU, BA = ({"role": role, "content": [{"text": "text"}]} for role in ("user", "assistant"))
VERSION = {"schemaVersion": "bedrock-conversation-2024"}

CHATS = {
    "one exchange": (U, A),
    "with a system turn": (S, U, A),
    "three exchanges": (S, U, A, U, A, U, A),
    "line breaks, quotes and other scripts": ({"role": "user", "content": '"a"\nb\t\u2028 ünï → 日本'}, A),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", CHATS)
def test_what_is_written_keeps_the_rules_and_loses_no_text(name: str, chat: str) -> None:
    messages = [Message.model_validate(message) for message in CHATS[chat]]
    line = FORMATS[name].line(messages)
    assert FORMATS[name].fault(line) == ""
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    texts = list(_texts(orjson.loads(line)))
    assert all(any(message.content in text for text in texts) for message in messages)


def _texts(value: Any) -> Any:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("turns", [(), (U,), (S,), (A,), (S, A)])
def test_a_conversation_without_an_exchange_breaks_every_format(name: str, turns: tuple[dict[str, str], ...]) -> None:
    line = FORMATS[name].line([Message.model_validate(turn) for turn in turns])
    ends_with_assistant = bool(turns) and turns[-1] is A
    # OpenAI's own check asks for no more than one assistant message.
    assert bool(FORMATS[name].fault(line)) is not (name == "openai" and ends_with_assistant)


GOOD: dict[str, list[Any]] = {
    "training": [{"messages": [U, A]}, {"messages": [S, U, A, U, A]}],
    "openai": [
        {"messages": [U, A]},
        {"messages": [S, U, A]},
        {"messages": [U, {**A, "weight": 0}, U, {**A, "weight": 1}]},
        {"messages": [{**U, "name": "ann"}, A]},
    ],
    "anthropic": [{"messages": [U, A]}, {"system": "Be.", "messages": [U, A, U, A]}],
    "bedrock": [
        {**VERSION, "messages": [BU, BA]},
        {**VERSION, "system": [{"text": "Be."}], "messages": [BU, BA, BU, BA]},
        {**VERSION, "messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}, BA]},
    ],
    "nanochat": [[U, A], [U, A, U, A], [U, A, U]],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in GOOD.items() for row in rows])
def test_a_line_that_keeps_the_rules_passes(name: str, row: Any) -> None:
    assert FORMATS[name].fault(orjson.dumps(row)) == ""


def _not_messages(wrap: Any) -> list[Any]:
    """What is wrong in every format whose messages are role and text."""
    no_content, no_role = {"role": "assistant"}, {"content": "So."}
    odd = [
        no_content,
        no_role,
        "So.",
        None,
        7,
        {**A, "content": None},
        {**A, "content": ["So."]},
        {**A, "role": "tool"},
    ]
    return [wrap([U, message]) for message in odd] + [wrap([]), wrap(None), wrap("text"), wrap({"0": U})]


BROKEN: dict[str, list[Any]] = {
    "training": [
        *_not_messages(lambda messages: {"messages": messages}),
        [U, A],
        {},
        {"messages": [U, A], "source": "x"},
        {"messages": [U, {**A, "weight": 1}]},
        {"messages": [U, A, U]},
        {"messages": [A, U]},
        {"messages": [U, U, A]},
        {"messages": [U, S, A]},
        {"messages": [S, S, U, A]},
        {"messages": [S, A]},
    ],
    "openai": [
        *_not_messages(lambda messages: {"messages": messages}),
        [U, A],
        {},
        {"messages": [U]},
        {"messages": [S, U]},
        {"messages": [U, {**A, "content": ""}]},
        {"messages": [U, {**A, "tone": "kind"}]},
        {"messages": [U, {**A, "role": ["assistant"]}]},
    ],
    "anthropic": [
        *_not_messages(lambda messages: {"messages": messages}),
        [U, A],
        {"system": "Be."},
        {"system": "", "messages": [U, A]},
        {"system": [{"text": "Be."}], "messages": [U, A]},
        {"messages": [S, U, A]},
        {"messages": [U, A, U]},
        {"messages": [A, U, A]},
        {"messages": [U, U, A, A]},
        {"messages": [U, {**A, "content": " \n"}]},
        {"messages": [U, A], "id": "1"},
    ],
    "bedrock": [
        [BU, BA],
        {"messages": [BU, BA]},
        {"schemaVersion": "bedrock-conversation-2023", "messages": [BU, BA]},
        VERSION,
        {**VERSION, "messages": []},
        {**VERSION, "messages": "text"},
        {**VERSION, "messages": [U, A]},
        {**VERSION, "messages": [BU, {"role": "assistant"}]},
        {**VERSION, "messages": [BU, "So."]},
        {**VERSION, "messages": [BU, {**BA, "content": []}]},
        {**VERSION, "messages": [BU, {**BA, "content": [{"text": ""}]}]},
        {**VERSION, "messages": [BU, {**BA, "content": [{"text": 7}]}]},
        {**VERSION, "messages": [BU, {**BA, "content": ["So."]}]},
        {**VERSION, "messages": [BU, {**BA, "content": [{"image": {}}]}]},
        {**VERSION, "messages": [BU, {**BA, "role": ["assistant"]}]},
        {**VERSION, "messages": [BU, BA, BU]},
        {**VERSION, "messages": [BA, BU]},
        {**VERSION, "system": "Be.", "messages": [BU, BA]},
        {**VERSION, "system": [], "messages": [BU, BA]},
        {**VERSION, "messages": [BU, BA], "id": "1"},
    ],
    "nanochat": [
        *_not_messages(lambda messages: messages),
        {"messages": [U, A]},
        [U],
        [A, U],
        [S, U],
        [U, U],
        [U, A, A],
        [U, {**A, "id": 1}],
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in BROKEN.items() for row in rows])
def test_a_line_that_breaks_a_rule_is_told_which(name: str, row: Any) -> None:
    fault = FORMATS[name].fault(orjson.dumps(row))
    assert fault and len(fault) < 120


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("line", [b"", b"{", b"text", b"7", b"null", b'"text"', b"\xff", b'{"messages": [NaN]}'])
def test_a_line_that_is_no_conversation_at_all_is_told_so(name: str, line: bytes) -> None:
    assert FORMATS[name].fault(line)


def test_uploads_leave_the_test_split_out() -> None:
    assert FORMATS["training"].splits == ("train", "valid", "test")
    assert {FORMATS[name].splits for name in FORMATS if name != "training"} == {("train", "valid")}


def test_nanochat_has_the_system_text_in_the_first_turn() -> None:
    messages = [Message.model_validate(message) for message in (S, U, A)]
    assert orjson.loads(FORMATS["nanochat"].line(messages))[0] == {"role": "user", "content": "Be.\n\nWhy?"}
