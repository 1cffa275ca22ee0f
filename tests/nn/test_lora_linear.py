import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from toy_formats import FORMATS

from lorafast import reference
from lorafast.nn import LoRALinear
from lorafast.nn.plain import move_hooks
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")
in_every_format = pytest.mark.parametrize("format", FORMATS)


def layer(K=7, N=5, r=3, *, dtype=torch.float64, format="dense", bias=True, **options):
    if format == "dense":
        made = LoRALinear(K, N, r, dtype=dtype, bias=bias, **options)
    else:
        linear = nn.Linear(K, N, bias, dtype=dtype)
        weight = FORMATS[format](linear.weight.detach())
        made = LoRALinear.from_operand(weight, r, bias=linear.bias, **options)
    nn.init.normal_(made.lora_B)
    return made


@in_every_format
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.0),
        ({"alpha": 8}, 2.0),
        ({"alpha": 8, "use_rslora": True}, 4.0),
        ({"use_rslora": True}, 2.0),
    ],
    ids=str,
)
def test_it_is_the_formula(format, bias, options, scaling):
    made = layer(r=4, bias=bias, format=format, **options)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    assert made.scaling == scaling
    W = made.base_weight() + scaling * made.lora_B @ made.lora_A
    expected = F.linear(x, W, made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_parameters_and_which_are_trained():
    made = LoRALinear(7, 5, 3)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert shapes == {"weight": (5, 7), "bias": (5,), "lora_A": (3, 7), "lora_B": (5, 3)}
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert list(made.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_a_fresh_layer_is_the_plain_layer_bit_for_bit():
    linear = nn.Linear(64, 48)
    x = torch.randn(9, 64)
    assert torch.equal(LoRALinear.from_linear(linear, 4)(x), linear(x))


def test_the_adapter_starts_as_in_peft():
    torch.manual_seed(0)
    made = LoRALinear(400, 300, 64)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5)
    assert made.lora_A.abs().max() <= bound
    assert made.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not made.lora_B.any()


@in_every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapter_dtype(format, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer(dtype=dtype, format=format).lora_A.dtype == expected
    made = layer(dtype=dtype, format=format, adapter_dtype=torch.bfloat16)
    assert made.lora_B.dtype == torch.bfloat16


@in_every_format
def test_mixed_precision_trains_in_the_dtype_of_each(format):
    made = layer(32, 16, 4, dtype=torch.bfloat16, format=format)
    x = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    y = made(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert made.lora_A.grad.dtype == made.lora_B.grad.dtype == torch.float32


class TestFromLinear:
    def test_shares_the_parameters(self):
        linear = nn.Linear(7, 5)
        made = LoRALinear.from_linear(linear, 3)
        assert made.weight is linear.weight
        assert made.bias is linear.bias
        assert not linear.weight.requires_grad

    def test_takes_over_mode_and_hooks(self):
        linear = nn.Linear(7, 5).eval()
        calls = []
        handle = linear.register_forward_hook(lambda *_: calls.append("after"))
        linear.register_forward_pre_hook(lambda *_: calls.append("before"))
        made = LoRALinear.from_linear(linear, 3)
        assert not made.training
        made(torch.randn(2, 7))
        assert calls == ["before", "after"]
        handle.remove()
        made(torch.randn(2, 7))
        assert calls == ["before", "after", "before"]

    def test_on_meta(self):
        made = LoRALinear.from_linear(nn.Linear(7, 5, device="meta"), 3)
        assert made.lora_A.is_meta
        assert made(torch.randn(2, 7, device="meta")).shape == (2, 5)
        made = made.to_empty(device="cpu")
        made.reset_parameters()
        assert made(torch.randn(2, 7)).isfinite().all()

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: nn.Conv1d(3, 3, 1), "it is a Conv1d, expected an nn.Linear"),
            (lambda: nn.LazyLinear(3), "it is a LazyLinear whose shape is not known yet"),
            (
                lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
                "its weight is computed by a parametrization",
            ),
            (
                lambda: prune.l1_unstructured(nn.Linear(3, 3), "bias", 0.5),
                "its bias is computed by a parametrization",
            ),
            (lambda: Doubled(3, 3), "its forward is not that of nn.Linear (Doubled)"),
            (
                lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn),
                "its weight is torch.float8_e4m3fn, expected float16, bfloat16, float32 or float64",
            ),
            (
                lambda: nn.Linear(3, 3, dtype=torch.complex64),
                "its weight is torch.complex64, expected float16",
            ),
        ],
        ids=["not-linear", "lazy", "parametrized", "pruned-bias", "subclass", "float8", "complex"],
    )
    def test_refusal(self, make, sentence):
        with pytest.raises(TypeError, match=re.escape(sentence)):
            LoRALinear.from_linear(make(), 2)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"r": 0}, "r is 0, expected an integer of at least 1"),
            ({"alpha": math.nan}, "alpha is nan, expected a finite number"),
            ({"dropout": "0.1"}, "dropout is '0.1', expected a probability from 0 to 1"),
            ({"adapter_dtype": torch.float8_e4m3fn}, "adapter_dtype is torch.float8_e4m3fn"),
        ],
        ids=["r", "alpha", "dropout", "adapter_dtype"],
    )
    def test_a_refused_layer_is_left_alone(self, options, sentence):
        linear = nn.Linear(7, 5)
        with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
            LoRALinear.from_linear(linear, **{"r": 2} | options)
        assert linear.weight.requires_grad
        assert linear.bias.requires_grad


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((4, 4, 0), {}, ValueError, "r is 0, expected an integer of at least 1"),
        ((4, 4, -1), {}, ValueError, "r is -1"),
        ((4, 4, 2.0), {}, ValueError, "r is 2.0, expected an integer"),
        ((4, 4, 2), {"dropout": 1.5}, ValueError, "dropout is 1.5, expected a probability"),
        ((4, 4, 2), {"dropout": True}, ValueError, "dropout is True, expected a probability"),
        ((4, 4, 2), {"alpha": math.inf}, ValueError, "alpha is inf, expected a finite number"),
        ((4, 4, 2), {"alpha": "high"}, ValueError, "alpha is 'high', expected a finite number"),
        ((4, 4, 2), {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
        ((4, 4, 2), {"adapter_dtype": "float32"}, TypeError, "adapter_dtype is 'float32'"),
        (
            (4, 4, 2),
            {"dtype": torch.float8_e5m2},
            TypeError,
            "dtype is torch.float8_e5m2, expected",
        ),
    ],
    ids=[
        "r=0",
        "r<0",
        "r-float",
        "dropout",
        "dropout-bool",
        "alpha-inf",
        "alpha-text",
        "adapter-dtype",
        "adapter-dtype-text",
        "dtype",
    ],
)
def test_refusal(arguments, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        LoRALinear(*arguments, **options)


class TestStateDict:
    def test_a_plain_checkpoint_loads_as_it_is(self):
        made, linear = layer(dtype=torch.float32), nn.Linear(7, 5)
        lora_A = made.lora_A.clone()
        assert made.load_state_dict(linear.state_dict()) == ([], [])
        assert torch.equal(made.weight, linear.weight)
        assert torch.equal(made.lora_A, lora_A)

    def test_a_plain_checkpoint_loads_inside_a_model(self):
        plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7))
        adapted = nn.Sequential(LoRALinear(7, 5, 2), LoRALinear(5, 7, 2))
        assert adapted.load_state_dict(plain.state_dict()) == ([], [])

    @in_every_format
    def test_round_trip(self, format):
        one, two = layer(format=format), layer(format=format)
        two.load_state_dict(one.state_dict())
        x = torch.randn(3, 7, dtype=torch.float64)
        assert torch.equal(one(x), two(x))

    @pytest.mark.parametrize(
        ("format", "missing"),
        [
            *(("dense", name) for name in ("lora_A", "lora_B", "weight", "bias")),
            *(("scaled", name) for name in ("lora_A", "lora_B", "values", "exponents", "bias")),
        ],
    )
    def test_half_a_checkpoint_is_refused(self, format, missing):
        state = layer(format=format).state_dict()
        del state[missing]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"|, and no {missing}'):
            layer(format=format).load_state_dict(state)

    def test_a_plain_checkpoint_into_a_parametrized_adapter_names_what_is_missing(self):
        made = layer()
        nn.utils.parametrizations.spectral_norm(made, "lora_A")
        with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.lora_A"):
            made.load_state_dict(nn.Linear(7, 5).state_dict())

    @in_every_format
    def test_loading_into_a_merged_layer_merges_again(self, format):
        one, two = layer(format=format), layer(format=format)
        two.merge()
        two.load_state_dict(one.state_dict())
        x = torch.randn(3, 7, dtype=torch.float64)
        torch.testing.assert_close(two(x), one(x), rtol=1e-12, atol=1e-12)


class TestMerge:
    @in_every_format
    def test_merged_is_the_same_function_and_unmerging_is_exact(self, format):
        made = layer(dropout=0.5, format=format)
        x = torch.randn(3, 7, dtype=torch.float64)
        before, state = made.eval()(x), copy.deepcopy(made.state_dict())
        made.merge()
        assert made.merged
        torch.testing.assert_close(made(x), before, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(made.state_dict()[key], state[key]) for key in state)
        made.unmerge()
        assert not made.merged
        assert torch.equal(made(x), before)

    @in_every_format
    def test_merging_again_takes_the_current_adapter(self, format):
        made = layer(format=format)
        x = torch.randn(3, 7, dtype=torch.float64)
        made.merge()
        nn.init.zeros_(made.lora_B)
        made.merge()
        assert torch.equal(made(x), F.linear(x, made.base_weight(), made.bias))

    @in_every_format
    def test_a_merged_layer_moves_with_its_model(self, format):
        made = layer(format=format)
        made.merge()
        made.float()
        assert made(torch.randn(3, 7)).dtype == torch.float32

    @in_every_format
    def test_the_sum_is_rounded_once(self, format):
        made = layer(dtype=torch.bfloat16, format=format)
        delta = made.scaling * made.lora_B.double() @ made.lora_A.double()
        exact = made.base_weight().double() + delta
        made.merge()
        merged = made._merged_weight.double()
        assert torch.linalg.norm(merged - exact) <= 2.0**-8 * torch.linalg.norm(exact)

    @in_every_format
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_to_linear(self, format, bias):
        made = layer(bias=bias, format=format)
        plain = made.to_linear()
        x = torch.randn(3, 7, dtype=torch.float64)
        assert type(plain) is nn.Linear
        assert not plain.weight.requires_grad
        torch.testing.assert_close(plain(x), made(x), rtol=1e-12, atol=1e-12)
        assert list(plain.state_dict()) == ["weight", "bias"][: 1 + bias]


def test_dropout_that_became_no_number_is_refused():
    layer = LoRALinear(3, 4, 2)
    layer.dropout = None
    with pytest.raises(TypeError, match="dropout_p is a NoneType, expected a number"):
        layer(torch.randn(2, 3))


def test_scaling_is_set_or_left():
    made = layer(r=4)
    made.set_scaling(8, use_rslora=True)
    with pytest.raises(ValueError, match="alpha is nan, expected a finite number"):
        made.set_scaling(math.nan)
    with pytest.raises(TypeError, match="use_rslora is None, expected True or False"):
        made.use_rslora = None
    assert (made.alpha, made.scaling, made.use_rslora) == (8.0, 4.0, True)


def test_hooks_move():
    calls = []
    made, linear = layer(dtype=torch.float32), nn.Linear(7, 5)
    handle = made.register_forward_hook(lambda *_: calls.append("hook"))
    move_hooks(made, linear)
    linear(torch.randn(2, 7))
    handle.remove()
    linear(torch.randn(2, 7))
    assert calls == ["hook"]


@in_every_format
def test_dropout_only_in_training(format):
    made = layer(dropout=0.5, format=format)
    x = torch.randn(30, 7, dtype=torch.float64)
    assert not torch.equal(made(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


@in_every_format
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_copies(format, clone, merged):
    made = layer(alpha=4, use_rslora=True, format=format)
    if merged:
        made.merge()
    twin = clone(made)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(twin(x), made(x))
    assert twin.bias is not made.bias
    assert twin.extra_repr() == made.extra_repr()
    trained = [name for name, p in twin.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B"]
    for name, tensor in made.state_dict().items():
        assert twin.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_functional_call():
    made = layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    other = {name: torch.randn_like(p) for name, p in made.named_parameters()}
    y = torch.func.functional_call(made, other, (x,))
    weight = other["weight"] + made.scaling * other["lora_B"] @ other["lora_A"]
    torch.testing.assert_close(y, F.linear(x, weight, other["bias"]), rtol=1e-12, atol=1e-12)


@in_every_format
def test_per_sample_gradients(format):
    made = layer(format=format)
    x = torch.randn(4, 7, dtype=torch.float64)
    parameters = {"lora_A": made.lora_A.detach(), "lora_B": made.lora_B.detach()}

    def loss(parameters, sample):
        return torch.func.functional_call(made, parameters, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        made.zero_grad()
        made(x[i]).square().sum().backward()
        torch.testing.assert_close(found["lora_A"][i], made.lora_A.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["lora_B"][i], made.lora_B.grad, rtol=1e-10, atol=1e-10)


@in_every_format
def test_a_parametrized_adapter(format):
    made = layer(format=format)
    nn.utils.parametrizations.spectral_norm(made, "lora_A")
    x = torch.randn(3, 7, dtype=torch.float64)
    made(x)  # which changes what the norm has estimated
    made.eval()
    W = made.base_weight() + made.scaling * made.lora_B @ made.lora_A
    expected = F.linear(x, W, made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)


@in_every_format
def test_training_lowers_the_loss_and_leaves_the_base_alone(format):
    made = layer(K=16, N=16, r=4, dtype=torch.float32, format=format)
    weight = made.base_weight().clone()
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(made(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(made.base_weight(), weight)


def test_repr_reads_as_the_constructor():
    made = LoRALinear(7, 5, 3, alpha=6, dropout=0.1, bias=False)
    assert repr(made) == (
        "LoRALinear(in_features=7, out_features=5, r=3, alpha=6, dropout=0.1, bias=False)"
    )


@in_every_format
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", [(200,), (5, 40)], ids=["matrix", "3-D"])
def test_batched_gradients(format, dropout, rows):
    made = layer(K=64, N=48, r=4, dtype=torch.float32, dropout=dropout, format=format)
    x = torch.randn(*rows, 64, requires_grad=True)
    y = made(x)
    inputs, every_dy = (x, made.lora_A, made.lora_B), torch.randn(3, *rows, 48)
    batched = torch.autograd.grad(y, inputs, every_dy, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(every_dy):
        single = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for one, two in zip(batched, single, strict=True):
            torch.testing.assert_close(one[i], two, rtol=1e-4, atol=1e-4)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()

    @in_every_format
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_one_graph_and_one_compilation_for_every_M(self, format, dropout):
        made = layer(K=16, N=24, r=4, dtype=torch.float32, dropout=dropout, format=format)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(made, fullgraph=True, backend=backend)
        for M in (3, 4, 5, 7, 64):
            x = torch.randn(M, 16)
            torch._dynamo.mark_dynamic(x, 0)
            assert compiled(x).shape == (M, 24)
        assert len(graphs) == 1

    @pytest.mark.parametrize(
        ("format", "compiler"),
        [("dense", "inductor"), ("negative", "aot_eager"), ("scaled", "aot_eager")],
    )
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_output_and_gradients_are_those_of_eager(
        self, dropout, bias, format, compiler, never_small
    ):
        never_small()
        options = {"dropout": dropout, "bias": bias, "format": format}
        made = layer(K=16, N=24, r=4, dtype=torch.float32, **options)
        compiled = torch.compile(made, fullgraph=True, backend=compiler)
        found = {}
        for name, run in (("eager", made), ("compiled", compiled)):
            made.zero_grad()
            torch.manual_seed(5)
            x = torch.linspace(-1, 1, 160).view(10, 16).requires_grad_()
            # Inductor draws random numbers of its own unless told to draw eager's.
            with torch._inductor.config.patch(fallback_random=True):
                y = run(x)
            y.square().sum().backward()
            found[name] = (y.detach(), x.grad, made.lora_A.grad, made.lora_B.grad)
        for name, one, two in zip(("y", "dx", "dA", "dB"), *found.values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)

    def test_checkpointing_and_dropout_and_compile_together(self):
        """The mask of the recomputation is that of the forward: dx shows which were dropped."""
        made = layer(K=40, N=40, r=1, dtype=torch.float32, dropout=0.5)
        with torch.no_grad():
            made.weight.zero_()
            made.bias.zero_()
            made.lora_A.fill_(1)
            made.lora_B.copy_(torch.eye(40)[:, :1])
        compiled = torch.compile(lambda x: checkpoint(made, x, use_reentrant=False), fullgraph=True)
        x = torch.eye(40).requires_grad_()
        y = compiled(x)
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
        forward_kept = y[:, 0] != 0
        backward_kept = dx.diagonal() != 0
        assert 5 < forward_kept.sum() < 35
        assert torch.equal(forward_kept, backward_kept)

    @pytest.mark.parametrize(
        ("format", "compiler"),
        [("dense", "inductor"), ("negative", "aot_eager"), ("scaled", "aot_eager")],
    )
    def test_autocast_inside(self, format, compiler):
        made = layer(K=16, N=24, r=4, dtype=torch.float32, format=format)

        @torch.compile(fullgraph=True, backend=compiler)
        def step(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return made(x)

        x = torch.randn(10, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = made(x)
        y = step(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)

    @in_every_format
    def test_refusals_while_tracing_name_the_argument(self, format):
        made = layer(K=16, N=24, r=4, dtype=torch.float32, format=format)
        with pytest.raises(Exception, match=r"x has shape \[3, 15\], expected \[\.\.\., 16\]"):
            torch.compile(made, fullgraph=True)(torch.randn(3, 15))

    @in_every_format
    def test_export(self, format):
        made = layer(K=16, N=24, r=4, dtype=torch.float32, format=format).eval()
        x = torch.randn(10, 16)
        exported = torch.export.export(made, (x,))
        torch.testing.assert_close(exported.module()(x), made(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("dense", torch.float32), ("dense", torch.bfloat16), ("scaled", torch.float32)],
    ids=str,
)
def test_another_scaling_is_no_graph_of_its_own(format, dtype):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    made = layer(64, 48, 8, dtype=dtype, format=format)
    counter = CompileCounter()
    compiled = torch.compile(made, backend=counter, fullgraph=True)
    x = torch.randn(20, 64).to(dtype)
    for alpha in (8.0, 16.0, 3.7, 5.5, 1.1):
        made.set_scaling(alpha)
        of_layer = (x, made.base_weight(), made.lora_A, made.lora_B)
        ref64 = reference.lora_linear(
            *(t.double() for t in of_layer), made.scaling, made.bias.double()
        )
        eager = reference.lora_linear(*of_layer, made.scaling, made.bias)
        for run in (compiled, made):
            assert contract.why_broken(run(x), eager, ref64) is None, alpha
    assert counter.frame_count <= 2  # the first other value makes the number a variable
