"""06 validate_qa: QAPair -> QAPair + validation by another model than the one that wrote it.

Four booleans against the chunk: supported, complete, self-contained, no invention. All pairs with their validation
lie in 06_validate_qa.scores.jsonl; those for which all four hold go on.

Cost: one call a pair; about $0.0001 at gpt-6-luna.

    python stages/06_validate_qa/main.py --in data/trial/grounded/05_extract_qa.jsonl \\
        --out data/trial/grounded/06_validate_qa.jsonl --config stages/06_validate_qa/trial.toml --track grounded
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field

from shared.errors import SettingsError
from shared.llm import Reply, Request, chat, fill
from shared.llm.types import strict_schema
from shared.llm.volume import Calls, Volume, tokens_of
from shared.records import Domain, QAPair, Validation
from shared.stage import Settings, Stage, run

ANSWER_TOKENS = 36
"""Of one validation, for the estimate: four booleans and a sentence; the trial's have 35."""
REASONS = {
    "supported": "not_supported",
    "complete": "not_complete",
    "self_contained": "not_self_contained",
    "no_invention": "invention",
}
"""The four criteria, and the reject reason of each."""
CRITERIA = tuple(REASONS)


class Params(Settings):
    """Settings of 06; see trial.toml for the unit of each."""

    model: str
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(400, ge=64)


class Checked(BaseModel):
    """The answer to ``validate.txt``."""

    supported: bool
    complete: bool
    self_contained: bool
    no_invention: bool
    reason: str


def calls(params: Params, volumes: Mapping[Domain, Volume]) -> list[Calls]:
    """What 06 asks for these pairs, from an empty store."""
    here = Path(__file__).parent / "prompts"
    prompt = sum(tokens_of((here / f"{name}.txt").read_text("utf-8")) for name in ("system", "validate"))
    pairs = sum(volume.records for volume in volumes.values())
    tokens = sum(volume.records * volume.tokens for volume in volumes.values())
    asked = pairs * (prompt + tokens_of(str(strict_schema(Checked)))) + tokens
    return [Calls(params.model, pairs, asked, pairs * ANSWER_TOKENS)]


def main(stage: Stage[Params]) -> None:
    # -- load
    p = stage.params
    stage.models.require(p.model)
    system, template = stage.prompt("system.txt"), stage.prompt("validate.txt")
    passed_by = dict.fromkeys(CRITERIA, 0)
    if any(pair.generated_by == p.model for pair in stage.peek(QAPair)):
        raise SettingsError(
            f"{p.model} wrote the pairs and cannot validate them",
            "set another model in stages/06_validate_qa/<run>.toml",
        )

    # -- process
    async def validate(pair: QAPair) -> Reply:
        prompt = fill(template, chunk=pair.chunk, question=pair.question, answer=pair.answer)
        request = Request(model=p.model, messages=chat(system, prompt), max_tokens=p.max_tokens, response=Checked)
        return await stage.models.ask(request)

    # -- save
    checked = 0
    with open(stage.side_file(".scores.jsonl"), "wb") as scores:
        for pair, reply in stage.models.map(validate, stage.read(QAPair), p.concurrency):
            if reply.problem:
                stage.reject(pair, reply.problem, reply.detail)
                continue
            held = {name: getattr(reply.parsed, name) for name in CRITERIA}
            validation = Validation(model=p.model, **held, reason=reply.parsed.reason, passed=all(held.values()))
            record = pair.with_field(validation=validation)
            scores.write(record.line())
            checked += 1
            for name, holds in held.items():
                passed_by[name] += holds
            if validation.passed:
                stage.keep(record)
            else:
                failed = [name for name, holds in held.items() if not holds]
                stage.reject(record, REASONS[failed[0]], f"failed {', '.join(failed)}: {validation.reason}")
    stage.summary["pass_rates"] = {name: round(count / max(1, checked), 4) for name, count in passed_by.items()}


if __name__ == "__main__":
    run(main, Params)
