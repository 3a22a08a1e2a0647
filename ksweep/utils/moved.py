"""Module names of earlier versions: those in README and notebooks of users, and those that queued jobs still ask for."""

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
"""Name in an earlier version -> name now. Modules inside a package move with it."""


class _Alias(InspectLoader):
    """Loads a module under an earlier name: the very module, not a copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # the import system has just replaced it by that of the earlier name

    def get_code(self, fullname: str) -> CodeType:
        """Return what `python -m` with the earlier name runs."""
        return compile(f"import runpy; runpy.run_module({self.name!r}, run_name='__main__', alter_sys=True)", fullname, "exec")

    def get_source(self, fullname: str) -> None:
        return None


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        for earlier, now in MOVED.items():
            if fullname == earlier or fullname.startswith(f"{earlier}."):
                name = now + fullname.removeprefix(earlier)
                return ModuleSpec(fullname, _Alias(name), origin=name)
        return None


def keep_earlier_names() -> None:
    """Let the import system find modules under their earlier names as well. Nothing is imported until it is asked for."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First, or the path of a moved package would give its modules a second time.
        sys.meta_path.insert(0, _Finder())
