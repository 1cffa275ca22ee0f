#if defined(__AVX512F__)
#define LORAFAST_SET avx512
#define LORAFAST_ROWS 8
#include "microkernels_impl.h"
#else  // the compiler has no such instructions: setup.py leaves their flags out
#include "microkernels.h"
const lorafast::Microkernels* const lorafast::microkernels_avx512 = nullptr;
#endif
