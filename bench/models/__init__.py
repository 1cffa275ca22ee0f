"""Training steps of whole transformers: frozen, PEFT, lorafast."""

from lorafast.bench.models.run import Row, measure, run

__all__ = ["Row", "measure", "run"]
