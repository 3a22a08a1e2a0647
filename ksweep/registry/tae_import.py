"""Read JSON result files of the reference sweep into the registry, as runs of the sweep "imported".

    read_reference_json(path)                 -> a run record and a curve; `metric` names the quantity in the curve
    import_files(registry, paths)             -> writes them as runs; a file that was imported before is left alone

The curve of an imported file shows `variance_recovery` (which ignores a constant bias) unless `mse_variance_recovery` is
requested, which equals FVE of raw errors with scoring.baseline=distance_from_mean up to a factor (N - 1)/N. Either stands in the
column `fve`, so that old and new curves share a chart, and the column `metric` names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from ksweep.config import reference_options
from ksweep.registry.curve_rows import finite
from ksweep.registry.query import TableRow
from ksweep.registry.run_record import CURVE_SCHEMA, REFERENCE_SCHEMA, RunRecord, write_run
from ksweep.utils.errors import DataError, RequestError, SpecError
from ksweep.utils.fingerprint import fingerprint

Recovery = Literal["variance_recovery", "mse_variance_recovery"]


@dataclass(frozen=True)
class Imported:
    """A result file of the reference as a run."""

    record: RunRecord
    curve: pa.Table
    """CURVE_SCHEMA; the column fve holds the quantity named in the column metric."""
    reference: pa.Table
    """REFERENCE_SCHEMA; every quantity in the file."""
    notes: tuple[str, ...] = ()
    """Choices and gaps of the import; also in the record's spec."""


@dataclass(frozen=True)
class ImportResult:
    """Result of importing one file."""

    path: Path
    run_id: str
    landed: bool
    """False if the file was imported before."""
    notes: tuple[str, ...]


def import_files(registry: Path | str, paths: Iterable[Path | str], metric: Recovery = "variance_recovery") -> list[ImportResult]:
    """Import result files of the reference; all are read before the first is written.

    Raises:
        DataError: a file is no result file of the reference.
    """
    runs = [(Path(path), read_reference_json(path, metric)) for path in paths]
    results = []
    for path, run in runs:
        new = not (Path(registry) / "landing" / run.record.run_id).exists()
        if new:
            write_run(registry, run.record, run.curve, reference=run.reference)
        results.append(ImportResult(path, run.record.run_id, new, run.notes))
    return results


def read_reference_json(path: Path | str, metric: Recovery = "variance_recovery") -> Imported:
    """Read a result file of the reference as a run with its curve.

    Run id and cell are hashed from the file's content, so that the same file is the same run. Its times are the modification
    time of the file, which holds none itself.

    Raises:
        DataError: the file cannot be read, or lacks values that a curve needs.
    """
    path = Path(path)
    if metric not in get_args(Recovery):
        raise RequestError(f"metric={metric!r} is not one of {', '.join(get_args(Recovery))}")
    data = _bytes(path)
    tree = _parse(path, data)
    notes: list[str] = []
    results = _results(path, tree, notes)
    points = _points(path, results, metric, notes)
    digest = hashlib.sha256(data).hexdigest()
    record = _record(path, tree, results, points, metric, digest, tuple(dict.fromkeys(notes)))
    rows = [{name: point.get(name) for name in CURVE_SCHEMA.names} for point in points]
    return Imported(
        record=record,
        curve=pa.Table.from_pylist(rows, schema=pa.schema([f.with_nullable(True) for f in CURVE_SCHEMA])),
        reference=pa.Table.from_pylist([row for r in results for row in _quantities(r)], schema=REFERENCE_SCHEMA),
        notes=tuple(dict.fromkeys(notes)),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"result file {path} cannot be read: {error.strerror}") from error


def _parse(path: Path, data: bytes) -> TableRow:
    """Parse JSON as the reference's tools do: a comma before a closing bracket is ignored."""
    try:
        text = data.decode()
        try:
            tree = json.loads(text)
        except ValueError:
            tree = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
    except (ValueError, RecursionError) as error:
        raise DataError(f"result file {path} is not valid JSON ({error}); is it whole?") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("results_by_k"), list) or not tree["results_by_k"]:
        raise DataError(f"{path} is not a result file of the reference sweep: expected an object with a list `results_by_k`")
    if not isinstance(tree.get("eval_config") or {}, dict):
        raise DataError(f"eval_config of {path} is a {type(tree['eval_config']).__name__}; expected an object of settings")
    return tree


def _results(path: Path, tree: TableRow, notes: list[str]) -> list[TableRow]:
    """Return the entries by ascending K, each K once, every number finite or None."""
    by_k: dict[int, TableRow] = {}
    for index, entry in enumerate(tree["results_by_k"]):
        k = entry.get("k") if isinstance(entry, dict) else None
        if not isinstance(k, (int, float)) or isinstance(k, bool) or k < 1 or int(k) != k:
            raise DataError(f"entry {index} of results_by_k in {path} has k={k!r}; expected a whole number of at least 1")
        if int(k) in by_k:
            notes.append(f"K = {int(k)} is listed twice; the first is taken")
        _check_types(entry, f"entry {index} of results_by_k in {path}")
        by_k.setdefault(int(k), {name: finite(value) for name, value in entry.items()} | {"k": int(k)})
    return [by_k[k] for k in sorted(by_k)]


def _check_types(entry: TableRow, where: str) -> None:
    """Raise DataError for a value that does not have the type that the reference writes."""
    for name, value in entry.items():
        for pattern, expected, fits in _TYPES:
            if value is not None and re.fullmatch(pattern, name) and not fits(value):
                raise DataError(f"{where} has {name}={str(value)[:60]}; expected {expected}, or null")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or _is_number(item) for item in value)


def _are_by_role(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) and _are_numbers([*item.values()]) for item in value.values())


_TYPES = (
    (
        r"(avg_mse|mse|variance_recovery|mse_variance_recovery|r_squared|mse_for_new_variance|original_mean"
        r"|residual_variance_mean_over_hidden)((_bca)?_ci_(lower|upper)|_std)?",
        "a number",
        _is_number,
    ),
    ("total_positions", "a whole number of at least 1", lambda value: _is_number(value) and value >= 1 and value == int(value)),
    ("mse_values", "a list of numbers", _are_numbers),
    (r"(mse|variance_recovery)_by_role", "for each role an object of numbers", _are_by_role),
)
"""Pattern of keys that are read, description of their type, and a function that checks a value."""


def _points(path: Path, results: Sequence[TableRow], metric: Recovery, notes: list[str]) -> list[TableRow]:
    """Return rows of the curve for every K that has the metric or values from which it follows."""
    candidates = [_point(path, result, results, metric, notes) for result in results]
    points = [point for point in candidates if point["fve"] is not None]
    left_out = [str(point["k"]) for point in candidates if point["fve"] is None]
    if not points:
        raise DataError(f"no K of {path} has {metric}, or values from which it follows")
    if left_out:
        notes.append(f"K = {', '.join(left_out)} left out: no {metric}, and no values from which it follows")
    return points


def _point(path: Path, result: TableRow, results: Sequence[TableRow], metric: Recovery, notes: list[str]) -> TableRow:
    """Return one row of the curve; `fve` is None where the file lacks the metric."""
    baseline = _variance_per_dimension(result)
    if baseline is None:  # the activations are the same for every K
        baseline = next((b for r in results if (b := _variance_per_dimension(r)) is not None), None)
    value, low, high = _with_interval(result, metric, baseline)
    streamed = _is_streamed(results)
    return {
        "metric": metric,
        "k": result["k"],
        "fve": value,
        "fve_low": low,
        "fve_high": high,
        "level": None if low is None else 0.95,
        "error": result.get("avg_mse"),
        "num_activations": _num_activations(path, result, notes),
        "num_draws": max(r["k"] for r in results) if streamed else result["k"],
        "baseline": baseline,
        "baseline_kind": None if baseline is None else "distance from mean",
    }


def _with_interval(result: TableRow, metric: Recovery, baseline: float | None) -> tuple[float | None, float | None, float | None]:
    """Return the metric with its percentile interval, which only variance_recovery has; 0.0 to 0.0 means none."""
    if metric == "mse_variance_recovery":
        value, error = result.get(metric), result.get("avg_mse")
        if value is None and baseline and error is not None:
            value = 1 - error / baseline
        return value, None, None
    low, high = _bounds(result, "variance_recovery_ci")
    return result.get(metric), low, high


def _bounds(result: TableRow, name: str) -> tuple[float | None, float | None]:
    low, high = result.get(f"{name}_lower"), result.get(f"{name}_upper")
    return (None, None) if low is None or high is None or low == high == 0 else (float(low), float(high))


def _variance_per_dimension(result: TableRow) -> float | None:
    """Return the variance of the activations (ddof 1), mean over dimensions: the baseline of variance_recovery.

    Computed from the error and mse_variance_recovery; else from the residual variance and variance_recovery, unless the streaming
    mode wrote the plain error under the name of the residual variance.
    """
    error, recovered = result.get("avg_mse"), result.get("mse_variance_recovery")
    if error is not None and recovered is not None and recovered < 1:
        return float(error / (1 - recovered))
    residual, recovery = result.get("residual_variance_mean_over_hidden"), result.get("variance_recovery")
    if residual is None or recovery is None or recovery >= 1 or _same(residual, error):
        return None
    return float(residual / (1 - recovery))


def _is_streamed(results: Sequence[TableRow]) -> bool:
    """Return whether one set of draws serves every K (the default mode): its files have the plain error as residual variance."""
    return all(_same(r.get("residual_variance_mean_over_hidden"), r.get("avg_mse")) for r in results)


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)


def _num_activations(path: Path, result: TableRow, notes: list[str]) -> int:
    if result.get("mse_values"):
        return len(result["mse_values"])
    if not result.get("total_positions"):
        raise DataError(f"K = {result['k']} of {path} has neither mse_values nor total_positions: how many vectors were there?")
    notes.append("N is total_positions, which in the mode that samples for each K counts only one rank of several GPUs")
    return int(result["total_positions"])


def _quantities(result: TableRow) -> list[TableRow]:
    """Return every quantity of an entry as rows of REFERENCE_SCHEMA."""
    rows = []
    n = len(result["mse_values"]) if result.get("mse_values") else result.get("total_positions")
    for name, prefix in (
        ("avg_mse", "mse"), ("variance_recovery", "variance_recovery"), ("mse_variance_recovery", None),
        ("r_squared", "r_squared"), ("mse_for_new_variance", None), ("original_mean", None),
    ):  # fmt: skip
        if result.get(name) is None:
            continue
        row = {"quantity": name, "role": None, "k": result["k"], "value": result[name], "num_activations": n}
        if prefix and _bounds(result, f"{prefix}_ci")[0] is not None:
            row["low"], row["high"] = _bounds(result, f"{prefix}_ci")
            row["std"] = result.get(f"{prefix}_std")
        if name == "variance_recovery":
            row["bca_low"], row["bca_high"] = _bounds(result, "variance_recovery_bca_ci")
        rows.append(row)
    return rows + _role_rows(result)


def _role_rows(result: TableRow) -> list[TableRow]:
    rows = []
    for role, values in (result.get("mse_by_role") or {}).items():
        row = {"quantity": "avg_mse", "role": role, "k": result["k"], "value": values.get("avg_mse")}
        rows.append(row | {"num_activations": values.get("count"), "spread": values.get("std")})
    for role, values in (result.get("variance_recovery_by_role") or {}).items():
        names = ("variance_recovery", "total_variance", "residual_variance")
        common = {"role": role, "k": result["k"], "num_activations": values.get("count")}
        rows += [common | {"quantity": name, "value": values.get(name)} for name in names]
    return rows


def _record(
    path: Path,
    tree: TableRow,
    results: Sequence[TableRow],
    points: Sequence[TableRow],
    metric: Recovery,
    digest: str,
    notes: tuple[str, ...],
) -> RunRecord:
    cell_key = fingerprint({"reference_json": digest, "metric": metric})
    stem = re.sub(r"[^\w.-]+", "_", path.stem).lstrip("._") or "results"
    when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    checkpoint = str(tree.get("checkpoint_path") or "") or None
    return RunRecord(
        run_id=f"imported-{stem[:80]}-{cell_key[:12]}",
        cell=f"{path.stem} @{cell_key[:8]}",
        label=path.stem,
        cell_key=cell_key,
        sweep="imported",
        spec=_spec(path, tree, checkpoint, digest, metric, notes),
        status="finished",
        started=when,
        finished=when,
        num_activations=max(p["num_activations"] for p in points),
        num_draws=results[-1]["k"],
        d_model=_width(results),
        layer=_layer(checkpoint),
        baseline=points[0]["baseline"],
        scoring_kind="raw",
        baseline_kind=points[0]["baseline_kind"],
        baseline_num_activations=points[0]["num_activations"],
        token_stats=_role_counts(results, "token_stats"),
        selected_token_stats=_role_counts(results, "selected_token_stats"),
    )


def _role_counts(results: Sequence[TableRow], name: str) -> TableRow | None:
    """Return the token counts by role of the first entry, if it has them."""
    stats = results[0].get(name)
    counts = stats.get("counts") if isinstance(stats, dict) else None
    complete = isinstance(counts, dict) and counts and all(isinstance(count, int) for count in counts.values())
    return stats if complete else None


def _spec(path: Path, tree: TableRow, checkpoint: str | None, digest: str, metric: Recovery, notes: tuple[str, ...]) -> TableRow:
    """Return the known settings of the cell under ksweep's names, without options that the reference accepts and ignores."""
    given = {f"eval.{name}": value for name, value in (tree.get("eval_config") or {}).items()}
    read_by_it = {
        n: v for n, v in given.items() if (o := reference_options.BY_NAME.get(n)) and o.kind == "translated" and not o.warns
    }
    spec: TableRow = {"kind": "reference JSON", "metric": metric, "file": path.name, "sha256": digest, "notes": list(notes)}
    for name, value in read_by_it.items():
        try:
            settings = reference_options.BY_NAME[name].settings(value, given)
        except SpecError:  # an unusable option is no reason to refuse the numbers
            continue
        for key, new in settings.items():
            group, _, field = key.partition(".")
            if group in ("autoencoder", "activations", "sampling", "scoring"):
                spec.setdefault(group, {})[field] = new
    if checkpoint:
        spec.setdefault("autoencoder", {})["checkpoint"] = checkpoint
    return spec


def _width(results: Sequence[TableRow]) -> int | None:
    for r in results:
        if r.get("avg_mse") and r.get("mse_for_new_variance"):
            return int(r["mse_for_new_variance"] / r["avg_mse"] + 0.5)
    return None


def _layer(checkpoint: str | None) -> int | None:
    """Return the layer in the name of the training run: 45 for "..._L45_e45_..."."""
    match = re.search(r"_L(\d+)_", checkpoint or "")
    return int(match[1]) if match else None
