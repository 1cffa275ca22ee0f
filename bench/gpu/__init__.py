"""``make gpu``: everything that needs an NVIDIA GPU, in one command of under nine minutes."""
