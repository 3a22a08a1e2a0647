"""What a person looks at: comparisons, tables, charts, the report."""
