"""How a frozen weight is stored: one file a format."""
