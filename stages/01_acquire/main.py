"""01 acquire: pieces of code and prose from pinned sources.

In: nothing; the sources are the ``[[sources]]`` tables of the settings. Out: ``RawText``, sources in the order listed.
Left out, with a reason each: what is too short, too long, trivial, a test, generated, vendored, not text.
Sources: ``git``, ``package``, ``huggingface``, ``claude_export``, ``documents`` (see ``sources/``). Cost: nothing; the
network is used by git URLs and the Hub only. Clones are kept in ``data/cache/git``.

    python stages/01_acquire/main.py --out data/trial/compression/01_acquire.jsonl \\
        --config stages/01_acquire/trial.toml --track compression
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any

from extract import CodeLimits
from pydantic import Field, model_validator
from sources import ROOT, Acquire, Candidate, Candidates, claude_export, documents, git, huggingface, package

from shared.records import Domain, RawText, content_id
from shared.stage import Settings, Stage, run

CACHE = ROOT / "data" / "cache" / "git"

AnySource = Annotated[
    git.Git | package.Package | huggingface.HuggingFace | claude_export.ClaudeExport | documents.Documents,
    Field(discriminator="kind"),
]
READERS: dict[str, Callable[[Any, Acquire], Candidates]] = {
    "git": git.read,
    "package": package.read,
    "huggingface": huggingface.read,
    "claude_export": claude_export.read,
    "documents": documents.read,
}


class Params(Settings):
    """``seed`` draws the order of files and rows, so that a source's limit takes from all of it."""

    seed: int = 13
    code: CodeLimits = CodeLimits()
    sources: list[AnySource] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Params:
        counts = Counter(source.name for source in self.sources)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"source names must be unique; twice: {', '.join(twice)}")
        return self


def record(candidate: Candidate, name: str, domain: Domain) -> RawText:
    """The candidate as a record; its id is that of its text, wherever it came from."""
    return RawText(
        id=content_id(domain, candidate.text),
        domain=domain,
        source=name,
        origin=candidate.origin,
        language=candidate.language,
        category=candidate.category,
        licence=candidate.licence,
        text=candidate.text,
    )


def share(limit: int, most: int, kept: int, sources_left: int) -> int:
    """How many records a source may keep: its limit, and an even part of what ``most`` (0 = all) still allows.

    What one source cannot fill goes to those after it.
    """
    return min(limit, -(-(most - kept) // sources_left)) if most else limit


def main(stage: Stage[Params]) -> None:
    # -- load
    params = stage.params
    acquire = Acquire(limits=params.code, seed=params.seed, cache=CACHE, services=stage.services)
    opened = [(source, READERS[source.kind](source, acquire)) for source in params.sources]

    # -- process
    reasons: dict[str, Counter[str]] = {source.name: Counter() for source in params.sources}
    kept: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    total = sum(source.limit for source in params.sources)
    with stage.progress(min(stage.limit or total, total)) as bar:
        for number, (source, candidates) in enumerate(opened):
            most = share(source.limit, stage.limit, stage.kept, len(opened) - number)
            with closing(candidates) as stream:
                while kept[source.name] < most and (candidate := next(stream, None)) is not None:
                    stage.plan()
                    if not candidate.reason:
                        stage.keep(record(candidate, source.name, source.domain))
                        kept[source.name] += 1
                        domains[source.domain] += 1
                        bar.step()
                        continue
                    reasons[source.name][candidate.reason] += 1
                    if candidate.text:
                        rejected = record(candidate, source.name, source.domain)
                        stage.reject(rejected, candidate.reason, candidate.detail)
                    else:
                        stage.reject_raw(candidate.origin, candidate.reason, candidate.detail)

    # -- save
    stage.summary["domains"] = dict(sorted(domains.items()))
    stage.summary["sources"] = {
        source.name: {
            "kind": source.kind,
            "domain": source.domain,
            **acquire.notes.get(source.name, {}),
            "kept": kept[source.name],
            "rejected": dict(sorted(reasons[source.name].items())),
        }
        for source in params.sources
    }
    for name, facts in acquire.notes.items():
        if "absent" in facts:
            stage.tables.append(f"  {name}: nothing at {facts['absent']}; it is optional")


if __name__ == "__main__":
    run(main, Params)
