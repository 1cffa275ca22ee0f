import gc
import itertools
import os
import sys
import tempfile

import torch

# Before lorafast.kernels is first imported, which is when Triton reads it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nor what was tuned on the machine that tests.
os.environ["LORAFAST_CACHE"] = tempfile.mkdtemp(prefix="lorafast-tests-")

# Some releases of PyTorch refuse cuBLAS without it while ``use_deterministic_algorithms`` is on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from interpreter import remember_types, replace_once_a_launch
from toy_formats import registered

from lorafast.backends import registry
from lorafast.backends.aten import backend as aten

if os.environ.get("TRITON_INTERPRET") == "1":
    replace_once_a_launch()
    remember_types()

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("quick", settings.get_profile("repeatable"), max_examples=20)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Hypothesis draws numbers that it reads in the modules imported so far, so what a test draws would
# depend on the tests before it: not in a repeatable run.
_NO_CONSTANTS = providers.Constants()
providers._get_local_constants = lambda: _NO_CONSTANTS


# torch.manual_seed keeps for each kind of device a trace of who called it, until there is one: without
# a GPU that is half of what a test costs beside its own work.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
_COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX")}


@pytest.fixture(autouse=True)
def _nothing_of_others():
    """A test draws the same numbers and finds the same compilers whatever ran before it."""
    _seed(0)
    yield
    # PEFT's BOFT leaves both at gcc where it can't build its extension, and gcc links no C++.
    for name, value in _COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # What a test compiles doesn't count against the graphs that a forward may have in the next.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.utils.counters.clear()
        dynamo.reset()


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def never_small(monkeypatch):
    """No layer is so small that it is left to PyTorch's autograd: called, it says so to all plans."""

    def never():
        monkeypatch.setattr(aten, "SMALL", 0)
        registry.forget_plans()

    yield never
    registry.forget_plans()


@pytest.fixture
def toy_formats():
    """The package knows the tests' own formats of a frozen weight."""
    with registered():
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shared_by(item):
    return item.nodeid if item.get_closest_marker("executed") else item.path


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    # Under --dist worksteal each of n workers begins with one n-th of the list. The longest tests come
    # first in each, so that at the end there are short ones to share. Those of a file are one worker's:
    # what they compile and read, they share. Those that execute Triton's kernels share nothing.
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    files = [list(tests) for _, tests in itertools.groupby(slow, _shared_by)]
    share = -(-len(items) // workers)
    items[:] = []
    for i in range(workers):
        items += itertools.chain.from_iterable(files[i::workers])
        left = max((i + 1) * share - len(items), 0)
        items += rest[:left]
        del rest[:left]


# Modules and tests live as long as the process. The collector doesn't look for garbage among them: not
# while they are made, and not later, each time that a test has made some.
def pytest_collectstart():
    gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()
