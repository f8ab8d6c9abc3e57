"""Passages of prose out of markdown and plain text, and a measure of how much of a text is code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import Field, model_validator

from shared.stage import Settings


class Sizes(Settings):
    """How long a passage is, in characters; both ends included."""

    min_chars: int = Field(default=300, ge=1)
    max_chars: int = Field(default=2_000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Sizes:
        if self.min_chars > self.max_chars:
            raise ValueError("min_chars is above max_chars")
        return self


@dataclass(frozen=True)
class Passage:
    """Paragraphs joined to size, or a block that is left out, then with a reason. Lines count from 1."""

    text: str
    first: int
    last: int
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Block:
    kind: str  # heading, paragraph, or the reason a block is left out
    lines: tuple[str, ...]
    first: int

    @property
    def last(self) -> int:
        return self.first + len(self.lines) - 1

    @property
    def text(self) -> str:
        return "\n".join(self.lines).strip()


def passages(text: str, sizes: Sizes) -> Iterator[Passage]:
    """The prose of a document in pieces of ``min_chars`` to ``max_chars``, and every block left out, with its reason.

    Paragraphs are joined with a blank line until the minimum is reached; a heading does not end a passage that is
    still too short. What is left at the end joins the last passage when it fits. Headings are structure and not
    passages. Left out: ``front_matter``, ``code_block``, ``contents`` (tables of contents), ``table``, ``markup``
    (images, badges, HTML, link definitions), and what is ``too_short`` or ``too_long`` by itself.
    """
    ready: Passage | None = None  # the last passage that is long enough: it may still take what is left at the end
    waiting: Passage | None = None  # paragraphs that are not long enough yet
    for block in _blocks(text):
        if block.kind == "heading":
            continue
        piece = Passage(block.text, block.first, block.last)
        if block.kind != "paragraph":
            yield replace(piece, reason=block.kind)
            continue
        if len(piece.text) > sizes.max_chars:
            yield replace(
                piece, text="", reason="too_long", detail=f"{len(piece.text):,} characters; at most {sizes.max_chars:,}"
            )
            continue
        joined = _join(waiting, piece) if waiting else piece
        if waiting and len(joined.text) > sizes.max_chars:
            yield _too_short(waiting, sizes)
            joined = piece
        if len(joined.text) < sizes.min_chars:
            waiting = joined
            continue
        if ready:
            yield ready
        ready, waiting = joined, None
    if waiting and ready and len(_join(ready, waiting).text) <= sizes.max_chars:
        ready, waiting = _join(ready, waiting), None
    if ready:
        yield ready
    if waiting:
        yield _too_short(waiting, sizes)


def _join(left: Passage, right: Passage) -> Passage:
    return Passage(f"{left.text}\n\n{right.text}", left.first, right.last)


def _too_short(piece: Passage, sizes: Sizes) -> Passage:
    return replace(piece, reason="too_short", detail=f"{len(piece.text):,} characters; at least {sizes.min_chars:,}")


# ---------------------------------------------------------------- blocks

_LOOK = 400
"""Characters of a line that the patterns look at: a table of contents has no longer ones, and none can stall them."""

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_UNDERLINE = re.compile(r"\s*([=\-~^\"'`#*+:._])\1{2,}\s*$")
_ITEM = re.compile(r"\s*([-*+•]|\d+[.)])\s+")
_CONTENTS_TITLE = re.compile(r"\W*(table of )?contents\W*$|\W*toc\W*$", re.IGNORECASE)
_CONTENTS_MARK = re.compile(r"\[TOC\]|\.\. contents::|<!--\s*toc\s*-->|\[\[_TOC_\]\]", re.IGNORECASE)
_CONTENTS_ITEM = re.compile(r"\s*(([-*+•]|\d+(\.\d+)*[.)]?)\s+)?\[[^\]]*\]\((#|[\w./-]+#)[^)]*\)\s*$")
_LEADERS = re.compile(r".*(\.\s?){4,}\s*\d+\s*$")
_MARKUP = re.compile(
    r"\s*(<[/!a-zA-Z][^>]*>?|!\[|\[!\[|\[[^\]]+\]:\s|\.\. |:[\w-]+:(\s|$))"  # HTML, images, badges, definitions, reST
)
_RULE = re.compile(r"\s*((\*\s*){3,}|(_\s*){3,}|(-\s*){3,}|(=\s*){3,})$")
_TABLE_ROW = re.compile(r"\s*(\|.*\||\+[-=+]+\+)\s*$")
_TABLE_RULE = re.compile(r"\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)+\|?\s*$")


def _blocks(text: str) -> Iterator[_Block]:
    """Blocks of lines between blank lines, each with its kind; front matter and fenced code are one block each."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    row, contents, literal, in_list = _front_matter_end(lines), False, False, False
    if row:
        yield _Block("front_matter", tuple(lines[:row]), 1)
    while row < len(lines):
        if not lines[row].strip():
            row += 1
            continue
        start = row
        if fence := _FENCE.match(lines[row]):
            row = _fence_end(lines, row, fence.group(1))
            yield _Block("code_block", tuple(lines[start:row]), start + 1)
            continue
        if _RULE.match(lines[row]):
            row += 1
            yield _Block("markup", (lines[start],), start + 1)
            continue
        while row < len(lines) and lines[row].strip() and not (row > start and _FENCE.match(lines[row])):
            row += 1
            if _HEADING.match(lines[row - 1]):
                if row - 1 > start:
                    row -= 1
                break
        block = tuple(lines[start:row])
        kind = _kind(block, contents, literal, in_list)
        if kind == "paragraph" and len(block) == 2 and _UNDERLINE.match(block[1]):
            kind = "heading"
        yield _Block(kind, block, start + 1)
        contents = _CONTENTS_TITLE.match(block[0]) is not None if kind == "heading" else contents and kind == "contents"
        literal = block[-1].rstrip().endswith("::") or (literal and kind in ("code_block", "markup"))
        in_list = bool(_ITEM.match(block[0])) or (in_list and block[0].startswith(" "))


def _front_matter_end(lines: list[str]) -> int:
    """How many lines of YAML (``---``) or TOML (``+++``) front matter a document begins with; 0 for none."""
    mark = lines[0].rstrip()
    if mark not in ("---", "+++"):
        return 0
    for row in range(1, len(lines)):
        if lines[row].rstrip() in (mark, "..." if mark == "---" else mark):
            return row + 1
    return 0


def _fence_end(lines: list[str], row: int, mark: str) -> int:
    """The row after the closing fence; the end of the document when it is never closed."""
    closing = re.compile(rf" {{0,3}}{re.escape(mark[0])}{{{len(mark)},}}\s*$")
    for end in range(row + 1, len(lines)):
        if closing.match(lines[end]):
            return end + 1
    return len(lines)


def _kind(block: tuple[str, ...], contents: bool, literal: bool, in_list: bool) -> str:
    if _HEADING.match(block[0]):
        return "heading"
    if any(_CONTENTS_MARK.search(line) for line in block):
        return "contents"
    if (contents and _ITEM.match(block[0])) or _most(block, _CONTENTS_ITEM) or _most(block, _LEADERS):
        return "contents"
    if all(line.startswith(("    ", "\t")) for line in block) and (literal or not in_list):
        return "code_block"
    if literal and block[0].startswith(" "):
        return "code_block"
    if _most(block, _TABLE_ROW) or any(_TABLE_RULE.match(line) for line in block):
        return "table"
    if _most(block, _MARKUP) or _MARKUP.match(block[0]):
        return "markup"
    return "code_block" if code_share("\n".join(block)) >= 0.5 else "paragraph"


def _most(block: tuple[str, ...], pattern: re.Pattern[str]) -> bool:
    return sum(pattern.match(line, 0, _LOOK) is not None for line in block) > len(block) / 2


# ---------------------------------------------------------------- code in prose

_CODE_LINE = re.compile(
    r"""\s*(
      (async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[:({]|(from\s+[\w.]+\s+)?import\s+[\w{*"'].*|@\w[\w.]*(\(.*)?$
    | (if|elif|for|while|with|switch|catch)\b.*[:{]\s*$|(else|try|finally|do)\s*[:{]\s*$|return\b.*[;)\]}'"\w]$
    | (const|let|var)\s+[\w{\[].*=|(export\s+)?(async\s+)?function\b.*\(|(public|private|protected|static)\s+\w+
    | (func|fn|pub|impl|struct|enum|package|namespace|using|template)\s+[\w<(].*[{;)]\s*$
    | \#(include|define|ifdef|ifndef|endif)\b|</?[a-zA-Z][\w-]*(\s[^>]*)?/?>
    | (SELECT|INSERT\s+INTO|UPDATE|DELETE\s+FROM|CREATE|ALTER|DROP)\s.*
    | [$>]\s+\w+|(>>>|\.\.\.)\s|File\s".*",\sline\s\d+|Traceback\s\(most|\s+at\s[\w.$<>]+\(.*\)$
    | [\w.\[\]"']+\s*(=|\+=|-=|:=|==)\s*\S.*|[\w.]+\([^()]*\)[;,]?$|[\w"'-]+\s*:\s*["'\[{].*,?$
    | [)\]}]+[;,)]*$|//.*|/\*.*|\*/
    )""",
    re.VERBOSE,
)
_CODE_END = re.compile(r"[;{}]\s*$|\)\s*(=>|->).*$|:\s*\{$")
_SYMBOLS = re.compile(r"[{}()\[\];=<>\\|&*$@^~`_/+#%]")


def code_share(text: str) -> float:
    """The share of a text's characters (white space not counted) that stand on lines of code, 0 to 1.

    A line is code when it is inside a fence, when it begins or ends like a statement of a common language, a shell
    prompt, a traceback or a tag, or when more than one character in six is one of the symbols code is full of.
    A plain-text rule on purpose: it needs no model and gives the same figure everywhere.
    """
    code = total = 0
    fence = ""
    for line in text.splitlines():
        size = len("".join(line.split()))
        mark = _FENCE.match(line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark.group(1)
            continue
        total += size
        if fence or _is_code(line, size):
            code += size
    return code / total if total else 0.0


def _is_code(line: str, size: int) -> bool:
    if not size:
        return False
    if _CODE_LINE.match(line, 0, _LOOK) or _CODE_END.search(line, 0, _LOOK):
        return True
    return len(_SYMBOLS.findall(line)) * 6 > size
