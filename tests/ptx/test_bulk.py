import itertools

import numpy as np
import pytest
import torch

from ptx import Fault, In, InOut, Out, TensorMap, UnknownInstruction
from ptx.handwritten import (
    BARRIER,
    BY_BYTES,
    SHARED,
    kernel,
    launch,
    loaded,
    numbers,
    plain_load,
    stored,
    tensor_load,
)
from ptx.tensormap import encode

LATE = ("late", "random", "soon")
STORE = "cp.async.bulk.global.shared::cta.bulk_group"


# ---- cp.async.bulk


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("size", [16, 112, 2048])
def test_a_plain_copy_loads_bytes(size, late):
    x = numbers(size + 32, np.uint8)
    for to, seed in itertools.product(("shared::cta", "shared::cluster"), range(3)):
        copy = plain_load(size, to=64, source=16, space=to)
        y = loaded(copy, "x", [In("x", x)], size, begin=64, seed=seed, late=late)
        assert np.array_equal(y, x[16 : 16 + size])


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("size", [16, 112, 2048])
def test_a_plain_copy_stores_bytes(size, late):
    x = numbers(size, np.uint8)
    y = np.zeros(size + 32, np.uint8)
    stored(f"{STORE} [%y+16], [%r0+64], {size};", "y", [InOut("y", y)], x, begin=64, late=late)
    assert np.array_equal(y[16 : 16 + size], x)
    assert not y[:16].any()
    assert not y[16 + size :].any()


def test_a_mask_chooses_bytes_of_every_16():
    x, y = numbers(64, np.uint8), np.zeros(64, np.uint8)
    mask = 0b1010_0000_0000_0111
    copy = f"{STORE}.cp_mask [%y], [%r0], 64, {mask};"
    stored(copy, "y", [InOut("y", y)], x)
    chosen = np.tile([bool(mask >> i & 1) for i in range(16)], 4)
    assert np.array_equal(y, np.where(chosen, x, 0))


def test_hints_change_nothing():
    x = numbers(256, np.uint8)
    copy = f"""
        mov.b64 %q0, 0;
        cp.async.bulk.prefetch.L2.global [%x], 256;
        cp.async.bulk.prefetch.L2.global.L2::cache_hint [%x], 256, %q0;
        cp.async.bulk.shared::cluster.global.{BY_BYTES}.L2::cache_hint
            [%r0], [%x], 256, [%r0+{BARRIER}], %q0;"""
    assert np.array_equal(loaded(copy, "x", [In("x", x)], 256), x)


# ---- Tensors: what a box holds, by NumPy's indices; a swizzle, as CUDA's programming guide has it


def box_of(x, box, first, strides=None, fill=0):
    """What a box reads; dimensions of ``x`` are in reverse."""
    rank = x.ndim
    strides = strides or (1,) * rank
    index = [
        first[i] + strides[i] * np.arange(-(-box[i] // strides[i])) for i in reversed(range(rank))
    ]
    tile = np.full([len(i) for i in index], fill, x.dtype)
    for to in np.ndindex(*tile.shape):
        at = tuple(int(i[k]) for i, k in zip(index, to, strict=True))
        if all(0 <= i < n for i, n in zip(at, x.shape, strict=True)):
            tile[to] = x[at]
    return tile


def swizzled(tile, swizzle, begin):
    """Chunk c of the 128-byte line l is where chunk c ^ (l % n) is otherwise."""
    if not swizzle:
        return tile.reshape(-1).view(np.uint8)
    chunks = tile.reshape(-1).view(np.uint8).reshape(-1, 8, 16)
    moved = np.empty_like(chunks)
    for line, chunk in itertools.product(range(len(chunks)), range(8)):
        moved[line, chunk ^ ((line + begin // 128) % (swizzle // 16))] = chunks[line, chunk]
    return moved.reshape(-1)


def tensor(shape, kind, seed=1, fringe=0):
    """Random numbers; ``fringe``: elements between rows that belong to no row."""
    whole = numbers(int(np.prod(shape[:-1])) * (shape[-1] + fringe), kind, seed)
    return whole.reshape(*shape[:-1], -1)[..., : shape[-1]]


TILES = {
    "1d": ((100,), np.uint32, 1, (16,), 0, (8,)),
    "1d partly beyond": ((100,), np.uint32, 0, (16,), 0, (92,)),
    "1d partly before": ((100,), np.uint32, 0, (16,), 0, (-5,)),
    "1d around": ((5,), np.uint32, 0, (16,), 0, (-7,)),
    "2d": ((10, 24), np.uint16, 8, (8, 6), 0, (8, 2)),
    "2d bytes": ((10, 33), np.uint8, 15, (16, 6), 0, (16, 2)),
    "2d doubles": ((10, 7), np.uint64, 1, (4, 5), 0, (2, 7)),
    "2d beyond both": ((10, 24), np.uint16, 8, (16, 8), 0, (16, 7)),
    "2d before both": ((10, 24), np.uint16, 8, (16, 8), 0, (-3, -2)),
    "2d wholly outside": ((10, 24), np.uint16, 8, (16, 8), 0, (24, 0)),
    "2d wholly before": ((10, 24), np.uint16, 8, (16, 8), 0, (0, -8)),
    "2d swizzled in 32": ((20, 40), np.uint16, 8, (16, 16), 32, (8, 3)),
    "2d swizzled in 64": ((20, 40), np.uint16, 8, (32, 16), 64, (8, 3)),
    "2d swizzled in 128": ((20, 80), np.uint16, 8, (64, 16), 128, (8, 9)),
    "2d of 4 bytes, swizzled in 128": ((20, 40), np.uint32, 4, (32, 8), 128, (-4, -4)),
    "3d": ((3, 5, 8), np.uint32, 0, (4, 3, 2), 0, (1, 3, 2)),
    "3d swizzled in 64": ((3, 9, 40), np.uint16, 8, (32, 4, 3), 64, (16, -1, 1)),
    "4d": ((2, 3, 5, 8), np.uint32, 0, (4, 3, 2, 2), 0, (-1, 3, 2, 0)),
    "5d": ((2, 2, 3, 5, 8), np.uint32, 0, (4, 3, 2, 2, 2), 0, (5, -2, 2, 1, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TILES)
def test_a_tensor_copy_loads_a_box(name):
    shape, kind, fringe, box, swizzle, first = TILES[name]
    x = tensor(shape, kind, fringe=fringe)
    expected = box_of(x, box, first)
    for begin, seed in ((0, 0), (384, 1)):
        copy, maps = tensor_load(*first, to=begin), [TensorMap(In("x", x), box, swizzle)]
        y = loaded(copy, "x:map", maps, expected.nbytes, begin=begin, seed=seed)
        assert np.array_equal(y, swizzled(expected, swizzle, begin))


@pytest.mark.parametrize("name", TILES)
def test_a_tensor_copy_stores_what_lies_within(name):
    shape, kind, fringe, box, swizzle, first = TILES[name]
    before = tensor(shape, kind, seed=2, fringe=fringe)
    tile = numbers(int(np.prod(box)), kind, seed=3).reshape(box[::-1])
    for begin, late in ((0, "late"), (384, "soon")):
        y = tensor(shape, kind, seed=2, fringe=fringe)
        coordinates = ", ".join(map(str, first))
        copy = (
            f"cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.bulk_group "
            f"[%y, {{{coordinates}}}], [%r0+{begin}];"
        )
        data = np.ascontiguousarray(swizzled(tile, swizzle, begin))
        maps = [TensorMap(InOut("y", y), box, swizzle)]
        stored(copy, "y:map", maps, data, begin=begin, late=late)
        expected = before.copy()
        for index in np.ndindex(*tile.shape):
            to = tuple(c + i for c, i in zip(reversed(first), index, strict=True))
            if all(0 <= i < n for i, n in zip(to, shape, strict=True)):
                expected[to] = tile[index]
        assert np.array_equal(y, expected)


@pytest.mark.parametrize("strides", [(1, 2, 1), (1, 3, 2), (7, 8, 1)])
def test_element_strides_leave_rows_out(strides):
    x = tensor((6, 20, 8), np.uint32)
    box, first = (4, 9, 4), (2, 3, 1)
    # The first dimension has no stride.
    expected = box_of(x, box, first, (1, *strides[1:]))
    maps = TensorMap(In("x", x), box, element_strides=strides)
    y = loaded(tensor_load(*first, space="shared::cluster"), "x:map", [maps], expected.nbytes)
    assert np.array_equal(y.view(np.uint32).reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_the_outside_can_be_nan(kind):
    dtype = getattr(torch, kind)
    x = torch.arange(1, 81).to(dtype).reshape(5, 16)
    maps = TensorMap(In("x", x), (8, 4), fill_nan=True, dtype=kind)
    found = loaded(tensor_load(10, -2), "x:map", [maps], 32 * x.element_size())
    y = torch.from_numpy(found).view(dtype).reshape(4, 8)
    assert torch.equal(y[2:, :6], x[:2, 10:])
    assert y[:2].isnan().all()
    assert y[:, 6:].isnan().all()


def test_a_tensor_map_may_be_in_global_memory():
    x = tensor((8, 16), np.uint16)
    m = numbers(128, np.uint8)
    m[:] = np.frombuffer(
        encode(address=x.ctypes.data, element_bytes=2, sizes=(16, 8), strides=(32,), box=(16, 4)),
        np.uint8,
    )
    prefetch = "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%m, {0, 4}];"
    copy = f"ld.global.u32 %r2, [%z]; {prefetch} {tensor_load(0, '%r2', name='m')}"
    z = np.full(1, 3, np.uint32)
    y = loaded(copy, "x m z", [In("x", x), In("m", m), In("z", z)], 128)
    assert np.array_equal(y.view(np.uint16).reshape(4, 16), x[3:7])


# ---- Wrong copies are faults, by name

WRONG = {
    "to 8 bytes": (plain_load(16, to=8), "x", "not a multiple of 16"),
    "from 8 bytes": (plain_load(16, source=8), "x", "not a multiple of 16"),
    "24 bytes": (plain_load(24), "x", "copies 24 bytes"),
    "no bytes": (plain_load(0), "x", "copies 0 bytes"),
    "beyond the tensor": (plain_load(32, source=4080), "x", "16 bytes past the end of x"),
    "beyond shared memory": (plain_load(32, to=SHARED - 16), "x", "writes 32 bytes at 8240 of shared"),
    "a tensor to 64 bytes": (tensor_load(0, 0, to=64), "x:map", "not a multiple of 128"),
    "no tensor map": (tensor_load(0, 0), "x", "no tensor map"),
    "dimensions": (tensor_load(0), "x:map", "copies 1 dimensions of a tensor map that has 2"),
    "no mbarrier": (
        plain_load(16).replace(str(BARRIER), str(BARRIER + 8)), "x", "not initialised"
    ),
    "over an mbarrier": (plain_load(32, to=BARRIER - 16), "x", "writes the mbarrier at 8192"),
    "undefined size": (plain_load("%r5"), "x", "undefined"),
    "undefined coordinate": (tensor_load(0, "%r5"), "x:map", "undefined"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_copy_is_a_fault(what):
    copy, parameters, message = WRONG[what]
    x = tensor((16, 64), np.uint32)
    argument = TensorMap(In("x", x), (16, 4)) if "map" in parameters else In("x", x)
    with pytest.raises(Fault, match=message):
        loaded(copy, parameters, [argument], 16, late="late")


def test_a_store_into_an_input_is_a_fault():
    x, y = numbers(16, np.uint8), numbers(16, np.uint8)
    with pytest.raises(Fault, match=r"stores to y\[0\], an input"):
        stored(f"{STORE} [%y], [%r0], 16;", "y", [In("y", y)], x)


def test_a_store_of_what_nobody_has_written_is_a_fault():
    x, y = numbers(16, np.uint8), numbers(32, np.uint8)
    with pytest.raises(Fault, match="at 16, which nobody has written"):
        stored(f"{STORE} [%y], [%r0], 32;", "y", [InOut("y", y)], x)


def test_what_is_loaded_from_nothing_is_undefined():
    # Of 32 bytes one word has a value; the copy takes 16 of them.
    x = numbers(8)
    copy = f"st.global.u32 [%x], 7; fence.proxy.async; {plain_load(16)}"
    with pytest.raises(Fault, match="undefined"):
        loaded(copy, "x", [Out("x", x)], 16)
    assert loaded(copy, "x", [InOut("x", x)], 16).view(np.uint32)[0] == 7


@pytest.mark.parametrize(
    "code",
    [
        f"tensor.3d.shared::cta.global.im2col.{BY_BYTES} [%r0], [%x, {{0, 0, 0}}], [%r0], {{%h0}};",
        f"tensor.2d.shared::cta.global.tile::gather4.{BY_BYTES} [%r0], [%x, {{0, 0}}], [%r0];",
        f"tensor.2d.shared::cta.global.{BY_BYTES} [%r0], [%x, {{0}}], [%r0];",
        f"shared::cta.global.{BY_BYTES}.ignore_oob [%r0], [%x], 16, 1, 1, [%r0];",
        "shared::cta.global [%r0], [%x], 16, [%r0];",
        f"global.shared::cta.{BY_BYTES} [%x], [%r0], 16;",
        "global.global.bulk_group [%x], [%x], 16;",
        "global.shared::cta.bulk_group.L2::cache_hint [%x], [%r0], 16;",
        "wait_group.write 0;",
    ],
)
def test_what_the_machine_has_not_is_refused(code):
    with pytest.raises(UnknownInstruction, match="cp"):
        launch(kernel(f"mov.u32 %r0, smem; cp.async.bulk.{code}", "x"), [In("x", numbers(64))])


def test_a_box_narrower_than_its_swizzle_is_refused():
    x = tensor((16, 64), np.uint16)
    with pytest.raises(UnknownInstruction, match="32 bytes a row, swizzled in 64"):
        loaded(tensor_load(0, 0), "x:map", [TensorMap(In("x", x), (16, 4), 64)], 128)
