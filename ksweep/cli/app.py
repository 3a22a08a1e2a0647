"""All commands and groups of commands, in the order of `ksweep --help`."""

from __future__ import annotations

import typer

from ksweep.cli.cache import cache_group
from ksweep.cli.choose import choose_command
from ksweep.cli.db import db_group
from ksweep.cli.diff import diff_command
from ksweep.cli.doctor import doctor_command
from ksweep.cli.jobs import commands as jobs
from ksweep.cli.plot import plot_command
from ksweep.cli.reference_json import export_command, import_json_command
from ksweep.cli.report import report_command
from ksweep.cli.score import PASSED_ON, score_command
from ksweep.cli.scores import scores_group
from ksweep.cli.show import show_command
from ksweep.cli.sql import sql_command
from ksweep.cli.verify import verify_command

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Best-of-K sweeps of natural-language autoencoders: query past runs."
)
app.command("ls")(jobs.ls_command)
app.command("watch")(jobs.watch_command)
app.command("logs")(jobs.logs_command)
app.command("why")(jobs.why_command)
app.command("cancel")(jobs.cancel_command)
app.command("finalize")(jobs.finalize_command)
app.command("retry")(jobs.retry_command)
app.command("score", context_settings=PASSED_ON)(score_command)
app.command("import-json")(import_json_command)
app.command("plot")(plot_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.command("sql")(sql_command)
app.command("show")(show_command)
app.command("diff")(diff_command)
app.command("choose")(choose_command)
app.command("verify")(verify_command)
app.command("doctor")(doctor_command)
app.add_typer(db_group, name="db")
app.add_typer(scores_group, name="scores")
app.add_typer(cache_group, name="cache")
