"""The `ksweep` command, which queries past runs and manages jobs. Sweeps themselves are run as `python experiments/NAME.py`.

Every command has a module here, those about jobs share `jobs/commands.py`; `app.py` lists them all. What a command needs is
imported when it runs, so that --help and a mistyped word answer at once.
"""

from __future__ import annotations

from ksweep.cli.app import app
from ksweep.utils.command_exit import exit_code_of

__all__ = ["app", "main"]


def main() -> None:
    """Run the `ksweep` command. The exit code is 2 for a mistake in the request and 1 for a failure."""
    raise SystemExit(exit_code_of(app))
