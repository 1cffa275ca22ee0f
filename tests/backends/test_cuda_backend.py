"""What the backend of CUDA C++ plans, refuses and costs: made-up devices, stand-ins for its kernels."""

import ctypes
import dataclasses
import itertools
import re
import types
from pathlib import Path

import cuda_families
import pytest
import torch
from cards import A100, B200, CUDA, FROZEN, H200, L4, T4, problem
from lorafast.kernels.tables import tuned

import lorafast
from lorafast import reference
from lorafast.backends import cost, dropout, registry
from lorafast.backends.aten import Aten
from lorafast.backends.cost import price
from lorafast.backends.cuda import Cuda, native, planning
from lorafast.backends.cuda import cost as model
from lorafast.backends.cuda.launch import Launch
from lorafast.backends.library import Library
from lorafast.backends.plan import Plan, Refusal
from lorafast.backends.triton import backend as triton
from lorafast.core.problem import (
    GROUPED_OPERATIONS,
    LAYER_OPERATIONS,
    OPERATIONS,
    Layout,
    Layouts,
    parts,
)
from lorafast.nn.problems import linear_problems
from lorafast.ops.calls import Call
from lorafast.ops.problems import by_plans
from lorafast.reference import contract

BACKEND = Cuda()
ROOT = Path(__file__).parents[2]
CACHES = (
    native._why_no_cuda, native.why_not_on, native.bits_on, native.architectures, native.build,
)  # fmt: skip
REAL = dict(planning.FAMILIES)
WHY_NOT = "they are compiled for compute capability 7.5, 8.0, and cuda:1 has 7.0"
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def families(monkeypatch, tmp_path):
    """Every family, nothing tuned, and nothing remembered from elsewhere."""
    cuda_families.put_in_place(monkeypatch)
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    caches = (*CACHES, tuned.load, tuned.nearest)
    for cache in caches:
        cache.cache_clear()
    registry.forget_plans()
    yield
    for cache in caches:
        cache.cache_clear()
    registry.forget_plans()


@pytest.fixture
def on(monkeypatch):
    """Makes CUDA devices of those given, by their index, on which the library runs."""

    def pretend(*devices, unable=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cost, "device_of", lambda device: devices[device.index])
        monkeypatch.setattr(triton, "say_untuned", lambda device, sm: None)
        monkeypatch.setattr(native, "why_unusable", lambda: None)
        monkeypatch.setattr(native, "why_not_on", lambda index: (unable or {}).get(index))
        registry.forget_plans()

    return pretend


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS, "grouped_lora_linear"])
@pytest.mark.parametrize("device", [A100, H200, L4, B200], ids=lambda device: device.name)
@pytest.mark.parametrize("families", [REAL, cuda_families.FAMILIES], ids=["families", "stand-ins"])
def test_every_operation_is_planned_for_and_priced(on, operation, device, families, monkeypatch):
    monkeypatch.setattr(planning, "FAMILIES", families)
    on(device)
    for M, dtype in itertools.product((0, 1, 16), (torch.float32, *HALVES)):
        p = problem(operation, M=M, dtype=dtype)
        plan = BACKEND.plan(p)
        assert isinstance(plan, Plan), plan
        assert plan.backend == "cuda" or operation in LAYER_OPERATIONS
        assert plan.seconds == model.estimate(p, device).seconds
        assert "modelled" in plan.source
        assert not plan.measured
        assert plan.ahead is None


def test_the_backend_is_asked_for_a_mixed_batch_and_not_for_its_backward(on):
    on(H200)
    forward, backward = GROUPED_OPERATIONS
    assert isinstance(registry.plan_of("cuda", problem(forward, M=4)), Plan)
    refused = registry.plan_of("cuda", problem(backward, M=4, wants=("dx",)))
    assert refused == Refusal("cuda", "it has no grouped_lora_linear_backward")
    many = registry.plan_of("cuda", problem(forward, M=17))
    assert many.reason == "M is 17, the decode kernel serves up to 16"
    assert registry.choose(problem(forward, M=4)).backend == "cuda"
    assert registry.choose(problem(forward, M=17)).backend == "aten"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype of the layer is torch.float64, the kernels have"),
        ({"adapter_dtype": torch.float64}, "the adapter is torch.float64, the kernels have"),
        ({"plain": False}, "an input is a tensor subclass or on another device"),
        ({"device": torch.device("meta")}, "the inputs are on meta, the kernels run on CUDA"),
        ({"device": torch.device("cpu")}, "the inputs are on cpu, the kernels run on CUDA"),
        ({"format": "other"}, "the weight is stored as other, the kernels read dense ones and nf4"),
    ],
    ids=str,
)
def test_what_the_kernels_can_not_is_a_sentence(on, change, reason):
    on(H200)
    for operation in (*LAYER_OPERATIONS, "linear_expand", "grouped_lora_linear"):
        answer = BACKEND.plan(problem(operation, M=8, **change))
        assert isinstance(answer, Refusal)
        assert answer.backend == "cuda"
        assert reason in answer.reason


def test_operations_without_a_weight_ask_for_no_format(on):
    on(H200)
    for operation in ("shrink", "expand", "expand_backward", "shrink_backward"):
        assert isinstance(BACKEND.plan(problem(operation, format="nf4")), Plan)


def test_turing_has_no_bfloat16_but_to_decode(on):
    on(T4)
    assert isinstance(BACKEND.plan(problem("grouped_lora_linear", M=8)), Plan)
    for operation in OPERATIONS:
        assert isinstance(BACKEND.plan(problem(operation, dtype=torch.float16)), Plan)
        refused = BACKEND.plan(problem(operation))
        needs = f"compute capability is 7.5, the kernels of {operation} in bfloat16 need 8.0"
        assert refused.reason == needs
        assert registry.choose(problem(operation)).backend == "aten"
    assert registry.choose(problem("lora_linear")).backend == "aten"
    said = registry.plan_of("triton", problem("shrink")).reason
    assert "compute capability is 7.5" in said or not lorafast.backends()["triton"].usable


def test_turing_takes_skinny_kernels_beside_pytorchs_gemm(on, monkeypatch):
    """In float16, by the model: a layer's low-rank work takes less than two thirds of PyTorch's. A fused
    GEMM would save no more than a pass over y, and no layer is one launch."""
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    on(T4)
    for r, adapter in itertools.product((16, 64), (torch.float16, torch.float32)):
        given = {"dtype": torch.float16, "adapter_dtype": adapter, "r": r}
        for operation in (*LAYER_OPERATIONS, *OPERATIONS):
            p = problem(operation, **given)
            chosen = registry.choose(p)
            assert chosen.backend == "cuda", operation
            if operation in LAYER_OPERATIONS:
                frozen = cost.base_gemm(p, T4, accumulated=False).seconds
                ours, others = chosen.seconds - frozen, registry.plan_of("aten", p).seconds - frozen
                assert ours < others * 2 / 3
        hybrid = BACKEND.plan(problem("linear_expand", **given)).launches
        assert hybrid[0] == "PyTorch's GEMM"
        assert "added onto that" in hybrid[1]
        forward = BACKEND.plan(problem("lora_linear", **given)).launches
        assert any("a layer in one launch needs compute capability 8.0" in said for said in forward)


def test_older_than_turing_there_is_nothing(on):
    on(dataclasses.replace(T4, name="Tesla V100", capability=70))
    refused = BACKEND.plan(problem("lora_linear", M=8))
    assert refused.reason == "compute capability is 7.0, the kernels of lora_linear need 7.5"


@pytest.mark.parametrize(
    "why",
    [
        "lorafast/_C_cuda.abi3.so has code for 75 and 80, GPU 0 is sm_90",
        "the CUDA driver is too old for the kernels: it knows CUDA 11.4, they need 12.0",
    ],
)
def test_a_gpu_that_the_library_can_not_serve_disables_no_other(on, why):
    on(H200, H200, unable={0: why})
    for operation in (*OPERATIONS, *LAYER_OPERATIONS):
        assert BACKEND.plan(problem(operation)) == Refusal("cuda", why)
        assert isinstance(BACKEND.plan(problem(operation, device=torch.device("cuda", 1))), Plan)
    assert registry.choose(problem("grouped_lora_linear", M=4)).backend == "aten"
    with pytest.raises(lorafast.BackendError, match=re.escape(why)):
        registry.choose(problem("shrink"), "cuda")


class TestALibrary:
    """What is said of one that can't be used; the next backend serves where none was forced."""

    @pytest.fixture
    def library(self, monkeypatch, tmp_path):
        def make(content=None, cuda="13.0", gpu=True, hip=None):
            monkeypatch.setattr(torch.version, "cuda", cuda)
            monkeypatch.setattr(torch.version, "hip", hip)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            found = Library("cuda", native.LIBRARY.operations, native._start)
            found.path = tmp_path / "_C_cuda.abi3.so"
            if content is not None:
                found.path.write_bytes(content)
            monkeypatch.setattr(native, "LIBRARY", found)
            return found

        return make

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "the native CUDA kernels are not built (installing lorafast builds them where"),
            ({"content": b"", "cuda": None}, "PyTorch is built without CUDA, whose libraries the"),
            ({"content": b"", "cuda": None, "hip": "6.0"}, "PyTorch is built for AMD GPUs"),
            ({"content": b"", "gpu": False}, "no CUDA device: the kernels run on NVIDIA GPUs"),
            ({"content": b"none"}, "the native CUDA kernels can't be loaded: "),
        ],
        ids=["not built", "CPU build", "AMD", "no GPU", "broken"],
    )
    def test_is_a_sentence_and_the_next_backend_serves(self, library, given, said, monkeypatch):
        library(**given)
        monkeypatch.setattr(cost, "device_of", lambda device: H200)
        reason = BACKEND.why_unusable()
        assert reason.startswith(said)
        assert BACKEND.describe() == [("CUDA kernels", reason)]
        status = lorafast.backends()["cuda"]
        assert (status.usable, status.reason) == (False, reason)
        p = problem("grouped_lora_linear", M=1)
        assert registry.choose(p).backend == "aten"
        with pytest.raises(lorafast.BackendError) as raised:
            registry.choose(p, "cuda")
        assert reason in str(raised.value)
        assert dropout.bits_on(CUDA) is None

    def test_is_not_loaded_where_its_symbols_are_not(self, library, monkeypatch):
        """A CPU build of PyTorch lacks what the library takes from PyTorch's CUDA library."""
        library(b"", cuda=None)

        def load(path):
            raise AssertionError("it was loaded")

        monkeypatch.setattr(torch.ops, "load_library", load)
        assert "without CUDA" in BACKEND.why_unusable()

    def test_is_asked_once_a_process(self, library, monkeypatch):
        loaded = []
        library(b"")
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        nothing = types.SimpleNamespace()  # whatever another test has loaded
        monkeypatch.setattr(torch.ops, "lorafast_cuda", nothing, raising=False)
        reasons = {BACKEND.why_unusable() for _ in range(3)}
        assert reasons == {
            "the native CUDA kernels are those of another version of lorafast: install it again"
        }
        assert len(loaded) == 1

    @pytest.fixture
    def loaded(self, library, monkeypatch):
        """One that is loaded and has these C functions."""

        def make(**functions):
            found = library(b"")
            monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
            ours = types.SimpleNamespace(**dict.fromkeys(found.operations))
            monkeypatch.setattr(torch.ops, "lorafast_cuda", ours, raising=False)

            class Function:
                def __init__(self, call):
                    self.call, self.argtypes, self.restype = call, None, None

                def __call__(self, *arguments):
                    assert self.restype is ctypes.c_char_p
                    return self.call(*arguments)

            of_c = types.SimpleNamespace(**{n: Function(f) for n, f in functions.items()})
            monkeypatch.setattr(ctypes, "CDLL", lambda path: of_c)

        return make

    def test_of_another_version_is_told_by_its_functions(self, loaded):
        loaded(lorafast_cuda_why_unusable=lambda index: b"")
        assert BACKEND.why_unusable() == (
            "the native CUDA kernels can't run: they are those of another version of lorafast: "
            "install it again"
        )

    def test_says_for_which_gpus_it_is_built_and_on_which_it_does_not_run(
        self, loaded, monkeypatch
    ):
        loaded(
            lorafast_cuda_why_unusable=lambda index: WHY_NOT.encode() if index else b"",
            lorafast_cuda_architectures=lambda: b"7.5, 8.0, 9.0, 10.0",
            lorafast_cuda_has_wgmma=lambda: 0,
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert BACKEND.why_unusable() is None
        assert BACKEND.describe() == [
            ("CUDA kernels", "built for compute capability 7.5, 8.0, 9.0, 10.0"),
            ("CUDA kernels", f"GPU 1: the native CUDA kernels can't run here: {WHY_NOT}"),
        ]
        assert dropout.bits_on(torch.device("cuda", 1)) is None
        assert dropout.bits_on(torch.device("cuda", 0)) is cuda_families.mask


def test_the_operations_of_the_library_are_those_of_the_bindings():
    """So that a library of another version is told from this one's."""
    bindings = (ROOT / "csrc" / "cuda" / "bindings.cpp").read_text(encoding="utf-8")
    defined = re.findall(r'library\.def\(\s*"(\w+)\(', bindings)
    assert set(native.LIBRARY.operations) == set(defined)


def test_a_decode_step_is_one_launch_and_many_rows_are_operations(on):
    on(H200)
    (line,) = BACKEND.plan(problem("lora_linear", M=1)).launches
    assert line == "lora_linear: grid 132"
    lines = BACKEND.plan(problem("lora_linear", M=8192)).launches
    assert [line.partition(":")[0] for line in lines] == [
        "shrink on cuda",
        "linear_expand on cuda",
        "linear_expand on cuda",
        "not in one launch",
        "not in one launch",
    ]
    assert lines[-2] == "not in one launch: M is 8192, the decode kernel serves up to 16"


@pytest.fixture
def whole_layers(monkeypatch):
    """Changes what the families answer to a whole layer."""

    def answer(decode=None, small=None):
        plans = list(planning.FAMILIES["lora_linear"])
        for i, launch in enumerate((decode, small)):
            if launch is not None:
                plans[i] = lambda p, device, fixed, launch=launch: launch
        monkeypatch.setitem(planning.FAMILIES, "lora_linear", tuple(plans))

    return answer


def test_a_training_step_gets_its_s_from_the_launch(on, monkeypatch):
    """An eager call asks for y alone, and its backward for s."""
    on(A100)
    wants = []
    monkeypatch.setitem(
        planning.FAMILIES,
        "lora_linear",
        (lambda p, device, fixed: wants.append((p.graph, p.wants)) or cuda_families.whole(p),),
    )
    for graph in (True, False):
        BACKEND.plan(problem("lora_linear", M=64, K=256, N=256, wants=("y",), graph=graph))
    assert set(wants) == {(True, ("y", "s")), (False, ("y",))}


def test_of_the_launches_of_a_whole_layer_the_fastest_is_taken(on, whole_layers):
    on(H200)
    p = problem("lora_linear", M=4, K=512, N=512)
    fast = dataclasses.replace(cuda_families.whole(p), line="the fast one")
    slow = dataclasses.replace(fast, moved=2e8, line="the slow one")
    for decode, small in ((fast, slow), (slow, fast), ("it can't", fast), (fast, "it can't")):
        whole_layers(decode=decode, small=small)
        assert BACKEND.plan(p).launches == ("the fast one",)


def test_a_whole_layer_in_one_slow_launch_is_left_for_its_operations(on, whole_layers):
    on(H200)
    p = problem("lora_linear", M=512, K=256, N=256)
    (line,) = BACKEND.plan(p).launches
    assert line == "lora_linear: grid 132"
    whole_layers(small=dataclasses.replace(cuda_families.whole(p), moved=1e12))
    lines = BACKEND.plan(p).launches
    assert lines[0].startswith("shrink on cuda: ")
    assert lines[-1] == "not in one launch: M is 512, the decode kernel serves up to 16"


def random_layer(dtype, adapter_dtype, M=19, K=24, N=40, r=3):
    draw = torch.Generator().manual_seed(3)
    x, dy, weight, bias = (
        torch.randn(*size, generator=draw).to(dtype) for size in ((M, K), (M, N), (N, K), (N,))
    )
    lora_A, lora_B = (
        torch.randn(*size, generator=draw).to(adapter_dtype) for size in ((r, K), (N, r))
    )
    return x, dy, weight, bias, lora_A, lora_B


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_expand_is_expand_and_pytorchs_gemm(dtype, dropout_p, transposed):
    """By planning alone, on a CPU: the run takes any tensors."""
    x, dy, weight, bias, lora_A, lora_B = random_layer(dtype, torch.float32)
    low = reference.wide(dtype)
    seed = torch.tensor([-9]) if dropout_p else None
    s = torch.randn(x.shape[0], lora_A.shape[0]).to(low)
    p = problem(
        "linear_expand", *dy.shape[:1], weight.shape[1], weight.shape[0], 3, dtype,
        adapter_dtype=torch.float32, transposed=transposed, dropout=bool(dropout_p),
        bias=not transposed,
    )  # fmt: skip
    hybrid = planning.plan_hybrid(p, H200)
    run = types.SimpleNamespace(
        linear_expand=lambda x, weight, s, B, scaling, bias, p, seed, transposed=False: hybrid.run(
            x, weight, s, B, scaling, bias, p, seed
        )
    )
    read, factor, added = (dy, lora_A.t(), None) if transposed else (x, lora_B, bias)

    def call(operations, cast):
        more = {"transposed": True} if transposed else {}
        return operations.linear_expand(
            cast(read), cast(weight), cast(s, low), cast(factor, torch.float32), 0.7,
            added if added is None else cast(added), dropout_p, seed, **more,
        )  # fmt: skip

    assert contract.compare(call, run, dtype).why_broken is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("device", [A100, L4, H200], ids=lambda device: device.name)
def test_without_ranks_there_is_the_gemm_alone(on, device, format, transposed):
    """As a frozen layer over a quantized weight asks for it."""
    on(device)
    more = {} if format == "dense" else {"format_parameters": "4096x4096,bfloat16,64"}
    p = problem("linear_expand", r=0, transposed=transposed, format=format, bias=True, **more)
    plan = BACKEND.plan(p)
    assert plan.launches[-1] == "PyTorch's GEMM"
    assert plan.seconds > 0
    if format != "dense":
        return
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    bias = torch.randn(6 if transposed else 7, dtype=torch.float64)
    if transposed:
        x = torch.randn(5, 7, dtype=torch.float64)
    y = plan.run(x, weight, x.new_empty(5, 0), weight.new_empty(7, 0), 1.0, bias, 0.0, None)
    torch.testing.assert_close(y, (x @ weight if transposed else x @ weight.t()) + bias)


def test_linear_expand_says_its_launches_and_counts_them(on):
    on(H200)
    plain = problem("linear_expand")
    for p, count in (
        (plain, 2),
        (plain._replace(bias=True), 2),
        (problem("linear_expand", dtype=torch.float16, bias=True), 2),
    ):
        hybrid = planning.plan_hybrid(p, H200)
        assert model.of(hybrid, p, H200).launches == count
        said = " ".join(hybrid.lines)
        assert said.count("PyTorch's GEMM") == 1
    assert BACKEND.plan(plain).launches[0] == "expand: grid 132"


@pytest.mark.parametrize("device", [A100, L4, H200], ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", HALVES)
def test_linear_expand_is_fused_where_that_takes_less(on, dtype, device, monkeypatch):
    """By the model, of the two that serve it: by ``mma.sync`` or ``wgmma``, or with PyTorch's GEMM."""
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    on(device)
    for M, N in ((8192, 4096), (8192, 1024), (512, 4096)):
        p = problem("linear_expand", M=M, N=N, dtype=dtype)
        answers = planning.launches_of(p, device)
        fused, hybrid = (answer for answer in answers if isinstance(answer, Launch))
        assert ("wgmma" in fused.line) == (device is H200)
        seconds = [model.of(launch, p, device).seconds for launch in (fused, hybrid)]
        plan = BACKEND.plan(p)
        assert plan.seconds == min(seconds)
        assert plan.launches == ((fused.line,) if seconds[0] < seconds[1] else hybrid.lines)
        assert seconds[0] > cost.base_gemm(p, device, accumulated=False).seconds


def test_in_float32_linear_expand_is_not_fused(on, monkeypatch):
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    on(A100)
    assert len(BACKEND.plan(problem("linear_expand", dtype=torch.float32)).launches) > 1


@pytest.mark.parametrize(
    ("fixed", "launches"),
    [
        ({"fused": 0}, "addmm_"),
        ({"fused": 1, "columns": 128, "splits": 1}, "tiles of 128 x 128"),
        ({"fused": 1, "columns": 256, "splits": 2}, "tiles of 128 x 256, K in 2"),
    ],
)
def test_linear_expand_may_be_chosen(on, fixed, launches, monkeypatch):
    """By ``lorafast tune``, which measures both: whichever the model takes is where it begins."""
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    on(A100)
    p = problem("linear_expand")
    assert launches in " ".join(Cuda(fixed).plan(p).launches)
    found = [a.choices for a in planning.launches_of(p, A100) if isinstance(a, Launch)]
    assert [of["fused"] for of in found] == [1, 0]
    refused = Cuda({"fused": 1, "columns": 64}).plan(p)
    assert refused == Refusal("cuda", "fused can't be 1, the launch has 0")
    assert planning.launches_of(p, A100, {"columns": 64})[0].startswith("columns can't be 64")


def test_the_low_rank_term_of_dx_reads_a_as_it_is_stored():
    A = Layout(rows=16, columns=0)
    p = problem("linear_expand", transposed=True, layouts=Layouts(lora_A=A))
    q = planning.as_expand(p)
    assert (q.operation, q.K, q.N, q.bias) == ("expand", 0, p.K, False)
    assert planning.as_expand(p._replace(transposed=False, bias=True)).bias
    # Added with the GEMM in float16, whose low-rank term is float32.
    assert not planning.as_expand(p._replace(bias=True, dtype=torch.float16)).bias
    assert q.layouts.lora_B == Layout(rows=0, columns=16)
    *_, dx = parts(problem("lora_linear_backward", layouts=Layouts(lora_A=A)))
    assert planning.as_expand(dx).layouts.lora_B == q.layouts.lora_B


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS])
@pytest.mark.parametrize("families", [REAL, cuda_families.FAMILIES], ids=["families", "stand-ins"])
def test_more_of_anything_never_costs_less(operation, families, monkeypatch):
    monkeypatch.setattr(planning, "FAMILIES", families)
    base = price("cuda", problem(operation), H200).seconds
    for change in ({"M": 16384}, {"r": 256}, {"dropout": True}):
        assert price("cuda", problem(operation, **change), H200).seconds >= base
    assert price("cuda", problem(operation), L4).seconds > base


def test_what_is_bound_by_bandwidth_costs_its_bytes_and_host_time_is_that_of_our_call():
    many, few = (model.estimate(problem("shrink", M=M), H200) for M in (65536, 1))
    assert many.device == pytest.approx(
        many.bytes / H200.bandwidth / model._MEASURED["shrink"] + cost.LAUNCH_SECONDS
    )
    assert many.seconds == many.device > many.host
    assert few.seconds == few.host == model.CALL_HOST
    assert "clocks counted, shares measured on an H200" in str(few)


def test_no_share_is_above_what_tritons_kernels_were_measured_to_reach():
    from lorafast.backends.triton import cost as tritons

    for operation, share in model._MEASURED.items():
        assert share < tritons._SKINNY[operation]
    assert model._WHOLE < 1.0  # that of GEMMs which read W
    for operation, share in model._RATE.items():
        assert share <= tritons._SKINNY_RATE[operation]
    assert model._UNALIGNED <= tritons._BY_ELEMENT


def test_rows_that_are_not_aligned_cost_more_and_it_is_said():
    p = problem("shrink")
    narrow = p._replace(layouts=Layouts(x=Layout(rows=2)))
    by_columns = p._replace(layouts=Layouts(x=Layout(rows=0, columns=16)))
    assert model.estimate(narrow, H200).device > 3 * model.estimate(p, H200).device
    assert "the rows of x aren't aligned" in model.estimate(narrow, H200).remark
    assert model.estimate(by_columns, H200) == model.estimate(p, H200)


def test_what_the_kernels_refuse_has_no_price(monkeypatch):
    assert price("cuda", problem("grouped_lora_linear", M=17), H200) is None
    assert price("cuda", problem("shrink"), T4) is None
    assert price("cuda", problem("lora_linear", M=8192), T4) is None
    assert price("cuda", problem("lora_linear", M=8192, dtype=torch.float16), T4) is not None
    assert price("cuda", problem("lora_linear_backward"), T4) is None
    assert price("cuda", problem("lora_linear", M=8, dtype=torch.float16), T4) is not None
    assert price("aten", problem("lora_linear", M=8, dtype=torch.float16), T4) is not None


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
@pytest.mark.parametrize("M", [1, 16])
def test_a_decode_step_goes_to_the_one_launch(on, device, M):
    """Where no gradient is asked for; a training step of so few rows stays with PyTorch's autograd where
    the host takes the longest."""
    on(device)
    p = problem("lora_linear", M=M, wants=("y",), graph=False)
    plan = registry.choose(p)
    assert plan.backend == "cuda"
    assert plan.seconds < registry.plan_of("aten", p).seconds
    trained = registry.choose(p._replace(graph=True))
    small = cost.host_bound("aten", p, device)
    assert trained.differentiable == small
    assert (trained.backend == "aten") == small


@pytest.mark.parametrize("M", [1, 16])
def test_where_memory_takes_the_longest_a_decode_step_is_left_to_be_measured(on, M):
    """Reading W is nearly all of it: one launch has little to gain, and its share is assumed."""
    on(L4)
    p = problem("lora_linear", M=M, wants=("y",), graph=False)
    assert registry.choose(p).backend != "cuda"
    seconds = {"aten": 2e-4, "cuda": 1e-4}
    tuned.save(L4.name, [tuned.Record(cost.key_of(p), "cuda", None, seconds)])
    registry.forget_plans()
    assert registry.choose(p).backend == "cuda"


def test_by_the_families_themselves_a_decode_step_is_one_launch_and_a_batch_is_not(on, monkeypatch):
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    on(H200, T4)
    half = torch.float16
    p = problem("lora_linear", M=1, wants=("y",), graph=False)
    plan = registry.choose(p)
    assert (plan.backend, len(plan.launches)) == ("cuda", 1)
    assert plan.launches[0].startswith("lora_linear_decode 1 x 4096 -> 4096: ")
    on_t4 = BACKEND.plan(p._replace(device=torch.device("cuda", 1), dtype=half, adapter_dtype=half))
    assert isinstance(on_t4, Plan), on_t4
    batch = problem("lora_linear", adapter_dtype=torch.float32)
    lines = BACKEND.plan(batch).launches
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "shrink on cuda", "linear_expand on cuda", "linear_expand on cuda",
    ]  # fmt: skip
    helpers = planning.launches_of(batch, H200)[
        -1
    ]  # measured to be slower, so tune alone may take it
    assert re.fullmatch(
        r"lora_linear: 132 CTAs in .*, wgmma, \d+ of them shrink first", helpers.line
    )
    small = BACKEND.plan(problem("lora_linear", M=64, K=256, N=256))
    assert small.launches[0].startswith("lora_linear: ")
    mixed = problem("grouped_lora_linear", M=8, adapters=4, wants=("y",))
    assert registry.choose(mixed).launches[0].startswith("grouped_lora_linear_decode 8 x 4096")


def test_a_call_has_a_plan_for_gradients_and_one_for_none(on):
    on(H200)
    p = problem("lora_linear", M=1, wants=("y",))
    call = Call(p, None, True, None)
    assert call.differentiable
    assert not call.inference.differentiable
    assert call.inference.problem == p._replace(graph=False)
    assert call.inference.inference is None
    forced = Call(p, "aten", True, None)
    assert forced.differentiable
    assert forced.inference is None
    many = Call(problem("lora_linear", M=8192, wants=("y",)), None, True, None)
    assert not many.differentiable
    assert many.inference is None


def test_on_a_cpu_a_small_layer_is_the_same_call_with_gradients_and_without():
    p = problem("lora_linear", M=4, K=16, N=16, wants=("y",), device=torch.device("cpu"))
    assert Aten().plan(p) == Aten().plan(p._replace(graph=False))
    assert Call(p, None, True, None).inference is None


def test_a_call_without_gradients_runs_the_plan_for_it(monkeypatch):
    """Through the layer itself: the choice follows the mode."""
    from lorafast.functional import lora_linear
    from lorafast.ops import calls

    x, _, weight, bias, lora_A, lora_B = random_layer(torch.float32, torch.float32)
    ran = []
    lora_linear(x, weight, lora_A, lora_B, 0.7, bias)
    (key,) = [key for key, call in calls.calls.items() if call.problem.M == 19]
    call = calls.calls[key]
    assert call.differentiable
    other = Call(call.problem, "reference", True, None)
    other.run = lambda *arguments: (
        ran.append(1) or cuda_families.whole(call.problem).run(*arguments)
    )
    call.inference = other
    expected = lora_linear(x, weight, lora_A, lora_B, 0.7, bias)
    assert not ran
    with torch.no_grad():
        found = lora_linear(x, weight, lora_A, lora_B, 0.7, bias)
    assert len(ran) == 1
    torch.testing.assert_close(found, expected)
    calls.calls.clear()


def test_explain_speaks_of_inference_where_no_gradient_is_asked_for():
    x, _, weight, bias, lora_A, lora_B = random_layer(torch.float32, torch.float32)
    arguments = (x, weight, lora_A, lora_B, bias, False)
    assert linear_problems(*arguments)[0].graph
    with torch.no_grad():
        assert not linear_problems(*arguments)[0].graph
    assert all(part.graph for part in parts(linear_problems(*arguments)[0]._replace(graph=False)))


def test_a_small_layers_training_forward_is_compared_too(on):
    on(A100)
    p = problem("lora_linear", M=64, K=256, N=256, wants=("y", "s"))
    plan = registry.choose(p)
    assert plan.backend == "cuda"
    assert plan.launches == ("lora_linear: grid 132",)


def test_a_record_goes_before_the_model(on):
    on(H200)
    p = problem("shrink")
    tuned.save(
        H200.name, [tuned.Record(cost.key_of(p), "cuda", None, {"aten": 2e-4, "cuda": 1e-4})]
    )
    plan = BACKEND.plan(p)
    assert (plan.seconds, plan.measured) == (1e-4, True)
    assert registry.choose(p).backend == "cuda"


def test_a_record_of_another_build_of_the_kernels_is_not_used(on, monkeypatch, tmp_path):
    on(H200)
    p = problem("shrink")
    tuned.save(H200.name, [tuned.Record(cost.key_of(p), "cuda", None, {"cuda": 1e-4})])
    assert BACKEND.plan(p).measured
    built = tmp_path / "another.so"
    built.write_bytes(b"built anew")
    monkeypatch.setattr(native.LIBRARY, "path", built)
    for cache in (native.build, tuned.load, tuned.nearest):
        cache.cache_clear()
    with pytest.warns(UserWarning, match="measured with other versions"):
        assert not BACKEND.plan(p).measured


def test_a_layer_that_was_measured_in_one_launch_is_launched_so(on):
    on(H200)
    p = problem("lora_linear", M=8)
    record = tuned.Record(cost.key_of(p), "cuda", None, {"aten": 2e-3, "cuda": 1e-3})
    tuned.save(H200.name, [record])
    plan = BACKEND.plan(p)
    assert (plan.seconds, plan.measured) == (1e-3, True)
    # Its operations one by one were not what was measured.
    more = BACKEND.plan(p._replace(M=17))
    assert not more.measured
    assert more.seconds < 1e-3


def test_a_bias_alone_has_no_rank(on, monkeypatch):
    """As ``expand_backward`` is asked for it, without s and B."""
    on(H200)
    monkeypatch.setattr(planning, "FAMILIES", REAL)
    p = problem("expand_backward", r=0, wants=("dbias",))
    assert isinstance(BACKEND.plan(p), Plan)
    refused = BACKEND.plan(p._replace(wants=("dB", "dbias")))
    assert isinstance(refused, Refusal)
    assert refused.reason == "the rank is 0, the kernels need at least 1"


def test_a_whole_layer_by_the_backend_is_right(on):
    """Forward and backward of its operations, on tensors of a CPU."""
    on(H200)
    run = by_plans(lambda p: BACKEND.plan(p._replace(device=CUDA)))
    x, dy, weight, bias, lora_A, lora_B = random_layer(torch.float32, torch.float32, M=40)
    y, s = run.lora_linear(x, weight, lora_A, lora_B, 0.7, bias)
    torch.testing.assert_close(y, reference.lora_linear(x, weight, lora_A, lora_B, 0.7, bias))
    dx, dA, dB = run.lora_linear_backward(dy, x, weight, lora_A, lora_B, s, 0.7)
    ds = 0.7 * dy @ lora_B
    torch.testing.assert_close(dx, dy @ weight + ds @ lora_A)
    torch.testing.assert_close(dA, ds.t() @ x)
    torch.testing.assert_close(dB, 0.7 * dy.t() @ s)


def test_every_subset_of_a_backward_is_planned_for(on):
    on(H200)
    for wants in (("dx",), ("dA",), ("dB",), FROZEN, ("dweight", "dbias"), (*FROZEN, "dbias")):
        p = problem("lora_linear_backward", wants=wants)
        plan = BACKEND.plan(p)
        assert isinstance(plan, Plan)
        assert plan.seconds == model.estimate(p, H200).seconds


def test_atens_dropout_on_a_gpu_reads_the_kernels_bits(on):
    on(H200)
    assert dropout.bits_on(CUDA) is cuda_families.mask
    assert dropout.bits_on(torch.device("cpu")) is None
    p = problem("shrink", dropout=True)
    assert price("aten", p, H200).seconds < 1e-3
