"""The table: what is wrong has no time, what can't run says why."""

import re
from dataclasses import replace

import pytest
import torch
from lorafast.bench.common.contenders import BUILDERS, FROZEN, UnavailableError
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape

from lorafast.bench import layer

PROBLEM = Problem(Shape("tiny", 16, 24, 40), 4, "fp32", "fp32", 0.0)
CPU = torch.device("cpu")


class FakeClock:
    """lorafast takes 1.5 times as long as the frozen layer, everyone else as long."""

    def round(self, turns, first):
        for index, (_, turn) in enumerate(turns, first):
            with turn(index) as call:
                call()
        return {name: 0.15 if name == "lorafast" else 0.1 for name, _ in turns}


def measure(against, passes=("both",), problem=PROBLEM, **builders):
    return layer.measure(
        problem, passes, against,
        device=CPU, clock=FakeClock(), seconds=0.0, builders=BUILDERS | builders,
    )  # fmt: skip


def wrong_builder(problem, tensors):
    contender = BUILDERS["lorafast"](problem, tensors)
    right = contender.layer
    contender.layer = lambda x: right(x) * 1.01
    return contender


def unavailable_builder(problem, tensors):
    raise UnavailableError("it needs a crystal ball")


def test_a_wrong_contender_is_printed_as_wrong_and_has_no_time():
    rows = measure(["peft", "mine"], mine=wrong_builder)
    (row,) = [row for row in rows if row.contender == "mine"]
    assert row.wrong.startswith("y is off by")
    assert not row.samples
    (line,) = [s for s in layer.format_rows(rows).splitlines() if "mine" in s]
    assert re.fullmatch(r"  mine  WRONG: y is off by \S+, allowed \S+", line)


def test_a_wrong_baseline_leaves_no_figures():
    def wrong_frozen(problem, tensors):
        contender = BUILDERS[FROZEN](problem, tensors)
        right = contender.layer
        contender.layer = lambda x: right(x) + 1
        return contender

    rows = measure(["peft"], **{FROZEN: wrong_frozen})
    assert not any(row.samples for row in rows)
    assert "the frozen layer itself is wrong" in layer.format_rows(rows)


def test_what_cannot_run_says_why():
    rows = measure(["mine"], mine=unavailable_builder)
    assert "  mine  not run: it needs a crystal ball" in layer.format_rows(rows).splitlines()


def test_a_contender_that_raises_is_wrong_and_the_others_go_on():
    def raising(problem, tensors):
        contender = BUILDERS["lorafast"](problem, tensors)

        def layer(x):
            raise RuntimeError("out of shared memory\nand more lines")

        contender.layer = layer
        return contender

    rows = {row.contender: row for row in measure(["mine", "aten"], mine=raising)}
    assert rows["mine"].wrong == "it raised RuntimeError: out of shared memory"
    assert rows["aten"].samples


def test_a_contender_against_itself_is_at_one():
    rows = {row.contender: row for row in measure([FROZEN])}
    assert list(rows) == [FROZEN, "lorafast", "frozen again"]
    assert rows["frozen again"].overhead.median == 1.0
    assert rows["lorafast"].overhead.median == pytest.approx(1.5)
    assert rows["frozen again"].limit == 1.0


@pytest.mark.parametrize(("which", "expected"), [("fwd", 1), ("bwd", 2), ("both", 1.5)])
def test_the_arithmetic_limit_is_a_ratio_of_flops(which, expected):
    K, N, r = PROBLEM.shape.K, PROBLEM.shape.N, PROBLEM.r
    assert PROBLEM.arithmetic_limit(which) == 1 + expected * r * (K + N) / (K * N)
    products = {"fwd": 1, "bwd": 1, "both": 2}[which]
    assert PROBLEM.flops(which, False) == 2 * 16 * 24 * 40 * products
    thin = {"fwd": 2, "bwd": 4, "both": 6}[which] * 16 * r * (K + N)
    assert PROBLEM.flops(which, True) == pytest.approx(PROBLEM.flops(which, False) + thin)


def test_every_pass_runs_and_memory_is_that_of_the_layer():
    M, K, N, r = 16, 150, 160, 4  # of a smaller one W + scaling · B·A is kept, not s
    problem = Problem(Shape("small", M, K, N), r, "fp32", "fp32", 0.0)
    rows = measure(["peft"], passes=("fwd", "bwd", "both"), problem=problem)
    assert [row.which for row in rows] == ["fwd"] * 3 + ["bwd"] * 3 + ["both"] * 3
    for row in rows:
        x_and_s = 4 * (M * K + M * r)
        assert row.saved_bytes == (0 if row.contender == FROZEN else x_and_s), row.contender
        least = 4 * M * N if row.which != "bwd" else 4 * M * K
        assert least <= row.peak_bytes < 20 * x_and_s


def test_inference_calls_several_times_a_turn_and_counts_one(monkeypatch):
    from lorafast.bench.layer import timing

    monkeypatch.setattr(timing, "_calls_a_turn", lambda which, frozen, tensors: 4)
    inputs = []

    def builder(problem, tensors):
        contender = BUILDERS["lorafast"](problem, tensors)
        plain = contender.layer

        def noted(x):
            if torch.is_inference_mode_enabled():
                inputs.append(x)
            return plain(x)

        contender.layer = noted
        return contender

    rows = {row.contender: row for row in measure([], passes=("infer",), lorafast=builder)}
    assert rows["lorafast"].time.median == pytest.approx(0.15 / 4)
    assert rows["lorafast"].saved_bytes == 0
    assert rows["lorafast"].limit == PROBLEM.arithmetic_limit("fwd")
    turns = rows["lorafast"].samples
    assert len(inputs) == 4 * (len(turns) + 2) + 1  # two rounds to warm up; one call for the memory
    assert not any(x.requires_grad for x in inputs)
    assert len({x.data_ptr() for x in inputs[:4]}) == 4


def test_a_turn_of_inference_is_long():
    from lorafast.bench.layer import timing

    (row,) = [r for r in measure([], passes=("infer",)) if r.contender == FROZEN]
    assert row.samples
    frozen = BUILDERS[FROZEN](PROBLEM, tensors := draw(PROBLEM, CPU, 2))
    assert timing._calls_a_turn("infer", frozen, tensors) > 1
    assert timing._calls_a_turn("both", frozen, tensors) == 1


def test_inference_has_no_dropout():
    problem = replace(PROBLEM, dropout_p=0.5)
    assert not layer.measure(
        problem, ("infer",), [], device=CPU, clock=FakeClock(), seconds=0.0, builders=BUILDERS
    )


def test_rows_survive_a_record():
    from dataclasses import asdict

    for row in measure(["peft"]):
        assert layer.Row.from_json(asdict(row)) == row


def test_the_sweep_varies_one_coordinate_at_a_time():
    problems = layer.sweep(PROBLEM, "cpu")
    assert PROBLEM in problems
    assert len(set(problems)) == len(problems)
    for problem in problems:
        assert (problem.shape.M == PROBLEM.shape.M) or (problem.r == PROBLEM.r)
        assert (problem.shape.K, problem.shape.N) == (24, 40)
