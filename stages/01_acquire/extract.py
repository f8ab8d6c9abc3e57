"""Functions, methods and classes out of source files, by tree-sitter queries.

A file is looked at in two steps: :func:`file_problem` says from its path and bytes why it is left out as a whole
(test, generated, vendored, binary, not UTF-8), :func:`definitions` yields what it defines.

Rules, in order, for every definition from the outermost inwards:

- A definition holds whole lines: its decorators, attributes, ``export`` and, where the language documents from
  above (Go, Rust, TypeScript, JavaScript, SQL), the comment that touches it, when that still fits.
- Within the limits it is one piece, and what is defined inside it is not looked at again: no two overlap.
- A class that is too long is no candidate: its methods are. A function that is too long is a reject, and functions
  nested in it are candidates.
- A trivial body holds nothing but a docstring, ``pass``, ``...``, a ``raise`` or one ``return`` of less than the
  minimum number of lines.

Speed: one C parse and one query a file; Python only sees the definitions found (tree-sitter is more than ten times
faster here than ``ast.get_source_segment``).
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from shared.stage import Settings

if TYPE_CHECKING:
    from tree_sitter import Node


class CodeLimits(Settings):
    """What a definition must measure; lines and characters are those of the whole piece, both ends included."""

    min_lines: int = Field(default=5, ge=1)
    max_lines: int = Field(default=60, ge=1)
    min_chars: int = Field(default=150, ge=1)
    max_chars: int = Field(default=2_000, ge=1)
    max_file_bytes: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> CodeLimits:
        if self.min_lines > self.max_lines or self.min_chars > self.max_chars:
            raise ValueError("a minimum is above its maximum")
        return self


@dataclass(frozen=True)
class Definition:
    """One definition. ``reason`` is empty when it goes on; ``text`` is empty when it is too long to be carried along.

    Attributes:
        first: first line, from 1.
        last: last line, that line included.
        category: ``function``, ``method``, ``class`` (struct, enum, trait, impl, interface too) or ``statement`` (SQL).
    """

    text: str
    first: int
    last: int
    category: str
    reason: str = ""
    detail: str = ""


# ---------------------------------------------------------------- files

LANGUAGES = {
    ".py": "python",
    ".ts": "typescript",
    ".mts": "typescript",
    ".cts": "typescript",
    ".tsx": "tsx",
    ".js": "javascript",
    ".mjs": "javascript",
    ".cjs": "javascript",
    ".jsx": "javascript",
    ".go": "go",
    ".rs": "rust",
    ".sql": "sql",
}
_VENDORED = re.compile(
    r"(^|/)(_?vendor(ed|s)?|third[_-]?party|node_modules|bower_components|site-packages|externals?|extern|_distutils)/",
    re.IGNORECASE,
)
_TEST = re.compile(
    r"(^|/)(tests?|__tests__|__mocks__|specs?|e2e|testdata|fixtures)/"
    r"|(^|/)(tests?|conftest|test_[^/]*|[^/]*_tests?)\.[a-z]+$"
    r"|\.(test|spec)\.[cm]?[jt]sx?$",
    re.IGNORECASE,
)
_GENERATED = re.compile(
    r"(^|/)(dist|generated|__generated__|_generated)/"
    r"|(_pb2|_pb2_grpc|\.pb|\.pb\.gw|_generated|\.generated|[._]gen|\.min|\.bundle)\.[a-z]+$"
    r"|\.d\.[cm]?ts$|(^|/)_version\.py$",
    re.IGNORECASE,
)
_GENERATED_HEADER = re.compile(
    r"\bcode generated\b|@generated\b|\bauto(matically|-)? ?generated\b"
    r"|(^\W*|[.:;!]\s*)do not (edit|modify)\b|^\W*generated (by|from|with)\b"
    r"|\bthis (file|code|module) (is|was|has been) generated\b",
    re.IGNORECASE,
)
_HEADER_LINES = 12
_COMMENT_START = ("#", "//", "/*", "*", "--", '"""', "'''", "<!--")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MINIFIED_LINE = 300
"""Mean characters a line above which no person wrote the file; hand-written code stays well under 100."""


def language_of(path: str) -> str | None:
    """The language of a file by its suffix, ``None`` when it is none of ours."""
    return LANGUAGES.get(PurePosixPath(path).suffix.lower())


def path_problem(path: str) -> tuple[str, str] | None:
    """Why a file is left out by its path: ``(reason, detail)``; ``None`` when nothing speaks against it."""
    for reason, pattern in (("vendored", _VENDORED), ("test", _TEST), ("generated", _GENERATED)):
        if found := pattern.search(path):
            return reason, f"the path says so: {found.group().strip('/')}"
    return None


def file_problem(source: bytes, limits: CodeLimits) -> tuple[str, str] | None:
    """Why a file is left out by its content: ``(reason, detail)``; ``None`` when nothing speaks against it."""
    if len(source) > limits.max_file_bytes:
        return "file_too_large", f"{len(source):,} bytes; at most {limits.max_file_bytes:,}"
    if problem := text_problem(source):
        return problem
    if source.startswith(_LFS_POINTER):
        return "lfs_pointer", "the bytes are in git LFS, which is not read"
    lines = source.count(b"\n") + 1
    if len(source) / lines > _MINIFIED_LINE:
        return "generated", f"minified: {len(source) // lines} bytes a line"
    for line in source[:4_000].decode("utf-8", "ignore").splitlines()[:_HEADER_LINES]:
        if line.lstrip().startswith(_COMMENT_START) and _GENERATED_HEADER.search(line):
            return "generated", f"its header says so: {line.strip()[:100]}"
    return None


def text_problem(data: bytes) -> tuple[str, str] | None:
    """Why bytes are no text: NUL bytes (``binary``) or not UTF-8. Nothing is ever decoded lossily."""
    if b"\0" in data:
        return "binary", f"NUL byte at {data.index(0):,}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "not_utf8", f"byte {error.start:,}: {error.reason}"
    return None


def spread(paths: Iterable[str], seed: int) -> list[str]:
    """The paths in an order that depends on the seed and on each path alone, so a limit takes from everywhere.

    The same on every machine; a file added to the repository moves no other.
    """
    return sorted(paths, key=lambda path: (hashlib.sha256(f"{seed}\0{path}".encode()).digest(), path))


# ---------------------------------------------------------------- grammars


@dataclass(frozen=True)
class _Grammar:
    """One language for tree-sitter: ``@function``, ``@method``, ``@class`` and ``@statement`` name what is captured.

    Attributes:
        module: the package of the grammar, and the function in it.
        wrappers: parents that belong to the definition (``export``, decorators).
        leads: siblings right above that belong to it (doc comments, attributes).
    """

    module: tuple[str, str]
    query: str
    wrappers: frozenset[str] = frozenset()
    leads: frozenset[str] = frozenset()


_PYTHON = """
(function_definition body: (_) @body) @function
(class_definition body: (_) @body) @class
"""
_JAVASCRIPT = """
(function_declaration body: (_) @body) @function
(generator_function_declaration body: (_) @body) @function
(lexical_declaration (variable_declarator value: [
  (arrow_function body: (_) @body) (function_expression body: (_) @body)])) @function
(variable_declaration (variable_declarator value: [
  (arrow_function body: (_) @body) (function_expression body: (_) @body)])) @function
(expression_statement (assignment_expression right: [
  (arrow_function body: (_) @body) (function_expression body: (_) @body)])) @function
(method_definition body: (_) @body) @method
(class_declaration body: (_) @body) @class
"""
_TYPESCRIPT = (
    _JAVASCRIPT
    + """
(abstract_class_declaration body: (_) @body) @class
(interface_declaration body: (_) @body) @class
(public_field_definition value: (arrow_function body: (_) @body)) @method
"""
)
_GO = """
(function_declaration body: (_) @body) @function
(method_declaration body: (_) @body) @method
(type_declaration (type_spec type: [(struct_type) (interface_type)] @body)) @class
"""
_RUST = """
(function_item body: (_) @body) @function
(impl_item body: (_) @body) @class
(trait_item body: (_) @body) @class
(struct_item body: (_) @body) @class
(enum_item body: (_) @body) @class
(mod_item body: (_) @body) @module
"""
# Data (INSERT) is not asked for: it is no code.
_SQL = """
(program (statement [(create_function) (create_procedure) (create_trigger)] @body) @function)
(program (statement [(create_table) (create_view) (create_materialized_view) (select) (update) (delete)] @body)
  @statement)
"""
_ABOVE = frozenset({"comment", "line_comment", "block_comment", "marginalia", "decorator", "attribute_item"})
_EXPORTS = frozenset({"export_statement", "ambient_declaration"})
_GRAMMARS = {
    "python": _Grammar(("tree_sitter_python", "language"), _PYTHON, frozenset({"decorated_definition"})),
    "typescript": _Grammar(("tree_sitter_typescript", "language_typescript"), _TYPESCRIPT, _EXPORTS, _ABOVE),
    "tsx": _Grammar(("tree_sitter_typescript", "language_tsx"), _TYPESCRIPT, _EXPORTS, _ABOVE),
    "javascript": _Grammar(
        ("tree_sitter_javascript", "language"),
        _JAVASCRIPT + "(field_definition value: (arrow_function body: (_) @body)) @method\n",
        _EXPORTS,
        _ABOVE,
    ),
    "go": _Grammar(("tree_sitter_go", "language"), _GO, frozenset(), _ABOVE),
    "rust": _Grammar(("tree_sitter_rust", "language"), _RUST, frozenset(), _ABOVE),
    "sql": _Grammar(("tree_sitter_sql", "language"), _SQL, frozenset(), _ABOVE),
}


@lru_cache
def _loaded(language: str) -> tuple[Any, Any]:
    from tree_sitter import Language, Parser, Query

    grammar = _GRAMMARS[language]
    module, function = grammar.module
    loaded = Language(getattr(importlib.import_module(module), function)())
    return Parser(loaded), Query(loaded, grammar.query)


# ---------------------------------------------------------------- definitions


@dataclass
class _Found:
    kind: str
    node: Node  # with its wrappers
    body: Node
    name: str
    start: int  # byte where the piece begins, at a line's start where only spaces precede it
    end: int
    first: int  # row, from 0
    last: int


def definitions(source: bytes, language: str, limits: CodeLimits) -> Iterator[Definition]:
    """What a file defines, in file order: pieces to keep, and rejects with their reason.

    Args:
        source: the file, UTF-8, not binary (see :func:`file_problem`).
        language: a value of ``LANGUAGES``.
    """
    grammar = _GRAMMARS[language]
    decided = 0  # bytes up to here belong to a definition that is decided on, with all that is in it
    around: list[_Found] = []
    everything = _found(source, language)
    for found, after in zip_longest(everything, everything[1:]):
        while around and around[-1].end <= found.start:
            around.pop()
        outer = around[-1].kind if around else ""
        around.append(found)
        if found.start < decided:
            continue
        lead = _lead(found, grammar, source)
        if found.kind == "module":
            if b"cfg(test)" in source[lead[0] : found.start]:
                decided = found.end
                yield _piece(source, found, "module", "test", "a module compiled for tests only")
            continue
        category = "method" if found.kind == "function" and outer == "class" else found.kind
        size = _Size.of(source, found.start, found.end, found.first, found.last)
        if size.above(limits):
            if found.kind != "class":
                yield _too_long(found, category, size, limits)
            elif after is None or after.start >= found.end:  # nothing in it to look at instead
                decided = found.end
                yield _too_long(found, category, size, limits)
            continue
        decided = found.end
        with_lead = _Size.of(source, lead[0], found.end, lead[1], found.last)
        attributes = source[lead[0] : found.start]
        if not with_lead.above(limits):
            found.start, found.first, size = lead[0], lead[1], with_lead
        reason, detail = _problem(found, language, size, attributes, limits)
        yield _piece(source, found, category, reason, detail)


@dataclass(frozen=True)
class _Size:
    lines: int
    chars: int

    @classmethod
    def of(cls, source: bytes, start: int, end: int, first: int, last: int) -> _Size:
        return cls(last - first + 1, len(source[start:end].decode("utf-8")))

    def above(self, limits: CodeLimits) -> bool:
        return self.lines > limits.max_lines or self.chars > limits.max_chars

    def below(self, limits: CodeLimits) -> bool:
        return self.lines < limits.min_lines or self.chars < limits.min_chars

    def __str__(self) -> str:
        return f"{self.lines} lines, {self.chars:,} characters"


def _problem(found: _Found, language: str, size: _Size, attributes: bytes, limits: CodeLimits) -> tuple[str, str]:
    """``(reason, detail)``, both empty for a definition that goes on."""
    if found.node.has_error:
        return "syntax_error", f"the {language} grammar cannot read it"
    if size.below(limits):
        return "too_short", f"{size}; at least {limits.min_lines} lines, {limits.min_chars} characters"
    if _is_test(found, language, attributes):
        return "test", f"named as a test: {found.name}"
    if _is_trivial(found, language, limits):
        return "trivial", "its body does nothing but return, raise, pass or document"
    return "", ""


def _found(source: bytes, language: str) -> list[_Found]:
    """Every definition of a file, outer before inner, in file order."""
    from tree_sitter import QueryCursor

    parser, query = _loaded(language)
    wrappers = _GRAMMARS[language].wrappers
    unique: dict[tuple[int, int], _Found] = {}
    for _, captures in QueryCursor(query).matches(parser.parse(source).root_node):
        (body,) = captures.pop("body")
        ((kind, (node,)),) = captures.items()
        name = node.child_by_field_name("name")
        while node.parent is not None and node.parent.type in wrappers:
            node = node.parent
        start, end = node.start_byte, node.end_byte
        line = source.rfind(b"\n", 0, start) + 1
        if not source[line:start].strip():
            start = line
        if source[end : end + 1] == b";":
            end += 1
        text = source[name.start_byte : name.end_byte].decode("utf-8") if name else ""
        last = node.end_point.row - (node.end_point.column == 0 and node.end_point.row > node.start_point.row)
        unique.setdefault((start, -end), _Found(kind, node, body, text, start, end, node.start_point.row, last))
    return [unique[key] for key in sorted(unique)]


def _lead(found: _Found, grammar: _Grammar, source: bytes) -> tuple[int, int]:
    """``(byte, row)`` where the comments and attributes that touch a definition from above begin."""
    start, row = found.start, found.first
    above = found.node.prev_sibling
    while above is not None and above.type in grammar.leads:
        end = above.end_point.row - (above.end_point.column == 0)
        line = source.rfind(b"\n", 0, above.start_byte) + 1
        if end < row - 1 or source[line : above.start_byte].strip():
            break
        start, row, above = line, above.start_point.row, above.prev_sibling
    return start, row


def _is_test(found: _Found, language: str, attributes: bytes) -> bool:
    if language == "python":
        return found.name.startswith("test_" if found.kind == "function" else "Test")
    return language == "rust" and re.search(rb"#\[([\w:]*\b)?test\b", attributes) is not None


_NOTHING = frozenset({"pass_statement", "return_statement", "raise_statement", "throw_statement"})


def _is_trivial(found: _Found, language: str, limits: CodeLimits) -> bool:
    body = found.body
    if body.type == "select" or language == "sql":
        return False
    statements = [node for node in body.named_children if "comment" not in node.type]
    if language == "go" and len(statements) == 1 and statements[0].type == "statement_list":
        statements = [node for node in statements[0].named_children if "comment" not in node.type]
    if language == "python" and statements and _is_literal(statements[0], "string"):
        statements = statements[1:]  # the docstring
    if found.kind == "class":
        return all(node.type == "pass_statement" or _is_literal(node, "ellipsis") for node in statements)
    expression = body.type not in ("block", "statement_block")  # an arrow function that is one expression
    if expression:
        statements = [body]
    if len(statements) > 1:
        return False
    for node in statements:
        if node.end_point.row - node.start_point.row + 1 >= limits.min_lines:
            return False
        tail = language == "rust" and not node.type.endswith(("statement", "declaration", "item"))
        if not (node.type in _NOTHING or expression or tail or _is_literal(node, "ellipsis")):
            return False
    return True


def _is_literal(node: Node, kind: str) -> bool:
    return node.type == "expression_statement" and node.named_child_count == 1 and node.named_children[0].type == kind


def _piece(source: bytes, found: _Found, category: str, reason: str, detail: str) -> Definition:
    text = source[found.start : found.end].decode("utf-8")
    return Definition(text, found.first + 1, found.last + 1, category, reason, detail)


def _too_long(found: _Found, category: str, size: _Size, limits: CodeLimits) -> Definition:
    detail = f"{size}; at most {limits.max_lines} lines, {limits.max_chars:,} characters"
    return Definition("", found.first + 1, found.last + 1, category, "too_long", detail)
