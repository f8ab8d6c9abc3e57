"""What every stage does, so that a stage's ``main.py`` holds only what is particular to it.

A stage is called with the same five flags and writes the same three files::

    python stages/02_merge/main.py --in data/trial/compression/01_acquire.jsonl \\
        --out data/trial/compression/02_merge.jsonl --config stages/02_merge/trial.toml --track compression --limit 0

    02_merge.rejects.jsonl   what does not go on, with reasons       renamed into place first
    02_merge.report.json     counts, cost, hashes, versions          then this
    02_merge.jsonl           what goes on, in input order            last: if it is there, all three are whole

A killed stage leaves the previous good files: everything is written to ``.part`` files beside them, synced, and
renamed only when ``planned = kept + rejected`` holds. The shape of a stage::

    class Params(Settings):
        min_chars: int = 100

    def main(stage: Stage[Params]) -> None:
        for record in stage.read(RawText):
            if len(record.text) < stage.params.min_chars:
                stage.reject(record, "too_short", f"{len(record.text)} characters")
            else:
                stage.keep(record)

    if __name__ == "__main__":
        run(main, Params)

A stage that makes something else than records (an adapter, a table, a repository) writes a *receipt* in their place::

    models/trial/compression/14_train.rejects.jsonl, 14_train.report.json    as above
    models/trial/compression/14_train.json                                   what was made, last

It says ``run(main, Params, receipt=True)``, calls :meth:`Stage.write_receipt` once, and ``keep`` only counts.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from shared import apis, tracing
from shared.claim import claim
from shared.errors import AccountingError, MixedApisError, NothingKeptError, SettingsError, SynthmillError, complain
from shared.records import SCHEMA_VERSION, Record, Reject

if TYPE_CHECKING:
    from shared.llm import Models

ROOT = Path(__file__).resolve().parent.parent
TRACKS = ("compression", "grounded", "patterns")
MAX_LINE_BYTES = 1_000_000
"""A longer input line goes to the rejects: the longest text a stage keeps is a few kilobytes, so it is not ours."""


class Settings(BaseModel):
    """Base of every stage's settings: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", bound=Settings)
R = TypeVar("R", bound=Record)


# ---------------------------------------------------------------- settings


def load_settings(path: Path, kind: type[P], track: str = "") -> P:
    """Settings from a TOML file; a table ``[tracks.<track>]`` overrides the keys above it for that track.

    Raises:
        SettingsError: the file is missing or not TOML, a key is unknown (the nearest valid one is named), a value
            has the wrong type or is out of range.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no settings at {shown(path)}", f"git checkout -- {shown(path)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{shown(path)} is not TOML: {error}", f"edit {shown(path)}") from None
    tables = values.pop("tracks", {})
    problems, checked = _track_problems(tables), {}
    for name in [] if problems else [*tables, track]:  # the other tracks too: what they say must be right as well
        try:
            checked[name] = kind.model_validate(values | tables.get(name, {}))
        except ValidationError as error:
            problems += [_problem(e, kind) for e in error.errors()]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        raise SettingsError(f"{shown(path)}:\n{lines}", f"edit {shown(path)}")
    return checked[track]


def _track_problems(tables: Any) -> list[str]:
    """What is wrong with the names and kinds of ``[tracks.<track>]`` tables."""
    if not isinstance(tables, dict):
        return [f"tracks: should be tables, [tracks.<track>], got {tables!r}"]
    problems = []
    for name, table in tables.items():
        if name not in TRACKS:
            near = difflib.get_close_matches(name, TRACKS, n=1, cutoff=0.0)[0]
            problems.append(f"unknown key 'tracks.{name}'; the nearest valid key is {near!r}")
        elif not isinstance(table, dict):
            problems.append(f"tracks.{name}: should be a table, got {table!r}")
    return problems


def _problem(error: Any, kind: type[BaseModel]) -> str:
    """One line for one pydantic error, naming the key and, for an unknown one, the nearest valid key."""
    place = [part for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
    name = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        valid = sorted(_keys_at(kind, place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), valid, n=1, cutoff=0.0)
        return f"unknown key {name!r}; the nearest valid key is {near[0]!r}" if near else f"unknown key {name!r}"
    if error["type"] == "missing":
        return f"missing key {name!r}"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {said.lower()}, got {error['input']!r}" if name else said


def _keys_at(kind: Any, place: Iterable[Any]) -> set[str]:
    """The valid keys of the model that sits at ``place`` inside ``kind``; of all its variants for a union."""
    kinds = [kind]
    for part in place:
        nested: list[Any] = []
        for model in kinds:
            annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else model
            nested += _models_in(annotation)
        kinds = nested or kinds
    return {name for model in kinds for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model named in an annotation, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]


# ---------------------------------------------------------------- files


def shown(path: Path) -> str:
    """A path for a person: relative to the repository when it is inside it."""
    try:
        return str(path.resolve().relative_to(ROOT))
    except ValueError:
        return str(path)


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing; it appears, synced and whole, when the block ends without an exception."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        yield file
        _sync(file)
    os.replace(part, path)
    _sync_directory(path.parent)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """What was renamed or made in it survives a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def replace_dir(new: Path, old: Path) -> None:
    """Put a directory in the place of another; killed in between, the next run makes it again."""
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex; of a directory: of its relative file names and their hashes, caches left out."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_records(path: Path, kind: Any) -> Iterator[Any]:
    """The records of a finished ``.jsonl``; ``kind`` is a record class or a union of them.

    Raises:
        SettingsError: a line is not such a record, or was written by another schema version.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            reason, detail, record = parse_line(line, adapter)
            if record is None:
                raise SettingsError(
                    f"{shown(path)}:{number}: {reason}: {detail}", f"rm {shown(path)} and make it again"
                )
            yield record


def parse_line(line: bytes, adapter: TypeAdapter[Any]) -> tuple[str, str, Any]:
    """``(reason, detail, None)`` for a line that is no record, ``("", "", record)`` for one that is.

    Raises:
        SettingsError: the line is a record of another schema version: the whole file is, so no line is misread.
    """
    if len(line) > MAX_LINE_BYTES:
        return "line_too_long", f"{len(line):,} bytes; at most {MAX_LINE_BYTES:,}", None
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return ("nul_bytes" if b"\0" in line else "not_json"), str(error), None
    if not isinstance(value, dict):
        return "not_a_record", f"expected a JSON object, got {type(value).__name__}", None
    version = value.get("schema_version")
    if type(version) is not int:  # nothing may be assumed about a line that does not say what it is
        return "not_a_record", f"schema_version: expected {SCHEMA_VERSION}, got {version!r}", None
    if version != SCHEMA_VERSION:
        raise SettingsError(
            f"a record was written with schema version {version}; this code reads version {SCHEMA_VERSION}",
            "make clean (paid replies stay in data/cache), then run again; or check out the code that wrote it",
        )
    try:
        return "", "", adapter.validate_python(value, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return "not_a_record", f"{place}: {first['msg']}", None


# ---------------------------------------------------------------- the stage


@dataclass
class Stage(Generic[P]):
    """One run of one stage over one track. Made by :func:`run`; a stage's ``main`` reads, keeps and rejects through it.

    Attributes:
        name: ``NN_name``, from the directory of the script.
        run: ``trial`` or ``full``, from the directory of the output.
        track: from ``--track``.
        params: the settings, checked.
        limit: at most this many input records; 0 = all.
        summary: what the stage wants to say in its report, by name.
        tables: lines the stage wants printed after its closing line.
        no_go: why the records must not go on although each is good; report and rejects are written, the output is not.
        receipt: the output is one JSON object about what was made, not records.
    """

    name: str
    script: Path
    input: Path | None
    output: Path
    config: Path
    track: str
    limit: int
    params: P
    apis: str
    planned: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    no_go: str = ""
    receipt: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)
    _sides: dict[str, Path] = field(default_factory=dict)
    _dirs: dict[str, Path] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _started_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def run(self) -> str:
        return self.output.parent.parent.name

    @property
    def cache(self) -> Path:
        """``data/cache``: replies, clones, generations; shared by all runs, safe to keep, dear to rebuild."""
        outputs = self.output.parent.parent.parent  # data/, or models/ beside it
        return (outputs.parent / "data" if self.receipt else outputs) / "cache"

    # -- in

    def read(self, kind: Any, path: Path | None = None, *, seeds: bool = False) -> Iterator[Any]:
        """The input's records, in order, each counted as planned; a line that is no record goes to the rejects.

        ``seeds``: the records are not what this stage passes on but what it starts from; only bad lines are counted.
        """
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        source = path or self.input
        if source is None:
            raise SettingsError(f"{self.name} needs --in", f"make stage{int(self.name[:2])}")
        if not source.exists():
            raise SettingsError(f"no input at {shown(source)}", f"make {shown(source)}")
        total = min(n for n in (count_lines(source), self.limit or sys.maxsize))
        with open(source, "rb") as lines, self.progress(total) as bar:
            for number, line in enumerate(lines):
                if self.limit and number >= self.limit:
                    return
                reason, detail, record = parse_line(line, adapter)
                if not seeds or record is None:
                    self.plan()
                if record is None:
                    self._unreadable.write(self._raw_reject(line, reason, f"line {number + 1}: {detail}").line())
                    self.rejected[reason] += 1
                else:
                    yield record
                bar.step()

    def peek(self, kind: Any) -> Iterator[Any]:
        """The input's records without counting them: to look at all of it before anything is spent."""
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        if self.input is not None and self.input.exists():
            with open(self.input, "rb") as lines:
                for line in itertools.islice(lines, self.limit or None):
                    if (record := parse_line(line, adapter)[2]) is not None:
                        yield record

    def plan(self, count: int = 1) -> None:
        """Announce records this stage will keep or reject; ``read`` does it for every input line."""
        self.planned += count

    # -- out

    def keep(self, record: Record) -> None:
        """The record goes on; in a stage that writes a receipt, it is used."""
        if not self.receipt:
            self._out.write(record.line())
        self.kept += 1

    def write_receipt(self, receipt: bytes) -> None:
        """Make this the output, when all else is in its place."""
        assert self.receipt and not self._out.tell(), "once, and only in a stage run with receipt=True"
        self._out.write(receipt)

    def reject(self, record: Record, reason: str, detail: str = "", match: str | None = None) -> None:
        """The record stops here, whole, with the reason."""
        body = record.model_dump(mode="json", exclude_none=True)
        self._write_reject(Reject(stage=self.name, reason=reason, detail=detail, match=match, record=body))

    def reject_raw(self, raw: str | bytes, reason: str, detail: str = "") -> None:
        """Something that never became a record stops here, byte for byte."""
        self._write_reject(self._raw_reject(raw, reason, detail))

    def _raw_reject(self, raw: str | bytes, reason: str, detail: str) -> Reject:
        data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        try:
            return Reject(stage=self.name, reason=reason, detail=detail, raw=data.decode("utf-8"))
        except UnicodeDecodeError:
            encoded = base64.b64encode(data).decode("ascii")
            return Reject(stage=self.name, reason=reason, detail=detail, raw_base64=encoded)

    def _write_reject(self, reject: Reject) -> None:
        self._rejects.write(reject.line())
        self.rejected[reject.reason] += 1

    def side_file(self, suffix: str) -> Path:
        """A path to write an extra file to; it is renamed to ``NN_stage<suffix>`` before the ``.jsonl``."""
        part = self.output.with_name(f".{self.output.stem}{suffix}.part")
        self._sides[suffix] = part
        return part

    def side_dir(self, name: str) -> Path:
        """An empty directory to fill; it replaces ``name`` beside the output before the ``.jsonl`` appears."""
        part = self.output.with_name(f".{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        self._dirs[name] = part
        return part

    def begin(self) -> None:
        """Begin the output, so that a place that cannot be written to is found out before anything is paid for."""
        assert not self._out.tell()

    @cached_property
    def _out(self) -> IO[bytes]:
        return self._stack.enter_context(open(self._part(self.output), "wb"))

    @cached_property
    def _rejects(self) -> IO[bytes]:
        return self._stack.enter_context(open(self._part(self.beside(".rejects.jsonl")), "wb"))

    @cached_property
    def _unreadable(self) -> IO[bytes]:
        # Apart from the other rejects, because reading runs ahead of deciding by an amount that depends on timing;
        # the file begins with these, in line order, so its bytes do not.
        return self._stack.enter_context(open(self._part(self.beside(".unreadable")), "w+b"))

    @staticmethod
    def _part(path: Path) -> Path:
        return path.with_name(f".{path.name}.part")

    def beside(self, suffix: str) -> Path:
        """The file of this stage with another suffix: ``beside(".report.json")``."""
        return self.output.with_name(self.output.stem + suffix)

    # -- what a stage may use

    @cached_property
    def models(self) -> Models:
        """Ask models through this; see :mod:`shared.llm`. Made on first use, closed with the stage."""
        from shared.llm import Models
        from shared.llm.batch import batch_from_env
        from shared.llm.models import budget_from_env

        if self.apis == "live":
            from shared.estimate import announcement

            if line := announcement(sys.modules["__main__"], self.name, self.params, self.input, self.limit):
                print(line, file=sys.stderr)
        whose = (self.cache, self.apis, self.run, self.name, self.track)
        return self._stack.enter_context(Models(*whose, budget_usd=budget_from_env(), batch=batch_from_env()))

    def services(self) -> None:
        """Point the SDKs of every paid service and of the Hub at the stand-in when ``APIS=mock``; nothing when live."""
        apis.connect(self.apis, self._stack, self.cache / "standin")

    def prompt(self, name: str) -> str:
        """The text of ``prompts/<name>`` beside the stage's script."""
        return (self.script.parent / "prompts" / name).read_text("utf-8")

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        """A bar on stderr when it is a terminal, a plain line every ten seconds when it is not."""
        bar = Progress(self.name, total)
        try:
            yield bar
        finally:
            bar.close()

    # -- the end

    def finish(self) -> None:
        """Check the account, write the report, rename everything into place, the ``.jsonl`` last.

        Raises:
            AccountingError: planned is not kept + rejected.
            NothingKeptError: nothing is kept, or a gate says no go; rejects and report are written.
        """
        rejected = sum(self.rejected.values())
        if self.planned != self.kept + rejected:
            raise AccountingError(
                f"{self.name}: planned {self.planned} is not kept {self.kept} + rejected {rejected}: records were lost",
                "please report this with the command above; the previous output is untouched",
            )
        if "_unreadable" in self.__dict__:
            self._prepend_unreadable()
        for file in (self._out, self._rejects):
            _sync(file)
        spending = self.models.spending() if "models" in self.__dict__ else None
        seconds = time.monotonic() - self._started
        report = self._report(spending, seconds)
        _belongs(self.output.parent.parent, self.apis, claim=True)
        os.replace(self._part(self.beside(".rejects.jsonl")), self.beside(".rejects.jsonl"))
        for suffix, part in self._sides.items():
            with open(part, "rb") as file:
                _sync(file)
            os.replace(part, self.beside(suffix))
        for name, part in self._dirs.items():
            for path in part.rglob("*"):
                with suppress(IsADirectoryError), open(path, "rb") as file:
                    _sync(file)
            replace_dir(part, self.output.with_name(name))
        with atomic(self.beside(".report.json")) as file:
            file.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        self._say(spending, seconds)
        if not self.kept:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.rejected.most_common(5)) or "the input is empty"
            raise NothingKeptError(
                f"{self.name}: 0 of {self.planned} records go on ({reasons})",
                f"look at {shown(self.beside('.rejects.jsonl'))}, then edit {shown(self.config)}",
            )
        if self.no_go:
            raise NothingKeptError(
                f"{self.name}: no go: {self.no_go}",
                f"look at {shown(self.beside('.report.json'))}, then mend the cause",
            )
        assert not self.receipt or self._out.tell(), "a stage run with receipt=True writes one"
        self._not_before_what_it_was_made_from()
        os.replace(self._part(self.output), self.output)
        _sync_directory(self.output.parent)

    def _not_before_what_it_was_made_from(self) -> None:
        """Where the clock was set back, give the output the age of the newest file it may depend on.

        make compares ages: with its own, the output would be older than its input, and be made again by every `make`
        until the clock is where it was before.
        """
        data, stages = self.cache.parent, self.script.parent.parent
        tracks = (data / self.run / self.track, data.parent / "models" / self.run / self.track)
        before = (path for track in tracks for path in track.glob("[0-9][0-9]_*.json*") if path.name < self.name)
        marks = (data / self.run).glob(".limit-*")  # with which variables the run is made
        files = (*before, *marks, *(data / "inputs").glob("*"), *stages.glob("[0-9][0-9]_*/**/*"), self.config)
        newest = max(path.stat().st_mtime_ns for path in files if path.is_file() and path.suffix != ".pyc")
        part = self._part(self.output)
        if newest > max(time.time_ns(), part.stat().st_mtime_ns):
            os.utime(part, ns=(newest, newest))

    def _prepend_unreadable(self) -> None:
        self._rejects.flush()
        whole, decided = self._unreadable, self._part(self.beside(".rejects.jsonl"))
        with open(decided, "rb") as rest:
            shutil.copyfileobj(rest, whole)
        whole.flush()
        os.fsync(whole.fileno())
        os.replace(self._part(self.beside(".unreadable")), decided)

    def _report(self, spending: Any, seconds: float) -> dict[str, Any]:
        prompts = self.script.parent / "prompts"
        code = sorted(path for path in self.script.parent.rglob("*.py"))
        inputs = [
            self.config,
            *code,
            *([prompts] if prompts.is_dir() else []),
            *([self.input] if self.input else []),
        ]
        return {
            "stage": self.name,
            "run": self.run,
            "track": self.track,
            "apis": self.apis,
            "counts": {
                "planned": self.planned,
                "kept": self.kept,
                "rejected": sum(self.rejected.values()),
                "reasons": dict(sorted(self.rejected.items())),
            },
            "spending": spending.model_dump() if spending else None,
            "summary": self.summary,
            "settings": self.params.model_dump(mode="json"),
            "limit": self.limit,
            "inputs": {shown(path): sha256_of(path) for path in inputs},
            "output": {shown(self.output): sha256_of(self._part(self.output))},
            "shared": sha256_of(ROOT / "shared"),
            "schema_version": SCHEMA_VERSION,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": packages(),
            "started_at": self._started_at,
            "seconds": round(seconds, 3),
        }

    def _say(self, spending: Any, seconds: float) -> None:
        line = f"{self.name}  in {self.planned}  kept {self.kept}  rejected {sum(self.rejected.values())}"
        if spending:
            line += f"  calls {spending.calls}  cached {spending.cached}  ${spending.cost_usd:.4f}"
        print(f"{line}  {seconds:.1f} s", file=sys.stderr)
        for table in self.tables:
            print(table, file=sys.stderr)

    def _discard(self) -> None:
        suffixes = (self.output.suffix, ".rejects.jsonl", ".unreadable", ".report.json")
        try:
            self._stack.close()  # on a full disk this fails as writing did
        finally:
            for path in [*(self._part(self.beside(suffix)) for suffix in suffixes), *self._sides.values()]:
                path.unlink(missing_ok=True)
            for path in self._dirs.values():
                shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- running one


def run(main: Callable[[Stage[P]], None], params: type[P], *, receipt: bool = False) -> NoReturn:
    """Parse the flags, load the settings, run ``main``, write the files, exit.

    ``receipt``: the output is what :meth:`Stage.write_receipt` is given.

    Exit codes: 0 the files are whole; the error's own (see :mod:`shared.errors`) otherwise; 130 interrupted.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `command &` in a script starts with it ignored
    for ending in (signal.SIGTERM, signal.SIGHUP):  # HUP: the terminal or the ssh connection is gone
        signal.signal(ending, _interrupt)
    try:
        stage = _from_flags(Path(sys.argv[0]).resolve(), params, receipt)
        claim(stage.cache.parent, stage.run)
        with _locked(stage.output):
            try:
                stage.begin()
                with tracing.span("stage", stage=stage.name, run=stage.run, track=stage.track) as span:
                    main(stage)
                    stage.finish()
                    span.set(planned=stage.planned, kept=stage.kept, rejected=stage.rejected.total())
            finally:
                stage._discard()
                tracing.flush()
    except SynthmillError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        with suppress(OSError):
            print("\ninterrupted: every answer received is saved; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        sys.exit(
            complain(SynthmillError(f"cannot write: {error}", "free or open that place, then run the same command"))
        )
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _interrupt(signum: int, frame: Any) -> None:
    signal.raise_signal(
        signal.SIGINT
    )  # whoever handles Ctrl-C at the moment (asyncio does, while it runs) handles this


def _from_flags(script: Path, params: type[P], receipt: bool = False) -> Stage[P]:
    parser = argparse.ArgumentParser(prog=shown(script), description=sys.modules["__main__"].__doc__)
    parser.add_argument("--in", dest="input", type=Path, metavar="FILE", help="records to read; none for a first stage")
    out = "models/<run>/<track>/NN_stage.json" if receipt else "data/<run>/<track>/NN_stage.jsonl"
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help=out)
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="settings, TOML")
    parser.add_argument("--track", required=True, choices=TRACKS, help="kind of data")
    parser.add_argument("--limit", type=int, default=0, help="read at most this many records; 0 = all")
    flags = parser.parse_args()
    name = script.parent.name
    flags.out = flags.out.resolve()  # run, track and the reply store are found from its directories
    if flags.limit < 0:
        raise SettingsError(f"--limit must be 0 (all) or more, got {flags.limit}", "use LIMIT=0")
    settings = load_settings(flags.config, params, flags.track)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    mode = apis.decide()
    _belongs(flags.out.parent.parent, mode)
    files = (flags.input, flags.out, flags.config)
    return Stage(name, script, *files, flags.track, flags.limit, settings, mode, receipt=receipt)


def _belongs(directory: Path, mode: str, *, claim: bool = False) -> None:
    """Refuse to mix live's and the stand-in's outputs; with ``claim``, record whose the run directory is.

    It is claimed with the first file, not at the start: a run that was stopped by a missing key has claimed nothing.

    Raises:
        MixedApisError: the directory belongs to the other one.
    """
    mark = directory / ".apis"
    if claim and not mark.exists():
        whole = directory / f".apis.{uuid.uuid4().hex}"
        try:
            with open(whole, "wb") as file:
                file.write(f"{mode}\n".encode())
                _sync(file)
            with suppress(FileExistsError):
                os.link(whole, mark)  # a link appears whole, and to one process only
        finally:
            whole.unlink(missing_ok=True)
    owner = mode
    if mark.exists():
        owner = mark.read_text("utf-8").strip()
        with suppress(OSError):  # the same as a name, for the Makefile, which reads no files
            (directory / f".apis-{owner}").touch()
    if owner != mode:
        raise MixedApisError(
            f"{shown(directory)} holds outputs of APIS={owner}; this command has APIS={mode}. They never mix.",
            f"make clean RUN={directory.name}   (replies stay in data/cache), or run with APIS={owner}",
        )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the output's lock; the kernel drops it when the process dies, however it dies.

    Raises:
        SettingsError: another process is writing the same output.
    """
    with open(output.with_name(f".{output.name}.lock"), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another process is writing {shown(output)}", "wait for it, or stop it, then run the same command"
            ) from None
        yield


# ---------------------------------------------------------------- small things


class Progress:
    """One progress bar on stderr, or plain lines where stderr is no terminal."""

    EVERY_S = 10.0

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._bar: Any = None
        self._next = time.monotonic() + self.EVERY_S
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, unit="rec", leave=False, dynamic_ncols=True)

    def step(self) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() >= self._next:
            with suppress(OSError):  # whoever read it may be gone
                print(f"{self.name}  {self.done}/{self.total}", file=sys.stderr)
            self._next = time.monotonic() + self.EVERY_S

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def count_lines(path: Path) -> int:
    """Lines in a file; a last line without a newline counts."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def git_revision() -> str:
    """``<commit>`` or ``<commit>-dirty``; ``unknown`` outside a repository or without git."""
    if pinned := os.environ.get("SYNTHMILL_REVISION"):
        return pinned
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def packages() -> dict[str, str]:
    """Installed versions of the packages that the imported modules come from."""
    names = importlib.metadata.packages_distributions()
    loaded = {module.split(".")[0] for module in sys.modules}
    wanted = {dist for module, dists in names.items() if module in loaded for dist in dists}
    return {dist: importlib.metadata.version(dist) for dist in sorted(wanted, key=str.lower)}
