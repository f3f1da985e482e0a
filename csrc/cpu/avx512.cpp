#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define SSO_TABLE avx512
#define SSO_ISA "avx512"
#define SSO_LANES 8
#include "kernels.inc"
#endif
