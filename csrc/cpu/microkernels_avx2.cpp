#define LORAFAST_SET avx2
#define LORAFAST_ROWS 4
#include "microkernels_impl.h"
