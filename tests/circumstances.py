"""What may change between two runs of the same call, and must change no bit of the result."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

Change = Callable[[], AbstractContextManager[None]]
Changes = Mapping[str, Change]
Outputs = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


@contextmanager
def fresh_memory_holds_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def freed_memory_holds_large_numbers() -> Iterator[None]:
    """What the allocators have to give held 1e30, and lies elsewhere than before."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    freed = [torch.full((2**n,), 1e30, device=d) for d in devices for n in range(4, 20)]
    kept = [torch.full((2**n,), 1e30, device=d) for d in devices for n in range(4, 20, 3)]
    del freed
    yield
    del kept


@contextmanager
def beside_other_work() -> Iterator[None]:
    """A thread multiplies all the while; on a GPU, three streams are full of products."""
    done = threading.Event()

    def work() -> None:
        x = torch.ones(64, 64)
        while not done.is_set():
            x @ x

    if torch.cuda.is_available():
        x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        for stream in [torch.cuda.Stream() for _ in range(3)]:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    x @ x
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def programs_start_in_another_order(order: str) -> Iterator[None]:
    """In Triton's interpreter, which runs one program to its end after another.

    ``order``: "backwards", or the seed of a shuffle.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    begin = InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, ...], list[int]] = {}

    def elsewhere(self, x, y, z):
        nx, ny, nz = grid = tuple(self.grid_dim)
        if grid not in orders:
            orders[grid] = list(range(nx * ny * nz))[::-1]
            if order != "backwards":
                random.Random(order).shuffle(orders[grid])
        x, rest = divmod(orders[grid][(x * ny + y) * nz + z], ny * nz)
        begin(self, x, *divmod(rest, nz))

    InterpreterBuilder.set_grid_idx = elsewhere
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = begin


MEMORY = {
    "fresh memory holds NaN": fresh_memory_holds_nan,
    "freed memory holds large numbers": freed_memory_holds_large_numbers,
}
WORK = {"beside other work": beside_other_work}
# On a GPU the order is the device's, and other work changes it.
ORDER = (
    {}
    if torch.cuda.is_available()
    else {
        f"programs start {order}": lambda order=order: programs_start_in_another_order(order)
        for order in ("backwards", "shuffled")
    }
)


def together(one: Changes, other: Changes) -> Changes:
    """Each change with one of the other kind, so that few runs see all of them."""

    def both(first: Change, second: Change) -> Change:
        @contextmanager
        def within() -> Iterator[None]:
            with first(), second():
                yield

        return within

    pairs = zip(one, itertools.islice(itertools.cycle(other), len(one)), strict=True)
    assert len(one) >= len(other)
    return {f"{a}, {b}": both(one[a], other[b]) for a, b in pairs}


THREADS = {f"on {count} threads": lambda count=count: on_threads(count) for count in (1, 2, 3, 4)}


def _named(outputs: Outputs) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"the output": outputs}
    if isinstance(outputs, dict):
        return outputs
    return {f"output {i}": output for i, output in enumerate(outputs)}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def why_not_the_same_bits(run: Callable[[], Outputs], changes: Changes) -> str | None:
    """Runs once as it is, then under each change: which output of which run differs, or None."""
    expected = _named(run())
    for name, output in expected.items():
        # NaN equal to NaN would hide that nothing was written.
        assert output.isfinite().all(), f"{name} is not finite"
        assert output.numel(), f"{name} is empty"
    for change, within in changes.items():
        with within():
            found = _named(run())
        assert found.keys() == expected.keys(), change
        for name, output in expected.items():
            if not torch.equal(_bits(found[name]), _bits(output)):
                return f"{name} has other bits: {change}"
    return None


def assert_same_bits(run: Callable[[], Outputs], *changes: Changes) -> None:
    merged = {name: within for some in changes for name, within in some.items()}
    assert merged
    reason = why_not_the_same_bits(run, merged)
    assert reason is None, reason
