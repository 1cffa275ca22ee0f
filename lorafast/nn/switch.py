"""``Switch``: a module that computes without its adapter as long as a block of ``disabled`` lasts."""

from typing import Any


class Switch:
    """A base of adapter modules, beside ``nn.Module``. Its forward asks ``_off``.

    A copy or a pickle is on. A replica of ``nn.DataParallel`` is as its layer is.
    """

    _off = False
    """Whether it computes without its adapter."""
    _off_blocks = 0
    """The blocks that it is off in."""

    def switch(self, blocks: int) -> None:
        """One block more (1) that it is off in, or one fewer (-1)."""
        self._off_blocks += blocks
        self._off = self._off_blocks > 0
        if not self._off:
            del self._off, self._off_blocks

    def __setstate__(self, state: dict[str, Any]) -> None:
        on = {name: value for name, value in state.items() if name not in ("_off", "_off_blocks")}
        super().__setstate__(on)  # type: ignore[misc]
