"""Training steps of whole transformers: frozen, PEFT, lorafast."""

from lorafast.bench.models.job import Row, measure, run

__all__ = ["Row", "measure", "run"]
