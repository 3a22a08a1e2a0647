"""Reading is enough where nothing is missing (R20): a finished sweep in a registry, with vectors, of somebody else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ksweep import Resources, Sweep, sweep_main
from ksweep.cli import main
from tests.tiny_sweeps import run, talking_pair, tiny_cell

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CELLS = "sampling.temperature=[0.5,0.7]"
READ_ONLY_DISK = (
    'for part in registry vector_cache; do mount --bind "$1/$part" "$1/$part" && mount -o remount,ro,bind "$1/$part" || exit 97; '
    'done; shift; exec "$@"'
)
ASK = "import sys; from tests.sweeps.test_read_only import ask_everything; ask_everything(sys.argv[1])"
Answers = dict[str, tuple[int, str, str]]
"""Command -> exit code, output, messages."""


def ask_everything(directory: str) -> None:
    """Run every command that reads, in this process, and note what it says."""
    place = Path(directory)
    sweep: Sweep = pickle.loads((place / "sweep.pickle").read_bytes())
    mine = replace(sweep, registry=str(place / "mine" / "registry"))
    os.chdir(place / "mine")
    registry = ["--registry", sweep.registry]
    commands = (
        ["show", "temperature=0.5"], ["ls"], ["ls", "tiny"], ["diff", "temperature=0.5", "temperature=0.7"], ["choose", "tiny"],
        ["sql", "SELECT count(*) AS n, count(error) AS scored FROM draws"], ["plot", "-o", "curves"],
        ["report", "tiny", "-o", "report.html"], ["report", "tiny"], ["plot", "-o", str(place / "registry" / "curves")],
    )  # fmt: skip
    answers = {" ".join(words): answer_of(lambda words=words: ksweep(*words, *registry)) for words in commands}  # type: ignore[misc]
    answers["verify"] = answer_of(lambda: ksweep("verify", *registry, "--vector-cache", sweep.vector_cache))
    for name, asked, settings in (
        ("sweep", sweep, [CELLS]), ("dry run", sweep, [CELLS, "--dry-run"]),
        ("more cells", sweep, ["sampling.temperature=[0.5,0.9]"]),
        ("own registry", mine, ["sampling.temperature=0.6"]), ("other vectors", mine, ["activations.min_position=11"]),
    ):  # fmt: skip
        answers[name] = answer_of(lambda asked=asked, settings=settings: sweep_main(asked, settings))  # type: ignore[misc]
    (place / "mine" / "answers.json").write_text(json.dumps(answers))


def ksweep(*words: str) -> None:
    sys.argv = ["ksweep", *words]
    main()


def answer_of(command: Callable[[], object]) -> tuple[object, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        command()
    return end.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A finished sweep, and an empty directory that may be written."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    sweep = Sweep(
        name="tiny", cell=tiny_cell(talking_pair(tmp_path / "tiny", num_rows=60), num_replicates=20),
        resources=Resources(cluster="inprocess", gpus=0), registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip
    assert run(sweep, CELLS) == 0
    (tmp_path / "sweep.pickle").write_bytes(pickle.dumps(sweep))
    return tmp_path


def read_only_answers(place: Path, how: str) -> Answers:
    """Ask everything where registry and vector cache cannot be written."""
    asking = [sys.executable, "-c", ASK, str(place)]
    if how == "disk":
        command = ["unshare", "-rm", "sh", "-c", READ_ONLY_DISK, "sh", str(place), *asking]
    else:
        for part in ("registry", "vector_cache"):
            for path in (place / part, *(place / part).rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
        # Root may write everywhere but without this capability.
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        command = [*drop, *asking]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KSWEEP_HOME": str(place / "mine" / "home"), "COLUMNS": "150"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 97 or "unshare:" in done.stderr or "setpriv:" in done.stderr:
        pytest.skip(f"not permitted here: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    answers: Answers = json.loads((place / "mine" / "answers.json").read_text())
    return answers


@pytest.mark.trials
@pytest.mark.heavy(1)
@pytest.mark.parametrize(("how", "index"), [("disk", "gone"), ("permissions", "up to date")])
def test_every_command_over_a_finished_sweep_works_without_writing_there(place: Path, how: str, index: str) -> None:
    if index == "gone":
        (place / "registry" / "ksweep.duckdb").unlink()
    why = {"disk": "Read-only file system", "permissions": "Permission denied"}[how]
    before = sorted((place / "registry").rglob("*"))
    answers = read_only_answers(place, how)
    assert sorted((place / "registry").rglob("*")) == before
    said = {name: out + err for name, (_, out, err) in answers.items()}
    failed = {name: (code, said[name]) for name, (code, _, _) in answers.items() if code}
    assert not [name for name in said if "Traceback" in said[name] or "bug in ksweep" in said[name]], said
    # 1. What is there is shown.
    assert "computed 0 of 2 cells" in said["sweep"] and "temperature=0.7" in said["sweep"]
    assert f"cannot be written ({why}): give a path elsewhere, as `ksweep plot tiny -o PATH` does" in said["sweep"].replace(
        "\n", " "
    )
    assert "640" in said["sql SELECT count(*) AS n, count(error) AS scored FROM draws"]
    assert f"not recorded in chosen_curves: {place / 'registry'} cannot be written ({why})" in said["choose tiny"]
    assert (place / "mine" / "curves.png").exists() and (place / "mine" / "report.html").exists()
    # 2. A run with a registry of its own takes the vectors that are there.
    assert "computed 1 of 1 cells" in said["own registry"]
    # 3. What would have to be written is refused, with what to do.
    elsewhere = place / "registry" / "curves"
    assert failed.keys() == {"report tiny", f"plot -o {elsewhere}", "more cells", "other vectors"}, failed
    assert f"cannot be written ({why}): name a file elsewhere, with -o FILE" in said["report tiny"]
    assert f"{elsewhere}.html cannot be written ({why}): give a path elsewhere" in said[f"plot -o {elsewhere}"]
    assert f"registry={place / 'registry'} cannot be written ({why}) and lacks 1 of 2 cells: give" in said["more cells"]
    assert (
        f"vector_cache={place / 'vector_cache'} cannot be written ({why}) and lacks 40 of the activations"
        in said["other vectors"]
    )
