"""Two launches at once: the machine runs one after the other, so both become one launch.

    both = SideBySide(arch=80, seed=3, resident=4)
    with both:
        one = op(...)
        other = op(...)

CTAs of the two, or whole clusters, take turns in one grid: those with an odd number along x are the
second's. The kernel is what nvcc made of it, its parameters are found by its number, and ``%ctaid.x``
and ``%nctaid.x`` are its own launch's. Both launches must be of one kernel and one grid.
"""

import ctypes
import functools
import re
from typing import Any

from launchers import FAKE_STREAM, Launch, launchers
from on_machine import COUNTERS, Run, _given, _Known, _Mode, _program, _without_overlaps
from ptx.launch import In, InOut, Machine, Out


class SideBySide(Run):
    """A block whose two launches run when it ends."""

    def __init__(self, arch: int, seed: int = 0, resident: int = 4, sms: int = 132) -> None:
        super().__init__(Machine(seed=seed, resident=resident), arch, None, FAKE_STREAM)
        self._sms = sms
        self._given: list[_Known] = []
        self._asked: list[tuple[str, tuple[Any, ...], bytes]] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Keeps an operation's tensors, which may be gone when it has returned."""
        self._raised = None
        self._given += _given(func, args, kwargs)
        done = func(*args, **kwargs)
        if self._raised is not None:
            raise self._raised
        return done

    def _execute(self, of: Any, launch: Launch) -> None:
        symbol = launch.kernel.decode()
        (parameter,) = _program(of.ptx_of(symbol, self.arch), symbol).layout.params
        packed = ctypes.string_at(launch.arguments[0], parameter.size)
        how = (tuple(launch.grid), tuple(launch.block), launch.shared, launch.cluster[0])
        self._asked.append((symbol, how, packed))

    def __enter__(self) -> "SideBySide":
        of = launchers()
        of.device(self.arch, self._sms, FAKE_STREAM)
        of.to(functools.partial(self.execute, of))
        self._mode = _Mode(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)
        launchers().reset()
        if raised[0] is None:
            self._together()

    def _together(self) -> None:
        (symbol, how, first), (other, how_other, second) = self._asked
        assert (symbol, how) == (other, how_other), "the two are of different kernels or grids"
        (x, y, z), block, shared, cluster = how
        for at in _without_overlaps(self._given):
            cleared = at.name.startswith(COUNTERS)
            kind = (InOut if cleared else Out) if at.written else In
            self.machine.region(kind(at.name, at.tensor))
            self._unwritten += [at] * (kind is Out)
        program = _program(
            in_one(launchers().ptx_of(symbol, self.arch), symbol, max(cluster, 1)), symbol
        )
        size = program.layout.params_size // 2
        packed = first.ljust(size, b"\0") + second.ljust(size, b"\0")
        asked = (cluster, 1, 1) if cluster else None
        self.machine.start(program, (2 * x, y, z), block, packed, cluster=asked, shared=shared)
        self.check_written()


def in_one(ptx: str, symbol: str, cluster: int = 1) -> str:
    """The kernel with two structs of parameters and two launches' CTAs, turn by turn along x, or
    clusters of so many."""
    head, start, body = ptx.partition(f".entry {symbol}(")
    name = f"{symbol}_param_0"
    declared = re.search(rf"\.param \.align (\d+) \.b8 {re.escape(name)}\[(\d+)\]", body)
    align, size = map(int, declared.groups())
    size = -(-size // align) * align
    signature, brace, code = body.partition("{")
    signature = signature.replace(declared[0], f".param .align {align} .b8 {name}[{2 * size}]")
    for was, now in ((name, "%both_param"), ("%ctaid.x", "%both_x"), ("%nctaid.x", "%both_n")):
        code = re.sub(rf"(?<![\w%]){re.escape(was)}(?!\w)", now, code)
    found = (
        ".reg .b64 %both_param, %both_at; .reg .b32 %both_x, %both_n, %both_which, %both_at32; "
        "mov.u32 %both_at32, %ctaid.x; "
        f"div.u32 %both_x, %both_at32, {cluster}; and.b32 %both_which, %both_x, 1; "
        f"shr.u32 %both_x, %both_x, 1; rem.u32 %both_at32, %both_at32, {cluster}; "
        f"mad.lo.u32 %both_x, %both_x, {cluster}, %both_at32; "
        "mov.u32 %both_n, %nctaid.x; shr.u32 %both_n, %both_n, 1; "
        f"mov.b64 %both_at, {name}; mul.wide.u32 %both_param, %both_which, {size}; "
        "add.s64 %both_param, %both_param, %both_at;"
    )
    return head + start + signature + brace + found + code
