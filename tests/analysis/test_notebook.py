"""The notebook that a user starts from: stored with its pictures, and runs on other registries too."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksweep import Resources, Sweep
from tests.tiny_sweeps import run, talking_pair, tiny_cell

NOTEBOOK = Path(__file__).parents[2] / "registry" / "charts.ipynb"


def executed(registry: str, sweep: str) -> list[dict[str, Any]]:
    """Its code cells, run from top to bottom by a kernel of its own; a cell that fails raises here."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    variables = {**os.environ, "KSWEEP_REGISTRY": registry, "KSWEEP_SWEEP": sweep}
    client = nbclient.NotebookClient(notebook, timeout=840, kernel_name="python3", resources={"metadata": {"path": registry}})
    client.execute(env=variables)
    return [cell for cell in notebook.cells if cell["cell_type"] == "code"]


def kinds(cells: list[dict[str, Any]]) -> list[str]:
    return [kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {})]


def said(cells: list[dict[str, Any]]) -> str:
    return "".join(output["text"] for cell in cells for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    place = tmp_path_factory.mktemp("notebook")
    pair = talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)
    done = Sweep(
        name="two", cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(place / "registry"), vector_cache=str(place / "vector_cache"),
        axes={"sampling.temperature": (0.7, 1.3)},
    )  # fmt: skip
    assert run(done) == 0
    assert run(replace(done, name="one", axes={})) == 0
    return done


@pytest.mark.slow
def test_notebook_runs_on_a_registry_of_other_cells_and_draws_everything(sweep: Sweep) -> None:
    cells = executed(sweep.registry, "two")
    assert kinds(cells).count("image/png") == 8 and "not to be had" not in said(cells)


@pytest.mark.slow
def test_notebook_says_what_a_sweep_of_one_cell_has_not(sweep: Sweep) -> None:
    cells = executed(sweep.registry, "one")
    assert kinds(cells).count("image/png") >= 6 and "a comparison needs two cells" in said(cells)


def test_stored_notebook_is_whole_bounded_and_tells_nothing_of_its_machine() -> None:
    text = NOTEBOOK.read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < 2_000_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert kinds(code).count("image/png") == 8
    assert all(output["output_type"] == "execute_result" for cell in code for output in cell["outputs"])
    words = "".join(str(v) for c in code for o in c["outputs"] for kind, v in o["data"].items() if kind != "image/png")
    assert not re.search(r"/(tmp|home|root|Users|work)/", words) and "temperature=0.4" in words
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in words


@pytest.mark.slow
def test_results_and_plan_are_shown_as_their_tables_in_a_notebook(sweep: Sweep) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [f"import ksweep\nresults = ksweep.results('two', {sweep.registry!r})\nresults", "results.chart()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=840, kernel_name="python3").execute()
    shown, chart = ([output["data"] for output in cell.outputs if "data" in output] for cell in notebook.cells)
    [table] = shown
    assert "two: FVE, best of K draws" in table["text/plain"] and "temperature=1.3" in table["text/plain"]
    assert any("vega" in kind or kind == "text/html" for output in chart for kind in output)
