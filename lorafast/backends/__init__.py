"""The backends: what they answer to a problem, the registry that chooses, a folder for each.

``docs/add-a-backend.md`` shows how to add one.
"""

from lorafast.backends.aten import Aten
from lorafast.backends.cpu import Cpu
from lorafast.backends.cuda import Cuda
from lorafast.backends.plan import Backend, Plan, Refusal
from lorafast.backends.reference import Reference
from lorafast.backends.registry import BackendStatus, backends, register, unregister
from lorafast.backends.triton import Triton
from lorafast.core.errors import BackendError

__all__ = [
    "Backend",
    "BackendError",
    "BackendStatus",
    "Plan",
    "Refusal",
    "backends",
    "register",
    "unregister",
]

for _backend in (Aten(), Cpu(), Triton(), Cuda(), Reference()):
    register(_backend)
