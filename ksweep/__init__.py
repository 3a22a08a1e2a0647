"""ksweep measures how much of a language model's activations is recovered from explanations, and how that grows with best-of-K.

Sweep, Cell                                a question and its cells, one point of a sweep
Autoencoder, Activations, Sampling, Scoring, Resources    the parts of a spec; PromptingOverrides is a part of Autoencoder
sweep_main                                 run a sweep from its file
run, plan, results                         the same from Python: run a sweep, see what would be run, results of before (Results)
connect                                    an up-to-date DuckDB connection to a registry
RequestError, RunError                     a mistake in the request, a failure while running
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ksweep.config.resources import Resources
from ksweep.config.spec import Activations, Autoencoder, Cell, PromptingOverrides, Sampling, Scoring, replace_at
from ksweep.config.sweep import Sweep
from ksweep.utils import moved
from ksweep.utils.errors import RequestError, RunError
from ksweep.utils.version import VERSION

if TYPE_CHECKING:
    from ksweep.analysis.results import Results
    from ksweep.analysis.results import results_of_sweep as results
    from ksweep.launch.run_sweep import plan_sweep as plan
    from ksweep.launch.run_sweep import run_sweep as run
    from ksweep.launch.sweep_main import sweep_main
    from ksweep.registry.database import connect

__version__ = VERSION
__all__ = [
    "Activations",
    "Autoencoder",
    "Cell",
    "PromptingOverrides",
    "RequestError",
    "Resources",
    "Results",
    "RunError",
    "Sampling",
    "Scoring",
    "Sweep",
    "connect",
    "plan",
    "replace_at",
    "results",
    "run",
    "sweep_main",
]

_LATER = {
    "connect": "ksweep.registry.database:connect",
    "Results": "ksweep.analysis.results:Results",
    "plan": "ksweep.launch.run_sweep:plan_sweep",
    "results": "ksweep.analysis.results:results_of_sweep",
    "run": "ksweep.launch.run_sweep:run_sweep",
    "sweep_main": "ksweep.launch.sweep_main:sweep_main",
}
moved.keep_earlier_names()


def __getattr__(name: str) -> Any:
    """Import DuckDB, submitit and other heavy packages when first used: `import ksweep` stays light."""
    if name in _LATER:
        from importlib import import_module

        module, _, attribute = _LATER[name].partition(":")
        return getattr(import_module(module), attribute)
    if (earlier := f"ksweep.{name}") in moved.MOVED:
        from importlib import import_module

        return import_module(earlier)
    raise AttributeError(f"module 'ksweep' has no attribute {name!r}")
