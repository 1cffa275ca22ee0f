"""CUDA C++: skinny operations, layers in one launch, GEMMs with the low-rank term in their accumulator.

Their mask serves ``lorafast.backends.dropout`` too. What was measured with another build of them is not
used.
"""

from lorafast.backends import dropout
from lorafast.backends.cuda import native
from lorafast.backends.cuda.backend import Cuda
from lorafast.kernels.tables import tuned

__all__ = ["Cuda"]

dropout.make_bits_by("cuda", native.bits_on)
tuned.depend_on("lorafast_cuda", native.build)
