"""Runs every operation on every backend that this machine has and compares with float64.

A row passes if it keeps the package's one numerical contract (``lorafast/reference/contract.py``). The
exit status is 1 if a row fails. What a backend refuses is said once, with its reason. What reads the
frozen weight is run over quantized ones too, which the reference takes as they are made dense.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lorafast
from lorafast import operands, ops
from lorafast.backends import forced, registry
from lorafast.cli import terminal
from lorafast.cli.options import default_device, device
from lorafast.core.dtypes import wide
from lorafast.core.errors import BackendError
from lorafast.core.problem import ACTIVATIONS, WEIGHT_NORM
from lorafast.ops.problems import why_not
from lorafast.reference import contract

_SHAPES = ((1, 1, 1, 1), (5, 33, 17, 3), (70, 200, 130, 16), (129, 96, 257, 40))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FORMATS = (operands.DENSE, "nf4", "int8", "fp8")
_READ_WEIGHT = ("lora_linear", "lora_linear_backward", "linear_expand", "dx", WEIGHT_NORM)
_LETTERS = "M, K, N, r"
_NAMES = {"dx": "linear_expand"}
"""The operations of rows that bear another name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument(
        "--device", default=default_device(), help="where to run (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), nargs="+", default=list(_DTYPES), help="default: all"
    )


@dataclass(frozen=True)
class _Row:
    backend: str
    operation: str
    dtype: str
    format: str
    shape: tuple[int, ...]
    dropout_p: float
    verdict: contract.Verdict


def run(arguments: argparse.Namespace) -> int:
    """Prints the table."""
    try:
        of = device(arguments.device)
    except ValueError as error:
        terminal.complain("lorafast verify", error)
        return 2
    for name in registry.names():
        registry.get(name).allow_checks(of)
    rows: list[_Row] = []
    sample = torch.empty((1, 1), device=of)
    for name in lorafast.backends():
        reason = why_not(name, sample)
        if reason is not None:
            print(f"{name}: not run, {reason}")
            continue
        remark = registry.get(name).remark()
        if remark is not None:
            print(f"{name}: {remark}")
        refused: dict[str, str] = {}
        rows += list(_verify(name, arguments.dtype, of, refused))
        for operation, reason in refused.items():
            print(f"{name}: {operation} not run everywhere, {reason}")
    _print_table(rows)
    failed = sum(row.verdict.why_broken is not None for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _verify(
    backend: str, dtypes: list[str], of: torch.device, refused: dict[str, str]
) -> Iterator[_Row]:
    """A row for each call that the backend serves; its first reason against each operation."""
    cases = itertools.product(dtypes, _FORMATS, _SHAPES, (0.0, 0.25))
    for dtype, format, shape, dropout_p in cases:
        for operation, call in _calls(shape, dropout_p, _DTYPES[dtype], of, format).items():
            if _NAMES.get(operation, operation) not in registry.get(backend).operations:
                continue
            try:
                with forced.use_backend(backend):
                    sizes = call.sizes if isinstance(call, _OfBottlenecks) else None
                    verdict = contract.compare(call, ops, _DTYPES[dtype], sizes=sizes)
            except BackendError as error:
                _, _, reason = str(error).partition(": ")
                refused.setdefault(_label(operation, format), reason)
                continue
            yield _Row(backend, operation, dtype, format, shape, dropout_p, verdict)


def _label(operation: str, format: str) -> str:
    return operation if format == operands.DENSE else f"{operation} {format}"


def _calls(
    shape: tuple[int, ...], dropout_p: float, dtype: torch.dtype, of: torch.device, format: str
) -> dict[str, contract.Call]:
    """Each operation as a call on the tensors of one layer, in float64; s and ds are what products of
    ``dtype`` leave. Over a weight that isn't dense those that read it."""
    (M, K, N, r), low = shape, wide(dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of)

    seed = torch.tensor([1234567890123456789], device=of) if dropout_p else None
    x, dy, s, ds = draw(M, K), draw(M, N), draw(M, r), draw(M, r)
    weight, lora_A, lora_B, bias = draw(N, K), draw(r, K), draw(N, r), draw(N)
    kind: Any = operands.kind_of(format)
    quantized = None if kind is None else kind.of(weight.to(dtype))

    def frozen(run: Any, cast: Callable[..., Tensor]) -> Any:
        """W for what is verified, and as the same numbers for what it is compared with."""
        if quantized is None:
            return cast(weight)
        return quantized if run is ops else cast(quantized.dense())

    def layer(run: Any, cast: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        y: Tensor = run.lora_linear(
            leaves[0],
            frozen(run, cast),
            *leaves[1:],
            0.7,
            cast(bias),
            dropout_p=dropout_p,
            seed=seed,
        )
        return y

    def gradients(run: Any, cast: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [cast(t).detach().requires_grad_() for t in (x, lora_A, lora_B)]
        return torch.autograd.grad(layer(run, cast, *leaves), leaves, cast(dy))

    calls: dict[str, contract.Call] = {
        "lora_linear": lambda run, cast: layer(run, cast, cast(x), cast(lora_A), cast(lora_B)),
        "lora_linear_backward": gradients,
        "shrink": lambda run, cast: run.shrink(cast(x), cast(lora_A), dropout_p, seed),
        "expand": lambda run, cast: run.expand(
            cast(s, low), cast(lora_B), 0.7, dropout_p, seed, dtype=cast(dy).dtype
        ),
        "dx": lambda run, cast: run.linear_expand(
            cast(dy),
            frozen(run, cast),
            cast(ds, low),
            cast(lora_A).t(),
            1.0,
            None,
            dropout_p,
            seed,
            transposed=True,
        ),
        "shrink_backward": lambda run, cast: run.shrink_backward(
            cast(ds, low), cast(x), dropout_p, seed
        ),
    }
    if not dropout_p and M > 1:
        calls |= _grouped_calls(shape, draw, of)
    if not dropout_p:
        calls |= _bottleneck_calls(shape, draw) | _scaled_calls(shape, draw)
        calls["linear_expand"] = lambda run, cast: run.linear_expand(
            cast(x), frozen(run, cast), cast(s, low), cast(lora_B), 0.7, cast(bias)
        )
        calls["expand_backward"] = lambda run, cast: run.expand_backward(
            cast(dy), cast(s, low), cast(lora_B), 0.7
        )
        calls[WEIGHT_NORM] = lambda run, cast: run.weight_norm(
            frozen(run, cast), cast(lora_A), cast(lora_B), 0.7
        )
    if quantized is not None:
        return {name: call for name, call in calls.items() if name in _READ_WEIGHT}
    return calls


class _OfBottlenecks:
    """A call of a bottleneck adapter, r wide, with each function, and of one beside a layer."""

    def __init__(
        self, shape: tuple[int, ...], draw: Callable[..., Tensor], differentiated: bool
    ) -> None:
        M, K, N, b = shape
        self.h, self.onto, self.differentiated = draw(M, K), draw(M, N), differentiated
        self.down, self.down_bias = (
            draw(b, K) * K**-0.5,
            draw(b),
        )  # in the range of f where it bends
        own, beside = (draw(K, b), draw(K)), (draw(N, b), draw(N))
        self.kinds: list[Any] = [(f, *own, None) for f in ACTIVATIONS]
        self.kinds.append(("gelu", *beside, self.onto))

    def __call__(
        self, run: Any, cast: Callable[..., Tensor], of_squares: bool = False
    ) -> tuple[Tensor, ...]:
        """The output, or each gradient, of all kinds as one: of the few elements of one kind's PyTorch's
        own error is luck, and no yardstick."""
        found: list[tuple[Tensor, ...]] = []
        for f, up, up_bias, residual in self.kinds:
            leaves = (self.h, self.down, up, self.down_bias, up_bias)
            given = [cast(t).detach().requires_grad_() for t in leaves]
            onto = None if residual is None else cast(residual)
            scaling, f = (0.7**2, "relu") if of_squares else (0.7, f)
            y = run.bottleneck(*given, scaling, f, onto)
            if self.differentiated:
                dy = self.h if residual is None else self.onto
                found.append(torch.autograd.grad(y, given, cast(dy)))
            else:
                found.append((y.detach(),))
        return tuple(
            torch.cat([t.flatten() for t in of_kinds]) for of_kinds in zip(*found, strict=True)
        )

    def sizes(self, run: Any, cast: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The same on squares, with a function that changes nothing of them and isn't much less steep
        anywhere than any: relu."""
        return self(run, cast, of_squares=True)


def _bottleneck_calls(
    shape: tuple[int, ...], draw: Callable[..., Tensor]
) -> dict[str, contract.Call]:
    """Those of a bottleneck adapter, r wide."""
    return {
        "bottleneck": _OfBottlenecks(shape, draw, differentiated=False),
        "bottleneck_backward": _OfBottlenecks(shape, draw, differentiated=True),
    }


def _scaled_calls(shape: tuple[int, ...], draw: Callable[..., Tensor]) -> dict[str, contract.Call]:
    """Those of a frozen layer with a vector, on y and on x."""
    M, K, N, _ = shape
    x, dy, weight, bias, scales = draw(M, K), draw(M, N), draw(N, K), draw(N), (draw(N), draw(K))

    def layer(run: Any, cast: Callable[..., Tensor], scales_input: bool) -> tuple[Tensor, ...]:
        leaves = [cast(t).detach().requires_grad_() for t in (x, scales[scales_input])]
        rest = (cast(bias), scales_input)
        y: Tensor = run.scaled_linear(leaves[0], cast(weight), leaves[1], *rest)
        return y, *leaves

    def outputs(run: Any, cast: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return tuple(layer(run, cast, scales_input)[0].detach() for scales_input in (False, True))

    def gradients(run: Any, cast: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for scales_input in (False, True):
            y, *leaves = layer(run, cast, scales_input)
            found += torch.autograd.grad(y, leaves, cast(dy))
        return tuple(found)

    return {"scaled_linear": outputs, "scaled_linear_backward": gradients}


def _grouped_calls(
    shape: tuple[int, ...], draw: Callable[..., Tensor], of: torch.device
) -> dict[str, contract.Call]:
    """Those of the layer with several adapters, of which the device alone knows who has which."""
    (M, K, N, r), n = shape, 3
    x, dy, weight, bias = draw(M, K), draw(M, N), draw(N, K), draw(N)
    lora_A, lora_B, scaling = draw(n, r, K), draw(n, N, r), draw(n)
    adapter_of = torch.arange(M, device=of) % (n + 1) - 1

    def layer(run: Any, cast: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        rest = (cast(scaling), adapter_of, cast(bias))
        y: Tensor = run.grouped_lora_linear(leaves[0], cast(weight), *leaves[1:], *rest)
        return y

    def gradients(run: Any, cast: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [cast(t).detach().requires_grad_() for t in (x, lora_A, lora_B)]
        return torch.autograd.grad(layer(run, cast, *leaves), leaves, cast(dy))

    return {
        "grouped_lora_linear": lambda run, cast: layer(
            run, cast, cast(x), cast(lora_A), cast(lora_B)
        ),
        "grouped_lora_linear_backward": gradients,
    }


def _print_table(rows: list[_Row]) -> None:
    print(f"\n{'backend':<10} {'operation':<28} {'dtype':<5} {'worst at ' + _LETTERS:<30} "
          f"{'error':>9} {'allowed':>9}")  # fmt: skip
    worst: dict[tuple[str, str, str], _Row] = {}
    for row in rows:
        key = (row.backend, _label(row.operation, row.format), row.dtype)
        if key not in worst or row.verdict.severity > worst[key].verdict.severity:
            worst[key] = row
    for row in worst.values():
        place = f"{row.shape}" + (f" p={row.dropout_p}" if row.dropout_p else "")
        found = row.verdict
        failed = "" if found.why_broken is None else f"FAILED: {found.why_broken}"
        print(f"{row.backend:<10} {_label(row.operation, row.format):<28} {row.dtype:<5} {place:<30} "
              f"{found.error:>9.1e} {found.allowed:>9.1e} {failed}")  # fmt: skip
