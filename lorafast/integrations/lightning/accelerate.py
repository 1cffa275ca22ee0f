"""``Accelerate``: a callback of Lightning's ``Trainer``."""

import sys
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from lorafast.integrations.drop_in import accelerate


class Accelerate(Callback):
    """Makes the LoRA layers of PEFT in a ``LightningModule`` fast, as ``accelerate`` does.

    ``lightning.Trainer(callbacks=[Accelerate()])``. It is done before a strategy wraps the module, or,
    where ``configure_model`` makes the PEFT model, before the first step. Layers that ``adapt`` made
    need no callback.

    Args:
        quiet: doesn't print how many layers are fast; the first process alone does.

    Raises:
        ValueError: the module has none of PEFT's adapter layers; raised before the first step.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._module: nn.Module | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Lightning calls this before ``configure_model`` and its strategy."""
        self._module = None
        peft = sys.modules.get("peft.tuners.tuners_utils")
        if peft and any(isinstance(module, peft.BaseTunerLayer) for module in pl_module.modules()):
            self._accelerate(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Lightning calls this after ``configure_model`` and its strategy."""
        self._accelerate(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """As ``on_fit_start``, where nothing is trained before."""
        self._accelerate(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """As ``on_fit_start``."""
        self._accelerate(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """As ``on_fit_start``."""
        self._accelerate(trainer, pl_module)

    def _accelerate(self, trainer: Any, module: nn.Module) -> None:
        if module is not self._module:
            accelerate(module, quiet=self.quiet or not trainer.is_global_zero)
            self._module = module
