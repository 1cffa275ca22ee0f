"""What could be chosen otherwise of a launch in CUDA C++: planned for, tuned, and kept in records."""

import dataclasses
import json
import re

import pytest
import torch

pytest.importorskip("triton")

from cards import A100, H200, L4, T4, problem
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.tune import climb, job
from lorafast.bench.tune.choices import OfCuda, choices_of
from lorafast.kernels.tables import tuned

from lorafast.backends import cost, registry
from lorafast.backends.cuda import native, planning
from lorafast.backends.cuda.launch import Launch, neighbours

CASES = {
    "shrink": {"ranks", "share", "stages"},
    "expand": {"column_warps", "row_blocks"},
    "expand_backward": {"ranks", "share", "stages"},
    "shrink_backward": {"ranks", "share", "stages"},
}


def sizes(case, M=8192):
    return problem(case, M=M)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    caches = (tuned.load.cache_clear, tuned.nearest.cache_clear, registry.forget_plans)
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


def only(launches):
    (launch,) = (one for one in launches if isinstance(one, Launch))
    return launch


@pytest.mark.parametrize("device", [A100, H200, L4], ids=lambda device: device.name)
@pytest.mark.parametrize("operation", CASES)
def test_every_choice_has_others_and_the_launch_has_them(operation, device):
    p = sizes(operation)
    own = only(planning.launches_of(p, device))
    assert own.choices.keys() == CASES[operation]
    others = []
    for choices in neighbours(own.choices):
        for answer in planning.launches_of(p, device, choices):
            if isinstance(answer, Launch):
                assert answer.choices == choices
                others.append(answer)
    assert len({other.line for other in others} - {own.line}) > 2
    for launch in others:
        assert launch.launches == own.launches


def test_gemms_of_sm_90_choose_tiles_and_helpers():
    bf16 = torch.bfloat16
    p = problem("lora_linear", dtype=bf16, adapter_dtype=bf16)
    *_, own = planning.launches_of(p, H200)
    assert own.choices.keys() == {"helpers", "columns", "group", "cluster"}
    for name, value in (("helpers", 6), ("columns", 128), ("group", 3), ("cluster", 1)):
        *_, other = planning.launches_of(p, H200, {**own.choices, name: value})
        assert (other.choices[name], other.line != own.line) == (value, name != "group")
    for name, value in (
        ("helpers", 0),
        ("helpers", 5),
        ("helpers", 10**6),
        ("columns", 64),
        ("group", 0),
    ):
        *_, refused = planning.launches_of(p, H200, {**own.choices, name: value})
        assert refused.startswith(f"{name} can't be {value}, the launch has ")


@pytest.mark.parametrize("sizes", [(64, 8192, 28672), (8192, 64, 4096), (8192, 1024, 1024)])
@pytest.mark.parametrize("r", [16, 1024])
def test_gemms_of_sm_90_take_as_long_as_their_bytes_at_the_least(sizes, r):
    M, K, N = sizes
    p = problem("linear_expand", M=M, K=K, N=N, r=r)
    of = [a for a in planning.launches_of(p, H200) if "wgmma" in getattr(a, "line", "")]
    assert [launch.seconds > launch.moved / H200.bandwidth for launch in of] == [True]


def test_without_code_for_90a_they_are_refused(monkeypatch):
    monkeypatch.setattr(native, "has_wgmma", lambda: False)
    said = "the native CUDA kernels were built without code for 90a, which wgmma needs"
    for operation in ("linear_expand", "lora_linear"):
        assert said in planning.launches_of(problem(operation), H200)


def test_what_was_found_for_a_batch_is_not_taken_for_a_decode_step():
    p = problem("lora_linear", M=20, graph=False)
    *_, batch = planning.launches_of(p, H200)
    keep(p, batch.choices)
    decode = planning.launches_of(p._replace(M=16), H200)[0]
    assert decode.line.startswith("lora_linear_decode 16 x ")


@pytest.mark.parametrize("device", [A100, T4], ids=lambda device: device.name)
def test_decoding_chooses_its_helpers(device):
    p = problem("lora_linear", M=1, dtype=torch.float16, adapter_dtype=torch.float16, graph=False)
    own = planning.launches_of(p, device)[0]
    assert own.choices == {"helpers": 4}
    lines = {planning.launches_of(p, device, {"helpers": n})[0].line for n in (0, 1, 2, 4)}
    assert len(lines) == 4
    assert "each makes its own s" in " ".join(lines)


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"stages": 10**9}, r"stages can't be 1000000000, the launch has \d"),
        ({"stages": 0}, "stages can't be 0, the launch has 2"),
        ({"share": 0}, r"share can't be 0, the launch has \d"),
        ({"ranks": 48}, "ranks can't be 48, the launch has 16"),
        ({"helpers": 4}, "helpers can't be 4"),
        ({"ranks": 16}, "ranks is given, there is a choice of ranks, share, stages"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(fixed, said):
    (answer,) = planning.launches_of(sizes("shrink"), H200, fixed)
    assert re.fullmatch(said, answer)


def keep(p, choices, device=H200):
    record = tuned.Record(cost.key_of(p), "cuda", None, {"cuda": 1e-5}, choices)
    tuned.save(device.name, [record])


def test_a_call_is_launched_as_it_was_found_to_be_fastest():
    p = sizes("shrink")
    own = only(planning.launches_of(p, H200))
    keep(p, {**own.choices, "stages": own.choices["stages"] - 1})
    found = only(planning.launches_of(p, H200))
    assert found.choices["stages"] == own.choices["stages"] - 1
    # With other sizes nearby too, as far as it can be; elsewhere as the model has it.
    assert only(planning.launches_of(sizes("shrink", 6000), H200)).choices == found.choices
    assert (
        only(planning.launches_of(p, A100)).choices
        == only(planning.launches_of(p, dataclasses.replace(A100, name="another"))).choices
    )


def test_a_record_whose_choices_can_not_be_leaves_the_models():
    p = sizes("shrink")
    own = only(planning.launches_of(p, H200))
    for choices in ({"stages": 99}, {"helpers": 2}, {"stages": 0, "share": 1}):
        keep(p, choices)
        assert only(planning.launches_of(p, H200)).choices == own.choices


@pytest.fixture
def shrink():
    layer = Problem(Shape("", 20, 24, 32), 4, "bf16", "bf16", 0.0)
    case = cases(layer, draw(layer, torch.device("cpu"), 1))["shrink"]
    return layer, dataclasses.replace(case, asks=sizes("shrink"))


def test_tune_finds_the_fastest_of_them(shrink, monkeypatch):
    """Fewer stages seem the faster here, and shorter walks."""
    layer, case = shrink
    tried = []

    def measure(problem, case, of, candidate, clock):
        choices = dict(candidate.choices)
        tried.append(choices)
        samples = [choices["stages"] + abs(choices["share"] - 3.0)]
        fields = dataclasses.asdict(candidate)
        return climb.Row(problem, case.name, fields, False, None, None, samples, [100.0])

    monkeypatch.setattr(climb, "measure", measure)
    of = choices_of(case, H200)
    assert isinstance(of, OfCuda)
    rows = climb.climb(layer, case, of, clock=None, deadline=float("inf"))
    best = dict(climb.best_of(rows).config["choices"])
    assert (best["stages"], best["share"]) == (2, 3)
    assert len(tried) == len({tuple(one.items()) for one in tried})


def test_an_operation_that_no_launch_of_its_own_serves_has_none(shrink):
    _, case = shrink
    assert choices_of(dataclasses.replace(case, asks=sizes("shrink")), T4) is None


def test_tune_keeps_them_beside_the_time(shrink, monkeypatch):
    """The winner's choices go to the record, from which the next call has them."""
    layer, case = shrink
    own = choices_of(case, H200).shipped
    other = dict(own.choices) | {"stages": 2}
    fast = dataclasses.replace(own, choices=tuple(other.items()))

    def climbed(problem, case, of, *, clock, deadline):
        samples = [1.0], [2.0]
        return [
            climb.Row(problem, case.name, dataclasses.asdict(own), True),
            climb.Row(problem, case.name, dataclasses.asdict(fast), False, None, None, *samples),
        ]

    monkeypatch.setattr(climb, "climb", climbed)
    monkeypatch.setattr(job, "_able", lambda case: ["cuda"])
    monkeypatch.setattr(job, "_why_no_climb", lambda case, device: "Triton is not asked")
    monkeypatch.setattr(job, "why_wrong", lambda *arguments: None)
    monkeypatch.setattr(
        job, "interleave", lambda clock, turns, **_: dict.fromkeys(turns, [1e-5] * 3)
    )
    row = job.tune(layer, case, device=H200, clock=None, seconds=1.0)
    assert (row.backend, row.config, row.choices, row.tried) == ("cuda", None, other, 2)
    tuned.save(
        H200.name, [tuned.Record(cost.key_of(case.asks), "cuda", None, {"cuda": 1.0}, row.choices)]
    )
    kept = json.loads(tuned.path_for(H200.name).read_text())
    assert kept["records"][0]["choices"] == other
    assert only(planning.launches_of(case.asks, H200)).choices == other
