// Which instruction set serves this process.
#include "microkernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lorafast {

namespace {

const Microkernels& choose() {
  struct Choice {
    const Microkernels* set;
    bool runs_here;
  };
  bool has_avx2 = false, has_avx512 = false, has_bf16 = false;
#if defined(__x86_64__)
  has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(__clang__) || __GNUC__ >= 10  // an older one doesn't know the word
  has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  const Choice all[] = {
      {microkernels_avx512_bf16, has_bf16},
      {microkernels_avx512, has_avx512},
      {microkernels_avx2, has_avx2},
      {microkernels_portable, true},
  };
  const char* asked = std::getenv("LORAFAST_CPU");
  std::string known;
  for (const Choice& choice : all) {
    if (choice.set == nullptr || !choice.runs_here) continue;
    if (asked == nullptr || *asked == '\0' || std::strcmp(choice.set->name, asked) == 0) return *choice.set;
    known += std::string(known.empty() ? "" : ", ") + choice.set->name;
  }
  throw std::runtime_error(std::string("LORAFAST_CPU is '") + asked + "', expected one of " + known);
}

}  // namespace

const Microkernels& microkernels() {
  static const Microkernels& chosen = choose();
  return chosen;
}

bool has_amx() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;  // AMX-BF16
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace lorafast
