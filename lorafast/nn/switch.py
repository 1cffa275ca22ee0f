"""``Switch``: a module that computes without its adapter for the time of a block of ``disabled``, or for
a part of the batch in one of ``mixed``."""

from typing import Any

from lorafast.nn.rows import Rows

_OF_BLOCKS = ("_off", "_off_blocks", "_rows")


class Switch:
    """A base of adapter modules, beside ``nn.Module``. Its forward asks ``_off`` and ``_rows``.

    A copy or a pickle is on, for all rows. A replica of ``nn.DataParallel`` is as its layer is.
    """

    _off = False
    """Whether it computes without its adapter."""
    _off_blocks = 0
    """The blocks that it is off in."""
    _rows: Rows | None = None
    """Which elements of a batch have which adapter, in a block of ``mixed``."""

    def switch(self, blocks: int) -> None:
        """One block more (1) that it is off in, or one fewer (-1)."""
        self._off_blocks += blocks
        self._off = self._off_blocks > 0
        if not self._off:
            del self._off, self._off_blocks

    def mix(self, rows: Rows | None) -> None:
        """In a block of ``mixed``, or None: outside."""
        if rows is not None:
            vars(self)["_rows"] = rows  # nn.Module.__setattr__ would be the larger part of a block
        else:
            vars(self).pop("_rows", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        on = {name: value for name, value in state.items() if name not in _OF_BLOCKS}
        super().__setstate__(on)  # type: ignore[misc]
