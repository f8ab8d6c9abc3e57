"""08 pattern: topics x preference patterns -> Conversation: coding dialogues that show how answers should be given.

First stage of its track. The plan is drawn from the seed alone: topics in a seeded order; patterns dealt by cycling
through all ten, alternately two and three a conversation, so every pattern occurs equally often (within one) at any
count, for each provider and over all of them.

Cost: one call an example of up to 3,000 tokens; about $0.0015 at gpt-6-luna, $0.012 at gemini-3.8-flash.

    python stages/08_pattern/main.py --out data/trial/patterns/08_pattern.jsonl \\
        --config stages/08_pattern/trial.toml --track patterns
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from pathlib import Path

import orjson
from pydantic import BaseModel, Field, ValidationError

from shared.dialogue import Turn, fault_of
from shared.errors import SettingsError
from shared.llm import Reply, Request, chat
from shared.records import Conversation, Message, Part, content_id
from shared.stage import Settings, Stage, run, shown

HERE = Path(__file__).parent


class Source(Settings):
    """One provider and how many examples it makes."""

    model: str
    count: int = Field(ge=1)


class Params(Settings):
    """Settings of 08; see trial.toml for the unit of each."""

    providers: tuple[Source, ...] = Field(min_length=1)
    seed: int = 42
    least_exchanges: int = Field(3, ge=1)
    most_exchanges: int = Field(5, ge=1)
    tries: int = Field(3, ge=1)
    temperature: float | None = 0.8
    max_tokens: int = Field(3000, ge=256)
    concurrency: int = Field(4, ge=1)
    examples: Path | None = None
    few_shot: int = Field(2, ge=0)
    licence: str = "MIT"


class Pattern(Part):
    """One row of ``patterns.toml``."""

    name: str
    definition: str
    looks_like: str
    cues: tuple[str, ...]


class Generated(BaseModel):
    """The answer to ``pattern.txt``."""

    topic: str
    patterns_applied: list[str]
    conversation: list[Turn]
    learning_notes: list[str]


class Planned(Part):
    """One example to make; ``number`` is its place in its provider's plan."""

    model: str
    number: int
    topic: str
    patterns: tuple[str, ...]


class Cards:
    """Patterns dealt by cycling: every round is all of them once, in an order drawn from the seed."""

    def __init__(self, patterns: Sequence[str], seed: str) -> None:
        self._patterns, self._seed, self._round = list(patterns), seed, 0
        self._left: list[str] = []

    def deal(self, count: int, without: Sequence[str] = ()) -> list[str]:
        """The next ``count`` different cards that are not among ``without``; those passed over stay next in line."""
        hand: list[str] = []
        passed_over: list[str] = []
        while len(hand) < count:
            if not self._left:
                order = random.Random(f"{self._seed} {self._round}")
                self._left, self._round = order.sample(self._patterns, len(self._patterns)), self._round + 1
            card = self._left.pop(0)
            (passed_over if card in hand or card in without else hand).append(card)
        self._left = passed_over + self._left
        return hand


def plan(sources: Sequence[Source], topics: Sequence[str], patterns: Sequence[str], seed: int) -> list[Planned]:
    """The examples to make; the same seed gives the same plan, byte for byte.

    A conversation gets two patterns, the next one three, and so on. Each provider is dealt whole rounds of its own and
    its last cards from a round all providers share, so every pattern occurs equally often, within one, for each
    provider and over all of them.
    """
    shared = Cards(patterns, f"{seed} shared")
    planned = []
    for source in sources:
        sizes = [2 + number % 2 for number in range(source.count)]
        whole = sum(sizes) // len(patterns) * len(patterns)
        own = Cards(patterns, f"{seed} {source.model}")
        deck = [card for _ in range(whole // len(patterns)) for card in own.deal(len(patterns))]
        deck += shared.deal(sum(sizes) - whole)
        order = random.Random(f"{seed} {source.model} topics").sample(list(topics), len(topics))
        for number, size in enumerate(sizes):
            hand = _hand(deck, size)
            topic = order[number % len(order)]
            planned.append(Planned(model=source.model, number=number, topic=topic, patterns=tuple(hand)))
    return planned


def _hand(deck: list[str], size: int) -> list[str]:
    """Take the first ``size`` different cards off the deck; only its last cards can lack so many different ones."""
    hand = list(dict.fromkeys(deck))[:size]
    for card in hand:
        deck.remove(card)
    return hand


def load_patterns(path: Path) -> dict[str, Pattern]:
    """The patterns by name.

    Raises:
        SettingsError: the file is not as it should be.
    """
    try:
        rows = tomllib.loads(path.read_text("utf-8"))["patterns"]
        return {row["name"]: Pattern.model_validate(row) for row in rows}
    except (OSError, KeyError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise SettingsError(f"{shown(path)}: {error}", f"git checkout -- {shown(path)}") from None


def load_topics(path: Path) -> list[str]:
    """The topics, in the order of the file.

    Raises:
        SettingsError: not TOML, or a topic occurs twice.
    """
    areas = tomllib.loads(path.read_text("utf-8"))
    topics = [topic for rows in areas.values() for topic in rows]
    if len(set(topics)) != len(topics):
        raise SettingsError(f"{shown(path)}: a topic occurs twice", f"edit {shown(path)}")
    return topics


def few_shot(path: Path | None, count: int) -> str:
    """The first example conversations of a file of ``{"messages": [...]}`` lines, as text; ``""`` without a file."""
    if path is None or not count:
        return ""
    if not path.is_file():
        raise SettingsError(f"no example conversations at {shown(path)}", "remove `examples` from the settings")
    lines = path.read_bytes().splitlines()[:count]
    parts = ["\n".join(f"{m['role']}: {m['content']}" for m in orjson.loads(line)["messages"]) for line in lines]
    return "".join(f"\n<example>\n{part}\n</example>\n" for part in parts)


def fault(made: Generated, planned: Planned, params: Params) -> str:
    """How an example breaks its plan; ``""`` when it does not."""
    if missing := set(planned.patterns) - set(made.patterns_applied):
        return f"patterns_applied lacks {', '.join(sorted(missing))}"
    if not made.learning_notes:
        return "learning_notes is empty"
    return fault_of(made.conversation, params.least_exchanges, params.most_exchanges)


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    patterns, topics = load_patterns(HERE / "patterns.toml"), load_topics(HERE / "topics.toml")
    stage.models.require(*(source.model for source in p.providers))
    planned = plan(p.providers, topics, list(patterns), p.seed)[: stage.limit or None]
    with open(stage.side_file(".plans.jsonl"), "wb") as file:
        file.writelines(orjson.dumps(row.model_dump(), option=orjson.OPT_APPEND_NEWLINE) for row in planned)
    profile = (HERE / "profile.md").read_text("utf-8").strip()
    system = stage.prompt("system.txt").replace("{profile}", profile)
    template = stage.prompt("pattern.txt").replace("{examples}", few_shot(p.examples, p.few_shot))

    # -- process
    async def generate(row: Planned) -> tuple[Reply, str]:
        described = "\n".join(
            f"- {name}: {patterns[name].definition} It looks like this: {patterns[name].looks_like}"
            for name in row.patterns
        )
        prompt = template.replace("{topic}", row.topic).replace("{patterns}", described)
        prompt = prompt.replace("{least}", str(p.least_exchanges)).replace("{most}", str(p.most_exchanges))
        wrong = ""
        for attempt in range(p.tries):
            request = Request(
                model=row.model,
                messages=chat(system, prompt),
                max_tokens=p.max_tokens,
                temperature=p.temperature,
                response=Generated,
                repeat=row.number * p.tries + attempt,
            )
            reply = await stage.models.ask(request, tries=1)
            if not reply.problem and not (wrong := fault(reply.parsed, row, p)):
                break
        return reply, wrong

    # -- save
    seen: set[str] = set()
    for row, (reply, wrong) in stage.models.map(generate, planned, p.concurrency):
        stage.plan()
        if reply.problem or wrong:
            stage.reject_raw(orjson.dumps(row.model_dump()), reply.problem or "off_plan", reply.detail or wrong)
            continue
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in reply.parsed.conversation)
        record = Conversation(
            id=content_id("conversation", row.topic, *(m.content for m in messages)),
            domain="code",
            source=row.model,
            origin=f"stages/08_pattern/topics.toml#{row.topic}",
            language="en",
            category=row.topic,
            licence=p.licence,
            messages=messages,
            generated_by=row.model,
            topic=row.topic,
            patterns=row.patterns,
            learning_notes=tuple(reply.parsed.learning_notes),
        )
        if record.id in seen:
            stage.reject(record, "duplicate", "the same conversation again")
        else:
            seen.add(record.id)
            stage.keep(record)
    counts = {name: sum(name in row.patterns for row in planned) for name in patterns}
    stage.summary["planned_patterns"] = counts
    stage.tables.append("\n".join(f"  {name:30} planned {count}" for name, count in counts.items()))


if __name__ == "__main__":
    run(main, Params)
