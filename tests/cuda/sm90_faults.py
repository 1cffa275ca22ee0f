"""How faults are planted in the kernels of sm_90a, and how each must be found.

The machine may need the right schedule: forty are tried. ``pytest -s`` prints how each was caught.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from on_machine import Fault, planted
from ptx.plant import Edit, drop
from torch import Tensor

SEEDS = range(40)
WAIT_FOR_BARRIER = (r"mbarrier\.try_wait", r"@over bra done", r"bra again")
"""The statements of a wait for a barrier."""


def no_wait(nth: int) -> list[Edit]:
    """Without a wait, and what it would have acquired. Which one it is goes by the order of the text."""
    return [drop(statement, nth) for statement in WAIT_FOR_BARRIER]


@dataclass(frozen=True)
class Planting:
    """Faults of the kernels whose symbol has ``kernel``.

    ``cases``: calls by name, which have a ``cluster``; ``faults``: the name of one of them and what is
    edited; ``bits_of``: a case's results of a schedule; ``hold``: the contract. Of ``quick`` faults one
    is planted in quick tests.
    """

    kernel: str
    cases: Mapping[str, Any]
    faults: Mapping[str, tuple[str, Edit | Sequence[Edit]]]
    bits_of: Callable[..., Tensor]
    hold: Callable[[Any], object]
    quick: int
    _right: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> list[Any]:
        """For pytest: the names of faults."""
        return [
            pytest.param(name, marks=[] if i % self.quick == 0 else pytest.mark.slow)
            for i, name in enumerate(self.faults)
        ]

    def right(self, which: str) -> Tensor:
        """The bits of every schedule."""
        if which not in self._right:
            self._right[which] = self.bits_of(self.cases[which])
        return self._right[which]

    def found(self, which: str, seed: int, **options: Any) -> Tensor:
        """Those of one, with one to three clusters at a time."""
        case = self.cases[which]
        return self.bits_of(case, seed=seed, resident=case.cluster * (1 + seed % 3), **options)

    def catch(self, fault: str) -> None:
        """A schedule must end in a fault of the machine's, or with other bits."""
        which, edit = self.faults[fault]
        edit = planted(self.kernel, *((edit,) if callable(edit) else edit))
        expected = self.right(which)
        for seed in SEEDS:
            try:
                found = self.found(which, seed, edit=edit)
            except Fault as caught:
                how = str(caught)
            else:
                if found.equal(expected):
                    continue
                how = "other bits"
            print(f"{fault}: seed {seed}: {how}")
            return
        pytest.fail("no schedule shows it")

    def check_without_faults(self, which: str) -> None:
        """A case holds, and has one result in every schedule."""
        self.hold(self.cases[which])
        for seed in SEEDS[::8]:
            assert self.found(which, seed).equal(self.right(which))
