"""Steps of several ranks: what they take and what they send; ``scaling`` is on paper."""

from lorafast.bench.distributed.job import Row, describe, run, sent_by

__all__ = ["Row", "describe", "run", "sent_by"]
