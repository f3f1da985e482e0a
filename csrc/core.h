// The arithmetic of one element, shared by every target. All inline, so that no translation unit built for one
// instruction set lends its code to another.
#pragma once

#if defined(__CUDACC__)
#define SSO_INLINE __host__ __device__ __forceinline__
#else
#define SSO_INLINE inline __attribute__((always_inline))
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sso {

enum class Transform { none, grams, cautious };  // the order of TRANSFORMS in types.py

// M ← β₁M + (1-β₁)R, V ← β₂V + (1-β₂)R², N = M / (slope·√V + floor); slope and floor hold ε and both bias corrections.
template <class A>
struct Adam {
  A beta1, rest1, beta2, rest2, slope, floor;
};

template <class A, bool advance>  // not advanced: the moments have been already, only N is wanted
SSO_INLINE A adam(const Adam<A>& h, A r, A& m, A& v) {
  if constexpr (advance) {
    m = h.beta1 * m + h.rest1 * r;
    v = h.beta2 * v + h.rest2 * r * r;
  }
  return m / (std::sqrt(v) * h.slope + h.floor);
}

// N = a·M + b·R, which is returned, and M ← c·M + d·R.
template <class A>
struct Linear {
  A look_mean, look_low, keep_mean, keep_low;
};

template <class A>
SSO_INLINE A linear(const Linear<A>& h, A r, A& m) {
  const A n = h.look_mean * m + h.look_low * r;
  m = h.keep_mean * m + h.keep_low * r;
  return n;
}

template <class A>
SSO_INLINE A sign(A x) {
  return static_cast<A>((x > 0) - (x < 0));
}

template <class To, class From>
SSO_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- the types of parameters and gradients: widen to the type of the arithmetic, narrow to the nearest, ties to even --

struct Bfloat16 {
  uint16_t code;
};
struct Float16 {
  uint16_t code;
};

SSO_INLINE float widen(float x) { return x; }
SSO_INLINE double widen(double x) { return x; }
SSO_INLINE float widen(Bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.code) << 16); }
SSO_INLINE float widen(Float16 x) {
  const uint32_t moved = (x.code & 0x7FFFu) << 13, exponent = moved & 0x0F800000u;
  const float normal = bits<float>(moved + (exponent == 0x0F800000u ? 0x70000000u : 0x38000000u));  // inf and NaN too
  const float subnormal = bits<float>(moved + 0x38800000u) - bits<float>(0x38800000u);
  return bits<float>(bits<uint32_t>(exponent ? normal : subnormal) | (x.code & 0x8000u) << 16);
}

SSO_INLINE void narrow(float x, float& to) { to = x; }
SSO_INLINE void narrow(double x, double& to) { to = x; }
SSO_INLINE void narrow(float x, Bfloat16& to) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  to.code = static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}
SSO_INLINE void narrow(float x, Float16& to) {
  const uint32_t u = bits<uint32_t>(x) & 0x7FFFFFFFu;
  const uint32_t normal = (u - 0x38000000u + 0xFFF + ((u >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(u) + 0.5f) - 0x3F000000u;  // the sum rounds in the right place
  const uint32_t special = u > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t value = u >= 0x47800000u ? special : u < 0x38800000u ? subnormal : normal;
  to.code = static_cast<uint16_t>(value | (bits<uint32_t>(x) >> 16 & 0x8000u));
}

// As stochastic_round_ of philox.py: 16 random bits are added below the 16 that are kept.
SSO_INLINE void narrow(float x, uint16_t noise, Bfloat16& to) {
  to.code = static_cast<uint16_t>((bits<uint32_t>(x) + noise) >> 16);
}

// ---- Philox-4x32-10: the constants of philox.py ---------------------------------------------------------------------

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier2 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;
constexpr uint32_t kRounding = 0, kBasis = 1;  // streams: the last word of a counter
constexpr int kNoisePerBlock = 8;  // half-words of one block; element i is rounded by half-word i of the stream

// Which elements of a whole tensor are here: Window of philox.py.
struct Window {
  int64_t origin = 0, columns = 1, pitch = 1;

  SSO_INLINE bool consecutive() const { return columns == pitch; }
  SSO_INLINE int64_t at(int64_t i) const { return origin + (consecutive() ? i : i / columns * pitch + i % columns); }
};

}  // namespace sso
