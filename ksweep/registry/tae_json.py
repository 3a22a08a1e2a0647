"""JSON result files of the reference sweep: written from a run of ours, and read into the registry as runs of their own kind.

    export_run(registry, run_id)              -> a dict in the reference's schema (tae_reference.md 1.4); what misleads is named
    read_reference_json(path)                 -> a run record and a curve, `metric` saying which number the curve shows
    import_files(registry, paths)             -> lands them; a file that has landed before is left alone

The number of an old curve is `variance_recovery` (blind to a constant bias) unless `mse_variance_recovery` is asked for, which is
our FVE of raw errors with scoring.baseline=distance_from_mean but for a factor (N - 1)/N. It stands in the column `fve`, so
that old and new curves share a chart, and `metric` tells them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from ksweep.config import reference_options
from ksweep.registry.draws import DrawsStore
from ksweep.registry.query import TableRow
from ksweep.registry.run_record import CURVE_SCHEMA, REFERENCE_SCHEMA, LandedRun, RunRecord, read_run, write_run
from ksweep.stats import Selection, best_errors
from ksweep.utils.errors import DataError, RequestError, SpecError
from ksweep.utils.files import publish
from ksweep.utils.fingerprint import fingerprint

Metric = Literal["variance_recovery", "mse_variance_recovery"]

MISLEADING = {
    "variance_recovery": "a residual variance: a constant bias costs nothing; in mse_variance_recovery it counts",
    "r_squared": "baseline is one scalar mean over all entries, so differences between dimensions count as explained",
    "original_variance": "summed over dimensions, as the reference's default mode has it; its other mode has one variance over "
    "all entries under this name",
    "residual_variance_mean_over_hidden": "the plain mean squared error, as in the reference's default mode; not a variance",
    "mean_variance_mean_over_hidden": "the same number as residual_variance_mean_over_hidden, under a name that says otherwise",
    "total_positions": "all activations of all ranks; the reference's other mode has those of one rank",
    "variance_recovery_bias_corrected": "equal to variance_recovery where no bootstrap was asked for",
    "variance_recovery_ci_lower": "over single vectors: too narrow where activations of one document are alike; null without a "
    "bootstrap, where the reference has 0.0",
    "activation_norms": "the same list for every K",
}
"""What a reader of the reference's schema should know; written into every exported file."""


# Export


def export_run(registry: Path | str, run_id: str) -> TableRow:
    """The JSON of a landed run, with every activation's best error where its draws are there.

    Raises:
        RequestError: no such run, or one that did not finish.
    """
    path = Path(registry) / "landing" / run_id
    if not path.is_dir():
        raise RequestError(f"no run {run_id!r} in {path.parent}: `ksweep ls` lists the runs")
    run = read_run(path)
    return export_landed(
        run,
        reference=run.reference.to_pylist() if run.reference is not None else (),
        mse_values=_best_errors(Path(registry), run),
        activation_norms=run.norms["norm"].to_pylist() if run.norms is not None else None,
        token_stats=_plain(run.record.token_stats),
        selected_token_stats=_plain(run.record.selected_token_stats),
    )


def export_landed(
    run: LandedRun,
    *,
    reference: Iterable[TableRow] = (),
    mse_values: Mapping[int, Sequence[float]] | None = None,
    activation_norms: Sequence[float] | None = None,
    token_stats: TableRow | None = None,
    selected_token_stats: TableRow | None = None,
) -> TableRow:
    """A finished run in the reference's schema, all keys there; what is not known is null or an empty list.

    Args:
        run: record and curve.
        reference: rows of REFERENCE_SCHEMA; without them (NLA pairs) errors are those of the curve, of scaled vectors.
        mse_values: for each K the best mean squared error of each activation.
        activation_norms: length of each activation.
        token_stats: counts and proportions by role over all tokens.
        selected_token_stats: the same over the evaluated positions.

    Raises:
        RequestError: the run did not finish.
    """
    if run.curve is None:
        raise RequestError(f"run {run.record.run_id} is {run.record.status} and has no results to export")
    quantities: dict[tuple[str | None, int], dict[str, TableRow]] = {}
    for row in reference:
        quantities.setdefault((row.get("role"), row["k"]), {})[row["quantity"]] = row
    results = []
    for point in run.curve.to_pylist():
        result = _result(point, quantities.get((None, point["k"])), run.record)
        result["mse_values"] = [float(x) for x in (mse_values or {}).get(point["k"], ())]
        result["activation_norms"] = [float(x) for x in (() if activation_norms is None else activation_norms)]
        result |= _by_role(quantities, point["k"])
        # The reference guesses a model_type from the tokenizer; here roles are read off whichever chat format it has.
        all_tokens = None if token_stats is None else {"model_type": None} | dict(token_stats)
        extra = {"token_stats": all_tokens, "selected_token_stats": selected_token_stats}
        results.append(result | {name: value for name, value in extra.items() if value is not None})
    document = {
        "checkpoint_path": _checkpoint_of(run.record.spec),
        "eval_config": _eval_config(run.record.spec, results),
        "results_by_k": results,
        "summary": _summary(results),
        "ksweep": _about(run, results, bool(quantities)),
    }
    plain: TableRow = _plain(document)
    return plain


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """One file, whole or absent; without line breaks inside lists, which made the reference's files ten times as long."""
    publish(path, json.dumps(document, allow_nan=False).encode())


def _result(point: TableRow, found: dict[str, TableRow] | None, record: RunRecord) -> TableRow:
    """The 24 scalar keys of one K."""
    rows = found or {}
    value = {name: row.get("value") for name, row in rows.items()}
    if not rows:
        value = {"avg_mse": point["error"], "mse_variance_recovery": _from_error(point, record)}
    recovery, mse, squared = (rows.get(name, {}) for name in ("variance_recovery", "avg_mse", "r_squared"))
    bias, vr = recovery.get("bias"), value.get("variance_recovery")
    return {
        "k": point["k"],
        "avg_mse": value.get("avg_mse"),
        "variance_recovery": vr,
        "mse_for_new_variance": value.get("mse_for_new_variance"),
        "mse_variance_recovery": value.get("mse_variance_recovery"),
        "r_squared": value.get("r_squared"),
        "original_mean": value.get("original_mean"),
        "original_variance": value.get("total_variance"),
        "residual_variance_mean_over_hidden": value.get("avg_mse"),
        "mean_variance_mean_over_hidden": value.get("avg_mse"),
        "total_positions": point["num_activations"],
        "variance_recovery_bias": bias,
        "variance_recovery_bias_corrected": vr if bias is None or vr is None else vr - bias,
        "variance_recovery_std": recovery.get("std"),
        "variance_recovery_ci_lower": recovery.get("low"),
        "variance_recovery_ci_upper": recovery.get("high"),
        "variance_recovery_bca_ci_lower": recovery.get("bca_low"),
        "variance_recovery_bca_ci_upper": recovery.get("bca_high"),
        "mse_std": mse.get("std"),
        "mse_ci_lower": mse.get("low"),
        "mse_ci_upper": mse.get("high"),
        "r_squared_std": squared.get("std"),
        "r_squared_ci_lower": squared.get("low"),
        "r_squared_ci_upper": squared.get("high"),
    }


def _from_error(point: TableRow, record: RunRecord) -> float | None:
    """mse_variance_recovery of a curve of ours, whose variance has ddof 1: from the distance of the activations from their mean.

    None where that is not known: runs of earlier versions with a stated baseline, imported ones.
    """
    is_from_mean = point["baseline_kind"] in ("distance from mean", "evaluated set")
    from_mean = point["baseline"] if is_from_mean else record.baseline_from_mean
    if from_mean is None or point["error"] is None or point.get("metric") not in (None, "fve"):
        return None
    n = point["num_activations"]
    return float(1 - point["error"] / from_mean * (n - 1) / n)


def _by_role(quantities: Mapping[tuple[str | None, int], dict[str, TableRow]], k: int) -> TableRow:
    errors: TableRow = {}
    recovery: TableRow = {}
    for (role, at), rows in quantities.items():
        if role is None or at != k:
            continue
        mse, count = rows["avg_mse"], rows["avg_mse"]["num_activations"]
        errors[role] = {"avg_mse": mse["value"], "count": count, "std": mse.get("spread")}
        if "variance_recovery" in rows:
            names = ("variance_recovery", "total_variance", "residual_variance")
            recovery[role] = {name: rows[name]["value"] for name in names} | {"count": count}
    return ({"mse_by_role": errors} if errors else {}) | ({"variance_recovery_by_role": recovery} if recovery else {})


def _summary(results: Sequence[TableRow]) -> TableRow:
    """In the order of results_by_k (the reference kept the order asked for, which need not be that of the results)."""
    columns = {
        "mse_values": "avg_mse",
        "variance_recovery_values": "variance_recovery",
        "r_squared_values": "r_squared",
        "new_variance_recovery_values": "mse_variance_recovery",
        "new_variance_recovery_mse_values": "mse_for_new_variance",
    }
    ks = {"k_values": [float(r["k"]) for r in results]}
    return ks | {name: [r[source] for r in results] for name, source in columns.items()}


def _eval_config(spec: Mapping[str, Any], results: Sequence[TableRow]) -> TableRow:
    """The settings by their old names."""
    activations, sampling, scoring = (spec.get(name) or {} for name in ("activations", "sampling", "scoring"))
    return {
        "checkpoint_path": _checkpoint_of(spec),
        "k_values": [r["k"] for r in results],
        "constant_k_mode": True,
        "max_val_samples": _num_rows(activations),
        "temperature": sampling.get("temperature"),
        "num_positions": activations.get("positions_per_document"),
        "min_pos": activations.get("min_position"),
        "position_selection_strategy": activations.get("positions"),
        "do_bootstrap": bool(scoring.get("reference_replicates")),
        "compute_variance_by_role": any("mse_by_role" in r for r in results),
        "use_bf16": (spec.get("autoencoder") or {}).get("dtype") == "bfloat16",
    }


def _num_rows(activations: Mapping[str, Any]) -> int | None:
    """The reference counts rows of text, each with num_positions; None where the activations end in the middle of a row."""
    num_activations, per_row = activations.get("num_activations"), activations.get("positions_per_document") or 1
    if num_activations is None or num_activations % per_row:
        return None
    return int(num_activations // per_row)


def _checkpoint_of(spec: Mapping[str, Any]) -> str | None:
    autoencoder = spec.get("autoencoder") or {}
    return autoencoder.get("checkpoint") or autoencoder.get("av")


def _about(run: LandedRun, results: Sequence[TableRow], of_reference: bool) -> TableRow:
    """What the reference's schema lacks: where the numbers come from, which mislead, which are not known."""
    assert run.curve is not None
    record, scoring = run.record, run.record.spec.get("scoring") or {}
    unknown = sorted({name for r in results for name, value in r.items() if value is None or value == []})
    scaled = not (of_reference or (record.spec.get("autoencoder") or {}).get("checkpoint"))
    missing = {"avg_mse": "of vectors scaled to norm sqrt(d): 2 (1 - cosine); not a raw error"} if scaled else {}
    return {
        "run_id": record.run_id,
        "cell": record.cell,
        "spec": record.spec,
        # The reference's quantities are of the first K draws by definition; the curve below is as the spec says.
        "selection": "prefix" if of_reference else scoring.get("selection", "order_statistics"),
        "misleading": MISLEADING | missing,
        "unknown": unknown,
        "notes": [note.text for note in record.notes],
        "curve": run.curve.to_pylist(),
        "started": record.started.isoformat(),
        "finished": record.finished.isoformat(),
        "seconds": dict(record.seconds),
        "device": record.device,
        "num_ranks": record.num_ranks,
        "git_commit": record.git_commit,
        "packages": dict(record.packages),
    }


def _best_errors(registry: Path, run: LandedRun) -> dict[int, list[float]]:
    """For each K of the curve the best-of-K error of each activation, chosen as avg_mse is; empty where the draws are gone."""
    record = run.record
    if run.curve is None or not (record.draws_key and record.num_activations and record.num_draws):
        return {}
    draws = DrawsStore(registry / "draws", record.draws_key).read(record.num_activations, record.num_draws, ["error"])
    if draws is None:
        return {}
    errors = draws["error"].to_numpy().reshape(record.num_activations, record.num_draws)
    scoring = record.spec.get("scoring") or {}
    selection: Selection = "prefix" if run.reference is not None else scoring.get("selection", "order_statistics")
    failed = scoring.get("failed_error")
    ks = run.curve["k"].to_pylist()
    found = best_errors(errors, ks, selection, 2.0 if failed is None else failed)
    return {k: [float(x) for x in found[:, i]] for i, k in enumerate(ks)}


def _plain(value: Any) -> Any:
    """JSON values: NumPy scalars as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Import


@dataclass(frozen=True)
class Imported:
    """An old result file, as it would land."""

    record: RunRecord
    curve: pa.Table
    """CURVE_SCHEMA: `fve` holds the number that `metric` names."""
    reference: pa.Table
    """REFERENCE_SCHEMA: every quantity the file has."""
    notes: tuple[str, ...] = ()
    """What had to be left open or chosen; also in the record's spec."""


@dataclass(frozen=True)
class ImportResult:
    """What became of a file."""

    path: Path
    run_id: str
    landed: bool
    """False: it had landed before."""
    notes: tuple[str, ...]


def import_files(registry: Path | str, paths: Iterable[Path | str], metric: Metric = "variance_recovery") -> list[ImportResult]:
    """Land old result files; all are read before the first is landed.

    Raises:
        DataError: a file that is not a result file of the reference.
    """
    found = [(Path(path), read_reference_json(path, metric)) for path in paths]
    arrivals = []
    for path, run in found:
        new = not (Path(registry) / "landing" / run.record.run_id).exists()
        if new:
            write_run(registry, run.record, run.curve, reference=run.reference)
        arrivals.append(ImportResult(path, run.record.run_id, new, run.notes))
    return arrivals


def read_reference_json(path: Path | str, metric: Metric = "variance_recovery") -> Imported:
    """A result file of the reference as a run with its curve.

    The run's id and cell come from the file's content, so the same file is the same run; its times are those of the file, which
    says none itself.

    Raises:
        DataError: it cannot be read, or lacks what a curve needs.
    """
    path = Path(path)
    if metric not in get_args(Metric):
        raise RequestError(f"metric={metric!r} is not one of {', '.join(get_args(Metric))}")
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
    """JSON as the reference's tools read it: commas before a closing bracket are passed over."""
    try:
        text = data.decode()
        try:
            tree = json.loads(text)
        except ValueError:
            tree = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
    except ValueError as error:
        raise DataError(f"result file {path} is not valid JSON ({error}); is it whole?") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("results_by_k"), list) or not tree["results_by_k"]:
        raise DataError(f"{path} is no result file of the reference sweep: expected an object with a list `results_by_k`")
    if not isinstance(tree.get("eval_config") or {}, dict):
        raise DataError(f"eval_config of {path} is a {type(tree['eval_config']).__name__}; expected an object of settings")
    return tree


def _results(path: Path, tree: TableRow, notes: list[str]) -> list[TableRow]:
    """Entries by ascending K, each K once, every number finite or None."""
    by_k: dict[int, TableRow] = {}
    for index, entry in enumerate(tree["results_by_k"]):
        k = entry.get("k") if isinstance(entry, dict) else None
        if not isinstance(k, (int, float)) or isinstance(k, bool) or k < 1 or int(k) != k:
            raise DataError(f"entry {index} of results_by_k in {path} has k={k!r}; expected a whole number of at least 1")
        if int(k) in by_k:
            notes.append(f"K = {int(k)} stands there twice; the first is taken")
        _refuse_other_kinds(entry, f"entry {index} of results_by_k in {path}")
        by_k.setdefault(int(k), {name: _known(value) for name, value in entry.items()} | {"k": int(k)})
    return [by_k[k] for k in sorted(by_k)]


def _refuse_other_kinds(entry: TableRow, where: str) -> None:
    """Values of what is read that are of another kind than the reference writes."""
    for name, value in entry.items():
        for pattern, expected, fits in READ:
            if value is not None and re.fullmatch(pattern, name) and not fits(value):
                raise DataError(f"{where} has {name}={str(value)[:60]}; expected {expected}, or null")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(one is None or _is_number(one) for one in value)


def _are_by_role(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, dict) and _are_numbers([*one.values()]) for one in value.values())


READ = (
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
"""Names of an entry that are read, what they hold, and whether a value is that."""


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _points(path: Path, results: Sequence[TableRow], metric: Metric, notes: list[str]) -> list[TableRow]:
    """Rows of the curve: every K that has the metric, or what it can be computed from."""
    found = [_point(path, result, results, metric, notes) for result in results]
    points = [point for point in found if point["fve"] is not None]
    left_out = [str(point["k"]) for point in found if point["fve"] is None]
    if not points:
        raise DataError(f"no K of {path} has {metric}, or what it could be computed from")
    if left_out:
        notes.append(f"K = {', '.join(left_out)} left out: no {metric}, and not what it could be computed from")
    return points


def _point(path: Path, result: TableRow, results: Sequence[TableRow], metric: Metric, notes: list[str]) -> TableRow:
    """One row of the curve; `fve` is None where the file does not have the metric."""
    baseline = _variance_per_dimension(result)
    if baseline is None:  # the activations are the same for every K
        baseline = next((b for r in results if (b := _variance_per_dimension(r)) is not None), None)
    value, low, high = _shown(result, metric, baseline)
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


def _shown(result: TableRow, metric: Metric, baseline: float | None) -> tuple[float | None, float | None, float | None]:
    """The metric with its percentile interval, which the reference has for variance_recovery alone; 0.0 to 0.0 means none."""
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
    """Mean over dimensions of the activations' variance (ddof 1): what variance_recovery is measured against.

    From the error and mse_variance_recovery; else from the residual variance and variance_recovery, except where the mode that
    streams put the plain error under the name of the residual variance.
    """
    error, recovered = result.get("avg_mse"), result.get("mse_variance_recovery")
    if error is not None and recovered is not None and recovered < 1:
        return float(error / (1 - recovered))
    residual, recovery = result.get("residual_variance_mean_over_hidden"), result.get("variance_recovery")
    if residual is None or recovery is None or recovery >= 1 or _same(residual, error):
        return None
    return float(residual / (1 - recovery))


def _is_streamed(results: Sequence[TableRow]) -> bool:
    """Whether one set of draws served every K (the default mode): there the residual variance is the plain error."""
    return all(_same(r.get("residual_variance_mean_over_hidden"), r.get("avg_mse")) for r in results)


def _same(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6)


def _num_activations(path: Path, result: TableRow, notes: list[str]) -> int:
    if result.get("mse_values"):
        return len(result["mse_values"])
    if not result.get("total_positions"):
        raise DataError(f"K = {result['k']} of {path} has neither mse_values nor total_positions: how many vectors were there?")
    notes.append("N is total_positions, which on several GPUs counted those of one rank in the mode that samples for each K")
    return int(result["total_positions"])


def _quantities(result: TableRow) -> list[TableRow]:
    """Every quantity of an entry as rows of REFERENCE_SCHEMA."""
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
    for role, found in (result.get("mse_by_role") or {}).items():
        row = {"quantity": "avg_mse", "role": role, "k": result["k"], "value": found.get("avg_mse")}
        rows.append(row | {"num_activations": found.get("count"), "spread": found.get("std")})
    for role, found in (result.get("variance_recovery_by_role") or {}).items():
        names = ("variance_recovery", "total_variance", "residual_variance")
        common = {"role": role, "k": result["k"], "num_activations": found.get("count")}
        rows += [common | {"quantity": name, "value": found.get(name)} for name in names]
    return rows


def _record(
    path: Path,
    tree: TableRow,
    results: Sequence[TableRow],
    points: Sequence[TableRow],
    metric: Metric,
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
        baseline_kind=points[0]["baseline_kind"],
        baseline_num_activations=points[0]["num_activations"],
        token_stats=_role_counts(results, "token_stats"),
        selected_token_stats=_role_counts(results, "selected_token_stats"),
    )


def _role_counts(results: Sequence[TableRow], name: str) -> TableRow | None:
    """What the first entry says of tokens by role, if it counts them."""
    found = results[0].get(name)
    counts = found.get("counts") if isinstance(found, dict) else None
    whole = isinstance(counts, dict) and counts and all(isinstance(count, int) for count in counts.values())
    return found if whole else None


def _spec(path: Path, tree: TableRow, checkpoint: str | None, digest: str, metric: Metric, notes: tuple[str, ...]) -> TableRow:
    """What is known of the cell, under today's names; options that the reference accepted and did not read are left out."""
    given = {f"eval.{name}": value for name, value in (tree.get("eval_config") or {}).items()}
    read_by_it = {
        n: v for n, v in given.items() if (o := reference_options.BY_NAME.get(n)) and o.kind == "translated" and not o.warns
    }
    spec: TableRow = {"kind": "reference JSON", "metric": metric, "file": path.name, "sha256": digest, "notes": list(notes)}
    for name, value in read_by_it.items():
        try:
            settings = reference_options.BY_NAME[name].settings(value, given)
        except SpecError:  # a value that nothing can be made of is no reason to refuse the numbers
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
    """From the run's name: "..._L45_e45_..." was trained on layer 45."""
    found = re.search(r"_L(\d+)_", checkpoint or "")
    return int(found[1]) if found else None
