"""Run every snippet of README.md, docs/ and registry/README.md in a project directory filled by a tiny pair's sweeps.

Python is run unchanged. Commands that read are run; those that would draw for minutes are planned (`--dry-run`); those that need
what is missing here are parsed by the real parser. NOT_CODE and PARSED_ONLY say what is not run and why; the tests print it.
"""

from __future__ import annotations

import ast
import glob
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import cli, connect
from ksweep.analysis.cells import load_cells
from ksweep.analysis.choosing import chosen_curves
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.evaluation.metrics import TextMetric, compute_metric
from ksweep.registry.chosen_files import record_chosen
from ksweep.registry.outside_scores import WantedDraws, export_draws, import_scores
from tests.tiny_sweeps import talking_pair

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "registry/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
TAE = next((ROOT / "tests" / "fixtures" / "tae" / "gemma3_patch_two").glob("*.pt"))

PROGRAMS = ("make", "duckdb", "ksweep", "python", "scripts/submit_k_sweep.sh")
NOT_CODE = {
    ("README.md", "cell                      K=1"): "the result table of `make sweep`",
    ("README.md", "ksweep/        the library"): "a tree of directories",
    ("registry/README.md", "draws/<draws key>/part-*"): "a tree of directories",
    ("docs/activations.md", "activations.text=chat.jsonl"): "settings to choose from",
    ("docs/architecture.md", "vector_cache/<key>/    manifest.json"): "a tree of directories",
}
"""Blocks that are neither Python nor commands, by (page, first line)."""

PARSED_ONLY = {
    r"^make ": "installs and runs for minutes: `make -n` shows what it would do",
    r"cluster=slurm": "needs Slurm: its settings are applied to the experiment",
    r"^ksweep logs ": "needs a job of four ranks: its arguments are parsed",
    r"^ksweep choose checkpoint_sweep": "would draw for minutes: its arguments are parsed",
    r"^ksweep (retry|cancel) ": "acts on jobs, and here they have ended: its arguments are parsed",
    r"^ksweep score ": "needs texts of one's own, and is run by tests/sweeps/test_score.py: its arguments are parsed",
    r"^ksweep doctor": "is run by tests/cli/test_doctor.py: its arguments are parsed",
    r"^python experiments/": "would draw for minutes: planned with --dry-run",
    r"^scripts/submit_k_sweep": "would draw for minutes: planned with --dry-run",
}
"""Commands that are not run, and what is done instead; the first match counts."""


@dataclass(frozen=True)
class Block:
    """An indented or fenced block of a page."""

    page: str
    line: int
    text: str

    @property
    def is_python(self) -> bool:
        if not re.match(r"(from|import) ", self.text):
            return False
        ast.parse(self.text)
        return True

    @property
    def why_not_code(self) -> str | None:
        return next((why for (page, start), why in NOT_CODE.items() if page == self.page and self.text.startswith(start)), None)


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of a page: lines indented by four and lines between fences, with the blank lines inside."""
    lines: list[str] = []
    start, fenced = 0, False
    for number, line in enumerate([*(ROOT / page).read_text().splitlines(), "end"], 1):
        fence = line.lstrip().startswith("```")
        inside = (fenced and not fence) or (not fenced and (line.startswith("    ") or (bool(lines) and not line.strip())))
        if inside:
            start = start if lines else number
            lines.append(line if fenced else line[4:])
        elif lines:
            yield Block(page, start, "\n".join(lines).strip("\n"))
            lines = []
        fenced = fenced != fence


BLOCKS = [block for page in PAGES for block in blocks(page)]
CODE = [block for block in BLOCKS if block.why_not_code is None]
COMMANDS = [
    pytest.param(line, id=f"{block.page}:{block.line + at}")
    for block in CODE
    if not block.is_python
    for at, line in enumerate(block.text.splitlines())
    if line.strip()
]


@dataclass(frozen=True)
class Project:
    """A user's project directory, with the results of the sweeps that the pages mention."""

    root: Path
    tiny: list[str]
    """Settings that replace the demo pair and its text by the tiny ones."""
    tae: list[str]
    """Settings that evaluate a TAE checkpoint on that text."""
    words: dict[str, str]
    """Placeholders of the pages -> what they stand for."""


def experiment(name: str, *arguments: str) -> int:
    """Run an experiment as `python experiments/NAME.py` does; return its exit code."""
    argv, sys.argv = sys.argv, [f"experiments/{name}.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError("a sweep ends with an exit code")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    pair = talking_pair(tmp_path_factory.mktemp("pairs"), num_rows=60)
    shutil.copytree(ROOT / "experiments", root / "experiments")
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("_demo", "*.py"))
    shutil.copytree(ROOT / "tests" / "fixtures" / "reference_json", root / "old_results")
    for step in ("iter_0000100", "iter_0000200"):
        shutil.copytree(pair.av, root / "runs" / step / "av")
        shutil.copytree(pair.ar, root / "runs" / step / "ar")
    (root / "my_sweep.yaml").write_text("sampling: {num_draws: 4}\n")
    text = pair.base.parent / "text.jsonl"
    small = [
        f"activations.text={text}", "activations.num_activations=24", "activations.min_position=10", "activations.dtype=float32",
        "activations.max_length=2048", "autoencoder.dtype=float32", "scoring.num_replicates=50", "cluster=inprocess", "gpus=0",
    ]  # fmt: skip
    tiny = [*small, f"autoencoder.av={pair.av}", f"autoencoder.ar={pair.ar}", f"activations.model={pair.base}"]
    tae = [*small, "activations.model=null", "activations.num_activations=8", "sampling.num_draws=4"]
    before = Path.cwd()
    os.chdir(root)
    try:
        assert experiment("temp_sweep", *tiny, "sampling.num_draws=4", "sampling.max_new_tokens=20", "--no-charts") == 0
        assert experiment("k_sweep", *tae, f"autoencoder.checkpoint={TAE}", "--no-charts") == 0
        judge_draws(root)
        with pytest.MonkeyPatch.context() as patch:  # the commands are shared out among processes: none may need another
            ksweep(["import-json", *sorted(glob.glob("old_results/*.json"))], parsed_only=False, monkeypatch=patch)
    finally:
        os.chdir(before)
    with connect(root / "registry") as connection:
        [(run, key)] = connection.execute(
            "SELECT run_id, activations_key FROM v_latest WHERE label = 'temperature=0.8'"
        ).fetchall()
    words = {
        "RUN": run, "KEY": key, "JOB": next((root / "logs").glob("2*")).name, "A": "temperature=0.4", "B": "temperature=0.8",
        "autoencoder.av=DIR": f"autoencoder.av={pair.av}", "autoencoder.ar=DIR": f"autoencoder.ar={pair.ar}",
        "activations.model=DIR": f"activations.model={pair.base}", "DIR": str(TAE.parent / "base"),
        "autoencoder.checkpoint=PATH.pt": f"autoencoder.checkpoint={TAE}",
        "autoencoder.av=owner/name@main/iter_*/av": "autoencoder.av=runs/iter_*/av",
        "autoencoder.ar=owner/name@main/iter_*/ar": "autoencoder.ar=runs/iter_*/ar",
        "+eval.checkpoint_path=PATH.pt": f"+eval.checkpoint_path={TAE}",
    }  # fmt: skip
    yield Project(root, tiny, tae, words)


def judge_draws(root: Path) -> None:
    """Give temp_sweep a judge's scores and text metrics, record a choice by them, and save the metric of docs/extending.md."""
    registry = root / "registry"
    cells = load_cells(registry, ["temp_sweep"])
    for cell in cells:
        compute_metric(TextMetric(), registry, cell.draws_key, (cell.num_activations, cell.num_draws), lambda num: np.empty(0))
    wanted = [
        WantedDraws(draws_key=c.draws_key, scores_key=None, num_activations=c.num_activations, num_draws=c.num_draws)
        for c in cells
    ]
    draws = export_draws(registry, wanted)
    scores = draws.append_column("score", pa.array(range(len(draws)), pa.float64()))
    pq.write_table(scores, root / "scores.parquet")
    import_scores(registry, scores, "judge", better="higher")
    record_chosen(registry, chosen_curves(cells, "judge"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (root / "my_parts.py").write_text("\n\n".join(blocks))


def commands(line: str, words: dict[str, str]) -> list[list[str]]:
    """Split a line into commands as a shell does, without comments and with placeholders filled in."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";")
    lexer.whitespace_split, lexer.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for token in lexer:
        if token == ";":
            parts.append([])
        elif token != "...":
            parts[-1] += sorted(glob.glob(token)) if "*" in token and not {" ", "="} & set(token) else [words.get(token, token)]
    return parts


def why_not_run(line: str) -> str | None:
    return next((why for pattern, why in PARSED_ONLY.items() if re.search(pattern, line)), None)


# --- the tests ---


def test_every_block_is_code_or_named_with_its_reason() -> None:
    for page, start in NOT_CODE:
        assert any(b.page == page and b.text.startswith(start) for b in BLOCKS), f"{start!r} is no longer a block of {page}"
    for block in BLOCKS:
        if block.why_not_code:
            print(f"{block.page}:{block.line} is not run: {block.why_not_code}")
        elif not block.is_python:
            first = block.text.split()[0]
            assert first in PROGRAMS, f"{block.page}:{block.line} begins with {first}: run it, or name it in NOT_CODE"
    assert len(CODE) >= 12 and len(COMMANDS) >= 45


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in CODE if b.is_python])
def test_python_runs_as_it_stands(block: Block, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), namespace)
    if "sweep_main(sweep)" in block.text:
        print(f"{block.page}:{block.line}: its models are on the hub: the sweep is built and planned with the tiny pair instead")
        (project.root / "experiments" / "of_the_page.py").write_text(block.text)
        assert experiment("of_the_page", *project.tiny, "--dry-run") == 0
        assert namespace["sweep"].labels() == ["temperature=0.5", "temperature=0.7", "temperature=1"]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line: str, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project.root)
    if why := why_not_run(line):
        print(f"{line}\n    is not run: {why}")
    for command in commands(line, project.words):
        run(command, line, project, monkeypatch)
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    if line.startswith("ksweep sql"):
        assert len(output.out.strip().splitlines()) > 1 or re.search(r": [1-9]\d* rows", output.out), "no answer"


def run(command: list[str], line: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = command
    if name == "make":
        assert shutil.which("make"), "the pages begin with make"
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, done.stderr
    elif name == "duckdb":
        program = shutil.which("duckdb") or str(Path(sys.executable).parent / "duckdb")
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    elif name == "ksweep":
        ksweep(arguments, parsed_only=why_not_run(line) is not None, monkeypatch=monkeypatch)
    elif name == "scripts/submit_k_sweep.sh":
        submit(arguments, project)
    else:
        assert (name, arguments[0].split("/")[0]) == ("python", "experiments"), line
        planned(Path(arguments[0]).stem, arguments[1:], project)


def ksweep(arguments: list[str], *, parsed_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    if parsed_only:
        group: Any = typer.main.get_command(cli.app)
        command = group.commands[arguments[0]]
        assert command.make_context(arguments[0], arguments[1:]).params
        return
    monkeypatch.setattr("sys.argv", ["ksweep", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (None, 0), arguments


def submit(arguments: list[str], project: Project) -> None:
    """Run the script that takes the old option names, on this machine."""
    variables = {**os.environ, "PYTHON": sys.executable, "EXPERIMENT": "experiments/k_sweep.py"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    small = [word for word in project.tae if not word.startswith(("cluster", "gpus"))]
    done = subprocess.run(
        ["bash", "scripts/submit_k_sweep.sh", *arguments, *small, "force_direct=true", "--dry-run"],
        capture_output=True, text=True, timeout=120, env=variables,
    )  # fmt: skip
    assert done.returncode == 0 and "cells to run" in done.stdout, done.stderr


def planned(name: str, arguments: list[str], project: Project) -> None:
    """Plan an experiment with the tiny pair or checkpoint; for Slurm only apply its settings."""
    of_checkpoint = any(word.startswith("autoencoder.checkpoint=") for word in arguments)
    if "cluster=slurm" in arguments:
        sweep = runpy.run_path(f"experiments/{name}.py")["sweep"]
        settings = [word for word in arguments if not word.startswith("--")]
        assert apply_overrides(sweep, parse_overrides(settings, None)).resources.cluster == "slurm"
        return
    small = project.tae if of_checkpoint else project.tiny
    assert experiment(name, *small, *arguments, *(["--dry-run"] if "--dry-run" not in arguments else [])) == 0


def test_what_the_pages_ask_of_the_registry_has_answers(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question of a page that returns nothing would pass unnoticed."""
    monkeypatch.chdir(project.root)
    asked = [re.search(r'^duckdb -readonly \S+ "([^"]*)"', param.values[0]) for param in COMMANDS]  # type: ignore[arg-type]
    questions = {found[1] for found in asked if found}
    with connect("registry") as connection:
        empty = [question for question in questions if not connection.execute(question).fetchall()]
    assert len(questions) >= 4 and all("v_token_roles" in question for question in empty), empty
