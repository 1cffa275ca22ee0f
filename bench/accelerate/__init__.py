"""Whole models with PEFT's adapters: stock, accelerated, and without any."""

from lorafast.bench.accelerate.job import CASES, Case, Row, measure, run
from lorafast.bench.accelerate.models import MODELS

__all__ = ["CASES", "MODELS", "Case", "Row", "measure", "run"]
