"""The kernels of CUDA C++ on the device: right, the same bits, on its stream, in a graph.

What they share with every backend is in the other files: real sizes, 2**31 elements, determinism, a
captured training step, compute-sanitizer.
"""

import pytest
import torch
from circumstances import MEMORY, WORK, assert_same_bits
from helpers import assert_contract, skip_unless_usable, stacked
from lorafast.bench.common.problem import Problem
from lorafast.bench.common.problem import draw as draw_layer
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.operations.job import why_wrong

from lorafast import ops, reference
from lorafast.backends import cost, dropout, forced, registry
from lorafast.backends.cuda import Cuda, native, planning
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.plan import Plan
from lorafast.functional import grouped_lora_linear, lora_linear
from lorafast.ops.problems import by_backend, layer_problem
from lorafast.reference import contract, wide

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = [1, 2, 7, 16]
SIZES = [(64, 64, 16), (1537, 2049, 5), (4096, 4096, 64), (72, 264, 1)]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
sizes = pytest.mark.parametrize(("K", "N", "r"), SIZES)


@pytest.fixture(autouse=True)
def _usable():
    skip_unless_usable("cuda")


def draw(device, *shapes, dtype=torch.float64):
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def one_launch(x, weight, lora_A, lora_B, bias):
    """Skips where another GPU's kernels would serve the layer, operation by operation."""
    p = layer_problem(x, weight, lora_A, lora_B, bias, False, ("y",), layouts=True)
    plan = registry.plan_of("cuda", p)
    if not isinstance(plan, Plan) or len(plan.launches) > 1:
        pytest.skip(f"not in one launch here: {plan}")


def test_it_has_code_for_this_gpu(device):
    assert native.why_not_on(torch.cuda.current_device()) is None
    assert native.architectures()


@dtypes
@sizes
@pytest.mark.parametrize("M", ROWS)
def test_a_layer_of_few_rows(device, dtype, M, K, N, r):
    layers = [draw(device, (M, K), (N, K), (r, K), (N, r), (N,)) for _ in range(4)]
    as_given = [t.to(dtype) for t in layers[0]]
    one_launch(*as_given)

    def call(run, cast):
        made = run.lora_linear if run is reference else lora_linear
        return stacked(
            (made(*(cast(t) for t in (x, weight, lora_A, lora_B)), 0.7, cast(bias)),)
            for x, weight, lora_A, lora_B, bias in layers
        )

    with torch.no_grad(), forced.use_backend("cuda"):
        assert_contract(call, ops, dtype)


@dtypes
@pytest.mark.parametrize("M", [4, 16])
def test_a_layer_of_few_rows_with_an_adapter_each(device, dtype, M):
    K, N, r, n = 512, 768, 8, 3
    x, weight, lora_A, lora_B, scaling, bias = draw(
        device, (M, K), (N, K), (n, r, K), (n, N, r), (n,), (N,)
    )
    adapter_of = torch.arange(M, device=device) % (n + 1) - 1

    def call(run, cast):
        layer = reference.grouped_lora_linear if run is reference else grouped_lora_linear
        arguments = (cast(t) for t in (x, weight, lora_A, lora_B, scaling))
        return layer(*arguments, adapter_of, cast(bias))

    with torch.no_grad(), forced.use_backend("cuda"):
        assert_contract(call, ops, dtype)


@dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_expand(device, dtype, dropout_p):
    M, N, r = 1023, 2049, 17
    s, lora_B = draw(device, (M, r), (N, r))
    seed, low = torch.tensor([-3], device=device), wide(dtype)

    def call(run, cast):
        return run.expand(
            cast(s, low), cast(lora_B), 0.7, dropout_p, seed, dtype=cast(lora_B).dtype
        )

    with forced.use_backend("cuda"):
        assert_contract(call, ops, dtype)


CASES = ["shrink", "expand", "linear_expand", "expand_backward", "shrink_backward", "dx"]
LARGE, RAGGED, SMALL, FEW = (4096, 4096, 4096), (1023, 1544, 520), (200, 384, 136), (7, 512, 768)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("sizes", "r"), [(LARGE, 64), (RAGGED, 17), (SMALL, 16), (FEW, 3)])
def test_whatever_may_be_launched_is_right(device, dtype, dropout_p, sizes, r):
    """Whole layers and operations, fused and not, whichever of them the model would take."""
    layer = Problem(Shape("", *sizes), r, dtype, dtype, dropout_p)
    drawn = cases(layer, draw_layer(layer, device, 1))
    checked = 0
    for name in (*CASES, "lora_linear", "lora_linear_backward"):
        case = drawn[name]
        for launch in planning.launches_of(case.asks, cost.gpu_of(device)):
            if isinstance(launch, Launch):
                operations = by_backend(Cuda(launch.choices))
                assert why_wrong(case, operations, DTYPES[dtype]) is None, launch.line
                checked += 1
    assert checked >= len(CASES)


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("M", "K"), [(0, 8), (1, 1), (3, 7), (257, 4096), (1023, 1537)])
@pytest.mark.parametrize("seed", [0, -(2**62) + 12345])
def test_the_mask_is_the_references_bit_for_bit(device, M, K, p, seed):
    seed = torch.tensor([seed])
    assert dropout.bits_on(torch.device("cuda", torch.cuda.current_device())) is not None
    found = dropout.keep_mask(M, K, p, seed.to(device))
    assert torch.equal(found.cpu(), reference.keep_mask(M, K, p, seed))


def test_atens_dropout_reads_the_mask(device):
    x, seed = torch.randn(300, 1000, device=device).bfloat16(), torch.tensor([9], device=device)
    assert torch.equal(dropout.dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed))


def decode(device, M=16, K=2048, N=1024, r=16):
    tensors = draw(device, (M, K), (N, K), (r, K), (N, r), (N,), dtype=torch.bfloat16)
    one_launch(*tensors)
    x, weight, lora_A, lora_B, bias = tensors

    def call():
        with torch.no_grad(), forced.use_backend("cuda"):
            return lora_linear(x, weight, lora_A, lora_B, 0.7, bias)

    return x, call


def test_a_decode_steps_bits_are_the_same_whatever_changes(device):
    _, call = decode(device)
    often = {f"{name}, {i}": within for name, within in WORK.items() for i in range(5)}
    assert_same_bits(call, MEMORY, often)


def test_decode_steps_on_two_streams_at_once(device):
    """Each stream has counters of its own."""
    _, call = decode(device)
    expected = call()
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for i in range(200):
        with torch.cuda.stream(streams[i % len(streams)]):
            found.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


def test_a_captured_decode_step_replays(device):
    x, call = decode(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, call())


def test_atens_dropout_is_captured_too(device):
    x, seed = torch.randn(64, 512, device=device), torch.tensor([4], device=device)
    dropout.dropout(x, 0.5, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout.dropout(x, 0.5, seed)
    for value in (4, 5):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, reference.dropout(x, 0.5, seed))


def test_nothing_waits_for_the_device(device):
    _, call = decode(device)
    call()
    seed, x = torch.tensor([4], device=device), torch.randn(64, 512, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        dropout.dropout(x, 0.5, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_runs_on_the_device_of_its_tensors():
    """Whichever is current."""
    first, second = (torch.device("cuda", index) for index in (0, 1))
    x, weight, lora_A, lora_B = draw(second, (8, 512), (256, 512), (16, 512), (256, 16))
    tensors = [t.bfloat16() for t in (x, weight, lora_A, lora_B)]
    with torch.cuda.device(first), torch.no_grad(), forced.use_backend("cuda"):
        y = lora_linear(*tensors, 0.7)
        s = ops.shrink(tensors[0], tensors[2])
        seed = torch.tensor([4], device=second)
        keep = dropout.keep_mask(8, 512, 0.5, seed)
    assert {t.device for t in (y, s, keep)} == {second}
    exact = reference.lora_linear(x, weight, lora_A, lora_B, 0.7)
    eager = reference.lora_linear(*tensors, 0.7)
    assert contract.why_broken(y, eager, exact, exact / 2) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_two_devices_are_a_sentence():
    x, weight, lora_A, lora_B = draw("cuda:0", (8, 64), (32, 64), (4, 64), (32, 4))
    with pytest.raises(ValueError, match="device"), forced.use_backend("cuda"):
        lora_linear(x, weight.to("cuda:1"), lora_A, lora_B, 0.7)
