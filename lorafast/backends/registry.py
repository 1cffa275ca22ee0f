"""The registry of backends, and the choice of the plan that serves a problem.

``auto`` takes, of the plans for a problem,

1. one that is ``ahead``: a measured rule says that it is the fastest. Of several, that of the backend
   which was registered last, since its author knew the others;
2. else the one with the fewest ``seconds``; measured times count before modelled ones;
3. else the first, that of the backend which was registered first.

A layer's forward or backward has one plan more: its operations one by one, each on the backend that is
the fastest there.

A forced backend (``use_backend`` or ``LORAFAST_BACKEND``) that can't serve a call raises with its
reason. Nothing falls back in silence.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorafast.backends import composed
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.core.errors import BackendError
from lorafast.core.problem import LAYER_OPERATIONS, Problem
from lorafast.core.sms import carveout

AUTO = "auto"
_KEPT = 4096

_backends: dict[str, Backend] = {}
_forget: list[Callable[[], None]] = []
_times_forgotten = 0


@dataclass(frozen=True)
class BackendStatus:
    """Whether this machine can use a backend, and if not, why."""

    name: str
    usable: bool
    reason: str | None

    def __str__(self) -> str:
        return f"{self.name}: {'usable' if self.usable else self.reason}"


def register(backend: Backend) -> None:
    """Adds a backend, which is then chosen, forced and explained like any other.

    Raises:
        TypeError: ``backend`` is no object of a class of ``Backend``.
        ValueError: its name is taken, or is no word.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend is {backend!r}, expected an object of a class of Backend")
    if backend.name in _backends or backend.name == AUTO:
        raise ValueError(f"there is a backend {backend.name!r} already")
    if not backend.name.isidentifier():
        raise ValueError(f"name is {backend.name!r}, expected a word")
    _backends[backend.name] = backend
    forget_plans()


def unregister(name: str) -> None:
    """Removes a backend.

    Raises:
        KeyError: no backend has this name.
    """
    del _backends[name]
    forget_plans()


@contextlib.contextmanager
def standing_in(backend: Backend) -> Iterator[None]:
    """Within the block ``backend`` replaces the one of its name.

    Raises:
        KeyError: no backend has this name.
    """
    before = _backends[backend.name]
    _backends[backend.name] = backend
    forget_plans()
    try:
        yield
    finally:
        _backends[backend.name] = before
        forget_plans()


def names() -> tuple[str, ...]:
    """The names of the backends, in the order of registration."""
    return tuple(_backends)


def plain_pytorch_names() -> list[str]:
    """The names of the backends that are made of operations which PyTorch differentiates itself."""
    return [name for name, backend in tuple(_backends.items()) if backend.plain_pytorch]


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        KeyError: there is none.
    """
    return _backends[name]


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether this machine can use it, and if not, why."""
    status = {}
    for name, backend in tuple(_backends.items()):
        reason = backend.why_unusable()
        status[name] = BackendStatus(name, reason is None, reason)
    return status


def plan_of(name: str, problem: Problem) -> Plan | Refusal:
    """The answer of the backend ``name``; a refusal if this machine can't use it.

    Raises:
        TypeError: the answer is neither a plan nor a refusal, or a plan that doesn't suit the problem.
    """
    return _plan_of(name, problem, _times_forgotten, carveout())


@functools.lru_cache(maxsize=_KEPT)
def _plan_of(name: str, problem: Problem, times_forgotten: int, carveout: int) -> Plan | Refusal:
    backend = _backends.get(name)
    if backend is None:  # forced, or of a forward whose backward comes now
        return Refusal(name, "it is registered no more")
    if problem.operation not in backend.operations:
        return Refusal(name, f"it has no {problem.operation}")
    reason = backend.why_unusable()
    answer = backend.plan(problem) if reason is None else Refusal(name, reason)
    wrong = _why_wrong(answer, problem)
    if wrong is not None:
        raise TypeError(f"backend {name!r} answered {problem.operation} with {wrong}")
    return answer


def _why_wrong(answer: object, problem: Problem) -> str | None:
    if not isinstance(answer, Plan | Refusal):
        return f"{answer!r}, expected a Plan or a Refusal"
    alone = problem.operation == "lora_linear" and "s" not in problem.wants and not problem.dropout
    if isinstance(answer, Plan) and answer.differentiable and not alone:
        return "a differentiable plan, which lora_linear alone may have, without s and dropout"
    return None


def definition(problem: Problem) -> Plan:
    """The plan that is made of operations which PyTorch differentiates, any number of times."""
    answers = (plan_of(name, problem) for name in plain_pytorch_names())
    return next(plan for plan in answers if isinstance(plan, Plan))


def choose(problem: Problem, forced: str | None = None) -> Plan:
    """The plan that serves a problem: that of the ``forced`` backend, else the one that ``auto`` takes.

    Raises:
        BackendError: the forced backend refuses; the message has its reason.
    """
    return _choose(problem, forced, _times_forgotten, carveout())


@functools.lru_cache(maxsize=_KEPT)
def _choose(problem: Problem, forced: str | None, times_forgotten: int, carveout: int) -> Plan:
    if forced is not None:
        answer = plan_of(forced, problem)
        if isinstance(answer, Refusal):
            raise BackendError(
                f"backend {forced!r} can't serve {problem.operation}: {answer.reason}"
            )
        return answer
    plans = [
        p for p in (plan_of(name, problem) for name in tuple(_backends)) if isinstance(p, Plan)
    ]
    for plan in reversed(plans):
        if plan.ahead is not None:
            return plan
    if problem.operation in LAYER_OPERATIONS:
        together = composed.plan(problem, choose)
        if together.ahead is not None:
            return together
        plans.append(together)
    timed = [plan for plan in plans if plan.seconds is not None]
    measured = [plan for plan in timed if plan.measured]
    return min(measured or timed or plans[:1], key=lambda plan: plan.seconds or 0.0)


def when_forgotten(forget: Callable[[], None]) -> None:
    """Calls ``forget`` from now on whenever plans are forgotten."""
    _forget.append(forget)


def times_forgotten() -> int:
    """How often plans were forgotten. A plan that was begun at another count must not be kept."""
    return _times_forgotten


def forget_plans() -> None:
    """Forgets all plans, so that problems are planned anew: backends or tuning records have changed."""
    global _times_forgotten
    _times_forgotten += 1
    _plan_of.cache_clear()
    _choose.cache_clear()
    for forget in _forget:
        forget()
