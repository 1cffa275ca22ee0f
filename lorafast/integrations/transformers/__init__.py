"""Transformers: adapters at every checkpoint of its ``Trainer``. Importing this imports Transformers."""

from lorafast.integrations.transformers.callback import SaveAdapter

__all__ = ["SaveAdapter"]
