"""No string from elsewhere steers the terminal: each command over a registry, a cache and logs full of control characters."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from rich.text import Text

from ksweep import Activations, Autoencoder, Cell, Sweep
from ksweep.analysis.results_table import print_curves
from ksweep.launch.progress import ProgressDisplay
from ksweep.registry.run_record import EXAMPLES_SCHEMA, write_run
from ksweep.utils.command_exit import exit_code_of
from ksweep.utils.console import printed_text, remark, say
from ksweep.utils.errors import RunError
from ksweep.utils.text import visible
from ksweep.utils.visible_console import VisibleConsole
from tests.cli.conftest import Command
from tests.job_directories import ended
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of

EVIL = "a\x1b]0;owned\x07\x1b[2Jb\x9bc\x7fd\re\x00f\u202eg\u2066h\u2069"
SHOWN = r"a\x1b]0;owned\x07\x1b[2Jb\x9bc\x7fd\x0de\x00f\u202eg\u2066h\u2069"
MARKUP = "[red]loud[/red] [link=http://x]here[/link] :smile:"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\r?(\x1b\[\??[0-9;]*[mAhlK])+")
"""What rich writes on a terminal: colours, and moves of the cursor by lines. The evil text has other sequences."""
DROPPED = {ord(c): None for c in "\x07\r"}
"""What rich's Text drops by itself."""
NUL_LESS = EVIL.replace("\x00", "")


def test_every_control_character_is_escaped_and_nothing_else() -> None:
    everything = "".join(map(chr, range(0x3000)))
    shown = visible(everything)
    assert not RAW.search(shown) and "\t" in shown and "\n" in shown
    assert [c for c in everything if c in shown] == [c for c in everything if not RAW.match(c)]
    assert visible(EVIL) == SHOWN and visible(visible(EVIL)) == SHOWN and visible("\ud800") == r"\ud800"
    assert visible("a\r\nb") == "a\nb"


@pytest.mark.parametrize("make", [str, Text], ids=["text", "Text of rich"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_shows_foreign_text_as_it_is(make: type, terminal: bool) -> None:
    file = io.StringIO()
    VisibleConsole(file=file, force_terminal=terminal, width=300).print(make(EVIL.translate(DROPPED) + MARKUP))
    assert COLOURS.sub("", file.getvalue()) == visible(EVIL.translate(DROPPED)) + MARKUP + "\n"


def test_plain_lines_warnings_and_errors_show_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    remark(EVIL)

    def fail() -> int:
        logging.lastResort.handle(logging.makeLogRecord({"msg": EVIL, "levelno": logging.WARNING}))  # type: ignore[union-attr]
        raise RunError(EVIL)

    assert exit_code_of(fail) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{SHOWN}\n" and captured.err == f"{SHOWN}\n{SHOWN}\nerror: {SHOWN}\n"


def test_progress_shows_a_phase_as_it_is() -> None:
    file = io.StringIO()
    with ProgressDisplay(VisibleConsole(file=file, force_terminal=True, width=400)) as display:
        display.show(f"{EVIL}{MARKUP}", 1, 2)
    written = COLOURS.sub("", file.getvalue())
    assert SHOWN + MARKUP in written and not RAW.search(written)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry, logs beside it and a vector cache; every string of theirs that is somebody else's is evil."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "registry"
    text = EVIL + MARKUP
    example = {"rank": "best", "number": 1, "activation": 0, "draw": 0, "parse": "ok", "position": 3, "error": 0.1, "cosine": 0.9}
    examples = pa.Table.from_pylist(
        [example | dict.fromkeys(("explanation", "text", "context", "document"), text)], EXAMPLES_SCHEMA
    )
    plain = record_of("20261122T120000-aaaaaaaa-11111111", job="20261122-120000-abcdef")
    words = {
        "label": f"one {text}", "cell": f"cell {text}", "host": text, "device": text, "argv": (text, text), "git_commit": text,
        "packages": {text: text}, "engine": {text: text}, "notes": ({"about": text, "text": text},),
        "spec": {**plain.spec, "autoencoder": {"av": text, text: text}},
    }  # fmt: skip
    first = replace(plain, **words)
    write_run(root, first, curve_of(), controls_of(), examples=examples)
    other = record_of("20261122T130000-bbbbbbbb-22222222", temperature=0.9, label=f"two {text}", minutes=60)
    write_run(root, other, curve_of(0.4), controls_of())
    failed = {"status": "failed", "error_class": "bug", "error_type": text, "error_message": text, "tracebacks": (text,)}
    write_run(root, record_of("20261122T140000-cccccccc-33333333", temperature=0.3, sweep=text, host=text, minutes=90, **failed))
    for key in (first.draws_key, other.draws_key):
        publish_draws(root, str(key), [[0.5, 0.6], [0.7, None]])
    (root / "landing" / f"bad {NUL_LESS}").mkdir()
    (root / "draws" / f"bad {NUL_LESS}").mkdir()
    job = ended(root, "failed", f"cell {text}", sweep="evil", kind="bug", message=text, traceback=f"Traceback\n{text}")
    (job.path / "7_0_log.err").write_text(f"{text}\n")
    job.write_note("code", {"path": text, "commit": text, "diff": text})
    entry = tmp_path / "vector_cache" / f"key{NUL_LESS}".replace("/", "")
    entry.mkdir(parents=True)
    manifest = {"key": text, "model": text, "text": text, "shards": [], "num_activations": 1}
    (entry / "manifest.json").write_text(json.dumps(manifest))
    return root


COMMANDS = (
    "ls", "ls --limit 1", "ls nothing", "watch --once", "watch evil --once", "logs evil", "why evil", "why 20261122T14",
    "why nothing", "cancel evil", "finalize", "retry evil", "plot -o curves", "report temp_sweep", "export 20261122T12", "sql",
    "show 20261122T12", "show 20261122T14", "show nothing", "diff 20261122T12 20261122T13", "choose", "choose --by nothing",
    "verify", "verify --repair", "db ingest", "db rebuild", "scores ls", "scores export -o out.parquet", "scores compute text",
    "cache ls", "cache show key", "cache verify", "cache gc --older-than 1s", "cache du",
)  # fmt: skip
QUESTIONS = (
    "select * from runs", "select label, k, fve from curves", "select * from draws", "select * from run_examples",
    'select 1 as "a\x1b[2Jb"', "select error('\x1b]0;owned\x07')", "select chr(27) || '[2J', chr(155), chr(8238)",
    "sel\x1b[2Ject",
)  # fmt: skip


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True], ids=["in a pipe", "on a terminal"])
def test_no_command_writes_a_control_character(
    evil: Path, command: Command, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    showing, steering = 0, {}
    for words in [line.split() for line in COMMANDS] + [["sql", question] for question in QUESTIONS]:
        code, out, err = command(*words)
        assert code in (0, 1, 2), words
        written = COLOURS.sub("", out + err) if terminal else out + err
        showing += r"\x1b" in written
        if found := RAW.findall(written):
            steering[" ".join(words)] = found
    assert steering == {} and showing > 20


def test_what_is_for_programs_stays_exact(evil: Path, command: Command) -> None:
    text = EVIL + MARKUP
    said = command("show", "20261122T12", "--json")[1]
    assert not RAW.search(said) and json.loads(said)["run"]["host"] == text
    assert command("sql", "select host from runs where host like 'a%' limit 1", "--csv")[1] == f'host\n"{text}"\n'


def test_show_and_logs_show_markup_and_escapes_as_they_are(evil: Path, command: Command) -> None:
    for words in (("show", "20261122T12"), ("logs", "evil"), ("why", "evil"), ("why", "20261122T14")):
        shown = SHOWN.replace(r"\x0d", "\n") if words[0] == "logs" else SHOWN  # there, what progress bars end each state with
        assert shown + MARKUP in command(*words)[1], words


def test_the_results_of_a_sweep_show_control_characters(evil: Path) -> None:
    record = record_of("x")
    shown = printed_text(lambda: print_curves(f"s{EVIL}", evil, {record.cell_key: f"l{EVIL}{MARKUP}"}))
    assert not RAW.search(shown) and f"l{SHOWN}{MARKUP}" in shown


def test_the_usage_of_a_sweep_file_shows_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from ksweep.launch.sweep_main import sweep_main

    cell = Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(vectors="v.parquet"))
    for words in (["--help"], [f"--{EVIL}"], [f"{EVIL}=1"], [f"sampling.seed={EVIL}"], [f"autoencoder.av={EVIL}", "--dry-run"]):
        with pytest.raises(SystemExit):
            sweep_main(Sweep(name="s", cell=cell), words)
        captured = capsys.readouterr()
        assert captured.out + captured.err and not RAW.search(captured.out + captured.err), words


@pytest.fixture(autouse=True)
def plain_warnings() -> Iterator[None]:
    formatter = logging.lastResort.formatter if logging.lastResort else None
    yield
    if logging.lastResort:
        logging.lastResort.setFormatter(formatter)
