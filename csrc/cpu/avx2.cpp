#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "kernels.h"

#pragma GCC target("avx2")
#define SSO_TABLE avx2
#define SSO_ISA "avx2"
#define SSO_LANES 4
#include "kernels.inc"
#endif
