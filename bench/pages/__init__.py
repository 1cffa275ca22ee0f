"""What a page says of a recorded run: of what was timed, of what was counted."""
