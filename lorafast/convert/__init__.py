"""Swap LoRA layers into a model and back, save and load them."""

from lorafast.convert.adapt import adapt
from lorafast.convert.adapter import Adapter
from lorafast.convert.adapter_io import load_adapter, save_adapter
from lorafast.convert.adapterhub import load_adapterhub, save_adapterhub
from lorafast.convert.bottlenecks import remove_bottlenecks
from lorafast.convert.combine import combine
from lorafast.convert.disabled import disabled
from lorafast.convert.extract import Extracted, extract
from lorafast.convert.freeze import freeze, thaw
from lorafast.convert.heads import new_head
from lorafast.convert.interpolate import interpolate, interpolation_curve
from lorafast.convert.kohya import export_adapter, import_adapter
from lorafast.convert.left_out import LeftOut
from lorafast.convert.merge import merge
from lorafast.convert.mixed import mixed
from lorafast.convert.named import adapter_names, add_adapter, delete_adapter, set_adapter
from lorafast.convert.parameter_groups import parameters
from lorafast.convert.quantize import quantize
from lorafast.convert.summary import AdapterRow, Summary, summary

__all__ = [
    "Adapter",
    "AdapterRow",
    "Extracted",
    "LeftOut",
    "Summary",
    "adapt",
    "adapter_names",
    "add_adapter",
    "combine",
    "delete_adapter",
    "disabled",
    "export_adapter",
    "extract",
    "freeze",
    "import_adapter",
    "interpolate",
    "interpolation_curve",
    "load_adapter",
    "load_adapterhub",
    "merge",
    "mixed",
    "new_head",
    "parameters",
    "quantize",
    "remove_bottlenecks",
    "save_adapter",
    "save_adapterhub",
    "set_adapter",
    "summary",
    "thaw",
]
