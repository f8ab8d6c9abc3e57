"""02 merge: what goes on and why the rest does not, near-duplicates against brute force, the flags."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shared import engine
from shared.errors import SettingsError
from shared.records import Domain, RawText, content_id
from shared.stage import load_settings
from tests.conftest import ROOT, run_stage

STAGE = ROOT / "stages" / "02_merge"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
duplicates: Any = importlib.import_module("duplicates")
spdx: Any = importlib.import_module("shared.spdx")
_spec = importlib.util.spec_from_file_location("merge_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["merge_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

PROSE = (
    "The merge step brings every source into one canonical form and removes what is said twice, because a model that "
    "reads the same sentence a hundred times learns the sentence and not the language it was written in."
)


def raw(text: str, source: str = "a", licence: str = "MIT", domain: Domain = "prose", origin: str = "") -> RawText:
    return RawText(
        id=content_id(domain, text, origin),
        domain=domain,
        source=source,
        origin=origin or f"file#{source}",
        language="en",
        category="note",
        licence=licence,
        text=text,
    )


def merge(data: Path, lines: list[bytes], settings: str = "", **environment: str) -> tuple[Any, Path]:
    """Run the stage over these lines with trial.toml, or with ``settings`` if given."""
    (data / "01_acquire.jsonl").write_bytes(b"".join(lines))
    config = STAGE / "trial.toml"
    if settings:
        config = data / "merge.toml"
        config.write_text(settings, "utf-8")
    out = data / "02_merge.jsonl"
    flags = ("--in", data / "01_acquire.jsonl", "--out", out, "--config", config, "--track", "compression")
    return run_stage(STAGE / "main.py", *flags, **environment), out


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def vocabulary_text(draw: random.Random, words: int) -> str:
    return " ".join(f"w{min(4_999, int(draw.paretovariate(0.6)))}" for _ in range(words))


def corpus(count: int, seed: int) -> list[str]:
    """Texts of 40 to 120 words; a third are edits of earlier ones, from one word to a fifth of them."""
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        if texts and draw.random() < 0.33:
            words = draw.choice(texts).split(" ")
            for _ in range(draw.choice((0, 1, 1, 2, 3, 4, 6, 9))):
                place = draw.randrange(len(words))
                words[place : place + draw.randint(0, 2)] = [f"w{draw.randrange(5_000)}"]
            texts.append(" ".join(words))
        else:
            texts.append(vocabulary_text(draw, draw.randint(40, 120)))
    return texts


def frame(texts: Mapping[int, str]) -> Any:
    engine.start()
    import daft

    rows: Iterator[dict[str, Any]] = ({"order": order, "text": text} for order, text in texts.items())
    return engine.frame(rows, {"order": daft.DataType.uint64(), "text": daft.DataType.string()}, chunk=100)


# ---------------------------------------------------------------- duplicates


@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.8, 0.9])
def test_near_duplicates_are_those_of_brute_force(threshold: float) -> None:
    texts = corpus(900, seed=5)
    unique, exact = duplicates.exact_duplicates(frame(dict(enumerate(texts))))
    near = duplicates.near_duplicates(unique, threshold)

    shingles = [duplicates.shingles(text) for text in texts]
    first: dict[str, int] = {}
    kept: list[int] = []
    dropped: dict[int, tuple[int, float]] = {}
    for order, text in enumerate(texts):
        if text in first:
            assert exact.pop(order) == (first[text], 1.0)
            continue
        first[text] = order
        score, match = max(((duplicates.jaccard(shingles[order], shingles[k]), -k) for k in kept), default=(0, 0))
        if score >= threshold:
            dropped[order] = (-match, score)
        else:
            kept.append(order)
    assert exact == {}
    assert len(dropped) >= 50
    assert all(dropped.get(order) == tuple(match) for order, match in near.items())  # precision 1
    assert len(near) >= 0.995 * len(dropped)


def test_pairs_just_above_the_threshold_are_found_and_just_below_are_kept() -> None:
    texts, wanted = {}, {}
    # Two texts of n shingles that share s have a similarity of s / (2n - s): 144 of 162 share 0.8, 143 a little less.
    for pair in range(400):
        shared, own = (144, 18) if pair % 2 else (143, 19)
        common = [f"c{pair}x{i}" for i in range(shared + 2)]
        left, right = ([f"{side}{pair}x{i}" for i in range(own)] for side in "lr")
        texts[2 * pair], texts[2 * pair + 1] = " ".join(common + left), " ".join(common + right)
        if pair % 2:
            wanted[2 * pair + 1] = (2 * pair, 0.8)
    found = duplicates.near_duplicates(frame(texts), 0.8)
    assert set(found) <= set(wanted)
    assert all(tuple(match) == wanted[order] for order, match in found.items())
    assert len(found) >= 0.995 * len(wanted)


def test_bands_miss_almost_nothing_at_the_threshold() -> None:
    assert duplicates.bands(0.8) == (25, 5)
    for threshold in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99):
        count, rows = duplicates.bands(threshold)
        assert count * rows <= duplicates.HASHES
        assert (1 - threshold**rows) ** count <= duplicates.MISSED
        finer = rows + 1
        assert (1 - threshold**finer) ** (duplicates.HASHES // finer) > duplicates.MISSED


def test_a_dropped_text_drops_no_other() -> None:
    # Each is the one before moved on by four of sixty words: 54 of 62 shingles shared, 50 of 66 with the next but one.
    chain = {i: " ".join(f"w{4 * i + j}" for j in range(60)) for i in range(4)}
    found = duplicates.near_duplicates(frame(chain), 0.8)
    assert sorted(found) == [1, 3]
    assert (tuple(found[1]), tuple(found[3])) == ((0, 54 / 62), (2, 54 / 62))


def test_shingles_ignore_case_punctuation_and_layout() -> None:
    assert duplicates.shingles("A b,\n  c d") == {"a b c", "b c d"} == duplicates.shingles("a  B c; D!")
    assert duplicates.shingles("a b") == {"a b"}
    assert duplicates.shingles("!! --") == frozenset()
    assert duplicates.jaccard(frozenset(), frozenset()) == 0
    assert duplicates.near_duplicates(frame({0: "!! --", 1: "?? ++"}), 0.8) == {}


# ---------------------------------------------------------------- licences


@pytest.mark.parametrize(
    ("expression", "passes"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("GPL-3.0-only OR MIT AND Apache-2.0", True),
        ("MIT AND (GPL-3.0-only OR Apache-2.0)", True),
        ("(MIT AND GPL-3.0-only) OR GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", True),
        ("unknown", False),
        ("", False),
        ("MIT OR", False),
        ("(MIT", False),
        ("MIT)", False),
        ("MIT Apache-2.0", False),
        ("MIT/Apache-2.0", False),
        ("OR", False),
        ("see LICENSE", False),
        ("(" * 5_000, False),
    ],
)
def test_a_licence_expression_needs_what_it_says(expression: str, passes: bool) -> None:
    assert spdx.allowed(expression, ["MIT", "Apache-2.0"]) is passes


def test_unknown_and_exceptions_pass_when_they_are_listed() -> None:
    assert spdx.allowed("unknown", ["unknown"])
    assert spdx.allowed("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only WITH Classpath-exception-2.0"])


# ---------------------------------------------------------------- the stage


def test_every_record_goes_on_or_is_rejected_for_its_own_reason(data: Path) -> None:
    function = "    def area(self):\n        # pi r squared\n        return self.pi * self.radius ** 2\n"
    function += "\n".join(f"        # note {i}: the radius is in metres" for i in range(3)) + "  \n"
    lines = [
        raw(PROSE),
        raw(function, "b", domain="code"),
        raw("Too short."),
        raw(vocabulary_text(random.Random(1), 900)),
        raw(PROSE.replace("model", "network").replace(" ", "  ", 3), "b", "GPL-3.0-only"),
        raw(PROSE + "\0"),
        raw("  " + PROSE.replace(" ", "  ", 1).replace("  ", " ") + "\r\n", "b"),
        raw(PROSE.replace("hundred", "thousand"), "b"),
        raw(vocabulary_text(random.Random(2), 30) + " write to joe@corp.io or call (212) 555-1234"),
        raw(vocabulary_text(random.Random(3), 30) + " password = 'Tr0ub4dor&3'"),
        raw(vocabulary_text(random.Random(4), 30) + "\n-----BEGIN PRIVATE KEY-----\nMIIB"),
    ]
    bad = [b'{"not": "a record"}\n', b"\xff\xfe broken\n", b'{"text": "a\\ud800b"}\n']
    result, out = merge(data, [*(record.line() for record in lines), *bad])
    assert result.returncode == 0, result.stderr
    kept, rejects = records(out), records(out.with_name("02_merge.rejects.jsonl"))
    assert [record["id"] for record in kept] == [lines[i].id for i in (0, 1, 8)]
    texts = [record["merged"]["text"] for record in kept]
    assert texts[0] == PROSE and "merged" not in lines[0].model_dump(exclude_none=True)
    assert texts[1].startswith("def area(self):\n    # pi r squared\n")
    assert texts[2].endswith(" write to <email> or call <phone>")
    assert [record["merged"]["edits"] for record in kept] == [[], ["trailing_spaces", "trim"], ["email", "phone"]]
    assert [record["text"] for record in kept] == [lines[i].text for i in (0, 1, 8)]  # the source's bytes stay

    assert [reject["reason"] for reject in rejects[:3]] == ["not_a_record", "not_json", "not_json"]
    by_id = {reject["record"]["id"]: reject for reject in rejects[3:]}
    reasons = {i: by_id[lines[i].id]["reason"] for i in range(len(lines)) if lines[i].id in by_id}
    assert reasons == {
        2: "too_short",
        3: "too_long",
        4: "licence",
        5: "nul_byte",
        6: "exact_duplicate",
        7: "near_duplicate",
        9: "secret",
        10: "private_key",
    }
    assert by_id[lines[6].id]["match"] == by_id[lines[7].id]["match"] == lines[0].id
    score = duplicates.jaccard(duplicates.shingles(lines[7].text), duplicates.shingles(PROSE))
    assert by_id[lines[7].id]["detail"] == f"Jaccard similarity {score:.4f}"
    assert "Tr0ub4dor" not in by_id[lines[9].id]["detail"]

    report = json.loads(out.with_name("02_merge.report.json").read_bytes())
    assert report["counts"]["planned"] == len(lines) + len(bad)
    assert report["summary"]["sources"]["b"] == {
        "read": 4,
        "kept": 1,
        "exact_duplicate": 1,
        "licence": 1,
        "near_duplicate": 1,
    }
    assert sum(report["summary"]["characters_kept"].values()) == 3
    assert report["summary"]["edits"] == {"email": 1, "phone": 1, "trailing_spaces": 1, "trim": 1}
    assert result.stderr.count("\n") == 1  # Daft says nothing


def test_the_source_named_first_is_kept_whatever_comes_first_in_the_input(data: Path) -> None:
    same, alike = raw(PROSE, "dataset"), raw(PROSE.replace("hundred", "thousand"), "unlisted")
    best = raw(PROSE, "repository", origin="best")
    settings = 'priority = ["repository", "dataset"]\nlicences = ["MIT"]\n'
    for order in ([same, alike, best], [best, alike, same]):
        result, out = merge(data, [record.line() for record in order], settings)
        assert result.returncode == 0, result.stderr
        assert [record["id"] for record in records(out)] == [best.id]
        matches = {r["record"]["source"]: r["match"] for r in records(out.with_name("02_merge.rejects.jsonl"))}
        assert matches == {"dataset": best.id, "unlisted": best.id}


def test_marks_that_change_the_length_are_counted(data: Path) -> None:
    words = vocabulary_text(random.Random(8), 60)[:200]
    address = "somebody.with.a.long.name@department.example.org"
    settings = 'licences = ["MIT"]\nmin_chars = 220\n'
    longer = raw(vocabulary_text(random.Random(9), 80)[:300])
    result, out = merge(data, [raw(f"{words} {address}").line(), longer.line()], settings)
    assert result.returncode == 0, result.stderr
    (reject,) = records(out.with_name("02_merge.rejects.jsonl"))
    assert (reject["reason"], reject["detail"]) == (
        "too_short",
        f"{len(words) + 8} characters, at least 220 are wanted",
    )


def test_the_same_input_gives_the_same_bytes_and_order(data: Path) -> None:
    texts = corpus(300, seed=21)
    lines = [raw(text, f"s{i % 5}", origin=f"row{i}").line() for i, text in enumerate(texts)]
    runs = []
    for _ in range(2):
        result, out = merge(data, lines, 'licences = ["MIT"]\npriority = ["s3", "s1"]\n')
        assert result.returncode == 0, result.stderr
        runs.append((out.read_bytes(), out.with_name("02_merge.rejects.jsonl").read_bytes()))
    assert runs[0] == runs[1]
    kept = [json.loads(line)["id"] for line in runs[0][0].splitlines()]
    rejected = [json.loads(line)["record"]["id"] for line in runs[0][1].splitlines()]
    ids = [json.loads(line)["id"] for line in lines]
    assert Counter(kept + rejected) == Counter(ids)
    assert kept == [i for i in ids if i in set(kept)] and rejected == [i for i in ids if i in set(rejected)]
    assert rejected


def test_nothing_usable_and_an_empty_input_say_so(data: Path) -> None:
    for lines in ([raw("short").line()], []):
        result, out = merge(data, lines)
        assert result.returncode == 4, result.stderr
        assert not out.exists() and out.with_name("02_merge.report.json").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("", "missing key 'licences'"),
        ('licences = ["MIT"]\nmin_charz = 1\n', "the nearest valid key is 'min_chars'"),
        ('licences = ["MIT"]\nmin_chars = 300\nmax_chars = 200\n', "min_chars 300 is above max_chars 200"),
        ('licences = ["MIT"]\nnear_duplicate_jaccard = 0.2\n', "near_duplicate_jaccard"),
        ('licences = ["MIT"]\n[scrub]\nemail = "hide"\n', "scrub.email"),
        ('licences = ["MIT"]\n[scrub]\nphone_regions = ["XX"]\n', "unknown regions XX"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, settings: str, says: str) -> None:
    (tmp_path / "merge.toml").write_text(settings, "utf-8")
    with pytest.raises(SettingsError, match=f"(?i){says}"):
        load_settings(tmp_path / "merge.toml", main.Params)


def test_both_settings_files_load() -> None:
    for name in ("trial.toml", "full.toml"):
        params = load_settings(STAGE / name, main.Params)
        assert (params.min_chars, params.max_chars, params.near_duplicate_jaccard) == (100, 2_500, 0.8)
        assert "unknown" not in params.licences


# ---------------------------------------------------------------- the engine


def test_an_engine_that_does_not_exist_is_refused_before_anything_is_written(data: Path) -> None:
    result, out = merge(data, [raw(PROSE).line()], ENGINE="spark")
    assert result.returncode == 2
    assert "ENGINE must be one of embedded, ray, got 'spark'" in result.stderr
    assert not out.exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_ray_without_the_ray_package_says_what_to_do(data: Path) -> None:
    result, _ = merge(data, [raw(PROSE).line()], ENGINE="ray")
    assert result.returncode == 2
    assert "install ray, or ENGINE=embedded" in result.stderr
