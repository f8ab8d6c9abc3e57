"""What the tests of the conversation tracks share: a facts file, records made by hand, stages and their files."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import orjson

from shared.records import Conversation, Grounding, Message, QAPair, content_id
from tests.conftest import ROOT, run_stage

GENERATOR, OTHER = "openai/gpt-6-luna", "anthropic/claude-haiku-5-5"


def stage_module(name: str, module: str = "main") -> Any:
    """A module of a stage, which sees its neighbours by plain name, as the script itself does."""
    directory = ROOT / "stages" / name
    unique = f"{name[3:]}_{module}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, directory / f"{module}.py")
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[unique] = loaded
        sys.path.insert(0, str(directory))
        try:
            spec.loader.exec_module(loaded)
        finally:
            sys.path.remove(str(directory))
    return sys.modules[unique]


# ---------------------------------------------------------------- facts

_MACHINES = "pump valve boiler dryer conveyor mixer press furnace chiller grinder extruder centrifuge".split()
_STATEMENTS = (
    "The {m} is inspected every {n} weeks by the shift supervisor.",
    "The {m} stops when its casing reaches {k} degrees.",
    "Every {m} writes its readings to `logs/{m}.csv` once a minute.",
    "Oil for the {m} is kept in the blue cabinet, so that nobody mixes it with solvent.",
    "A worn belt of the {m} costs {k} euros and is replaced within a day.",
    "The {m} never starts while its guard is open.",
    "Spare parts for the {m} arrive from the depot in {n} days.",
    "The licence of the {m} software covers {n} users.",
    "The {m} draws {k} kilowatts at full load.",
    "Operators of the {m} need a certificate that expires after {n} years.",
)


def facts_text(machines: int = len(_MACHINES)) -> str:
    """A facts file: a section for each machine, ten bullets each, no two alike."""
    lines = []
    for i, machine in enumerate(_MACHINES[:machines]):
        lines += [f"# {machine.capitalize()}", ""]
        lines += [f"- {s.format(m=machine, n=3 + i, k=41 + 7 * i)}" for s in _STATEMENTS]
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------- records

SOURCED = {"domain": "prose", "source": "facts.md", "origin": "facts.md#L1-L1", "language": "en", "category": "Pump"}
CHUNK = (
    "# Pump\n- The pump is inspected every 3 weeks by the shift supervisor.\n"
    "- The pump stops when its casing reaches 41 degrees."
)
QUESTION, ANSWER = "When does the pump stop?", "The pump stops when its casing reaches 41 degrees."


def qa_pair(question: str = QUESTION, answer: str = ANSWER, chunk: str = CHUNK, **more: Any) -> QAPair:
    """A pair as 05 writes it; by default a good one."""
    values = SOURCED | {
        "id": content_id("qa_pair", chunk, question, answer),
        "parents": (content_id("chunk", chunk),),
        "licence": "MIT",
        "section": "Pump",
        "chunk": chunk,
        "question": question,
        "answer": answer,
        "quote": chunk.splitlines()[-1].removeprefix("- "),
        "difficulty": "basic",
        "categories": ("operations",),
        "generated_by": OTHER,
    }
    return QAPair.model_validate(values | more)


def good_pairs(count: int) -> list[QAPair]:
    """Different good pairs, one for each of the first bullets of :func:`facts_text`."""
    chunks = stage_module("05_extract_qa", "facts").chunks_of(facts_text())
    categories = itertools.cycle(("operations", "cost", "pipeline", "quality", "data", "models", "licensing"))
    pairs = []
    for chunk, category in zip(chunks[:count], categories, strict=False):
        bullet = chunk.text.splitlines()[-1].removeprefix("- ")
        about = " ".join(bullet.split()[:4]).rstrip(".")
        question = f"What should an operator know about: {about}?"
        pairs.append(qa_pair(question, bullet, chunk.text, section=chunk.section, categories=(category,)))
    return pairs


def conversation(*turns: str, topic: str = "", patterns: tuple[str, ...] = (), model: str = GENERATOR) -> Conversation:
    """A conversation of these turns, the user first: grounded in :data:`CHUNK` unless it has a topic."""
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns))  # type: ignore[arg-type]
    grounding = () if topic else (Grounding(question=QUESTION, answer=ANSWER, chunk=CHUNK),)
    return Conversation.model_validate(
        SOURCED
        | {
            "id": content_id("conversation", topic, *turns),
            "licence": "MIT",
            "messages": messages,
            "generated_by": model,
            "grounding": grounding,
            "topic": topic,
            "patterns": patterns,
        }
    )


# ---------------------------------------------------------------- stages


class Run:
    """One run directory of a test, ``<tmp>/trial``, and what its stages left there."""

    def __init__(self, tmp_path: Path, track: str) -> None:
        self.track = track
        self.directory = tmp_path / "data" / "trial" / track
        self.directory.mkdir(parents=True)

    def write(self, name: str, records: Any) -> Path:
        """Records as the output of a stage."""
        path = self.directory / f"{name}.jsonl"
        path.write_bytes(b"".join(record.line() for record in records))
        return path

    def stage(self, name: str, source: Path | None, *flags: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a stage through its flags, with its trial settings and the changes given."""
        return run_stage(
            ROOT / "stages" / name / "main.py",
            *(("--in", source) if source else ()),
            "--out",
            self.path(name),
            "--config",
            self.settings(name, **settings),
            "--track",
            self.track,
            *flags,
        )

    def settings(self, name: str, **changes: Any) -> Path:
        """The trial settings of a stage with other values at the top level."""
        own = ROOT / "stages" / name / "trial.toml"
        if not changes:
            return own
        values = tomllib.loads(own.read_text("utf-8")) | changes
        path = self.directory.parent / f"{name}.toml"
        path.write_text(_toml(values), "utf-8")
        return path

    def path(self, name: str, suffix: str = ".jsonl") -> Path:
        """A file that a stage leaves."""
        return self.directory / f"{name}{suffix}"

    def lines(self, name: str, suffix: str = ".jsonl") -> list[dict[str, Any]]:
        """The lines of a file that a stage left."""
        return [orjson.loads(line) for line in self.path(name, suffix).read_bytes().splitlines()]

    def rejects(self, name: str) -> list[dict[str, Any]]:
        """What a stage rejected."""
        return self.lines(name, ".rejects.jsonl")

    def report(self, name: str) -> dict[str, Any]:
        """A stage's report."""
        report: dict[str, Any] = orjson.loads(self.path(name, ".report.json").read_bytes())
        return report


def _toml(values: dict[str, Any], place: str = "") -> str:
    """Settings as TOML: values first, then tables."""
    plain = [f"{_key(k)} = {_value(v)}" for k, v in values.items() if not _is_table(v)]
    tables = []
    for key, value in values.items():
        name = f"{place}{_key(key)}"
        if isinstance(value, dict):
            tables.append(f"\n[{name}]\n{_toml(value, f'{name}.')}")
        elif _is_table(value):
            tables += [f"\n[[{name}]]\n{_toml(row, f'{name}.')}" for row in value]
    return "\n".join([*plain, *tables])


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() else orjson.dumps(key).decode()


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    return orjson.dumps(value).decode() if isinstance(value, str | bool) else str(value)
