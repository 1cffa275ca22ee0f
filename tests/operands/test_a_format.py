"""Formats that the package has never heard of, beyond what the contract tests ask of them too."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import problems, skip_unless_usable
from hypothesis import given
from torch import nn
from toy_formats import FORMATS, Negative, NegativeLinear, Scaled

import lorafast
from lorafast import operands
from lorafast.backends import Refusal, registry
from lorafast.backends.cpu import native
from lorafast.functional import lora_linear
from lorafast.nn import LoRALinear
from lorafast.operands import Operand, operand
from lorafast.ops.problems import layer_problem
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")
FOREIGN = [name for name in FORMATS if name != "dense"]
in_each = pytest.mark.parametrize("format", FOREIGN)
N, K, r = 5, 6, 2


def draw(format, dtype=torch.float32, rows=3):
    """x, weight, A, B, bias."""
    x, W, A, B, bias = (torch.randn(s, dtype=dtype) for s in ((rows, K), (N, K), (r, K), (N, r), N))
    return x, FORMATS[format](W), A, B, bias


def made_layer(format, **options):
    _, weight, _, _, bias = draw(format, options.pop("dtype", torch.float32))
    layer = LoRALinear.from_operand(weight, r, bias=bias, **options)
    nn.init.normal_(layer.lora_B)
    return layer


class TestDescription:
    @in_each
    @pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
    def test_an_operand_is_built_again_from_its_tensors_and_its_description(self, format, cast):
        weight = draw(format)[1]
        weight = weight if cast is None else weight.to(cast)
        stored = operands.stored(weight)
        again = operands.build(stored, operands.describe(weight))
        assert type(again) is type(weight)
        assert (again.shape, again.dtype, again.cast) == (weight.shape, weight.dtype, weight.cast)
        assert all(one is two for one, two in zip(operands.stored(again), stored, strict=True))
        assert torch.equal(again.dense(), weight.dense())
        assert again.dense().dtype == weight.dtype

    @in_each
    def test_a_cast_back_is_the_operand_as_it_was(self, format):
        weight = draw(format)[1]
        back = weight.to(torch.bfloat16).to(torch.float32)
        assert back.cast is None
        assert operands.describe(back) == operands.describe(weight)

    @pytest.mark.parametrize(
        ("tensors", "description", "sentence"),
        [
            (1, "nf5|a||", "format is 'nf5', expected one of dense, "),
            (2, "negative|negative||", "weight has 2 tensors, expected negative"),
            (1, "scaled|values||2x2", "weight has values, and scaled needs 'exponents'"),
            (1, "negative", "format is 'negative', expected what lorafast.operands.describe gives"),
            (2, "dense", "weight has 2 tensors, expected one: it is dense"),
            (2, "scaled|values,exponents||3x3", "shapes [2, 2] and [2, 2], expected [9] and [3]"),
            (1, "negative|negative|nn|", "weight is cast to 'nn', expected the name of a dtype"),
        ],
    )
    def test_what_makes_no_weight_is_refused(self, tensors, description, sentence):
        given = [torch.randn(2, 2) for _ in range(tensors)]
        x, factor, s = torch.randn(3, 2), torch.randn(2, 2), torch.randn(3, 2)
        library = torch.ops.lorafast
        with pytest.raises(ValueError, match=re.escape(sentence)):
            library.lora_linear(x, given, description, factor, factor, 1.0)
        with pytest.raises(ValueError, match=re.escape(sentence)):
            library.linear_expand(x, given, description, s, factor, 1.0)

    @pytest.mark.parametrize("name", ["dense", "negative", "two words", "", None])
    def test_a_name_that_is_taken_or_none_is_refused(self, name):
        other = type("Other", (Negative,), {"format": name})
        with pytest.raises(ValueError, match=f"format is {name!r}, expected a word that no other"):
            operands.register(other)

    @pytest.mark.parametrize("name", ["a,b", "a|b"])
    def test_names_that_the_text_separates_by_are_refused(self, monkeypatch, name):
        monkeypatch.setattr(Negative, "tensors", lambda self: {name: self.negative})
        with pytest.raises(ValueError, match=re.escape(f"['{name}'], expected names without")):
            operands.describe(draw("negative")[1])

    def test_it_goes_as_it_came(self):
        assert operands.formats()[0] == "dense"
        assert operands.formats()[-2:] == ("negative", "scaled")
        operands.unregister("negative")
        x, weight, A, B, _ = draw("negative")
        try:
            with pytest.raises(ValueError, match="format is 'negative', expected one of dense, "):
                torch.ops.lorafast.lora_linear(
                    x, operands.stored(weight), operands.describe(weight), A, B, 1.0
                )
        finally:
            operands.register(Negative)

    def test_repr(self):
        expected = "Negative(format=negative, shape=[5, 6], dtype=torch.float32)"
        assert repr(draw("negative")[1]) == expected


@pytest.fixture
def base_gemm_first(monkeypatch):
    """The native kernels add to the base GEMM of a dense weight too, never the other way round."""
    if native.why_not_loaded() is None:
        from lorafast.backends.cpu import operations

        for table in (operations.FORWARD, operations.BACKWARD):
            monkeypatch.setitem(table, True, table[False])
        registry.forget_plans()
    yield
    registry.forget_plans()


class TestServed:
    @given(p=problems())
    @in_each
    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_to_the_bits_as_the_dense_weight(
        self, device, poisoned, monkeypatch, base_gemm_first, backend, format, p
    ):
        """Where the base product is PyTorch's own over the whole of W, as it is not of few rows."""
        skip_unless_usable(backend)
        if backend == "cpu":
            from lorafast.backends.cpu import dequantize

            none = dict.fromkeys(dequantize._FEW, (0, 0))
            monkeypatch.setattr(dequantize, "_FEW", none)
        if device.type != "cpu" and backend == "cpu":
            pytest.skip("the native kernels are for the CPU")
        t = p.tensors(device)
        found = []
        weight = FORMATS[format](t.weight.to(p.dtype))
        for W in (weight.dense(), weight):
            x = p.lay_out(t.x.to(p.dtype)).detach().requires_grad_()
            A, B = (f.to(p.adapter_dtype).requires_grad_() for f in (t.lora_A, t.lora_B))
            with lorafast.use_backend(backend):
                y = lorafast.ops.lora_linear(
                    x,
                    W,
                    A,
                    B,
                    0.5,
                    t.bias.to(p.dtype),
                    p.dropout_p,
                    t.seed,
                )
                gradients = torch.autograd.grad(y, (x, A, B), t.dy.to(p.dtype))
            found.append((y, *gradients))
        for name, one, two in zip(("y", "dx", "dA", "dB"), *found, strict=True):
            assert torch.equal(one, two), name

    @in_each
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("rows", [0, 1, 37, 200])
    def test_by_auto(self, format, dtype, dropout_p, rows):
        shapes = ((rows, 67), (45, 67), (7, 67), (45, 7), (45,), (rows, 45))
        x, W, *rest = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
        weight = FORMATS[format](W)

        def run(layer, W, cast):
            leaves = [t.to(cast).requires_grad_() for t in (x, *rest[:2])]
            bias, dy = (t.to(cast) for t in rest[2:])
            y = layer(
                leaves[0], W, *leaves[1:], 0.5, bias, dropout_p=dropout_p, seed=torch.tensor([3])
            )
            gradients = torch.autograd.grad(y, leaves, dy)
            return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients), strict=True))

        ours = run(lorafast.ops.lora_linear, weight, dtype)
        eager, ref64 = (
            run(lorafast.reference.lora_linear, weight.dense().to(cast), cast)
            for cast in (dtype, torch.float64)
        )
        reason = contract.why_any_broken(ours, contract.bounds(eager, ref64))
        assert reason is None, reason

    @pytest.mark.parametrize("format", ["negative", "scaled"])
    @pytest.mark.parametrize("operation", ["lora_linear", "linear_expand"])
    def test_not_by_kernels_that_read_dense_weights(self, format, operation):
        skip_unless_usable("triton")
        x, weight, A, B, bias = draw(format)
        sentence = f"the weight is stored as {format}, the kernels read dense ones and nf4"
        calls = {
            "lora_linear": lambda: lora_linear(x, weight, A, B, 1.0, bias),
            "linear_expand": lambda: lorafast.ops.linear_expand(
                x, weight, x.new_ones(3, r), B, 1.0
            ),
        }
        with (
            lorafast.use_backend("triton"),
            pytest.raises(lorafast.BackendError, match=sentence),
        ):
            calls[operation]()

    def test_a_plan_may_depend_on_what_it_takes_to_read_it(self):
        problems = []
        for weight in (Scaled.of(torch.randn(4, 6)), Scaled.of(torch.randn(6, 4))):
            A, B = torch.randn(r, weight.shape[1]), torch.randn(weight.shape[0], r)
            x = torch.randn(3, weight.shape[1])
            problems.append(layer_problem(x, weight, A, B, None, False, ("y",), layouts=True))
        assert [p.format_parameters for p in problems] == ["4x6", "6x4"]
        assert not isinstance(registry.plan_of("aten", problems[0]), Refusal)

    @in_each
    def test_a_weight_beyond_one_tile(self, monkeypatch, format):
        x, weight, A, B, bias = draw(format, torch.float64)
        x.requires_grad_()
        expected = lora_linear(x, weight.dense(), A, B, 0.5, bias)
        tiles = []
        rows = type(weight).rows
        monkeypatch.setattr(operand, "_TILE_BYTES", 2 * K * 8)
        monkeypatch.setattr(
            type(weight), "rows", lambda self, *ends: tiles.append(ends) or rows(self, *ends)
        )
        y = lora_linear(x, weight, A, B, 0.5, bias)
        assert tiles == [(0, 2), (2, 4), (4, 5)]
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        found, right = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)

    @in_each
    def test_calls_that_differ_in_nothing_but_the_format_are_told_apart(self, format):
        x, weight, A, B, bias = draw(format)
        for W in (weight, weight.dense(), weight):
            expected = F.linear(x, weight.dense() + B @ A, bias)
            torch.testing.assert_close(lora_linear(x, W, A, B, 1.0, bias), expected)


class TestRefusals:
    def test_another_dtype(self):
        x, weight, A, B, _ = draw("negative")
        with pytest.raises(TypeError, match=r"weight is torch.float32, expected torch.float16"):
            lora_linear(x.half(), weight, A, B, 1.0)

    def test_other_sizes(self):
        x, weight, A, B, _ = draw("scaled")
        with pytest.raises(ValueError, match=re.escape("x has shape [3, 5], expected [..., 6]")):
            lora_linear(x[:, 1:], weight, A, B, 1.0)
        with pytest.raises(ValueError, match=re.escape("lora_A has shape [2, 5], expected [r, 6]")):
            lora_linear(x, weight, A[:, 1:], B, 1.0)

    def test_another_device(self):
        x, _, A, B, _ = draw("dense")
        weight = Negative.of(torch.randn(N, K, device="meta"))
        with pytest.raises(ValueError, match="weight is on meta, expected cpu, where x is"):
            lora_linear(x, weight, A, B, 1.0)

    def test_tensors_on_several_devices(self):
        x, weight, A, B, _ = draw("scaled")
        lora_linear(x, weight, A, B, 1.0)  # a call like it
        weight.exponents = weight.exponents.to("meta")
        with pytest.raises(
            ValueError, match="exponents of weight is on meta, expected cpu, where values is"
        ):
            lora_linear(x, weight, A, B, 1.0)
        with pytest.raises(TypeError, match="its tensors are on cpu and meta, expected one device"):
            LoRALinear.from_operand(weight, r)

    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
    def test_a_gradient_that_would_flow_nowhere(self, grad):
        x, weight, A, B, _ = draw("negative")
        lora_linear(x, weight, A, B, 1.0)  # a call like it
        weight.negative.requires_grad_()
        sentence = (
            "negative of weight requires a gradient, and none flows into a weight stored as neg"
        )
        library, stored = torch.ops.lorafast, [weight.negative]
        with torch.set_grad_enabled(grad):
            for call in (
                lambda: lora_linear(x, weight, A, B, 1.0),
                lambda: torch.func.grad(lambda A: lora_linear(x, weight, A, B, 1.0).sum())(A),
                lambda: library.lora_linear(x, stored, "negative|negative||", A, B, 1.0),
                lambda: lorafast.ops.linear_expand(x, weight, x.new_ones(3, r), B, 1.0),
            ):
                with pytest.raises(ValueError, match=sentence):
                    call()

    def test_what_is_neither_a_tensor_nor_an_operand(self):
        x, _, A, B, _ = draw("dense")
        with pytest.raises(TypeError, match="weight is a Linear, expected a tensor"):
            lora_linear(x, nn.Linear(K, N), A, B, 1.0)
        with pytest.raises(TypeError, match="x is a Negative, expected a tensor"):
            lora_linear(draw("negative")[1], x, A, B, 1.0)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"weight": torch.randn(N, K)}, "it is a Tensor, expected an operand"),
            ({"bias": torch.randn(N + 1)}, "its bias has shape [6], expected [5]"),
            ({"bias": torch.randn(N).half()}, "its bias is torch.float16, expected torch.float32"),
            ({"bias": torch.randn(N, device="meta")}, "its bias is on meta, expected cpu"),
            ({"bias": 1.0}, "its bias is a float, expected a tensor"),
            ({"weight": Negative(torch.ones(N, K, dtype=torch.int8))}, "multiplied in torch.int8"),
            (
                {"weight": Negative((torch.ones(N, K, requires_grad=True)) * 2)},
                "its negative requires a gradient, expected a frozen tensor",
            ),
            ({"r": 0}, "r is 0, expected an integer of at least 1"),
            ({"alpha": "x"}, "alpha is 'x', expected a finite number"),
            ({"adapter_dtype": torch.int8}, "adapter_dtype is torch.int8"),
        ],
    )
    def test_what_a_layer_can_not_hold(self, change, sentence):
        weight = Negative(nn.Parameter(torch.randn(N, K)))
        arguments = {"weight": weight, "r": 2} | change
        with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
            LoRALinear.from_operand(**arguments)
        assert weight.negative.requires_grad  # as it was

    @pytest.mark.parametrize(
        "name",
        ["bias", "lora_A", "merged", "scaling", "of_layer", "a.b", "training", "in_features"],
    )
    def test_names_that_a_layer_needs(self, name):
        class Named(Negative):
            format = "named"

            def tensors(self):
                return {name: self.negative}

        operands.register(Named)
        try:
            with pytest.raises(TypeError, match=f"it is stored in '{re.escape(name)}', expected a"):
                LoRALinear.from_operand(Named(torch.randn(N, K)), r)
        finally:
            operands.unregister("named")

    def test_a_format_that_is_not_registered(self):
        class Other(Negative):
            format = "other"

        with pytest.raises(TypeError, match="its format 'other' is not registered"):
            LoRALinear.from_operand(Other(torch.randn(N, K)), r)

    def test_the_class_is_made_from_operands_alone(self):
        with pytest.raises(TypeError, match=r"is made by LoRALinear\.from_operand\(weight, r\)"):
            type(made_layer("negative"))(K, N, r)


class TestLayer:
    def test_its_tensors_are_what_they_were(self):
        values = nn.Parameter(torch.randn(N * K))
        exponents, bias = torch.zeros(N, dtype=torch.int8), torch.randn(N)
        layer = LoRALinear.from_operand(Scaled(values, exponents, (N, K)), r, bias=bias)
        assert isinstance(layer, LoRALinear)
        assert layer.values is values
        assert layer.exponents is exponents
        assert layer.bias.data_ptr() == bias.data_ptr()
        assert set(dict(layer.named_parameters())) == {"values", "bias", "lora_A", "lora_B"}
        assert set(dict(layer.named_buffers())) == {"exponents"}
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        keys = {"values", "exponents", "bias", "lora_A", "lora_B"}
        assert layer.state_dict().keys() == keys

    @in_each
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_checkpoint_of_the_layer_without_an_adapter_loads_as_it_is(self, format, assign):
        layer, other = made_layer(format), made_layer(format)
        lora_B = layer.lora_B.clone()
        state = {k: v for k, v in other.state_dict().items() if not k.startswith("lora_")}
        assert layer.load_state_dict(state, assign=assign) == ([], [])
        assert torch.equal(layer.base_weight(), other.base_weight())
        assert torch.equal(layer.lora_B, lora_B)

    @pytest.mark.parametrize("strict", [True, False])
    def test_one_with_a_dense_weight_is_refused(self, strict):
        model = nn.Sequential(made_layer("scaled"))
        plain = nn.Sequential(nn.Linear(K, N))
        sentence = (
            r"0 stores its weight as scaled \(values, exponents\), and the checkpoint has a dense"
        )
        with pytest.raises(RuntimeError, match=sentence):
            model.load_state_dict(plain.state_dict(), strict=strict)

    @in_each
    def test_it_moves_and_is_cast_with_its_model(self, format):
        layer = made_layer(format)
        x = torch.randn(3, K)
        low = copy.deepcopy(layer).bfloat16()
        assert low(x.bfloat16()).dtype == low.base_weight().dtype == torch.bfloat16
        torch.testing.assert_close(low(x.bfloat16()).float(), layer(x), rtol=0.1, atol=0.1)
        meta = copy.deepcopy(layer).to("meta")
        assert meta(x.to("meta")).is_meta

    @in_each
    def test_from_meta(self, format):
        layer, state = made_layer(format), made_layer(format).state_dict()
        frozen = {k: v for k, v in state.items() if not k.startswith("lora_")}
        empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
        empty.reset_parameters()
        empty.load_state_dict(frozen)
        assigned = copy.deepcopy(layer).to("meta")
        assigned.load_state_dict(frozen, assign=True)
        x = torch.randn(3, K)
        for made in (empty, assigned):
            assert not made.lora_B.any()
            expected = F.linear(x, made.base_weight(), state["bias"])
            torch.testing.assert_close(made(x), expected)
            assert made.lora_A.requires_grad
            assert not made.bias.requires_grad

    def test_a_pickle_needs_its_format(self):
        layer, x = made_layer("negative"), torch.randn(3, K)
        data = pickle.dumps(layer)
        operands.unregister("negative")
        try:
            with pytest.raises(ValueError, match="format is 'negative', expected one of dense, "):
                pickle.loads(data)(x)
        finally:
            operands.register(Negative)

    @in_each
    def test_repr(self, format):
        assert repr(made_layer(format)) == (
            "LoRAOperandLinear(in_features=6, out_features=5, r=2, alpha=2, dropout=0, bias=True, "
            f"format={format})"
        )

    @in_each
    def test_packing(self, format):
        layer = made_layer(format, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"can't be packed: it is stored as {format}, merge"):
            layer.pack_()
        if operands.packed.why_unavailable() is None:
            layer.merge()
            layer.pack_()
            assert "packed=True" in repr(layer)
            layer.unpack_()
        assert "packed=True" not in repr(layer)

    @in_each
    def test_a_merged_layer_on_meta_is_refused(self, format):
        with pytest.raises(ValueError, match="its weight is on the device meta"):
            made_layer(format).to("meta").merge()

    @in_each
    def test_explain_names_the_format(self, format):
        text = str(lorafast.explain(made_layer(format), torch.randn(3, K)))
        native = f"lora_linear: cpu (it has kernels for {format})"
        assert f"the product of {format}, and the low-rank one" in text or native in text
        if lorafast.backends()["triton"].usable and format in ("negative", "scaled"):
            assert f"the weight is stored as {format}, the kernels read dense ones and nf4" in text

    @in_each
    def test_warm_up(self, format):
        layer = made_layer(format, dropout=0.1)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        lorafast.warm_up(layer, [1, 7])
        assert all(torch.equal(layer.state_dict()[name], before[name]) for name in before)
        assert layer.lora_A.grad is None

    @in_each
    def test_a_fake_one_has_the_shapes_of_a_real_one(self, format):
        from torch._subclasses.fake_tensor import FakeTensorMode

        layer, x = made_layer(format), torch.randn(2, 3, K)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = mode.from_tensor(x).requires_grad_()
            y = layer(x)
            y.sum().backward()
        assert (y.shape, x.grad.shape) == ((2, 3, N), (2, 3, K))


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = NegativeLinear(nn.Linear(6, 9, dtype=dtype))
        self.down = NegativeLinear(nn.Linear(9, 4, bias=False, dtype=dtype))
        self.head = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def draw_adapters(model):
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)


class TestModel:
    def test_layers_that_a_format_claims_are_adapted(self):
        net, x = Net(), torch.randn(3, 6)
        expected, negative = net(x), net.up.negative
        calls = []
        net.up.register_forward_hook(lambda *_: calls.append("up"))
        net.down.eval()
        lorafast.adapt(net, 2)
        assert all(isinstance(module, LoRALinear) for module in (net.up, net.down, net.head))
        assert net.up.negative is negative
        torch.testing.assert_close(net(x), expected)
        assert calls == ["up"]
        assert (net.up.training, net.down.training) == (True, False)
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        assert trained == {f"{n}.lora_{h}" for n in ("up", "down", "head") for h in "AB"}
        net(x).sum().backward()
        assert net.up.lora_B.grad.any()

    def test_targets(self):
        net = Net()
        lorafast.adapt(net, 2, ["up"])
        assert isinstance(net.up, LoRALinear)
        assert isinstance(net.down, NegativeLinear)
        with pytest.raises(ValueError, match=r"'downn', which is .*, did you mean 'down'"):
            lorafast.adapt(Net(), 2, ["downn"])

    def test_without_the_format_they_are_not(self):
        operands.unregister("negative")
        try:
            with pytest.raises(ValueError, match=r"up is a NegativeLinear, expected an nn\.Linear"):
                lorafast.adapt(Net(), 2, ["up"])
        finally:
            operands.register(Negative)

    def test_merging_gives_plain_layers(self):
        net, x = Net(), torch.randn(3, 6)
        lorafast.adapt(net, 2)
        draw_adapters(net)
        expected = net(x)
        lorafast.merge(net)
        assert [type(m) for m in (net.up, net.down, net.head)] == [nn.Linear] * 3
        assert set(net.up.state_dict()) == {"weight", "bias"}
        torch.testing.assert_close(net(x), expected)

    def test_a_weight_that_another_layer_shares(self):
        net = nn.Sequential(NegativeLinear(nn.Linear(6, 6)), NegativeLinear(nn.Linear(6, 6)))
        net[1].negative = net[0].negative
        lorafast.adapt(net, 2, ["0"])
        assert net[0].negative is net[1].negative
        with pytest.warns(UserWarning, match=r"no longer shared: 0\.negative"):
            lorafast.merge(net)

    def test_adapters_are_saved_and_loaded(self, tmp_path):
        pytest.importorskip("safetensors")
        net, x = Net(), torch.randn(3, 6)
        bare = copy.deepcopy(net)
        lorafast.adapt(net, 2, alpha=5)
        draw_adapters(net)
        lorafast.save_adapter(net, tmp_path)
        lorafast.load_adapter(bare, tmp_path)
        assert isinstance(bare.up, LoRALinear)
        torch.testing.assert_close(bare(x), net(x))
        again = lorafast.adapt(copy.deepcopy(Net()), 2)
        again.load_state_dict(net.state_dict())
        lorafast.load_adapter(again, tmp_path)
        torch.testing.assert_close(again(x), net(x))

    def test_summary(self):
        net = lorafast.adapt(Net(), 2)
        made = lorafast.summary(net)
        assert [row.name for row in made.layers] == ["up", "down", "head"]
        assert made.adapter == 2 * (6 + 9 + 9 + 4 + 4 + 3)
        assert not made.left

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (
                lambda layer: setattr(layer, "forward", lambda x: x),
                r"its forward is replaced on the instance \(NegativeLinear\)",
            ),
            (lambda layer: layer.compile(), "it was compiled in place"),
            (
                lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(2))),
                r"its bias has shape \[2\], expected \[5\]",
            ),
        ],
    )
    def test_layers_that_can_not_be(self, change, sentence):
        layer = NegativeLinear(nn.Linear(K, N))
        change(layer)
        with pytest.raises(TypeError, match=f"linear can't be adapted: {sentence}"):
            LoRALinear.from_linear(layer, 2)
        with pytest.raises(TypeError, match=f"0 can't be adapted: {sentence}"):
            lorafast.adapt(nn.Sequential(layer), 2, ["0"])

    def test_where_one_fails_all_are_as_they_were(self):
        net = Net()
        net.up.negative.requires_grad_()
        handle = net.up.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="alpha is nan"):
            lorafast.adapt(net, 2, alpha=float("nan"))
        assert net.up.negative.requires_grad
        assert isinstance(net.up, NegativeLinear)
        handle.remove()
        assert not net.up._forward_hooks

    def test_a_head_keeps_its_size(self):
        from lorafast.convert.resizing import let_embeddings_resize

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = made_layer("negative")

            def get_output_embeddings(self):
                return self.head

            def resize_token_embeddings(self, size):
                raise AssertionError("never called")

        model = Model()
        let_embeddings_resize(model)
        with pytest.raises(
            ValueError, match="the output embeddings can't be resized: it is stored as negative"
        ):
            model.resize_token_embeddings(7)

    def test_offloaded_by_accelerate(self):
        accelerate = pytest.importorskip("accelerate")
        net, x = Net(), torch.randn(3, 6)
        expected = net(x)
        accelerate.cpu_offload(net, torch.device("cpu"))
        assert net.up.negative.is_meta
        lorafast.adapt(net, 2)
        assert net.up.negative.is_meta
        torch.testing.assert_close(net(x), expected)
        draw_adapters(net)
        expected = net(x)
        net(x).sum().backward()
        assert net.up.lora_A.grad is not None
        lorafast.explain(net)
        lorafast.merge(net)
        torch.testing.assert_close(net(x), expected)


def test_an_operand_says_what_it_lacks():
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Operand,), {"format": "empty"})()


def test_nothing_else_asks_how_a_weight_is_stored():
    """But kernels that read dense ones, and the rules for PEFT's own layers."""
    package = Path(lorafast.__file__).parent
    asks = re.compile(
        r"\b(?:weight|W)\.(?:t\(|T\b|mT\b|stride|data_ptr|is_contiguous)"
        r"|\b(?:weight|W)\.dtype (?:==|!=|is)|(?:==|!=|is|is not) (?:weight|W)\.dtype"
    )
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if asks.search(path.read_text(encoding="utf-8"))
    }
    found = {path for path in found if path.split("/")[0] not in ("operands", "reference")}
    assert found <= {
        "backends/cpu/conv_shrink.py",  # a convolution's is dense
        "backends/cpu/dequantize.py",  # whether it is rounded once or twice
        "backends/cuda/linear_expand.py",
        "backends/cuda/wgmma.py",
        "backends/triton/launching.py",
        "backends/weight_norm.py",  # a dense one stored by columns
        "integrations/peft/attention_rules.py",  # an attention's is dense
        "integrations/peft/conv.py",  # a convolution's is dense
        "integrations/peft/conv_rules.py",
        "integrations/peft/linear.py",  # the dtype of a bias beside it
        "integrations/peft/low_rank.py",  # whether adapters are wider
        "integrations/peft/parameter_rules.py",  # a parameter is dense
        "integrations/peft/parameters.py",
        "integrations/peft/quantized.py",  # whether it is the tensor that was read
        "integrations/peft/rules.py",
        "nn/stored_weight.py",  # the dtype of a bias beside it
        "ops/checks.py",
        "ops/lora_conv_products.py",
        "ops/siblings.py",  # of dense ones, which alone share x
    }
