"""Both groupings of a batch by adapter: what stands where, and what is left over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafast.backends import grouping

CPU = torch.device("cpu")
MAKE = {
    "the host knows": lambda of, n: grouping._on_the_host(of, n, CPU),
    "the device knows": lambda of, n: grouping.on_the_device(torch.tensor(of), n),
}
BY_ADAPTER = torch.arange(9.0)


@st.composite
def assignments(draw):
    """Indices and how many adapters there are; few of them used, or many."""
    n = draw(st.integers(1, 7))
    some = draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=3))
    return draw(st.lists(st.sampled_from(some), min_size=1, max_size=24)), n


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@given(drawn=assignments(), T=st.integers(0, 3))
def test_elements_stand_with_their_adapter(make, drawn, T):
    of, n = drawn
    found = make(of, n)
    if found is None:
        assert max(of) == -1
        return
    E, has = len(of), torch.tensor(of) >= 0
    x = torch.arange(1.0, E * T * 2 + 1).view(E, T, 2)
    slots = found.gathered(x).clone()
    assert slots.shape == (found.groups, found.size * T, 2)
    kept = torch.where(has.view(-1, 1, 1), x, 0.0)
    assert torch.equal(found.scattered(slots, T), kept)
    assert torch.equal(found.added(torch.ones(E, T, 2), slots), kept + 1)
    adapter = found.of_groups(BY_ADAPTER[:n]).view(-1, 1, 1).expand(slots.shape)
    whose = found.scattered(adapter.contiguous(), T)
    assert torch.equal(whose, torch.tensor(of).clamp(min=0).view(-1, 1, 1).expand(E, T, 2).float())
    groups = found.blanked(slots.clone(), T).view(found.groups, -1).sum(1).double()
    expected = [kept[torch.tensor(of) == g].sum().double() for g in range(n)]
    assert torch.equal(found.summed(groups, n), torch.stack(expected))
    # Summed over slots: each element once, and nothing else.
    assert torch.equal(found.blanked(slots, T).sum((0, 1)), kept.sum((0, 1)))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_is_left_over_is_blank_whatever_it_held(make):
    found = make([0] * 9 + [1], 2)
    slots = torch.full((found.groups, found.size * 2, 3), math.nan)
    found.blanked(slots, 2)
    assert slots.isfinite().all(2).sum() == (found.groups * found.size - 10) * 2 > 0


@given(drawn=assignments())
def test_the_host_fills_up_less_than_there_is(drawn):
    of, n = drawn
    found = MAKE["the host knows"](of, n)
    taken = sum(g >= 0 for g in of)
    assert found is None or taken <= found.groups * found.size < 2 * taken + 1


@given(E=st.integers(1, 300), n=st.integers(1, 40))
def test_the_device_fills_up_a_quarter_at_most(E, n):
    found = grouping.on_the_device(torch.full((E,), -1), n)
    assert found.groups * found.size <= 1.3 * E + 1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("index", [-2, 3, 2**40])
def test_an_index_out_of_range_is_none(make, index):
    found = make([0, index, 2], 3)
    kept = found.scattered(found.gathered(torch.ones(3, 1, 1)).clone(), 1)
    assert kept.flatten().tolist() == [1.0, 0.0, 1.0]


def test_all_in_order_is_no_copy():
    x = torch.randn(4, 2, 3)
    for of, n in (([0] * 4, 1), ([0, 0, 1, 1], 2)):
        found = MAKE["the host knows"](of, n)
        assert found.gathered(x).data_ptr() == x.data_ptr()
        assert found.of_groups(x[:n]) is not None
        assert found.adapter is None
