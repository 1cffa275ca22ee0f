"""Packed frozen weights: right, dropped when the weight changes, seen by nothing else."""

import copy
import gc
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_contract, lay_out
from hypothesis import given
from hypothesis import strategies as st

import lorafast
from lorafast.nn import LoRALinear
from lorafast.operands import packed

BF16 = torch.bfloat16

needs_onednn = pytest.mark.skipif(
    packed.why_unavailable() is not None, reason=str(packed.why_unavailable())
)


def assert_close(one, two):
    """Apart from the roundings of bfloat16: an expansion may come before or after the base product."""
    assert (one - two).norm() <= 2**-7 * two.norm()


@pytest.fixture(autouse=True)
def _nothing_granted():
    yield
    lorafast.allow_packing(0)


def make(K=40, N=24, r=4, **options):
    layer = LoRALinear(K, N, r, dtype=BF16, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def products(monkeypatch):
    """Counts the products on a packed weight."""
    count = []
    plain = packed.linear_if_packed

    def counted(*arguments):
        y = plain(*arguments)
        if y is not None:
            count.append(y.shape)
        return y

    monkeypatch.setattr(packed, "linear_if_packed", counted)
    return count


class _Packed:
    @staticmethod
    def linear(x, weight, bias):
        packed.pack(weight)
        y = packed.linear_if_packed(x, weight, bias)
        assert y is not None
        return y


@needs_onednn
@given(
    M=st.integers(0, 70),
    K=st.integers(1, 140),
    N=st.integers(1, 140),
    layout=st.sampled_from(("contiguous", "transposed", "every other column", "offset")),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_the_product_holds_the_contract(M, K, N, layout, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((M, K), (N, K), N)
    )

    def call(run, cast):
        linear = run.linear if run is _Packed else F.linear
        return linear(lay_out(cast(x), layout), cast(weight), cast(bias) if with_bias else None)

    assert_contract(call, _Packed, BF16)


@needs_onednn
class TestALayer:
    @pytest.mark.parametrize("backend", ["auto", "aten", "cpu"])
    @pytest.mark.parametrize("M", [1, 16, 300])
    def test_serves_the_forward_with_and_without_gradients(self, products, backend, M):
        if backend == "cpu" and not lorafast.backends()["cpu"].usable:
            pytest.skip("the native kernels are not built")
        layer, x = make(300, 200), torch.randn(M, 300, dtype=BF16)
        with lorafast.use_backend(backend):
            plain, plain_of_trained = layer(x), layer(x.clone().requires_grad_())
            layer.pack_()
            with torch.no_grad():
                by_packed = layer(x)
            trained = layer(x)
            assert_close(by_packed, plain)
            assert_close(trained, plain)
            assert len(products) == 2
            leaf = x.clone().requires_grad_()
            gradients = torch.autograd.grad(layer(leaf).sum(), (leaf, layer.lora_A, layer.lora_B))
        assert all(g.isfinite().all() for g in gradients)
        assert plain_of_trained.shape == by_packed.shape

    def test_gradients_are_those_without_packing(self):
        layer, x = make(300, 200), torch.randn(90, 300, dtype=BF16)

        def gradients():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad((layer(leaf) ** 2).sum(), (leaf, layer.lora_A, layer.lora_B))

        plain = gradients()
        layer.pack_()
        for one, two in zip(plain, gradients(), strict=True):
            assert_close(one, two)

    def test_a_weight_that_is_trained_too_gets_its_gradient(self):
        layer = make().pack_()
        layer.weight.requires_grad_(True)
        layer(torch.randn(3, 40, dtype=BF16)).sum().backward()
        assert layer.weight.grad is not None

    def test_nothing_else_sees_it(self):
        layer = make()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        layer.pack_()
        assert layer.state_dict().keys() == before.keys()
        assert len(list(layer.parameters())) == 4
        assert list(layer.buffers()) == []
        assert not packed.is_packed(copy.deepcopy(layer).weight)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert not packed.is_packed(torch.load(file, weights_only=False).weight)
        assert packed.is_packed(layer.weight)

    def test_layers_that_share_a_weight_share_it(self, products):
        one = make(bias=False)
        two = LoRALinear.from_linear(torch.nn.Linear(40, 24, bias=False, dtype=BF16), 2)
        two.weight = one.weight
        one.pack_()
        with torch.no_grad():
            two(torch.randn(3, 40, dtype=BF16))
        assert len(products) == 1

    def test_a_merged_layer_packs_its_merged_weight(self, products):
        layer, x = make(), torch.randn(3, 40, dtype=BF16)
        layer.merge()
        layer.pack_()
        with torch.no_grad():
            y = layer(x)
        assert len(products) == 1
        assert_close(y, F.linear(x, layer._merged_weight, layer.bias))
        layer.unmerge()
        assert packed.memory_in_use() == 0

    def test_it_shows(self):
        layer = make().pack_()
        assert "packed=True" in repr(layer)
        assert "on the packed weight" in str(lorafast.explain(layer))
        layer.unpack_()
        assert "packed" not in repr(layer)
        assert packed.memory_in_use() == 0

    def test_compiled(self):
        layer, x = make(300, 200), torch.randn(90, 300, dtype=BF16)
        expected = layer(x)
        layer.pack_()
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True)(x)
        assert_close(compiled, expected)

    def test_tensors_can_be_swapped(self, products):
        layer, x = make().pack_(), torch.randn(3, 40, dtype=BF16)
        other = torch.nn.Parameter(torch.randn(24, 40).to(BF16), requires_grad=False)
        expected = F.linear(x, other, layer.bias) + (
            layer(x) - F.linear(x, layer.weight, layer.bias)
        )
        torch.utils.swap_tensors(layer.weight, other)
        products.clear()
        with torch.no_grad():
            assert_close(layer(x), expected)
        assert products == []
        assert packed.memory_in_use() == 0

    def test_tensors_of_which_packing_was_asked_can_be_swapped(self):
        layer = make()
        lorafast.allow_packing(1)
        with torch.inference_mode():
            layer(torch.randn(3, 40, dtype=BF16))
        other = torch.nn.Parameter(torch.zeros(24, 40, dtype=BF16), requires_grad=False)
        torch.utils.swap_tensors(layer.weight, other)
        assert not layer.weight.any()

    def test_two_tensors_over_the_same_memory_have_one_copy(self, products):
        one, two = make(), make()
        two.weight = torch.nn.Parameter(one.weight.detach(), requires_grad=False)
        one.pack_()
        two.pack_()
        assert packed.memory_in_use() == 40 * 24 * 2
        with torch.no_grad():
            two(torch.randn(3, 40, dtype=BF16))
        assert len(products) == 1
        one.unpack_()
        assert packed.is_packed(two.weight)

    def test_a_pickled_weight_is_an_ordinary_one(self):
        layer = make().pack_()
        layer.merge()
        layer.pack_()
        file = io.BytesIO()
        torch.save([layer.weight, layer._merged_weight], file)
        file.seek(0)
        for weight in torch.load(file, weights_only=True):
            assert vars(weight) == {}
        assert vars(layer.weight) == {}
        assert vars(copy.deepcopy(layer)._merged_weight) == {}

    def test_memory_goes_with_the_weight(self):
        layer = make().pack_()
        assert packed.memory_in_use() == 40 * 24 * 2
        del layer
        gc.collect()
        assert packed.memory_in_use() == 0


def _step(layer):
    layer.weight.requires_grad_(True)
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()
    layer.weight.requires_grad_(False)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2.0),
    "one element": lambda layer: layer.weight[0, 0].add_(1.0),
    "an optimizer": _step,
    "load_state_dict": lambda layer: layer.load_state_dict(make(40, 40).state_dict()),
    "data assigned": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "data in place": lambda layer: layer.weight.data.add_(0.5),
    "a small sum through data": lambda layer: layer.weight.data.add_(
        1e-2 * torch.randn(40, 4).to(BF16) @ torch.randn(4, 40).to(BF16)
    ),
    "data transposed": lambda layer: setattr(layer.weight, "data", layer.weight.data.t()),
    "another parameter": lambda layer: setattr(
        layer, "weight", torch.nn.Parameter(torch.randn(40, 40).to(BF16), requires_grad=False)
    ),
}


@needs_onednn
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_weight_is_not_multiplied_by_as_it_was(products, change, mode):
    layer, x = make(40, 40).pack_(), torch.randn(3, 40, dtype=BF16)
    with mode():
        layer(x)
        assert len(products) == 1
        with torch.inference_mode(False), torch.no_grad():
            change(layer)
        y = layer(x)
        assert len(products) == 1
        assert_close(y, copy.deepcopy(layer)(x))
        if layer.weight.is_contiguous():
            layer.pack_()
            assert_close(layer(x), y)
            assert len(products) == 2


@needs_onednn
def test_a_merged_weight_that_was_cut_is_not_multiplied_by_as_it_was():
    layer = make(bias=False)
    layer.merge()
    layer.pack_()
    layer._merged_weight.data = layer._merged_weight.data[:10]
    with torch.no_grad():
        assert layer(torch.randn(3, 40, dtype=BF16)).shape == (3, 10)


@needs_onednn
class TestWhatPyTorchDoesAroundALinear:
    """oneDNN's product is below autograd, autocast and dispatch: those take the weight as it is."""

    def merged(self):
        layer = make()
        layer.merge()
        return layer.pack_()

    def test_autocast(self, products):
        layer, x = self.merged(), torch.randn(3, 40)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            y = layer(x)
        assert y.dtype is BF16
        assert_close(y, F.linear(x.to(BF16), layer._merged_weight, layer.bias))

    def test_another_dtype_is_refused_as_ever(self):
        with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
            self.merged()(torch.randn(3, 40))

    def test_forward_gradients(self, products):
        layer, x = self.merged(), torch.randn(3, 40, dtype=BF16)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        expected = F.linear(torch.ones_like(x), layer._merged_weight)
        assert_close(tangent, expected)
        tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
        assert_close(tangent, expected)
        assert not products

    def test_subclasses(self, products):
        class Mine(torch.Tensor):
            pass

        with torch.no_grad():
            self.merged()(torch.randn(3, 40, dtype=BF16).as_subclass(Mine))
        assert not products

    def test_a_compiled_merged_layer(self):
        layer, x = self.merged(), torch.randn(3, 40, dtype=BF16)
        with torch.no_grad():
            expected = layer(x)
            compiled = torch.compile(layer, fullgraph=True)
            assert_close(compiled(x), expected)

    def test_modules_that_swap_their_tensors(self):
        layer = make().pack_()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer.float()
            layer.load_state_dict(layer.state_dict())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert layer.weight.dtype is torch.float32
        assert packed.memory_in_use() == 0

    def test_a_weight_that_is_computed(self):
        layer = make()
        torch.nn.utils.parametrizations.weight_norm(layer, "weight")
        repr(layer)
        with pytest.raises(ValueError, match="computed anew in every forward"):
            layer.pack_()


@needs_onednn
def test_unpacking_drops_both_weights_of_a_merged_layer():
    layer = make().pack_()
    layer.merge()
    layer.pack_()
    assert packed.memory_in_use() == 2 * 40 * 24 * 2
    layer.unpack_()
    assert packed.memory_in_use() == 0
    layer.pack_()
    layer.unmerge()
    layer.pack_()
    layer.merge()
    layer.float()
    assert packed.memory_in_use() == 0


@needs_onednn
@pytest.mark.parametrize("convert", [lambda m: m.float(), lambda m: m.to("meta")])
def test_another_dtype_or_device_drops_it(convert):
    layer = make().pack_()
    convert(layer)
    assert packed.memory_in_use() == 0


@needs_onednn
class TestAutomatically:
    def test_in_inference_mode_when_memory_is_granted(self, products):
        layer, x = make(), torch.randn(3, 40, dtype=BF16)
        with torch.inference_mode():
            layer(x)
        assert packed.memory_in_use() == 0
        lorafast.allow_packing(40 * 24 * 2)
        with torch.no_grad():
            layer(x)
        layer(x)
        assert packed.memory_in_use() == 0
        with torch.inference_mode():
            layer(x)
            assert len(products) == 1
            layer(x)
        assert len(products) == 2
        layer(x.clone().requires_grad_()).sum().backward()  # no inference tensor is left behind

    def test_within_the_memory(self):
        layers, x = [make() for _ in range(3)], torch.randn(3, 40, dtype=BF16)
        lorafast.allow_packing(2 * 40 * 24 * 2 + 100)
        with torch.inference_mode():
            for layer in layers:
                layer(x)
        assert [packed.is_packed(layer.weight) for layer in layers] == [True, True, False]

    def test_once(self):
        layer, x = make(), torch.randn(3, 40, dtype=BF16)
        lorafast.allow_packing(1 << 20)
        with torch.inference_mode():
            layer(x)
            layer.weight.mul_(2.0)
            layer(x)
        assert not packed.is_packed(layer.weight)
        lorafast.allow_packing(1 << 20)
        with torch.inference_mode():
            layer(x)
        assert packed.is_packed(layer.weight)

    def test_what_cannot_be_packed_is_left_alone(self):
        lorafast.allow_packing(1 << 20)
        with torch.inference_mode():
            LoRALinear(8, 8, 2)(torch.randn(2, 8))
            make()(torch.randn(3, 40, dtype=BF16))  # a weight made in inference mode
        assert packed.memory_in_use() == 0

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("1000", "128"),
            pytest.param("127", "0", marks=pytest.mark.slow),
            pytest.param("0", "0", marks=pytest.mark.slow),
        ],
    )
    def test_by_the_environment(self, value, expected):
        code = (
            "import torch\nfrom lorafast.nn import LoRALinear\nfrom lorafast.operands import packed\n"
            "layer = LoRALinear(8, 8, 2, dtype=torch.bfloat16)\n"
            "with torch.inference_mode(): layer(torch.randn(2, 8).bfloat16())\n"
            "print(packed.memory_in_use())"
        )
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"LORAFAST_PACK_MEMORY": value},
        )  # fmt: skip
        assert process.stdout.strip() == expected


@pytest.mark.parametrize("memory", [-1, 1.5, True, "1GB"])
def test_memory_must_be_bytes(memory):
    with pytest.raises(ValueError, match="expected a number of bytes"):
        lorafast.allow_packing(memory)


def test_the_environment_must_be_bytes():
    code = (
        "import torch, lorafast\n"
        "layer = lorafast.nn.LoRALinear(64, 64, 2, dtype=torch.bfloat16)\n"
        "with torch.inference_mode(): layer(torch.ones(3, 64, dtype=torch.bfloat16))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"LORAFAST_PACK_MEMORY": "1GB"},
    )  # fmt: skip
    assert "LORAFAST_PACK_MEMORY is '1GB', expected a number of bytes" in process.stderr


def _refused():
    yield "float32", LoRALinear(8, 8, 2), "only bfloat16 gains"
    yield "meta", make(device="meta"), "it is on meta"
    transposed = make(24, 24)
    transposed.weight = torch.nn.Parameter(transposed.weight.t(), requires_grad=False)
    yield "strides", transposed, "expected a contiguous matrix"
    with torch.inference_mode():
        yield "inference mode", make(), "made in inference mode"


@pytest.mark.parametrize(("layer", "reason"), [pytest.param(*r[1:], id=r[0]) for r in _refused()])
def test_what_cannot_be_packed_says_why(layer, reason):
    with pytest.raises(ValueError, match=reason):
        layer.pack_()


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"can't be packed: .*oneDNN"):
        make().pack_()
