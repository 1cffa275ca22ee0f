"""Layers whose weight a parent reads without calling them: refused where known, else found out."""

import copy
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from models import adapted
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import lorafast

# Modules that are known to read a weight


def test_the_output_projection_of_multihead_attention_is_refused(unchanged):
    attention = nn.MultiheadAttention(6, 2)
    with unchanged(attention), pytest.raises(TypeError, match=r"out_proj.*without calling it"):
        lorafast.adapt(attention, 2, ["out_proj"])
    with (
        unchanged(attention),
        pytest.raises(ValueError, match=r"no nn\.Linear left"),
        pytest.warns(UserWarning, match=r"out_proj: MultiheadAttention reads"),
    ):
        lorafast.adapt(attention, 2)


def parent(kind, children, **attributes):
    """A module whose class has that name, with linear children and other attributes."""
    module = type(kind, (nn.Module,), {})()
    for child in (*children, "other"):
        setattr(module, child, nn.Linear(4, 4))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def assert_refuses(module, children):
    for child in children:
        with pytest.raises(TypeError, match=rf"{child} can't be adapted: \w+ reads its weight"):
            lorafast.adapt(module, 2, [child])
    with pytest.warns(UserWarning, match="reads its weight without calling it"):
        lorafast.adapt(module, 2)
    assert adapted(module) == {"other"}


def test_every_layer_of_transformers_that_is_read_and_never_called_is_known():
    # By their source, so that a release with another such module is found.
    transformers = pytest.importorskip("transformers")
    read = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data)|\s*=)")
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for source in re.split(r"(?m)^class ", path.read_text(encoding="utf-8"))[1:]:
            children = {
                child
                for child in read.findall(source)
                if re.search(rf"self\.{child} = nn\.Linear\(", source)
                and f"self.{child}(" not in source
            }
            if children:
                kind = re.match(r"\w+", source).group()
                found.add(kind)
                mamba = {"A_log": None, "D": None} if "self.A_log" in source else {}
                assert_refuses(parent(kind, children, **mamba), children)
    assert {"WavLMAttention", "TDNNLayer", "MambaMixer"} <= found


@pytest.mark.parametrize(
    ("kind", "children", "attributes"),
    [
        ("ShiftedWindowAttention", ["qkv", "proj"], {}),
        ("LSHSelfAttention", ["query_key", "value"], {}),
        ("Gemma3nTextAltUp", ["correction_coefs"], {}),
        ("Attention", ["qkv"], {"q_bias": torch.zeros(4)}),
        ("BloomMLP", ["dense_4h_to_h"], {"pretraining_tp": 2, "slow_but_exact": True}),
    ],
    ids=["torchvision-swin", "reformer", "gemma3n", "beit", "bloom-sliced"],
)
def test_layers_that_are_read_in_one_mode_are_refused(kind, children, attributes):
    assert_refuses(parent(kind, children, **attributes), children)


@pytest.mark.parametrize(
    ("kind", "children", "attributes"),
    [
        ("Attention", ["qkv"], {"q_bias": None}),
        ("Attention", ["qkv"], {"q_bias": torch.zeros(4), "qkv_bias_separate": True}),
        ("BloomMLP", ["dense_4h_to_h"], {"pretraining_tp": 1, "slow_but_exact": True}),
    ],
    ids=["beit-without-bias", "beit-apart", "bloom"],
)
def test_the_same_layers_are_adapted_where_they_are_called(kind, children, attributes):
    module = parent(kind, children, **attributes)
    lorafast.adapt(module, 2)
    assert adapted(module) == {*children, "other"}


def test_a_subclass_of_a_parent_that_reads_is_known():
    base = type(parent("TDNNLayer", []))
    module = type("MyTDNNLayer", (base,), {})()
    module.kernel = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="MyTDNNLayer reads its weight"):
        lorafast.adapt(module, 2, ["kernel"])


def test_layers_of_mamba_whose_weight_is_read_are_left_as_they_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    # In training its fused kernel takes x_proj, dt_proj and out_proj as bare weights; dt_proj always.
    with pytest.warns(UserWarning, match=r"left as they are: .*mixer\.dt_proj"):
        lorafast.adapt(model, 2)
    assert adapted(model) == {"backbone.layers.0.mixer.in_proj"}
    model.train()(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.lora_B.grad.count_nonzero() > 0


# Others, after the first backward


class Reader(nn.Module):
    """Calls ``called`` and only reads the weight of ``read``."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x):
        return linear(self.called(x), self.read.weight)


class Experts(nn.Module):
    """Each row goes to one expert, and no row to the second."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[0](x[:1]) + self.experts[2](x[1:])


@pytest.fixture
def reader():
    return lorafast.adapt(Reader(), 2)


INPUT = torch.ones(2, 4)
SENTENCE = r"no gradient in the first backward, where others did: {} \("


@pytest.fixture
def warns_of():
    """``warns_of(call, "read")``: the one warning that the call gives names these layers; None: none."""

    def check(call, names):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        spoken = [str(one.message) for one in caught if "no gradient" in str(one.message)]
        assert len(spoken) == (names is not None)
        if names is not None:
            assert re.search(SENTENCE.format(names), spoken[0])

    return check


def backward(model, x=INPUT):
    return lambda: model(x).sum().backward()


def test_the_first_backward_names_layers_that_got_no_gradient_and_later_ones_are_silent(
    reader, warns_of
):
    warns_of(backward(reader), "read")
    warns_of(backward(reader), None)
    reader.zero_grad()
    warns_of(backward(reader), None)


def test_nothing_is_left_behind_that_a_backward_would_pay_for(reader):
    with pytest.warns(UserWarning, match="no gradient"):
        backward(reader)()
    assert reader.called.lora_B._post_accumulate_grad_hooks is None


def test_a_hook_of_the_user_stays(reader):
    calls = []
    reader.called.lora_B.register_post_accumulate_grad_hook(calls.append)
    with pytest.warns(UserWarning, match="no gradient"):
        backward(reader)()
    backward(reader)()
    assert len(calls) == 2


def test_an_optimizer_that_drops_gradients_at_once_is_no_fault(net, x, warns_of):
    lorafast.adapt(net, 2)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    warns_of(backward(net, x), None)


def test_a_model_that_calls_all_its_layers_is_not_spoken_of(net, x, warns_of):
    warns_of(backward(lorafast.adapt(net, 2), x), None)


def test_an_expert_without_a_token_is_no_fault(warns_of):
    model = lorafast.adapt(Experts(), 2)
    warns_of(backward(model), None)
    assert [row.no_gradient for row in lorafast.summary(model).layers] == [False, True, False]


def test_layers_of_an_earlier_adapt_count_as_others(warns_of):
    model = lorafast.adapt(lorafast.adapt(Reader(), 2, ["called"]), 3, ["read"])
    warns_of(backward(model), "read")


def test_a_layer_that_is_merged_or_frozen_is_not_spoken_of(reader, warns_of):
    reader.read.merge()
    warns_of(backward(reader), None)
    model = lorafast.adapt(Reader(), 2)
    model.read.lora_B.requires_grad_(False)
    warns_of(backward(model), None)


def test_a_loaded_adapter_is_watched_too(reader, tmp_path, warns_of):
    lorafast.save_adapter(reader, tmp_path)
    warns_of(backward(lorafast.load_adapter(Reader(), tmp_path)), "read")


def test_summary_marks_layers_until_they_get_a_gradient(reader):
    assert [row.no_gradient for row in lorafast.summary(reader).layers] == [False, False]
    with pytest.warns(UserWarning, match="no gradient"):
        backward(reader)()
    summary = lorafast.summary(reader)
    assert [row.no_gradient for row in summary.layers] == [False, True]
    assert str(summary).splitlines()[2].endswith("no gradient so far")
    reader.read(INPUT).sum().backward()
    assert not any(row.no_gradient for row in lorafast.summary(reader).layers)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-hooks", "reentrant"])
def test_under_checkpointing_the_whole_backward_counts(use_reentrant, nested, net, x, warns_of):
    # Reentrant checkpointing runs one backward per block: after the first, others still have none.
    lorafast.adapt(net, 2)

    def run(function, value):
        return checkpoint(function, value, use_reentrant=use_reentrant)

    def body(value):
        return run(net.head, net.norm(run(net.block, value)))

    value = x.clone().requires_grad_()
    warns_of(lambda: (run(body, value) if nested else body(value)).sum().backward(), None)
    assert not any(row.no_gradient for row in lorafast.summary(net).layers)
    assert net.head.lora_B._post_accumulate_grad_hooks is None


def test_reentrant_checkpointing_still_finds_the_layer(reader, warns_of):
    x = INPUT.clone().requires_grad_()
    warns_of(lambda: checkpoint(reader, x, use_reentrant=True).sum().backward(), "read")


def test_a_backward_that_fails_is_not_the_first(reader, warns_of):
    def fail(gradient):
        raise RuntimeError("out of memory")

    x = INPUT.clone().requires_grad_()
    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        reader(x + 1.0).sum().backward()  # the sum's turn comes after the layer's
    assert reader.called.lora_B.grad is not None
    reader.zero_grad()
    warns_of(backward(reader), "read")
    assert reader.called.lora_B._post_accumulate_grad_hooks is None


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_trains_and_the_model_is_still_watched(make, reader, warns_of):
    copied = make(reader)
    backward(copied)()
    assert copied.called.lora_B.grad is not None
    assert not any(row.no_gradient for row in lorafast.summary(copied).layers)
    warns_of(backward(reader), "read")


def test_a_compiled_model_is_compiled_once(reader, warns_of):
    torch._dynamo.reset()
    compiled = torch.compile(reader, backend="aot_eager", fullgraph=True)
    warns_of(backward(compiled), "read")
    with torch._dynamo.config.patch(error_on_recompile=True):
        warns_of(backward(compiled), None)


def test_compiled_autograd_is_left_alone(reader, warns_of):
    torch._dynamo.reset()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        warns_of(backward(reader), None)
    assert reader.called.lora_B.grad is not None


def test_distributed_data_parallel(reader, tmp_path, warns_of):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(reader, find_unused_parameters=True)
        warns_of(backward(parallel), "read")
        warns_of(backward(parallel), None)
    finally:
        torch.distributed.destroy_process_group()
