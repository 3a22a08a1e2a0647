"""`ksweep report SWEEP`: one HTML file that opens offline and says what was asked, what came out and how it was measured."""

from ksweep.analysis.report.page import write_report

__all__ = ["write_report"]
