"""``lorafast.quantize``: which layers, what is refused, memory; and merging with quantizing again."""

import copy
import gc
import os
import tempfile
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrizations

import lorafast
from lorafast import operands
from lorafast.nn import LoRALinear, QuantizedLinear
from lorafast.operands import FP8, MXFP4, NF4, W8A8

FORMATS = ("nf4", "fp4", "int8", "fp8")
in_each = pytest.mark.parametrize("format", FORMATS)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 32, dtype=dtype)
        self.up = nn.Linear(32, 48, dtype=dtype)
        self.down = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(32, 11, bias=False, dtype=dtype)

    def forward(self, tokens):
        return self.lm_head(self.down(torch.relu(self.up(self.embed(tokens)))))


TOKENS = torch.tensor([[1, 5, 2], [0, 5, 8]])


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if name}


def snapshot(model):
    return {
        name: (type(m), dict(m._parameters), dict(m._buffers)) for name, m in model.named_modules()
    }


class TestLayers:
    @in_each
    def test_all_linear_but_the_head(self, format):
        model = Net()
        before = copy.deepcopy(model)
        assert lorafast.quantize(model, format) is model
        assert kinds(model) == kinds(before) | {"up": QuantizedLinear, "down": QuantizedLinear}
        assert not any(p.requires_grad for p in model.up.parameters())
        assert model.lm_head.weight.requires_grad
        for name in ("up", "down"):
            plain, made = getattr(before, name), getattr(model, name)
            expected = operands.quantize(plain.weight, format)
            assert torch.equal(made.dense_weight(), expected.dense())
            assert (made.bias is None) == (plain.bias is None)

    @in_each
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_layer_by_itself(self, format, dtype):
        plain = nn.Linear(32, 48, dtype=dtype).eval()
        plain.mark = "mine"
        plain.register_forward_hook(lambda module, inputs, y: y + 1)
        made = lorafast.quantize(plain, format)
        assert isinstance(made, QuantizedLinear)
        assert (made.training, made.mark, made.bias) == (False, "mine", plain.bias)
        x = torch.randn(3, 32).to(dtype)
        W = made.dense_weight()
        torch.testing.assert_close(made(x), nn.functional.linear(x, W, plain.bias) + 1)
        assert (W - plain.weight).norm() < 0.15 * plain.weight.norm()

    def test_named_and_excluded(self):
        model = lorafast.quantize(Net(), targets=r"lm_head|up", exclude=["up"])
        assert {n for n, k in kinds(model).items() if k is QuantizedLinear} == {"lm_head"}
        model = lorafast.quantize(Net(), targets=r"(up|down)")
        assert {n for n, k in kinds(model).items() if k is QuantizedLinear} == {"up", "down"}

    def test_a_layer_that_another_shares_its_weight_with_is_left(self):
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
        model[2].weight = model[0].weight
        with pytest.warns(
            UserWarning, match="left as they are: 2: another module shares its weight"
        ):
            lorafast.quantize(model)
        assert isinstance(model[1], QuantizedLinear)
        assert model[2].weight is model[0].weight

    def test_a_layer_with_two_names_stays_one(self):
        model = nn.Sequential(nn.Linear(8, 8))
        model.append(model[0])
        lorafast.quantize(model)
        assert isinstance(model[0], QuantizedLinear)
        assert model[0] is model[1]

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_model_of_transformers_keeps_its_embedding_and_its_head(self, tied):
        """And a second call finds nothing left."""
        transformers = pytest.importorskip("transformers")
        settings = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=24, tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(settings)
        embedding, head = model.model.embed_tokens, model.lm_head
        kept = embedding.weight, head.weight
        expected = model(TOKENS).logits
        lorafast.quantize(model, "int8")
        made = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert len(made) == 2 * 7
        assert (model.model.embed_tokens, model.lm_head) == (embedding, head)
        assert embedding.weight is kept[0]
        assert head.weight is kept[1]
        assert (head.weight is embedding.weight) == tied
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0.05, atol=0.01)
        with pytest.raises(ValueError, match=r"the model has no nn\.Linear left to quantize"):
            lorafast.quantize(model, "int8")
        assert [m for m in model.modules() if isinstance(m, QuantizedLinear)] == made

    def test_options(self):
        made = lorafast.quantize(nn.Linear(64, 64), "fp4", block=128, nested=False)
        weight = made.frozen_operand()
        assert (weight.format, weight.block, weight.nested_block) == ("fp4", 128, None)

    def test_the_fused_encoder_of_pytorch_calls_its_layers(self):
        inner = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        model = nn.TransformerEncoder(inner, 2).eval()
        x = torch.randn(2, 5, 32)
        with pytest.warns(UserWarning, match="MultiheadAttention reads its weight"):
            lorafast.quantize(model, "int8")
        with torch.inference_mode():
            found = model(x)
        torch.testing.assert_close(found, model(x).detach())

    def test_gpt2s_layer(self):
        transformers = pytest.importorskip("transformers")
        plain = transformers.pytorch_utils.Conv1D(24, 16)
        x = torch.randn(3, 16)
        made = lorafast.quantize(plain, "int8")
        assert made.frozen_operand().shape == (24, 16)
        torch.testing.assert_close(made(x), plain(x), rtol=0.01, atol=0.01)

    def test_memory(self):
        """While a layer is quantized, the dense weights before it are gone."""
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        alive = [weakref.ref(layer.weight) for layer in model]
        seen = []
        real = operands.quantize

        def counted(weight, *arguments, **options):
            gc.collect()
            seen.append(sum(one() is not None for one in alive))
            return real(weight, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operands, "quantize", counted)
            lorafast.quantize(model)
        assert seen == [4, 4, 3, 2, 1]  # the first is the check of the arguments


def nan(model):
    model.down.weight.data[3, 5] = float("nan")


def parametrized(model):
    parametrizations.weight_norm(model.down)


def with_gradient(model):
    model(TOKENS).sum().backward()


def on_meta(model):
    model.down.to("meta")


def of_integers(model):
    model.down.weight = nn.Parameter(model.down.weight.data.int(), requires_grad=False)


REFUSED = {
    "NaN": (nan, "down can't be quantized: its weight is NaN or infinite in 1 of 1536 elements"),
    "parametrized": (parametrized, "its weight is computed by a parametrization: remove that first"),
    "trained": (with_gradient, "its weight has a gradient, and a quantized one is not trained"),
    "meta": (on_meta, "its weight is on the device meta, which holds no values"),
    "integers": (of_integers, r"its weight is torch\.int32, expected"),
    "quantized": (
        lambda model: lorafast.quantize(model, targets=["down"]), "its weight is quantized already"
    ),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED.keys())
    def test_a_layer_that_was_asked_for(self, change, said):
        model = Net()
        change(model)
        before = snapshot(model)
        with pytest.raises(TypeError, match=said):
            lorafast.quantize(model, targets=["up", "down"])
        assert snapshot(model) == before

    def test_one_of_all_is_left_and_named(self):
        model = Net()
        nan(model)
        with pytest.warns(UserWarning, match="left as they are: down: its weight is NaN"):
            lorafast.quantize(model)
        assert isinstance(model.up, QuantizedLinear)
        assert isinstance(model.down, nn.Linear)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"format": "nf3"}, "format is 'nf3', expected one of nf4, fp4, int8, fp8"),
            ({"format": "mxfp4"}, "format is 'mxfp4', expected one of"),
            ({"format": None}, "format is None, expected one of"),
            ({"format": "int8", "block": 64}, "block is 64, and int8 takes no options"),
            ({"format": "fp8", "nested": True}, "nested is True, and fp8 takes no options"),
            ({"block": 0}, "block is 0, expected 1 to"),
            (
                {"targets": ["upp"]},
                r"targets has 'upp', which reaches no nn.Linear of the model, did you mean 'up'\?",
            ),
            ({"targets": "upp"}, r"targets is 'upp', which .*, did you mean 'up'\?"),
            ({"targets": "zz"}, r"targets is 'zz', which .* \(there are up, "),
            ({"targets": []}, r"targets is \[\], expected at least one name"),
            ({"targets": "("}, r"targets is '\(', which is not a regex"),
            ({"exclude": ["upp"]}, "exclude has 'upp', which reaches no nn.Linear"),
            ({"exclude": ["up", "down"]}, "has no nn.Linear left to quantize"),
        ],
    )
    def test_arguments(self, options, said):
        model = Net()
        before = snapshot(model)
        with pytest.raises(ValueError, match=said):
            lorafast.quantize(model, **options)
        assert snapshot(model) == before

    @pytest.mark.parametrize(
        ("bias", "said"),
        [
            (torch.zeros(3), r"down can't be quantized: its bias is torch.float32 \[3\] on cpu"),
            (torch.zeros(8, device="meta"), "on meta, expected a float"),
            (torch.zeros(8, dtype=torch.complex64), "its bias is torch.complex64"),
        ],
        ids=["size", "device", "dtype"],
    )
    def test_a_bias_that_does_not_fit(self, bias, said):
        model = Net()
        model.down.bias = nn.Parameter(bias)
        before = snapshot(model)
        with pytest.raises(TypeError, match=said):
            lorafast.quantize(model, targets=["up", "down"])
        assert snapshot(model) == before

    def test_what_hinders_all_layers_is_said(self):
        model = Net().to("meta")
        with pytest.raises(TypeError, match=r"nothing can be quantized: .*the device meta"):
            lorafast.quantize(model)

    def test_within_a_block_of_meta(self):
        with torch.device("meta"):
            model = Net()
            with pytest.raises(TypeError, match=r"nothing can be quantized: .*the device meta"):
                lorafast.quantize(model, "nf4")

    def test_adapters(self):
        model = lorafast.adapt(Net(), 4, ["up"])
        before = snapshot(model)
        with pytest.raises(ValueError, match="up has an adapter, expected none: quantize first"):
            lorafast.quantize(model)
        assert snapshot(model) == before

    def test_pefts_adapters(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
        with pytest.raises(ValueError, match="up has PEFT's adapter, expected none"):
            lorafast.quantize(model)

    def test_layers_of_bitsandbytes(self):
        bnb = pytest.importorskip("bitsandbytes")
        model = nn.Sequential(bnb.nn.Linear4bit(32, 48, quant_type="nf4").to("cpu"))
        with pytest.raises(
            TypeError, match="0 can't be quantized: its weight is quantized already"
        ):
            lorafast.quantize(model, targets=["0"])


class TestAdapted:
    @in_each
    def test_adapted_and_merged(self, format, draw_adapters):
        model = lorafast.quantize(Net(), format)
        W = model.up.dense_weight()
        lorafast.adapt(model, 4, ["up", "down"])
        assert isinstance(model.up, LoRALinear)
        draw_adapters(model)
        bias, delta = model.up.bias, model.up.delta_weight()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lorafast.merge(model)
        assert type(model.up) is nn.Linear
        assert torch.equal(model.up.weight, W + delta)
        assert model.up.bias is bias

    @in_each
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_merged_and_quantized_again(self, format, use_dora, draw_adapters):
        model = lorafast.quantize(Net(torch.bfloat16), format)
        before = {n: getattr(model, n).frozen_operand() for n in ("up", "down")}
        lorafast.adapt(model, 4, ["up", "down"], use_dora=use_dora)
        draw_adapters(model)
        layers = {name: getattr(model, name) for name in before}
        sums = {}
        for name, weight in before.items():
            V = weight.to(torch.float32).dense() + layers[name].delta_weight()
            if use_dora:
                m = layers[name].lora_magnitude.detach().float()[:, None]
                V = m * V / V.norm(dim=1, keepdim=True)
            sums[name] = V
        with pytest.warns(UserWarning, match="merged weights quantized again: 2; ") as caught:
            lorafast.merge(model, requantize=True)
        errors = {}
        for name, weight in before.items():
            made = getattr(model, name)
            assert type(made) is QuantizedLinear
            found = made.frozen_operand()
            assert operands.is_same_kind(found, weight)
            assert (found.dtype, found.parameters) == (weight.dtype, weight.parameters)
            Q = found.to(torch.float32).dense()
            expected = weight.like(sums[name]).to(torch.float32).dense()
            assert (Q - expected).norm() <= 1e-2 * expected.norm()
            errors[name] = float((Q - sums[name]).norm() / sums[name].norm())
        worst = max(errors, key=errors.get)
        sentence = str(caught[0].message)
        assert f"at most {errors[worst]:.2g} of a weight ({worst})" in sentence

    def test_an_adapter_that_changes_nothing_loses_next_to_nothing(self):
        made = lorafast.quantize(nn.Linear(64, 48), "int8")
        W = made.dense_weight()
        layer = LoRALinear.from_linear(made, 4)
        again, lost = layer.to_quantized()
        assert torch.equal(again.dense_weight(), W)
        assert (lost.error, lost.of_update) == (0.0, 0.0)

    def test_what_cant_be_quantized_again(self):
        model = lorafast.adapt(Net(), 4)
        with pytest.raises(
            ValueError, match="requantize is True, and no adapted layer of the model"
        ):
            lorafast.merge(model, requantize=True)
        weight = MXFP4(
            torch.zeros(4, 16, dtype=torch.uint8), torch.full((4, 1), 127).byte(), torch.float32
        )
        model = nn.Sequential(LoRALinear.from_operand(weight, 2))
        before = snapshot(model)
        with pytest.raises(ValueError, match="0 can't be merged: nothing quantizes to mxfp4"):
            lorafast.merge(model, requantize=True)
        assert snapshot(model) == before


def _train(model, x, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    losses = []
    for _ in range(steps):
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _on_each_rank(rank, world, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for format in (*FORMATS, *OTHERS):
        for low in (False, True):
            _check_sharded(format, low)
    dist.destroy_process_group()
    os._exit(0)  # at its end a process with FSDP is aborted now and then: pytorch/pytorch#90549


def _mxfp4(W):
    (N, K), generator = W.shape, torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
    return MXFP4(codes, torch.full((N, K // 32), 121, dtype=torch.uint8), W.dtype)


def _in_blocks(W):
    codes, scale = FP8.of(W).tensors().values()
    rows = scale.view(-1, 1)[::16].repeat(1, -(-W.shape[1] // 16)).contiguous()
    return FP8({"weight": codes, "scale": rows}, W.dtype, (16, 16))


OTHERS = {
    "nf4 in blocks of 32, plain": lambda W: NF4.of(W, 32, nested=False),
    "fp8 in blocks": _in_blocks,
    "mxfp4": _mxfp4,
    "w8a8": W8A8.of,
}
"""Formats that ``quantize`` makes otherwise or not at all."""


def _quantized(model, format):
    if format not in OTHERS:
        return lorafast.quantize(model, format)
    for i in (0, 2):
        weight = OTHERS[format](model[i].weight.detach())
        model[i] = QuantizedLinear.from_operand(weight, model[i].bias)
    return model


def _check_sharded(format, low):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    # 33 rows don't divide by two processes.
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 33))
    lorafast.adapt(_quantized(model, format), 4)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(8, 64)
    alone = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low else None)
    scales = {name: t.clone() for name, t in model.named_buffers()}
    for part in (model[0], model[2], model):
        fully_shard(part, mp_policy=policy)
    codes = next(p for n, p in model[0].named_parameters() if n in ("weight", "blocks"))
    assert isinstance(codes, DTensor)
    assert codes.dtype.itemsize == 1
    assert codes.to_local().shape[0] == 48
    found = _train(model, x)
    for name, buffer in model.named_buffers():
        assert buffer.dtype is scales[name].dtype, name
        assert torch.equal(buffer, scales[name]), name
    if low:  # as FSDP has it: master weights in float32, everything in a forward bfloat16
        weights = [
            p for n, p in alone.named_parameters() if n.endswith(("bias", "lora_A", "lora_B"))
        ]
        masters = [p.detach().clone() for p in weights]
        expected = []
        for _ in found:
            for p, master in zip(weights, masters, strict=True):
                p.data = master.bfloat16()
                p.grad = None
            loss = alone(x.bfloat16()).float().square().mean()
            loss.backward()
            expected.append(loss.item())
            for p, master in zip(weights, masters, strict=True):
                if p.grad is not None:
                    master -= 0.5 * p.grad.float()
    else:
        expected = _train(alone, x)
    assert found == expected
    assert found[0] > found[-1]
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t
             for name, t in model.state_dict().items()}  # fmt: skip
    alone.load_state_dict(state)


@pytest.mark.slow
def test_sharded_by_fsdp_it_trains_as_in_one_process():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_each_rank, (2, os.path.join(folder, "rendezvous")), nprocs=2)


def test_what_fsdp_has_sharded_is_refused():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 8))
        fully_shard(model)
        with pytest.raises(TypeError, match="the model is sharded by FSDP"):
            lorafast.quantize(model, targets=["0"])
    finally:
        dist.destroy_process_group()


def test_an_unknown_option_is_told_those_that_there_are():
    with pytest.raises(ValueError, match="foo is 1, and nf4 takes block, nested, nested_block"):
        QuantizedLinear.from_linear(nn.Linear(4, 4), "nf4", foo=1)
