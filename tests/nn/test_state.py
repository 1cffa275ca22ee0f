"""A layer's scaling, its merged weight, and adapters that begin on meta or in inference mode."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import lorafast
from lorafast.nn import LoRALinear


def layer(K=7, N=5, r=3, *, dtype=torch.float64, **options):
    made = LoRALinear(K, N, r, dtype=dtype, **options)
    nn.init.normal_(made.lora_B)
    return made


@pytest.fixture
def x():
    return torch.randn(4, 7, dtype=torch.float64)


def formula(made, x, scaling):
    return x @ (made.weight + scaling * made.lora_B @ made.lora_A).t() + made.bias


class TestScaling:
    @pytest.mark.parametrize(
        ("change", "alpha", "scaling"),
        [
            (lambda made: setattr(made, "alpha", 64), 64, 16),
            (lambda made: setattr(made, "scaling", 0.5), 2, 0.5),
            (lambda made: setattr(made, "use_rslora", True), 8, 4),
            (lambda made: made.set_scaling(6, use_rslora=True), 6, 3),
        ],
        ids=["alpha", "scaling", "use_rslora", "set_scaling"],
    )
    @pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
    def test_whichever_is_set_the_model_the_repr_and_the_others_follow(
        self, x, change, alpha, scaling, merged
    ):
        made = layer(r=4, alpha=8)
        if merged:
            made.merge()
        change(made)
        assert (made.alpha, made.scaling) == (alpha, scaling)
        assert f"alpha={alpha}" in repr(made)
        torch.testing.assert_close(made(x), formula(made, x, scaling), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made.delta_weight(), scaling * made.lora_B @ made.lora_A)

    @pytest.mark.parametrize("change", [{"scaling": 0.3}, {"alpha": 5}], ids=str)
    def test_the_file_says_what_the_model_does(self, tmp_path, x, change):
        pytest.importorskip("safetensors")
        model = nn.Sequential(layer())
        for name, value in change.items():
            setattr(model[0], name, value)
        lorafast.save_adapter(model, tmp_path)
        plain = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(lorafast.load_adapter(plain, tmp_path)(x), model(x))

    def test_rank_stabilized(self):
        made = layer(r=4, use_rslora=True)
        made.scaling = 0.25
        assert (made.alpha, made.use_rslora) == (0.5, True)
        made.scaling = 0.1
        assert made.scaling == 0.1

    @pytest.mark.parametrize("name", ["alpha", "scaling"])
    @pytest.mark.parametrize(
        "value", [math.nan, "1", True, 10**400], ids=["nan", "text", "bool", "huge"]
    )
    def test_refusal(self, name, value):
        made = layer(alpha=2)
        with pytest.raises(ValueError, match=f"{name} is {value!r}, expected a finite number"):
            setattr(made, name, value)
        assert (made.alpha, made.scaling) == (2, 2 / 3)

    def test_a_merged_layer_that_can_not_take_it_keeps_what_it_has(self):
        made = layer(dtype=torch.float16, alpha=3)
        made.merge()
        merged = made._merged_weight
        with pytest.raises(ValueError, match=r"beyond torch\.float16"):
            made.alpha = 1e9
        assert (made.alpha, made.scaling, made.merged) == (3, 1, True)
        assert made._merged_weight is merged

    def test_the_rank_is_fixed(self):
        made = layer()
        with pytest.raises(AttributeError, match=r"'r'.*no setter"):
            made.r = 4
        assert made.r == made.lora_A.shape[0]

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, clone):
        made = layer(alpha=5, use_rslora=True)
        made.scaling = 0.1
        twin = clone(made)
        assert (twin.r, twin.alpha, twin.scaling) == (made.r, made.alpha, 0.1)
        assert twin.use_rslora

    def test_a_pickle_of_plain_attributes_loads(self, x):
        made = layer(alpha=5)
        state = dict(vars(made))
        for name in ("r", "alpha", "scaling", "use_rslora"):
            state[name] = state.pop("_" + name)
        del state["_plain_class"]
        old = LoRALinear.__new__(LoRALinear)
        old.__setstate__(copy.deepcopy(state))
        assert torch.equal(old(x), made(x))
        assert (old.r, old.alpha, old.scaling, old.use_rslora) == (3, 5, 5 / 3, False)
        old.alpha = 3
        assert old.scaling == 1


class TestMergingValues:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("half", ["lora_A", "lora_B"])
    @pytest.mark.parametrize("call", ["merge", "to_linear"])
    def test_those_that_are_not_finite_are_refused(self, value, half, call):
        made = layer()
        with torch.no_grad():
            getattr(made, half)[1, 0] = value
        size = getattr(made, half).numel()
        with pytest.raises(
            ValueError, match=f"^its {half} is NaN or infinite in 1 of {size} elements$"
        ):
            getattr(made, call)()
        assert not made.merged
        assert made._merged_weight is None

    @pytest.mark.parametrize("call", ["merge", "to_linear"])
    def test_a_sum_beyond_the_dtype_is_refused(self, call):
        made = layer(dtype=torch.float16)
        with torch.no_grad():
            made.lora_A.fill_(1)
            made.lora_B.zero_()[2] = 1e5
        with pytest.raises(ValueError, match=r"beyond torch.float16 in 7 of 35 elements"):
            getattr(made, call)()

    def test_a_base_that_is_not_finite_is_not_the_adapter_s_fault(self):
        made = layer()
        with torch.no_grad():
            made.weight[0, 0] = math.inf
        made.merge()
        assert made._merged_weight[0, 0] == math.inf
        expected = made.weight + made.delta_weight()
        torch.testing.assert_close(made._merged_weight, expected)
        assert expected.isfinite().sum() == expected.numel() - 1

    def test_a_checkpoint_that_can_not_be_merged_again_is_an_error_of_loading(self, x):
        model = nn.Sequential(layer())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["0.lora_B"][0] = math.nan
        model[0].merge()
        with pytest.raises(RuntimeError, match=r"0 can't be merged again: its lora_B is NaN"):
            model.load_state_dict(state)
        assert not model[0].merged
        assert model(x).isnan().any(0).tolist() == [True] + [False] * 4
        assert model(x)[:, 0].isnan().all()

    @pytest.mark.parametrize("bad", [0, 1], ids=["first", "last"])
    def test_the_whole_model_is_checked_before_any_layer_is_changed(self, bad):
        model = nn.Sequential(layer(), layer(K=5))
        with torch.no_grad():
            model[bad].lora_A[0, 0] = math.nan
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"^{bad} can't be merged: its lora_A is NaN or inf"):
            lorafast.merge(model)
        assert all(isinstance(module, LoRALinear) for module in model)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


class TestInferenceMode:
    """What is kept must serve a later training step."""

    def train(self, model, x):
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
        return leaf.grad

    @pytest.mark.parametrize(
        "prepare",
        [
            lambda made: made.merge(),
            lambda made: (made.merge(), made.load_state_dict(layer().state_dict())),
            lambda made: (made.merge(), setattr(made, "alpha", 2)),
            lambda made: (made.merge(), made.unmerge()),
        ],
        ids=["merged", "loaded", "scaled", "unmerged"],
    )
    def test_a_merged_layer_trains_later(self, x, prepare):
        made = layer()
        with torch.inference_mode():
            prepare(made)
        expected = made.weight + made.scaling * made.lora_B @ made.lora_A
        torch.testing.assert_close(self.train(made, x), expected.sum(0).expand(4, 7))
        made.unmerge()
        self.train(made, x)
        assert made.lora_A.grad is not None

    def test_a_merged_model(self, x):
        model = nn.Sequential(layer())
        with torch.inference_mode():
            lorafast.merge(model)
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        self.train(model, x)

    def test_a_model_adapted_in_it_trains_later(self, x):
        model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
        with torch.inference_mode():
            lorafast.adapt(model, 2)
        self.train(model, x)
        assert model[0].lora_B.grad.any()


class TestAdaptersOnMeta:
    def plain(self):
        return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7, bias=False))

    def on_meta(self, **options):
        with torch.device("meta"):
            model = self.plain()
        return lorafast.adapt(model, 2, **options)

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_a_plain_checkpoint_that_is_assigned_brings_them_along(self, mode):
        torch.manual_seed(0)
        plain, model = self.plain(), self.on_meta()
        with mode():
            assert model.load_state_dict(plain.state_dict(), assign=True, strict=True) == ([], [])
        x = torch.randn(3, 7)
        assert torch.equal(model(x), plain(x))
        for made in model:
            assert not made.lora_B.any()
            assert 0 < made.lora_A.abs().max() <= 1 / math.sqrt(made.in_features)
            assert made.lora_A.requires_grad
        model(x).sum().backward()
        assert model[1].lora_B.grad.any()

    def test_their_dtype_and_what_is_frozen_stay(self):
        model = self.on_meta(adapter_dtype=torch.bfloat16)
        model[0].lora_A.requires_grad_(False)
        model.load_state_dict(self.plain().state_dict(), assign=True)
        assert model[0].lora_B.dtype is torch.bfloat16
        assert not model[0].lora_A.requires_grad

    def test_a_whole_checkpoint_is_assigned_as_it_is(self):
        full, model = lorafast.adapt(self.plain(), 2), self.on_meta()
        nn.init.normal_(full[0].lora_B)
        model.load_state_dict(full.state_dict(), assign=True)
        assert torch.equal(model[0].lora_B, full[0].lora_B)

    def test_memory_from_to_empty_holds_a_fresh_adapter(self):
        plain, model = self.plain(), self.on_meta()
        torch.use_deterministic_algorithms(True)  # which fills empty memory with NaN
        try:
            model.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
        assert model.load_state_dict(plain.state_dict()) == ([], [])
        x = torch.randn(3, 7)
        assert torch.equal(model(x), plain(x))
        assert model[0].lora_A.any()

    def test_they_stay_on_meta_with_their_weight(self):
        model = self.on_meta()
        model.load_state_dict(self.on_meta().state_dict(), assign=True)
        assert model[0].lora_A.is_meta

    def test_half_a_checkpoint_is_refused_still(self):
        model, full = self.on_meta(), lorafast.adapt(self.plain(), 2)
        state = full.state_dict()
        del state["0.lora_A"]
        with pytest.raises(
            RuntimeError, match=re.escape('Missing key(s) in state_dict: "0.lora_A"')
        ):
            model.load_state_dict(state, assign=True)
