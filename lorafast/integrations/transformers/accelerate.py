"""``Accelerate``: a callback of Transformers' ``Trainer``, and of trainers over it, as TRL's."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from lorafast.integrations.drop_in import accelerate


class Accelerate(TrainerCallback):
    """Makes the LoRA layers of the PEFT model that a ``Trainer`` trains fast, as ``accelerate`` does.

    ``SFTTrainer(model, args, peft_config=LoraConfig(...), callbacks=[Accelerate()])``: of TRL's trainers
    too, which make the PEFT model themselves. It is done when the trainer is made, before anything wraps
    the model, and again where training begins, for the model that ``model_init`` has made since then.
    ``lorafast.restore(trainer.model)`` undoes it. A model that ``adapt`` made needs no callback.

    Args:
        quiet: doesn't print how many layers are fast; the first process alone does.

    Raises:
        ValueError: the model has none of PEFT's adapter layers; raised where the trainer is made.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._model: nn.Module | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer calls this when it is made, before it wraps the model."""
        self._accelerate(kwargs["model"], state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer calls this on every rank, with the model that it hasn't run yet."""
        self._accelerate(kwargs["model"], state)

    def _accelerate(self, model: nn.Module, state: Any) -> None:
        said = model is self._model
        accelerate(model, quiet=self.quiet or said or not state.is_world_process_zero)
        self._model = model
