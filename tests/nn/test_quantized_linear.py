"""The frozen layer whose weight is stored in few bits: numbers, gradients, states, surroundings."""

import copy
import io
import json
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from quantized_layers import FORMATS, layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafast import operands, use_backend
from lorafast.functional import quantized_linear
from lorafast.nn import LoRALinear, QuantizedLinear, bitsandbytes_keys
from lorafast.operands import FP8, MXFP4, NF4, Int8
from lorafast.reference import contract

logging.disable(logging.WARNING)  # it says what it lacks on this machine
bnb = pytest.importorskip("bitsandbytes")
logging.disable(logging.NOTSET)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "cpu", "aten", "reference")
in_each = pytest.mark.parametrize("format", FORMATS)


def names_of(format):
    """Its keys in a state, as bitsandbytes has them."""
    if format == "int8":
        return {"weight", "SCB", "weight_format", "bias"}
    if format == "fp8":
        return {"weight", "scale", "bias"}
    of_weight = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    keys = {"weight", "bias", f"weight.quant_state.bitsandbytes__{format}"}
    return keys | {f"weight.{name}" for name in of_weight}


class TestNumbers:
    @in_each
    @pytest.mark.parametrize("backend", BACKENDS)
    @given(data=st.data())
    def test_output_and_gradients(self, format, backend, data):
        dtype = data.draw(st.sampled_from(DTYPES[:3]))
        N, K = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
        shape = data.draw(st.sampled_from([(1,), (5,), (2, 3), (0,), ()]))
        made = layer(format, N, K, data.draw(st.booleans()), dtype)
        x = torch.randn((*shape, K)).to(dtype).requires_grad_()
        dy = torch.randn((*shape, N)).to(dtype)
        with use_backend(backend):
            y = made(x)
            (dx,) = torch.autograd.grad(y, x, dy)
        W, bias = made.dense_weight(), made.bias

        def plain(to):
            b = None if bias is None else to(bias)
            return {"y": F.linear(to(x), to(W), b), "dx": to(dy) @ to(W)}

        eager, ref64 = plain(torch.detach), plain(lambda t: t.detach().double())
        of = contract.bounds(eager, ref64)
        reason = contract.why_any_broken({"y": y, "dx": dx}, of)
        assert reason is None, reason

    @in_each
    def test_derivatives_of_every_order(self, format):
        made = layer(format, 5, 7).double()
        x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(made, x)
        assert torch.autograd.gradgradcheck(lambda x: made(x).sin(), x)

    @in_each
    def test_nothing_but_codes_and_scales_is_kept_for_the_backward(self, format):
        made, kept = layer(format), []
        x = torch.randn(3, 40, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            made(x)
        own = {t.data_ptr() for t in made.frozen_operand().tensors().values()}
        assert kept
        assert {t.data_ptr() for t in kept} == own

    def test_any_dtype_of_x(self):
        made = layer().bfloat16()
        for dtype in DTYPES:
            x = torch.randn(3, 40).to(dtype)
            y = made(x)
            assert y.dtype is dtype
            W, bias = made.frozen_operand().to(dtype).dense(), made.bias.to(dtype)
            ref64 = F.linear(x.double(), W.double(), bias.double())
            assert contract.why_broken(y, F.linear(x, W, bias), ref64) is None

    def test_of_a_bias_that_is_trained(self):
        weight, bias = NF4.of(torch.randn(6, 8)), torch.randn(6, requires_grad=True)
        x = torch.randn(2, 5, 8)
        (found,) = torch.autograd.grad(quantized_linear(x, weight, bias).square().sum(), bias)
        expected = F.linear(x, weight.dense(), bias.detach())
        torch.testing.assert_close(found, 2 * expected.sum((0, 1)))

    @pytest.mark.parametrize(
        ("x", "weight", "bias", "said"),
        [
            (torch.ones(2, 9), NF4.of(torch.ones(4, 8)), None,
             r"x has shape \[2, 9\], expected \[\.\.\., 8\]: weight is \[4, 8\]"),
            (torch.ones(2, 8).double(), NF4.of(torch.ones(4, 8)), None,
             "weight is torch.float32, expected torch.float64, the dtype of x"),
            (torch.ones(2, 8), torch.ones(4, 8), None,
             "weight is a Tensor, expected an operand"),
            (torch.ones(2, 8), NF4.of(torch.ones(4, 8)), torch.ones(3),
             r"bias has shape \[3\], expected \[4\]"),
            (torch.ones(2, 8, dtype=torch.int64), NF4.of(torch.ones(4, 8)), None,
             "x is torch.int64, expected float16"),
            (torch.ones(2, 8, device="meta"), NF4.of(torch.ones(4, 8)), None,
             "weight is on cpu, expected meta, where x is"),
        ],
    )  # fmt: skip
    def test_bad_input(self, x, weight, bias, said):
        with pytest.raises((ValueError, TypeError), match=said):
            quantized_linear(x, weight, bias)


class TestSurroundings:
    @in_each
    def test_compiled(self, format):
        made, x = layer(format), torch.randn(3, 40, requires_grad=True)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (3, 4, 6):
            x = torch.randn(rows, 40, requires_grad=True)
            y, expected = compiled(x), made(x)
            assert torch.equal(y, expected)
            pair = [torch.autograd.grad(one.square().sum(), x)[0] for one in (y, expected)]
            assert torch.equal(*pair)

    def test_the_registered_operation(self):
        weight = NF4.of(torch.randn(6, 8))
        description = layer("nf4", 6, 8)._description
        stored = list(weight.tensors().values())
        for bias in (None, torch.randn(6, requires_grad=True)):
            x = torch.randn(3, 8, requires_grad=True)
            torch.library.opcheck(
                torch.ops.lorafast.quantized_linear.default, (x, stored, description, bias)
            )

    @in_each
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, format, reentrant):
        made, x = layer(format), torch.randn(3, 40, requires_grad=True)
        y = checkpoint(made, x, use_reentrant=reentrant)
        (found,) = torch.autograd.grad(made(x).square().sum(), x)
        y.square().sum().backward()
        assert torch.equal(x.grad, found)

    def test_autocast(self):
        made, x = layer(), torch.randn(3, 40, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = made(x)
        assert y.dtype is torch.bfloat16
        low = copy.deepcopy(made).bfloat16()
        assert torch.equal(y, low(x.bfloat16()))
        y.float().sum().backward()
        assert x.grad.dtype is torch.float32

    def test_transforms(self):
        made, x = layer(), torch.randn(4, 3, 40)
        torch.testing.assert_close(torch.func.vmap(made)(x), made(x))
        found = torch.func.grad(lambda x: made(x).square().sum())(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(made(leaf).square().sum(), leaf)
        torch.testing.assert_close(found, expected)

    def test_batched_gradients(self):
        made, x = layer(), torch.randn(3, 40, requires_grad=True)
        y, dy = made(x), torch.randn(5, 3, 24)
        (found,) = torch.autograd.grad(y, x, dy, is_grads_batched=True)
        torch.testing.assert_close(found, dy @ made.dense_weight())

    @in_each
    def test_copies(self, format):
        made, x = layer(format), torch.randn(3, 40)
        buffer = io.BytesIO()
        torch.save(made, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
            assert torch.equal(other(x), made(x))
            assert other.weight.data_ptr() != made.weight.data_ptr()

    @in_each
    def test_a_cast_leaves_what_is_stored(self, format):
        made = layer(format)
        before = {name: t.clone() for name, t in made.frozen_operand().tensors().items()}
        made.bfloat16().half().double().float()
        after = made.frozen_operand().tensors()
        assert all(
            after[n].dtype is t.dtype and torch.equal(after[n], t) for n, t in before.items()
        )
        assert made.half().bias.dtype is torch.float16

    def test_it_says_what_it_is(self):
        made = layer("nf4", 24, 40, dtype=torch.bfloat16)
        assert repr(made) == (
            "QuantizedLinear(in_features=40, out_features=24, bias=True, format=nf4, "
            "24x40,bfloat16,64,256)"
        )
        with pytest.raises(TypeError, match=r"made by QuantizedLinear\.from_linear"):
            QuantizedLinear(40, 24)

    @pytest.mark.parametrize(
        "weight",
        [
            MXFP4(torch.zeros(4, 16, dtype=torch.uint8), torch.full((4, 1), 127).byte(),
                  torch.float32),
            FP8({"weight": torch.zeros(4, 32).byte(), "scale": torch.ones(2, 2)}, torch.float32,
                (2, 16)),
            Int8({"weight": torch.zeros(4, 32).char(), "scale": torch.ones(4)}, torch.bfloat16),
        ],
        ids=["mxfp4", "fp8 of blocks", "int8"],
    )  # fmt: skip
    def test_of_any_operand(self, weight):
        made = QuantizedLinear.from_operand(weight)
        state = {name: t.clone() for name, t in made.state_dict().items()}
        assert state.keys() == weight.tensors().keys()
        assert made.load_state_dict(state, strict=True) == ([], [])
        assert torch.equal(made.dense_weight(), weight.dense())


class TestRefused:
    @pytest.mark.parametrize("other", [None, nn.Embedding(3, 4), nn.Conv2d(3, 4, 3), layer()])
    def test_what_is_no_linear_layer(self, other):
        sentence = f"linear is a {type(other).__name__}, expected an nn.Linear"
        with pytest.raises(TypeError, match=sentence):
            QuantizedLinear.from_linear(other)

    def test_gpt2s_layer_whose_weight_is_transposed(self):
        """Of as many inputs as outputs its shape doesn't tell."""
        transformers = pytest.importorskip("transformers")
        with pytest.raises(TypeError, match=r"linear is a Conv1D, expected an nn\.Linear"):
            QuantizedLinear.from_linear(transformers.pytorch_utils.Conv1D(8, 8))

    def test_a_layer_of_bitsandbytes(self):
        """Codes that are stored as floats are no weight."""
        plain = bnb.nn.Linear4bit(64, 8, quant_type="nf4", quant_storage=torch.bfloat16)
        with pytest.raises(TypeError, match="linear can't be quantized: bitsandbytes has not"):
            QuantizedLinear.from_linear(plain)
        with pytest.raises(TypeError, match="its weight is quantized already"):
            QuantizedLinear.from_linear(plain.to("cpu"))


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
@in_each
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("called", [False, True])
def test_what_is_moved_after_wrapping_is_named(format, adapted, called):
    """All of the layer, or one of the tensors of its weight."""
    x = torch.randn(3, 40)
    for name in (None, *layer(format)._stored_names):
        made = LoRALinear.from_linear(layer(format), 4) if adapted else layer(format)
        if called:
            made(x)
        if name is None:
            made.to("meta")
            said = "weight is on meta, expected cpu, where x is"
        elif name in made._buffers:
            made._buffers[name] = made._buffers[name].to("meta")
            said = f"{name} of weight is on meta, expected cpu, where weight is"
        else:
            codes = made._parameters[name].to("meta")
            made._parameters[name] = nn.Parameter(codes, requires_grad=False)
            said = "of weight is on cpu, expected meta, where weight is"
        with pytest.raises(ValueError, match=said):
            made(x)


class TestAdapted:
    @in_each
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_over_its_own_memory(self, format, use_dora):
        plain, x = layer(format), torch.randn(3, 40)
        plain.register_forward_hook(lambda module, inputs, y: y + 1)
        expected = plain(x)
        made = LoRALinear.from_linear(plain.eval(), 4, use_dora=use_dora)
        assert made.weight is plain.weight
        assert made.bias is plain.bias
        assert not made.training
        torch.testing.assert_close(made(x), expected)
        nn.init.normal_(made.lora_B)
        made.train()
        y = made(x)
        trained = [p for p in made.parameters() if p.requires_grad]
        assert len(trained) == 2 + use_dora
        for gradient in torch.autograd.grad(y.square().sum(), trained):
            assert gradient.abs().sum() > 0

    @in_each
    def test_states_of_the_plain_layer_load(self, format):
        plain, other = layer(format), layer(format)
        made = LoRALinear.from_linear(other, 4)
        assert made.load_state_dict(plain.state_dict()) == ([], [])
        assert torch.equal(made.base_weight(), plain.dense_weight())
        frozen = {k: v for k, v in made.state_dict().items() if not k.startswith("lora_")}
        again = layer(format)
        assert again.load_state_dict(frozen) == ([], [])
        assert torch.equal(again.dense_weight(), plain.dense_weight())

    @in_each
    def test_an_adapter_that_changes_nothing_leaves_the_codes(self, format):
        """Also of nested scales, which quantizing again would not find again."""
        plain = layer(format, 70, 65, dtype=torch.bfloat16)
        before = plain.frozen_operand()
        made = LoRALinear.from_linear(plain, 4)
        again, lost = made.to_quantized()
        assert (lost.error, lost.of_update) == (0.0, 0.0)
        found = again.frozen_operand()
        assert (found.dtype, found.parameters) == (before.dtype, before.parameters)
        for name, tensor in before.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)
            assert found.tensors()[name].data_ptr() != tensor.data_ptr()

    def test_int8_is_quantized_again_as_quantize_does(self):
        made = LoRALinear.from_linear(layer("int8", 70, 65), 4)
        nn.init.normal_(made.lora_B)
        again, _ = made.to_quantized()
        merged = made.operand().dense() + made.delta_weight()
        expected = operands.quantize(merged, "int8").tensors()
        assert torch.equal(again.weight, expected["weight"])
        assert torch.equal(again.SCB, expected["SCB"])


def of_its_own(format, N, K, dtype, **options):
    """bitsandbytes' layer."""
    if format == "int8":
        made = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to(dtype)
    else:
        made = bnb.nn.Linear4bit(K, N, quant_type=format, compute_dtype=dtype, **options).to(dtype)
    return made.to("cpu")


class TestStates:
    """What bitsandbytes writes is read, and the other way round, bit for bit."""

    @in_each
    def test_keys(self, format):
        assert layer(format).state_dict().keys() == names_of(format)

    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize("shape", [(24, 40), (7, 9), (1, 1)], ids=str)
    def test_it_reads_ours(self, format, nested, dtype, shape):
        made = layer(format, *shape, dtype=dtype, nested=nested)
        state = dict(made.state_dict())
        weight = state.pop("weight")
        bias = state.pop("bias")
        assert bias is not None
        stats = {key.removeprefix("weight."): value for key, value in state.items()}
        given = bnb.nn.Params4bit.from_prequantized(weight, stats, device="cpu")
        found = bnb.functional.dequantize_4bit(given.data, given.quant_state)
        assert found.dtype is dtype
        assert torch.equal(found.view(*shape), made.dense_weight())

    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    def test_we_read_its_4_bit_layers(self, format, nested, assign):
        its = of_its_own(format, 24, 40, torch.bfloat16, compress_statistics=nested)
        state = its.state_dict()
        expected = bnb.functional.dequantize_4bit(its.weight.data, its.weight.quant_state)
        for made in (
            layer(format, dtype=torch.bfloat16, nested=nested),
            layer(format, nested=nested),  # rounded to another dtype
            LoRALinear.from_linear(layer(format, nested=nested), 4),
        ):
            assert made.load_state_dict(state, assign=assign) == ([], [])
            weight = made.operand()
            assert weight.stored_dtype is torch.bfloat16
            assert torch.equal(weight.to(torch.bfloat16).dense(), expected)
        made = QuantizedLinear.from_state({f"a.{k}": v for k, v in state.items()}, "a.")
        assert torch.equal(made.dense_weight(), expected)
        assert made.weight.data_ptr() == its.weight.data_ptr()
        assert made.state_dict().keys() == state.keys()

    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_state_that_went_through_both_is_the_same(self, format, nested):
        its = of_its_own(format, 24, 40, torch.bfloat16, compress_statistics=nested)
        state = its.state_dict()
        again = QuantizedLinear.from_state(state).state_dict()
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            if "quant_state" in name:
                ours, theirs = (json.loads(bytes(s[name].tolist())) for s in (again, state))
                assert ours == theirs
            else:
                assert torch.equal(again[name], tensor), name

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
    def test_codes_that_are_stored_as_floats(self, storage):
        its = of_its_own("nf4", 24, 40, torch.float32, quant_storage=storage)
        expected = bnb.functional.dequantize_4bit(its.weight.data, its.weight.quant_state)
        made = layer()
        made.load_state_dict(its.state_dict())
        assert torch.equal(made.dense_weight(), expected)

    def test_int8_both_ways(self):
        its = of_its_own("int8", 24, 40, torch.float32)
        state = its.state_dict()
        made = layer("int8")
        assert made.load_state_dict(state) == ([], [])
        assert made.state_dict().keys() == state.keys()
        assert all(torch.equal(made.state_dict()[k], v) for k, v in state.items())
        assert torch.equal(QuantizedLinear.from_state(state).weight, made.weight)
        other = layer("int8")
        assert its.load_state_dict(other.state_dict()) == ([], [])
        x = torch.randn(5, 40)
        torch.testing.assert_close(its.train()(x), other(x), rtol=1e-5, atol=1e-5)

    def test_int8_codes_are_its_own(self):
        """Its layer rounds a weight in float32 to float16 first."""
        for dtype in DTYPES[:3]:
            plain = nn.Linear(100, 64, bias=False, dtype=dtype)
            W = plain.weight.detach()
            made = QuantizedLinear.from_linear(plain, "int8")
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(W.clone())
            assert torch.equal(made.SCB, scales)
            assert torch.equal(made.weight, codes)
            its = bnb.nn.Linear8bitLt(100, 64, bias=False, has_fp16_weights=False)
            its.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
            state = its.to("cpu").state_dict()
            if dtype is torch.float32:
                assert not torch.equal(made.SCB, state["SCB"])
                plain.weight.data = W.half().float()
                made = QuantizedLinear.from_linear(plain, "int8")
            assert torch.equal(made.SCB, state["SCB"])
            assert torch.equal(made.weight, state["weight"])

    @in_each
    def test_keys_of_an_adapted_layer(self, format):
        """The names of its tensors, by which others find these; bitsandbytes' on request."""
        adapted = LoRALinear.from_linear(layer(format), 4, use_dora=True)
        names = {name for name, _ in (*adapted.named_parameters(), *adapted.named_buffers())}
        adapter = {"lora_A", "lora_B", "lora_magnitude"}
        assert adapted.state_dict().keys() == names
        with bitsandbytes_keys():
            assert adapted.state_dict().keys() == names_of(format) | adapter
            with bitsandbytes_keys(False):
                assert adapted.state_dict().keys() == names
                assert layer(format).state_dict().keys() == names - adapter

    @in_each
    @pytest.mark.parametrize("foreign", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    def test_an_adapted_layer_loads_either(self, format, foreign, assign):
        one, other = (LoRALinear.from_linear(layer(format), 4) for _ in range(2))
        nn.init.normal_(one.lora_B)
        with bitsandbytes_keys(foreign):
            assert other.load_state_dict(one.state_dict(), assign=assign) == ([], [])
        x = torch.randn(3, 40)
        assert torch.equal(other(x), one(x))

    @pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_layer_of_its_that_is_adapted_saves_what_it_was(self, format, nested):
        options = {} if format == "int8" else {"compress_statistics": nested}
        its = of_its_own(format, 24, 40, torch.bfloat16, **options)
        expected = {name: tensor.clone() for name, tensor in its.state_dict().items()}
        adapted = LoRALinear.from_linear(its, 4)
        nn.init.normal_(adapted.lora_B)
        with bitsandbytes_keys():
            found = adapted.state_dict()
        for name in ("lora_A", "lora_B"):
            del found[name]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype is tensor.dtype
            if "quant_state" in name:
                ours, theirs = (json.loads(bytes(s[name].tolist())) for s in (found, expected))
                assert ours == theirs
            else:
                assert torch.equal(found[name], tensor), name

    def test_its_int8_layer_loads_the_state_of_an_adapted_one(self):
        its = of_its_own("int8", 24, 40, torch.float32)
        plain = layer("int8")
        adapted = LoRALinear.from_linear(plain, 4)
        with bitsandbytes_keys():
            found = its.load_state_dict(adapted.state_dict(), strict=False)
        assert found == ([], ["lora_A", "lora_B"])
        codes, scales = (its.state_dict()[name] for name in ("weight", "SCB"))
        assert torch.equal(codes, plain.weight)
        assert torch.equal(scales, plain.SCB)

    def test_a_distributed_checkpoint_has_the_names_of_tensors(self):
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            set_model_state_dict,
        )

        model, other = (
            nn.Sequential(layer(), LoRALinear.from_linear(layer("nf4", 8, 24), 4)) for _ in range(2)
        )
        with bitsandbytes_keys(False):
            set_model_state_dict(other, get_model_state_dict(model))
        x = torch.randn(3, 40)
        assert torch.equal(other(x), model(x))

    def test_from_meta(self):
        state = layer().state_dict()
        made = layer().to("meta")
        made.load_state_dict(state, assign=True)
        assert torch.equal(made.dense_weight(), QuantizedLinear.from_state(state).dense_weight())
