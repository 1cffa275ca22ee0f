"""Host time of a Triton launch, from Python to the driver, on a machine without a GPU.

    python -m lorafast.bench.call_overhead.launches

The kernels are compiled for sm_90 and launched by Triton's own launcher, but on a driver that does
nothing. So what is timed is what the host does, but for the driver's own share and for what only CUDA
tensors need (their allocator, counters and the device guard). Beside each stands ``F.linear`` on tensors
as small; it must be run without ``TRITON_INTERPRET``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

_CALLS, _ROUNDS = 400, 15
_HEADER = ("", "µs a call", "middle half", "× F.linear")
M, K, N, r = 16, 64, 64, 16


@contextmanager
def nothing_launched() -> Iterator[list[str]]:
    """Within the block Triton compiles for sm_90 and launches nothing; the names of what it would."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    launched: list[str] = []
    utils = SimpleNamespace(
        load_binary=lambda name, *_: (name, name, 0, 0, 1024),
        get_device_properties=lambda device: {
            "max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536,
        },
        build_signature_metadata=lambda signature: signature,
        fill_tma_descriptor_tiled=lambda *_: None,
        fill_tma_descriptor=lambda *_: None,
        launch=lambda *arguments: launched.append(arguments[4]),
        unload_module=lambda module: None,
    )  # fmt: skip

    class Nothing(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = utils, nvidia.CudaLauncher

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            return None

    # What the extension that talks to the driver would have filled in.
    for name, value in {
        "PyKernelArg": dict,
        "ARG_CONSTEXPR": 0,
        "ARG_KERNEL": 1,
        "ARG_TUPLE": 2,
    }.items():
        setattr(nvidia, name, value)
    before = driver._active
    driver.set_active(Nothing())
    try:
        yield launched
    finally:
        driver._active = before
