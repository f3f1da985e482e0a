// Moments kept as codes of 8 or 4 bits, in blocks that share a scale (subspace_optim/storage.py). A thread has eight
// elements of a block, its neighbours the others: what a block needs of all of them is its largest.
#pragma once

#include "kernels.cuh"

namespace sso {

constexpr int kScaled = 256;  // elements that share a scale; also the values of the longest table
constexpr int kCodedGroup = 48;  // tensors of one launch

// How the blocks of a tensor lie: along its rows, or along the columns of a matrix (length, rows).
struct Layout {
  int64_t rows, length;
  bool columns, packed;
  int width;  // threads of a block of elements: a power of two

  SSO_INLINE int height() const { return kThreads / width; }  // rows of a block of threads
  SSO_INLINE int64_t blocks() const { return (length + kScaled - 1) / kScaled; }
  SSO_INLINE int64_t tiles() const { return (rows + height() - 1) / height() * blocks(); }
  SSO_INLINE int64_t stride() const { return columns ? rows : 1; }
  // Of the k-th of `each` things that a row has.
  SSO_INLINE int64_t place(int64_t row, int64_t k, int64_t each) const {
    return columns ? k * rows + row : row * each + k;
  }
};

struct Values {
  const float* table;
  int count;
};

// The elements of this thread.
struct Own {
  int line;  // among the rows of this block of threads
  int64_t row, block, k;
  int count;

  SSO_DEVICE explicit Own(const Layout& l) {
    const int thread = threadIdx.x, height = l.height();
    line = l.columns ? thread % height : thread / l.width;
    row = blockIdx.x / l.blocks() * height + line;
    block = blockIdx.x % l.blocks();
    k = block * kScaled + (l.columns ? thread / height : thread % l.width) * kRun;
    const int64_t left = row < l.rows ? l.length - k : 0;
    count = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kRun), left)));
  }

  SSO_DEVICE int64_t place(const Layout& l) const { return l.place(row, k, l.length); }
  SSO_DEVICE int64_t number(const Layout& l) const { return row * l.length + k; }  // in the order of the blocks
};

// One of the moments in shared memory: its values, and the largest absolute value of every block.
struct Shared {
  float table[kScaled];
  uint32_t largest[kThreads];

  SSO_DEVICE void start(Values values) {
    const int thread = threadIdx.x;
    if (thread < values.count) table[thread] = values.table[thread];
    largest[thread] = 0;
  }

  SSO_DEVICE void see(const Own& own, const float (&x)[kRun]) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) most = i < own.count ? max(most, bits<uint32_t>(x[i]) & 0x7FFFFFFFu) : most;
    if (own.count > 0) atomicMax(largest + own.line, most);
  }

  // The first value whose successor is above u, but the last.
  SSO_DEVICE int interval(float u, int count) const {
    int low = 0;
#pragma unroll
    for (int bit = kScaled / 2; bit > 0; bit /= 2) {
      const int next = low + bit;
      if (next <= count - 2 && table[next] <= u) low = next;
    }
    return low;
  }
};

struct Kept {
  uint8_t* codes;
  float* scales;

  SSO_DEVICE uint8_t* bytes(const Layout& l, const Own& own) const {
    return codes + (l.packed ? l.place(own.row, own.k / 2, (l.length + 1) / 2) : l.place(own.row, own.k, l.length));
  }
  SSO_DEVICE float& scale(const Layout& l, const Own& own) const { return scales[l.place(own.row, own.block, l.blocks())]; }

  SSO_DEVICE void decode(const Layout& l, const Own& own, const Shared& shared, float (&x)[kRun]) const {
    if (own.count == 0) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = 0;
      return;
    }
    const uint8_t* from = bytes(l, own);
    const float unit = scale(l, own);
    const int each = l.packed ? 2 : 1;
    uint8_t found[kRun];
    load(from, l.stride(), (own.count + each - 1) / each, kRun / each, found);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int code = l.packed ? found[i / 2] >> i % 2 * 4 & 15 : found[i];
      x[i] = i < own.count ? shared.table[code] * unit : 0;
    }
  }

  // Rounded up or down with the odds of the stream (seed, step), or to nearest.
  SSO_DEVICE void encode(const Layout& l, const Own& own, const Shared& shared, int values, const float (&x)[kRun],
                         bool stochastic, uint64_t seed, uint32_t step, int64_t begin) const {
    if (own.count == 0) return;
    const float most = bits<float>(shared.largest[own.line]);
    const bool zero = most < 1.17549435e-38f;  // which has no inverse
    if (own.k % kScaled == 0) scale(l, own) = zero ? 0 : most;
    uint32_t random[8] = {};
    if (stochastic) noise(seed, step, begin + own.number(l), random);
    uint8_t found[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float u = zero ? 0 : x[i] / most;
      const int low = shared.interval(u, values);
      const float half = static_cast<float>(i % 2 ? random[i / 2] >> 16 : random[i / 2] & 0xFFFFu);
      const float odds = stochastic ? (half + 0.5f) * 0x1p-16f : 0.5f;
      const bool up = u - shared.table[low] > odds * (shared.table[low + 1] - shared.table[low]);
      found[i] = static_cast<uint8_t>(i < own.count ? low + up : 0);
    }
    if (l.packed) {
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) found[i] = static_cast<uint8_t>(found[2 * i] | found[2 * i + 1] << 4);
    }
    const int each = l.packed ? 2 : 1;
    keep(bytes(l, own), l.stride(), (own.count + each - 1) / each, kRun / each, found);
  }

 private:
  // The first `count` of `whole` bytes; together where they lie so.
  SSO_DEVICE static void load(const uint8_t* from, int64_t stride, int count, int whole, uint8_t (&to)[kRun]) {
    if (stride == 1 && count == whole && reinterpret_cast<uintptr_t>(from) % whole == 0) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
      const uint64_t all = whole == kRun ? *reinterpret_cast<const uint64_t*>(from) : words[0];
      memcpy(to, &all, kRun);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) to[i] = i < count ? from[i * stride] : 0;
  }

  SSO_DEVICE static void keep(uint8_t* to, int64_t stride, int count, int whole, const uint8_t (&from)[kRun]) {
    if (stride == 1 && count == whole && reinterpret_cast<uintptr_t>(to) % whole == 0) {
      uint64_t all;
      memcpy(&all, from, kRun);
      if (whole == kRun) {
        *reinterpret_cast<uint64_t*>(to) = all;
      } else {
        *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(all);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) to[i * stride] = from[i];
    }
  }
};

// ---- codes alone ----------------------------------------------------------------------------------------------------

struct KeptGroup {
  void* x[kGroup];
  Kept kept[kGroup];
  const float* step[kGroup];  // with the seed, of the rounding
  uint64_t seed[kGroup];
};

__global__ void __launch_bounds__(kThreads)
    encode(KeptGroup group, Type type, Layout l, Values values, bool stochastic, int64_t begin) {
  const int y = blockIdx.y;
  Shared& shared = *shared_memory<Shared>();
  shared.start(values);
  __syncthreads();
  const Own own(l);
  float run[kRun];
  with_type(type, [&](auto* null) {
    read(static_cast<const std::remove_pointer_t<decltype(null)>*>(group.x[y]) + own.place(l), own.count, run,
         l.stride());
  });
  shared.see(own, run);
  __syncthreads();
  const auto step = static_cast<uint32_t>(stochastic ? *group.step[y] : 0);
  group.kept[y].encode(l, own, shared, values.count, run, stochastic, group.seed[y], step, begin);
}

__global__ void __launch_bounds__(kThreads) decode(KeptGroup group, Type type, Layout l, Values values) {
  const int y = blockIdx.y;
  Shared& shared = *shared_memory<Shared>();
  shared.start(values);
  __syncthreads();
  const Own own(l);
  float run[kRun];
  group.kept[y].decode(l, own, shared, run);
  with_type(type, [&](auto* null) {
    write(static_cast<decltype(null)>(group.x[y]) + own.place(l), own.count, run, l.stride());
  });
}

// ---- Adam -----------------------------------------------------------------------------------------------------------

struct CodedGroup {
  void* out[kCodedGroup];  // W, or where N goes
  const void* in[kCodedGroup];
  Kept m[kCodedGroup], v[kCodedGroup];
  uint64_t seed[kCodedGroup], of_m[kCodedGroup], of_v[kCodedGroup];
};

struct CodedHow {
  Type in, out;
  bool count;       // what cautious keeps, and write nothing
  bool write;       // into W; otherwise N, in float32
  Rounding rounding;  // of W; codes are rounded stochastically
  int64_t counted, begin;  // where all begin in the whole
};

// Decoded, advanced, coded again and applied.
__global__ void __launch_bounds__(kThreads)
    coded(CodedGroup group, CodedHow how, Layout l, Values signs, Values squares, Moments moments, Scalars* all) {
  Scalars& scalars = all[blockIdx.y];
  if (scalars.skip) return;
  const int y = blockIdx.y;
  Shared *shared = shared_memory<Shared>(), &of_m = shared[0], &of_v = shared[1];
  of_m.start(signs);
  of_v.start(squares);
  __syncthreads();
  const Own own(l);
  float x[kRun], mean[kRun], square[kRun];
  with_type(how.in, [&](auto* null) {
    read(static_cast<const std::remove_pointer_t<decltype(null)>*>(group.in[y]) + own.place(l), own.count, x,
         l.stride());
  });
  group.m[y].decode(l, own, of_m, mean);
  group.v[y].decode(l, own, of_v, square);
  const int kept = adam_values<true>(moments.at(scalars), moments.transform, mean, square, own.count, x);
  if (how.count) return count_kept(scalars, kept);
  of_m.see(own, mean);
  of_v.see(own, square);
  __syncthreads();
  group.m[y].encode(l, own, of_m, signs.count, mean, true, group.of_m[y], scalars.step, how.begin);
  group.v[y].encode(l, own, of_v, squares.count, square, true, group.of_v[y], scalars.step, how.begin);
  if (how.write) {
    const Writing writing(scalars, how.counted, false, how.rounding, group.seed[y], group.out[y], {how.begin, 1, 1});
    with_type(how.out, [&](auto* null) {
      writing.move(static_cast<decltype(null)>(group.out[y]) + own.place(l), own.number(l), own.count, x, l.stride());
    });
  } else {
    const auto rescaled = static_cast<float>(cautious_scale(scalars, how.counted));
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] *= rescaled;
    write(static_cast<float*>(group.out[y]) + own.place(l), own.count, x, l.stride());
  }
}

}  // namespace sso
