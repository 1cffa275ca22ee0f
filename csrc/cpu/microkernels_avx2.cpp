#if defined(__AVX2__)
#define LORAFAST_SET avx2
#define LORAFAST_ROWS 4
#include "microkernels_impl.h"
#else  // the compiler has no such instructions: setup.py leaves their flags out
#include "microkernels.h"
const lorafast::Microkernels* const lorafast::microkernels_avx2 = nullptr;
#endif
