"""Malformed requests, over every command and every class of settings: exit code 1 or 2, one message that names what came, no
traceback, and nothing written."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.main import get_command

import ksweep.cli
from ksweep import Resources, Sweep, sweep_main
from ksweep.cli.app import app
from ksweep.registry.database import connect
from ksweep.registry.run_record import write_run
from tests.job_directories import ended
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of
from tests.tiny_sweeps import talking_pair, tiny_cell

LONGEST_SECONDS = 100
LONGEST_MESSAGE = 1500
"""Characters; usage and its list of options come on top in messages of typer and argparse."""
LONG = "x" * 300
HUGE = "9" * 5000

Case = tuple[str, ...]
"""Words of the command line; the last one is what the message must name."""


def settings(names: str, *values: str) -> list[Case]:
    """Each value for each setting; the message must name the setting."""
    return [(f"{name}={value}", name.rpartition(".")[2]) for name in names.split() for value in values]


NOT_A_NUMBER = ("nan", ".nan", "inf", "-.inf", "abc", "[]", "null", "{a: 1}", "true", HUGE, "1e400")
SWEEP_CASES: dict[str, list[Case]] = {
    "whole numbers": [
        *settings("sampling.num_draws sampling.seed activations.num_activations scoring.num_replicates", "-1", "1.5", "1e30",
        "nan"),
        *settings("sampling.max_new_tokens activations.min_position", *NOT_A_NUMBER),
        *settings("activations.layer activations.stride activations.max_length activations.positions_per_document", "-5", "1e12"),
        *settings("sampling.num_draws activations.num_activations scoring.num_replicates", "100000000000", "0", "null"),
    ],
    "numbers": [
        *settings("sampling.temperature", "-1", *NOT_A_NUMBER),
        *settings("sampling.top_p", "0", "1.01", "-1", ".nan", ".inf", "abc"),
        *settings("scoring.level", "0", "1", "-1", "2", ".nan", "abc"),
        *settings("scoring.baseline", "-1", "0", ".nan", ".inf", "abc"),
        *settings("activations.max_norm resources.mem_gb", "-1", "0", ".nan", ".inf", "abc"),
    ],
    "lists": [
        *settings("scoring.ks", "[0]", "[-1]", "[1.5]", "[a]", "[1000]", "[[1]]", ".nan"),
        *settings("scoring.groups scoring.metrics", "[1.5]", "[[a]]", "{a: b}", "[nothing:here]"),
        ("sampling.seed=[1,[2]]", "seed"), ("sampling.temperature=[0.5,abc]", "abc"), ("sampling.seed=[1,1.5]", "1.5"),
        ("sampling.seed=[" + ",".join(map(str, range(10_001))) + "]", "cells"),
    ],
    "words of a list": [
        *settings("autoencoder.dtype activations.dtype autoencoder.ar_dtype", "float64", "bf16", "1", "[]"),
        *settings("activations.positions activations.candidates scoring.selection", "rnadom", "", "1.5", "{}"),
        *settings("sampling.engine", "vllm", "no.such:engine", "os:path", "a b", ":", "os.path:", "1.5"),
        *settings("resources.cluster", "slrum", "1", "[]"),
    ],
    "unknown settings": [
        ("sampling.temprature=1", "did you mean sampling.temperature"), ("temprature=1", "temperature"), ("seed=1", "could be"),
        ("sampling=1", "sampling"), ("sampling=[]", "sampling"), ("nothing=1", "nothing"), ("=1", "unknown key ''"), ("=", "''"),
        ("sampling.=1", "sampling."), (".seed=1", ".seed"), ("sampling..seed=1", "sampling..seed"), (f"{LONG}=1", "xxx"),
        ("axes=[1]", "a list given for a field"), ("word", "word"), ("--nothing", "--nothing"), ("--retry=1", "--retry"),
        ("--config", "--config"), ("--json", "--dry-run"), ("-rf", "-rf"), ("", "neither an option"), ("a b=1", "a b"),
        ("sampling.seed=${oc.env:HOME}", "interpolation"), ("sampling.seed={", "seed"), ("sampling.seed=[1,", "seed"),
        ("sampling.seed=\x00", "seed"), ("sampling.seed='", "seed"), ("sampling.seed=!!python/object:os.system", "seed"),
    ],
    "names": [
        (f"{key}={value}", key.rpartition(".")[2])
        for key in ("name", "resources.job_name", "resources.partition", "resources.account", "resources.qos")
        for value in ('"a\\nb"', "'\x00'", "' '", "-rf", LONG, "'../x'", "$(id)")
    ]
    + settings("resources.extra", "{comment: x}", "{'a b': 1}", "abc", "[1]", "{gres: \"'a\\nb'\"}")
    + settings("resources.setup", "'a\x00b'", "1.5", "{a: b}")
    + [("registry=", "registry"), ("registry=' '", "registry"), ("vector_cache=", "vector_cache"), ("registry=[]", "registry")],
    "resources": [
        *settings("resources.gpus resources.nodes resources.tasks resources.batch_size resources.cells_per_job", "-1", "1.5",
        "1e12"),
        *settings("resources.time", "abc", "0", "-1", "1:2:3:4", "[]", "999999", "nan"),
        *settings("resources.gpus_per_model", "2", "0"), *settings("resources.cpus_per_gpu", "0"),
    ],
    "files": [
        *settings("activations.text", "DIR", "missing.txt", "EMPTY.txt", "EMPTY.jsonl", "EMPTY.parquet", "BAD.jsonl",
        "BAD.parquet",
                  "LATIN.jsonl", "LOOP.jsonl", "a?b.jsonl", "no.such:rows", "os:sep", f"{LONG}.jsonl", "'x\x00.jsonl'",
                  "UNREADABLE.jsonl",
                  "FIFO.jsonl"),
        *settings("activations.vectors", "DIR", "missing.parquet", "EMPTY.parquet", "BAD.parquet", "NOVECTOR.parquet",
        "BAD.jsonl",
                  "LOOP.parquet"),
        *settings("autoencoder.av autoencoder.ar", "DIR", "./missing", "EMPTY.txt", "a/b/c", "-rf", "'x\x00'", LONG, "LOOP.jsonl",
                  "no.such:part", "os:sep"),
        *settings("autoencoder.checkpoint", "DIR", "missing.pt", "EMPTY.pt", "BAD.pt", "LOOP.jsonl"),
        *settings("activations.model", "DIR", "./missing", "EMPTY.txt"),
        *settings("activations.text_column activations.document_column", "nothing", "1.5"),
        ("activations.text=null", "text"), ("autoencoder.av=null", "autoencoder.av"), ("activations.layer=99", "layer"),
    ],
    "places": [
        ("export_json=DIR", "export_json"), ("export_json=EMPTY.txt/x.json", "export_json"), ("export_json=LOOP.jsonl/x",
        "export_json"),
        ("export_json='x\x00'", "export_json"), (f"export_json={LONG}", "export_json"),
        ("registry=EMPTY.txt", "registry"), ("vector_cache=EMPTY.txt", "vector_cache"), ("registry=LOOP.jsonl", "registry"),
        (f"registry={LONG}", "registry"), ("registry='x\x00'", "registry"), ("vector_cache=LOOP.jsonl", "vector_cache"),
    ],
    "configurations": [
        (f"--config={name}", name) for name in (
            "missing.yaml", "DIR", "EMPTY.txt", "BAD.yaml", "LIST.yaml", "UNKNOWN.yaml", "LATIN.jsonl", "LOOP.jsonl", "TAG.yaml",
            "UNREADABLE.yaml", "NUL.yaml",
        )
    ] + [("--config=TYPES.yaml", "sampling.seed='a'")],
    "options": [
        ("--retry-cell", "--retry-cell"), ("--base", "--base"), 
        ("--checkpoint-data", "checkpoint"), ("--wait=1", "--wait"), ("--dry-run=yes", "--dry-run"),
    ],
}  # fmt: skip
RUN, OTHER = "20261122T120000-aaaaaaaa-11111111", "20261122T130000-bbbbbbbb-22222222"
ODD_NAMES = ("nothing", "", " ", "-1", "\x00", "a\nb", LONG, "../..", "@", "20261122")
COMMAND_CASES: dict[str, list[Case]] = {
    "names of runs": [
        (*command.split(), "--", name, "")
        for command in ("why", "logs", "cancel", "retry", "show", "export", "report") for name in ODD_NAMES
    ] + [("diff", "--", name, RUN, "") for name in ODD_NAMES] + [("plot", "--", name, "") for name in ODD_NAMES[:4]],
    "sql": [
        ("sql", question, "") for question in (
            "selct 1", "select", "select nothing from runs", "select * from nothing", "select 1/0 from runs; drop table runs",
            "drop table runs", "delete from runs", "update runs set host = 'x'", "insert into runs values (1)",
            "create table x (a int)",
            "copy runs to 'out.csv'", "attach 'x.duckdb'", "install httpfs", "load httpfs", "select 1; copy runs to 'out.csv'",
            "select * from read_parquet('BAD.parquet')", "export database 'out'", "\x00", " ",
            ";", "'", "select 'a'::int", "select * from range(1e30::bigint)", "select error('x')",
            "call nothing()", "copy runs from 'out.csv'", "(" * 3000, "select " + "1+" * 20000 + "1", "@nothing", "@@",
            "@best_temprature", "select '\ud800'",
        )
    ] + [
        ("sql", "select 1", "x=1", "name=value"), ("sql", "@compare", "cell", "cell"),
        ("sql", "@compare", "nothing=1", "nothing"), ("sql", "@compare", "=", ""), ("sql", "select 1", "--csv", "--json",
        "--csv"),
        ("sql", "select 1", "--parquet", "DIR", "DIR"), ("sql", "select 1", "--parquet", "EMPTY.txt/x.parquet", "EMPTY.txt"),
        ("sql", "select 1", "--parquet", f"{LONG}.parquet", "xxx"), ("sql", "select 1", "--parquet", "", ""),
        ("sql", "select 1", "--parquet", "x\x00", "null byte"), ("sql", "select 1", "--parquet", "missing/\x00x", "null"),
    ],
    "options of commands": [
        ("ls", "--limit", "-1", "limit"), ("ls", "--limit", "abc", "--limit"), ("ls", "--state", "nothing", "nothing"), ("ls",
        "x", "y", "y"),
        ("watch", "nothing", "nothing"), ("watch", "\x00", "--once", ""), ("logs", "evil", "--rank", "99", "99"),
        ("logs", "evil", "--rank", "-1", "-1"), ("logs", "evil", "--rank", "x", "--rank"), ("diff", RUN, "b"), ("diff", RUN,
        OTHER, "--level", "2", "2"),
        ("diff", RUN, OTHER, "--level", "nan", "nan"), ("diff", RUN, OTHER, "--level", "x", "--level"), ("choose", "--level",
        "0", "0"),
        ("choose", "--level", "inf", "inf"), ("choose", "--by", "nothing", "nothing"), ("choose", "--report", "nothing", ""),
        ("choose", "--by", "", ""), ("choose", "nothing", "nothing"), ("plot", "--metric", "nothing", "nothing"),
        ("plot", "-o", "EMPTY.txt/x", "EMPTY.txt"), ("plot", "-o", f"{LONG}", "xxx"), ("plot", "-o", "x\x00", ""),
        ("report", "temp_sweep", "-o", "DIR", "DIR"), ("report", "temp_sweep", "-o", "EMPTY.txt/x", "EMPTY.txt"),
        ("report", "temp_sweep", "-o", "x\x00", ""), ("export", RUN, "-o", "DIR", "DIR"), ("export", RUN, "-o", "EMPTY.txt/x",
        "EMPTY.txt"),
        ("nothing", "nothing"), ("--nothing", "nothing"), ("ls", "--nothing", "nothing"), ("cache", "nothing", "nothing"),
        ("db", "nothing", "nothing"), ("scores", "nothing", "nothing"), ("show", "RUN"), ("import-json", "FILES"),
    ],
    "files of commands": [
        ("import-json", name, name) for name in ("missing.json", "DIR", "EMPTY.txt", "BAD.jsonl", "BAD.parquet", "LIST.yaml",
        "LOOP.jsonl",
                                                 "UNREADABLE.jsonl", "LATIN.jsonl")
    ] + [
        ("scores", "import", name, "--as", "judge", name.partition("/")[0]) for name in (
            "missing.parquet", "DIR", "EMPTY.parquet", "BAD.parquet", "EMPTY.jsonl", "BAD.jsonl", "EMPTY.csv", "LATIN.csv",
            "EMPTY.txt",
            "LOOP.jsonl", "LOOP.parquet", "NOVECTOR.parquet", "DIR.parquet",
        )
    ] + [
        ("scores", "import", "SCORES.jsonl", "--as", name, "") for name in ("", " ", "error", "text", "a\nb", LONG, "-rf",
        "../x", "\x00")
    ] + [
        ("scores", "import", "SCORES.jsonl", "--as", "judge", "--column", "nothing", "nothing"), ("scores", "import",
        "SCORES.jsonl", "--as"),
        ("scores", "compute", "nothing", "nothing"), ("scores", "compute", "no.such:metric", "no.such"), ("scores", "compute",
        "os:sep", "os:sep"),
        ("scores", "compute", "", ""), ("scores", "export", "-o", "DIR", ""), ("scores", "export", "nothing", "-o", "x.parquet",
        "nothing"),
        ("scores", "export", "--output"), ("import-json", "GOOD.json", "--metric", "nothing", "nothing"),
    ] + [
        ("score", name, "--ar", "DIR", "--dry-run", name) for name in ("missing.jsonl", "DIR", "EMPTY.jsonl", "BAD.jsonl",
        "BAD.parquet",
                                                                   "LATIN.jsonl", "LOOP.jsonl", "UNREADABLE.jsonl")
    ] + [
        ("score", "TEXTS.jsonl", "--ar", "DIR", "--dry-run", *more) for more in (
            ("--truncate", "abc", "abc"), ("--truncate", "tokens=", "tokens="), ("--truncate", "tokens=0", "tokens=0"),
            ("--column", "nothing", "nothing"),
            ("--text", "missing.txt", ""), ("--vectors", "missing.parquet", ""), ("--vectors", "DIR", "DIR"),
            ("--name", "a\nb", ""), ("--name", LONG, ""), ("--groups", "nothing", ""),
        )
    ],
    "caches": [
        ("cache", command, "--", name, "") for command in ("show", "verify") for name in ("nothing", "", "\x00", "..", "*", LONG)
        if (command, name) != ("verify", "")
    ] + [
        ("cache", "gc", "--older-than", value, value) for value in ("abc", "1", "-1d", "1y", "", "nand")
    ] + [
        ("cache", "gc", "--older-than", "9" * 400 + "d", "999")
    ] + [
        ("cache", command, "--vector-cache", place, place.strip("\x00")) for command in ("ls", "du", "gc", "verify")
        for place in ("EMPTY.txt", "LOOP.jsonl", "\x00")
    ],
    "places of commands": [
        (*command, "--registry", place, "") for place in ("missing", "EMPTY.txt", "LOOP.jsonl", "", " ", LONG, "\x00x")
        for command in (("sql", "select 1"), ("show", RUN), ("diff", RUN, OTHER), ("choose",), ("plot",), ("report",
        "temp_sweep"),
                        ("export", RUN), ("scores", "ls"), ("verify",))
    ] + [
        (*command, "--registry", place, "") for place in ("EMPTY.txt", "LOOP.jsonl", "", "\x00x")
        for command in (("ls",), ("db", "ingest"), ("db", "rebuild"), ("finalize",), ("why", RUN), ("watch", "x"), ("cancel",
        "x"),
                        ("import-json", "GOOD.json"), ("scores", "compute", "text"), ("doctor",))
        if (command, place) not in ((("doctor",), "EMPTY.txt"), (("doctor",), "LOOP.jsonl"))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a landed registry, a job, a tiny pair, and files of every wrong kind."""
    place = tmp_path_factory.mktemp("malformed")
    root = place / "registry"
    for run_id, temperature in ((RUN, 0.7), (OTHER, 0.9)):
        record = record_of(run_id, temperature=temperature)
        write_run(root, record, curve_of(), controls_of())
        publish_draws(root, str(record.draws_key), [[0.5, 0.6], [0.7, None]])
    job = ended(root, "failed", sweep="evil", kind="bug", message="it failed", traceback="where")
    (job.path / "7_0_log.err").write_text("a line")
    (place / "vector_cache").mkdir()
    (place / "tiny").mkdir()
    (place / "DIR").mkdir()
    (place / "DIR.parquet").mkdir()
    for name in ("txt", "jsonl", "parquet", "pt", "csv"):
        (place / f"EMPTY.{name}").write_bytes(b"")
    for name, text in {
        "BAD.jsonl": '{"text": ', "BAD.parquet": "PAR1 no Parquet PAR1", "BAD.pt": "no zip", "BAD.yaml": "a: [1",
        "LIST.yaml": "[1, 2]",
        "UNKNOWN.yaml": "smapling:\n  seed: 1\n", "TAG.yaml": "a: !!python/object/apply:os.system [id]", "NUL.yaml": "a: \0",
        "TYPES.yaml": "sampling:\n  seed: [a, {b: c}]\n",
        "TEXTS.jsonl": '{"row_id": "a", "text": "b"}\n{"row_id": "b", "text": "c"}\n',
        "UNREADABLE.jsonl": '{"text": "a"}\n', "UNREADABLE.yaml": "sampling:\n  seed: 1\n",
        "SCORES.jsonl": '{"draws_key": "x", "activation": 0, "draw": 0, "score": 1.0}\n', "GOOD.json": "{}",
    }.items():  # fmt: skip
        (place / name).write_text(text)
    for name in ("LATIN.jsonl", "LATIN.csv"):
        (place / name).write_bytes(b'{"text": "caf\xe9"}\n')
    for name in ("LOOP.jsonl", "LOOP.parquet"):
        (place / name).symlink_to(name)
    pq.write_table(pa.table({"a": [1, 2]}), place / "NOVECTOR.parquet")
    with connect(root):
        pass
    return place


@pytest.fixture(autouse=True)
def hurry() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise TimeoutError(f"longer than {LONGEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory as the current one; files called UNREADABLE may not be opened (root may open all)."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("KSWEEP_HOME", str(place.parent / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = io.open

    def refuse(file: Any, *rest: Any, **named: Any) -> Any:
        if "UNREADABLE" in str(file):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *rest, **named)

    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    return place


def contents(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file there; not the lock that commands take and leave."""
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), place)] = (status.st_size, status.st_mtime_ns)
    return {name: of for name, of in found.items() if not name.endswith((".lock", "tiny"))}


def shown(words: Case) -> str:
    return " ".join(word if len(word) < 60 else f"{word[:50]}...({len(word)})" for word in words)


def failures(
    cases: dict[str, list[Case]], run: Callable[[Case], None], place: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[str]:
    """Run every case and yield what is wrong with how it ended."""
    for title, of_class in cases.items():
        for *words, named in of_class:
            before = contents(place)
            signal.alarm(LONGEST_SECONDS)
            with pytest.raises(BaseException) as end:
                run(tuple(words))
            signal.alarm(0)
            captured = capsys.readouterr()
            said = captured.err
            problems = []
            if not isinstance(end.value, SystemExit) or end.value.code not in (1, 2):
                problems.append(f"ends with {end.value!r}, says {captured.out[-200:]!r}")
            if "Traceback" in said or "That is a bug" in said:
                problems.append("a traceback")
            if not said.strip() or len(said) > LONGEST_MESSAGE:
                problems.append(f"a message of {len(said)} characters")
            value = words[-1].partition("=")[2].strip("'")[:60] if words else ""
            if named.lower() not in said.lower() and not (len(value) > 2 and value in said):
                problems.append(f"{named!r} is not named")
            if changed := {name for name, of in contents(place).items() if before.get(name) != of}:
                problems.append(f"writes {sorted(changed)[:3]}")
            if problems:
                yield f"{title}: {shown(tuple(words))!r}: {'; '.join(problems)}: {said[:300]!r}"


def report(cases: dict[str, list[Case]], wrong: list[str]) -> None:
    counts = Counter({title: len(of_class) for title, of_class in cases.items()})
    print(f"{counts.total()} malformed requests: {', '.join(f'{number} {title}' for title, number in counts.items())}")
    assert not wrong, f"{len(wrong)} of {counts.total()}:\n" + "\n".join(wrong)


@pytest.mark.trials
@pytest.mark.slow
def test_malformed_settings_of_a_sweep_end_in_a_sentence(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = tiny_cell(talking_pair(inside / "tiny", num_rows=30), num_replicates=10)
    sweep = Sweep(name="tiny", cell=cell, resources=Resources(cluster="inprocess", gpus=0), registry="registry")

    def run(words: Case) -> None:
        # What is refused only where a run begins is tried as one.
        dry = [] if words[0].partition("=")[0] in ("export_json", "registry", "vector_cache", "--json") else ["--dry-run"]
        sweep_main(sweep, ["--no-charts", *words, *dry])

    wrong = list(failures(SWEEP_CASES, run, inside, capsys))
    with capsys.disabled():
        report(SWEEP_CASES, wrong)


@pytest.mark.trials
@pytest.mark.slow
def test_malformed_commands_end_in_a_sentence(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ksweep.cli, "app", get_command(app))  # typer builds it anew for each call: a tenth of a second

    def run(words: Case) -> None:
        monkeypatch.setattr(sys, "argv", ["ksweep", *words])
        ksweep.cli.main()

    wrong = list(failures(COMMAND_CASES, run, inside, capsys))
    with capsys.disabled():
        report(COMMAND_CASES, wrong)


def test_every_command_has_malformed_requests() -> None:
    first = {words[0] for of_class in COMMAND_CASES.values() for words in of_class}
    named = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert {str(name) for name in named} <= first
