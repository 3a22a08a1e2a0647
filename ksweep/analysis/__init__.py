"""Results for readers: comparisons, tables, charts, the report."""
