// Eight elements of a row at a time: a block of Philox, 16 bytes in half precision. Their arithmetic is core.h's.
#pragma once

#include "target.cuh"

namespace sso {

constexpr int kRun = 8;

enum class Type : int { float32, bfloat16, float16 };  // the order of TYPES in kernels/cuda.py

// ---- memory ---------------------------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

SSO_DEVICE bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Bytes16) == 0; }

// The first `count` of eight, the others zero. What alignment, count and stride allow moves in 16 bytes.
template <class S, int run = kRun>
SSO_DEVICE void read(const S* from, int count, float (&x)[run], int64_t stride = 1) {
  constexpr int each = sizeof(Bytes16) / sizeof(S);
  if (run % each == 0 && count == run && stride == 1 && aligned(from)) {
#pragma unroll
    for (int i = 0; i + each <= run; i += each) {
      const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(from + i);
      S wide[each];
      memcpy(wide, &bytes, sizeof(bytes));
#pragma unroll
      for (int j = 0; j < each; ++j) x[i + j] = widen(wide[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < run; ++i) x[i] = i < count ? widen(from[i * stride]) : 0;
  }
}

template <class S>
SSO_DEVICE void store(S* to, int count, const S (&x)[kRun], int64_t stride = 1) {
  constexpr int each = sizeof(Bytes16) / sizeof(S);
  if (count == kRun && stride == 1 && aligned(to)) {
#pragma unroll
    for (int i = 0; i < kRun; i += each) {
      Bytes16 bytes;
      memcpy(&bytes, x + i, sizeof(bytes));
      *reinterpret_cast<Bytes16*>(to + i) = bytes;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) to[i * stride] = x[i];
    }
  }
}

template <class S>
SSO_DEVICE void write(S* to, int count, const float (&x)[kRun], int64_t stride = 1) {
  S narrowed[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) narrow(x[i], narrowed[i]);
  store(to, count, narrowed, stride);
}

// Calls f with a null pointer of the type.
template <class F>
SSO_DEVICE void with_type(Type type, const F& f) {
  if (type == Type::float32) f(static_cast<float*>(nullptr));
  if (type == Type::bfloat16) f(static_cast<Bfloat16*>(nullptr));
  if (type == Type::float16) f(static_cast<Float16*>(nullptr));
}

// ---- rounding noise -------------------------------------------------------------------------------------------------

// The words of the counter (block, step, 0, stream).
SSO_DEVICE void philox(uint64_t seed, uint32_t block, uint32_t step, uint32_t stream, uint32_t* words) {
  uint32_t x0 = block, x1 = step, x2 = 0, x3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const uint64_t p0 = static_cast<uint64_t>(x0) * kMultiplier0, p2 = static_cast<uint64_t>(x2) * kMultiplier2;
    x0 = static_cast<uint32_t>(p2 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p2);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// The half-words of the elements [first, first + 8), two a word; where they straddle two blocks, shifted into place.
SSO_DEVICE void noise(uint64_t seed, uint32_t step, int64_t first, uint32_t (&words)[8]) {
  const uint32_t block = static_cast<uint32_t>(first / kNoisePerBlock), shift = first % kNoisePerBlock;
  philox(seed, block, step, kRounding, words);
  if (shift == 0) return;
  philox(seed, block + 1, step, kRounding, words + 4);
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = shift & 4 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = shift & 2 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = shift & 1 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
}

// ---- the step -------------------------------------------------------------------------------------------------------

// What depends on one tensor and its step count: written on the device by `prepare`, read by all that follows.
struct Scalars {
  float slope, floor;       // of Adam
  float decay;              // W ← decay·W + factor·U
  uint32_t step;            // of the rounding noise
  bool skip;                // the gradient is not finite: nothing of the tensor is written
  double factor;
  unsigned long long kept;  // elements that cautious has kept
};

struct Moments {
  float beta1, rest1, beta2, rest2;
  Transform transform;

  SSO_DEVICE Adam<float> at(const Scalars& s) const { return {beta1, rest1, beta2, rest2, s.slope, s.floor}; }
};

// N turned by R, but for the scale of cautious, which adds those to `kept` that it keeps and that `counts`.
SSO_DEVICE float turned(Transform transform, float n, float r, bool counts, int& kept) {
  if (transform == Transform::grams) return std::fabs(n) * sign(r);
  if (transform != Transform::cautious) return n;
  const bool keep = n * r > 0;
  kept += keep && counts;
  return keep ? n : 0;
}

// R → N; the moments advance unless they have been already. Returns how many of the first `count` cautious kept.
template <bool advance>
SSO_DEVICE int adam_values(const Adam<float>& h, Transform transform, float (&mean)[kRun], float (&square)[kRun],
                           int count, float (&x)[kRun]) {
  int kept = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const float r = x[i];
    x[i] = turned(transform, adam<float, advance>(h, r, mean[i], square[i]), r, i < count, kept);
  }
  return kept;
}

// Likewise, of moments in memory.
template <bool advance>
SSO_DEVICE int adam_run(const Adam<float>& h, Transform transform, float* m, float* v, int count, float (&x)[kRun]) {
  float mean[kRun], square[kRun];
  read(m, count, mean);
  read(v, count, square);
  const int kept = adam_values<advance>(h, transform, mean, square, count, x);
  if constexpr (advance) {
    store(m, count, mean);
    store(v, count, square);
  }
  return kept;
}

// Of `lanes` neighbours in the warp, all of which come here.
template <int lanes = 32, class T>
SSO_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, other);
  return x;
}

SSO_DEVICE void count_kept(Scalars& s, int kept) {
  kept = warp_sum(kept);
  if (threadIdx.x % 32 == 0 && kept > 0) atomicAdd(&s.kept, static_cast<unsigned long long>(kept));
}

// What cautious multiplies its update by: 1 / the share of `count` elements kept. A count of 0: not cautious.
SSO_DEVICE double cautious_scale(const Scalars& s, int64_t count) {
  if (count == 0) return 1;
  const double share = static_cast<double>(s.kept) / static_cast<double>(count);
  return 1 / (share > 1e-3 ? share : 1e-3);
}

// Compensated: to nearest, and what that takes is kept, and given back at the next step (Kahan).
enum class Rounding : int { nearest, stochastic, compensated };

// How a parameter is written: W ← decay·W + factor·U. What is kept of its rounding lies at the address that is the seed.
struct Writing {
  float decay, factor;
  bool sign;
  Rounding rounding;
  uint64_t seed;
  uintptr_t base;
  uint32_t step;
  Window window;

  SSO_DEVICE Writing(const Scalars& s, int64_t counted, bool sign, Rounding rounding, uint64_t seed, const void* out,
                     Window window = {})
      : decay(s.decay),
        factor(static_cast<float>(s.factor * cautious_scale(s, counted))),
        sign(sign),
        rounding(rounding),
        seed(seed),
        base(reinterpret_cast<uintptr_t>(out)),
        step(s.step),
        window(window) {}

  template <class S>
  SSO_DEVICE S* rest(S* w) const {
    return reinterpret_cast<S*>(seed + (reinterpret_cast<uintptr_t>(w) - base));
  }

  // Of what `move` would write, the sum of squares.
  template <class S>
  SSO_DEVICE float squares(const S* w, int count, const float (&u)[kRun]) const {
    float x[kRun], sum = 0;
    read(w, count, x);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float moved = decay * x[i] + factor * u[i];
      sum += i < count ? moved * moved : 0;
    }
    return sum;
  }

  // The elements at w, all multiplied in the end; the noise is that of [first, first + count), which lie in
  // one row of the window.
  template <class S>
  SSO_DEVICE void move(S* w, int64_t first, int count, const float (&u)[kRun], int64_t stride = 1,
                       float times = 1) const {
    float x[kRun];
    read(w, count, x, stride);
    if constexpr (!std::is_same_v<S, float>) {
      if (rounding == Rounding::compensated) {
        float taken[kRun];
        read(rest(w), count, taken, stride);
#pragma unroll
        for (int i = 0; i < kRun; ++i) x[i] += taken[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = (decay * x[i] + factor * (sign ? sso::sign(u[i]) : u[i])) * times;
    if constexpr (!std::is_same_v<S, float>) {
      if (rounding == Rounding::compensated) {
        S rounded[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          narrow(x[i], rounded[i]);
          x[i] -= widen(rounded[i]);
        }
        store(w, count, rounded, stride);
        return write(rest(w), count, x, stride);
      }
    }
    if constexpr (std::is_same_v<S, Bfloat16>) {
      if (rounding == Rounding::stochastic) {
        uint32_t random[8];
        noise(seed, step, window.at(first), random);
        S rounded[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          narrow(x[i], static_cast<uint16_t>(i % 2 ? random[i / 2] >> 16 : random[i / 2]), rounded[i]);
        }
        return store(w, count, rounded, stride);
      }
    }
    write(w, count, x, stride);
  }
};

}  // namespace sso
