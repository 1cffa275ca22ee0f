// csrc/checks.h for tests to call, of whatever device: kernels is a DeviceType.
#include "checks.h"

namespace {

using namespace lorafast;

void check(
    int64_t kernels, const Tensor& x, const Tensor& lora_A, const std::optional<Tensor>& seed, const Tensor& s) {
  const OneDevice device(static_cast<DeviceType>(kernels), "x", x);
  check_matrix("x", x, x.size(0), x.size(1), device);
  check_matrix("lora_A", lora_A, lora_A.size(0), x.size(1), device);
  check_output("s", s, x.size(0), lora_A.size(0), device);
  check_seed(seed, 0, device);
}

}  // namespace

STABLE_TORCH_LIBRARY(lorafast_checks, library) {
  library.def("check(int kernels, Tensor x, Tensor lora_A, Tensor? seed, Tensor(a!) s) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lorafast_checks, CompositeExplicitAutograd, library) {
  library.impl("check", TORCH_BOX(&check));
}
