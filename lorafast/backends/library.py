"""A device's compiled kernels, a shared object each: ``lorafast/_C_<device>.abi3.so``."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch


class Library:
    """One shared object: whether it is here, and loading it once.

    ``operations``: the names that ``torch.ops.lorafast_<device>`` must have once it is loaded. ``start``
    is called with the path then, and raises ``OSError`` if the kernels can't run here. ``path`` may be
    changed before the first call.
    """

    def __init__(
        self,
        device: str,
        operations: tuple[str, ...],
        start: Callable[[Path], object] = lambda path: None,
    ) -> None:
        self.device = device
        self.operations = operations
        self.path = Path(__file__).resolve().parents[1] / f"_C_{device}.abi3.so"
        self.why_not_loaded: Callable[[], str | None] = functools.cache(self._load)
        """Loads it, once. The reason if that fails, or None."""
        self._start = start

    def _load(self) -> str | None:
        kernels = f"the native {self.device.upper()} kernels"
        if not self.path.is_file():
            return (
                f"{kernels} are not built (installing lorafast builds them where their compiler and "
                "PyTorch are already: pip install --no-deps --force-reinstall . in its checkout)"
            )
        try:
            torch.ops.load_library(self.path)
        except OSError as error:
            return f"{kernels} can't be loaded: {error.__cause__ or error}"
        namespace = getattr(torch.ops, f"lorafast_{self.device}")
        if not all(hasattr(namespace, name) for name in self.operations):
            return f"{kernels} are those of another version of lorafast: install it again"
        try:
            self._start(self.path)
        except OSError as error:
            return f"{kernels} can't run: {error}"
        return None
