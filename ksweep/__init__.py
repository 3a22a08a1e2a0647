"""ksweep: how much of a language model's activations comes back through words, and how that grows with the best of K draws.

Sweep, Cell                                a question, one point of it
Autoencoder, Activations, Sampling, Scoring, Resources    the parts of a spec
sweep_main                                 run a sweep from its file
connect                                    an up-to-date DuckDB connection to a registry
RequestError, RunError                     what went wrong, and whose move it is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ksweep.errors import RequestError, RunError
from ksweep.spec import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, replace_at

if TYPE_CHECKING:
    from ksweep.registry.database import connect
    from ksweep.sweep import sweep_main

__version__ = "0.1.0"
__all__ = [
    "Activations",
    "Autoencoder",
    "Cell",
    "RequestError",
    "Resources",
    "RunError",
    "Sampling",
    "Scoring",
    "Sweep",
    "connect",
    "replace_at",
    "sweep_main",
]

_LATER = {"connect": "ksweep.registry.database", "sweep_main": "ksweep.sweep"}


def __getattr__(name: str) -> Any:
    """DuckDB, submitit and their like are imported when first asked for: `import ksweep` stays light."""
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'ksweep' has no attribute {name!r}")
