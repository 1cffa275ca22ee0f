"""A tensor whose storage was freed or cut under it is refused by name, by every native operation."""

import pytest
import torch

import lorafast
from lorafast.backends.cpu import native
from lorafast.operands import FP4, FP8, NF4, Int8

if native.why_not_loaded() is not None:
    pytest.skip(native.why_not_loaded(), allow_module_level=True)

M, K, N, r = 6, 8, 10, 3
SHAPES = {
    "x": (M, K), "dx": (M, K), "y": (M, N), "dy": (M, N), "s": (M, r), "ds": (M, r),
    "lora_A": (r, K), "dA": (r, K), "lora_B": (N, r), "dB": (N, r), "seed": (1,),
}  # fmt: skip
NUMBERS = {"scaling": 0.5, "threshold": 20_000, "survivor_scale": 1.5}
ARGUMENTS = {
    operation: [
        a.name for a in getattr(torch.ops.lorafast_cpu, operation).default._schema.arguments
    ]
    for operation in native.LIBRARY.operations
}
OF_DENSE = {
    op: names for op, names in ARGUMENTS.items() if {*names} <= SHAPES.keys() | NUMBERS.keys()
}
CASES = [(op, name) for op, names in OF_DENSE.items() for name in names if name in SHAPES]


def tensor(name):
    dtype = torch.int64 if name == "seed" else torch.float32
    return torch.ones(SHAPES[name], dtype=dtype)


@pytest.mark.parametrize(("operation", "name"), CASES)
@pytest.mark.parametrize("left", [0, 4])
def test_too_small_a_storage_is_refused(operation, name, left):
    given = {n: NUMBERS[n] if n in NUMBERS else tensor(n) for n in ARGUMENTS[operation]}
    run = getattr(torch.ops.lorafast_cpu, operation)
    run(*given.values())
    needed = given[name].untyped_storage().nbytes()
    given[name].untyped_storage().resize_(left)
    sentence = rf"\b{name} has a storage of {left} bytes, expected at least {needed}"
    with pytest.raises(RuntimeError, match=sentence):
        run(*given.values())


QUANTIZED = {
    "nf4": lambda: NF4.of(torch.ones(64, 8), 8),
    "plain fp4": lambda: FP4.of(torch.ones(64, 8), 8, nested=False),
    "int8": lambda: Int8.of(torch.ones(64, 8)),
    "fp8": lambda: FP8.of(torch.ones(64, 8)),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_weight_with_freed_memory_is_refused(kind):
    from lorafast.backends.cpu import dequantize

    out = torch.empty(64 * 8)
    for name in QUANTIZED[kind]().tensors():
        weight = QUANTIZED[kind]()
        weight.tensors()[name].untyped_storage().resize_(0)
        for run in (
            lambda w: dequantize.part(w, (0, 64), (0, 8), out),
            lambda w: dequantize.of_few_rows(torch.ones(2, 8), w, None),
            lambda w: dequantize.of_few_rows(torch.ones(2, 64), w, None, transposed=True),
            lambda w: dequantize.layer_of(w)(
                torch.ones(2, 8),
                [*w.tensors().values()],
                torch.ones(3, 8),
                torch.ones(64, 3),
                1.0,
                None,
            ),
        ):
            with pytest.raises(RuntimeError, match="has a storage of 0 bytes, expected at least"):
                run(weight)


@pytest.mark.parametrize("freed", ["x", "bias"])
def test_few_rows_with_freed_memory_are_refused(freed):
    from lorafast.backends.cpu import dequantize

    given = {"x": torch.ones(2, 8), "bias": torch.ones(64)}
    given[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{freed} has a storage of 0 bytes"):
        dequantize.of_few_rows(given["x"], QUANTIZED["nf4"](), given["bias"])


def test_a_view_needs_its_last_element_and_no_more():
    wide = torch.ones(M, 2 * K)
    x, lora_A, s = wide[:, ::2], tensor("lora_A"), tensor("s")
    arguments = (x, lora_A, None, 0, 1.0, s)
    needed = 4 * (x.storage_offset() + (M - 1) * 2 * K + (K - 1) * 2 + 1)
    wide.untyped_storage().resize_(needed)
    torch.ops.lorafast_cpu.shrink(*arguments)
    wide.untyped_storage().resize_(needed - 1)
    with pytest.raises(RuntimeError, match=f"expected at least {needed}"):
        torch.ops.lorafast_cpu.shrink(*arguments)


@pytest.mark.parametrize("freed", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_a_layer_with_freed_memory_is_refused(backend, freed):
    t = {"x": tensor("x"), "weight": torch.ones(N, K)}
    t |= {name: tensor(name) for name in ("lora_A", "lora_B")}
    t[freed].untyped_storage().resize_(0)
    with lorafast.use_backend(backend), pytest.raises(RuntimeError) as caught:
        lorafast.ops.lora_linear(*t.values(), 1.0, None, 0.0, None)
    assert type(caught.value) is not lorafast.BackendError
    if backend == "cpu" and freed in ("lora_A", "lora_B"):
        assert f"{freed} has a storage of 0 bytes" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rank_0_with_an_expanded_s_writes_nothing_but_the_base_product(dtype):
    x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    s = torch.ones(M, 1, dtype=lorafast.reference.wide(dtype)).expand(M, 0)
    assert s.stride(1) == 0
    lora_B = torch.ones(N, 0, dtype=dtype)
    with lorafast.use_backend("cpu"):
        y = lorafast.ops.linear_expand(x, weight, s, lora_B, 1.0)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
