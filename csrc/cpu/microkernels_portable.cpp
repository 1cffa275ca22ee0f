#define LORAFAST_SET portable
#define LORAFAST_ROWS 2
#include "microkernels_impl.h"
