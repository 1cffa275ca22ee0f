"""The backends: what they answer, the registry that chooses, a folder for each."""
