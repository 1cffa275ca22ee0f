#define LORAFAST_SET avx512_bf16
#define LORAFAST_ROWS 8
#include "microkernels_impl.h"
