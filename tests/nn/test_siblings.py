"""``Siblings``: when layers share x, when they don't, and that nobody can tell by the numbers."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast.backends import registry
from lorafast.core.problem import Layout
from lorafast.nn import LoRALinear, siblings
from lorafast.nn.problems import shared_problems
from lorafast.ops import siblings as shared_op
from lorafast.reference import contract

K, NAMES = 12, ("q", "k", "v")


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(shared_op, "FEWEST_ROWS", 1)
    monkeypatch.setattr(shared_op, "FEWEST_ELEMENTS", 1)


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The layers that each x was shared by."""
    found = []

    class Noted(shared_op.Shared):
        def __init__(self, x, by_key):
            super().__init__(x, by_key)
            found.append(len(by_key))

    monkeypatch.setattr(siblings, "Shared", Noted)
    return found


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        for name, N in zip(NAMES, (12, 8, 8), strict=True):
            layer = LoRALinear(K, N, 3, dtype=torch.float64, **options)
            nn.init.normal_(layer.lora_B)
            self.add_module(name, layer)

    def forward(self, x, context=None):
        context = x if context is None else context
        return torch.cat([self.q(x), self.k(context) * 2, self.v(context) ** 2], -1)


def pair(**options):
    """The same attention, with siblings and without."""
    fused, plain = Attention(**options), Attention(**options)
    siblings.tie([fused.q, fused.k, fused.v])
    return fused, plain


def x_of(*size, seed=1, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        *(size or (2, 5)), K, generator=generator, dtype=torch.float64
    ).requires_grad_(grad)


def gradients(model, call, *inputs):
    """Of every adapter and input, by name, after ``call``."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    model.zero_grad()
    y = call(model, *inputs)
    y.square().sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | named | {f"x{i}": x.grad for i, x in enumerate(inputs)}


def assert_same_numbers(fused, plain, call, *inputs):
    found, expected = gradients(fused, call, *inputs), gradients(plain, call, *inputs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], tensor, msg=lambda text, name=name: f"{name}: {text}"
            )


def forward(model, *inputs):
    return model(*inputs)


def test_siblings_share_x(made):
    fused, plain = pair()
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [3]
    assert "siblings=3" in repr(fused.k)
    assert "siblings" not in repr(plain.k)


def test_without_gradients(made):
    fused, plain = pair()
    with torch.no_grad():
        x = x_of(grad=False)
        torch.testing.assert_close(fused(x), plain(x))
    assert made == [3]
    assert fused.q._siblings[0]._kept is None


def test_another_x_for_some(made):
    assert_same_numbers(*pair(), forward, x_of(), x_of(3, 5, seed=2)[:2])
    assert made == [3, 3]


def test_what_is_left_is_made_no_more(made):
    """In cross attention q has an x of its own."""
    fused, plain = pair()
    for _ in range(4):
        assert_same_numbers(fused, plain, forward, x_of(), x_of(seed=2))
    assert made == [3, 3, 3, 3, 2, 2]
    made.clear()
    for _ in range(siblings._TRIED_AGAIN):
        assert_same_numbers(fused, plain, forward, x_of(), x_of(seed=2))
    assert set(made) == {2, 3}


def test_one_is_never_called(made):
    assert_same_numbers(*pair(), lambda m, x: m.k(x) + m.v(x) ** 2, x_of())
    assert made == [3]


def test_one_is_called_twice(made):
    assert_same_numbers(*pair(), lambda m, x: m.k(x) * m.k(x) + m.v(x) * m.k(x), x_of())
    assert made == [3, 3, 2]  # q has left its part twice


def test_the_same_x_in_two_steps(made):
    fused, plain = pair()
    x = x_of(grad=False)
    for _ in range(2):
        torch.testing.assert_close(fused(x), plain(x))
        with torch.no_grad():
            for model in (fused, plain):
                for p in model.parameters():
                    p.mul_(1.5)
    assert made == [3, 3]


CHANGES = {
    "x in place": lambda m, x: x.mul_(2),
    "lora_A in place": lambda m, x: m.k.lora_A.mul_(2),
    "lora_B in place": lambda m, x: m.k.lora_B.mul_(2),
    "weight in place": lambda m, x: m.k.weight.mul_(2),
    "another lora_A": lambda m, x: setattr(m.k, "lora_A", nn.Parameter(m.k.lora_A * 2)),
    "scaling": lambda m, x: setattr(m.k, "scaling", 3.0),
    "merged": lambda m, x: m.k.merge(),
    "dropout": lambda m, x: setattr(m.k, "dropout", 1.0),
    "on another backend": lambda m, x: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls(change, made):
    """What the first sibling has made for the others is of no use to them after it."""

    def call(model, x):
        first = model.q(x)
        CHANGES[change](model, x)
        with lorafast.use_backend("reference" if change == "on another backend" else "auto"):
            return torch.cat([first, model.k(x), model.v(x)], -1)

    fused, plain = pair()
    with torch.no_grad():
        torch.testing.assert_close(
            call(fused, x_of(grad=False)), call(plain, x_of(grad=False)), msg=change
        )
    assert made[0] == 3


def unfreeze_k(model, x):
    model.k.lora_A.requires_grad_()
    model.k.lora_B.requires_grad_()


TOGGLES = {  # frozen layers, whether x requires a gradient, what changes between two calls
    "x, all frozen": (NAMES, False, lambda m, x: x.requires_grad_()),
    "x, all trained": ((), False, lambda m, x: x.requires_grad_()),
    "x no more": ((), True, lambda m, x: x.requires_grad_(False)),
    "k": (("k",), True, unfreeze_k),
    "k, all frozen": (NAMES, False, unfreeze_k),
}


@pytest.mark.parametrize("toggle", TOGGLES)
def test_requires_grad_changes_between_two_calls(toggle, made):
    frozen, need_dx, change = TOGGLES[toggle]
    found = []
    for model in pair():
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        x = x_of(grad=need_dx)
        first = model.q(x)
        change(model, x)
        y = torch.cat([first, model.k(x) * 2, model.v(x) ** 2], -1)
        y.square().sum().backward()
        named = dict(model.named_parameters()) | {"x": x}
        found.append({name: t.grad for name, t in named.items() if t.grad is not None})
    assert made[0] == 3
    fused, plain = found
    assert fused.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, msg=f"d{name}")


UNCOUNTED = {
    "lora_A, then q again": lambda m, x: (m.k.lora_A.data.zero_(), m.q(x)),
    "x, then q again": lambda m, x: (x.data.mul_(2), m.q(x)),
    "x, then q with few rows": lambda m, x: (x.data.mul_(2), m.q(x[:0])),
    "x has other data": lambda m, x: setattr(x, "data", x.data * 2),
    "lora_A has other data": lambda m, x: setattr(m.k.lora_A, "data", m.k.lora_A.data * 2),
}


@pytest.mark.parametrize("change", UNCOUNTED)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_change_that_has_no_version(change, grad, made):
    """``k`` is not called with what ``q`` has made for it before."""
    found = []
    for model in pair():
        x = x_of(grad=False)
        with torch.set_grad_enabled(grad):
            kept = model.q(x)
            UNCOUNTED[change](model, x)
            found.append(model.k(x))
        del kept
    torch.testing.assert_close(*found)
    assert made[0] == 3


def test_a_share_is_not_kept_by_a_call_that_cannot_share(made):
    fused, _ = pair()
    with torch.no_grad():
        fused.q(x_of(grad=False))
        assert fused.q._siblings[0]._kept is not None
        with torch.inference_mode():
            fused.q(x_of(grad=False))
    assert fused.q._siblings[0]._kept is None
    assert made == [3]


def test_one_that_was_alone_shares_again(made):
    fused, _ = pair()
    for _ in range(siblings._ENOUGH):
        fused.q(x_of())
    for _ in range(siblings._TRIED_AGAIN):
        fused(x_of())
    assert made[-1] == 3  # by q, not by k for itself and v


def test_devices_on_which_only_a_backward_is_shared(made, monkeypatch):
    monkeypatch.setattr(shared_op, "SHARED_WITH_A_BACKWARD", ("cpu",))
    fused, plain = pair()
    with torch.no_grad():
        torch.testing.assert_close(fused(x_of()), plain(x_of()))
    assert made == []
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [3]


def test_gradients_asked_for_between_two_calls(made):
    fused, plain = pair()
    x = x_of()
    with torch.no_grad():
        fused.q(x)
    assert_same_numbers(fused, plain, forward, x)
    assert made == [3, 3]


def test_a_backward_between_two_calls(made):
    """With the same x, and a y that is still there."""
    fused, plain = pair()
    found = []
    for model in (fused, plain):
        x = x_of()
        y = model.q(x)
        y.sum().backward()
        (model.k(x) * model.v(x)).sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(*found)
    assert made == [3, 3]


def test_an_error_between_two_calls(made):
    def call(model, x):
        with pytest.raises(ValueError, match="x has shape"):
            model.k(torch.cat([x, x], -1))
        return model(x)

    assert_same_numbers(*pair(), call, x_of())
    assert made == [3]


def test_dropout_is_each_layers_own(made):
    def call(model, x):
        torch.manual_seed(3)
        return model(x)

    fused, plain = pair(dropout=0.5)
    assert_same_numbers(fused, plain, call, x_of())
    assert made == []
    assert_same_numbers(fused.eval(), plain.eval(), forward, x_of())
    assert made == [3]


def test_one_that_is_unlike_is_alone(made):
    fused, plain = pair()
    for model in (fused, plain):
        model.v.lora_A.data, model.v.lora_B.data = model.v.lora_A.float(), model.v.lora_B.float()
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [2]


def test_dora_is_alone(made):
    fused, plain = pair(use_dora=True)
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == []


@pytest.mark.parametrize("needs_dx", [True, False])
def test_a_frozen_one(needs_dx, made):
    fused, plain = pair()
    for model in (fused, plain):
        model.k.requires_grad_(False)
    assert_same_numbers(fused, plain, forward, x_of(grad=needs_dx))
    assert made == [3 if needs_dx else 2]


def test_an_unfrozen_weight_is_alone(made):
    fused, plain = pair()
    for model in (fused, plain):
        model.q.weight.requires_grad_()
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [2]


def test_unequal_ranks(made):
    fused, plain = pair()
    for model in (fused, plain):
        torch.manual_seed(2)
        model.k = LoRALinear(K, 8, 7, alpha=3.0, bias=False, dtype=torch.float64)
        nn.init.normal_(model.k.lora_B)
    siblings.tie([fused.q, fused.k, fused.v])
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [3]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("context", [False, True], ids=["self", "cross"])
def test_checkpointing(reentrant, context, made):
    inputs = [x_of(), x_of(seed=2)][: 1 + context]

    def call(model, *inputs):
        return checkpoint(model, *inputs, use_reentrant=reentrant)

    fused, plain = pair()
    for _ in range(3):  # whatever it learns meanwhile
        assert_same_numbers(fused, plain, call, *inputs)
    assert made


def test_a_checkpoint_around_one_of_them(made):
    def call_apart(model, x):
        y = torch.cat([model.q(x), checkpoint(model.k, x, use_reentrant=False)], -1)
        return torch.cat([y, model.v(x)], -1)

    assert_same_numbers(*pair(), call_apart, x_of())
    assert made


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_siblings_among_themselves(transfer, made):
    fused, plain = pair()
    copied = transfer(fused)
    assert copied.q._siblings[0] is copied.v._siblings[0] is not fused.q._siblings[0]
    assert_same_numbers(copied, plain, forward, x_of())
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [3, 3]
    lonely = transfer(fused.q)
    torch.testing.assert_close(lonely(x_of()), plain.q(x_of()))
    assert copy.copy(fused.q)._siblings is None
    assert made == [3, 3]


def test_graphs_are_not_kept():
    """Of a sibling that is never called neither."""
    fused, _ = pair()
    x = x_of()
    y = fused.q(x)
    gone = weakref.ref(fused.q._siblings[0]._shared())
    del y
    gc.collect()
    assert gone() is None
    assert fused.q._siblings[0]._kept is None


def test_threads(made):
    fused, plain = pair()
    failed = []

    def work(seed):
        try:
            for step in range(20):
                x = x_of(seed=100 * seed + step, grad=False)
                torch.testing.assert_close(fused(x), plain(x))
        except Exception as error:  # which a thread doesn't raise for those who join it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert made


def test_compiled_code_has_them_one_by_one(made):
    fused, plain = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same_numbers(fused, plain, lambda m, x: (compiled if m is fused else m)(x), x_of())
    assert made == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["of x", "not of x"])
def test_autocast(dtype, made):
    def call(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    fused, plain = pair()
    for model in (fused, plain):
        for layer in model.children():
            layer.weight.data, layer.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    x = x_of(70).to(dtype).detach().requires_grad_()
    with lorafast.use_backend("reference"):
        found, expected = gradients(fused, call, x), gradients(plain, call, x)
    exact = gradients(copy.deepcopy(plain).double(), forward, x.double())
    for name, tensor in expected.items():
        if name == "x0":  # which is summed otherwise
            reason = contract.why_broken(found[name], tensor, exact[name])
            assert reason is None, reason
        else:
            assert torch.equal(found[name], tensor), name
    assert made == ([3] if dtype is torch.bfloat16 else [])


def test_surroundings_that_see_every_operation(made):
    fused, plain = pair()
    x = x_of(grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(fused(x.clone()), plain(x))
    found = torch.func.vmap(torch.func.grad(lambda x: fused(x).sum()))(x)
    expected = torch.func.vmap(torch.func.grad(lambda x: plain(x).sum()))(x)
    torch.testing.assert_close(found, expected)
    assert made == []


def test_a_merged_one_and_back(made):
    fused, plain = pair()
    for model in (fused, plain):
        model.v.merge()
    torch.testing.assert_close(fused(x_of()), plain(x_of()))
    for model in (fused, plain):
        model.v.unmerge()
    assert_same_numbers(fused, plain, forward, x_of())
    assert made == [2, 3]


def test_tied_layers(made):
    """One layer by two names: its second call is another."""
    fused, plain = pair()
    for model in (fused, plain):
        model.v = model.k
    assert_same_numbers(fused, plain, forward, x_of())
    assert made


def test_views_of_weights(made):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layers = [LoRALinear.from_linear(conv1d(N, K).double(), 3) for N in (5, 7)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = x_of()
    expected = [F.linear(x, layer.merged_weight(), layer.bias) for layer in layers]
    siblings.tie(layers)
    torch.testing.assert_close([layer(x) for layer in layers], expected)
    assert made == [2]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_explain_asks_backends_what_a_step_asks(grad, monkeypatch):
    fused, _ = pair()
    asked, choose = [], registry.choose

    def noted(problem, name):
        asked.append(problem)
        return choose(problem, name)

    shared_op._runs.clear()
    monkeypatch.setattr(shared_op.registry, "choose", noted)
    x = x_of(64, 5)
    with torch.set_grad_enabled(grad):
        y = fused(x)
        if grad:
            y.sum().backward()
        described = shared_problems([fused.q, fused.k, fused.v], x)
    fresh = Layout.of(torch.empty(2, 12, dtype=x.dtype))  # here each dy is a part of one tensor
    asked = {p._replace(layouts=p.layouts._replace(dy=fresh)) for p in asked}
    assert asked == {p._replace(layouts=p.layouts._replace(dy=fresh)) for p in described}
    assert [p.operation for p in described].count("linear_expand") == 3 + grad
    assert {p.r for p in described if "shrink" in p.operation} == {9}
