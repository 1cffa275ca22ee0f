import pytest
import torch
from cards import H200, problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafast import reference
from lorafast.backends import dropout
from lorafast.backends.aten import cost


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("M", "K"), [(0, 5), (1, 1), (3, 7), (5, 8), (37, 150), (2, 4099)])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_the_mask_is_that_of_the_reference_bit_for_bit(M, K, p, seed):
    seed = torch.tensor([seed])
    assert torch.equal(dropout.keep_mask(M, K, p, seed), reference.keep_mask(M, K, p, seed))


@pytest.mark.parametrize("index", [0, 2**32 - 1, 2**32, 2**40 + 7])
def test_counters_of_more_than_32_bits(index):
    low = 0xFFFFFFFF
    seed, zero = torch.tensor(-(2**35) + 3), torch.tensor(0)
    found = dropout._philox(torch.tensor([index]), seed)
    counter = (torch.tensor(index & low), torch.tensor(index >> 32), zero, zero)
    expected = reference.philox_4x32(counter, (seed & low, (seed >> 32) & low))
    assert tuple(map(int, found)) == tuple(map(int, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dropout_is_that_of_the_reference_bit_for_bit(dtype):
    x, seed = torch.randn(9, 21).to(dtype), torch.tensor([5])
    assert torch.equal(dropout.dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed))


def test_no_dropout_is_the_input_itself():
    x = torch.randn(3, 4)
    assert dropout.dropout(x, 0.0, None) is x


def packed(seed, threshold, M, K):
    """What the mask kernel writes, made from the reference."""
    groups = -(-K // 8)
    keep = reference.keep_mask(M, 8 * groups, threshold / 65536, seed)
    keep[:, K:] = False
    shifts = torch.arange(8, dtype=torch.uint8)
    bytes_of = keep.view(M, groups, 8).to(torch.uint8) << shifts
    return bytes_of.sum(-1, dtype=torch.uint8)


@pytest.fixture
def bits(monkeypatch):
    """A kernel that makes bit masks on CPUs, and the calls of it."""
    calls = []

    def make(*arguments):
        calls.append(arguments)
        return packed(*arguments)

    monkeypatch.setitem(dropout._makers, "cpu", lambda device: make)
    return calls


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("M", "K"), [(0, 5), (1, 1), (3, 7), (5, 8), (37, 150), (2, 4099)])
def test_a_bit_mask_is_read_where_a_kernel_makes_one(bits, M, K, p):
    seed = torch.tensor([-(2**62) + 5])
    found = dropout.keep_mask(M, K, p, seed)
    assert found.dtype is torch.bool
    assert torch.equal(found, reference.keep_mask(M, K, p, seed))
    assert bits == [(seed, round(p * 65536), M, K)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dropout_by_a_bit_mask_is_that_of_the_reference_too(bits, dtype):
    x, seed = torch.randn(9, 21).to(dtype), torch.tensor([5])
    x[0] = torch.inf
    assert torch.equal(dropout.dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed))
    assert len(bits) == 1


def test_where_a_maker_can_not_it_is_made_of_pytorchs_calls(monkeypatch):
    asked = []
    monkeypatch.setitem(dropout._makers, "cpu", asked.append)
    seed = torch.tensor([5])
    assert torch.equal(dropout.keep_mask(3, 20, 0.5, seed), reference.keep_mask(3, 20, 0.5, seed))
    assert asked == [seed.device]


class Launches(TorchDispatchMode):
    """The calls of PyTorch's that would be a launch each on a GPU."""

    NONE = ("empty", "view", "scalar_tensor")  # scalars come from the host

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        if not function.is_view and not any(name in function.name() for name in self.NONE):
            self.names.append(function.name())
            read = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in read if t.dim()) + found.nbytes
        return found


def test_a_bit_mask_is_six_launches_where_pytorchs_calls_are_138(monkeypatch):
    """What the model of ``aten`` says, counted."""
    M, K, seed = 64, 4096, torch.tensor([5])
    x = torch.randn(M, K, dtype=torch.bfloat16)
    made = packed(seed, round(0.1 * 65536), M, K)
    with Launches() as plain:
        dropout.dropout(x, 0.1, seed)
    assert (len(plain.names), cost._MASK_LAUNCHES) == (138, 138)
    monkeypatch.setitem(dropout._makers, "cpu", lambda device: lambda *arguments: made)
    with Launches() as read:
        dropout.dropout(x, 0.1, seed)
    mask_kernel = 1
    assert len(read.names) + mask_kernel == cost._BIT_MASK_LAUNCHES == 6
    assert read.bytes / x.numel() == pytest.approx(cost._BIT_MASK_BYTES - 0.7, abs=0.1)


def test_the_model_of_aten_knows_the_bit_mask(monkeypatch):
    p = problem("shrink", dropout=True)
    before = cost.estimate(p, H200)
    monkeypatch.setitem(dropout._makers, "cuda", lambda device: packed)
    after = cost.estimate(p, H200)
    assert (before.launches, after.launches) == (139, 7)
    assert after.seconds < before.seconds / 4
