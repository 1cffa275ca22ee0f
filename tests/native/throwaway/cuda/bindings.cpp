// The least that csrc/cuda/ can be: what setup.py's row for CUDA makes of it is tested.
#include "twice.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lorafast_cuda, library) {
  // csrc/cuda/twice.cu
  library.def("twice(Tensor x, Tensor(a!) y) -> ()");
}

// A tensor of any device gets as far as the checks.
STABLE_TORCH_LIBRARY_IMPL(lorafast_cuda, CompositeExplicitAutograd, library) {
  library.impl("twice", TORCH_BOX(&lorafast::cuda::twice));
}
