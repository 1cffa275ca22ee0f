"""What ``climb`` must know of the CUDA C++ kernels: the sizes of a launch that could be others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from lorafast.bench.operations.cases import Case

from lorafast.backends import registry
from lorafast.backends.cost import Device
from lorafast.backends.cuda import Cuda, cost, planning
from lorafast.backends.cuda.launch import Launch, neighbours
from lorafast.ops.problems import by_backend


@dataclass(frozen=True)
class Chosen:
    """``Launch.choices``, by name and value."""

    choices: tuple[tuple[str, int], ...]


class OfCuda:
    """The ways to launch a case in CUDA C++ that differ from the one of ``shipped``."""

    def __init__(self, case: Case, device: Device, shipped: Launch) -> None:
        self.case, self.device = case, device
        self.shipped = Chosen(tuple(shipped.choices.items()))
        answers = planning.launches_of(case.asks, device)
        choices = [answer.choices for answer in answers if isinstance(answer, Launch)]
        found = [Chosen(tuple(of.items())) for of in choices if of]
        self.others: Sequence[Chosen] = [other for other in found if other != self.shipped]

    def neighbours(self, config: Chosen) -> Iterator[Chosen]:
        for choices in neighbours(dict(config.choices)):
            found = planning.launches_of(self.case.asks, self.device, choices)
            if any(isinstance(launch, Launch) for launch in found):
                yield Chosen(tuple(choices.items()))

    def operations(self, config: Chosen) -> SimpleNamespace:
        return by_backend(Cuda(dict(config.choices)))


def choices_of(case: Case, device: Device) -> OfCuda | None:
    """For a case that one launch with choices serves; else None."""
    if not isinstance(registry.get(Cuda.name), Cuda):  # another one stands in for it
        return None
    launch = cost.fastest(case.asks, device)
    return OfCuda(case, device, launch) if launch is not None and launch.choices else None
