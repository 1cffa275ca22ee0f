"""Accelerated layers under what looks into them: transforms, dual numbers, modes, saved tensors."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import func, nn

pytest.importorskip("peft")

import peft_twins
from helpers import covering
from peft_twins import assert_equal, assert_near, peft_model, twins
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

NAMES = ["default", "__base__", "other1", "other2", "other1", "default"]
KINDS = {
    "linear": {},
    "lora_bias": {"lora_bias": True},
    "three adapters": {"adapters": 3},
    "dora": {"use_dora": True},
    "conv1d": {"kind": "conv1d"},
    "embedding": {"kind": "embedding"},
    "mixed batch": {"adapters": 3},
}


@pytest.fixture(params=["few rows", "many rows"])
def sizes(request, monkeypatch):
    """Layers that go through the fewest calls, and those that don't."""
    K, N, rows = (256, 240, 300) if request.param == "many rows" else (24, 40, 6)
    monkeypatch.setattr(peft_twins, "K", K)
    monkeypatch.setattr(peft_twins, "N", N)
    return K, N, rows


class Case(nn.Module):
    """A model with the arguments of its call; ``context`` makes what a forward runs in."""

    def __init__(self, model, arguments, context=None):
        super().__init__()
        self.model, self.arguments, self.context = model, arguments, context

    def forward(self, x):
        if self.context is None:
            return self.model(x, **self.arguments)
        with self.context():
            return self.model(x, **self.arguments)


def case(kind, sizes, context=None):
    K, N, rows = sizes
    pair = twins(peft_model(**KINDS[kind]).eval())
    mixed = kind == "mixed batch"
    arguments = {"adapter_names": NAMES} if mixed else {}
    for name, model in vars(pair).items():
        setattr(pair, name, Case(model, arguments, context))
    if kind == "embedding":
        return pair, torch.randint(peft_twins.TOKENS, (rows,)), torch.randn(rows, N)
    leading = (len(NAMES), rows // len(NAMES)) if mixed else (rows,)
    return pair, torch.randn(*leading, K), torch.randn(*leading, N)


def compare(pair, x, do):
    """``do(model, x)`` gives tensors by name; the fast model's are as near as stock's."""
    found = []
    for name, model in vars(pair).items():
        wide = x.double() if name == "exact" and x.is_floating_point() else x
        torch.manual_seed(0)
        found.append({n: t.detach() for n, t in do(model, wide).items()})
    stock, fast, exact = found
    assert_near(fast, stock, exact, torch.float32)


def like(tensor):
    """The same numbers for a float32 and a float64 tensor."""
    return torch.randn(tensor.shape).to(tensor.dtype)


def trained(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    return lambda parameters, x: func.functional_call(model, parameters, (x,)).square().sum()


TRANSFORMS = {}


def transform(function):
    TRANSFORMS[function.__name__] = function
    return function


@transform
def grad(f, p, x):
    return func.grad(f)(p, x)


@transform
def vjp(f, p, x):
    y, pull = func.vjp(lambda p: f(p, x), p)
    return pull(torch.ones_like(y))[0]


@transform
def jvp(f, p, x):
    y, dy = func.jvp(lambda p: f(p, x), (p,), ({n: 1.5 * t for n, t in p.items()},))
    return {"y": y, "dy": dy}


@transform
def linearize(f, p, x):
    y, push = func.linearize(lambda p: f(p, x), p)
    return {"y": y, "dy": push({n: 1.5 * t for n, t in p.items()})}


def _scaled(f, p, x):
    return lambda s: f({n: t * s for n, t in p.items()}, x)


@transform
def jacfwd(f, p, x):
    return {"dy": func.jacfwd(_scaled(f, p, x))(next(iter(p.values())).new_ones(()))}


@transform
def hessian(f, p, x):
    return {"d2y": func.hessian(_scaled(f, p, x))(next(iter(p.values())).new_ones(()))}


@transform
def vmap(f, p, x):
    return {"y": func.vmap(f, in_dims=(None, 0))(p, torch.stack([x, x.flip(0)]))}


@transform
def ensemble(f, p, x):
    stacked = {n: torch.stack([t, 2 * t]) for n, t in p.items()}
    return func.vmap(func.grad(f), in_dims=(0, None))(stacked, x)


@pytest.mark.parametrize(
    ("kind", "name", "sizes"),
    covering(list(KINDS), list(TRANSFORMS), ("few rows", "many rows")),
    indirect=["sizes"],
)
def test_transforms(kind, name, sizes):
    if (name, kind) == ("ensemble", "mixed batch"):
        pytest.skip("stock PEFT changes its result in place, which vmap forbids")
    pair, x, _ = case(kind, sizes)
    compare(pair, x, lambda m, x: TRANSFORMS[name](loss_of(m), trained(m), x))


QUICK = [("jvp", "linear"), ("grad", "dora"), ("grad", "embedding"), ("ensemble", "linear")]
MORE = [
    *(("jvp", kind) for kind in ("dora", "embedding", "mixed batch")),
    ("jacfwd", "linear"),
    *(("grad", kind) for kind in ("linear", "three adapters")),
]


@pytest.mark.parametrize(
    ("name", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_compiled_transforms(name, kind):
    torch._dynamo.reset()
    pair, x, _ = case(kind, (peft_twins.K, peft_twins.N, 300))

    def do(model, x):
        f = loss_of(model)
        run = lambda p, x: TRANSFORMS[name](f, p, x)  # noqa: E731
        if model is pair.fast:
            run = torch.compile(run, backend="eager")
        return run(trained(model), x)

    compare(pair, x, do)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, grad_mode, sizes):
    pair, x, _ = case(kind, sizes)

    def do(model, x):
        with torch.set_grad_enabled(grad_mode), fw.dual_level():
            x = fw.make_dual(x, like(x)) if x.is_floating_point() else x
            duals = {n: fw.make_dual(p, like(p)) for n, p in trained(model).items()}
            y, dy = fw.unpack_dual(func.functional_call(model, duals, (x,)))
            return {"y": y, "dy": dy}

    compare(pair, x, do)


@contextlib.contextmanager
def numpy_hooks():
    """What is saved goes through another kind of memory."""
    with saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        yield


CONTEXTS = {"save_on_cpu": save_on_cpu, "saved_tensors_hooks": numpy_hooks}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_may_be_moved(kind, context, sizes):
    pair, x, dy = case(kind, sizes, CONTEXTS[context])
    assert_equal(pair, x, dy, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_counted(kind, sizes):
    """FLOPs of forward and backward, as of stock PEFT."""
    pair, x, dy = case(kind, sizes)
    counts = []
    for model in (pair.stock, pair.fast):
        with FlopCounterMode(display=False) as counter:
            model(x).backward(dy)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["linear", "dora", "embedding"])
def test_compiled_autograd(kind):
    torch._dynamo.reset()
    pair, x, dy = case(kind, (peft_twins.K, peft_twins.N, 6))

    def do(model, x):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
        with compiled if model is pair.fast else contextlib.nullcontext():
            model(leaf).backward(dy.to(next(model.parameters()).dtype))
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found | ({"x": leaf.grad} if leaf.is_floating_point() else {})

    compare(pair, x, do)


class Keeping(TorchDispatchMode):
    """Keeps the result of every operation, as it was, but for views and what it changes in place."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and not operation._schema.is_mutable
        if made and not operation.is_view and "empty" not in str(operation):
            self.kept.append((str(operation), result, result.clone()))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mode_keeps_stays_as_it_was(kind, sizes):
    pair, x, dy = case(kind, sizes)
    with Keeping() as mode:
        pair.fast(x).backward(dy)
    assert mode.kept
    changed = {name for name, result, before in mode.kept if not torch.equal(result, before)}
    assert changed == set()


aten = torch.ops.aten
POLICIES = {
    "GEMMs": [aten.mm.default, aten.addmm.default],
    "all": [
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.index_add.default,
        aten.index_select.default, aten.embedding.default, aten.mul.Tensor, aten.add.Tensor,
        aten.addcmul.default, aten._to_copy.default, aten.t.default,
    ],
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing(kind, policy, sizes):
    """The gradients of a model that isn't checkpointed, and the output stays as it was."""
    pair, x, dy = case(kind, sizes)

    def contexts():
        return create_selective_checkpoint_contexts(POLICIES[policy])

    def checkpointed(model, x):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        y = checkpoint(model, leaf, use_reentrant=False, context_fn=contexts)
        before = y.detach().clone()
        y.backward(dy)
        assert torch.equal(y, before)
        return y, leaf.grad, [p.grad for p in model.parameters() if p.grad is not None]

    def plain(model, x):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        y = model(leaf)
        y.backward(dy)
        return y, leaf.grad, [p.grad for p in model.parameters() if p.grad is not None]

    expected = plain(pair.fast, x)
    pair.fast.zero_grad()
    torch.testing.assert_close(checkpointed(pair.fast, x), expected)
