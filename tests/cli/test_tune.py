"""``lorafast tune``, in the interpreter: what it keeps, that it goes on, what it refuses."""

import contextlib
import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

from cards import H200, problem
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.tune import climb
from lorafast.kernels.common.configs import LaunchConfig, why_invalid
from lorafast.kernels.common.plan import LoraLinearLaunch
from lorafast.kernels.tables import tuned

from lorafast.backends import Backend, Plan, Refusal, registry
from lorafast.backends.triton import backend as triton
from lorafast.backends.triton.backend import interpreter
from lorafast.backends.triton.cost import helped
from lorafast.backends.triton.planning import config_of
from lorafast.cli import main
from lorafast.core.problem import Layout, Layouts

TINY = ["tune", "--device", "cpu", "--shapes", "20,24,32", "--rank", "4", "--seconds", "0.2"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    tuned.load.cache_clear()
    tuned.nearest.cache_clear()
    yield tmp_path / "tuned-interpreter.json"
    tuned.load.cache_clear()
    tuned.nearest.cache_clear()


def record(operation="shrink", config=None, backend="triton", **key):
    sizes = {"dtypes": "bfloat16", "M": 1024, "K": 4096, "N": 4096, "r": 16} | key
    seconds = {"aten": 2e-5, "triton": 1e-5}
    return tuned.Record(tuned.Key(operation, **sizes), backend, config, seconds)


def config_for(operation, M, K, N, r, dtype=torch.bfloat16, **others):
    """What a call on a CPU would be launched with, in the interpreter."""
    call = problem(operation, M, K, N, r, dtype, device=torch.device("cpu"), **others)
    return config_of(call, interpreter())


@pytest.mark.slow
def test_every_case_is_kept_and_the_next_run_goes_on(cache, capsys):
    assert main(TINY) == 0
    kept = json.loads(cache.read_text())
    operations = [entry["key"]["operation"] for entry in kept["records"]]
    assert operations == [
        "shrink",
        "expand",
        "linear_expand",
        "expand_backward",
        "shrink_backward",
        "linear_expand",
    ]
    for entry in kept["records"]:
        assert entry["backend"] in entry["seconds"]
        assert {"aten", "triton"} <= set(entry["seconds"])
        assert set(entry["seconds"]) < set(registry.names())
    capsys.readouterr()
    assert main(TINY) == 0
    said = capsys.readouterr().out
    assert said.count(": known, ") == 6
    assert said.count("its operations one by one, no helpers: ") == 1
    assert json.loads(cache.read_text()) == kept


def test_nothing_begins_after_the_time(cache, capsys):
    assert main([*TINY, "--minutes", "1e-9"]) == 0
    assert capsys.readouterr().out.count("not begun, the time is up") == 6
    assert not cache.exists()


def test_an_interrupted_run_keeps_what_it_has(cache, monkeypatch, capsys):
    from lorafast.bench.tune import job

    begun = []

    def interrupt(problem, case, *arguments, **named):
        begun.append(case.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return job.Row(problem, case.name, "aten", None, 1, samples={"aten": [1.0]})

    monkeypatch.setattr(job, "tune", interrupt)
    assert main(TINY) == 130
    assert "interrupted: what was done is kept" in capsys.readouterr().out
    assert [e["key"]["operation"] for e in json.loads(cache.read_text())["records"]] == ["shrink"]


class Stand(Backend):
    """In the place of the CUDA kernels, on a CPU: the definition, a whole forward in one launch."""

    name = "cuda"

    def __init__(self, wrong=()):
        self.wrong = wrong

    def plan(self, problem):
        if problem.operation == "lora_linear_backward":
            return Refusal(self.name, "it has none")
        run = registry.definition(problem).run
        if problem.operation in self.wrong:
            return Plan(self.name, lambda *arguments: run(*arguments) + 1, ("one launch",))
        return Plan(self.name, run, ("one launch",), seconds=1e-3)


@pytest.fixture
def standing_in(monkeypatch):
    """Tunes these cases alone, with a stand-in for the CUDA kernels."""
    from lorafast.bench.tune import job

    @contextlib.contextmanager
    def stand(*cases, wrong=()):
        monkeypatch.setattr(job, "TUNED", cases)
        with registry.standing_in(Stand(wrong)):
            yield

    return stand


def test_every_backend_that_serves_the_call_is_measured(cache, standing_in):
    with standing_in("shrink"):
        assert main(TINY) == 0
    (record,) = json.loads(cache.read_text())["records"]
    assert set(record["seconds"]) == {"aten", "cpu", "triton", "cuda"} & set(usable())
    assert record["backend"] in record["seconds"]


def test_a_backend_that_is_wrong_is_not_timed(cache, standing_in, capsys):
    with standing_in("shrink", wrong=("shrink",)):
        assert main(TINY) == 1
    assert "WRONG: cuda: " in capsys.readouterr().out
    (record,) = json.loads(cache.read_text())["records"]
    assert {"aten", "triton"} <= set(record["seconds"])
    assert "cuda" not in record["seconds"]


def test_a_layer_that_another_backend_does_in_one_launch_is_measured(cache, standing_in, capsys):
    """Though Triton has no helpers for it, whose operations one by one are beside it."""
    with standing_in("lora_linear"):
        assert main(TINY) == 0
    (record,) = json.loads(cache.read_text())["records"]
    assert record["key"]["operation"] == "lora_linear"
    assert record["config"] is None
    assert {"aten", "triton", "cuda"} <= set(record["seconds"])
    assert "(0 configurations" not in capsys.readouterr().out


def test_where_triton_can_not_serve_the_others_are_measured(cache, standing_in, monkeypatch):
    monkeypatch.setattr(
        triton, "_why_refused", lambda p, device: "compute capability is 7.5, the kernels need 8.0"
    )
    with standing_in("shrink"):
        assert main(TINY) == 0
    (record,) = json.loads(cache.read_text())["records"]
    assert (record["config"], "triton" in record["seconds"]) == (None, False)
    assert {"aten", "cuda"} <= set(record["seconds"])


def usable():
    return [name for name, status in registry.backends().items() if status.usable] + ["cuda"]


@pytest.mark.parametrize(
    ("samples", "winner"),
    [
        ({"aten": [2.0] * 3, "cuda": [1.0] * 3, "triton": [1.5] * 3}, "cuda"),
        ({"aten": [2.0] * 3, "cuda": [1.0] * 3, "triton": [0.9] * 3}, "triton"),
        ({"aten": [2.0] * 3, "cuda": [1.0] * 3, "triton": [0.995] * 3}, "cuda"),
        ({"aten": [2.0] * 3, "cuda": [1.0] * 3}, "cuda"),
        ({"triton": [1.0] * 3}, "triton"),
    ],
)
def test_the_fastest_wins_and_triton_by_more_than_noise(samples, winner):
    from lorafast.bench.tune import job

    assert job._winner(samples) == winner


def test_with_two_backends_on_a_gpu_there_is_something_to_tune(monkeypatch):
    """Where Triton can't be used: on Turing, and where it is not installed."""
    from lorafast.cli import tune

    served = {"aten", "reference"}
    monkeypatch.setattr(tune.Triton, "why_unusable", lambda self: "Triton is not installed")
    monkeypatch.setattr(tune.torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(tune, "why_not", lambda name, like: None if name in served else "no")
    gpu = torch.device("cuda", 0)
    assert tune._why_nothing(gpu) == "Triton is not installed"
    served.add("cuda")
    assert tune._why_nothing(gpu) is None
    assert tune._why_nothing(torch.device("cpu")) == "Triton is not installed"


def test_where_triton_is_not_usable_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(TINY) == 2
    assert "lorafast tune: nothing to tune here: no CUDA device" in capsys.readouterr().err


def test_an_unknown_shape_is_refused(capsys):
    assert main(["tune", "--device", "cpu", "--shapes", "gpt-9"]) == 2
    assert "shape 'gpt-9' is neither M,K,N nor one of" in capsys.readouterr().err


def test_a_tuned_configuration_is_launched():
    own = LaunchConfig(16, 16, 32, 16, 1, 2)
    sizes = (1000, 4096, 4096, 16)
    before = config_for("shrink", *sizes)
    of_half = config_for("shrink", *sizes, torch.float16)
    tuned.save("interpreter", [record(config=own)])
    assert config_for("shrink", 1000, 4096, 4096, 9) == own
    # Beyond a factor of two, another bucket of ranks, another dtype, a mask: what ships.
    assert config_for("shrink", 4000, 4096, 4096, 16) != own
    assert config_for("shrink", 1000, 4096, 4096, 17) != own
    assert config_for("shrink", *sizes, torch.float16) == of_half
    assert config_for("shrink", *sizes, dropout=True) == before
    # Float32 adapters need twice the shared memory for A.
    assert config_for("shrink", *sizes, adapter_dtype=torch.float32) == before
    # Rows that begin between 16 bytes are loaded in another way.
    assert config_for("shrink", *sizes, layouts=Layouts(x=Layout(rows=8))) == before


def test_a_record_of_float32_is_not_one_of_tf32():
    assert tuned.dtypes(torch.float32, torch.float32, False) == "float32"
    assert tuned.dtypes(torch.bfloat16, torch.float32, True) == "bfloat16+float32"
    assert tuned.dtypes(torch.float32, torch.float32, True) == "tf32"


def test_tma_is_not_taken_where_memory_forbids_it():
    own = LaunchConfig(128, 128, 64, 16, 8, 3, descriptors=True)
    tuned.save("interpreter", [record("linear_expand", own)])
    assert config_for("linear_expand", 1024, 4096, 4096, 16) == own
    unaligned = Layouts(x=Layout(rows=8))
    assert not config_for("linear_expand", 1024, 4096, 4096, 16, layouts=unaligned).descriptors
    assert not config_for("linear_expand", 1024, 4096, 4100, 16).descriptors


def test_the_nearest_record_is_taken():
    near, far = record(M=1200), record(M=600)
    tuned.save("interpreter", [far, near])
    assert tuned.nearest("interpreter", record(M=1024).key) == near


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "can't be read"),
        ('{"format": 0, "versions": {}}', "measured with other versions and isn't used"),
        ('{"format": 1, "versions": {"torch": "1.0"}}', "measured with other versions"),
    ],
)
def test_a_file_that_can_not_serve_is_said_and_not_used(cache, text, said):
    cache.write_text(text)
    with pytest.warns(UserWarning, match=said):
        assert tuned.load("interpreter") == ()


def test_neighbours_are_valid_and_differ():
    start = LaunchConfig(128, 256, 64, 16, 8, 3, descriptors=True, flatten=True, parts=2, helpers=8)
    found = list(climb.neighbours("lora_linear", start, 2, 90))
    assert len(found) == len(set(found)) > 8
    assert start not in found
    assert {16, 4} <= {config.helpers for config in found}


def test_the_fused_kernel_is_not_timed_again_for_helpers_that_it_has_not():
    start = LaunchConfig(128, 256, 64, 16, 8, 3, descriptors=True)
    found = climb.neighbours("linear_expand", start, 2, 90)
    assert {config.helpers for config in found} == {0}


def test_a_layer_is_tried_as_one_launch_alone(monkeypatch):
    """Fewer helpers seem the faster here, until they would take too long beside the GEMM."""
    layer = Problem(Shape("", 20, 24, 32), 4, "bf16", "bf16", 0.0)
    case = cases(layer, draw(layer, torch.device("cpu"), 1))["lora_linear"]
    large = problem("lora_linear")
    case = replace(case, asks=large)

    def measure(problem, case, of, candidate, clock):
        samples = [float(candidate.helpers)]
        return climb.Row(problem, case.name, asdict(candidate), False, None, None, samples, [16.0])

    monkeypatch.setattr(climb, "measure", measure)
    rows = climb.climb(layer, case, climb.OfTriton(case, H200), clock=None, deadline=float("inf"))
    configs = [LaunchConfig(**row.config) for row in rows]
    assert len(configs) > 8
    assert all(isinstance(helped(large, H200, config), LoraLinearLaunch) for config in configs)


def test_neighbours_of_a_hybrid_launch_are_other_tiles_of_expand():
    start = LaunchConfig(32, 128, 16, 16, 4, 2, ctas_per_sm=4, hybrid=True)
    found = list(climb.neighbours("linear_expand", start, 2, 90))
    assert len(found) == len(set(found)) > 8
    assert all(config.hybrid for config in found)
    for name in ("block_k", "block_r", "parts", "masked_parts", "flatten", "helpers"):
        assert {getattr(config, name) for config in found} == {getattr(start, name)}, name


@pytest.mark.parametrize(("dtype", "tried"), [("bf16", True), ("fp16", False)])
def test_two_launches_are_tried_beside_the_fused_kernel(monkeypatch, dtype, tried):
    """And taken where they are faster, with tiles of their own."""
    layer = Problem(Shape("", 20, 24, 32), 4, dtype, dtype, 0.1)
    case = cases(layer, draw(layer, torch.device("cpu"), 1))["dx"]

    def measure(problem, case, of, candidate, clock):
        samples = [1 / candidate.block_m if candidate.hybrid else 2.0]
        return climb.Row(problem, case.name, asdict(candidate), False, None, None, samples, [1.0])

    monkeypatch.setattr(climb, "measure", measure)
    rows = climb.climb(
        layer, case, climb.OfTriton(case, interpreter()), clock=None, deadline=float("inf")
    )
    assert any(row.config["hybrid"] for row in rows) is tried
    best = climb.best_of(rows)
    assert best.config["hybrid"] is tried
    assert best.config["block_m"] > 32 or not tried
    config = LaunchConfig(**best.config)
    assert why_invalid("linear_expand", config, 2, 90) is None


def test_where_records_are_kept(monkeypatch, tmp_path):
    assert tuned.path_for("NVIDIA H200").name == "tuned-nvidia-h200.json"
    monkeypatch.delenv("LORAFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path_for("x").parent == tmp_path / "lorafast"


def test_where_nothing_can_be_kept_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setenv("LORAFAST_CACHE", "/dev/null/cache")
    assert main(TINY) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lorafast tune: what is found can't be kept: [Errno 20]")
    assert "/dev/null/cache" in line


def test_a_disk_that_is_full_meanwhile_is_one_line(monkeypatch, capsys):
    from lorafast.bench.tune import job

    def full(*arguments):
        raise OSError(28, "No space left on device")

    row = job.Row(None, "shrink", "aten", None, 1, samples={"aten": [1.0]})
    monkeypatch.setattr(job, "tune", lambda *arguments, **named: row)
    monkeypatch.setattr(tuned, "write_whole", full)
    assert main(TINY) == 2
    assert capsys.readouterr().err.endswith(
        "lorafast tune: what was found can't be kept: [Errno 28] No space left on device\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "foo"], "--device is 'foo', expected cpu, cuda or cuda:<index>"),
        (["--device", "mps"], "--device is 'mps', expected cpu, cuda or cuda:<index>"),
        (["--shapes", "8,8,8,0"], "shape '8,8,8,0' is not M,K,N: whole numbers from 1 to"),
        (["--shapes", "1000000,1000000,8"], "its tensors take"),
        (["--minutes", "nan"], "nan is not a positive number"),
        (["--rank", "0"], "0 is not at least 1"),
    ],
)
def test_bad_options_are_named(capsys, words, said):
    try:
        status = main(["tune", "--device", "cpu", *words])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert said in capsys.readouterr().err
