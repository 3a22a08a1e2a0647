"""Charts of results: from a DuckDB connection or an Arrow table to an Altair chart. The only package that imports altair.

    with ksweep.connect("registry") as connection:
        colours = charts.palette(label for (label,) in connection.execute("select label from v_latest").fetchall())
        charts.save(charts.fve_by_k(connection, sweep="temp_sweep", colours=colours), "fve_by_k")

A chart queries a connection for what it shows (`sweep` narrows it down); tables, relations and lists of dicts need the columns
of the view that the chart names. Labels keep the order in which they first appear; a label has the same colour in
every chart that is given the same `colours`. The colours of Okabe and Ito are distinguishable with colour blindness; a
scale runs from dark to light where only temperature or step differ. Everything is aggregated before it reaches the chart: a
distribution over ten million draws is a few hundred rows in the browser.
"""

from ksweep.analysis.charts.choosing import chosen
from ksweep.analysis.charts.curves import compare, fve_by_k, fve_by_step, fve_by_temperature
from ksweep.analysis.charts.distributions import by_group, error_distribution, norm_distribution
from ksweep.analysis.charts.runs import progress, throughput
from ksweep.analysis.charts.style import FVE, GREY, OKABE_ITO, ORDERED, WIDTH, K, palette, save

__all__ = [
    "FVE",
    "GREY",
    "K",
    "OKABE_ITO",
    "ORDERED",
    "WIDTH",
    "by_group",
    "chosen",
    "compare",
    "error_distribution",
    "fve_by_k",
    "fve_by_step",
    "fve_by_temperature",
    "norm_distribution",
    "palette",
    "progress",
    "save",
    "throughput",
]
