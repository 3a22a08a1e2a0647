"""`import ksweep` and planning stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "submitit", "duckdb", "altair", "pyarrow", "datasets", "huggingface_hub", "scipy")


def _loaded_after(code: str) -> tuple[set[str], float]:
    script = f"import sys, time; t = time.process_time(); {code}; print(time.process_time() - t); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name.partition(".")[0] for name in out[1].split()}, float(out[0])


def test_import_ksweep_loads_nothing_heavy() -> None:
    loaded, _ = _loaded_after("import ksweep")
    assert not loaded & set(HEAVY)


@pytest.mark.slow
def test_import_ksweep_takes_less_than_a_third_of_a_second() -> None:
    # Of processor time, 0.02 s where this was written, and the best of five: what else the machine does hardly counts.
    assert min(_loaded_after("import ksweep")[1] for _ in range(5)) < 0.3


@pytest.mark.slow
def test_planning_does_not_load_torch() -> None:
    loaded, _ = _loaded_after(
        "import ksweep.launch.sweep_main, ksweep.evaluation.identity, ksweep.config.presets, "
        "ksweep.registry.draws, ksweep.registry.database"
    )
    assert not loaded & {"torch", "transformers", "peft", "altair"}


def test_statistics_need_numpy_alone_and_for_quantiles_those_of_scipy() -> None:
    loaded, _ = _loaded_after("import ksweep.stats")
    assert "numpy" in loaded and not loaded & set(HEAVY)
    asked = "from ksweep.stats.bootstrap import interval_reach; interval_reach(20, 0.95)"
    loaded, _ = _loaded_after(f"{asked}; assert 'scipy.stats' not in sys.modules")
    assert {"numpy", "scipy"} <= loaded and not loaded & (set(HEAVY) - {"scipy"})
