"""The results of a sweep as an object for notebooks and scripts: curves, draws, comparison, charts, report.

results = ksweep.results("temp_sweep")       # of what was run before; `ksweep.run` returns the same
results.curves                               # Arrow table: a row per cell and K
results.compare(reference="temperature=1")   # Arrow table of paired differences
results.chosen(by="judge")                   # Arrow table: chosen by one score, reported in another
results.chart("fve_by_temperature")          # Altair chart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from ksweep.analysis.cells import load_cells
from ksweep.analysis.choosing import chosen_curves
from ksweep.analysis.compare import compare
from ksweep.analysis.results_table import print_curves
from ksweep.config.sweep import Sweep
from ksweep.registry.database import connect
from ksweep.registry.query import curves_of
from ksweep.utils.console import printed_text
from ksweep.utils.errors import RequestError

if TYPE_CHECKING:
    import altair as alt

ChartKind = Literal[
    "fve_by_k",
    "fve_by_temperature",
    "fve_by_step",
    "compare",
    "chosen",
    "by_group",
    "error_distribution",
    "norm_distribution",
    "throughput",
]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is measured of a sweep. Every property reads the registry when it is asked, so results that land later are there."""

    sweep: str
    """Name of the sweep."""
    question: str
    registry: Path
    labels: Mapping[str, str] = field(repr=False)
    """Cell key -> label, of every cell of the sweep, in its order."""

    @property
    def missing(self) -> list[str]:
        """Labels of the cells without a finished run."""
        run_ids = self._run_ids()
        return [label for key, label in self.labels.items() if key not in run_ids]

    @property
    def curves(self) -> pa.Table:
        """A row per cell and K: `label`, `k`, `fve`, its interval, ... (the columns of the view `curves`)."""
        return curves_of(self.registry, self.labels)

    @property
    def draws(self) -> pa.Table:
        """A row per draw: `label`, `activation`, `draw`, `explanation`, `error`, ... (the columns of the view `draws`)."""
        with connect(self.registry) as connection:
            connection.register("wanted_cells", self._wanted())
            keys = connection.execute(_DRAWS_KEYS).fetchall()
            # Literals, so that only the files of these keys are opened.
            literals = ", ".join("'" + key.replace("'", "''") + "'" for (key,) in keys)
            return connection.sql(_DRAWS.format(keys=literals or "''")).to_arrow_table()

    def compare(self, reference: str | None = None, *, level: float | None = None) -> pa.Table:
        """Return the paired differences of every two cells, or of each from a reference; see `analysis.compare.compare`.

        Args:
            reference: label, cell or run id of the cell that is subtracted from the others.
            level: nominal coverage of the intervals; None takes that of the cells.

        Raises:
            RequestError: fewer than two cells have finished, or they cannot be compared.
        """
        run_ids = list(self._run_ids().values())
        if len(run_ids) < 2:
            raise RequestError(f"a comparison needs two finished cells; {self.sweep} has {len(run_ids)}")
        return compare(load_cells(self.registry, run_ids), reference, level=level)

    def chosen(self, by: str, report: str = "error", *, ks: Sequence[int] | None = None, level: float | None = None) -> pa.Table:
        """Return best-of-K chosen by one score and reported in another; see `analysis.choosing.chosen_curves`.

        Args:
            by: the score that chooses: "error", the label of a cell with another AR over the same draws, or a metric ("judge",
                "text.num_words"; with a minus in front the other way round).
            report: the score that is reported.
            ks: values of K; None takes those of each cell.
            level: nominal coverage of the intervals; None takes that of the cells.

        Raises:
            RequestError: no cell has finished, or there is no such score.
        """
        cells = load_cells(self.registry, list(self._run_ids().values()) or [self.sweep])
        labels = {run_id: self.labels[key] for key, run_id in self._run_ids().items()}
        cells = [replace(cell, label=labels[cell.run_id]) for cell in cells]
        return chosen_curves(cells, by, report, ks=ks, level=level)

    def chart(self, kind: ChartKind = "fve_by_k", **options: Any) -> alt.TopLevelMixin:
        """Return an Altair chart of these cells; a notebook shows it.

        Args:
            kind: a function of `ksweep.analysis.charts`.
            options: passed to that function; for "compare", `reference` and `level` go to the comparison, for "chosen" `by`,
                `report`, `ks` and `level` to the choice.

        Raises:
            RequestError: there is no such chart, or nothing to show.
        """
        from ksweep.analysis import charts

        if kind not in get_args(ChartKind):
            raise RequestError(f"chart {kind!r} is not one of {', '.join(get_args(ChartKind))}")
        if not self._run_ids():
            raise RequestError(f"no cell of {self.sweep} has finished in {self.registry}: there is nothing to draw")
        if kind == "fve_by_k":
            return charts.fve_by_k(self.curves, **{"title": self.question or self.sweep} | options)
        if kind == "chosen":
            choice = {name: options.pop(name) for name in ("by", "report", "ks", "level") if name in options}
            return charts.chosen(self.chosen(**choice), **options)
        if kind == "compare":
            asked = {name: options.pop(name) for name in ("reference", "level") if name in options}
            return charts.compare(self.compare(**asked), **options)
        with connect(self.registry) as connection:
            return getattr(charts, kind)(connection, sweep=self.sweep, **options)

    def report(self, path: Path | str | None = None) -> Path:
        """Write the report of the sweep as one HTML file and return its path, by default in the registry."""
        from ksweep.analysis.report import write_report

        return write_report(self.registry, self.sweep, None if path is None else Path(path))

    def __str__(self) -> str:
        missing = self.missing
        if len(missing) == len(self.labels):
            return f"{self.sweep}: none of its {len(self.labels)} cells has finished"
        lines = printed_text(lambda: print_curves(self.sweep, self.registry, self.labels))
        return "\n".join([lines, *([f"not finished: {', '.join(missing)}"] if missing else [])])

    __repr__ = __str__

    def _wanted(self) -> pa.Table:
        return pa.table({"cell_key": list(self.labels), "wanted": list(self.labels.values()), "place": range(len(self.labels))})

    def _run_ids(self) -> dict[str, str]:
        """Return cell key -> newest finished run, in the order of the sweep."""
        with connect(self.registry) as connection:
            connection.register("wanted_cells", self._wanted())
            question = "SELECT cell_key, run_id FROM wanted_cells JOIN v_latest USING (cell_key) ORDER BY place"
            return dict(connection.execute(question).fetchall())


def results_of_cells(sweep: Sweep, cell_keys: list[str]) -> Results:
    """Return the results of a sweep whose cells have these keys."""
    labels = dict(zip(cell_keys, sweep.labels(), strict=True))
    return Results(sweep=sweep.name, question=sweep.question, registry=Path(sweep.registry).absolute(), labels=labels)


def results_of_sweep(sweep: str, registry: Path | str = "registry") -> Results:
    """Return the results of a sweep that was run before, by its name.

    Args:
        sweep: name of the sweep.
        registry: directory of the registry.

    Raises:
        RequestError: the registry holds no such sweep.
    """
    root = Path(registry).absolute()
    if not root.is_dir():
        raise RequestError(f"no registry at {root}: give the directory that the sweep wrote to, e.g. registry='registry'")
    with connect(root) as connection:
        cells = connection.execute("SELECT cell_key, label FROM v_sweep_cells WHERE sweep = ? ORDER BY place", [sweep]).fetchall()
        question = connection.execute("SELECT question FROM v_sweeps WHERE sweep = ?", [sweep]).fetchone()
        names = [name for (name,) in connection.execute("SELECT DISTINCT sweep FROM v_sweep_cells ORDER BY sweep").fetchall()]
    if not cells:
        raise RequestError(f"no sweep {sweep!r} in {root}; it has {', '.join(names) or 'none yet'}")
    return Results(sweep=sweep, question=(question[0] or "") if question else "", registry=root, labels=dict(cells))


_DRAWS_KEYS = "SELECT DISTINCT draws_key FROM wanted_cells JOIN v_latest USING (cell_key) WHERE draws_key IS NOT NULL"
_DRAWS = """
    SELECT w.wanted AS label, d.*
    FROM wanted_cells AS w JOIN v_latest AS r USING (cell_key)
    JOIN (FROM draws WHERE draws_key IN ({keys})) AS d
    ON d.draws_key = r.draws_key AND d.scores_key IS NOT DISTINCT FROM r.scores_key AND d.activation < r.num_activations
        AND d.draw < r.num_draws
    ORDER BY w.place, d.activation, d.draw
"""
