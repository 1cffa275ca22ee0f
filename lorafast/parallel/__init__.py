"""Tensor parallelism: layers cut over the ranks of a mesh, with their adapters."""

from lorafast.parallel.plan import parallelize
from lorafast.parallel.replicas import check_replicas
from lorafast.parallel.styles import Colwise, Replicated, Rowwise

__all__ = ["Colwise", "Replicated", "Rowwise", "check_replicas", "parallelize"]
