"""`ksweep ...`: ask the registry from the shell. Sweeps themselves are run as `python experiments/NAME.py`.

A module for each subject; what a command needs is imported when it runs, so that --help and a mistyped word answer at once.
"""

from __future__ import annotations

import sys

from ksweep.cli import cache_commands, job_commands, registry_commands, registry_queries  # noqa: F401
from ksweep.cli.app import app
from ksweep.cli.app import cache as cache_group
from ksweep.cli.app import db as db_group
from ksweep.utils.errors import RequestError, RunError, StoreError

__all__ = ["app", "cache", "jobs", "main", "registry"]

registry_queries.register(app)
app.add_typer(db_group, name="db")
app.add_typer(cache_group, name="cache")


def main() -> None:
    """Entry point of the `ksweep` command; exit code 2 for a mistake in the request, 1 for a failure."""
    try:
        app()
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RunError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
