"""`ksweep show`: one run in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import JsonOption, OutputRow, RegistryOption, print_json, print_section, print_text, table_curve
from ksweep.utils.console import bytes_text

SHOWN_RUN_COLUMNS = (
    "run_id", "status", "cell", "sweep", "started", "finished", "host", "device", "num_ranks", "git_commit", "git_dirty",
    "num_activations", "num_documents", "effective_documents", "layer", "d_model", "num_draws", "num_draws_sampled",
    "num_draws_reused", "num_draws_scored", "draws_bytes", "scores_bytes", "tokens_per_second", "mean_tokens", "baseline",
    "baseline_kind", "baseline_from_mean", "fve_over_successes", "distinct_text_fraction", "cjk_fraction", "cell_key",
    "draws_key", "scores_key", "activations_key",
)  # fmt: skip
SHOWN_CURVE_COLUMNS = (
    "k", "fve", "fve_low", "fve_high", "shuffled_fve", "error", "cosine", "failure_rate", "fve_over_successes",
)  # fmt: skip
SHOWN_GROUP_COLUMNS = (
    "breakdown", "part", "against", "k", "fve", "fve_low", "fve_high", "baseline", "error", "median_error", "worst_share",
    "failure_rate", "num_activations", "num_documents", "effective_documents",
)  # fmt: skip


def show_command(
    run: Annotated[
        str, typer.Argument(help="Run, cell, label, or sweep of one cell; the beginning of a run id or key is enough.")
    ],
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """Show one run: spec, curve, controls, failures, groups, and its best, median and worst explanations."""
    from ksweep.registry.run_details import run_details

    details = run_details(registry, run)
    if as_json:
        print_json(details)
        return
    _print_run(details["run"], details["spec"])
    scoring = details["spec"].get("scoring") or {}
    about = {name: scoring.get(name) for name in ("level", "num_replicates")}
    curve = [{name: row[name] for name in SHOWN_CURVE_COLUMNS} for row in table_curve(details["curve"])]
    print_section("curve: best of K draws, oracle selection by the AR", curve, about)
    print_section("controls", details["controls"])
    print_section("failed draws by cause", _failure_rates(details["run"]))
    groups = [{name: row[name] for name in SHOWN_GROUP_COLUMNS} for row in details["groups"]]
    print_section(
        "groups at the largest K, against the baseline of all activations (overall) and of the group (own)", groups, about
    )
    _print_examples(details["examples"])


def _print_run(run: OutputRow, spec: OutputRow) -> None:
    from ksweep.analysis.diff import flatten

    # Blank names: a pair of a name and its value needs no heading.
    print_section("run", [{"": name, " ": _brief(name, run[name])} for name in SHOWN_RUN_COLUMNS if run[name] not in (None, [])])
    print_section("notes", run["notes"] or [])
    print_section("from the model hub", [{"": spelling} for spelling in run["revisions"] or []])
    print_section("engine", [{"": name, " ": value} for name, value in (run["engine"] or {}).items()])
    print_section("spec", [{"": name, " ": value} for name, value in flatten(spec) if value is not None])
    if run["error_type"]:
        print_text(f"{run['error_type']}: {run['error_message']}")
        for traceback in run["tracebacks"]:
            print_text(traceback)


def _brief(name: str, value: object) -> object:
    return bytes_text(value) if name.endswith("_bytes") and isinstance(value, int) else value


def _failure_rates(run: OutputRow) -> list[OutputRow]:
    total = (run["num_activations"] or 0) * (run["num_draws"] or 0)
    failures = run["failures"] or {}
    return [{"cause": cause, "draws": count, "rate": count / total} for cause, count in failures.items() if total]


def _print_examples(examples: Sequence[OutputRow]) -> None:
    for rank in ("best", "median", "worst"):
        of_rank = [row for row in examples if row["rank"] == rank]
        if of_rank:
            print_text(f"\nexplanations: {rank} {len(of_rank)} activations, the best draw of each")
        for row in of_rank:
            print_text(f"{rank} {row['number']}: {_score(row)}; activation {row['activation']}, draw {row['draw']}")
            print_text(f"    text ({row['document']}, token {row['position']}): {_one_line(row['context'])}")
            unparsed = f"({row['parse']}) {_one_line(row['text'])}"
            print_text(f"    explanation: {unparsed if row['explanation'] is None else _one_line(row['explanation'])}")


def _score(row: OutputRow) -> str:
    return "no draw succeeded" if row["error"] is None else f"error {row['error']:.4f}, cosine {row['cosine']:.4f}"


def _one_line(text: str | None) -> str:
    return "" if text is None else " ".join(text.split())
