"""Swap LoRA layers into a model and back, save and load them."""

from lorafast.convert.adapt import adapt
from lorafast.convert.adapter_io import load_adapter, save_adapter
from lorafast.convert.adapterhub import load_adapterhub, save_adapterhub
from lorafast.convert.bottlenecks import remove_bottlenecks, without_bottlenecks
from lorafast.convert.left_out import LeftOut
from lorafast.convert.merge import merge
from lorafast.convert.quantize import quantize
from lorafast.convert.summary import AdapterRow, Summary, summary

__all__ = [
    "AdapterRow",
    "LeftOut",
    "Summary",
    "adapt",
    "load_adapter",
    "load_adapterhub",
    "merge",
    "quantize",
    "remove_bottlenecks",
    "save_adapter",
    "save_adapterhub",
    "summary",
    "without_bottlenecks",
]
