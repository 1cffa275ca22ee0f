"""``SaveAdapter``: a callback of Transformers' ``Trainer``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorafast.convert import save_adapter


class SaveAdapter(TrainerCallback):
    """Saves the adapter into every checkpoint of a ``Trainer``, as ``save_adapter`` does.

    ``Trainer(model, args, callbacks=[SaveAdapter()])`` writes it, and
    ``load_adapter(base, "out/checkpoint-500")`` reads it.
    The checkpoint keeps the whole model, which ``resume_from_checkpoint`` needs. A Transformers model
    that isn't sharded has its adapter there without this too. Not for a hyperparameter search.

    Args:
        modules_to_save: as for ``save_adapter``.
    """

    def __init__(self, modules_to_save: Sequence[str] = ()) -> None:
        self.modules_to_save = modules_to_save

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses a hyperparameter search, whose trials have folders that a callback isn't told of."""
        if state.is_hyper_param_search:
            raise ValueError(
                "SaveAdapter can't tell the folders of a hyperparameter search's trials: leave it out "
                "there, and save the adapter of the best trial with save_adapter"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer calls this on every rank after a checkpoint is written."""
        model: nn.Module = kwargs["model"]
        sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        if sharded or state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_adapter(model, folder, self.modules_to_save)
