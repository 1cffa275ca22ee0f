"""A machine that executes PTX on a CPU: what a GPU would get, tested without one."""

from .launch import Fault, In, InOut, Machine, Out, Program, UnknownInstruction
from .syntax import PtxError
from .tensormap import TensorMap

__all__ = [
    "Fault",
    "In",
    "InOut",
    "Machine",
    "Out",
    "Program",
    "PtxError",
    "TensorMap",
    "UnknownInstruction",
]
