// Launchers with mistakes, which tests/cuda/on_machine.py must find.
#include "copy.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lorafast_cuda_throwaway, library) {
  library.def("copy(Tensor x, int how, Tensor(a!) y, Tensor(b!)? partials=None, Tensor(c!)? counters=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lorafast_cuda_throwaway, CompositeExplicitAutograd, library) {
  library.impl("copy", TORCH_BOX(&lorafast::cuda::copy));
}
