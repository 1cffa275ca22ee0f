"""What the measurements share: shapes, contenders, clocks, memory, records, tables, plots."""
