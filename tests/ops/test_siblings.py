"""Layers that share x: the contract, the bits of layers by themselves, gradients, what is kept."""

import pytest
import torch
from circumstances import fresh_memory_holds_nan
from helpers import assert_contract, covering, skip_unless_usable
from sibling_layers import DTYPES, SHAPES, by_reference, by_themselves, drawn, shared, step

import lorafast
from lorafast import ops, reference
from lorafast.ops.siblings import Sibling

ORDERS = {"all": None, "k is never called": ("v", "q")}


@pytest.mark.parametrize(
    ("backend", "dtype", "order"),
    covering(("auto", "cpu", "aten", "reference", "triton"), tuple(DTYPES), tuple(ORDERS)),
)
def test_contract(backend, dtype, order):
    skip_unless_usable("aten" if backend == "auto" else backend)
    x, layers = drawn()

    def call(operations, cast):
        plain = operations is reference
        with lorafast.use_backend("auto" if plain else backend):
            run = by_reference if plain else shared
            found = step(run, x, layers, *DTYPES[dtype], order=ORDERS[order], cast=cast)
        return tuple(found[name] for name in sorted(found))

    assert_contract(call, ops, DTYPES[dtype][0], DTYPES[dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_layers_by_themselves(dtype):
    """On the native kernels, whose sums don't depend on the rank, but for dx, which is one sum more."""
    skip_unless_usable("cpu")
    x, layers = drawn(M=(70,), K=100)
    with lorafast.use_backend("cpu"):
        together = step(shared, x, layers, *DTYPES[dtype])
        alone = step(by_themselves, x, layers, *DTYPES[dtype])
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        if name != "dx":
            assert torch.equal(together[name], tensor), name


@pytest.mark.parametrize(
    ("frozen", "need_dx"),
    [
        (("k.A", "k.B"), True),
        (("k.A", "v.B"), False),
        (("q.A", "k.A", "v.A"), False),
        ([f"{name}.{half}" for name in SHAPES for half in "AB"], True),
    ],
    ids=["k is frozen", "no dx, halves", "no A", "dx alone"],
)
def test_gradients_of_a_part(frozen, need_dx):
    x, layers = drawn()
    options = {"frozen": frozen, "need_dx": need_dx}
    found = step(shared, x, layers, torch.float64, torch.float64, **options)
    expected = step(by_reference, x, layers, torch.float64, torch.float64, **options)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, msg=lambda text, name=name: f"{name}: {text}"
        )


def leaves_of(seed=0):
    x, layers = drawn(M=(3,), K=4, seed=seed)
    tensors = [x, *(t for one in layers.values() for t in (one.A, one.B))]
    return [t.requires_grad_() for t in tensors], layers


def from_leaves(layers):
    def run(x, *adapters):
        siblings = {
            name: Sibling(one.W, adapters[2 * i], adapters[2 * i + 1], SHAPES[name][2], one.bias)
            for i, (name, one) in enumerate(layers.items())
        }
        return tuple(shared(x, siblings).values())

    return run


def test_derivatives_of_any_order():
    leaves, layers = leaves_of()
    run = from_leaves(layers)
    assert torch.autograd.gradcheck(run, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_a_backward_may_be_run_again():
    leaves, layers = leaves_of()
    y = sum(y.sum() for y in from_leaves(layers)(*leaves))
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    second = torch.autograd.grad(y, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_backward_through_one_is_one_through_all():
    leaves, layers = leaves_of()
    one, other, _ = from_leaves(layers)(*leaves)
    one.sum().backward()
    with pytest.raises(RuntimeError, match=r"^siblings .* Pass retain_graph=True, or add"):
        other.sum().backward()


@pytest.mark.parametrize("place", range(3), ids=["x", "lora_A", "lora_B"])
def test_what_is_kept_must_not_change(place):
    leaves, layers = leaves_of()
    y = sum(y.sum() for y in from_leaves(layers)(*leaves))
    with torch.no_grad():
        leaves[place].add_(1)
    message = "changed in place after a LoRA layer had kept it .* siblings .* not called too"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(y, leaves)


def test_gradients_have_memory_of_their_own():
    leaves, layers = leaves_of()
    found = torch.autograd.grad(sum(y.sum() for y in from_leaves(layers)(*leaves)), leaves)
    for t in found:
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def test_uninitialised_memory_holds_nan():
    """Of the stand-ins too, which nobody reads."""
    with fresh_memory_holds_nan():
        leaves, layers = leaves_of()
        ys = from_leaves(layers)(*leaves)
        found = torch.autograd.grad([y.sum() for y in ys], leaves)
    assert all(t.isfinite().all() for t in (*ys, *found))


def test_x_is_kept_once():
    leaves, layers = leaves_of()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        from_leaves(layers)(*leaves)
    assert sum(t.data_ptr() == leaves[0].data_ptr() for t in kept) == 1
