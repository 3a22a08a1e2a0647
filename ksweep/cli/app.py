"""The command and its groups, to which the modules beside this one add theirs."""

from __future__ import annotations

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Best-of-K sweeps of natural-language autoencoders: ask past runs."
)
db = typer.Typer(no_args_is_help=True, help="The DuckDB file, an index over the landing files.")
cache = typer.Typer(no_args_is_help=True, help="The vector cache: what is there, whether it is whole, what may go.")
