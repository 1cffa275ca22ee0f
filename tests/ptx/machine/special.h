// Special registers (special.cpp).
#pragma once

#include <string>

#include "machine.h"

namespace ptx {

struct Special {
  int width;  // in bits, 1 for a predicate
  uint64_t (*value)(const Step& step, int lane);
};

// By its name, "%tid.x"; null if the machine doesn't have it.
const Special* special_register(const std::string& name);

}  // namespace ptx
