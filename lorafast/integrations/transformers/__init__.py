"""Transformers' ``Trainer``: PEFT's layers made fast, adapters at every checkpoint.

Importing this imports Transformers.
"""

from lorafast.integrations.transformers.accelerate import Accelerate
from lorafast.integrations.transformers.callback import SaveAdapter

__all__ = ["Accelerate", "SaveAdapter"]
