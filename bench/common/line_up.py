"""The contenders of a problem, built and checked: who may be timed, who not, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from lorafast.bench.common import check
from lorafast.bench.common.contenders import BUILDERS, FROZEN, Builder, Contender, UnavailableError
from lorafast.bench.common.problem import Problem, Tensors

AGAIN = f"{FROZEN} again"


@dataclass
class LineUp:
    """``right`` contenders by name, the baseline first; sentences about the ``wrong`` and the
    ``unavailable`` ones; ``names`` of all in the order of the table."""

    names: list[str]
    right: dict[str, Contender] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def line_up(
    problem: Problem,
    tensors: Tensors,
    against: Sequence[str],
    builders: dict[str, Builder] | None = None,
) -> LineUp:
    """The frozen layer, lorafast, and those named in ``against``.

    The frozen layer is the baseline; named in ``against``, a second one runs as a contender.
    """
    builders = BUILDERS if builders is None else builders
    named = {AGAIN if name == FROZEN else name: name for name in ("lorafast", *against)}
    found = LineUp([FROZEN, *named])
    # Compiled contenders start afresh: what was compiled for other sizes is another program.
    torch._dynamo.reset()
    judge = check.Judge(problem, tensors)
    for label, name in {FROZEN: FROZEN, **named}.items():
        try:
            contender = builders[name](problem, tensors)
            reason = judge.why_wrong(contender)
        except UnavailableError as error:
            found.unavailable[label] = str(error)
            continue
        except Exception as error:  # it is the contender's, reported with it, and the others go on
            reason = check.raised(error)
        if reason is None:
            found.right[label] = contender
        else:
            found.wrong[label] = reason
    return found
