"""LoRA with vectors, LoKr and OFT: the contract, every gradient by name, what is kept and refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import covering

from lorafast import functional, reference
from lorafast.reference import contract

M, K, N, r = 7, 24, 40, 3
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16, fp32 adapters": (torch.float16, torch.float32),
}
ADAPTERS = {
    "LoRA": {"lora_A": (r, K), "lora_B": (N, r)},
    "AdaLoRA": {"lora_A": (r, K), "lora_B": (N, r), "m": (r,)},
    "VeRA": {"lora_A": (r, K), "lora_B": (N, r), "m": (r,), "d_out": (N,)},
    "all vectors": {"lora_A": (r, K), "lora_B": (N, r), "d_in": (K,), "m": (r,), "d_out": (N,)},
    "LoRA-XS": {"lora_A": (r, K), "lora_B": (N, r), "m": (r, r)},
    "LoKr": {"w1": (5, 4), "w2": (8, 6)},
    "LoKr of a pair": {"w1": (5, 4), "w2_a": (8, 2), "w2_b": (2, 6)},
    "OFT": {"blocks": (4, 6, 6)},
}


def drawn(kind, dtype=torch.float64, adapter_dtype=torch.float64, *leading):
    t = {
        "x": torch.randn(*(leading or (2, M)), K).to(dtype),
        "weight": (torch.randn(N, K) / K**0.5).to(dtype),
        "bias": torch.randn(N).to(dtype),
    }
    shapes = ADAPTERS[kind].items()
    return t | {name: torch.randn(shape).to(adapter_dtype) for name, shape in shapes}


def computed(rooms, t):
    """``y`` by ``functional`` or by ``reference``, whose functions bear the same names."""
    t = dict(t)
    if "blocks" in t:
        return rooms.oft_linear(**t)
    if "lora_A" in t:
        return rooms.scaled_lora_linear(**t, scaling=0.7)
    w2 = t.pop("w2") if "w2" in t else (t.pop("w2_a"), t.pop("w2_b"))
    return rooms.lokr_linear(**t, w2=w2, scaling=0.7)


def outputs(rooms, t, dy):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    y = computed(rooms, leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize(("kind", "dtype"), covering(list(ADAPTERS), list(DTYPES)))
def test_every_gradient(kind, dtype):
    dtype, adapter_dtype = DTYPES[dtype]
    t = drawn(kind, dtype, adapter_dtype)
    dy = torch.randn(2, M, N).to(dtype)
    found, eager = outputs(functional, t, dy), outputs(reference, t, dy)
    exact = outputs(reference, {n: v.double() for n, v in t.items()}, dy.double())
    # As squares, the sum that each output is.
    squared = {n: v.double().square() for n, v in t.items()}
    size = {n: v.sqrt() for n, v in outputs(reference, squared, dy.double().square()).items()}
    reason = contract.why_any_broken(found, contract.bounds(eager, exact, size, dtype=dtype))
    assert reason is None, reason


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_vectors_are_sums_of_many_terms(seed):
    """``d_out·dB'`` over 4096 rows, as a product with a vector, has twice the error allowed."""
    torch.manual_seed(seed)
    rows, wide, high, rank = 32, 16, 4096, 64
    t = {
        "x": torch.randn(rows, wide),
        "weight": torch.randn(high, wide),
        "lora_A": torch.randn(rank, wide),
        "lora_B": torch.randn(high, rank),
        "m": torch.randn(rank),
        "d_out": torch.randn(high),
    }
    dy = torch.randn(rows, high)
    exact = outputs(reference, {n: v.double() for n, v in t.items()}, dy.double())
    bounds = contract.bounds(outputs(reference, t, dy), exact)
    reason = contract.why_any_broken(outputs(functional, t, dy), bounds)
    assert reason is None, reason


@pytest.mark.parametrize("kind", ADAPTERS)
def test_derivatives(kind):
    """First and second, of every argument."""
    t = {
        name: tensor.requires_grad_()
        for name, tensor in drawn(kind, *[torch.float64] * 2, 2).items()
    }

    def layer(*tensors):
        return computed(functional, dict(zip(t, tensors, strict=True)))

    torch.autograd.gradcheck(layer, tuple(t.values()), fast_mode=True)
    torch.autograd.gradgradcheck(layer, tuple(t.values()), fast_mode=True)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_shapes_and_what_is_kept(kind):
    for leading in ((0,), (1,), (2, 3, 4)):
        t = drawn(kind, torch.float32, torch.float32, *leading)
        assert computed(functional, t).shape == (*leading, N)
    t = drawn(kind, torch.float32, torch.float32, 1000)
    for name in ADAPTERS[kind]:
        t[name].requires_grad = True
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        computed(functional, t)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 1000 * r}
    assert large == {t["x"].data_ptr()}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_batched_gradients(kind):
    """``is_grads_batched``, as in ``jacobian(vectorize=True)``, against one gradient after another."""
    t = {n: v.requires_grad_() for n, v in drawn(kind, *[torch.float64] * 2, 2).items()}
    y = computed(functional, t)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    keep = {"retain_graph": True}
    found = torch.autograd.grad(y, list(t.values()), dys, is_grads_batched=True, **keep)
    each = [torch.autograd.grad(y, list(t.values()), dy, **keep) for dy in dys]
    for name, gradient, expected in zip(t, found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack(expected), msg=name)


def by_delta(x, weight, w1, w2, scaling, bias):
    """LoKr as PEFT has it, of ΔW."""
    w2 = w2[0] @ w2[1] if isinstance(w2, tuple) else w2
    return F.linear(x, weight, bias) + F.linear(x, scaling * torch.kron(w1, w2))


@pytest.mark.parametrize("kind", ["LoKr", "LoKr of a pair"])
def test_lokr_in_float16_has_no_product_that_overflows(kind):
    """``x·w2ᵀ`` is beyond 65,504, ΔW and all that is given back are not."""
    t = drawn(kind, torch.float16, torch.float16)
    t["x"] *= 100
    t["w2" if "w2" in t else "w2_a"] *= 1000
    t["w1"] /= 2**16
    dy = torch.randn(2, M, N).half() / 2**10
    rooms = SimpleNamespace(lokr_linear=by_delta)
    found, eager = outputs(functional, t, dy), outputs(rooms, t, dy)
    exact = outputs(reference, {n: v.double() for n, v in t.items()}, dy.double())
    reason = contract.why_any_broken(found, contract.bounds(eager, exact, dtype=torch.float16))
    assert reason is None, reason


def test_the_formula_in_vectors():
    t = drawn("all vectors")
    change = t["d_out"][:, None] * t["lora_B"] @ (t["m"][:, None] * t["lora_A"]) * t["d_in"]
    expected = t["x"] @ (t["weight"] + 0.7 * change).t() + t["bias"]
    torch.testing.assert_close(computed(functional, t), expected)
    torch.testing.assert_close(computed(reference, t), expected)


def test_dropout_has_the_mask_of_lora_linear():
    t = drawn("all vectors", torch.float32, torch.float32)
    torch.manual_seed(3)
    y = functional.scaled_lora_linear(**t, scaling=0.7, dropout_p=0.4)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    expected = reference.scaled_lora_linear(**t, scaling=0.7, dropout_p=0.4, seed=seed)
    torch.testing.assert_close(y, expected)
    kept = functional.scaled_lora_linear(**t, scaling=0.7, dropout_p=0.4, training=False)
    torch.testing.assert_close(kept, computed(functional, t))


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("VeRA", "m", torch.ones(4), r"m has shape \[4\], expected \[3\]"),
        ("VeRA", "m", torch.ones(4, 4), r"m has shape \[4, 4\], expected \[3, 3\]"),
        ("VeRA", "d_out", torch.ones(K), r"d_out has shape \[24\], expected \[40\]"),
        ("all vectors", "d_in", torch.ones(K).long(), "d_in is torch.int64, expected float16"),
        ("LoKr", "w1", torch.ones(5, 5), r"w1 ⊗ w2 has shape \[40, 30\], expected \[40, 24\]"),
        ("LoKr of a pair", "w2_b", torch.ones(3, 6), r"w2\[1\] has shape \[3, 6\], expected \[2, "),
        (
            "OFT",
            "blocks",
            torch.ones(4, 5, 6),
            r"blocks has shape \[4, 5, 6\], expected \[count, k",
        ),
        ("LoKr", "w2", [torch.ones(8, 6)], "w2 is a list, expected a tensor or a tuple of two"),
        ("LoKr", "w2", None, "w2 is a NoneType, expected a tensor"),
        ("LoKr", "w2", (torch.ones(8, 6),) * 3, "w2 is a tuple of 3, expected a tensor"),
        ("LoKr", "w2", torch.ones(8, 0), r"w2 has shape \[8, 0\], expected no size of 0"),
        ("LoKr", "w1", torch.ones(0, 4), r"w1 has shape \[0, 4\], expected no size of 0"),
        ("LoKr", "w1", torch.ones(5, 4).to_sparse(), "w1 is torch.sparse_coo, expected a strided"),
        ("LoKr", "weight", torch.ones(N, K).to_sparse(), "weight is torch.sparse_coo, expected a"),
        ("OFT", "weight", torch.ones(N, 0), r"weight has shape \[40, 0\], expected no size of 0"),
        ("OFT", "blocks", torch.ones(0, 6, 6), r"blocks has shape \[0, 6, 6\], expected no size"),
        ("OFT", "blocks", torch.ones(4, 6, 6).to_sparse(), "blocks is torch.sparse_coo, expected"),
        ("VeRA", "m", torch.ones(r).to_sparse(), "m is torch.sparse_coo, expected a strided"),
        ("LoRA", "lora_A", torch.ones(r, K).to_sparse(), "lora_A is torch.sparse_coo, expected a"),
        ("OFT", "x", torch.ones(2, 5), r"x has shape \[2, 5\], expected \[..., 24\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(kind, name, value, message):
    t = drawn(kind, torch.float32, torch.float32) | {name: value}
    with pytest.raises((TypeError, ValueError), match=message):
        computed(functional, t)
