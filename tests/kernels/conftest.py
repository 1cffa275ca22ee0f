"""What the tests of compiled kernels share."""

import os

import pytest

EVERY = os.environ.get("EXECUTE") == "all"
WRITE = os.environ.get("COMPILED") == "write"


@pytest.fixture(scope="module")
def _known(request):
    """For an architecture what is known of the launches that this module compiles."""
    from machine_code import FOLDER, Known

    folder = FOLDER / request.path.stem.removeprefix("test_compiled_")
    found = {}

    def known(capability):
        if capability not in found:
            found[capability] = Known(capability, None if EVERY else (), folder)
        return found[capability]

    yield known
    if WRITE:
        assert "PYTEST_XDIST_WORKER" not in os.environ, "one process writes: -n 0"
        for one in found.values():
            one.write()


@pytest.fixture
def machine_of(request, _known):
    """The machine code of a launch on an architecture, compiled or known, as ``machine_code`` tells.

    With ``EXECUTE=all`` all of it is compiled. With ``COMPILED=write`` the files say afterwards what a
    module's tests saw and nothing else: run the whole module, in one process.
    """

    def machine(launch, capability):
        made, unlike = _known(capability).machine(request.node.name, launch)
        assert unlike is None or WRITE, unlike
        return made

    return machine
