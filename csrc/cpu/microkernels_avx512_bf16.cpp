#if defined(__AVX512BF16__)
#define LORAFAST_SET avx512_bf16
#define LORAFAST_ROWS 8
#include "microkernels_impl.h"
#else  // the compiler has no such instructions: setup.py leaves their flags out
#include "microkernels.h"
const lorafast::Microkernels* const lorafast::microkernels_avx512_bf16 = nullptr;
#endif
