"""What parallel runs send."""
