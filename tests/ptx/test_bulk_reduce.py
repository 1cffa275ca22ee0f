import itertools

import numpy as np
import pytest
import torch

from ptx import Fault, InOut, TensorMap, UnknownInstruction
from ptx.handwritten import numbers, stored

REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group"


def reduced(op, a, b):
    """By NumPy; floats of 16 bits are PyTorch's."""
    if op in ("inc", "dec"):
        pairs = list(zip(a.tolist(), b.tolist(), strict=True))
        up = [0 if old >= most else old + 1 for old, most in pairs]
        down = [most if old == 0 or old > most else old - 1 for old, most in pairs]
        return np.array(up if op == "inc" else down, a.dtype)
    if isinstance(a, torch.Tensor):
        return {"add": torch.add, "min": torch.minimum, "max": torch.maximum}[op](a, b)
    of = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    return of[op](a, b)


REDUCTIONS = [
    *(("add", kind) for kind in ("u32", "s32", "u64", "f32", "f64", "noftz.f16", "noftz.bf16")),
    *itertools.product(("min", "max"), ("u32", "s32", "u64", "s64", "f16", "bf16")),
    *itertools.product(("inc", "dec"), ("u32",)),
    *itertools.product(("and", "or", "xor"), ("b32", "b64")),
]
KINDS = {"u": "uint", "s": "int", "b": "uint", "f": "float"}


def operands(kind, count=64):
    if kind == "bf16" or kind == "f16":
        make = torch.Generator().manual_seed(3)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return [torch.randn(count, generator=make).to(dtype) for _ in range(2)]
    name = KINDS[kind[0]] + kind[1:]
    if name.startswith("float"):
        random = np.random.default_rng(3)
        return [random.standard_normal(count).astype(name) for _ in range(2)]
    near = [numbers(count, np.dtype(name), seed) for seed in (1, 2)]
    near[0][: count // 2] = near[1][: count // 2]  # where inc and dec turn
    near[0][0] = near[1][1] = 0
    return near


@pytest.mark.parametrize(("op", "kind"), REDUCTIONS)
def test_a_reduction_combines_elements(op, kind):
    a, b = operands(kind.removeprefix("noftz."))
    expected = reduced(op, a, b)
    as_bytes = b.view(torch.uint8).numpy() if isinstance(b, torch.Tensor) else b.view(np.uint8)
    size = as_bytes.nbytes
    found = a.clone() if isinstance(a, torch.Tensor) else a.copy()
    stored(f"{REDUCE}.{op}.{kind} [%y], [%r0], {size};", "y", [InOut("y", found)], as_bytes)
    same = torch.equal if isinstance(a, torch.Tensor) else np.array_equal
    assert same(found, expected)


def test_sums_of_float32_are_flushed():
    tiny = np.float32(1e-40)
    a = np.array([tiny, 1.5e-38, -1.5e-38, 1.0], np.float32)
    b = np.array([tiny, -1.45e-38, 1.45e-38, tiny], np.float32)
    stored(f"{REDUCE}.add.f32 [%y], [%r0], 16;", "y", [InOut("y", a)], b.view(np.uint8))
    assert a.tolist() == [0, 0, 0, 1.0]
    assert np.signbit(a).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("add", "float32"),
        ("add", "bfloat16"),
        ("min", "int64"),
        ("xor", "uint32"),
        ("max", "float16"),
    ],
)
def test_a_tensor_reduction_combines_what_lies_within(op, dtype):
    kind = getattr(torch, dtype)
    make = torch.Generator().manual_seed(5)
    wide = (torch.randn(9, 16, generator=make) * 1000).to(kind)
    tile = (torch.randn(4, 16, generator=make) * 1000).to(kind)
    expected = wide.clone()
    both = wide[6:, :12].clone(), tile[:3, 4:].clone()
    if op == "xor":
        expected[6:, :12] = torch.from_numpy(both[0].numpy() ^ both[1].numpy())
    else:
        expected[6:, :12] = reduced(op, *both)
    copy = (
        f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.tile.bulk_group "
        "[%y, {-4, 6}], [%r0];"
    )
    maps = TensorMap(InOut("y", wide), (16, 4), dtype=dtype)
    stored(copy, "y:map", [maps], tile.reshape(-1).view(torch.uint8).numpy())
    assert torch.equal(wide, expected)


def test_reductions_of_many_ctas_all_count():
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    for seed in range(6):
        y[:] = 1
        stored(f"{REDUCE}.add.u32 [%y], [%r0], 256;", "y", [InOut("y", y)], x, seed=seed, grid=9)
        assert np.array_equal(y, 1 + 9 * x)


@pytest.mark.parametrize(
    "form", ["add.f16", "add.s64", "min.f32", "xor.u32", "inc.s32", "add.noftz.f32"]
)
def test_a_reduction_that_is_not_in_the_table_is_refused(form):
    with pytest.raises(UnknownInstruction, match=r"cp\.reduce"):
        stored(f"{REDUCE}.{form} [%y], [%r0], 16;", "y", [InOut("y", numbers(4))], numbers(4))


def test_a_tensor_of_a_type_that_has_no_such_reduction_is_a_fault():
    y = numbers(64, np.uint8).reshape(4, 16)
    copy = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%y, {0, 0}], [%r0];"
    with pytest.raises(Fault, match="of a type that it has no such reduction of"):
        stored(copy, "y:map", [TensorMap(InOut("y", y), (16, 4))], numbers(64, np.uint8))
