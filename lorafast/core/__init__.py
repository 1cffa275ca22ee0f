"""What every room speaks of: a call, described; the dtypes of its terms; what surrounds it; errors."""
