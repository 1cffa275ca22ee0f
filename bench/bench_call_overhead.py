"""What a call costs when there is next to nothing to compute: 64 x 64, 4 rows, in microseconds.

    python bench/bench_call_overhead.py [--limit 3.0]

Contenders are checked against the reference, then timed in turn, round after round, in one process;
the table has medians over rounds and the middle half of them. With ``--limit`` the exit status is 1
if the forward of lorafast costs more than that many times the forward of ``nn.Linear``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorafast import reference
from lorafast.nn import LoRALinear

ROWS, SIZE, RANK = 4, 64, 8
CALLS, WARM_UP = 200, 3

Contender = Callable[[Tensor], Tensor]


def contenders() -> dict[str, Contender]:
    """The frozen layer, lorafast over it, and PEFT over it if that is installed."""
    linear = nn.Linear(SIZE, SIZE).requires_grad_(False)
    layer = LoRALinear.from_linear(linear, RANK)
    nn.init.normal_(layer.lora_B)
    found: dict[str, Contender] = {"nn.Linear": linear, "lorafast": layer}
    try:
        import peft
    except ImportError:
        print("PEFT is not installed: not measured", file=sys.stderr)
        return found
    model = nn.Sequential(nn.Linear(SIZE, SIZE).requires_grad_(False))
    model.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    adapted = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(layer.lora_A)
        adapted.lora_B["default"].weight.copy_(layer.lora_B)
    found["PEFT"] = adapted
    return found


def check(found: dict[str, Contender], x: Tensor) -> None:
    """Every adapted contender must compute the same function."""
    layer = found["lorafast"]
    assert isinstance(layer, LoRALinear)
    expected = reference.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias
    )
    for name in found.keys() - {"nn.Linear"}:
        torch.testing.assert_close(found[name](x), expected, msg=f"{name} is WRONG")


def microseconds(call: Callable[[], object]) -> float:
    """Time of one call, from a burst of them."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Every contender once a round, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, call in calls.items():
            sample = microseconds(call)
            if number >= WARM_UP:
                samples[name].append(sample)
    return samples


def print_table(title: str, samples: dict[str, list[float]]) -> dict[str, float]:
    """Prints medians, spread and ratios; returns the ratios to the frozen layer.

    A ratio is the median of those of single rounds, whose samples saw the same state of the machine.
    """
    print(f"\n{title}\n{'':<12}{'µs':>8}{'middle half':>18}{'ratio':>8}")
    ratios = {}
    frozen = samples["nn.Linear"]
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratios[name] = statistics.median(v / f for v, f in zip(values, frozen, strict=True))
        median = statistics.median(values)
        print(f"{name:<12}{median:>8.1f}{f'{low:.1f} – {high:.1f}':>18}{ratios[name]:>8.2f}")
    return ratios


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--limit", type=float, help="fail if a forward ratio exceeds this")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(ROWS, SIZE)
    leaf = x.clone().requires_grad_()
    dy = torch.randn(ROWS, SIZE)
    found = contenders()
    check(found, x)
    print(f"{ROWS} rows, {SIZE} x {SIZE}, r = {RANK}, fp32, {torch.get_num_threads()} threads")

    def forward(contender: Contender) -> Callable[[], object]:
        return lambda: contender(x)

    def forward_backward(contender: Contender) -> Callable[[], object]:
        return lambda: contender(leaf).backward(dy)

    def timed(make: Callable[[Contender], Callable[[], object]]) -> dict[str, list[float]]:
        return measure({name: make(c) for name, c in found.items()}, arguments.rounds)

    training = print_table("forward, adapter trained", timed(forward))
    with torch.no_grad():
        inference = print_table("forward, no_grad", timed(forward))
    print_table("forward + backward with dx", timed(forward_backward))
    worst = max(training["lorafast"], inference["lorafast"])
    if arguments.limit is not None and worst > arguments.limit:
        print(f"\nforward ratio {worst:.2f} exceeds {arguments.limit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
