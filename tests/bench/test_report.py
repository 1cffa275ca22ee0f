"""What the README and docs/performance.md say of speed is what the records say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from lorafast.bench.common.record import read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
# An example's figures are no run of `lorafast bench`.
RECORDS = sorted(path for path in RESULTS.glob("*.json") if not path.stem.startswith("demo-"))


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(tmp_path):
    """Writes a record of layers: ``{contender: overhead}`` for each."""

    def write(name, layers, *, device="NVIDIA H100", capability="sm_90", day=1, **more):
        problem = {
            "shape": {"label": "", "M": 8192, "K": 4096, "N": 4096}, "r": 16, "dtype": "bf16",
            "adapter_dtype": "fp32", "dropout_p": 0.0,
        }  # fmt: skip
        rows = []
        for index, overheads in enumerate(layers):
            shape = problem["shape"] | {"M": 8192 + index}
            for contender, overhead in {"frozen": 1.0, **overheads}.items():
                ran = overhead is not None
                rows.append(
                    {
                        "problem": problem | {"shape": shape}, "which": "both",
                        "contender": contender, "wrong": None,
                        "unavailable": None if ran else "not installed",
                        "samples": [overhead * 1e-3] if ran else [],
                        "frozen_samples": [1e-3] if ran else [],
                        "peak_bytes": None, "saved_bytes": None,
                    }
                )  # fmt: skip
        content = {
            "format": "lorafast-bench/1", "started": f"2026-11-{day:02}T00:00:00+00:00",
            "command": "make gpu", "complete": True, "skipped": [], "clock_state": [],
            "machine": {
                "device": device, "capability": capability, "threads": 2, "commit": "abc",
                "packages": {"torch": "2.13", "peft": "0.21", "triton": "3.9"},
            },
            "layer": rows,
        }  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content | more), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("index", range(3), ids=["state", "speed", "performance"])
def test_a_section_and_the_records_agree(report, index):
    section = report.SECTIONS[index]
    text = section.document.read_text(encoding="utf-8")
    assert section.of(text) == section.render(report.RESULTS), "run python bench/report.py"


def test_there_is_a_record():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_kept_record_is_whole_and_of_a_commit(path):
    content = read(path)
    assert content["complete"] is True or path.stem.startswith("gpu-")  # then the page says so
    assert content["machine"]["commit"]
    assert not content["machine"]["commit"].endswith("-dirty")
    kinds = [rows for rows in content.values() if isinstance(rows, list)]
    assert any(isinstance(row, dict) for rows in kinds for row in rows)
    assert not any(isinstance(row, dict) and row.get("wrong") for rows in kinds for row in rows)


def test_the_table_of_kinds_is_of_one_run():
    kinds = json.loads((RESULTS / "demo-kinds-2026-11-28.json").read_text(encoding="utf-8"))[
        "kinds"
    ]
    page = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    table = page.partition("----\n")[2].partition("\n```")[0].splitlines()
    assert [line.split()[0] for line in table] == list(kinds)
    for line, one in zip(table, kinds.values(), strict=True):
        fast = f"{one['fast']} of {one['adapters']}" if one["adapters"] else "-"
        assert (
            line.split()[1:]
            == (
                f"{one['accuracy']:.3f} {one['trained']:,} {fast} {one['step_seconds'] * 1e3:.0f} ms "
                f"{one['seconds']:.1f} s {one['peak_bytes'] / 1e6:.0f} MB"
            ).split()
        )
    furthest = max(abs(one["accuracy"] - kinds["head"]["accuracy"]) for one in kinds.values())
    assert f"none is further than {furthest:.3f} (`houlsby`)" in page


@pytest.mark.parametrize("name", ["speed", "performance"])
def test_a_changed_figure_is_seen(report, tmp_path, name):
    rendered = []
    for folder_name, factor in (("same", 1.0), ("again", 1.0), ("slower", 2.0)):
        folder = tmp_path / folder_name / "results"
        folder.mkdir(parents=True)
        for path in RECORDS:
            content = json.loads(path.read_text(encoding="utf-8"))
            for row in content.get("layer", ()):
                if row["contender"] == "peft":
                    row["samples"] = [factor * sample for sample in row["samples"]]
            (folder / path.name).write_text(json.dumps(content), encoding="utf-8")
        rendered.append(getattr(report, name)(folder))
    assert rendered[0] == rendered[1]
    assert rendered[0] != rendered[2]


def test_without_records_it_says_so(report, tmp_path):
    assert report.performance(tmp_path) == "No run on a GPU is recorded yet."
    assert "not yet timed on a GPU" in report.state(tmp_path)


def test_a_record_of_a_gpu_is_told_first(report, record, tmp_path):
    record("cpu-x", [{"lorafast": 1.375}], device="AMD", capability="AVX2")
    record("gpu-h100", [{"lorafast": 1.5, "peft": 2.5, "peft-compiled": 2.25}])
    state = report.state(tmp_path)
    assert "timed on NVIDIA H100" in state
    assert "not yet" not in state
    lines = report.speed(tmp_path).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[4:-1]] == [
        "lorafast", "PEFT", "PEFT, compiled",
    ]  # fmt: skip
    assert lines[2] == (
        "| NVIDIA H100, bf16 | 0 | 1 | **1.50** (1.50 – 1.50) | **2.50** (2.50 – 2.50) "
        "| **2.25** (2.25 – 2.25) |"
    )
    assert lines[3] == "| AMD, 2 threads, bf16 | 0 | 1 | **1.38** (1.38 – 1.38) |  |  |"
    performance = report.performance(tmp_path)
    assert performance.index("## NVIDIA H100") < performance.index("## AMD, 2 threads")


def test_every_layer_counts_and_what_did_not_run_is_told(report, record, tmp_path):
    record(
        "gpu-h100", [{"lorafast": o, "peft": p} for o, p in ((1.5, 2), (1.125, 3), (1.375, None))]
    )
    line = report.speed(tmp_path).splitlines()[2]
    assert "| 3 | **1.38** (1.12 – 1.50) | **2.50** (2.00 – 3.00, 1 not run) |" in line


def test_the_newest_complete_run_of_each_device_is_shown(report, record, tmp_path):
    record("gpu-a", [{"lorafast": 1.5}], day=1)
    record("gpu-b", [{"lorafast": 1.375}], day=2)
    record("gpu-c", [{"lorafast": 1.125}], day=3, complete=False)
    record("gpu-d", [{"lorafast": 1.75}], day=1, device="NVIDIA H200")
    shown = re.findall(r"\*\*([\d.]+)\*\*", report.speed(tmp_path))
    assert sorted(shown) == ["1.38", "1.75"]
    assert len(re.findall("^## ", report.performance(tmp_path), re.MULTILINE)) == 2
    assert "broke off" not in report.performance(tmp_path)


def test_of_a_device_without_a_complete_run_the_newest_is_shown_and_it_is_said(
    report, record, tmp_path
):
    record("gpu-a", [{"lorafast": 1.5}], day=2, complete=False)
    record("gpu-b", [{"lorafast": 1.375}], day=3, complete=False)
    assert re.findall(r"\*\*([\d.]+)\*\*", report.speed(tmp_path)) == ["1.38"]
    assert report.performance(tmp_path).count("The run broke off") == 1
    record("gpu-c", [{"lorafast": 1.125}], day=1)
    assert re.findall(r"\*\*([\d.]+)\*\*", report.speed(tmp_path)) == ["1.12"]
    assert "broke off" not in report.performance(tmp_path)


def test_operations_and_tests_of_a_record_are_shown(report, record, tmp_path):
    problem = {
        "shape": {"label": "", "M": 1000, "K": 100, "N": 50}, "r": 16, "dtype": "bf16",
        "adapter_dtype": "fp32", "dropout_p": 0.0,
    }  # fmt: skip
    row = {
        "problem": problem, "case": "shrink", "contender": "triton", "flops": 2e9,
        "least_bytes": 4_000_000, "wrong": None, "unavailable": None, "samples": [0.002],
        "copy_samples": [0.001], "product_samples": [0.004],
    }  # fmt: skip
    other = row | {"contender": "cuda", "samples": [], "unavailable": "no kernels"}
    record("gpu-a", [], operations=[row, other], tests=[{"passed": 7, "skipped": 1, "status": 0}])
    rendered = report.performance(tmp_path)
    assert "Tests on the device in the same run: 7 passed, 1 skipped." in rendered
    assert "| shrink | triton | 2 ms | 1 | 2 |" in rendered
    assert "| shrink | cuda | not run: no kernels |  |  |" in rendered
    assert "| copy of x |  | 1 ms |  | 0 |" in rendered
    assert "| torch.mm |  | 4 ms | 0.0025 |  |" in rendered


def test_a_record_of_networks_is_shown(report, record, tmp_path):
    row = {
        "batch": 16, "side": 96, "r": 8, "dtype": "fp32", "channels_last": True,
        "contender": "frozen", "wrong": None, "unavailable": None, "samples": [0.1],
        "frozen_samples": [0.1], "peak_bytes": 50_000_000,
    }  # fmt: skip
    rows = [
        row, row | {"contender": "lorafast", "samples": [0.1125]},
        row | {"contender": "peft", "samples": [], "unavailable": "peft is not installed"},
    ]  # fmt: skip
    attention = [
        {name: value for name, value in row.items() if name not in ("side", "channels_last")}
        | {"tokens": 197, "width": 768, "blocks": 4}
    ]
    record("networks-old", [], day=1, convolutions=[row])
    record(
        "networks-new", [], day=2, attention=attention,
        convolutions=rows + [r | {"channels_last": False} for r in rows],
    )  # fmt: skip
    performance = report.performance(tmp_path)
    _, section = performance.split("## Convolutions and attention: NVIDIA H100\n\n")
    assert "[record](networks-new.json)" in section
    section, of_attention = section.split("4 blocks of nn.MultiheadAttention, width 768")
    assert "| frozen | 100 ms | **1.000** (1.000 – 1.000) | 50 |" in of_attention
    last, first = section.split("ResNet-18's shape")[1:]
    for part, order in ((last, "channels last"), (first, "channels first")):
        assert f"16 images of 96 x 96, fp32, {order}, r=8" in part
        cells = [
            [c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if "|" in line
        ]
        assert cells[0] == ["", "step", "over frozen", "peak MB"]
        assert cells[2:] == [
            ["frozen", "100 ms", "**1.000** (1.000 – 1.000)", "50"],
            ["lorafast", "112.5 ms", "**1.125** (1.125 – 1.125)", "50"],
            ["peft", "not run: peft is not installed", "", ""],
        ]


def test_a_record_of_other_kinds_is_shown(report, record, tmp_path):
    timed = {
        "contender": "frozen", "wrong": None, "unavailable": None, "samples": [0.1],
        "frozen_samples": [0.1], "peak_bytes": 50_000_000, "dtype": "fp32", "M": 512,
    }  # fmt: skip
    row = timed | {"kind": "", "K": 2048, "N": 1024, "r": 16}
    kinds = [
        row, row | {"kind": "LoKr", "contender": "peft", "samples": [0.3]},
        row | {"kind": "LoKr", "contender": "accelerated", "samples": [0.15]},
    ]  # fmt: skip
    behind = timed | {"width": 768, "hidden": 3072, "bottleneck": 64, "activation": "gelu"}
    record("relatives-a", [], relatives=kinds, bottlenecks=[behind])
    page = report.performance(tmp_path)
    _, section = page.split("## LoRA's relatives and bottleneck adapters: NVIDIA H100\n\n")
    assert "M=512, 2048 → 1024, fp32, forward + backward with dx:" in section
    assert (
        "| LoKr, r=16 | 100 ms | **3.000** (3.000 – 3.000) | **1.500** (1.500 – 1.500) "
        "| **2.000** (2.000 – 2.000) | 50 → 50 |"
    ) in section
    assert "behind a frozen feed-forward (768 → 3072 → 768), M=512, fp32" in section


@pytest.mark.parametrize(
    ("recorded", "typed"),
    [
        ("make gpu", "make gpu"),
        ("make gpu --minutes 12", 'make gpu ARGS="--minutes 12"'),
        ("lorafast bench --rank 8", "lorafast bench --rank 8"),
    ],
)
def test_the_command_is_shown_as_it_is_typed(report, record, tmp_path, recorded, typed):
    record("gpu-a", [{"lorafast": 1.5}], command=recorded)
    assert f"```sh\n{typed}\n```" in report.performance(tmp_path)


def test_a_document_without_marks_is_refused(report):
    with pytest.raises(ValueError, match=r"performance\.md lacks"):
        report.SECTIONS[2].of("# lorafast")


def test_what_is_put_into_a_document_is_found_there(report):
    for section in report.SECTIONS:
        text = f"before {section.begin}\nold\n{section.end}\nafter"
        written = section.put_into(text, "a line")
        assert section.of(written) == "a line"
        assert written.startswith("before ")
        assert written.endswith("\nafter")


def test_cuda_kernels_are_shown(report, record, tmp_path):
    row = {
        "nvcc": "13.0", "arch": "sm_90a", "kernel": "shrink_kernel", "instances": 3,
        "registers": 128, "shared": 1040, "spills": 0, "instructions": ["HMMA"],
    }  # fmt: skip
    record("nvcc-old", [], day=1, nvcc=[])
    record("nvcc-new", [], day=2, nvcc=[row, row | {"arch": "sm_80"}], command="python compiled.py")
    section = report.performance(tmp_path)
    assert "Compiled by nvcc 13.0, not run" in section
    assert "[record](nvcc-new.json)" in section
    assert re.search(
        r"\| sm_90a \| +`shrink_kernel` \| +3 \| +128 \| +1,040 \| +0 \| +HMMA", section
    )


def test_what_kernels_execute(report, record, tmp_path):
    part = {"issued": {"tensor": 8.0, "integer": 24.0}, "multiplies": 8 * 2048.0, "conflicts": 3.0}
    row = {
        "operation": "linear_expand", "variant": "dx", "capability": 90,
        "M": 8192, "K": 4096, "N": 1024, "r": 16, "step": part, "tile": part, "program": part,
        "steps": 64, "tiles": 512, "in_flight": 65536.0, "from_l2": True, "registers": 168,
        "cycles": {"tensor": 1234.0, "issue": 2500.0, "shared": 40960.0, "memory": 1.0},
        "bound": "shared", "exposed": 99.5,
    }  # fmt: skip
    record("executed-old", [], day=1, executed=[])
    record(
        "executed-new", [], day=2, executed=[row, row | {"variant": "", "capability": 80}],
        command="lorafast bench --executed --json x.json",
    )  # fmt: skip
    performance = report.performance(tmp_path)
    _, section = performance.split("## What kernels execute, counted\n\n")
    assert "`lorafast bench --executed --json x.json`" in section
    assert "[record](executed-new.json)" in section
    head, _, *lines = (line for line in section.split("\n") if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [
        "kernel", "layer", "tensor", "issue", "shared", "memory", "bound by", "issued a multiply",
        "conflicts", "KB in flight", "registers",
    ]  # fmt: skip
    assert lines == [
        "| sm_90 | `linear_expand dx` | 8192 × 4096 → 1024, r = 16 | 1.2 | 2.5 | 41.0 | 0.0 "
        "| shared | 4.00 | 3 | 64 | 168 |",
        "| sm_80 | `linear_expand` | 8192 × 4096 → 1024, r = 16 | 1.2 | 2.5 | 41.0 | 0.0 "
        "| shared | 4.00 | 3 | 64 | 168 |",
    ]


def executed_row(**more):
    part = {"issued": {"tensor": 8.0, "integer": 24.0}, "multiplies": 8 * 2048.0, "conflicts": 3.0}
    return {
        "operation": "shrink", "variant": "", "capability": 90,
        "M": 8192, "K": 4096, "N": 4096, "r": 16, "step": part, "tile": part, "program": part,
        "steps": 64, "tiles": 512, "in_flight": 65536.0, "from_l2": False, "registers": 168,
        "cycles": {"tensor": 1234.0, "issue": 2500.0, "shared": 40960.0, "memory": 1.0},
        "bound": "shared", "exposed": 99.5, "backend": "triton", "launches": 1, "from_memory": 0.0,
        "launch_cycles": {"tensor": 1e3, "issue": 2e3, "shared": 3e3, "L2": 4e3, "memory": 5e3},
        "moved": 3e6, "least": 2e6,
    } | more  # fmt: skip


def test_cuda_beside_triton(report, record, tmp_path):
    """A table an architecture; what stands there isn't among Triton's tiles."""
    triton = [
        executed_row(),
        executed_row(capability=80),
        executed_row(operation="expand_backward"),
    ]
    cuda = [executed_row(backend="cuda", capability=c, registers=72) for c in (80, 90)]
    decode = executed_row(
        backend="cuda",
        operation="lora_linear",
        variant="decode",
        M=1,
        from_memory=1.01 * 2 * 4096**2,
    )
    record("executed-a", [], executed=[*triton, *cuda, decode])
    _, section = report.performance(tmp_path).split("## What kernels execute, counted\n\n")
    tiles, beside = section.split("### CUDA C++ beside Triton, executed, not timed\n\n")
    assert "`expand_backward`" in tiles
    assert "`shrink`" not in tiles
    assert (
        "from and to memory: 1.0100 for 4096 → 4096 at r = 16, where A and B are 0.0078. W"
        in beside
    )
    of_80, of_90 = beside.split("sm_80:")[1].split("sm_90a:")
    line = (
        "| `shrink` | 8192 × 4096 → 4096, r = 16 | 1.0 / 1.0 | 2.0 / 2.0 | 3.0 / 3.0 | 4.0 / 4.0 "
        "| 5.0 / 5.0 | memory / memory | 4.0 / 4.0 | 1.50 / 1.50 | 3 / 3 | 64 / 64 | 72 / 168 | 1 / 1 |"
    )
    assert line in of_80
    assert line in of_90
    assert of_90.count("`lora_linear decode` | 1 × 4096 → 4096, r = 16 | 1.0 / –") == 1
    assert "lora_linear" not in of_80


def test_tiles_of_gemms_have_a_table(report, record, tmp_path):
    units = {"tensor": 1024.0, "issue": 127.0, "shared": 1044.0, "memory": 512.0}
    part = executed_row()["step"] | {"sectors": 1024.0}
    more = {
        "backend": "cuda", "operation": "linear_expand", "step": part, "step_cycles": units,
        "tile_cycles": units, "stalls": {"step": 153.0, "epilogue": 751.0},
    }  # fmt: skip
    line = {"clocks": 67000.0, "tensor": 65660.0, "added": 670.0, "idle: stores": 972.0}
    record("executed-a", [], executed=[
        executed_row(), executed_row(variant="plain", r=0, **more),
        executed_row(variant="forward", timeline=line, **more),
    ])  # fmt: skip
    _, section = report.performance(tmp_path).split("### Tiles of CUDA C++ GEMMs")
    assert (
        "| sm_90 | `linear_expand forward` | 8192 × 4096 → 4096, r = 16 | 1024 / 127 / 153 | 32 | 1,024 "
        "| 127 | 1,044 | 512 | 751 | 1.0% | 98.0% | stores 972 |"
    ) in section
    assert "`linear_expand plain` | 8192 × 4096 → 4096, r = 0 |" in section


def test_without_nvcc_the_section_says_so(report, record, tmp_path):
    record(
        "executed-a", [], executed=[executed_row()],
        executed_without=[{"reason": "the CUDA C++ kernels are not counted here: there is no nvcc"}],
    )  # fmt: skip
    performance = report.performance(tmp_path)
    assert performance.endswith("\n\nThe CUDA C++ kernels are not counted here: there is no nvcc.")
    assert "`shrink`" in performance
    assert "beside Triton" not in performance
