"""How long an operation should take on a GPU, from bytes, arithmetic and launches: a model, no record.

    time = max(arithmetic / (rate · share), bytes / (bandwidth · share)) + launches · cost

with the share of the device's rate that an implementation is taken to reach. The shares of ``aten``
and ``triton`` are assumptions until a GPU has measured them: a Triton product reached 84 to 97 % of the
vendor's where one was published, so 92 % is taken. ``lorafast tune`` replaces the model by
measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass

LAUNCH_SECONDS = 3e-6
"""From the end of one short kernel to the start of the next."""
PRODUCT_SHARE = {"aten": 1.0, "triton": 0.92}
THIN_SHARE = {"aten": 0.6, "triton": 0.85}
_FLOAT32_RATE = 1 / 16
"""Of 16-bit products: float32 is multiplied without tensor cores, as PyTorch does by default."""
_FLOAT32_SHARE = {"aten": 0.8, "triton": 0.3}
_ALONGSIDE_SHARE = 0.3
"""The part of a helper's pass that costs time: helpers hold some of the multiprocessors meanwhile."""
_MASK_BYTES = {"aten": 225.0, "triton": 2.5}
"""What making a mask costs per element, in bytes moved in that time. ``aten`` composes Philox of integer
operations, whose traffic is counted; in a kernel it is about 100 instructions for eight elements."""

# (rate of 16-bit products in FLOP/s, bandwidth in byte/s) of a multiprocessor: what large products and
# copies reach on the data-centre chip of the architecture, an H200 (measured) for sm_90.
_PER_PROCESSOR = {
    80: (2.3e12, 1.6e10), 86: (1.3e12, 0.9e10), 89: (1.7e12, 0.6e10),
    90: (6.0e12, 3.2e10), 100: (1.1e13, 4.5e10), 120: (2.0e12, 0.9e10),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """16-bit products in FLOP/s, memory in byte/s: what is reached, not the data sheet's."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, capability: int, processors: int) -> "Device":
        """A device of this compute capability with so many multiprocessors."""
        known = max((sm for sm in _PER_PROCESSOR if sm <= capability), default=80)
        flops, bandwidth = _PER_PROCESSOR[known]
        return cls(flops * processors, bandwidth * processors)


@dataclass(frozen=True)
class Problem:
    """A layer as one operation sees it; sizes of elements in bytes.

    ``partials``: bytes that Triton's reduction moves beside its operands; ``widened``: whether the
    low-rank term is float32 beside a smaller x, of which ``aten`` then makes a float32 copy.
    """

    M: int
    K: int
    N: int
    r: int
    size: int
    adapter_size: int
    masked: bool
    partials: float = 0.0
    widened: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds, and what they are made of."""

    seconds: float
    flops: float
    bytes: float
    launches: int

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
        )

    def __str__(self) -> str:
        return (
            f"{self.seconds * 1e6:,.0f} µs = {self.flops / 1e9:,.3g} GFLOP, "
            f"{self.bytes / 1e6:,.3g} MB, {_count(self.launches)}"
        )


def _count(launches: int) -> str:
    return f"{launches} launch" if launches == 1 else f"{launches} launches"


def estimate(operation: str, backend: str, p: Problem, device: Device) -> Estimate:
    """What ``operation`` costs on ``backend``, ``aten`` or ``triton``.

    ``operation`` is one of the four, or ``lora_linear`` or ``lora_linear_backward`` with helpers.
    """
    thin = _thin(backend, p, device)
    x, y = float(p.M * p.K * p.size), float(p.M * p.N * p.size)
    copied = backend == "aten" and p.widened
    if operation in ("shrink", "shrink_backward"):
        more, launches = (4 * x, 2) if copied else (0.0, 1)
        return thin(x, _mask(backend, p, p.K), launches, more=more)
    if operation == "expand_backward":
        if copied:
            return thin(2 * y, 0.0, 3, more=5 * y)
        if backend == "aten":
            return thin(2 * y, 0.0, 2)
        return thin(y, 0.0, 2, arithmetic=2.0, more=p.partials)
    if operation == "linear_expand":
        product = _product(backend, p, device)
        if copied:
            # The term in float32, the product added to it, both rounded: ten passes' bytes.
            return thin(y, _mask(backend, p, p.N), 3, more=9 * y) + product
        if backend == "aten":
            # Expand first; reading that back hides behind the product.
            return thin(y, _mask(backend, p, p.N), 1) + product
        return product + Estimate(_mask(backend, p, p.N) / device.bandwidth, 0.0, 0.0, 0)
    if operation == "lora_linear":
        return _with_helpers(_product(backend, p, device), thin(x, 0.0, 0))
    assert operation == "lora_linear_backward", operation
    dx = _product(backend, _transposed(p), device)
    mask = Estimate(_mask(backend, p, p.K) / device.bandwidth, 0.0, 0.0, 0)
    if p.masked:
        return _with_helpers(dx, thin(y, 0.0, 0)) + mask + thin(x, _mask(backend, p, p.K), 1)
    return _with_helpers(dx, thin(x + y, 0.0, 0))


def _with_helpers(product: Estimate, thin: Estimate) -> Estimate:
    return product + Estimate(thin.seconds * _ALONGSIDE_SHARE, thin.flops, thin.bytes, 0)


def _thin(backend: str, p: Problem, device: Device) -> Callable[..., Estimate]:
    """The estimate of a pass over so many bytes of x or dy, each used ``arithmetic`` times."""

    def pass_over(
        moved: float, mask: float, launches: int, arithmetic: float = 1.0, more: float = 0.0
    ) -> Estimate:
        flops = 2.0 * p.r * moved / p.size * arithmetic
        moved += more
        memory = moved / (device.bandwidth * THIN_SHARE[backend])
        multiply = flops / _rate(backend, p, device, THIN_SHARE[backend])
        seconds = max(memory, multiply) + mask / device.bandwidth + launches * LAUNCH_SECONDS
        return Estimate(seconds, flops, moved, launches)

    return pass_over


def _mask(backend: str, p: Problem, columns: int) -> float:
    return p.M * columns * _MASK_BYTES[backend] if p.masked else 0.0


def _product(backend: str, p: Problem, device: Device) -> Estimate:
    flops = 2.0 * p.M * p.K * p.N
    rate = _rate(backend, p, device, PRODUCT_SHARE[backend])
    moved = float((p.M * p.K + p.K * p.N + p.M * p.N) * p.size)
    seconds = max(flops / rate, moved / device.bandwidth) + LAUNCH_SECONDS
    return Estimate(seconds, flops, moved, 1)


def _transposed(p: Problem) -> Problem:
    return Problem(p.M, p.N, p.K, p.r, p.size, p.adapter_size, p.masked)


def _rate(backend: str, p: Problem, device: Device, share: float) -> float:
    """FLOP/s; ``share`` is that of 16-bit products."""
    if p.size == 2:
        return device.flops * share
    return device.flops * _FLOAT32_RATE * _FLOAT32_SHARE[backend]
