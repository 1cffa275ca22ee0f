"""What ``compute-sanitizer`` watches: every kernel once, on small shapes that nothing divides.

Those of CUDA C++ too, where they are built: the last line says whether they were.
"""

from unittest import mock

import torch
from lorafast.bench.common.problem import Problem, draw
from lorafast.bench.common.shapes import Shape
from lorafast.bench.operations.cases import cases
from lorafast.bench.operations.job import as_is
from lorafast.kernels.common import plan
from lorafast.kernels.common.configs import LaunchConfig
from lorafast.kernels.common.plan import Helpers
from lorafast.kernels.lora_linear import lora_linear as with_config
from quantized_weights import KINDS
from quantized_weights import draw as draw_weight

import lorafast
from lorafast import ops
from lorafast.backends import cost, dropout, forced
from lorafast.backends.cuda import Cuda, planning
from lorafast.backends.cuda.launch import Launch
from lorafast.functional import grouped_lora_linear, lora_linear
from lorafast.ops.problems import by_backend


def main() -> None:
    """Runs the kernels; the sanitizer sets the exit status."""
    device = torch.device("cuda")
    operations("triton", device)
    quantized("triton", device)
    with_helpers(device)
    reason = lorafast.backends()["cuda"].reason
    if reason is None:
        operations("cuda", device)
        quantized("cuda", device)
        of_few_rows(device)
        whatever_may_be_launched(device)
    torch.cuda.synchronize()
    print(f"every kernel ran{'' if reason is None else f', but for those of CUDA C++: {reason}'}")


def operations(backend: str, device: torch.device) -> None:
    """Each operation."""
    M, K, N = 131, 70, 201
    seed = torch.tensor([11], device=device)
    with forced.use_backend(backend):
        for dtype, r in (
            (torch.bfloat16, 3), (torch.bfloat16, 300), (torch.float16, 3), (torch.float32, 3),
        ):  # fmt: skip
            for dropout_p in (0.0, 0.5):
                x, dy = torch.randn(M, K), torch.randn(M, N)
                x, dy = x.to(device, dtype), dy.to(device, dtype)
                weight, bias = torch.randn(N, K).to(x), torch.randn(N).to(x)
                lora_A, lora_B = torch.randn(r, K).to(device), torch.randn(N, r).to(device)
                s = ops.shrink(x, lora_A, dropout_p, seed)
                ops.expand(s, lora_B, 0.7, dropout_p, seed, dtype=dtype)
                ops.linear_expand(x, weight, s, lora_B, 0.7, bias)
                ds, _ = ops.expand_backward(dy, s, lora_B, 0.7)
                ops.shrink_backward(ds, x, dropout_p, seed, torch.float32)
                ops.linear_expand(dy, weight.t(), ds, lora_A.t(), 1.0, None, dropout_p, seed)
            ops.weight_norm(weight, lora_A, lora_B, 0.7)


def quantized(backend: str, device: torch.device) -> None:
    """Layers over codes of every format: read by the products, or made dense."""
    K, N, r = 96, 201, 3
    for kind in KINDS:
        for M in (1, 16, 40, 300):
            weight = draw_weight(kind, N, K, torch.bfloat16, device)
            x = torch.randn(M, K).to(device, torch.bfloat16).requires_grad_()
            lora_A, lora_B = torch.randn(r, K).to(device), torch.randn(N, r).to(device)
            with forced.use_backend(backend):
                lora_linear(x, weight, lora_A, lora_B, 0.7).sum().backward()


def of_few_rows(device: torch.device) -> None:
    """A layer in one launch, with one adapter and with several; the mask that PyTorch's calls read."""
    K, N, r, n = 70, 201, 3, 4
    for M in (1, 5, 16, 70):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x, weight, bias = (torch.randn(s).to(device, dtype) for s in ((M, K), (N, K), (N,)))
            lora_A, lora_B = torch.randn(n, r, K).to(device), torch.randn(n, N, r).to(device)
            with torch.no_grad(), forced.use_backend("cuda"):
                lora_linear(x, weight, lora_A[0], lora_B[0], 0.7, bias)
                if M <= 16:
                    adapter_of = torch.arange(M, device=device) % (n + 1) - 1
                    grouped_lora_linear(x, weight, lora_A, lora_B, 0.7, adapter_of, bias)
            dropout.keep_mask(M, K, 0.3, torch.tensor([5], device=device))


def whatever_may_be_launched(device: torch.device) -> None:
    """Launches that the model may leave to others: GEMMs in CUDA C++, layers in one launch, whose rows
    are multiples of 16 bytes."""
    for dtype in ("bf16", "fp16", "fp32"):
        for p in (0.0, 0.5):
            layer = Problem(Shape("", 131, 72, 200), 3, dtype, dtype, p)
            for case in cases(layer, draw(layer, device, 1)).values():
                for launch in planning.launches_of(case.asks, cost.gpu_of(device)):
                    if isinstance(launch, Launch):
                        case.call(by_backend(Cuda(launch.choices)), as_is)


def with_helpers(device: torch.device) -> None:
    """A forward whose programs wait for each other, of small tiles and whatever helpers cost there."""
    config = LaunchConfig(16, 16, 16, 16, 1, 2, helpers=4)
    M, K, N, r = 1031, 70, 201, 3
    x = torch.randn(M, K).to(device, torch.bfloat16)
    weight, bias = torch.randn(N, K).to(x), torch.randn(N).to(x)
    lora_A, lora_B = torch.randn(r, K).to(device), torch.randn(N, r).to(device)
    with mock.patch.object(plan, "_plan", return_value=Helpers(4, 2, 24)):
        with_config(x, weight, lora_A, lora_B, 0.7, bias, config=config)


if __name__ == "__main__":
    main()
