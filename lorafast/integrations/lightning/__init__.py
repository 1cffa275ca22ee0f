"""Lightning: PEFT's layers made fast in its ``Trainer``. Importing this imports Lightning."""

from lorafast.integrations.lightning.accelerate import Accelerate

__all__ = ["Accelerate"]
