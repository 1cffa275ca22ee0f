#define LORAFAST_SET avx512
#define LORAFAST_ROWS 8
#include "microkernels_impl.h"
