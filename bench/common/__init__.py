"""What the measurements share: shapes, contenders, the check, clocks, memory, records, tables."""
