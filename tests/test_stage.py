"""What every stage does, tried on a small stage of our own: flags, settings, bad lines, accounts, kills, full disks."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import model_validator

from shared.errors import SettingsError
from shared.records import RawText, Reject, content_id
from shared.stage import ROOT, Settings, load_settings

SCRIPT = '''"""02 sample: RawText -> RawText, those with at least `min_chars` characters."""

import os
import signal
import sys
import time

from pydantic import Field

from shared.records import RawText
from shared.stage import Settings, Stage, run


class Params(Settings):
    min_chars: int = Field(3, ge=1)
    behaviour: str = ""
    after: int = 0


def main(stage: Stage[Params]) -> None:
    p = stage.params
    if p.behaviour == "kill_at_rename":
        rename, renames = os.replace, []

        def killing(a, b):
            renames.append(b)
            if len(renames) > p.after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(a, b)

        os.replace = killing
    for count, record in enumerate(stage.read(RawText)):
        if p.behaviour == "lose" and count == 1:
            continue
        if p.behaviour == "pause" and count == p.after:
            stage.side_file(".extra.txt").write_text("half")
            (stage.side_dir("export") / "a.txt").write_text("half")
            print("paused", flush=True)
            while True:
                time.sleep(0.05)
        if p.behaviour == "crash" and count == p.after:
            raise ZeroDivisionError("a bug")
        if len(record.text) < p.min_chars:
            stage.reject(record, "too_short", f"{len(record.text)} characters")
        else:
            stage.keep(record)
    stage.side_file(".extra.txt").write_text(f"{stage.kept} kept")
    (stage.side_dir("export") / "a.txt").write_text(f"{stage.kept} kept")
    stage.summary["longest"] = 7


if __name__ == "__main__":
    run(main, Params)
'''


def record(text: str) -> RawText:
    return RawText(
        id=content_id(text),
        domain="prose",
        source="s",
        origin=f"file#{text}",
        language="en",
        category="note",
        licence="MIT",
        text=text,
    )


RECORDS = [record(text) for text in ("first", "no", "second", "third", "fourth")]
KEPT = b"".join(r.line() for r in RECORDS if len(r.text) >= 3)
FILES = ("02_sample.jsonl", "02_sample.rejects.jsonl", "02_sample.report.json", "02_sample.extra.txt", "export/a.txt")


@dataclass
class Sample:
    """The stage, its settings and its directory."""

    root: Path
    data: Path

    @property
    def output(self) -> Path:
        return self.data / "02_sample.jsonl"

    @property
    def input(self) -> Path:
        return self.data / "01_acquire.jsonl"

    @property
    def config(self) -> Path:
        return self.root / "trial.toml"

    def command(self, *flags: str) -> list[str]:
        files = ["--in", self.input, "--out", self.output, "--config", self.config, "--track", "compression"]
        return [sys.executable, *map(str, [self.root / "main.py", *files]), *flags]

    def run(self, *flags: str, settings: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        self.config.write_text(settings)
        return subprocess.run(self.command(*flags), cwd=ROOT, capture_output=True, text=True, timeout=60, **more)

    @contextmanager
    def paused(self, after: int = 2, **more: Any) -> Iterator[subprocess.Popen[str]]:
        """The stage, stopped in the middle of its records."""
        self.config.write_text(f'behaviour = "pause"\nafter = {after}\n')
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(self.command(), cwd=ROOT, **(pipes | more))
        try:
            assert process.stdout is not None and process.stdout.readline() == "paused\n"
            yield process
        finally:
            process.kill()
            process.communicate()

    def rejects(self) -> list[Reject]:
        lines = self.output.with_name("02_sample.rejects.jsonl").read_bytes().splitlines()
        return [Reject.model_validate_json(line) for line in lines]

    def report(self) -> dict[str, Any]:
        return dict(orjson.loads(self.output.with_name("02_sample.report.json").read_bytes()))

    def files(self) -> dict[str, bytes]:
        """Every file of the output directory but the input and the lock, by name."""
        found = (p for p in self.data.rglob("*") if p.is_file() and p != self.input and p.suffix != ".lock")
        return {str(p.relative_to(self.data)): p.read_bytes() for p in found}


@pytest.fixture
def sample(tmp_path: Path, data: Path) -> Sample:
    root = tmp_path / "stages" / "02_sample"
    root.mkdir(parents=True)
    (root / "main.py").write_text(SCRIPT)
    made = Sample(root, data)
    made.input.write_bytes(b"".join(r.line() for r in RECORDS))
    return made


# ---------------------------------------------------------------- a good run


def test_a_run_writes_what_goes_on_what_does_not_and_the_account(sample: Sample) -> None:
    done = sample.run()
    assert done.returncode == 0, done.stderr
    assert sample.output.read_bytes() == KEPT
    (reject,) = sample.rejects()
    assert (reject.stage, reject.reason, reject.detail) == ("02_sample", "too_short", "2 characters")
    assert RawText.model_validate(reject.record) == RECORDS[1], "a reject keeps the whole record"
    assert sorted(sample.files()) == sorted(FILES), "and nothing else is left"
    assert sample.files()["02_sample.extra.txt"] == sample.files()["export/a.txt"] == b"4 kept"

    report = sample.report()
    assert report["counts"] == {"planned": 5, "kept": 4, "rejected": 1, "reasons": {"too_short": 1}}
    assert (report["stage"], report["run"], report["track"]) == ("02_sample", "trial", "compression")
    assert (report["apis"], report["limit"]) == ("mock", 0)
    assert report["settings"] == {"min_chars": 3, "behaviour": "", "after": 0}
    assert report["summary"] == {"longest": 7}
    assert report["packages"]["pydantic"] and report["git"] and report["python"]
    assert report["inputs"][str(sample.input)] == hashlib.sha256(sample.input.read_bytes()).hexdigest()
    assert report["inputs"][str(sample.config)] == hashlib.sha256(b"").hexdigest()
    assert report["output"] == {str(sample.output): hashlib.sha256(KEPT).hexdigest()}


def test_it_prints_one_closing_line_on_stderr_and_nothing_on_stdout(sample: Sample) -> None:
    done = sample.run()
    assert done.stdout == ""
    assert re.fullmatch(r"02_sample  in 5  kept 4  rejected 1  \d+\.\d s\n", done.stderr)


def test_on_a_terminal_it_shows_a_bar(sample: Sample) -> None:
    sample.config.write_text("")
    controller, terminal = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while block := os.read(controller, 4096):
                seen.append(block)
        except OSError:  # Linux says EIO when the last writer is gone
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    done = subprocess.run(sample.command(), cwd=ROOT, stderr=terminal, timeout=60)
    os.close(terminal)
    reader.join(timeout=10)
    os.close(controller)
    drawn = b"".join(seen).decode()
    assert done.returncode == 0
    assert re.search(r"\r02_sample: +0%.*0/5", drawn), "a bar with the total"
    assert "in 5  kept 4  rejected 1" in drawn


def test_the_same_input_and_settings_give_the_same_bytes(sample: Sample) -> None:
    sample.run()
    first = sample.files()
    sample.run()
    second = sample.files()
    del first["02_sample.report.json"], second["02_sample.report.json"]  # holds times
    assert first == second


def test_limit_reads_that_many_records(sample: Sample) -> None:
    assert sample.run("--limit", "3").returncode == 0
    assert sample.report()["counts"] == {"planned": 3, "kept": 2, "rejected": 1, "reasons": {"too_short": 1}}


# ---------------------------------------------------------------- flags


def test_help_names_the_five_flags_and_what_the_stage_does(sample: Sample) -> None:
    done = sample.run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--\w+", done.stdout)) == {"--help", "--in", "--out", "--config", "--track", "--limit"}
    assert "RawText -> RawText" in done.stdout and "0 = all" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--limit", "-1"], "--limit must be 0 (all) or more, got -1"),
        (["--limit", "ten"], "invalid int value: 'ten'"),
        (["--resume"], "unrecognized arguments: --resume"),
        (["--track", "compresion"], "compresion"),
    ],
)
def test_a_wrong_flag_is_refused(sample: Sample, flags: list[str], says: str) -> None:
    done = sample.run(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not sample.output.exists()


def test_a_missing_input_says_how_to_make_it(sample: Sample) -> None:
    sample.input.unlink()
    done = sample.run()
    assert done.returncode == 2
    assert f"no input at {sample.input}" in done.stderr and "next: make" in done.stderr


def test_a_wrong_apis_is_refused(sample: Sample) -> None:
    done = sample.run(env=os.environ | {"APIS": "lvie"})
    assert done.returncode == 2
    assert "APIS must be one of mock, live, got 'lvie'" in done.stderr


# ---------------------------------------------------------------- settings


class Source(Settings):
    url: str = ""
    depth: int = 1


class Nested(Settings):
    min_chars: int = 1
    ratio: float = 0.5
    sources: tuple[Source, ...] = ()
    default: Source = Source()

    @model_validator(mode="after")
    def _together(self) -> Nested:
        if self.min_chars > 100 and self.ratio > 0.5:
            raise ValueError("min_chars above 100 needs a ratio of 0.5 or less")
        return self


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("min_char = 3", "unknown key 'min_char'; the nearest valid key is 'min_chars'"),
        ("[default]\ndeepth = 3", "unknown key 'default.deepth'; the nearest valid key is 'depth'"),
        (
            "[[sources]]\nurl = 'a'\n[[sources]]\nulr = 'b'",
            "unknown key 'sources.1.ulr'; the nearest valid key is 'url'",
        ),
        ("min_chars = 'many'", "min_chars: input should be a valid integer"),
        ("min_chars = 'many'", "got 'many'"),
        ("[default]\ndepth = 1.5", "default.depth: input should be a valid integer"),
        ("[tracks.compression]\nmin_char = 3", "unknown key 'min_char'; the nearest valid key is 'min_chars'"),
        ("[tracks.compresion]\nmin_chars = 3", "'tracks.compresion'; the nearest valid key is 'compression'"),
        ("[tracks.grounded]\nmin_char = 3", "unknown key 'min_char'; the nearest valid key is 'min_chars'"),
        ("min_chars = 101\nratio = 0.6", "  min_chars above 100 needs a ratio of 0.5 or less\n"),
        ("tracks = 3", "tracks: should be tables"),
        ("[tracks]\ncompression = 3", "tracks.compression: should be a table, got 3"),
        ("min_chars = = 3", "is not TOML"),
        ("min_chars = 3\nmin_chars = 4", "is not TOML"),
    ],
)
def test_wrong_settings_name_the_key_and_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trial.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings(path, Nested, "compression")
    assert says in str(refused.value)
    assert str(path) in str(refused.value) and refused.value.exit_code == 2
    assert f"edit {path}" in refused.value.mend


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_text("min_char = 3\nratoi = 0.3")
    with pytest.raises(SettingsError) as refused:
        load_settings(path, Nested)
    assert "'min_chars'" in str(refused.value) and "'ratio'" in str(refused.value)


def test_bytes_that_are_not_text_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_bytes(b"min_chars = 3 # \xff")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_settings(path, Nested)


def test_missing_settings_say_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no settings at .*trial\.toml"):
        load_settings(tmp_path / "trial.toml", Nested)


def test_a_track_overrides_the_settings_of_all(tmp_path: Path) -> None:
    path = tmp_path / "trial.toml"
    path.write_text("min_chars = 3\n[tracks.grounded]\nmin_chars = 4\n")
    assert load_settings(path, Nested, "compression").min_chars == 3
    assert load_settings(path, Nested, "grounded").min_chars == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("min_char = 5", "unknown key 'min_char'; the nearest valid key is 'min_chars'"),
        ("min_chars = 0", "min_chars: input should be greater than or equal to 1, got 0"),
    ],
)
def test_wrong_settings_stop_the_stage_before_it_reads_anything(sample: Sample, settings: str, says: str) -> None:
    done = sample.run(settings=settings)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert sample.files() == {}


# ---------------------------------------------------------------- bad lines

GOOD = RECORDS[0].line()
BAD_LINES = {
    "not_json": b'{"id": "0123", \n',
    "not JSON, empty": b"\n",
    "nul_bytes": b'{"id": "\x00\x00"}\n',
    "not_json, invalid UTF-8": b'{"id": "\xff\xfe"}\n',
    "not_a_record, an array": b"[1, 2]\n",
    "not_a_record, a string": b'"text"\n',
    "not_a_record, another record": b'{"schema_version": 1, "kind": "pair"}\n',
    "line_too_long": b'{"text": "' + b"x" * 5_000_000 + b'"}\n',
    "not_a_record, no newline at the end": b"null",
}


def test_bad_lines_are_set_aside_byte_for_byte_and_the_rest_goes_on(sample: Sample) -> None:
    sample.input.write_bytes(b"".join(GOOD + line for line in BAD_LINES.values()))
    done = sample.run()
    assert done.returncode == 0, done.stderr
    assert sample.output.read_bytes() == GOOD * len(BAD_LINES)
    rejects = sample.rejects()
    for number, (line, reject) in enumerate(zip(BAD_LINES.values(), rejects, strict=True)):
        raw = reject.raw.encode() if reject.raw is not None else base64.b64decode(reject.raw_base64 or "")
        assert raw == line
        assert reject.detail.startswith(f"line {2 * number + 2}: "), "says where it was"
    reasons = [reject.reason for reject in rejects]
    assert reasons == [
        "not_json",
        "not_json",
        "nul_bytes",
        "not_json",
        *["not_a_record"] * 3,
        "line_too_long",
        "not_a_record",
    ]
    counts = sample.report()["counts"]
    assert counts["planned"] == 2 * len(BAD_LINES) and counts["rejected"] == len(BAD_LINES)


def test_nothing_kept_ends_with_4_and_shows_why(sample: Sample) -> None:
    sample.run()
    before = sample.output.read_bytes()
    done = sample.run(settings="min_chars = 100")
    assert done.returncode == 4
    assert "0 of 5 records go on (too_short 5)" in done.stderr
    assert "02_sample.rejects.jsonl" in done.stderr and "trial.toml" in done.stderr
    assert len(sample.rejects()) == 5
    assert sample.report()["counts"]["kept"] == 0
    assert sample.output.read_bytes() == before, "the previous good file stays"
    assert [name for name in sample.files() if ".part" in name] == []


def test_an_empty_input_ends_with_4(sample: Sample) -> None:
    sample.input.write_bytes(b"")
    done = sample.run()
    assert done.returncode == 4 and "the input is empty" in done.stderr
    assert not sample.output.exists()


def test_a_stage_that_loses_a_record_ends_with_3_and_writes_nothing(sample: Sample) -> None:
    sample.run()
    before = sample.files()
    done = sample.run(settings='behaviour = "lose"')
    assert done.returncode == 3
    assert "planned 5 is not kept 4 + rejected 0: records were lost" in done.stderr
    assert sample.files() == before


def test_a_bug_in_a_stage_shows_where_and_writes_nothing(sample: Sample) -> None:
    done = sample.run(settings='behaviour = "crash"\nafter = 2')
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr
    assert sample.files() == {}


# ---------------------------------------------------------------- kills and interrupts


def test_kill_9_in_the_middle_leaves_the_previous_files(sample: Sample) -> None:
    sample.run(settings="min_chars = 1")
    before = sample.files()
    with sample.paused() as process:
        process.kill()
        process.wait()
    left = sample.files()
    assert {name: left[name] for name in before} == before
    again = sample.run()
    assert again.returncode == 0, "a dead process holds no lock"
    assert sample.output.read_bytes() == KEPT
    assert sorted(sample.files()) == sorted(FILES), "what the killed run left is gone"


@pytest.mark.parametrize("renames", range(6))
def test_kill_9_between_any_two_renames_leaves_a_whole_output(sample: Sample, renames: int) -> None:
    sample.run(settings="min_chars = 1")
    before = sample.output.read_bytes()
    done = sample.run(settings=f'behaviour = "kill_at_rename"\nafter = {renames}')
    assert done.returncode == -signal.SIGKILL
    assert sample.output.read_bytes() == before, "the .jsonl comes last, so it is still the old one"
    assert sample.run().returncode == 0
    assert sample.output.read_bytes() == KEPT
    assert sorted(sample.files()) == sorted(FILES)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130_and_leaves_the_previous_files(sample: Sample, kind: signal.Signals) -> None:
    sample.run(settings="min_chars = 1")
    before = sample.files()
    with sample.paused() as process:
        process.send_signal(kind)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted: every answer received is saved; the same command goes on from there" in said
    assert "Traceback" not in said
    assert sample.files() == before


def test_a_stage_started_in_the_background_of_a_script_can_be_ended(sample: Sample) -> None:
    # `command &` in sh starts it with SIGINT ignored; SIGTERM must end it all the same.
    with sample.paused(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as process:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 130


def test_two_processes_never_write_one_output(sample: Sample) -> None:
    with sample.paused():
        second = sample.run()
        assert second.returncode == 2
        assert f"another process is writing {sample.output}" in second.stderr
        assert "Traceback" not in second.stderr
    assert sample.run().returncode == 0


# ---------------------------------------------------------------- live and stand-in


def test_live_and_stand_in_outputs_never_mix(sample: Sample) -> None:
    assert sample.run().returncode == 0
    before = sample.files()
    live = sample.run(env=os.environ | {"APIS": "live"})
    assert live.returncode == 2
    assert "holds outputs of APIS=mock; this command has APIS=live" in live.stderr
    assert "make clean RUN=trial" in live.stderr
    assert sample.files() == before
    shutil.rmtree(sample.data)  # what `make clean` does, but for the input
    (sample.data.parent / ".apis").unlink()
    sample.data.mkdir()
    sample.input.write_bytes(GOOD)
    assert sample.run(env=os.environ | {"APIS": "live"}).returncode == 0
    mock = sample.run()
    assert mock.returncode == 2 and "APIS=live; this command has APIS=mock" in mock.stderr


def test_what_env_leaves_empty_is_filled_from_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # make exports BUDGET_USD even when nobody set it, as an empty string: the cap in .env must hold all the same.
    from shared import apis

    path = tmp_path / ".env"
    path.write_text("# keys\nBUDGET_USD=5\nexport OPENAI_API_KEY='from file'\nHF_TOKEN=from file\nGEMINI_API_KEY=\n")
    monkeypatch.setenv("BUDGET_USD", "")
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    apis.load_env(path)
    assert os.environ["BUDGET_USD"] == "5"
    assert os.environ["OPENAI_API_KEY"] == "from file"
    assert os.environ["HF_TOKEN"] == "from the environment", "what is set wins"
    assert "GEMINI_API_KEY" not in os.environ


# ---------------------------------------------------------------- full and closed disks


def _assert_a_full_disk_is_survived(sample: Sample, done: subprocess.CompletedProcess[str], before: bytes) -> None:
    assert done.returncode == 1
    assert "cannot write" in done.stderr and "No space left on device" in done.stderr
    assert "next:" in done.stderr and "Traceback" not in done.stderr
    assert sample.output.read_bytes() == before
    assert [p.name for p in sample.data.iterdir() if ".part" in p.name] == [], "the room it took is given back"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT TESTED: this system has no /dev/full")
def test_a_disk_that_is_full_for_the_output(sample: Sample) -> None:
    sample.run()
    before = sample.output.read_bytes()
    (sample.data / ".02_sample.jsonl.part").symlink_to("/dev/full")
    _assert_a_full_disk_is_survived(sample, sample.run(settings="min_chars = 1"), before)


@pytest.fixture
def small_disk(sample: Sample) -> Iterator[Sample]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", sample.data], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a small file system needs mount rights here ({mounted.stderr.strip()})")
    try:
        yield sample
    finally:
        subprocess.run(["umount", sample.data], check=True)


def test_a_disk_that_fills_up_on_the_way(small_disk: Sample, tmp_path: Path) -> None:
    sample = small_disk
    big = tmp_path / "big.jsonl"
    sample.input.write_bytes(GOOD)
    assert sample.run().returncode == 0
    before = sample.output.read_bytes()
    big.write_bytes(b"".join(record(f"{n} " + "x" * 400).line() for n in range(1000)))
    done = sample.run("--in", str(big))
    _assert_a_full_disk_is_survived(sample, done, before)
    assert sample.run().returncode == 0, "with room again, it goes on"


def _obey_modes() -> None:
    """Give up root's right to write anywhere, in a child about to start; nothing to do for anybody else."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                os._exit(77)


def test_a_directory_that_may_not_be_written_to(sample: Sample) -> None:
    sample.run()
    before = sample.files()
    sample.data.chmod(0o555)
    try:
        done = sample.run(preexec_fn=_obey_modes)
    finally:
        sample.data.chmod(0o755)
    if done.returncode == 77:
        pytest.skip("NOT TESTED: root here may not give up its rights, and root writes anywhere")
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr and "Permission denied" in done.stderr
    assert "next:" in done.stderr and "Traceback" not in done.stderr
    assert sample.files() == before


# ---------------------------------------------------------------- large inputs


def test_memory_does_not_grow_with_the_input(sample: Sample) -> None:
    sample.config.write_text("")
    line = record("x" * 2000).line()
    code = (
        "import runpy, sys, tracemalloc\n"
        "sys.argv = sys.argv[1:]\n"
        "tracemalloc.start()\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(tracemalloc.get_traced_memory()[1])\n"
    )
    peaks = []
    for count in (500, 5_000):
        sample.input.write_bytes(line * count)
        command = [sys.executable, "-c", code, *sample.command()[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 1 << 20, f"9 MB more of input took {(peaks[1] - peaks[0]) / 2**20:.1f} MB more"


def test_progress_is_a_plain_line_every_ten_seconds_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.stage import Progress

    monkeypatch.setattr(Progress, "EVERY_S", 0.05)
    bar = Progress("02_sample", 3)
    bar.step()
    assert capsys.readouterr().err == ""
    time.sleep(0.06)
    bar.step()
    bar.step()
    bar.close()
    assert capsys.readouterr().err == "02_sample  2/3\n"
