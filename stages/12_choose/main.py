"""12 choose: any Item -> the best of them with ``choice``, balanced over domains and sources.

Records are ranked by ``quality()``, ties by id, and taken in that order until there are ``top_k``: while their domain's
share and their source's cap last first, then, for what too small a domain has left, from the other domains. What goes
on is in input order; the rest is rejected with its rank and score. Offline; seconds for 100,000 records, ranked on
Daft (see ``shared/engine.py``).

    python stages/12_choose/main.py --in data/trial/compression/11_deduplicate.jsonl \\
        --out data/trial/compression/12_choose.jsonl --config stages/12_choose/trial.toml --track compression
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from shared import engine
from shared.records import AnyItem, Choice, Domain, Item
from shared.stage import Settings, Stage, run

Share = Annotated[float, Field(ge=0, le=1)]


class Params(Settings):
    """See the TOML files for what each key means."""

    top_k: int = Field(default=0, ge=0)
    min_quality: float = Field(default=0.0, ge=0, le=1)
    max_share_per_source: float = Field(default=1.0, gt=0, le=1)
    domains: dict[Domain, Share] = Field(default_factory=dict)

    @field_validator("domains")
    @classmethod
    def _shares_of_one_whole(cls, domains: dict[Domain, float]) -> dict[Domain, float]:
        if domains and not math.isclose(sum(domains.values()), 1):
            raise ValueError(f"the shares must add up to 1, not {sum(domains.values()):g}")
        return domains


class Ranked(NamedTuple):
    """One record as the choice sees it; ``place`` is its place in the input."""

    place: int
    domain: Domain
    source: str
    score: float


def rows(stage: Stage[Params], records: list[Item]) -> Iterator[dict[str, Any]]:
    """One row a record; the record itself goes to ``records``."""
    for place, record in enumerate(stage.read(AnyItem)):
        records.append(record)
        yield {
            "place": place,
            "id": record.id,
            "domain": record.domain,
            "source": record.source,
            "score": record.quality(),
        }


def quotas(domains: dict[Domain, float], wanted: int) -> dict[Domain, int]:
    """Whole numbers of records that add up to ``wanted``, by largest remainder; ties to the name that sorts first."""
    exact = {domain: share * wanted for domain, share in domains.items()}
    whole = {domain: math.floor(n + 1e-9) for domain, n in exact.items()}  # 0.29 * 100 is 28.999999999999996
    by_remainder = sorted(exact, key=lambda domain: (whole[domain] - exact[domain], domain))
    for domain in by_remainder[: wanted - sum(whole.values())]:
        whole[domain] += 1
    return whole


def choose(ranked: Iterable[Ranked], params: Params) -> tuple[dict[int, str], dict[str, Any]]:
    """Why each record that is not chosen is not, by place, and the figures for the report.

    Args:
        ranked: best first.
    """
    candidates = [r for r in ranked if r.score >= params.min_quality]
    wanted = min(params.top_k or len(candidates), len(candidates))
    cap = max(1, math.floor(params.max_share_per_source * wanted + 1e-9))
    quota = quotas(params.domains, wanted)
    of_domain: Counter[str] = Counter()
    of_source: Counter[str] = Counter()
    chosen: set[int] = set()
    why: dict[int, str] = {}

    def take(r: Ranked, domain_limit: int | None) -> None:
        if r.place in chosen:
            return
        if len(chosen) == wanted:
            why[r.place] = f"top_k is {wanted}"
        elif of_source[r.source] >= cap:
            why[r.place] = f"{r.source} has its {cap} records"
        elif domain_limit is not None and of_domain[r.domain] >= domain_limit:
            why[r.place] = f"{r.domain} has its {domain_limit} records"
        else:
            chosen.add(r.place)
            of_domain[r.domain] += 1
            of_source[r.source] += 1
            why.pop(r.place, None)

    for r in candidates:
        take(r, quota.get(r.domain, 0) if quota else None)
    left = {domain: n - of_domain[domain] for domain, n in quota.items() if of_domain[domain] < n}
    if left:
        for r in candidates:
            take(r, None if params.domains.get(r.domain) else 0)
    figures = {
        "wanted": wanted,
        "chosen": len(chosen),
        "at_most_per_source": cap,
        "domains": dict(sorted(of_domain.items())),
        "sources": dict(sorted(of_source.items())),
        "left_to_other_domains": left,
    }
    return why, figures


def main(stage: Stage[Params]) -> None:
    params = stage.params
    engine.start()
    import daft

    # -- load
    string = daft.DataType.string()
    kinds = {"place": daft.DataType.int64(), "id": string, "domain": string, "source": string}
    records: list[Item] = []
    frame = engine.frame(rows(stage, records), kinds | {"score": daft.DataType.float64()})

    # -- process
    order = frame.sort(["score", "id", "place"], desc=[True, False, False])
    ranked = [Ranked(*row.values()) for row in order.select("place", "domain", "source", "score").iter_rows()]
    why, stage.summary = choose(ranked, params)
    rank_of = {r.place: rank for rank, r in enumerate(ranked, start=1)}

    # -- save
    for place, record in enumerate(records):
        rank, score = rank_of[place], record.quality()
        if score < params.min_quality:
            at_least = f"at least {params.min_quality:g} is wanted"
            stage.reject(record, "below_min_quality", f"rank {rank}, score {score:.4f}: {at_least}")
        elif place in why:
            stage.reject(record, "not_chosen", f"rank {rank}, score {score:.4f}: {why[place]}")
        else:
            stage.keep(record.with_field(choice=Choice(rank=rank, score=score)))


if __name__ == "__main__":
    run(main, Params)
