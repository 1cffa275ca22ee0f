"""Swap LoRA layers into a model and back, save and load them."""

from lorafast.convert.adapt import adapt
from lorafast.convert.adapter_io import load_adapter, save_adapter
from lorafast.convert.disabled import disabled
from lorafast.convert.freeze import freeze, thaw
from lorafast.convert.heads import new_head
from lorafast.convert.interpolate import interpolate, interpolation_curve
from lorafast.convert.left_out import LeftOut
from lorafast.convert.merge import merge
from lorafast.convert.parameter_groups import parameters
from lorafast.convert.quantize import quantize
from lorafast.convert.summary import AdapterRow, Summary, summary

__all__ = [
    "AdapterRow",
    "LeftOut",
    "Summary",
    "adapt",
    "disabled",
    "freeze",
    "interpolate",
    "interpolation_curve",
    "load_adapter",
    "merge",
    "new_head",
    "parameters",
    "quantize",
    "save_adapter",
    "summary",
    "thaw",
]
