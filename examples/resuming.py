"""A training run that is stopped goes on where it was: its state in a file, replaced as a whole."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

_UNREADABLE = (
    OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, pickle.UnpicklingError,
)  # fmt: skip


class Trained(Protocol):
    """An arm of a comparison: a model of which some parameters are trained, and what was measured."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]
    seconds: list[float]


class State:
    """Trained parameters, optimizers, curves and the random numbers' state of all arms.

    `options` are those that the run depends on: a file of others is not gone on with.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path = path
        self._options = {name: str(value) for name, value in options.items()}

    def save(self, step: int, arms: Sequence[Trained]) -> None:
        """Keep what `step` steps have made."""
        content = {
            "options": self._options,
            "step": step,
            "random": torch.get_rng_state(),
            "arms": [
                {
                    "parameters": {n: p.detach() for n, p in _trained(arm).items()},
                    "optimizer": arm.optimizer.state_dict(),
                    "losses": arm.losses,
                    "seconds": arm.seconds,
                }
                for arm in arms
            ],
        }
        scratch = self.path.with_suffix(".part")
        torch.save(content, scratch)
        os.replace(scratch, self.path)

    def load(self, arms: Sequence[Trained]) -> int:
        """Put the arms where a stopped run of these options left them; return how many steps it did."""
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content["options"] != self._options:
                return 0
            step, random, kept = content["step"], content["random"], content["arms"]
        except FileNotFoundError:
            return 0
        except _UNREADABLE:
            print(f"{self.path} can't be read as the state of a run: it starts anew.")
            return 0
        for arm, of_arm in zip(arms, kept, strict=True):
            for name, parameter in _trained(arm).items():
                parameter.data.copy_(of_arm["parameters"][name])
            arm.optimizer.load_state_dict(of_arm["optimizer"])
            arm.losses[:], arm.seconds[:] = of_arm["losses"], of_arm["seconds"]
        torch.set_rng_state(random)
        return int(step)

    def remove(self) -> None:
        """The run is done."""
        self.path.unlink(missing_ok=True)


def _trained(arm: Trained) -> dict[str, nn.Parameter]:
    return {name: p for name, p in arm.model.named_parameters() if p.requires_grad}
