"""What bottlenecks at modules survive: pickles, other hooks, keywords, modules that write in place."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import lorafast
from lorafast.convert.bottlenecks import bottlenecks
from lorafast.nn.bottleneck import Bottleneck, put_at


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Pair(nn.Module):
    def forward(self, hidden_states, other):
        return hidden_states * 2 + other


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, h):
        h.mul_(2)
        return self.layer(h)


Two = collections.namedtuple("Two", ("states", "cache"))


class Named(nn.Module):
    def forward(self, h):
        return Two(h * 2, None)


def held(inner, *, parallel=False, **arguments):
    torch.manual_seed(0)
    one = Bottleneck(4, 2, init="bert", activation="tanh", **arguments)
    with torch.no_grad():
        one.up_bias.fill_(0.5)
    one.parallel = parallel
    put_at(inner, one)
    return Holder(inner)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_hook_of_a_fresh_process_does_not_take_the_place_of_an_unpickled_one(
    parallel, monkeypatch
):
    model, h = held(nn.Linear(4, 4), parallel=parallel), torch.randn(3, 4)
    expected = model(h)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        for _ in range(100):
            copied.inner.register_forward_hook(lambda *given: None)
            copied.inner.register_forward_pre_hook(lambda *given: None)
        assert torch.equal(copied(h), expected)
        with torch.no_grad():
            copied.inner.bottleneck.up_bias.zero_()  # its own, not that of the model it was made from
        assert not torch.equal(copied(h), expected)
        lorafast.remove_bottlenecks(copied)
        assert len(copied.inner._forward_hooks) == len(copied.inner._forward_pre_hooks) == 100
        assert not bottlenecks(copied)


def test_a_parallel_one_reads_the_first_parameter_whatever_comes_first_by_keyword():
    model = held(Pair(), parallel=True)
    h, other = torch.randn(2, 3, 4).unbind()
    expected = model(h, other)
    assert torch.equal(model(other=other, hidden_states=h), expected)
    with pytest.raises(
        TypeError, match="given a float for its first argument, hidden_states, expec"
    ):
        model(other=other, hidden_states=1.0)


def test_a_module_that_changes_its_input_in_place_is_refused_beside_a_parallel_one():
    h = torch.randn(3, 4)
    with pytest.raises(
        RuntimeError, match="Scaled with a parallel bottleneck changed its input in"
    ):
        held(Scaled(), parallel=True)(h)
    held(Scaled())(h)


def test_named_tuples_stay_what_they_are():
    model, h = held(Named()), torch.randn(3, 4)
    found = model(h)
    assert isinstance(found, Two)
    assert torch.equal(found.states, model.inner.bottleneck(h * 2))


def test_a_layer_norm_of_another_dtype_than_the_model():
    model = held(nn.Linear(4, 4).bfloat16(), layer_norm=True)
    h = torch.randn(3, 4).bfloat16()
    found, one = model(h), model.inner.bottleneck
    y = nn.functional.linear(h, model.inner.weight, model.inner.bias)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, lorafast.functional.bottleneck(
        one.norm(y.float()).bfloat16(), one.down, one.up, one.down_bias, one.up_bias, 1.0, "tanh", y
    ))  # fmt: skip


def test_what_is_made_in_inference_mode_can_be_trained():
    model = Holder(nn.Linear(4, 4))
    with torch.inference_mode():
        lorafast.adapt(model, kind="pfeiffer", targets=["inner"], bottleneck=2)
    model(torch.randn(3, 4)).sum().backward()
    assert model.inner.bottleneck.up_bias.grad is not None
