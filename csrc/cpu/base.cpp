#include <algorithm>
#include <limits>

#include "kernels.h"

#define SSO_TABLE base
#define SSO_ISA "base"
#define SSO_LANES 1
#include "kernels.inc"
