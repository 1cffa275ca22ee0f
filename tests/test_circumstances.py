"""A result that depends on something that may change is caught: stand-ins that do."""

import pytest
import torch
from circumstances import (
    MEMORY,
    ORDER,
    THREADS,
    WORK,
    assert_same_bits,
    together,
    why_not_the_same_bits,
)


def test_what_depends_on_nothing_has_the_same_bits():
    x = torch.randn(1000)
    assert_same_bits(lambda: x * 3, MEMORY, WORK, THREADS)


def test_memory_that_nobody_writes_is_caught():
    def run():
        y = torch.empty(300)
        if not torch.are_deterministic_algorithms_enabled():
            y.zero_()  # as it happens
        y[:-1] = 1.0
        return y

    reason = "the output has other bits: fresh memory holds NaN"
    assert why_not_the_same_bits(run, MEMORY) == reason


def test_a_sum_cut_by_the_number_of_threads_is_caught():
    x = torch.randn(10_001)

    def run():
        total = torch.zeros(())
        for part in x.chunk(torch.get_num_threads()):
            total += part.sum()
        return total

    reason = why_not_the_same_bits(run, THREADS)
    assert reason.startswith("the output has other bits: on ")


def test_the_sign_of_zero_is_a_bit():
    x = torch.zeros(3)

    def run():
        return -x if torch.are_deterministic_algorithms_enabled() else x

    assert why_not_the_same_bits(run, MEMORY) is not None


def test_of_several_outputs_the_one_that_differs_is_named():
    def run():
        return {"y": torch.ones(2), "dA": torch.ones(2) * torch.get_num_threads()}

    with pytest.raises(AssertionError, match="dA has other bits: on "):
        assert_same_bits(run, THREADS)


def test_outputs_that_say_nothing_are_refused():
    for output in (torch.full((2,), torch.nan), torch.empty(0)):
        with pytest.raises(AssertionError, match="the output is"):
            assert_same_bits(lambda output=output: output, MEMORY)
    with pytest.raises(AssertionError):
        assert_same_bits(lambda: torch.ones(1))


def test_changes_together_are_each_made():
    seen = []

    def run():
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))
        return torch.ones(1)

    threads = {name: THREADS[name] for name in ("on 3 threads", "on 4 threads")}
    assert_same_bits(run, together(MEMORY, threads))
    assert seen[1:] == [(True, 3), (False, 4)]


def test_a_sum_in_the_order_of_arrival_is_caught(device):
    """On a GPU by other work beside it; in the interpreter by the order of its programs."""
    pytest.importorskip("triton")
    from sums import sum_in_order_of_arrival

    x = torch.randn(1 << 18 if device.type == "cuda" else 640, device=device)
    x *= 10.0 ** torch.linspace(-3, 3, x.numel(), device=device)
    changes = ORDER or {f"again, {i}": work for i in range(20) for work in WORK.values()}
    reason = why_not_the_same_bits(lambda: sum_in_order_of_arrival(x), changes)
    assert reason is not None


@pytest.mark.skipif(not ORDER, reason="the interpreter's order")
@pytest.mark.parametrize("change", ORDER)
def test_programs_start_in_another_order_each_once(change):
    pytest.importorskip("triton")
    from sums import who_came_when

    plain = who_came_when((3, 4, 2))
    assert plain.tolist() == list(range(24))
    with ORDER[change]():
        changed = who_came_when((3, 4, 2))
        assert who_came_when((5, 1, 1)).sort().values.tolist() == list(range(5))
    assert changed.tolist() != plain.tolist()
    assert changed.sort().values.tolist() == plain.tolist()
    assert who_came_when((3, 4, 2)).tolist() == plain.tolist()
