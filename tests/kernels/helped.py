"""Helpers for layers of any size, whatever the model of them says."""

from lorafast.kernels.common import plan
from lorafast.kernels.common.plan import Helpers


def with_helpers(monkeypatch, helpers=2, waves=1, programs=5):
    """Lets layers of any size have helpers."""

    def always(config, rows, depth, *others):
        return Helpers(helpers, waves, programs) if rows and depth else None

    monkeypatch.setattr(plan, "_plan", always)
