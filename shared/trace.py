"""The life of one record: what every stage of a run did with it, from the bytes it came from to the example it became.

python -m shared.trace --run trial 3f2a91        # six hex digits are enough when only one id begins with them
python -m shared.trace --run trial 3f2a91 --full # texts, prompts and answers whole
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from shared.errors import SettingsError, SynthmillError, complain
from shared.llm.store import Store
from shared.stage import shown
from shared.stats import flags_for, open_store

SHORT = 160
"""Characters of a text shown without ``--full``."""
ABOUT = ("source", "origin", "licence", "domain", "language", "category", "parents")
"""Shown once, at the top: no stage changes them."""
HIDDEN = {"schema_version", "id", "kind", *ABOUT}


@dataclass
class Step:
    """One stage's line about the record; ``reason`` is empty when the record went on."""

    track: str
    stage: str
    record: dict[str, Any]
    reason: str = ""
    detail: str = ""


@dataclass
class Life:
    """What a run knows of one id.

    Attributes:
        steps: in stage order; of every track that has the record.
        made: ``(id, place)`` of records that name it as a parent, each where it was first seen.
        twins: ``(id, reason)`` of rejects that were found to repeat it.
    """

    id: str
    steps: list[Step] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)


def files(directory: Path) -> list[Path]:
    """The records and rejects of a run directory (``data/<run>``): track by track, stage by stage, kept first."""
    found = [path for path in directory.glob("*/*.jsonl") if re.fullmatch(r"\d\d_\w+(\.rejects)?\.jsonl", path.name)]
    return sorted(found, key=lambda path: (path.parent.name, path.name.partition(".")[0], ".rejects." in path.name))


def lines_with(directory: Path, text: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The lines that hold ``text`` anywhere, as JSON objects; other lines are not even parsed."""
    wanted = text.encode()
    for path in files(directory):
        with open(path, "rb") as lines:
            for line in lines:
                if wanted in line:
                    yield path, orjson.loads(line)


def life(directory: Path, prefix: str) -> Life:
    """Everything a run directory says about the one record whose id begins with ``prefix``.

    Raises:
        SettingsError: the prefix is missing, too short, no hex, unknown, or begins several ids.
    """
    if not re.fullmatch(r"[0-9a-f]{6,32}", prefix):
        given = f"an id is 6 to 32 hex digits, got {prefix!r}" if prefix else "which record? no ID was given"
        raise SettingsError(given, _some_ids(directory))
    found: dict[str, Life] = {}
    others: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    for path, line in lines_with(directory, prefix):
        record = line.get("record") or {} if ".rejects." in path.name else line
        if str(record.get("id", "")).startswith(prefix):
            step = Step(path.parent.name, path.name.partition(".")[0], record)
            if record is not line:
                step.reason, step.detail = line["reason"], line.get("detail", "")
            found.setdefault(record["id"], Life(record["id"])).steps.append(step)
        else:
            others.append((path, line, record))
    if not found:
        raise SettingsError(
            f"no record in {shown(directory)} has an id that begins with {prefix}", _some_ids(directory)
        )
    if len(found) > 1:
        raise SettingsError(
            f"{len(found)} records have an id that begins with {prefix}: {', '.join(sorted(found)[:5])}",
            "give more digits",
        )
    (whole,) = found.values()
    for path, line, record in others:
        if whole.id in record.get("parents", ()):
            whole.made.setdefault(record["id"], shown(path))
        if line.get("match") == whole.id:
            whole.twins.setdefault(str(record.get("id", "?")), line["reason"])
    return whole


def _some_ids(directory: Path) -> str:
    """The command with an id that exists, from the furthest stage there is."""
    run = directory.name
    for path in reversed([path for path in files(directory) if ".rejects." not in path.name]):
        with open(path, "rb") as lines:
            if first := lines.readline():
                return f"make trace RUN={run} ID={orjson.loads(first)['id'][:12]}   (any id of {shown(path)})"
    return f"make {run}   (there are no records yet in {shown(directory)})"


# ---------------------------------------------------------------- for a terminal


class Teller:
    """Turns a life into lines. ``store`` is where prompts and answers are; None when there is no reply store."""

    def __init__(self, store: Store | None, full: bool) -> None:
        self.store, self.full = store, full
        self.seen: dict[str, str] = {}

    def tell(self, whole: Life) -> Iterator[str]:
        """The whole story."""
        first = whole.steps[0].record
        yield f"record {whole.id}"
        for name in ABOUT:
            if value := first.get(name):
                yield f"  {name:9} {', '.join(value) if isinstance(value, list) else value}"
        before: dict[str, Any] = {}
        for step in whole.steps:
            said = f"rejected: {step.reason}" if step.reason else "kept"
            yield f"\n{step.track}/{step.stage}  {said}{f' ({step.detail})' if step.detail else ''}"
            for name, value in step.record.items():
                if name not in HIDDEN and value != before.get(name):
                    yield from self.field(name, value, 1)
            before = step.record
        if whole.made:
            yield "\nmade from it"
            yield from (f"  {id_}  {place}" for id_, place in whole.made.items())
        if whole.twins:
            yield "\nrejected because they repeat it"
            yield from (f"  {id_}  {reason}" for id_, reason in whole.twins.items())

    def field(self, name: str, value: Any, depth: int) -> Iterator[str]:
        """A field with all that is nested in it; a reply's key becomes the question and the answer."""
        pad = "  " * depth
        if name.endswith("_reply") and isinstance(value, str):
            yield f"{pad}{name}"
            yield from self.reply(value, depth + 1)
        elif isinstance(value, dict):
            yield f"{pad}{name}"
            for key, nested in value.items():
                yield from self.field(key, nested, depth + 1)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for place, item in enumerate(value, 1):
                yield from self.field(f"{name} {place} of {len(value)}", item, depth)
        elif isinstance(value, list):
            yield f"{pad}{name}  {', '.join(map(str, value)) or '-'}"
        elif isinstance(value, str):
            yield from self.text(name, value, depth)
        else:
            yield f"{pad}{name}  {value}"

    def reply(self, key: str, depth: int) -> Iterator[str]:
        """What was asked and answered under a key of the reply store."""
        request, answer = (self.store.request(key), self.store.answer(key)) if self.store else (None, None)
        if request is None or answer is None:
            yield f"{'  ' * depth}not in the reply store any more: {key}"
            return
        for role, text in turns(request):
            if self.full or role != "system":
                yield from self.text(role, text, depth)
        yield from self.text("answer", answer.text, depth)

    def text(self, name: str, text: str, depth: int) -> Iterator[str]:
        """A text: whole and indented with ``--full``, else its beginning on one line and its length; once."""
        pad = "  " * depth
        if len(text) > SHORT and text in self.seen:
            yield f"{pad}{name}  the same as {self.seen[text]} above"
            return
        self.seen[text] = name
        if self.full and ("\n" in text or len(text) > SHORT):
            yield f"{pad}{name}"
            yield from (f"{pad}  {line}".rstrip() for line in text.splitlines())
            return
        line = " ".join(text.split())
        cut = f"{line[:SHORT]}… ({len(text):,} characters)" if len(line) > SHORT else line
        yield f"{pad}{name}  {cut or '-'}"


def turns(request: dict[str, Any]) -> list[tuple[str, str]]:
    """``(role, text)`` of a stored request, whichever provider's shape it has; the system prompt first."""
    if "contents" in request:  # Gemini
        system = request.get("config", {}).get("system_instruction", "")
        said = [(turn["role"], "".join(part["text"] for part in turn["parts"])) for turn in request["contents"]]
    else:
        system = request.get("system", "")  # Anthropic; OpenAI has it among the messages
        said = [(turn["role"], turn["content"]) for turn in request.get("messages", [])]
    return [("system", system), *said] if system else said


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Print the life of one record. Returns the exit code."""
    parser = flags_for("trace", __doc__)
    parser.add_argument(
        "id", nargs="?", default="", metavar="ID", help="id of the record, or its first 6 or more digits"
    )
    parser.add_argument("--full", action="store_true", help="texts, prompts and answers whole")
    flags = parser.parse_args(arguments)
    directory = flags.data / flags.run
    store = None
    try:
        whole = life(directory, flags.id.strip().lower())
        mark = directory / ".apis"
        store = open_store(flags.data, mark.read_text("utf-8").strip() if mark.exists() else "mock")
        for line in Teller(store, flags.full).tell(whole):
            print(line)
    except SynthmillError as error:
        return complain(error)
    finally:
        if store is not None:
            store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
