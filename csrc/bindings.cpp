// What lorafast._C offers, and which file serves it. Outputs are the caller's: written, never read
// (but for the y of expand_, which is added to). A mask is (seed, threshold, survivor_scale) as in
// lorafast/reference/dropout.py; without a seed there is none.
#include <exception>
#include <string>

#include "cpu/microkernels.h"
#include "cpu/operations.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lorafast_cpu, library) {
  // csrc/cpu/shrink.cpp
  library.def(
      "shrink(Tensor x, Tensor lora_A, Tensor? seed, int threshold, float survivor_scale, Tensor(a!) s) -> ()");
  // csrc/cpu/expand.cpp
  library.def(
      "expand_(Tensor(a!) y, Tensor s, Tensor lora_B, float scaling, Tensor? seed, int threshold, "
      "float survivor_scale) -> ()");
  // csrc/cpu/expand_backward.cpp
  library.def(
      "expand_backward(Tensor dy, Tensor s, Tensor lora_B, float scaling, Tensor(a!) ds, Tensor(b!) dB) -> ()");
  // csrc/cpu/shrink_backward.cpp
  library.def(
      "shrink_backward(Tensor ds, Tensor x, Tensor? seed, int threshold, float survivor_scale, "
      "Tensor(a!) dA) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lorafast_cpu, CPU, library) {
  library.impl("shrink", TORCH_BOX(&lorafast::cpu::shrink));
  library.impl("expand_", TORCH_BOX(&lorafast::cpu::expand_));
  library.impl("expand_backward", TORCH_BOX(&lorafast::cpu::expand_backward));
  library.impl("shrink_backward", TORCH_BOX(&lorafast::cpu::shrink_backward));
}

// The name of the instruction set in use, for lorafast info; "error: ..." if LORAFAST_CPU names none.
extern "C" __attribute__((visibility("default"))) const char* lorafast_cpu_capability() {
  static std::string name;
  try {
    name = lorafast::microkernels().name;
  } catch (const std::exception& error) {
    name = std::string("error: ") + error.what();
  }
  return name.c_str();
}
