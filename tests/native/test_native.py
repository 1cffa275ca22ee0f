"""The native CPU kernels: every instruction set, threads, processes, memory, and the binary itself."""

import gc
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from circumstances import MEMORY, THREADS, WORK, assert_same_bits
from helpers import assert_contract, problems
from hypothesis import given

from lorafast.backends.cpu import native
from lorafast.backends.library import Library

if native.why_not_loaded() is not None:
    pytest.skip(native.why_not_loaded(), allow_module_level=True)

from lorafast.backends.cpu.operations import (
    dense_lora_linear_backward_on_rows,
    dense_lora_linear_on_rows,
)
from lorafast.ops.problems import on_backend
from lorafast.reference import wide

cpu = on_backend("cpu")
ROOT = Path(__file__).parents[2]
EXERCISE = Path(__file__).with_name("exercise.py")
SETS = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw"),
    "avx512_bf16": ("avx512f", "avx512_bf16"),
}


def cpu_flags():
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return set(re.search(r"^flags\s*:(.*)$", info, re.M)[1].split())


def exercise(*arguments, **environment):
    own = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # beside other tests, a thread that spins waits for itself
    }
    return subprocess.run(
        [sys.executable, str(EXERCISE), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | own | environment,
    )


@given(problem=problems())
def test_contract(problem, poisoned):
    t = problem.tensors(torch.device("cpu"))
    p, adapter, lay = problem.dropout_p, problem.adapter_dtype, problem.lay_out
    low = wide(problem.dtype)
    calls = (
        lambda run, cast: run.shrink(lay(cast(t.x)), cast(t.lora_A, adapter), p, t.seed),
        lambda run, cast: run.linear_expand(
            lay(cast(t.x)),
            cast(t.weight),
            cast(t.s, low),
            cast(t.lora_B, adapter),
            0.7,
            cast(t.bias),
        ),
        lambda run, cast: run.linear_expand(
            cast(t.dy),
            cast(t.weight).t(),
            cast(t.ds, low),
            cast(t.lora_A, adapter).t(),
            1.0,
            None,
            p,
            t.seed,
        ),
        lambda run, cast: run.expand_backward(
            lay(cast(t.dy)), cast(t.s, low), cast(t.lora_B, adapter), 0.7
        ),
        lambda run, cast: run.shrink_backward(
            cast(t.ds, low), lay(cast(t.x)), p, t.seed, cast(t.lora_A, adapter).dtype
        ),
    )
    for call in calls:
        assert_contract(call, cpu, problem.dtype)


@given(problem=problems())
def test_the_whole_layer_is_its_parts(problem, poisoned):
    t, p = problem.tensors(torch.device("cpu")), problem.dropout_p
    x, dy, weight, bias = (v.to(problem.dtype) for v in (t.x, t.dy, t.weight, t.bias))
    lora_A, lora_B = t.lora_A.to(problem.adapter_dtype), t.lora_B.to(problem.adapter_dtype)
    x, dy = problem.lay_out(x), problem.lay_out(dy)
    s = cpu.shrink(x, lora_A, p, t.seed)
    y = cpu.linear_expand(x, weight, s, lora_B, 0.7, bias)
    whole = cpu.lora_linear(x, weight, lora_A, lora_B, 0.7, bias, p, t.seed)
    assert torch.equal(whole[0], y)
    assert torch.equal(whole[1], s)
    ds, dB = cpu.expand_backward(dy, s, lora_B, 0.7)
    dA = cpu.shrink_backward(ds, x, p, t.seed, lora_A.dtype)
    dx = cpu.linear_expand(dy, weight.t(), ds, lora_A.t(), 1.0, None, p, t.seed)
    whole = cpu.lora_linear_backward(dy, x, weight, lora_A, lora_B, s, 0.7, p, t.seed)
    assert all(map(torch.equal, whole, (dx, dA, dB)))


PANELS = (  # M, K, N, r of a base GEMM in bfloat16: by panels of 64 columns and 6 rows, of pairs
    (64, 2, 1, 1),
    (65, 66, 64, 16),
    (67, 130, 65, 3),
    (70, 62, 129, 17),
    (131, 34, 500, 64),
    (64, 33, 70, 4),  # an odd sum, which is oneDNN's
)


@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("sizes", PANELS, ids=str)
def test_the_contract_of_panels(sizes, by_column, poisoned):
    M, K, N, r = sizes
    x, weight, s, lora_B, bias = (
        torch.randn(size, dtype=torch.float64)
        for size in ((M, K + 3), (N, K), (M, r), (N, r), (N,))
    )
    seed = torch.tensor([5])

    def call(run, cast):
        W = cast(weight.t().contiguous()).t() if by_column else cast(weight)
        given = cast(x)[:, :K], W, cast(s), cast(lora_B), 0.7
        return run.linear_expand(*given, cast(bias)), run.linear_expand(*given, None, 0.1, seed)

    assert_contract(call, cpu, torch.bfloat16)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [*PANELS, (130, 40, 1030, 4)], ids=str)
def test_the_contract_on_some_rows(sizes, dtype, dropout_p, poisoned):
    """Of the last sizes in float32 the base GEMM comes last."""
    M, K, N, r = sizes
    drawn = [
        torch.randn(size, dtype=torch.float64)
        for size in ((M, K), (M, N), (N, K), (r, K), (N, r), (N,), (M, r))
    ]
    drop = dropout_p, torch.tensor([5])
    for first, end in ((0, M), (0, 9), (5, M - 7), (M - 1, M), (8, 8)):
        own = slice(first, end)

        def call(run, cast, own=own):
            x, dy, W, A, B, bias = (cast(t) for t in drawn[:-1])
            s = cast(drawn[-1])[own].clone()
            if run is cpu:
                y, made = dense_lora_linear_on_rows(
                    x, W, A, B, 0.7, bias, *drop, own.start, own.stop
                )
                return (
                    y,
                    made,
                    *dense_lora_linear_backward_on_rows(
                        dy, x[own], W, A, B, s, 0.7, *drop, own.start
                    ),
                )
            y, dx = F.linear(x, W, bias), dy @ W
            made = run.shrink(x[own], A, *drop)
            ds, dB = run.expand_backward(dy[own], s, B, 0.7)
            y[own] = run.linear_expand(x[own], W, made, B, 0.7, bias)
            dx[own] = run.linear_expand(dy[own], W, ds, A.t(), 1.0, None, *drop, transposed=True)
            return y, made, dx, run.shrink_backward(ds, x[own], *drop), dB

        assert_contract(call, cpu, dtype)


def test_rows_that_are_not_there():
    x, W, A, B = torch.ones(4, 8), torch.ones(8, 8), torch.ones(2, 8), torch.ones(8, 2)
    for first, end in ((-1, 2), (3, 2), (2, 5)):
        with pytest.raises(RuntimeError, match=f"the adapter's rows are {first} to {end} of 4"):
            dense_lora_linear_on_rows(x, W, A, B, 1.0, None, 0.0, None, first, end)
    with pytest.raises(RuntimeError, match="the adapter's rows are 2 to 5 of 4"):
        dense_lora_linear_backward_on_rows(x, x[:3], W, A, B, x[:3, :2].clone(), 1.0, 0.0, None, 2)


@pytest.mark.skipif(
    not native.multiplies_bfloat16() or "amx_bf16" in cpu_flags(),
    reason="needs the processor's bfloat16 product, and no AMX, which oneDNN uses",
)
def test_the_sum_of_base_and_adapter_is_rounded_once():
    """257 is no bfloat16: 257 + 1 is 258 by one rounding and 256 by two."""
    x, weight = torch.tensor([[256.0, 1.0]]).expand(64, 2), torch.ones(70, 2)
    s, lora_B = torch.ones(64, 1), torch.ones(70, 1)
    made = cpu.linear_expand(*(t.bfloat16().contiguous() for t in (x, weight, s, lora_B)), 1.0)
    assert torch.equal(made, torch.full_like(made, 258.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set(name):
    if not set(SETS[name]) <= cpu_flags():
        pytest.skip(f"this processor has no {name}")
    process = exercise(LORAFAST_CPU=name)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout == f"{name}: every kernel is right\n"


def test_an_unknown_instruction_set_is_refused():
    code = "import lorafast; print(lorafast.backends()['cpu'].reason)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"LORAFAST_CPU": "mmx"},
    )  # fmt: skip
    assert "LORAFAST_CPU is 'mmx', expected one of" in process.stdout


class TestLibrary:
    """What becomes of a shared object that can't serve: a sentence."""

    def test_one_of_another_version(self):
        other = Library("cpu", (*native.LIBRARY.operations, "invented"))
        assert other.why_not_loaded() == (
            "the native CPU kernels are those of another version of lorafast: install it again"
        )

    def test_one_that_is_not_there(self):
        assert (
            Library("nowhere", ())
            .why_not_loaded()
            .startswith(
                "the native NOWHERE kernels are not built (installing lorafast builds them where"
            )
        )

    def test_one_that_is_none(self, tmp_path):
        library = Library("cpu", ())
        library.path = tmp_path / "_C_cpu.abi3.so"
        library.path.write_text("no ELF")
        assert re.match(
            r"the native CPU kernels can't be loaded: .*_C_cpu\.abi3\.so", library.why_not_loaded()
        )

    def test_one_that_can_not_run(self):
        def start(path):
            raise OSError(f"{path.name} wants another processor")

        library = Library("cpu", native.LIBRARY.operations, start)
        assert library.why_not_loaded() == (
            "the native CPU kernels can't run: _C_cpu.abi3.so wants another processor"
        )

    def test_it_is_loaded_once(self, monkeypatch):
        loaded = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        library = Library("cpu", native.LIBRARY.operations)
        assert [library.why_not_loaded(), library.why_not_loaded()] == [None, None]
        assert loaded == [native.LIBRARY.path]


def run_all(seed=5, dtype=torch.float32):
    """Every kernel, on several chunks of rows and stripes of columns."""
    generator = torch.Generator().manual_seed(seed)
    M, K, N, r = 300, 1040, 528, 20

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    x, dy, weight, lora_A, lora_B = draw(M, K), draw(M, N), draw(N, K), draw(r, K), draw(N, r)
    mask = torch.tensor([seed])
    s = cpu.shrink(x, lora_A, 0.2, mask)
    ds, dB = cpu.expand_backward(dy, s, lora_B, 0.5)
    dA = cpu.shrink_backward(ds, x, 0.2, mask)
    y = cpu.linear_expand(x.new_zeros(M, K), weight, s, lora_B, 0.5)
    dx = cpu.linear_expand(dy.new_zeros(M, N), weight.t(), ds, lora_A.t(), 1.0, None, 0.2, mask)
    return s, y, ds, dB, dA, dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_are_the_same_whatever_changes(dtype):
    assert_same_bits(lambda: run_all(dtype=dtype), THREADS, MEMORY, WORK)


def test_eight_python_threads_at_once():
    expected = [run_all(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for one, two in zip(expected, pool.map(run_all, range(8)), strict=True):
                assert all(map(torch.equal, one, two))


def _digest():
    """Of every bit, not a sum: PyTorch's own sums depend on the number of threads."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in run_all())).hexdigest()


def _child(queue):
    queue.put(_digest())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_does_not_hang():
    before = torch.get_num_threads()
    expected = _digest()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    torch.set_num_threads(
        1
    )  # OpenMP's own pool doesn't survive a fork: PyTorch's rule for children
    try:
        process = context.Process(target=_child, args=(queue,))
        process.start()
        assert queue.get(timeout=60) == expected
        process.join(timeout=60)
        assert process.exitcode == 0
    finally:
        process.kill()
        torch.set_num_threads(before)


@pytest.mark.slow
def test_ten_thousand_calls_leak_nothing():
    def calls(count):
        x, lora_A, seed = torch.randn(40, 600), torch.randn(8, 600), torch.tensor([1])
        for _ in range(count):
            s = cpu.shrink(x, lora_A, 0.1, seed)
            cpu.shrink_backward(s, x, 0.1, seed)

    calls(1000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(10_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096  # KiB; one leaked tile of 64 KiB a call would be 640 MiB


def test_bad_arguments_are_named():
    kernels = torch.ops.lorafast_cpu
    x, lora_A, s = torch.randn(4, 6), torch.randn(2, 6), torch.empty(4, 2)
    with pytest.raises(RuntimeError, match="lora_A is 2 x 5, expected 2 x 6"):
        kernels.shrink(x, lora_A[:, :5], None, 0, 1.0, s)
    with pytest.raises(RuntimeError, match="s is 4 x 3, expected 4 x 2"):
        kernels.shrink(x, lora_A, None, 0, 1.0, torch.empty(4, 3))
    with pytest.raises(RuntimeError, match="s is not contiguous"):
        kernels.shrink(x, lora_A, None, 0, 1.0, torch.empty(2, 4).t())
    with pytest.raises(RuntimeError, match="x has dtype Double, expected float32"):
        kernels.shrink(x.double(), lora_A, None, 0, 1.0, s)
    with pytest.raises(RuntimeError, match="threshold is -1"):
        kernels.shrink(x, lora_A, None, -1, 1.0, s)
    with pytest.raises(RuntimeError, match="seed has 2 elements of dtype Long, expected one int64"):
        kernels.shrink(x, lora_A, torch.zeros(2, dtype=torch.int64), 5, 1.0, s)


def test_bad_arguments_of_convolutions_are_named():
    kernels, numbers = torch.ops.lorafast_cpu, (1, 1, 0, 0, 1, 1)
    x, lora_A, s = torch.randn(2, 5, 4, 17), torch.randn(3, 2, 2, 17), torch.empty(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="s is 4 in dimension 1, expected 5"):
        kernels.conv_shrink(x, lora_A[:, :1].contiguous(), *numbers, s)
    with pytest.raises(RuntimeError, match="stride, padding and dilation are 0, 0, 1"):
        kernels.conv_shrink(x, lora_A, 0, *numbers[1:], s)
    with pytest.raises(RuntimeError, match="x is not a contiguous float32 tensor"):
        kernels.conv_shrink(x.movedim(-1, 1), lora_A, *numbers, s)
    with pytest.raises(RuntimeError, match="lora_A is 16 in dimension 3, expected 17"):
        kernels.conv_shrink(x, lora_A[..., :16].contiguous(), *numbers, s)
    with pytest.raises(RuntimeError, match="x has 17 channels, expected a multiple of 16"):
        kernels.conv_shrink_backward(s, x, *numbers, lora_A)


def test_bad_arguments_of_whole_convolutions_are_named():
    kernels, numbers = torch.ops.lorafast_cpu, (1, 1, 0, 0, 1, 1)

    def images(*sizes):
        return torch.randn(sizes).to(memory_format=torch.channels_last)

    x, W, A, B = images(2, 16, 4, 5), images(32, 16, 3, 2), images(3, 16, 3, 2), images(32, 3, 1, 1)
    dy, s = images(2, 32, 2, 4), images(2, 3, 2, 4)

    def forward(x=x, W=W, bias=None, A=A, B=B, numbers=numbers):
        kernels.lora_conv(x, W, bias, A, B, 1.0, *numbers, False)

    def backward(dy=dy, x=x, W=W, s=s, A=A, B=B):
        kernels.lora_conv_backward(dy, x, W, s, A, B, 1.0, *numbers, False)

    forward(), backward()
    for message, call in {
        "x is not a contiguous float32 tensor": lambda: forward(x.contiguous()),
        "lora_A has 32 channels, expected 16": lambda: forward(A=images(3, 32, 3, 2)),
        "lora_B is not a contiguous float32 tensor of 32 x 3 elements": lambda: forward(
            B=B.double()
        ),
        "weight is 16 in dimension 0, expected 32": lambda: forward(W=W[:16]),
        "weight is not a float32 tensor in a memory format": lambda: kernels.lora_conv(
            x, W.double(), None, A, B, 1.0, *numbers, True
        ),
        "x has 3 dimensions, expected 4": lambda: forward(x[0]),
        "stride, padding and dilation are 0, 0, 1": lambda: forward(numbers=(0, *numbers[1:])),
        "x has 17 channels, expected a multiple of 16": lambda: forward(
            images(2, 17, 4, 5), images(32, 17, 3, 2), A=images(3, 17, 3, 2)
        ),
        "dy has 20 channels, expected a multiple of 16": lambda: backward(
            images(2, 20, 2, 4), W=images(20, 16, 3, 2), B=images(20, 3, 1, 1)
        ),
        "dy is 3 in dimension 2, expected 4": lambda: backward(images(2, 32, 2, 3)),
        "s is 2 in dimension 3, expected 3": lambda: backward(s=images(2, 2, 2, 4)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_codes_have_the_same_bits_with_more_threads(dtype):
    from lorafast.backends.cpu import dequantize
    from lorafast.operands import NF4

    weight = NF4.of(torch.randn(530, 1700).to(dtype))  # dx in stripes of other widths
    x, dy = torch.randn(7, 1700).to(dtype), torch.randn(7, 530).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = dequantize.of_few_rows(x, weight, None)
            found.append((y, dequantize.of_few_rows(dy, weight, None, transposed=True)))
    finally:
        torch.set_num_threads(before)
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])


def test_bad_arguments_of_products_of_codes_are_named():
    from lorafast.backends.cpu import dequantize
    from lorafast.operands import Int8

    weight = Int8.of(torch.randn(10, 6))
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="x is 4 x 5, expected 4 x 6"):
        dequantize.of_few_rows(x[:, :5], weight, None)
    with pytest.raises(RuntimeError, match="x is 4 x 6, expected 4 x 10"):
        dequantize.of_few_rows(x, weight, None, transposed=True)
    with pytest.raises(
        RuntimeError, match=r"bias has 1 dimensions and 9 elements, expected \[10\]"
    ):
        dequantize.of_few_rows(x, weight, torch.zeros(9))
    with pytest.raises(RuntimeError, match="bias has dtype Double, expected float32"):
        dequantize.of_few_rows(x, weight, torch.zeros(10).double())
    with pytest.raises(RuntimeError, match="bias is given for dx, expected None"):
        dequantize.of_few_rows(torch.randn(4, 10), weight, torch.zeros(6), transposed=True)
    layer, stored, A = dequantize.layer_of(weight), [*weight.tensors().values()], x[:3]
    B = torch.randn(10, 3)
    for sentence, arguments in {
        "x is 4 x 5, expected 4 x 6": (x[:, :5], stored, A, B, 1.0, None),
        "lora_A is 3 x 5, expected 3 x 6": (x, stored, A[:, :5], B, 1.0, None),
        "lora_B is 10 x 2, expected 10 x 3": (x, stored, A, B[:, :2], 1.0, None),
        "lora_B has dtype Double, expected": (x, stored, A, B.double(), 1.0, None),
        "scale has 9 elements": (x, [stored[0], stored[1][:9]], A, B, 1.0, None),
        "bias has 1 dimensions and 9 elements": (x, stored, A, B, 1.0, torch.zeros(9)),
    }.items():
        with pytest.raises(RuntimeError, match=sentence):
            layer(*arguments)


def test_the_binary_needs_the_stable_abi_and_no_more():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", str(native.LIBRARY.path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    symbols = [line.split(maxsplit=1)[-1].removeprefix("U ") for line in listed.splitlines()]
    ours = [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    assert "torch_parallel_for" in {s.split("@")[0] for s in ours}
    forbidden = re.compile(r"\b(at|c10|torch|caffe2)::|\bPy[A-Z_]|pybind")
    assert not [s for s in symbols if forbidden.search(s)]


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over every kernel and instruction set."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    torch_folder = Path(torch.__file__).parent
    # Lines for what is found, without variables, which take a third of the compiler's time.
    flags = [
        "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    sets = {
        "microkernels_portable": ["-DLORAFAST_SOFTWARE_HALF"],  # as gcc 11 has it
        "microkernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "microkernels_avx512": avx512,
        "microkernels_avx512_bf16": [*avx512, "-mavx512bf16"],
    }
    csrc = ROOT / "csrc"
    # The other files begin with PyTorch's headers, which are compiled once. Their own code is quick.
    header = tmp_path / "tensor.h.gch"
    command = [compiler, *flags, "-O0", "-w", "-x", "c++-header", csrc / "tensor.h", "-o", header]
    subprocess.run(command, check=True)
    others = ["-O0", "-I", str(tmp_path), "-include", "tensor.h"]
    objects = []
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        objects.append(tmp_path / f"{source.stem}.o")
        own = ["-O1", *sets[source.stem]] if source.stem in sets else others
        subprocess.run([compiler, *flags, *own, "-c", source, "-o", objects[-1]], check=True)
    library = tmp_path / "_C_cpu.abi3.so"
    subprocess.run(
        [
            compiler, "-shared", "-fsanitize=address,undefined", *map(str, objects),
            f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    preload = " ".join(
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    )
    known = [name for name, needed in SETS.items() if set(needed) <= cpu_flags()]
    process = exercise(str(library), *known, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    assert process.stdout.splitlines() == [f"{name}: every kernel is right" for name in known]


@pytest.mark.slow
class TestBuild:
    """``setup.py`` with and without what it needs."""

    def build(self, folder, **environment):
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--force"],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"LORAFAST_CUDA": "0"} | environment,
        )  # fmt: skip

    def test_nothing_changed_nothing_compiled(self, tmp_path):
        assert self.build(tmp_path).returncode == 0
        process = self.build(tmp_path)
        assert process.returncode == 0
        assert " -c " not in process.stdout

    def test_without_a_compiler_it_says_so_and_goes_on(self, tmp_path):
        process = self.build(tmp_path, CXX="no-such-compiler")
        assert process.returncode == 0
        said = [line for line in process.stderr.splitlines() if line.startswith("lorafast: ")]
        assert said == [
            "lorafast: without native CPU kernels: there is no C++ compiler (no-such-compiler)"
        ]

    def test_forced_and_impossible_is_an_error(self, tmp_path):
        process = self.build(tmp_path, CXX="no-such-compiler", LORAFAST_CPP="1")
        assert process.returncode != 0
        assert "LORAFAST_CPP is 1 and the native CPU kernels can't be built" in process.stderr
        process = self.build(tmp_path, CUDA_HOME="/nowhere", LORAFAST_CUDA="1")
        assert process.returncode != 0
        assert "LORAFAST_CUDA is 1 and the native CUDA kernels can't be built" in process.stderr

    def build_with(self, folder, refused, **environment):
        """A build of a copy of the sources by a compiler that fails on ``refused``."""
        tree = folder / "tree"
        for name in ("csrc", "kernels", "lorafast"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        compiler = folder / "c++"
        compiler.write_text(
            f'#!/bin/sh\nfor a in "$@"; do [ "$a" = {refused} ] && exit 3; done\nexec c++ "$@"\n'
        )
        compiler.chmod(0o755)
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "built")],
            capture_output=True, text=True, check=False, cwd=tree,
            env=os.environ | {"CXX": str(compiler), "LORAFAST_CUDA": "0"} | environment,
        )  # fmt: skip

    def test_an_older_compiler_leaves_out_what_it_does_not_know(self, tmp_path):
        process = self.build_with(tmp_path, "-mavx512bf16", CXXFLAGS="-O0")
        assert process.returncode == 0, process.stderr
        (library,) = (tmp_path / "built").rglob("*.so")
        capability = (
            "import sys, pathlib; from lorafast.backends.cpu import native; "
            "native.LIBRARY.path = pathlib.Path(sys.argv[1]); print(native.capability())"
        )
        found = subprocess.run(
            [sys.executable, "-c", capability, str(library)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        ).stdout.strip()  # fmt: skip
        assert found == native.capability().removesuffix("_bf16")

    def test_a_compiler_that_fails_is_an_error_only_if_forced(self, tmp_path):
        stale = tmp_path / "built" / "lorafast" / "_C_cpu.abi3.so"
        stale.parent.mkdir(parents=True)
        stale.touch()
        process = self.build_with(tmp_path, "-c")
        assert process.returncode == 0, process.stderr
        assert re.search(
            r"^lorafast: without native CPU kernels: \S+ failed with 3 to make \w+\.cpp\.o$",
            process.stderr, re.M,
        )  # fmt: skip
        assert not list((tmp_path / "built").rglob("*.so"))  # not an earlier build's either
        shutil.rmtree(tmp_path / "tree")
        assert self.build_with(tmp_path, "-c", LORAFAST_CPP="1").returncode != 0

    def test_not_wanted_is_not_built(self, tmp_path):
        assert self.build(tmp_path, LORAFAST_CPP="0").returncode == 0
        assert not list(tmp_path.rglob("*.so"))

    def test_one_binary_serves_every_later_python(self, tmp_path):
        assert self.build(tmp_path).returncode == 0
        (library,) = tmp_path.rglob("*.so")
        assert library.name == "_C_cpu.abi3.so"
        assert sysconfig.get_config_var("EXT_SUFFIX") not in library.name
