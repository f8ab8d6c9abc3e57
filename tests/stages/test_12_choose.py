"""12 choose: top-K, domain shares, source caps, ties, what a small domain leaves, the stage through its flags."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.records import Domain, Generation, Pair, Verdicts, content_id
from shared.stage import load_settings
from tests.conftest import ROOT, run_stage

STAGE = ROOT / "stages" / "12_choose"
_spec = importlib.util.spec_from_file_location("choose_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["choose_main"] = main
_spec.loader.exec_module(main)

GENERATION = Generation(
    generator="teacher",
    model="m",
    prompt="0" * 16,
    tokenizer="t",
    verbose_tokens=9,
    compressed_tokens=3,
    compression_ratio=1 / 3,
)


def ranked(*groups: tuple[Domain, str, Iterable[float]]) -> list[Any]:
    """Records by domain and source with these scores, best first; places as listed."""
    flat = [(domain, source, score) for domain, source, scores in groups for score in scores]
    listed = [main.Ranked(place, *fields) for place, fields in enumerate(flat)]
    return sorted(listed, key=lambda r: (-r.score, r.place))


def chosen(records: list[Any], **settings: Any) -> tuple[list[Any], dict[int, str], dict[str, Any]]:
    why, figures = main.choose(records, main.Params(**settings))
    kept = [r for r in records if r.place not in why and r.score >= settings.get("min_quality", 0)]
    assert figures["chosen"] == len(kept)
    return kept, why, figures


def scores(count: int, top: float = 1.0) -> list[float]:
    return [top - i / 1000 for i in range(count)]


# ---------------------------------------------------------------- the choice


def test_without_limits_all_are_chosen() -> None:
    records = ranked(("code", "a", scores(5)), ("prose", "b", scores(3)))
    kept, why, _ = chosen(records)
    assert len(kept) == 8 and why == {}


def test_top_k_takes_the_best() -> None:
    records = ranked(("code", "a", scores(20)), ("prose", "b", scores(20, top=0.99)))
    kept, why, _ = chosen(records, top_k=12)
    assert kept == records[:12]
    assert set(why.values()) == {"top_k is 12"}


def test_domains_get_their_shares_of_the_best_of_each() -> None:
    records = ranked(("code", "a", scores(50)), ("prose", "b", scores(50, top=0.5)))
    kept, why, figures = chosen(records, top_k=20, domains={"code": 0.7, "prose": 0.3})
    assert figures["domains"] == {"code": 14, "prose": 6} and figures["left_to_other_domains"] == {}
    assert sorted(r.score for r in kept) == sorted(scores(14) + scores(6, top=0.5))
    assert Counter(why[r.place] for r in records if r.place in why and r.score > 0.95) == {
        "code has its 14 records": 36
    }


def test_what_a_small_domain_leaves_goes_to_the_best_of_the_others_and_is_said() -> None:
    records = ranked(("code", "a", scores(50)), ("prose", "b", scores(4, top=0.5)))
    kept, _, figures = chosen(records, top_k=20, domains={"code": 0.5, "prose": 0.5})
    assert figures["domains"] == {"code": 16, "prose": 4}
    assert figures["left_to_other_domains"] == {"prose": 6}
    assert [r.score for r in kept if r.domain == "code"] == scores(16)


def test_a_domain_without_a_share_gets_nothing_even_when_there_is_room() -> None:
    records = ranked(("code", "a", scores(3)), ("prose", "b", scores(9)))
    kept, why, figures = chosen(records, top_k=6, domains={"code": 1.0})
    assert figures["domains"] == {"code": 3} and figures["wanted"] == 6
    assert {r.domain for r in kept} == {"code"} and len(why) == 9


def test_a_source_gets_at_most_its_share() -> None:
    records = ranked(("code", "a", scores(50)), ("code", "b", scores(5, top=0.2)), ("code", "c", scores(9, top=0.1)))
    kept, why, figures = chosen(records, top_k=20, max_share_per_source=0.6)
    assert figures["sources"] == {"a": 12, "b": 5, "c": 3} and figures["at_most_per_source"] == 12
    assert [r.score for r in kept if r.source == "a"] == scores(12)
    assert "a has its 12 records" in why.values()


def test_caps_may_leave_fewer_than_wanted_and_the_figures_say_so() -> None:
    kept, _, figures = chosen(ranked(("code", "a", scores(50))), top_k=20, max_share_per_source=0.25)
    assert (figures["wanted"], figures["chosen"], len(kept)) == (20, 5, 5)


def test_domain_shares_and_source_caps_hold_together_on_random_data() -> None:
    draw = random.Random(6)
    for _ in range(40):
        groups: list[tuple[Domain, str, list[float]]] = [
            (domain, f"{domain}{i}", [draw.random() for _ in range(draw.randint(0, 30))])
            for domain in ("code", "prose")
            for i in range(draw.randint(1, 4))
        ]
        records = ranked(*groups)
        top_k, cap, share = draw.randint(1, 60), draw.choice((0.2, 0.35, 0.5, 1.0)), draw.choice((0.2, 0.5, 0.9))
        shares = {"code": share, "prose": 1 - share}
        kept, why, figures = chosen(records, top_k=top_k, max_share_per_source=cap, domains=shares)
        wanted = min(top_k, len(records))
        assert len(kept) <= wanted and len(kept) + len(why) == len(records)
        assert max(Counter(r.source for r in kept).values(), default=0) <= max(1, int(cap * wanted + 1e-9))
        worst = {r.source: min(k.score for k in kept if k.source == r.source) for r in kept}
        for r in records:  # of one source, nothing better than what was taken is left behind
            assert r.place not in why or r.source not in worst or r.score <= worst[r.source]
        if len(kept) < wanted:  # then every source is used up or at its cap
            left = Counter(r.source for r in records if r.place in why)
            assert all(Counter(r.source for r in kept)[source] == figures["at_most_per_source"] for source in left)


@pytest.mark.parametrize(
    ("shares", "wanted", "quotas"),
    [
        ({"code": 0.5, "prose": 0.5}, 7, {"code": 4, "prose": 3}),
        ({"prose": 0.5, "code": 0.5}, 7, {"prose": 3, "code": 4}),
        ({"code": 0.29, "prose": 0.71}, 100, {"code": 29, "prose": 71}),
        ({"code": 0.9, "prose": 0.1}, 3, {"code": 3, "prose": 0}),
        ({"code": 1.0}, 0, {"code": 0}),
    ],
)
def test_quotas_are_whole_and_add_up(shares: dict[Domain, float], wanted: int, quotas: dict[str, int]) -> None:
    assert main.quotas(shares, wanted) == quotas


def test_quality_below_the_minimum_is_never_chosen() -> None:
    records = ranked(("code", "a", [0.9, 0.8, 0.79]))
    kept, _, figures = chosen(records, top_k=3, min_quality=0.8)
    assert [r.score for r in kept] == [0.9, 0.8] and figures["wanted"] == 2


# ---------------------------------------------------------------- the stage


def pair(number: int, score: float, source: str = "s", domain: Domain = "code") -> Pair:
    verdicts = Verdicts(panel=(), min_equivalence=score, mean_equivalence=score, threshold=0.5, passed=True)
    return Pair(
        id=content_id(domain, str(number)),
        domain=domain,
        source=source,
        origin=f"row{number}",
        language="en",
        category="c",
        licence="MIT",
        verbose=f"text {number}",
        compressed="t",
        generation=GENERATION,
        verdicts=verdicts,
    )


def run(data: Path, pairs: list[Pair], settings: str) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    (data / "11_deduplicate.jsonl").write_bytes(b"".join(p.line() for p in pairs))
    (data / "choose.toml").write_text(settings, "utf-8")
    out = data / "12_choose.jsonl"
    flags = ("--in", data / "11_deduplicate.jsonl", "--out", out, "--config", data / "choose.toml")
    result = run_stage(STAGE / "main.py", *flags, "--track", "compression")
    read = [out, out.with_name("12_choose.rejects.jsonl")]
    kept, rejects = ([json.loads(line) for line in path.read_bytes().splitlines()] for path in read)
    return result, kept, rejects


def test_the_stage_keeps_input_order_and_tells_rank_and_score(data: Path) -> None:
    pairs = [pair(0, 0.7), pair(1, 0.9), pair(2, 0.3), pair(3, 0.8), pair(4, 0.6), pair(5, 0.1)]
    result, kept, rejects = run(data, pairs, "top_k = 3\nmin_quality = 0.2\n")
    assert result.returncode == 0, result.stderr
    assert [(r["id"], r["choice"]) for r in kept] == [
        (pairs[0].id, {"rank": 3, "score": 0.7}),
        (pairs[1].id, {"rank": 1, "score": 0.9}),
        (pairs[3].id, {"rank": 2, "score": 0.8}),
    ]
    assert [(r["record"]["id"], r["reason"], r["detail"]) for r in rejects] == [
        (pairs[2].id, "not_chosen", "rank 5, score 0.3000: top_k is 3"),
        (pairs[4].id, "not_chosen", "rank 4, score 0.6000: top_k is 3"),
        (pairs[5].id, "below_min_quality", "rank 6, score 0.1000: at least 0.2 is wanted"),
    ]
    summary = json.loads((data / "12_choose.report.json").read_bytes())["summary"]
    assert summary["chosen"] == summary["wanted"] == 3
    assert result.stderr.count("\n") == 1  # Daft says nothing


def test_ties_are_broken_by_id_whatever_the_input_order(data: Path) -> None:
    pairs = [pair(number, 0.5, f"s{number % 3}") for number in range(30)]
    settings = "top_k = 10\nmax_share_per_source = 0.4\n"
    sets = []
    for seed in (1, 2):
        random.Random(seed).shuffle(pairs)
        result, kept, _ = run(data, pairs, settings)
        assert result.returncode == 0, result.stderr
        assert [r["id"] for r in kept] == [p.id for p in pairs if p.id in {r["id"] for r in kept}]
        sets.append({(r["id"], r["choice"]["rank"]) for r in kept})
    assert sets[0] == sets[1] and len(sets[0]) == 10
    assert min(rank for _, rank in sets[0]) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("domains = { code = 0.5, prose = 0.4 }\n", "add up to 1, not 0.9"),
        ("domains = { code = 0.5, poetry = 0.5 }\n", "domains.poetry"),
        ("max_share_per_source = 0\n", "max_share_per_source"),
        ("top_k = -1\n", "top_k"),
        ("topk = 1\n", "nearest valid key is 'top_k'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: str, says: str) -> None:
    (tmp_path / "x.toml").write_text(settings, "utf-8")
    with pytest.raises(SettingsError, match=says):
        load_settings(tmp_path / "x.toml", main.Params)


def test_both_settings_files_load_for_every_track() -> None:
    for name in ("trial.toml", "full.toml"):
        assert load_settings(STAGE / name, main.Params, "compression").domains == {"code": 0.5, "prose": 0.5}
        for track in ("grounded", "patterns"):
            assert load_settings(STAGE / name, main.Params, track).domains == {}
