"""07 converse: QAPair -> Conversation: dialogues seeded by validated pairs, each after a plan drawn from the seed.

The plans lie in 07_converse.plans.jsonl. A conversation whose roles, alternation or number of turns are off its plan
is asked for again, then rejected.

Cost: one call a conversation; about $0.0006 at gpt-6-luna.

    python stages/07_converse/main.py --in data/trial/grounded/06_validate_qa.jsonl \\
        --out data/trial/grounded/07_converse.jsonl --config stages/07_converse/trial.toml --track grounded
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import orjson
from plans import draw
from pydantic import BaseModel, Field

from shared.dialogue import Turn, fault_of
from shared.llm import Reply, Request, chat, fill
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Conversation, Domain, Grounding, Message, Plan, QAPair, content_id
from shared.stage import Settings, Stage, run

EXCHANGE_TOKENS = 80
"""Of one question and its answer, JSON and second tries included, for the estimate; the trial's have 77."""
TRIES = 3
"""Times a conversation that is off its plan is asked for."""


class Params(Settings):
    """Settings of 07; see trial.toml for the unit of each."""

    model: str
    count: int = Field(0, ge=0)
    per_pair: int = Field(10, ge=1)
    seed: int = 0
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(2000, ge=256)
    temperature: float | None = None
    shares: dict[Literal["style", "emotion", "modality", "variation"], dict[str, float]]
    turns: dict[int, float]
    system_prompts: dict[str, str]
    personas: dict[str, tuple[str, ...]]
    wording: dict[str, str]


class Dialogue(BaseModel):
    """The answer to ``converse.txt``."""

    messages: list[Turn]


def varied(text: str, variation: str) -> str:
    """A user's turn in the plan's text variation; done here, so that it holds for every turn."""
    if variation == "lowercase":
        return text.lower()
    if variation == "no punctuation":
        return " ".join(re.sub(r"(?<!\S)[\"“(]+|[.,;:!?\"“”()…]+(?=\s|$)", "", text).split())
    return text


def prompt_for(template: str, pair: QAPair, plan: Plan, params: Params) -> str:
    """The request for one conversation, in words."""
    system = params.system_prompts[plan.system_prompt]
    exchanges = f"{plan.turns} exchange" + ("s" if plan.turns > 1 else "")
    values = {
        "persona": plan.persona,
        "style": plan.style,
        "emotion": params.wording.get(plan.emotion, plan.emotion),
        "modality": params.wording.get(plan.modality, plan.modality),
        "turns": exchanges,
        "messages": str(2 * plan.turns),
        "difficulty": plan.difficulty,
        "system_prompt": system,
        "chunk": pair.chunk,
        "question": pair.question,
        "answer": pair.answer,
    }
    return fill(template, **values)


def planned(params: Params, pairs: float) -> float:
    """How many conversations that many pairs seed."""
    return min(pairs * params.per_pair, params.count or float("inf"))


def exchanges(params: Params) -> float:
    """Mean number of exchanges of a conversation."""
    return sum(turns * share for turns, share in params.turns.items()) / sum(params.turns.values())


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 07 asks for these pairs, from an empty store."""
    here = Path(__file__).parent / "prompts"
    prompt = sum(tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in ("system", "converse"))
    pairs = sum(volume.records for volume in volumes.values())
    count = planned(params, pairs)
    tokens = sum(volume.records * volume.tokens for volume in volumes.values()) / max(1.0, pairs)
    asked = count * (prompt + tokens_of(str(strict_schema(Dialogue))) + tokens)
    return [Calls(params.model, count, asked, count * exchanges(params) * EXCHANGE_TOKENS)]


def yields(params: Params, volumes: Mapping[Domain, Volume]) -> dict[Domain, Volume]:
    """The conversations 07 will make of these pairs."""
    pairs = sum(volume.records for volume in volumes.values())
    return {
        domain: Volume(planned(params, pairs) * volume.records / pairs, exchanges(params) * EXCHANGE_TOKENS)
        for domain, volume in volumes.items()
    }


def occurrences(plans: list[tuple[QAPair, Plan]]) -> list[tuple[int, tuple[QAPair, Plan]]]:
    """Each pair and plan, with how many equal ones came before it."""
    seen: Counter[tuple[str, Plan]] = Counter()
    numbered = []
    for pair, plan in plans:
        numbered.append((seen[pair.id, plan], (pair, plan)))
        seen[pair.id, plan] += 1
    return numbered


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    stage.models.require(p.model)
    system, template = stage.prompt("system.txt"), stage.prompt("converse.txt")
    pairs = list(stage.read(QAPair, seeds=True))
    plans = draw(
        pairs,
        count=p.count,
        per_pair=p.per_pair,
        seed=p.seed,
        shares={
            **{str(name): row for name, row in p.shares.items()},
            "system_prompt": dict.fromkeys(p.system_prompts, 1.0),
        },
        turns=p.turns,
        personas=p.personas,
    )[: stage.limit or None]
    with open(stage.side_file(".plans.jsonl"), "wb") as file:
        for pair, plan in plans:
            file.write(orjson.dumps({"pair": pair.id, **plan.model_dump()}, option=orjson.OPT_APPEND_NEWLINE))

    # -- process
    async def converse(seeded: tuple[int, tuple[QAPair, Plan]]) -> tuple[Reply, str]:
        occurrence, (pair, plan) = seeded
        request = Request(
            model=p.model,
            messages=chat(system, prompt_for(template, pair, plan, p)),
            max_tokens=p.max_tokens,
            temperature=p.temperature,
            response=Dialogue,
        )
        fault = ""
        for attempt in range(TRIES):
            # Two equal plans for one pair are two conversations: the second asks again.
            reply = await stage.models.ask(request.model_copy(update={"repeat": occurrence * TRIES + attempt}))
            if reply.problem or not (fault := fault_of(reply.parsed.messages, plan.turns, plan.turns)):
                break
        return reply, fault

    # -- save
    seen: set[str] = set()
    for (_, (pair, plan)), (reply, fault) in stage.models.map(converse, occurrences(plans), p.concurrency):
        stage.plan()
        if reply.problem:
            stage.reject(pair, reply.problem, reply.detail)
            continue
        turns = [
            Message(role=t.role, content=varied(t.content, plan.variation) if t.role == "user" else t.content)
            for t in reply.parsed.messages
        ]
        messages = (Message(role="system", content=p.system_prompts[plan.system_prompt]), *turns)
        record = Conversation(
            id=content_id("conversation", pair.id, *(m.content for m in messages)),
            parents=(pair.id, *pair.parents),
            domain=pair.domain,
            source=pair.source,
            origin=pair.origin,
            language=pair.language,
            category=pair.category,
            licence=pair.licence,
            messages=messages,
            generated_by=p.model,
            plan=plan,
            grounding=(Grounding(question=pair.question, answer=pair.answer, chunk=pair.chunk),),
        )
        if fault:
            stage.reject(record, "off_plan", fault)
        elif record.id in seen:
            stage.reject(record, "duplicate", "the same conversation again")
        else:
            seen.add(record.id)
            stage.keep(record)
    stage.summary |= {"plans": len(plans), "pairs": len(pairs)}


if __name__ == "__main__":
    run(main, Params)
