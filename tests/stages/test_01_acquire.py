"""01 acquire: what is extracted and what is left out, every kind of source, and the stage through its flags."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.records import RawText
from shared.stage import load_settings, read_records
from shared.standin.hub_data import oasst_rows
from tests.conftest import StandinLog, closed_environment, run_stage

ROOT = Path(__file__).resolve().parents[2]
STAGE = ROOT / "stages" / "01_acquire"
sys.path.insert(0, str(STAGE))  # as for the script itself: its modules import each other by plain name
extract: Any = importlib.import_module("extract")
licences: Any = importlib.import_module("licences")
prose: Any = importlib.import_module("prose")
sources: Any = importlib.import_module("sources")
git: Any = importlib.import_module("sources.git")
package: Any = importlib.import_module("sources.package")
documents: Any = importlib.import_module("sources.documents")
claude_export: Any = importlib.import_module("sources.claude_export")
_spec = importlib.util.spec_from_file_location("acquire_main", STAGE / "main.py")
assert _spec and _spec.loader
main: Any = importlib.util.module_from_spec(_spec)
sys.modules["acquire_main"] = main
_spec.loader.exec_module(main)
sys.path.remove(str(STAGE))

LIMITS = extract.CodeLimits()
MIT = (ROOT / "LICENSE").read_text("utf-8")
APACHE = "Apache License\n  Version 2.0, January 2004\n  TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"

FUNCTION = '''def clamp(value, low, high):
    """Keep a value between two bounds, and say so when it was outside of them."""
    if low > high:
        raise ValueError("the lower bound is above the upper one")
    return max(low, min(value, high))
'''


def acquire(tmp_path: Path, **limits: Any) -> Any:
    return sources.Acquire(
        limits=extract.CodeLimits(**limits), seed=13, cache=tmp_path / "cache", services=lambda: None
    )


def pieces(source: str, language: str = "python", **limits: Any) -> list[Any]:
    found = list(extract.definitions(source.encode(), language, extract.CodeLimits(**limits)))
    lines = source.split("\n")
    for piece in found:
        assert piece.text in source
        if piece.text:
            assert "\n".join(lines[piece.first - 1 : piece.last]).startswith(piece.text.rstrip(";"))
    return found


def kept(candidates: Any) -> list[Any]:
    return [candidate for candidate in candidates if not candidate.reason]


def reasons(candidates: Any) -> Counter[str]:
    return Counter(candidate.reason for candidate in candidates if candidate.reason)


# ---------------------------------------------------------------- extraction


def method(name: str, lines: int) -> str:
    body = "".join(f"        total += self.weight_of_part_{number}\n" for number in range(lines))
    return f"    def {name}(self):\n        total = 0\n{body}        return total\n"


def test_a_function_a_method_and_a_class_are_told_apart() -> None:
    long_class = "class Scale:\n" + "\n".join(method(f"weigh_{n}", 20) for n in range(4))
    source = f"{FUNCTION}\n\n@final\nclass Small:\n{method('weigh', 4)}\n\n{long_class}"
    found = kept(pieces(source))
    assert [piece.category for piece in found] == ["function", "class", "method", "method", "method", "method"]
    assert found[1].text.startswith("@final\nclass Small:")
    assert found[2].text.startswith("    def weigh_0(self):")  # whole lines, the indentation too


def test_pieces_never_overlap_and_a_class_that_fits_takes_its_methods_with_it() -> None:
    source = f"class Small:\n{method('weigh', 4)}\n{method('measure', 4)}\n\n{FUNCTION}"
    found = pieces(source)
    assert [(piece.category, piece.reason) for piece in found] == [("class", ""), ("function", "")]
    assert found[0].last < found[1].first


def test_a_function_that_is_too_long_is_a_reject_and_what_is_nested_in_it_is_not() -> None:
    inner = "".join(f"    {line}\n" for line in FUNCTION.splitlines())
    source = (
        "def outer():\n" + "".join(f"    step_{n} = compute({n})\n" for n in range(60)) + inner + "    return clamp\n"
    )
    found = pieces(source)
    assert [(piece.category, piece.reason) for piece in found] == [("function", "too_long"), ("function", "")]
    assert found[0].text == ""  # the origin says where it is: rejects stay bounded
    assert "67 lines" in found[0].detail


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_lines": 5, "min_chars": 1}, ""),
        ({"min_lines": 6, "min_chars": 1}, "too_short"),
        ({"min_chars": len(FUNCTION) - 1}, ""),
        ({"min_chars": len(FUNCTION)}, "too_short"),  # FUNCTION ends with a newline that is not part of the piece
        ({"max_lines": 5}, ""),
        ({"min_lines": 1, "max_lines": 4}, "too_long"),
        ({"max_chars": len(FUNCTION) - 1}, ""),
        ({"max_chars": len(FUNCTION) - 2}, "too_long"),
    ],
)
def test_both_ends_of_a_limit_are_inside(limits: dict[str, int], reason: str) -> None:
    (piece,) = pieces(FUNCTION, "python", **limits)
    assert piece.reason == reason


TRIVIAL_HEAD = "def area(\n    width: float,\n    height: float,\n    unit: str = 'square metres',\n) -> float:\n"
DOCSTRING = '    """The area of a rectangle, in the unit asked for, which is square metres by default."""\n'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    pass\n", "trivial"),
        ("    ...\n", "trivial"),
        ("", "trivial"),
        ("    return width * height\n", "trivial"),
        ("    raise NotImplementedError\n", "trivial"),
        ("    # nothing to see\n    return width * height\n", "trivial"),
        ("    result = width * height\n    return result\n", ""),
        ("    return Area(\n        width,\n        height,\n        unit,\n        note='measured inside')\n", ""),
    ],
)
def test_a_body_that_does_nothing_is_trivial(body: str, reason: str) -> None:
    (piece,) = pieces(TRIVIAL_HEAD + DOCSTRING + body)
    assert piece.reason == reason


def test_a_class_of_nothing_but_a_docstring_is_trivial_and_one_of_fields_is_not() -> None:
    doc = '    """' + "What went wrong, and where. " * 6 + '\n\n    Raised by the reader.\n\n    """\n'
    assert [piece.reason for piece in pieces(f"class Broken(Exception):\n{doc}    pass\n")] == ["trivial"]
    assert [piece.reason for piece in pieces(f"class Place:\n{doc}    name: str\n")] == [""]


LANGUAGES = {
    "typescript": (
        """/** Adds up what is in the basket; items that are sold out do not count. */
export const total = (items: Item[], rate = 0.19): number => {
  let sum = 0;
  for (const item of items) {
    if (!item.soldOut) sum += item.price * item.count;
  }
  return Math.round(sum * (1 + rate));
};

@Injectable()
export class Basket {
  private items: Item[] = [];
  /** Puts an item in, unless there are ten of it already, and returns how many there are now. */
  add(item: Item): number {
    const same = this.items.filter((other) => other.id === item.id).length;
    if (same < 10) this.items.push(item);
    return this.items.length;
  }
}

export interface Item {
  id: string;
  price: number; // cents, tax not included, never negative
  count: number; // whole pieces; half a piece cannot be sold
  soldOut: boolean; // true while the shop has none
}
""",
        [("function", "/** Adds"), ("class", "@Injectable()"), ("class", "export interface Item")],
    ),
    "tsx": (
        """export function Price({ cents, currency }: Props) {
  const [open, setOpen] = useState(false);
  const label = `${(cents / 100).toFixed(2)} ${currency}`;
  return (
    <button onClick={() => setOpen(!open)} title={open ? "hide the tax" : "show the tax"}>
      {label} {open && <small>tax included</small>}
    </button>
  );
}
""",
        [("function", "export function Price")],
    ),
    "javascript": (
        """Queue.prototype.take = function (timeout) {
  if (this.items.length === 0) {
    return new Promise((resolve) => this.waiting.push({ resolve, until: Date.now() + timeout }));
  }
  const item = this.items.shift();
  return Promise.resolve(item);
};

async function drain(queue, handle) {
  for (;;) {
    const item = await queue.take(1000);
    if (item === undefined) break;
    await handle(item, { retries: 3, backoff: 250, keepOrder: true, log: console.log });
  }
}
""",
        [("function", "Queue.prototype.take"), ("function", "async function drain")],
    ),
    "go": (
        """package store

// Put writes a value and returns the version it has now. An empty key is refused.
func (s *Store) Put(key string, value []byte) (int, error) {
	if key == "" {
		return 0, errors.New("store: the key is empty")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values[key] = value
	s.version++
	return s.version, nil
}

// Store keeps values in memory. It may be used from several goroutines at once.
type Store struct {
	mu      sync.Mutex
	values  map[string][]byte
	version int
}

func open(path string, readOnly bool) (*Store, error) {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("store: cannot open %s: %w", path, err)
	}
	return decode(data, readOnly)
}
""",
        [("method", "// Put writes"), ("class", "// Store keeps"), ("function", "func open")],
    ),
    "rust": (
        """/// A circle, by its centre and its radius in millimetres.
#[derive(Debug, Clone, PartialEq)]
pub struct Circle {
    pub x: f64,
    pub y: f64,
    pub radius: f64, // never negative; zero is a point
}

impl Circle {
    /// Whether a point is inside; one on the rim is.
    pub fn contains(&self, x: f64, y: f64) -> bool {
        let (dx, dy) = (x - self.x, y - self.y);
        let distance = dx * dx + dy * dy;
        distance <= self.radius * self.radius
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_point_on_the_rim_is_inside() {
        let circle = Circle { x: 0.0, y: 0.0, radius: 1.0 };
        assert!(circle.contains(1.0, 0.0));
        assert!(!circle.contains(1.0, 0.1));
    }
}
""",
        [("class", "/// A circle"), ("class", "impl Circle")],
    ),
    "sql": (
        """-- How many days a book has been out; null when it is in.
CREATE OR REPLACE FUNCTION days_out(copy_id integer) RETURNS integer AS $$
DECLARE
  taken date;
BEGIN
  SELECT max(lent_on) INTO taken FROM loans WHERE loans.copy_id = days_out.copy_id AND returned_on IS NULL;
  RETURN current_date - taken;
END;
$$ LANGUAGE plpgsql;

INSERT INTO shelves VALUES (1, 'north'), (2, 'south');

SELECT members.name, count(*) AS overdue, min(loans.due_on) AS oldest
FROM loans
JOIN members ON members.id = loans.member_id
WHERE loans.returned_on IS NULL AND loans.due_on < current_date
GROUP BY members.name
HAVING count(*) > 2;
""",
        [("function", "-- How many"), ("statement", "SELECT members.name")],
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_read_with_what_documents_it(language: str) -> None:
    source, expected = LANGUAGES[language]
    found = kept(pieces(source, language))
    assert [piece.category for piece in found] == [category for category, _ in expected]
    for piece, (_, start) in zip(found, expected, strict=True):
        assert piece.text.startswith(start)


def test_methods_of_a_long_class_are_methods_in_other_languages_too() -> None:
    source = LANGUAGES["rust"][0]
    found = pieces(source, "rust", max_lines=7)
    assert ("method", "") in [(piece.category, piece.reason) for piece in found]
    assert "class" not in [piece.category for piece in found if piece.text.startswith("impl")]
    assert ("module", "test") in [(piece.category, piece.reason) for piece in found]


def test_tests_and_broken_code_inside_a_file_are_left_out() -> None:
    test = FUNCTION.replace("clamp", "test_clamp")
    assert [piece.reason for piece in pieces(test)] == ["test"]
    broken = FUNCTION.replace("max(low, min(value, high))", "max(low, = high))")
    assert [piece.reason for piece in pieces(broken)] == ["syntax_error"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("src/app/model.py", None),
        ("src/testing/tools.py", None),
        ("src/latest.py", None),
        ("src/contest/rules.go", None),
        ("tests/model.py", "test"),
        ("src/test_model.py", "test"),
        ("src/model_test.go", "test"),
        ("web/button.spec.ts", "test"),
        ("web/__tests__/button.tsx", "test"),
        ("conftest.py", "test"),
        ("src/_vendor/six.py", "vendored"),
        ("node_modules/left-pad/index.js", "vendored"),
        ("third_party/zlib/zlib.go", "vendored"),
        ("api/service_pb2.py", "generated"),
        ("api/service.pb.go", "generated"),
        ("web/app.min.js", "generated"),
        ("web/types.d.ts", "generated"),
        ("dist/app.js", "generated"),
    ],
)
def test_a_path_says_what_is_left_out(path: str, reason: str | None) -> None:
    problem = extract.path_problem(path)
    assert (problem[0] if problem else None) == reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (FUNCTION.encode(), None),
        (b"# We do not edit this by hand often.\n" + FUNCTION.encode(), None),
        (b"// Code generated by protoc-gen-go. DO NOT EDIT.\npackage a\n", "generated"),
        (b"# This file was automatically generated from model.py.\nx = 1\n", "generated"),
        (b"/* @generated by a tool */\nlet a;\n", "generated"),
        (b"let a=" + b"b+" * 5_000 + b"c;\n", "generated"),
        (b"x = '\0'\n", "binary"),
        ("x = 'é'\n".encode("latin-1"), "not_utf8"),
        (b"x" * 1_000_001, "file_too_large"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "lfs_pointer"),
    ],
)
def test_content_says_what_is_left_out(content: bytes, reason: str | None) -> None:
    problem = extract.file_problem(content, LIMITS)
    assert (problem[0] if problem else None) == reason


def test_a_draw_depends_on_the_seed_and_on_each_path_alone() -> None:
    paths = [f"src/{number}.py" for number in range(200)]
    drawn = extract.spread(paths, 13)
    assert sorted(drawn) == sorted(paths) != drawn
    assert extract.spread(paths, 14) != drawn
    assert [path for path in extract.spread([*paths, "src/new.py"], 13) if path != "src/new.py"] == drawn


# ---------------------------------------------------------------- licences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MIT, ["MIT"]),
        (APACHE, ["Apache-2.0"]),
        ("Mozilla Public License Version 2.0\n===", ["MPL-2.0"]),
        (
            "GNU GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007 ... the GNU Lesser General Public License",
            ["GPL-3.0-only"],
        ),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n Version 3, 19 November 2007", ["AGPL-3.0-only"]),
        ("GNU LESSER GENERAL PUBLIC LICENSE\n Version 2.1, February 1999", ["LGPL-2.1-only"]),
        ("This is free and unencumbered software released into the public domain.", ["Unlicense"]),
        ("Creative Commons Legal Code\n\nCC0 1.0 Universal", ["CC0-1.0"]),
        ("You may use this if you are nice.", []),
    ],
)
def test_a_licence_is_known_by_its_text(text: str, expected: list[str]) -> None:
    assert licences.identify(text) == expected


def test_the_bsd_licences_and_isc_are_told_apart() -> None:
    bsd2 = (
        "Redistribution and use in source and binary forms, with or without modification, are permitted provided:\n"
        "2. Redistributions in binary form must reproduce the above copyright notice"
    )
    bsd3 = bsd2 + "\n3. Neither the name of the author may be used to endorse or promote products derived from it"
    isc = (
        "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is "
        "hereby granted, provided that the above copyright notice and this permission notice appear in all copies."
    )
    assert [licences.identify(text) for text in (bsd2, bsd3, isc)] == [["BSD-2-Clause"], ["BSD-3-Clause"], ["ISC"]]


def test_two_licences_are_an_expression() -> None:
    assert licences.of_files({"LICENSE-MIT": MIT, "LICENSE-APACHE": APACHE}) == "MIT OR Apache-2.0"
    pointer = "This is made available under the terms of *either* of the licenses in LICENSE.MIT or LICENSE.APACHE2."
    assert licences.of_files({"LICENSE": pointer, "LICENSE.MIT": MIT, "COPYING": APACHE}) == "MIT OR Apache-2.0"
    assert licences.of_files({"LICENSE": MIT, "COPYING": APACHE}) == "MIT AND Apache-2.0"
    gpl = "GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007 (at your option) any later version"
    lgpl = "GNU LESSER GENERAL PUBLIC LICENSE Version 3, 29 June 2007"
    assert licences.of_files({"COPYING": gpl, "COPYING.LESSER": lgpl}) == "LGPL-3.0-only"
    assert licences.of_files({"LICENSE": gpl, "LICENSE2": MIT}) == "MIT AND GPL-3.0-only"
    assert licences.of_files({"LICENSE": "be nice"}) == "unknown" == licences.of_files({})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mit", "MIT"),
        ("Apache 2.0", "Apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("MPL-2.0 and mit", "MPL-2.0 AND MIT"),
        ("(MIT OR Apache-2.0) AND ISC", "(MIT OR Apache-2.0) AND ISC"),
        ("BSD", "unknown"),
        ("MIT OR whatever", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_licence_is_known_by_its_name(name: str, expected: str) -> None:
    assert licences.of_name(name) == expected


# ---------------------------------------------------------------- git


def run_git(where: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(where), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with everything that must not be followed, executed or read."""
    path = tmp_path / "toolbox"
    (path / "src").mkdir(parents=True)
    (path / "tests").mkdir()
    (path / "ee").mkdir()
    (path / "src" / "numbers.py").write_text(f"import math\n\n\n{FUNCTION}")
    (path / "src" / "crlf.py").write_bytes(FUNCTION.replace("clamp", "bound").replace("\n", "\r\n").encode())
    (path / "src" / "latin.py").write_bytes("name = 'é'\n".encode("latin-1"))
    (path / "src" / "nul.py").write_bytes(b"x = 1\0\n")
    (path / "src" / "notes.md").write_text("# Notes\n")
    (path / "tests" / "test_numbers.py").write_text(FUNCTION)
    (path / "ee" / "paid.py").write_text(FUNCTION.replace("clamp", "charge"))
    (path / "ee" / "LICENSE").write_text("Ask us first.")
    (path / "LICENSE").write_text(MIT)
    (path / "src" / "outside.py").symlink_to("/etc/passwd")
    (path / ".gitattributes").write_text("*.py filter=evil\n")
    (path / ".gitmodules").write_text('[submodule "lib.py"]\n\tpath = lib.py\n\turl = ext::false\n')
    run_git(path, "init", "-q", "-b", "main")
    run_git(path, "add", "-A")
    run_git(path, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},lib.py")
    run_git(path, "commit", "-qm", "first")
    run_git(path, "tag", "-a", "v1", "-m", "one")
    marker = tmp_path / "executed"
    run_git(path, "config", "filter.evil.smudge", f"touch {marker}")
    run_git(path, "config", "uploadpack.packObjectsHook", f"touch {marker};")
    for hook in ("post-checkout", "post-merge", "reference-transaction", "pre-auto-gc"):
        (path / ".git" / "hooks" / hook).write_text(f"#!/bin/sh\ntouch {marker}\n")
        (path / ".git" / "hooks" / hook).chmod(0o755)
    (path / "src" / "uncommitted.py").write_text(FUNCTION.replace("clamp", "secret"))
    (path / "src" / "numbers.py").write_text(FUNCTION.replace("clamp", "changed"))
    return path


def git_source(url: str | Path, **more: Any) -> Any:
    return git.Git.model_validate(
        {"name": "toolbox", "kind": "git", "url": str(url), "ref": "v1", "limit": 100, **more}
    )


def test_a_repository_is_read_at_its_commit_and_nothing_of_it_is_executed(repository: Path, tmp_path: Path) -> None:
    commit = run_git(repository, "rev-parse", "v1^{commit}")
    found = list(git.read(git_source(repository), acquire(tmp_path)))
    by_origin = {candidate.origin.removeprefix(f"toolbox@{commit}:"): candidate for candidate in found}
    assert {name: candidate.reason for name, candidate in by_origin.items()} == {
        "src/numbers.py#L4-L8": "",
        "src/crlf.py#L1-L5": "",
        "src/latin.py": "not_utf8",
        "src/nul.py": "binary",
        "src/outside.py": "symlink",
        "tests/test_numbers.py": "test",
        "ee/paid.py#L1-L5": "",
        "lib.py": "submodule",
    }
    assert by_origin["src/numbers.py#L4-L8"].text == FUNCTION.rstrip("\n")
    assert "\r\n" in by_origin["src/crlf.py#L1-L5"].text  # byte for byte; 02 merge normalises
    assert by_origin["src/numbers.py#L4-L8"].licence == "MIT"
    assert by_origin["ee/paid.py#L1-L5"].licence == "unknown"  # the nearest licence file decides
    assert not (tmp_path / "executed").exists()
    assert not any("root:" in candidate.text for candidate in found)


def test_a_clone_is_cached_by_url_and_commit_and_read_again_without_its_source(
    repository: Path, tmp_path: Path
) -> None:
    commit = run_git(repository, "rev-parse", "v1^{commit}")
    source, context = git_source(repository, commit=commit), acquire(tmp_path)
    first = list(git.read(source, context))
    (clone,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert clone.name == hashlib.sha256(f"file://{repository}\0{commit}".encode()).hexdigest()
    assert not (clone / "hooks").exists() and (clone / "shallow").exists()
    repository.rename(tmp_path / "gone")
    repository.mkdir()
    assert list(git.read(source, context)) == first


def test_a_clone_that_is_broken_or_half_done_is_made_again(repository: Path, tmp_path: Path) -> None:
    context = acquire(tmp_path)
    first = list(git.read(git_source(repository), context))
    (clone,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    for pack in (clone / "objects" / "pack").iterdir():
        pack.unlink()
    clone.with_suffix(".part").mkdir()
    assert list(git.read(git_source(repository), context)) == first


@pytest.mark.parametrize("ref", ["v1", "main", "refs/tags/v1", "HEAD"])
def test_a_tag_a_branch_and_a_full_ref_are_resolved(repository: Path, tmp_path: Path, ref: str) -> None:
    context = acquire(tmp_path)
    git.read(git_source(repository, ref=ref), context)
    assert context.notes["toolbox"]["commit"] == run_git(repository, "rev-parse", "HEAD")


def test_a_commit_hash_is_a_ref(repository: Path, tmp_path: Path) -> None:
    old = run_git(repository, "rev-parse", "HEAD")
    run_git(repository, "commit", "-qam", "second")
    found = kept(git.read(git_source(repository, ref=old), acquire(tmp_path)))
    assert not any("changed" in candidate.text for candidate in found)


@pytest.mark.parametrize(
    ("change", "what", "mend"),
    [
        ({"ref": "v2"}, "no ref 'v2'", "git ls-remote"),
        ({"commit": "0" * 40}, "expected 0000", "moved the ref"),
        ({"url": "nowhere/at/all"}, "git cannot read nowhere/at/all", "check url"),
        ({"ref": "f" * 40}, "git cannot read", "check url"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_read(
    repository: Path, tmp_path: Path, change: dict[str, str], what: str, mend: str
) -> None:
    with pytest.raises(SettingsError) as error:
        git.read(git_source(repository, **change) if "url" not in change else git_source(**change), acquire(tmp_path))
    assert what in error.value.what and mend in error.value.mend


def test_an_url_that_is_a_command_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "file:ext")  # not even where somebody has allowed it
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    command.chmod(0o755)
    with pytest.raises(SettingsError, match="not allowed"):
        git.read(git_source(f"ext::{command}"), acquire(tmp_path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "url", ["--upload-pack=touch", "https://me:secret@localhost/x.git", "https://token@localhost/x"]
)
def test_an_url_that_is_an_option_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must not"):
        git_source(url)


def test_a_limit_on_one_file_spreads_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "many"
    path.mkdir()
    (path / "a.py").write_text("\n\n".join(FUNCTION.replace("clamp", f"clamp_{n}") for n in range(20)))
    (path / "b.py").write_text(f"{FUNCTION}\n\n{FUNCTION}\n\n{FUNCTION}")  # one text three times is one draw
    run_git(path, "init", "-q")
    run_git(path, "add", "-A")
    run_git(path, "commit", "-qm", "x")
    found = kept(git.read(git_source(path, ref="HEAD", per_file=2), acquire(tmp_path)))
    assert Counter(candidate.origin.split("#")[0][-4:] for candidate in found) == {"a.py": 2, "b.py": 1}
    assert [
        int(candidate.origin.split("#L")[1].split("-")[0]) for candidate in found if "a.py" in candidate.origin
    ] != [1, 8]


# ---------------------------------------------------------------- this repository itself

ITSELF = """
[[sources]]
name = "itself"
kind = "git"
url = "."
ref = "HEAD"
repository = "synthmill"
limit = 20
"""


def run_in(where: Path, config: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The stage of a copy of this repository, through its flags."""
    (where / "config.toml").write_text(config)
    output = where / "data" / "trial" / "compression" / "01_acquire.jsonl"
    flags = ("--out", str(output), "--config", str(where / "config.toml"), "--track", "compression", *flags)
    command = [sys.executable, "stages/01_acquire/main.py", *flags]
    env = os.environ | {"PYTHONPATH": str(where)} | environment
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=300)


def output_of(where: Path) -> Path:
    return where / "data" / "trial" / "compression" / "01_acquire.jsonl"


def small_copy(target: Path) -> Path:
    """A repository with what this stage needs, and a function that nobody else has."""
    for name in ("shared", "stages/01_acquire", "data/inputs"):
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = target / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    (target / "LICENSE").write_text(MIT)
    return target


def committed(path: Path) -> Path:
    run_git(path, "init", "-q", "-b", "main")
    run_git(path, "add", "-A")
    run_git(path, "commit", "-qm", "one")
    return path


def test_this_repository_is_a_source_in_a_shallow_clone_of_any_name(tmp_path: Path) -> None:
    original = committed(small_copy(tmp_path / "original"))
    (original / "more.txt").write_text("a second commit")
    run_git(original, "add", "-A")
    run_git(original, "commit", "-qm", "two")
    clone = tmp_path / "another name"
    run_git(tmp_path, "clone", "-q", "--depth=1", f"file://{original}", str(clone))
    (clone / "shared" / "fresh.py").write_text(FUNCTION)
    commit = run_git(original, "rev-parse", "HEAD")
    for where in (original, clone):
        done = run_in(where, ITSELF, GIT_DIR=str(tmp_path / "elsewhere"))
        assert done.returncode == 0, done.stderr
    assert output_of(original).read_bytes() == output_of(clone).read_bytes()
    records = list(read_records(output_of(clone), RawText))
    assert len(records) == 20
    for record in records:
        path, first, last = (
            record.origin.removeprefix(f"synthmill@{commit}:").replace("#L", ":").replace("-L", ":").split(":")
        )
        assert path != "shared/fresh.py" and record.licence == "MIT"
        lines = (original / path).read_text("utf-8").split("\n")
        assert "\n".join(lines[int(first) - 1 : int(last)]) == record.text
    report = json.loads(output_of(clone).with_name("01_acquire.report.json").read_bytes())
    assert report["summary"]["sources"]["itself"]["commit"] == commit


def test_a_tarball_inside_another_repository_is_refused_with_the_way_out(tmp_path: Path) -> None:
    outer = committed(small_copy(tmp_path / "outer"))
    done = run_in(small_copy(outer / "unpacked"), ITSELF)
    assert done.returncode == 2
    assert "no git history" in done.stderr and "git clone" in done.stderr
    assert not output_of(outer / "unpacked").exists()


def test_a_repository_without_a_commit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    fresh = small_copy(tmp_path / "fresh")
    run_git(fresh, "init", "-q")
    done = run_in(fresh, ITSELF)
    assert done.returncode == 2 and "no such commit" in done.stderr and "git commit" in done.stderr


# ---------------------------------------------------------------- packages


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution, with its record, that says so when it is imported."""
    site = tmp_path / "site"
    files = {
        "gauges/__init__.py": f"open({str(tmp_path / 'imported')!r}, 'w')\n",
        "gauges/clamp.py": FUNCTION,
        "gauges/edited.py": FUNCTION.replace("clamp", "bound"),
        "gauges/_vendor/six.py": FUNCTION,
        "gauges-1.2.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: gauges\nVersion: 1.2\nClassifier: License :: OSI Approved :: MIT License\n\n"
            "# Gauges\n\nGauges measures the distance between two rails to a tenth of a millimetre. It does not "
            "measure the rails themselves.\n\n```\npip install gauges\n```\n\nA reading is refused when the sensor has "
            "been on for less than 90 seconds, because it drifts until it is warm.\n"
        ),
    }
    record = []
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(text)}")
    record += ["gauges/unlisted.py,,", "../outside.py,sha256=x,1", "gauges-1.2.dist-info/RECORD,,"]
    (site / "gauges/unlisted.py").write_text(FUNCTION)
    (tmp_path / "outside.py").write_text(FUNCTION)
    (site / "gauges-1.2.dist-info/RECORD").write_text("\n".join(record) + "\n")
    (site / "gauges/edited.py").write_text(FUNCTION.replace("clamp", "tampered"))
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


def package_source(**more: Any) -> Any:
    settings = {"name": "gauges", "kind": "package", "package": "gauges", "version": "1.2", "limit": 10, **more}
    return package.Package.model_validate(settings)


def test_a_package_is_read_by_its_record_and_never_imported(distribution: Path, tmp_path: Path) -> None:
    found = list(package.read(package_source(), acquire(tmp_path)))
    assert {candidate.origin: candidate.reason for candidate in found} == {
        "gauges==1.2:gauges/clamp.py#L1-L5": "",
        "gauges==1.2:gauges/edited.py": "unverified",
        "gauges==1.2:gauges/unlisted.py": "unverified",
        "gauges==1.2:gauges/_vendor/six.py": "vendored",
    }
    assert [candidate.licence for candidate in kept(found)] == ["MIT"]
    assert not (tmp_path / "imported").exists()


def test_a_long_description_is_prose(distribution: Path, tmp_path: Path) -> None:
    source = package_source(domain="prose", sizes={"min_chars": 150, "max_chars": 400})
    found = list(package.read(source, acquire(tmp_path)))
    assert reasons(found) == {"code_block": 1}
    (passage,) = kept(found)
    assert passage.text.startswith("Gauges measures") and passage.text.endswith("until it is warm.")
    assert (passage.origin, passage.category, passage.language) == ("gauges==1.2:description#L3-L9", "readme", "en")


def test_a_package_that_is_not_there_or_not_that_version_is_refused(distribution: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gauges 1\.2 is installed, expected 1\.3"):
        package.read(package_source(version="1.3"), acquire(tmp_path))
    with pytest.raises(SettingsError, match="not installed"):
        package.read(package_source(package="no-such-package"), acquire(tmp_path))


@pytest.mark.parametrize("name", ["pydantic", "click", "tenacity", "tqdm", "packaging", "datasets", "idna"])
def test_licences_of_real_packages_are_found(name: str) -> None:
    expected = {
        "pydantic": "MIT",
        "click": "BSD-3-Clause",
        "tenacity": "Apache-2.0",
        "tqdm": "MPL-2.0 AND MIT",
        "packaging": "Apache-2.0 OR BSD-2-Clause",
        "datasets": "Apache-2.0",
        "idna": "BSD-3-Clause",
    }
    assert package.licence_of(importlib.metadata.distribution(name)) == expected[name]


# ---------------------------------------------------------------- documents


def passages(text: str, least: int = 20, most: int = 400) -> list[Any]:
    return list(prose.passages(text, prose.Sizes(min_chars=least, max_chars=most)))


DOCUMENT = """---
title: Wells
---

# Wells

## Contents

- [Depth](#depth)
- [Water](#water)

## Depth

A well of 30 metres does not run dry in summer.
It was dug in 1911, not drilled.

```python
depth = 30
```

    depth_in_feet = 98

| year | depth |
|------|-------|
| 1911 | 30    |

<div align="center">
  <img src="well.png">
</div>

![a well](well.png)

Water
-----

The water must be boiled if it has rained for more than two days.

1. Introduction ........ 3
2. Depth ............... 7

[1]: https://localhost/well
"""


def test_prose_is_kept_and_everything_else_is_left_out_with_its_name() -> None:
    found = passages(DOCUMENT)
    assert [piece.text for piece in found if not piece.reason] == [
        "A well of 30 metres does not run dry in summer.\nIt was dug in 1911, not drilled.",
        "The water must be boiled if it has rained for more than two days.",
    ]
    assert [piece.reason for piece in found if piece.reason] == [
        *("front_matter", "contents", "code_block", "code_block", "table", "markup", "markup"),
        *("contents", "markup"),
    ]
    lines = DOCUMENT.split("\n")
    for piece in found:
        assert "\n".join(lines[piece.first - 1 : piece.last]).strip() == piece.text


def test_paragraphs_are_joined_to_size_and_what_is_left_joins_the_last() -> None:
    paragraphs = [f"Paragraph {number} is {'very ' * 6}short." for number in range(7)]
    size = len(paragraphs[0])
    found = passages("\n\n".join(paragraphs), least=2 * size, most=4 * size)
    assert [piece.text.count("Paragraph") for piece in found] == [2, 2, 3]
    assert "\n\n".join(piece.text for piece in found) == "\n\n".join(paragraphs)


def test_what_would_make_a_passage_too_long_is_not_joined() -> None:
    found = passages(f"A short one.\n\n{'word ' * 70}", least=20, most=360)
    assert [(piece.reason, len(piece.text)) for piece in found] == [("too_short", 12), ("", 349)]


def test_a_paragraph_that_is_too_long_or_too_short_is_a_reject() -> None:
    found = passages(f"{'word ' * 100}\n\nTiny.", least=20, most=400)
    assert [(piece.reason, piece.text) for piece in found] == [("too_long", ""), ("too_short", "Tiny.")]


def test_an_unclosed_fence_and_front_matter_are_still_left_out_or_kept() -> None:
    assert [piece.reason for piece in passages("```\nnever closed\n\nand on it goes until the end")] == ["code_block"]
    assert [piece.reason for piece in passages("---\nNot front matter, as nothing closes it.")] == ["markup", ""]
    assert passages("") == []


@pytest.mark.parametrize(
    ("text", "heavy"),
    [
        ("I have a garden of 8 by 12 metres, and I want to plant beans; what should I not put next to them?", False),
        ("Please return the book to Anna. If she is not in, give it to Tom (second floor).", False),
        ("The letter says: pay 40 euros by 3 May, or else. Is that legal? - I doubt it.", False),
        ("Why does this fail?\n```\nfor x in y:\n    print(x)\n```", True),
        ("def f(x):\n    return x + 1\n\nprint(f(2))", True),
        ("fix it\nTraceback (most recent call last):\n  File \"a.py\", line 3, in <module>\nKeyError: 'a'", True),
        ("SELECT name FROM users WHERE id = 3;\nis slow", True),
        ('<div class="a">\n<p>hello</p>\n</div>\ncentre this', True),
        ("", False),
    ],
)
def test_code_in_a_message_is_measured(text: str, heavy: bool) -> None:
    assert (prose.code_share(text) > 0.3) is heavy


def documents_source(*patterns: str, **more: Any) -> Any:
    settings = {"name": "texts", "kind": "documents", "files": patterns, "licence": "MIT", "limit": 99, **more}
    return documents.Documents.model_validate(settings)


def test_documents_are_found_by_pattern_and_links_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "texts", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    text = "A well of 30 metres does not run dry in summer, and it was dug in 1911. " * 5
    (folder / "deep" / "well.md").write_text(text)
    (folder / "lake.txt").write_text(text.replace("well", "lake"))
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / ".hidden.md").write_text(text)
    (outside / "secret.md").write_text(text)
    (folder / "link.md").symlink_to(outside / "secret.md")
    (folder / "linked").symlink_to(outside)
    source = documents_source(f"{folder}/**/*.md", f"{folder}/*.txt", f"{folder}/*/*.md")
    found = list(documents.read(source, acquire(tmp_path)))
    shown = {candidate.origin.removeprefix(f"{folder}/"): candidate.reason for candidate in found}
    assert shown == {
        "deep/well.md#L1-L1": "",
        "lake.txt#L1-L1": "",
        "latin.txt": "not_utf8",
        "nul.txt": "binary",
        "link.md": "symlink",
        "linked/secret.md": "symlink",
    }


def test_documents_that_are_not_there_are_an_error_unless_optional(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no file matches"):
        documents.read(documents_source(f"{tmp_path}/*.md"), acquire(tmp_path))
    context = acquire(tmp_path)
    assert list(documents.read(documents_source(f"{tmp_path}/*.md", optional=True), context)) == []
    assert context.notes["texts"]["absent"] == f"{tmp_path}/*.md"


# ---------------------------------------------------------------- claude.ai exports

ASK = "Please tell me which of the two trains is cheaper if we are four people and one of us is younger than six years."


def message(sender: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {"uuid": more.pop("uuid", text[:8] or "empty"), "sender": sender, "text": text, "attachments": [], **more}


def conversation(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"uuid": "c", "name": "", "chat_messages": list(messages), **more}


def zipped(**files: bytes | str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json").replace("_zip", ".zip"), data)
    return buffer.getvalue()


def exported(path: Path, tmp_path: Path, **more: Any) -> list[Any]:
    settings = {"name": "export", "kind": "claude_export", "path": str(path), "licence": "MIT", "limit": 99, **more}
    return list(claude_export.read(claude_export.ClaudeExport.model_validate(settings), acquire(tmp_path)))


def written(path: Path, conversations: Any) -> Path:
    path.write_text(json.dumps(conversations))
    return path


@pytest.mark.parametrize(
    "packaging", ["json", "folder", "zip", "zip_with_folder", "zip_of_zips", "manifest", "wrapped", "single"]
)
def test_every_packaging_of_an_export_says_the_same(tmp_path: Path, packaging: str) -> None:
    plain = json.dumps([conversation(message("human", ASK))])
    folder = tmp_path / "export"
    folder.mkdir()
    match packaging:
        case "json":
            path = folder / "anything.json"
            path.write_text("\ufeff" + plain)
        case "folder":
            path = folder
            (folder / "conversations.json").write_text(plain)
            (folder / "users.json").write_text("never opened, so never parsed")
        case "zip":
            path = folder / "data.zip"
            path.write_bytes(zipped(conversations_json=plain, users_json="{", projects_json="["))
        case "zip_with_folder":
            path = folder / "data.zip"
            path.write_bytes(zipped(a__b__conversations_json=plain))
        case "zip_of_zips":
            path = folder / "data.zip"
            path.write_bytes(zipped(batch_zip=zipped(inner_zip=zipped(conversations_json=plain))))
        case "manifest":
            path = folder
            (folder / "manifest-1.json").write_text("{}")
            (folder / "conversations-000.zip").write_bytes(zipped(conversations_json=plain))
            (folder / "memories-000.zip").write_bytes(zipped(memories_json="{"))
            (folder / "design_chats-000.zip").write_bytes(zipped(design_chats_json="{"))
        case "wrapped":
            path = folder / "conversations.json"
            path.write_text(json.dumps({"conversations": json.loads(plain)}))
        case "single":
            path = folder / "one.json"
            path.write_text(json.dumps(conversation(message("human", ASK))))
    (found,) = exported(path, tmp_path)
    assert (found.text, found.category, found.reason) == (ASK, "message", "")
    assert found.origin.endswith("#Please t")


def test_content_blocks_go_before_the_flat_text(tmp_path: Path) -> None:
    blocks = [
        {"type": "thinking", "thinking": "They want a price."},
        {"type": "text", "text": ASK},
        {"type": "tool_use", "name": "search", "input": {}},
        {"type": "text", "text": "The tickets cannot be returned."},
    ]
    new = message("human", "They want a price. " + ASK, content=blocks)
    old = message("human", ASK + "\n```\nThis block is not supported on your current device yet.\n```", content=[])
    first, second = exported(written(tmp_path / "a.json", [conversation(new, old)]), tmp_path)
    assert first.text == f"{ASK}\n\nThe tickets cannot be returned."
    assert second.text == ASK


def test_the_branch_that_was_kept_is_read(tmp_path: Path) -> None:
    root = "00000000-0000-4000-8000-000000000000"
    messages = [
        message("human", "First " + ASK, uuid="1", parent_message_uuid=root),
        message("assistant", "Yes.", uuid="2", parent_message_uuid="1"),
        message("human", "Draft " + ASK, uuid="3", parent_message_uuid="2", created_at="2025-02-01T00:00:02Z"),
        message("human", "Final " + ASK, uuid="4", parent_message_uuid="2", created_at="2025-02-01T00:00:01Z"),
    ]
    path = written(tmp_path / "a.json", [conversation(*messages, current_leaf_message_uuid="4")])
    found = exported(path, tmp_path)
    assert [(candidate.text[:5], candidate.reason) for candidate in found] == [
        ("First", ""),
        ("Draft", "other_branch"),
        ("Final", ""),
    ]
    path = written(tmp_path / "b.json", [conversation(*messages)])  # no leaf is named: the newest is it
    assert [candidate.reason for candidate in exported(path, tmp_path)] == ["", "", "other_branch"]


def test_pasted_text_is_a_message_of_its_own(tmp_path: Path) -> None:
    pasted = {"file_name": "", "extracted_content": "Minutes of 14 March. " * 10}
    image = {"file_name": "a.png"}
    path = written(tmp_path / "a.json", [conversation(message("human", "Shorten this", attachments=[pasted, image]))])
    found = exported(path, tmp_path)
    assert [(candidate.category, candidate.reason) for candidate in found] == [
        ("message", "too_short"),
        ("attachment", ""),
    ]
    assert found[1].origin == "a.json#Shorten :attachment-0"
    assert [candidate.category for candidate in exported(path, tmp_path, attachments=False)] == ["message"]


def test_what_is_not_a_message_of_a_human_in_prose_is_left_out(tmp_path: Path) -> None:
    messages = [
        message("assistant", ASK),
        message("human", "Thanks!"),
        message("human", ""),
        message("human", ASK * 30),
        message("human", f"Fix:\n```\n{FUNCTION}```"),
        message("human", ASK + "\0"),
        message("human", ASK + "\ud83d"),
        "not a message",
    ]
    path = written(tmp_path / "a.json", [conversation(*messages), {"uuid": "no messages"}, "no conversation"])  # type: ignore[arg-type]
    assert reasons(exported(path, tmp_path)) == {
        "too_short": 1,
        "empty": 1,
        "too_long": 1,
        "code_heavy": 1,
        "binary": 1,
        "not_utf8": 1,
        "not_a_message": 1,
        "not_a_conversation": 2,
    }


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([], "is an empty export"),
        ([{"title": "x", "mapping": {"a": {}}}], "is a ChatGPT export"),
        ([{"uuid": "x", "messages": []}], "design chats"),
        ([{"uuid": "x"}], "none of its 1 items has chat_messages"),
        ("text", "expected a list of conversations"),
    ],
)
def test_an_export_of_something_else_is_named(tmp_path: Path, content: Any, what: str) -> None:
    with pytest.raises(SettingsError) as error:
        exported(written(tmp_path / "conversations.json", content), tmp_path)
    assert what in error.value.what and error.value.mend


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (zipped(design_chats_json="[]"), "design chats"),
        (zipped(readme_txt="hello"), "has no conversations.json"),
        (zipped(conversations_json="{broken"), "is not JSON"),
        (zipped(conversations_json=b"\xff\xfe"), "is not UTF-8"),
        (zipped(conversations_json="[]")[:-30], "no claude.ai export|is not JSON|is not UTF-8"),
        (zipped(conversations_json="[" + " " * 3_000_000 + "]"), "above 2 MB once unpacked"),
        (zipped(a_zip=zipped(conversations_json="[" + " " * 3_000_000 + "]")), "above 2 MB once unpacked"),
        (zipped(a_zip=zipped(a_zip=zipped(a_zip=zipped(a_zip=zipped(a_zip="x"))))), "nested more than 4 deep"),
    ],
)
def test_a_zip_that_is_no_export_or_a_bomb_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "data.zip").write_bytes(data)
    with pytest.raises(SettingsError, match=what):
        exported(tmp_path / "data.zip", tmp_path, max_megabytes=2)


def test_files_that_are_small_each_are_too_much_together(tmp_path: Path) -> None:
    for name in ("conversations-000", "conversations-001"):
        (tmp_path / f"{name}.zip").write_bytes(zipped(conversations_json="[" + " " * 1_500_000 + "]"))
    with pytest.raises(SettingsError, match="above 2 MB once unpacked"):
        exported(tmp_path, tmp_path, max_megabytes=2)


def test_a_bomb_is_not_unpacked_first(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(zipped(conversations_json=b" " * 60_000_000))
    tracemalloc.start()
    with pytest.raises(SettingsError, match="once unpacked"):
        exported(tmp_path / "data.zip", tmp_path, max_megabytes=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_names_in_a_zip_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    plain = json.dumps([conversation(message("human", ASK))])
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("../../conversations.json", plain)
    before = sorted(tmp_path.rglob("*"))
    assert len(kept(exported(folder / "data.zip", tmp_path))) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_is_not_there_is_an_error_unless_optional(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no"):
        exported(tmp_path / "nothing", tmp_path)
    assert exported(tmp_path / "nothing", tmp_path, optional=True) == []


# ---------------------------------------------------------------- the stage, through its flags


def settings_of(name: str) -> Any:
    return load_settings(STAGE / f"{name}.toml", main.Params, "compression")


SMALL = """
[[sources]]
name = "mine"
kind = "claude_export"
path = "data/private/no-such-export"
licence = "MIT"
optional = true
limit = {limit}

[[sources]]
name = "documents"
kind = "documents"
files = ["data/inputs/trial/documents/*.md"]
licence = "MIT"
limit = {limit}

[[sources]]
name = "export"
kind = "claude_export"
path = "data/inputs/trial/export"
licence = "MIT"
limit = {limit}
"""


def run_here(tmp_path: Path, config: str, *flags: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    (tmp_path / "config.toml").write_text(config)
    output = tmp_path / "trial" / "compression" / "01_acquire.jsonl"
    flags = ("--out", str(output), "--config", str(tmp_path / "config.toml"), "--track", "compression", *flags)
    return run_stage(STAGE / "main.py", *flags), output


def test_sources_come_out_in_the_order_listed_and_every_candidate_is_accounted_for(tmp_path: Path) -> None:
    done, output = run_here(tmp_path, SMALL.format(limit=100))
    assert done.returncode == 0, done.stderr
    records = list(read_records(output, RawText))
    assert [source for source, _ in groupby(record.source for record in records)] == ["documents", "export"]
    assert {record.domain for record in records} == {"prose"}
    rejects = [json.loads(line) for line in output.with_name("01_acquire.rejects.jsonl").read_bytes().splitlines()]
    report = json.loads(output.with_name("01_acquire.report.json").read_bytes())
    assert report["counts"]["planned"] == len(records) + len(rejects)
    assert report["counts"]["reasons"] == dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
    assert {"code_heavy", "other_branch", "empty", "front_matter", "contents", "table"} <= {
        *report["counts"]["reasons"]
    }
    assert report["summary"]["sources"]["mine"] == {
        "kind": "claude_export",
        "domain": "prose",
        "absent": "data/private/no-such-export",
        "kept": 0,
        "rejected": {},
    }
    assert "mine: nothing at data/private/no-such-export; it is optional" in done.stderr


def test_the_same_text_has_the_same_id_wherever_it_comes_from(tmp_path: Path) -> None:
    documents = SMALL.format(limit=3).split("[[sources]]")[2]
    twice = "[[sources]]" + documents + "[[sources]]" + documents.replace('"documents"', '"again"', 1)
    done, output = run_here(tmp_path, twice)
    assert done.returncode == 0, done.stderr
    ids = [record.id for record in read_records(output, RawText)]
    assert ids[:3] == ids[3:] and len(set(ids)) == 3


@pytest.mark.parametrize(("limit", "expected"), [(1, [1]), (5, [3, 2]), (30, [15, 15]), (0, [20, 20])])
def test_the_limit_flag_is_shared_by_the_sources(tmp_path: Path, limit: int, expected: list[int]) -> None:
    done, output = run_here(tmp_path, SMALL.format(limit=20), "--limit", str(limit))
    assert done.returncode == 0, done.stderr
    counts = Counter(record.source for record in read_records(output, RawText))
    assert [count for count in (counts["documents"], counts["export"]) if count] == expected


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("files =", "filse ="), "unknown key 'sources.1.documents.filse'; the nearest valid key is 'files'"),
        (('name = "export"', 'name = "documents"'), "source names must be unique; twice: documents"),
        (('kind = "documents"', 'kind = "document"'), "'document'"),
        (("limit = 9", "limit = 0"), "limit"),
        (('licence = "MIT"', ""), "missing key 'sources.1.documents.licence'"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_read(tmp_path: Path, change: tuple[str, str], what: str) -> None:
    done, output = run_here(tmp_path, SMALL.format(limit=9).replace(*change))
    assert done.returncode == 2
    assert what in done.stderr and "next: edit" in done.stderr
    assert not output.exists()


def test_the_full_run_is_pinned_and_large_enough() -> None:
    params = settings_of("full")
    wanted = Counter[str]()
    for source in params.sources:
        if not getattr(source, "optional", False):
            wanted[source.domain] += source.limit
        if source.kind == "git":
            assert source.ref[:1].isdigit() or source.ref.startswith(("v", "py-"))  # a release, never a branch
    assert wanted["code"] >= 5_500 and wanted["prose"] >= 5_500
    names = {source.name for source in params.sources}
    assert names >= {"starlette", "httpx", "rich", "click", "trio", "polars", "transformers", "pydantic"}
    assert {source.dataset for source in params.sources if source.kind == "huggingface"} == {
        "bigcode/the-stack",
        "codeparrot/github-code-clean",
        "databricks/databricks-dolly-15k",
        "OpenAssistant/oasst1",
    }


def test_the_committed_inputs_stay_small() -> None:
    assert sum(file.stat().st_size for file in (ROOT / "data" / "inputs").rglob("*") if file.is_file()) < 200_000


# ---------------------------------------------------------------- the trial, and the Hub, on the stand-in


def hub_source(name: str, dataset: str, mapping: str, domain: str = "prose", **more: str) -> str:
    settings = {"name": f'"{name}"', "kind": '"huggingface"', "dataset": f'"{dataset}"', "mapping": mapping}
    settings |= {"domain": f'"{domain}"', "revision": '"main"', "limit": "1_000", **more}
    return "[[sources]]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


DOLLY, OASST = "databricks/databricks-dolly-15k", "OpenAssistant/oasst1"
QUESTIONS = '{ text = ["instruction"], fixed_category = "question", fixed_licence = "CC-BY-SA-3.0" }'
HUB = (
    hub_source("stack", "bigcode/the-stack", '"the-stack"', "code")
    + hub_source("dolly", DOLLY, '"dolly"')
    + hub_source("oasst", OASST, '"oasst1"', sizes="{ min_chars = 1 }")
    + hub_source("validation", OASST, '"oasst1"', split='"validation"', sizes="{ min_chars = 1 }")
    + hub_source(
        "own", DOLLY, QUESTIONS, only='{ category = ["closed_qa"] }', shuffle_rows="0", sizes="{ min_chars = 9 }"
    )
    + hub_source("short", DOLLY, '"dolly"', max_rows="5", shuffle_rows="0")
)


@pytest.fixture(scope="module")
def hub_run(
    _standin_server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[RawText]], dict[str, Any]]:
    """Records by source and the report of one run over Hub sources; one, because importing datasets takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in closed_environment().items():
            patch.setenv(name, value)
        patch.setenv("STANDIN_URL", _standin_server[0])
        done, output = run_here(tmp_path_factory.mktemp("hub"), HUB)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.with_name("01_acquire.report.json").read_bytes())
    records = {
        name: list(group) for name, group in groupby(read_records(output, RawText), lambda record: record.source)
    }
    return records, report["summary"]["sources"]


HubRun = tuple[dict[str, list[RawText]], dict[str, Any]]


def test_hub_rows_keep_their_licence_place_and_category(hub_run: HubRun) -> None:
    records, _ = hub_run
    for record in records["stack"]:
        assert re.fullmatch(r"bigcode/the-stack@[0-9a-f]{40}#data/python/[\w.-]+:\d+#L\d+-L\d+", record.origin)
        assert record.language == "python" and record.category in ("function", "method", "class")
    assert {record.licence for record in records["stack"]} > {"MIT"}
    assert {record.licence for record in records["dolly"]} == {"CC-BY-SA-3.0"}
    assert len({record.category for record in records["dolly"]}) > 2
    assert {record.origin.rsplit(":", 1)[1] for record in records["dolly"]} == {"context", "response"}
    provenance = {(record.category, record.language, record.licence) for record in records["oasst"]}
    assert provenance == {("prompter", "en", "Apache-2.0")}
    assert {record.category for record in records["own"]} == {"question"}
    places = [int(record.origin.rsplit(":", 1)[1]) for record in records["own"]]
    assert places == sorted(places)  # shuffle_rows = 0: in the order of the file


def test_deleted_rejected_and_foreign_messages_are_no_candidates(hub_run: HubRun) -> None:
    rows = oasst_rows()
    asked = [row for row in rows if row["role"] == "prompter"]
    english = [row for row in asked if row["lang"] == "en"]
    there = [row for row in english if not row["deleted"]]
    wanted = [row for row in there if row["review_result"] is not False]
    assert len(rows) > len(asked) > len(english) > len(there) > len(wanted)
    records, summary = hub_run
    texts = [record.text for split in ("oasst", "validation") for record in records[split]]
    assert sorted(texts) == sorted(row["text"] for row in wanted)
    assert summary["oasst"]["passed_over"] + summary["validation"]["passed_over"] == len(rows) - len(wanted)


def test_reading_stops_at_max_rows_and_says_so(hub_run: HubRun) -> None:
    records, summary = hub_run
    assert {int(record.origin.split(":")[1]) for record in records["short"]} <= set(range(5))
    assert summary["short"]["stopped_at_rows"] == 5


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (hub_source("wrong", "databricks/dolly-15k", '"dolly"'), "there is no dataset databricks/dolly-15k"),
        (hub_source("wrong", OASST, '{ text = ["txet"] }'), "has no column txet; it has"),
        (hub_source("wrong", OASST, '"the-stack"'), "mapping 'the-stack' is for domain 'code'"),
        (hub_source("wrong", OASST, '"oasst2"'), "mapping"),
    ],
)
def test_a_wrong_data_set_is_an_error_with_the_way_out(
    standin: StandinLog, tmp_path: Path, source: str, what: str
) -> None:
    done, output = run_here(tmp_path, source)
    assert done.returncode == 2 and what in done.stderr and "next:" in done.stderr
    assert not output.exists() and "Traceback" not in done.stderr


def test_the_trial_gives_about_sixty_of_each_and_the_same_bytes_in_any_clone(
    standin: StandinLog, tmp_path: Path
) -> None:
    original = committed(small_copy(tmp_path / "original"))
    clone = tmp_path / "somewhere else"
    run_git(tmp_path, "clone", "-q", "--depth=1", f"file://{original}", str(clone))
    settings = (STAGE / "trial.toml").read_text("utf-8")
    for where in (original, clone):
        done = run_in(where, settings)
        assert done.returncode == 0, done.stderr
    for suffix in (".jsonl", ".rejects.jsonl"):
        name = f"01_acquire{suffix}"
        assert output_of(original).with_name(name).read_bytes() == output_of(clone).with_name(name).read_bytes()
    records = list(read_records(output_of(original), RawText))
    counts = Counter(record.domain for record in records)
    assert 50 <= counts["code"] <= 75 and 50 <= counts["prose"] <= 75
    assert {record.source for record in records} == {source.name for source in settings_of("trial").sources}
    assert "unknown" not in {record.licence for record in records}
    assert len({record.language for record in records if record.domain == "code"}) >= 4
