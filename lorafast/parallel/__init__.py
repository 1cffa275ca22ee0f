"""Tensor parallelism: layers cut over the ranks of a mesh, with their adapters."""

from lorafast.ops.sharding import tell_dtensor
from lorafast.parallel.plan import parallelize
from lorafast.parallel.replicas import check_replicas
from lorafast.parallel.styles import Colwise, Replicated, Rowwise

tell_dtensor()

__all__ = ["Colwise", "Replicated", "Rowwise", "check_replicas", "parallelize"]
