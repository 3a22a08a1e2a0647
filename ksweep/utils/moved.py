"""Module names of earlier versions: those that README and notebooks gave, and those that jobs in a queue will ask for."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {
    # Typed by users: experiments, notebooks, `python -m`.
    "ksweep.charts": "ksweep.analysis.charts",
    "ksweep.compare": "ksweep.analysis.compare",
    "ksweep.legacy": "ksweep.config.reference_options",
    "ksweep.presets": "ksweep.config.presets",
    # In job.json and batch scripts of jobs that an earlier version submitted and Slurm may start again.
    "ksweep.evaluate": "ksweep.evaluation.evaluate",
    "ksweep.launch.start": "ksweep.launch.worker.start",
}
"""Name of an earlier version -> the module it stands for."""


class _Alias(InspectLoader):
    """Loads a module under a name of an earlier version: the module itself, not a copy."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # the import system has just set that of the earlier name

    def get_code(self, fullname: str) -> CodeType:
        """What `python -m` with the earlier name runs."""
        return compile(
            f"import runpy; runpy.run_module({MOVED[fullname]!r}, run_name='__main__', alter_sys=True)", fullname, "exec"
        )

    def get_source(self, fullname: str) -> None:
        return None


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Alias(), origin=MOVED[fullname]) if fullname in MOVED else None


def keep_earlier_names() -> None:
    """Let the import system find modules under the names of `MOVED` as well; they are imported when first asked for."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
