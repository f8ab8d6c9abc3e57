"""08 pattern: topics x preference patterns -> Conversation: coding dialogues that show how answers should be given.

First stage of its track. The plan is drawn from the seed alone: topics in a seeded order; patterns dealt by cycling
through all ten, alternately two and three a conversation, so every pattern occurs equally often (within one) at any
count, for each provider and over all of them.

Cost: one call an example of up to 3,000 tokens; about $0.0015 at gpt-6-luna, $0.012 at gemini-3.8-flash.

    python stages/08_pattern/main.py --out data/trial/patterns/08_pattern.jsonl \\
        --config stages/08_pattern/trial.toml --track patterns
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson
from dealing import Planned, Source, load_patterns, load_topics, plan
from pydantic import BaseModel, Field

from shared.dialogue import Turn, fault_of
from shared.errors import SettingsError
from shared.llm import Reply, Request, chat, fill
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Conversation, Domain, Message, content_id
from shared.stage import Settings, Stage, run, shown

HERE = Path(__file__).parent
MOST_TRIES = 100
EXCHANGE_TOKENS = 190
"""Of one question and its answer with code, JSON and second tries included, for the estimate; the trial's have 186."""


class Params(Settings):
    """Settings of 08; see trial.toml for the unit of each."""

    providers: tuple[Source, ...] = Field(min_length=1)
    seed: int = 42
    least_exchanges: int = Field(3, ge=1)
    most_exchanges: int = Field(5, ge=1)
    tries: int = Field(3, ge=1, le=MOST_TRIES)
    temperature: float | None = 0.8
    max_tokens: int = Field(3000, ge=256)
    concurrency: int = Field(4, ge=1)
    examples: Path | None = None
    few_shot: int = Field(2, ge=0)
    licence: str = "MIT"


class Generated(BaseModel):
    """The answer to ``pattern.txt``."""

    topic: str
    patterns_applied: list[str]
    conversation: list[Turn]
    learning_notes: list[str]


def few_shot(path: Path | None, count: int) -> str:
    """The first example conversations of a file of ``{"messages": [...]}`` lines, as text; ``""`` without a file.

    Raises:
        SettingsError: the file is missing or has other lines.
    """
    if path is None or not count:
        return ""
    if not path.is_file():
        raise SettingsError(f"no example conversations at {shown(path)}", "remove `examples` from the settings")
    lines = path.read_bytes().splitlines()[:count]
    try:
        parts = ["\n".join(f"{m['role']}: {m['content']}" for m in orjson.loads(line)["messages"]) for line in lines]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise SettingsError(
            f'{shown(path)}: expected {{"messages": [...]}} lines: {type(error).__name__} {error}',
            f"edit {shown(path)}",
        ) from None
    return "".join(f"\n<example>\n{part}\n</example>\n" for part in parts)


def fault(made: Generated, planned: Planned, params: Params) -> str:
    """How an example breaks its plan; ``""`` when it does not."""
    if missing := set(planned.patterns) - set(made.patterns_applied):
        return f"patterns_applied lacks {', '.join(sorted(missing))}"
    if not made.learning_notes:
        return "learning_notes is empty"
    return fault_of(made.conversation, params.least_exchanges, params.most_exchanges)


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 08 asks, from an empty store; two or three patterns are described in every prompt."""
    prompt = sum(
        tokens_of((HERE / name).read_text("utf-8"))
        for name in ("prompts/system.txt", "prompts/pattern.txt", "profile.md")
    )
    described = [tokens_of(row.definition + row.looks_like) for row in load_patterns(HERE / "patterns.toml").values()]
    asked = prompt + 2.5 * sum(described) / len(described) + tokens_of(str(strict_schema(Generated)))
    asked += tokens_of(few_shot(params.examples, params.few_shot))
    answer = (params.least_exchanges + params.most_exchanges) / 2 * EXCHANGE_TOKENS
    return [Calls(s.model, s.count, s.count * asked, s.count * answer, 0.5, 2.0) for s in params.providers]


def yields(params: Params, volumes: Mapping[Domain, Volume]) -> dict[Domain, Volume]:
    """The conversations 08 will make."""
    tokens = (params.least_exchanges + params.most_exchanges) / 2 * EXCHANGE_TOKENS
    return {"code": Volume(sum(source.count for source in params.providers), tokens)}


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    patterns, topics = load_patterns(HERE / "patterns.toml"), load_topics(HERE / "topics.toml")
    stage.models.require(*(source.model for source in p.providers))
    planned = plan(p.providers, topics, list(patterns), p.seed)[: stage.limit or None]
    with open(stage.side_file(".plans.jsonl"), "wb") as file:
        file.writelines(orjson.dumps(row.model_dump(), option=orjson.OPT_APPEND_NEWLINE) for row in planned)
    profile = (HERE / "profile.md").read_text("utf-8").strip()
    system = fill(stage.prompt("system.txt"), profile=profile)
    template, examples = stage.prompt("pattern.txt"), few_shot(p.examples, p.few_shot)
    least, most = str(p.least_exchanges), str(p.most_exchanges)

    # -- process
    async def generate(row: Planned) -> tuple[Reply, str]:
        described = "\n".join(
            f"- {name}: {patterns[name].definition} It looks like this: {patterns[name].looks_like}"
            for name in row.patterns
        )
        prompt = fill(template, topic=row.topic, patterns=described, least=least, most=most, examples=examples)
        wrong = ""
        for attempt in range(p.tries):
            request = Request(
                model=row.model,
                messages=chat(system, prompt),
                max_tokens=p.max_tokens,
                temperature=p.temperature,
                response=Generated,
                repeat=row.number * MOST_TRIES + attempt,  # by a constant: another `tries` must not ask all anew
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
