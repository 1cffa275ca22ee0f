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

FORMATS = ("nf4", "fp4", "int8", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "cpu", "aten", "reference")
in_each = pytest.mark.parametrize("format", FORMATS)


def layer(format="nf4", N=24, K=40, bias=True, dtype=torch.float32, **options):
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), format, **options)


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
        for dtype in DTYPES[:1]:
            W = torch.randn(64, 100).to(dtype)
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(W)
            plain = nn.Linear(100, 64, bias=False, dtype=dtype)
            plain.weight.data.copy_(W)
            made = QuantizedLinear.from_linear(plain, "int8")
            assert torch.equal(made.SCB, scales)
            assert torch.equal(made.weight, codes)

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


def changed(**said):
    """A change of what the JSON of a state says; None takes it out."""

    def change(state):
        key = next(name for name in state if "quant_state" in name)
        found = json.loads(bytes(state[key].tolist())) | said
        found = {name: value for name, value in found.items() if value is not None}
        state[key] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def without(name):
    return lambda state: state.pop(name)


def replaced(name, of):
    def change(state):
        state[name] = of(state[name])

    return change


def renamed(state):
    state["weight.quant_state.bitsandbytes__nf3"] = state.pop(JSON)


JSON = "weight.quant_state.bitsandbytes__nf4"
BAD = {
    "no absmax": (without("weight.absmax"), "has no weight.absmax"),
    "no weight": (without("weight"), "has no weight"),
    "no quant_map": (without("weight.quant_map"), "has no weight.quant_map"),
    "no quant_state": (without(JSON), "the state has no weight.quant_state, expected one of"),
    "half nested": (
        without("weight.nested_absmax"),
        "has weight.nested_quant_map, and no weight.nested_absmax: nested scales need both",
    ),
    "nested without offset": (changed(nested_offset=None), "and no nested_offset"),
    "fewer codes": (replaced("weight", lambda t: t[:-1]), "has 479 bytes of codes, expected 480"),
    "other block": (changed(blocksize=32), "absmax is torch.uint8 of 15 elements, expected"),
    "block 0": (changed(blocksize=0), "block is 0, expected 1 to"),
    "block of text": (changed(blocksize="64"), "blocksize is '64', expected an integer"),
    "a size it doesn't have": (
        changed(shape=[1 << 40, 1 << 40]), "weight has 480 bytes of codes, expected"
    ),
    "negative shape": (changed(shape=[-24, -40]), r"shape is \[-24, -40\], expected"),
    "NaN": (replaced("weight.nested_absmax", lambda t: t * float("nan")), "is NaN or infinite"),
    "infinite": (replaced("weight.nested_absmax", lambda t: t / 0), "is NaN or infinite"),
    "a quant_map of scales with NaN": (
        replaced("weight.nested_quant_map", lambda t: t * float("nan")),
        "nested_quant_map is NaN or infinite somewhere",
    ),
    "an infinite quant_map of scales": (
        replaced("weight.nested_quant_map", lambda t: t / 0), "nested_quant_map is NaN or infinite",
    ),
    "infinite offset": (changed(nested_offset=float("inf")), "nested_offset is inf, expected"),
    "an offset of 400 digits": (
        changed(nested_offset=10**400), "nested_offset is of 1329 bits, expected a finite float32"
    ),
    "an offset that no float32 is": (
        changed(nested_offset=1e39), r"nested_offset is 1e\+39, expected a finite float32",
    ),
    "an offset that rounds to infinity": (
        changed(nested_offset=float(2**128 - 2**102)), "nested_offset is 3.40.*, expected a finite"
    ),
    "an offset that is NaN": (changed(nested_offset=float("nan")), "nested_offset is nan, expected"),
    "an offset of text": (changed(nested_offset="1" * 999), r"nested_offset is '1{79}\.\.\., exp"),
    "a block of 400 digits": (
        changed(blocksize=10**400), "block is of 1329 bits, expected 1 to 2147483647"
    ),
    "a nested block of 400 digits": (
        changed(nested_blocksize=-(10**400)), "nested_block is of 1329 bits, expected 1 to"
    ),
    "a shape of 400 digits": (
        changed(shape=[10**400, 40]), "shape is of 1329 bits x 40, expected sizes below"
    ),
    "unknown quant_type": (renamed, "bitsandbytes__nf3, expected one of"),
    "another quant_type": (changed(quant_type="fp4"), "quant_type is 'fp4', expected 'nf4'"),
    "another quant_map": (
        replaced("weight.quant_map", lambda t: t.flip(0)), "quant_map is not that of nf4",
    ),
    "unknown dtype": (changed(dtype="bfloat17"), "dtype is 'bfloat17', expected the name"),
    "no JSON": (
        replaced(JSON, lambda t: t[:-3]), "is no JSON"
    ),
    "huge JSON": (
        replaced(JSON, lambda t: torch.zeros(1, dtype=torch.uint8).expand(1 << 40)),
        "expected JSON as bytes",
    ),
    "deep JSON": (
        replaced(JSON, lambda t: torch.full((60000,), ord("["), dtype=torch.uint8)), "is no JSON"
    ),
    "another tensor": (
        lambda state: state.update({"weight.zero": torch.ones(1)}), "has weight.zero besides"
    ),
    "another size of the layer": (
        lambda state: (state.clear(), state.update(layer("nf4", 40, 24).state_dict())),
        r"is of nf4 \(40x24,float32,64,256\), expected nf4 \(24x40,float32,64,256\)",
    ),
    "another format": (
        lambda state: (state.clear(), state.update(layer("fp4").state_dict())), "is of fp4"
    ),
    "no nesting": (
        lambda state: (state.clear(), state.update(layer(nested=False).state_dict())),
        r"is of nf4 \(24x40,float32,64\)",
    ),
    "a dense one": (
        lambda state: (state.clear(), state.update(nn.Linear(40, 24).state_dict())),
        "stores weight as torch.uint8, and the checkpoint as torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_bad_state_changes_nothing(change, said, strict, adapted):
    made = layer()
    made = LoRALinear.from_linear(made, 4) if adapted else made
    before = {name: t.clone() for name, t in made.operand().tensors().items()}
    description, state = made._description, dict(layer().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=said):
        nn.Sequential(made).load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=strict)
    after = made.operand().tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert made._description == description


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("a dense one", "another format",
                                  "no nesting", "another size of the layer", "no weight")])  # fmt: skip
def test_no_layer_is_made_of_a_bad_state(name):
    change, said = BAD[name]
    state = dict(layer().state_dict())
    change(state)
    with pytest.raises(ValueError, match=said):
        QuantizedLinear.from_state(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("SCB"), "the checkpoint has weight, and no SCB"),
        (replaced("SCB", lambda t: t[:-1]), r"SCB has shape \[23\]"),
        (replaced("SCB", lambda t: t / 0), "SCB is NaN or infinite"),
        (replaced("weight_format", lambda t: t + 1), "weight_format is 1, expected 0: by rows"),
        (
            replaced("weight_format", lambda t: torch.tensor(float("nan"))),
            "weight_format is nan, expected 0: by rows",
        ),
        (
            replaced("weight_format", lambda t: torch.tensor(0.5)),
            "weight_format is 0.5, expected 0",
        ),
        (
            replaced("weight_format", lambda t: torch.zeros(99)),
            r"weight_format is torch.float32 \[99\], expected 0: by rows",
        ),
        (replaced("weight", lambda t: t.float()), "weight is torch.float32"),
    ],
)
def test_a_bad_int8_state_changes_nothing(change, said):
    made, state = layer("int8"), dict(layer("int8").state_dict())
    before = made.dense_weight()
    change(state)
    with pytest.raises(RuntimeError, match=said):
        made.load_state_dict(state)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("scale"), "the checkpoint has weight, and no scale"),
        (
            replaced("scale", lambda t: t[:-1]),
            r"stores scale as \[24\], and the checkpoint as \[23\]",
        ),
    ],
)
def test_half_a_state_by_its_own_names_changes_nothing(change, said):
    made, state = layer("fp8"), dict(layer("fp8").state_dict())
    before = made.dense_weight()
    change(state)
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=said):
            made.load_state_dict(state, strict=strict)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ("no tensor", "bias is a str, expected a tensor"),
        (torch.zeros(24, dtype=torch.int64), "bias is torch.int64, expected float"),
        (torch.zeros(23), r"its bias has shape \[23\], expected \[24\]"),
    ],
)
def test_no_layer_is_made_of_a_bad_bias(format, bias, said):
    state = dict(layer(format).state_dict()) | {"bias": bias}
    with pytest.raises(ValueError, match=said):
        QuantizedLinear.from_state(state)


OWN_SCALES = [
    ("fp8", "scale"), ("int8", "SCB"), ("nf4", "nested_absmax"), ("nf4", "nested_quant_map"),
    ("nf4", "nested_offset"), ("fp4", "nested_absmax"),
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("format", "name"), OWN_SCALES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_scales_by_its_own_names_are_finite(format, name, value, adapted):
    made, other = layer(format), layer(format)
    state = {n: t.clone() for n, t in other.frozen_operand().tensors().items()}
    state[name].view(-1)[0] = value
    made = LoRALinear.from_linear(made, 4) if adapted else made
    before = {n: t.clone() for n, t in made.operand().tensors().items()}
    with pytest.raises(RuntimeError, match=f"{name} (of the checkpoint )?is NaN or infinite"):
        made.load_state_dict(state, strict=False)
    after = made.operand().tensors()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_codes_that_are_no_numbers_as_floats_are_codes():
    """Of bytes that say NaN to whoever takes them for bfloat16."""
    plain = NF4.of(torch.randn(24, 40))
    tensors = {**plain.tensors(), "weight": torch.full((240,), float("nan"), dtype=torch.bfloat16)}
    weight = NF4(tensors, (24, 40), torch.float32, 64, 256)
    made = QuantizedLinear.from_operand(weight)
    assert made.load_state_dict(weight.tensors()) == ([], [])


def in_codes_of(dtype):
    """An fp8 layer that has codes so."""
    t = layer("fp8").frozen_operand().tensors()
    return QuantizedLinear.from_operand(
        FP8({"weight": t["weight"].view(dtype), "scale": t["scale"]}, torch.float32),
        torch.randn(24),
    )


BYTES = (torch.uint8, torch.float8_e4m3fn)


@pytest.mark.parametrize("given", BYTES, ids=str)
@pytest.mark.parametrize("held", BYTES, ids=str)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_codes_of_fp8_load_as_bytes_and_as_numbers(given, held, assign, adapted):
    plain, made = in_codes_of(given), in_codes_of(held)
    state = dict(plain.state_dict())
    assert state["weight"].dtype is given
    made = LoRALinear.from_linear(made, 4) if adapted else made
    found = made.load_state_dict(state, strict=not adapted, assign=assign)
    assert not found.unexpected_keys
    assert made.weight.dtype is held
    assert torch.equal(made.operand().dense(), plain.dense_weight())
    assert state["weight"].dtype is given


@pytest.mark.parametrize("held", BYTES, ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float8_e5m2, torch.int8], ids=str)
def test_codes_are_not_converted(held, given):
    made = in_codes_of(held)
    before = made.dense_weight()
    state = dict(made.state_dict()) | {"weight": torch.ones(24, 40).to(given)}
    with pytest.raises(
        RuntimeError, match=f"stores weight as {held}, and the checkpoint as {given}"
    ):
        made.load_state_dict(state)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_refused_is_not_called_missing(format):
    made = nn.Sequential(layer(format), nn.Linear(24, 2))
    with pytest.raises(RuntimeError, match=r"stores (its )?weight as") as caught:
        made.load_state_dict({"0.weight": torch.ones(24, 40), "0.bias": torch.ones(24)})
    said = str(caught.value)
    assert '"1.weight", "1.bias"' in said
    assert '"0.' not in said
