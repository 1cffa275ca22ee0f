// Which instruction set serves this process.
#include "microkernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lorafast {

extern const Microkernels microkernels_portable;
#if defined(__x86_64__)
extern const Microkernels microkernels_avx2;
extern const Microkernels microkernels_avx512;
extern const Microkernels microkernels_avx512_bf16;
#endif

namespace {

const Microkernels& choose() {
  struct Choice {
    const Microkernels& set;
    bool runs_here;
  };
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const Choice choices[] = {
#if defined(__x86_64__)
      {microkernels_avx512_bf16, has_avx512 && __builtin_cpu_supports("avx512bf16")},
      {microkernels_avx512, has_avx512},
      {microkernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {microkernels_portable, true},
  };
  const char* asked = std::getenv("LORAFAST_CPU");
  if (asked == nullptr || *asked == '\0') {
    for (const Choice& choice : choices)
      if (choice.runs_here) return choice.set;
  }
  std::string known;
  for (const Choice& choice : choices) {
    if (std::strcmp(choice.set.name, asked) == 0 && choice.runs_here) return choice.set;
    if (choice.runs_here) known += std::string(known.empty() ? "" : ", ") + choice.set.name;
  }
  throw std::runtime_error(std::string("LORAFAST_CPU is '") + asked + "', expected one of " + known);
}

}  // namespace

const Microkernels& microkernels() {
  static const Microkernels& chosen = choose();
  return chosen;
}

}  // namespace lorafast
