"""Every native kernel on shapes that nothing divides, held against the float64 reference.

    LORAFAST_CPU=avx2 PYTHONPATH=.:tests python tests/native/exercise.py [path of the library] [sets]

Run by the tests once for each instruction set, and under the sanitizers on a library of its own: there
with each of the sets, in children of one process that has imported PyTorch.
"""

import itertools
import os
import sys

import torch

if len(sys.argv) > 2:
    for name in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            os.environ["LORAFAST_CPU"] = name  # read when the library is loaded
            break
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(os.waitstatus_to_exitcode(status))
    else:
        sys.exit()

from circumstances import on_threads
from helpers import covering
from layouts import lay_out

from lorafast import functional, operands, reference
from lorafast.backends import convolution
from lorafast.backends.cpu import conv_shrink, native
from lorafast.backends.forced import use_backend
from lorafast.core.convolution import Geometry, convolve
from lorafast.core.problem import ACTIVATIONS
from lorafast.reference import contract

if len(sys.argv) > 1:
    from pathlib import Path

    native.LIBRARY.path = Path(sys.argv[1])

from lorafast.backends.cpu import dequantize
from lorafast.ops.problems import on_backend

cpu = on_backend("cpu")
SHAPES = (
    (0, 5, 7, 3),
    (5, 0, 7, 3),
    (5, 7, 0, 3),
    (5, 7, 6, 0),
    (1, 1, 1, 1),
    (5, 33, 17, 3),
    (70, 200, 130, 16),
    (33, 520, 1030, 17),
    (131, 1056, 48, 40),
    (67, 66, 100, 5),  # a base GEMM by panels, of pairs and rows that fill no vector
    (530, 544, 560, 18),  # several chunks of rows and stripes of columns
)

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")

# batch, C, size, r, kernel, stride, padding, dilation
IMAGES = (
    (2, 6, (5, 7), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 5, (4, 9), 8, (2, 3), (2, 3), (0, 2), (1, 1)),
    (1, 16, (1, 1), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 48, (9, 8), 5, (3, 2), (2, 1), (2, 3), (2, 3)),
    (2, 80, (7, 7), 17, (3, 3), (1, 2), (1, 1), (1, 1)),
    (3, 144, (13, 11), 8, (1, 1), (2, 2), (0, 0), (1, 1)),
    (5, 32, (17, 13), 20, (3, 3), (1, 1), (4, 4), (1, 1)),  # windows that see nothing of x
)

# M, K, N, b
BOTTLENECKS = (
    (0, 5, 5, 3),
    (5, 33, 33, 7),
    (70, 200, 130, 16),
    (131, 1056, 48, 40),
    (530, 544, 544, 18),
)


def calls_of(M, K, N, r, dtype, layout, p, seed):
    """Each operation on tensors of its own; ``layout`` is that of the large ones."""
    low = reference.wide(dtype)
    x, dy, s, ds = (torch.randn(M, n) for n in (K, N, r, r))
    W, A, B, b = (torch.randn(*n) for n in ((N, K), (r, K), (N, r), (N,)))

    def lay(tensor):
        return lay_out(tensor, layout)

    return {
        "shrink": lambda run, cast: run.shrink(lay(cast(x)), cast(A), p, seed),
        "linear_expand": lambda run, cast: run.linear_expand(
            cast(x), cast(W), lay(cast(s, low)), cast(B), 0.7, cast(b)
        ),
        "dx": lambda run, cast: run.linear_expand(
            cast(dy), cast(W).t(), cast(ds, low), cast(A).t(), 1.0, None, p, seed
        ),
        "expand_backward": lambda run, cast: run.expand_backward(
            lay(cast(dy)), cast(s, low), cast(B), 0.7
        ),
        "shrink_backward": lambda run, cast: run.shrink_backward(
            cast(ds, low), lay(cast(x)), p, seed
        ),
    }


def why_together_differ(M, K, N, r, dtype, layout, p, seed):
    """A sentence if the skinny products of a layer in one call, which threads share out otherwise, don't
    have the bits of a call each."""
    ops, low = torch.ops.lorafast_cpu, reference.wide(dtype)
    mask = (seed, round(p * 65536), 1.5) if p else (None, 0, 1.0)
    x, dy = (lay_out(torch.randn(M, n).to(dtype), layout) for n in (K, N))
    A, B = torch.randn(r, K).to(dtype), torch.randn(N, r).to(dtype)
    y, dx = torch.randn(M, N).to(dtype), torch.randn(M, K).to(dtype)

    def outputs():
        s, ds = (torch.empty(M, r, dtype=low) for _ in "sd")
        return y.clone(), s, dx.clone(), ds, torch.empty_like(A), torch.empty_like(B)

    expected, found = outputs(), outputs()
    Y, s, dX, ds, dA, dB = expected
    ops.shrink(x, A, *mask, s)
    ops.expand_(Y, s, B, 0.7, None, 0, 1.0)
    ops.expand_backward(dy, s, B, 0.7, ds, dB)
    ops.shrink_backward(ds, x, *mask, dA)
    ops.expand_(dX, ds, A.t(), 1.0, *mask)
    Y, s, dX, ds, dA, dB = found
    ops.lora_linear_(Y, x, A, B, 0.7, *mask, s)
    ops.lora_linear_backward_(dX, dy, x, A, B, s, 0.7, *mask, ds, dA, dB)
    for name, one, other in zip(("y", "s", "dx", "ds", "dA", "dB"), expected, found, strict=True):
        if not torch.equal(one, other):
            return f"{name} of a layer's products in one call has other bits than by itself"
    own = slice(M // 3, M - M // 4)
    return why_some_rows_differ(x, dy, A, B, own, mask)


def why_some_rows_differ(x, dy, A, B, own, mask):
    """A sentence if the skinny products of a layer whose adapter is on some rows don't have the bits
    that they have of these rows by themselves."""
    ops, low, W = (
        torch.ops.lorafast_cpu,
        reference.wide(x.dtype),
        torch.randn(dy.shape[1], x.shape[1]),
    )
    x_own, dy_own, W = x[own], dy[own], W.to(x.dtype)
    s, ds = (torch.empty(x_own.shape[0], A.shape[0], dtype=low) for _ in "sd")
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    ops.shrink(x_own, A, *mask, s)
    ops.expand_backward(dy_own, s, B, 0.7, ds, dB)
    ops.shrink_backward(ds, x_own, *mask, dA)
    y, found = ops.lora_linear_on_rows(x, W, None, A, B, 0.7, *mask, own.start, own.stop)
    dx, *gradients = ops.lora_linear_backward_on_rows(dy, x_own, W, A, B, s, 0.7, *mask, own.start)
    if y.shape != dy.shape or dx.shape != x.shape:
        return "y or dx of a layer with its adapter on some rows has not all rows"
    for name, one, other in zip(("s", "dA", "dB"), (s, dA, dB), (found, *gradients), strict=True):
        if not torch.equal(one, other):
            return f"{name} of a layer with its adapter on some rows has other bits than of these alone"
    return None


def weights(dtype):
    """Quantized, of sizes that nothing divides; mxfp4's exponents reach to NaN."""
    for N, K in ((5, 33), (37, 100), (64, 512), (3, 1030)):
        W = torch.randn(N, K).to(dtype)
        for kind in (operands.NF4, operands.FP4):
            for block in (7, 64, 256):
                yield from (kind.of(W, block, nested=nested) for nested in (False, True))
        yield from (kind.of(W) for kind in (operands.Int8, operands.FP8))
        every = torch.randint(0, 256, (N, K), dtype=torch.uint8)
        scale = torch.rand(-(-N // 2), -(-K // 48))
        yield operands.FP8({"weight": every, "scale": scale}, dtype, (2, 48))
        # Of the rows some have no -128, and one a scale whose products are denormals.
        rows = {"weight": every.view(torch.int8), "scale": torch.randn(N, 1)}
        rows["weight"][::2].clamp_(min=-127)
        rows["scale"][-1] = 1e-40
        yield operands.Int8(rows, dtype)
        yield operands.FP8({"weight": every.clone(), "scale": torch.randn(N, 1)}, dtype)
        exponents = torch.randint(0, 256, (N, -(-K // 32)), dtype=torch.uint8)
        codes = torch.randint(0, 256, (N, 16 * exponents.shape[1]), dtype=torch.uint8)
        yield operands.MXFP4(codes, exponents, dtype)


def why_dequantized_wrongly(weight):
    """A sentence if a part of a weight isn't to the bit as its format says."""
    N, K = weight.shape
    for rows, columns in (((0, N), (0, K)), ((N // 3, N), (1, K - 2)), ((1, N - 1), (K // 2, K))):
        size = (rows[1] - rows[0]) * (columns[1] - columns[0])
        found = dequantize.part(weight, rows, columns, torch.empty(size, dtype=weight.dtype))
        expected = weight.rows(*rows)[:, slice(*columns)]
        if not torch.equal(found.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0)):
            return f"rows {rows} and columns {columns} of {weight} ({weight.parameters}) are wrong"
    return None


def multiplied(N, K, dtype):
    """Quantized weights of a size: blocks that rows straddle and whole ones, a NaN among the scales."""
    W = torch.randn(N, K).to(dtype)
    yield from (
        operands.NF4.of(W, block, nested=nested) for block, nested in ((7, False), (64, True))
    )
    yield operands.FP4.of(W, 256, nested=False)
    yield from (kind.of(W) for kind in (operands.Int8, operands.FP8))
    every = torch.randint(0, 256, (N, K), dtype=torch.uint8)
    yield operands.FP8({"weight": every, "scale": torch.rand(1, -(-K // 48))}, dtype, (N, 48))
    exponents = torch.randint(120, 134, (N, -(-K // 32)), dtype=torch.uint8)
    exponents[-1, -1] = 255
    codes = torch.randint(0, 256, (N, 16 * exponents.shape[1]), dtype=torch.uint8)
    yield operands.MXFP4(codes, exponents, dtype)


def why_multiplied_wrongly(weight, M, layout):
    """A sentence if products straight from the codes break the contract, for y or for dx. Several of few
    elements, whose error is luck, are held to it together."""
    dense = weight.dense()
    for transposed in (False, True):
        W = dense.t() if transposed else dense
        several = min(-(-256 // (M * min(W.shape))), 32)
        drawn = torch.randn(several, M, W.shape[1]).to(dense.dtype)
        xs = [lay_out(x, layout) for x in drawn]
        bias = None if transposed else torch.randn(W.shape[0]).to(dense.dtype)
        found = torch.stack([dequantize.of_few_rows(x, weight, bias, transposed) for x in xs])

        def product(change, xs=xs, W=W, bias=bias):
            b = None if bias is None else change(bias)
            return torch.stack([torch.nn.functional.linear(change(x), change(W), b) for x in xs])

        ref64, squares64 = product(torch.Tensor.double), product(lambda t: t.double().square())
        bound = contract.bound(product(torch.Tensor.clone), ref64, squares64.sqrt())
        reason = bound.verdict(found).why_broken
        if reason is not None:
            name = "dx" if transposed else "y"
            return f"{name} of {M} rows, {layout}, of {weight} ({weight.parameters}) is {reason}"
    return None


def why_layer_multiplied_wrongly(weight, M, layout, r):
    """The same of a layer's forward in one call, for y and s, or if two threads give other bits."""
    dense, (N, K) = weight.dense(), weight.shape
    several = min(-(-256 // (M * min(N, r))), 32)
    drawn = torch.randn(several, M, K).to(dense.dtype)
    xs = [lay_out(x, layout) for x in drawn]
    A, B, bias = torch.randn(r, K), torch.randn(N, r), torch.randn(N).to(dense.dtype)
    found = []
    for threads in (1, 2):
        with on_threads(threads):
            layer, stored = dequantize.layer_of(weight), operands.stored(weight)
            made = [layer(x, stored, A, B, 0.7, bias) for x in xs]
            found.append(
                {n: torch.stack(t) for n, t in zip("ys", zip(*made, strict=True), strict=True)}
            )
    if not all(torch.equal(*(each[name].nan_to_num() for each in found)) for name in "ys"):
        return f"a layer of {M} rows has other bits with two threads than with one"

    def outputs(change, scaling=0.7):
        of_A, of_B, W, b = (change(t) for t in (A, B, dense, bias))
        ys = [reference.lora_linear(change(x), W, of_A, of_B, scaling, b) for x in xs]
        return {
            "y": torch.stack(ys),
            "s": torch.stack([reference.shrink(change(x), of_A) for x in xs]),
        }

    squares = outputs(lambda t: t.double().square(), 0.7**2)
    bounds = contract.bounds(
        outputs(torch.Tensor.clone), outputs(torch.Tensor.double),
        {name: t.sqrt() for name, t in squares.items()},
    )  # fmt: skip
    reason = contract.why_any_broken(found[0], bounds)
    return reason and f"a layer of {M} rows, {layout}, r={r}, of {weight}: {reason}"


def why_convolved_wrongly(batch, C, size, r, kernel, *numbers):
    """A sentence if ``conv(x, A)`` or its gradient in A breaks the contract, or has other bits with two
    threads than with one."""
    geometry = Geometry(*numbers, 1)
    x = torch.randn(batch, *size, C).movedim(-1, 1)
    A = torch.randn(r, C, *kernel)

    def right(cast):
        return convolve(cast(x), cast(A), None, geometry)

    def gradient(cast):
        return convolution.gradients(cast(ds), cast(x), cast(A), geometry, (False, True))[1]

    ds = torch.randn_like(right(torch.Tensor.clone))
    kernels = conv_shrink.NATIVE
    made = {"s": (right, lambda: kernels.conv_shrink(x, A, geometry))}
    if C % 16 == 0:
        made["dA"] = gradient, lambda: kernels.conv_shrink_backward(ds, x, A, geometry)
    for name, (expected, call) in made.items():
        found = []
        for threads in (1, 2):
            with on_threads(threads):
                found.append(call())
        if not torch.equal(*found):
            return f"{name} has other bits with two threads than with one"
        ref64, squares64 = expected(torch.Tensor.double), expected(lambda t: t.double().square())
        bound = contract.bound(expected(torch.Tensor.clone), ref64, squares64.sqrt())
        reason = bound.verdict(found[0]).why_broken
        if reason is not None:
            return f"{name} is {reason}"
    return why_layer_wrong(x, A, geometry) if C % 16 == 0 else None


def why_layer_wrong(x, A, geometry):
    """A sentence if a convolution's forward in one call or its backward breaks the contract, whether it
    merges or not, of kernels in either memory format."""
    r, N, scaling = A.shape[0], 48, 0.5
    W, B, bias = torch.randn(N, *A.shape[1:]), torch.randn(N, r, 1, 1), torch.randn(N)
    s = convolve(x, A, None, geometry).movedim(1, -1).contiguous().movedim(-1, 1)
    dy = torch.randn(s.shape[0], *s.shape[2:], N).movedim(-1, 1)
    names = ("y", "dx", "dA", "dB")

    def expected(cast, scaling=scaling):
        given = [cast(t) for t in (x, W, A, B)]
        y = reference.lora_conv(*given, scaling, cast(bias), geometry=geometry)
        again = reference.conv_shrink(given[0], given[2], geometry)
        dx, _, dA, dB, _ = reference.lora_conv_backward(
            cast(dy), *given, again, scaling, geometry=geometry
        )
        return dict(zip(names, (y, dx, dA, dB), strict=True))

    squares64 = expected(lambda t: t.double().square(), scaling**2)
    squares = {name: t.sqrt() for name, t in squares64.items()}
    bounds = contract.bounds(expected(torch.Tensor.clone), expected(torch.Tensor.double), squares)
    numbers = (scaling, *geometry.stride, *geometry.padding, *geometry.dilation)

    def last(kernel):
        return kernel.movedim(1, -1).contiguous().movedim(-1, 1)

    for merge in (False, True):
        for of_W, of_A in ((W, A), (last(W), last(A)), (last(W), A), (W, last(A))):
            found = []
            for threads in (1, 2):
                with on_threads(threads):
                    y, kept = torch.ops.lorafast_cpu.lora_conv(
                        x, of_W, bias, of_A, B, *numbers, merge
                    )
                    kept = s if kept is None else kept
                    dx, _, dA, dB = torch.ops.lorafast_cpu.lora_conv_backward(
                        dy, x, of_W, kept, of_A, B, *numbers, merge
                    )
                    found.append(dict(zip(names, (y, dx, dA, dB), strict=True)))
            # The convolutions with W are PyTorch's.
            if not all(torch.equal(found[0][name], found[1][name]) for name in ("dA", "dB")):
                return "dA or dB has other bits with two threads than with one"
            if dA.stride() != of_A.stride():
                return f"dA has strides {dA.stride()}, A {of_A.stride()}"
            reason = contract.why_any_broken(found[1], bounds)
            if reason is not None:
                return f"{'merged' if merge else 'added'}: {reason}"
    return None


def why_bottleneck_wrong(M, K, N, b, dtype, layout, activation):
    """A sentence if a bottleneck adapter or a gradient of it breaks the contract, or has other bits with
    two threads than with one."""
    sizes = {"h": (M, K), "down": (b, K), "up": (N, b), "down_bias": (b,), "up_bias": (N,)}
    if K != N:
        sizes["residual"] = (M, N)
    drawn = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    dy = torch.randn(M, N).to(dtype)

    def outputs(function, cast):
        given = {name: cast(t).requires_grad_() for name, t in drawn.items()}
        laid = given | {"h": lay_out(given["h"], layout)}
        y = function(**laid, scaling=0.7, activation=activation)
        grads = torch.autograd.grad(y, list(given.values()), lay_out(cast(dy), layout))
        return {"y": y.detach()} | {f"d{n}": g for n, g in zip(given, grads, strict=True)}

    found = []
    for threads in (1, 2):
        with on_threads(threads), use_backend("cpu"):
            found.append(outputs(functional.bottleneck, torch.Tensor.clone))
    for name, one in found[0].items():
        if not torch.equal(one, found[1][name]):
            return f"{name} has other bits with two threads than with one"
    exact = outputs(reference.bottleneck, torch.Tensor.double)
    bounds = contract.bounds(outputs(reference.bottleneck, torch.Tensor.clone), exact)
    return contract.why_any_broken(found[0], bounds)


def main():
    """Exits with a sentence if a result is off."""
    torch.manual_seed(0)
    # Fresh memory holds NaN. use_deterministic_algorithms would import all of TorchInductor.
    torch.set_deterministic_debug_mode("error")
    seed = torch.tensor([-(2**62) + 99])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    layouts = ("contiguous", "transposed", "every other column", "one column expanded")
    each = (dtypes, layouts, (0.0, 0.3))
    if len(sys.argv) > 1:  # under the sanitizers kernels take ten times as long
        chosen = covering(SHAPES, *each)
    else:
        chosen = [(shape, *others) for shape in SHAPES for others in covering(*each)]
    for shape, dtype, layout, p in chosen:
        for name, call in calls_of(*shape, dtype, layout, p, seed).items():
            reason = contract.compare(call, cpu, dtype).why_broken
            if reason is not None:
                sys.exit(f"{name} {shape} {dtype} {layout} p={p} is {reason}")
        for threads in (1, 2):
            with on_threads(threads):
                reason = why_together_differ(*shape, dtype, layout, p, seed)
            if reason is not None:
                sys.exit(f"{reason}: {shape} {dtype} {layout} p={p}, {threads} threads")
    torch.manual_seed(1)
    for dtype, cast in itertools.product(dtypes, dtypes):
        for weight in weights(dtype):
            reason = why_dequantized_wrongly(weight.to(cast))
            if reason is not None:
                sys.exit(reason)
    torch.manual_seed(2)
    # 4200 columns are several tiles, 70 rows several of dx. From one 16-bit dtype to another a weight is
    # rounded twice, which no product does.
    sizes = ((5, 33), (70, 544), (9, 4200))
    rows = ((1, "contiguous"), (3, "transposed"), (21, "one column expanded"))
    layers = itertools.cycle(
        ((1, "contiguous", 19), (21, "one column expanded", 5), (4, "transposed", 16))
    )
    casts = [
        (one, to)
        for one, to in itertools.product(dtypes, dtypes)
        if one == to or dtypes[0] in (one, to)
    ]
    # Each two dtypes, and each size with each number of rows; which of them meet is another thing for
    # each instruction set, and three sets have each two dtypes with each size.
    turn = 3 * INSTRUCTION_SETS.index(native.capability())
    products = [
        (casts[(turn + i) % len(casts)], size, of_x)
        for i, (size, of_x) in enumerate(itertools.product(sizes, rows))
    ]
    for (dtype, cast), (N, K), (M, layout) in products:
        for weight in multiplied(N, K, dtype):
            few = weight.to(cast)
            reason = why_multiplied_wrongly(few, M, layout)
            if reason is None:
                reason = why_layer_multiplied_wrongly(few, *next(layers))
            if reason is not None:
                sys.exit(reason)
    torch.manual_seed(3)
    for images in IMAGES:
        reason = why_convolved_wrongly(*images)
        if reason is not None:
            sys.exit(f"{reason}: images {images}")
    torch.manual_seed(4)
    for shape, dtype, layout, activation in covering(BOTTLENECKS, dtypes, layouts, ACTIVATIONS):
        reason = why_bottleneck_wrong(*shape, dtype, layout, activation)
        if reason is not None:
            sys.exit(f"{reason}: bottleneck {shape} {dtype} {layout} {activation}")
    # The mask, bit for bit.
    M, K = 37, 1003
    x, one = torch.ones(M, K), torch.ones(M, 1)
    for row in range(M):
        dA = cpu.shrink_backward(one * (torch.arange(M)[:, None] == row), x, 0.3, seed)
        expected = reference.keep_mask(M, K, 0.3, seed)[row]
        if not torch.equal(dA[0] != 0, expected):
            sys.exit(f"row {row} of the mask is not the reference's")
    print(f"{native.capability()}: every kernel is right")


if __name__ == "__main__":
    main()
