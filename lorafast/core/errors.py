"""Errors that several rooms raise."""


class BackendError(RuntimeError):
    """A backend was forced that can't serve the call; the message says why."""
