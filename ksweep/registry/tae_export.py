"""Write the results of a run as a JSON file in the schema of the reference sweep.

    export_run(registry, run_id)              -> a dict in the schema of the reference sweep

The file explains keys whose names mislead, and lists the keys that are unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksweep.registry.cell_draws import stored_draws
from ksweep.registry.query import TableRow
from ksweep.registry.run_record import LandedRun, RunRecord, read_run
from ksweep.stats import Selection, best_errors
from ksweep.utils.errors import RequestError
from ksweep.utils.files import publish

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
"""Keys of the reference's schema whose names mislead -> what they hold; written into every exported file."""


def export_run(registry: Path | str, run_id: str) -> TableRow:
    """Return the JSON of a run, with the best error of every activation where its draws exist.

    Raises:
        RequestError: there is no such run, or it did not finish.
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
    """Return a finished run in the reference's schema with all its keys; an unknown value is null or an empty list.

    Args:
        run: record and curve.
        reference: rows of REFERENCE_SCHEMA; without them (NLA pairs) errors are those of the curve, over scaled vectors.
        mse_values: K -> smallest mean squared error of each activation.
        activation_norms: norm of each activation.
        token_stats: counts and proportions by role over all tokens.
        selected_token_stats: counts and proportions by role over the evaluated positions.

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
        # The reference infers a model_type from the tokenizer; here roles come from the chat format, whichever model it is of.
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
    """Write one file, all of it or nothing; without line breaks in lists, which make the reference's files ten times as long."""
    publish(path, json.dumps(document, allow_nan=False).encode())


def _result(point: TableRow, quantities: dict[str, TableRow] | None, record: RunRecord) -> TableRow:
    """Return the 24 scalar keys of one K."""
    rows = quantities or {}
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
    """Return mse_variance_recovery (variances with ddof 1) computed from the distance of the activations from their mean.

    None where this distance is unknown: for imported runs, and runs of earlier versions with a stated baseline.
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
    for (role, row_k), rows in quantities.items():
        if role is None or row_k != k:
            continue
        mse, count = rows["avg_mse"], rows["avg_mse"]["num_activations"]
        errors[role] = {"avg_mse": mse["value"], "count": count, "std": mse.get("spread")}
        if "variance_recovery" in rows:
            names = ("variance_recovery", "total_variance", "residual_variance")
            recovery[role] = {name: rows[name]["value"] for name in names} | {"count": count}
    return ({"mse_by_role": errors} if errors else {}) | ({"variance_recovery_by_role": recovery} if recovery else {})


def _summary(results: Sequence[TableRow]) -> TableRow:
    """Return the values of all K as lists, in the order of results_by_k (the reference keeps the requested order instead)."""
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
    """Return the settings under the option names of the reference."""
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
    """Return the number of rows of text, each with num_positions; None where the activations end in the middle of a row."""
    num_activations, per_row = activations.get("num_activations"), activations.get("positions_per_document") or 1
    if num_activations is None or num_activations % per_row:
        return None
    return int(num_activations // per_row)


def _checkpoint_of(spec: Mapping[str, Any]) -> str | None:
    autoencoder = spec.get("autoencoder") or {}
    return autoencoder.get("checkpoint") or autoencoder.get("av")


def _about(run: LandedRun, results: Sequence[TableRow], of_reference: bool) -> TableRow:
    """Return what the reference's schema lacks: provenance, misleading names, unknown keys."""
    assert run.curve is not None
    record, scoring = run.record, run.record.spec.get("scoring") or {}
    unknown = sorted({name for r in results for name, value in r.items() if value is None or value == []})
    scaled = not of_reference and record.scoring_kind == "normalised"
    missing = {"avg_mse": "of vectors scaled to norm sqrt(d): 2 (1 - cosine); not a raw error"} if scaled else {}
    return {
        "run_id": record.run_id,
        "cell": record.cell,
        "spec": record.spec,
        # The reference's quantities use the first K draws by definition; the curve below uses the selection of the spec.
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
    """Return K -> best-of-K error of each activation, with the selection of avg_mse; empty where the draws are gone."""
    record = run.record
    if run.curve is None or not (record.draws_key and record.num_activations and record.num_draws):
        return {}
    store = stored_draws(registry, record.draws_key, record.scores_key)
    draws = store.read(record.num_activations, record.num_draws, ["error"])
    if draws is None:
        return {}
    errors = draws["error"].to_numpy().reshape(record.num_activations, record.num_draws)
    scoring = record.spec.get("scoring") or {}
    selection: Selection = "prefix" if run.reference is not None else scoring.get("selection", "order_statistics")
    failed = scoring.get("failed_error")
    ks = run.curve["k"].to_pylist()
    best = best_errors(errors, ks, selection, 2.0 if failed is None else failed)
    return {k: [float(x) for x in best[:, i]] for i, k in enumerate(ks)}


def _plain(value: Any) -> Any:
    """Return JSON values: NumPy scalars become numbers, NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
