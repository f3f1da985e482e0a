// Matrix products of one block: 64 lines by 256 columns of accumulators in the registers of 256 threads, operands in
// two stages of shared memory, results by slices of 64 columns through shared memory, so that runs of eight elements
// meet memory.
//
// A projection on the left is one on the right of the transpose: "lines" are rows of G, or its columns where `left`.
// What differs is how tiles are read (the lines of A lie beside each other) and how slices leave (transposed).
#pragma once

#include "elements.cuh"

namespace sso {

constexpr int kThreads = 256, kLines = 64, kSlice = 64, kSlices = 4, kColumns = kSlice * kSlices;
constexpr int kStages = 2;

template <class T>
constexpr int kPad = sizeof(Bytes16) / sizeof(T);  // after every row of a tile: 8 rows lie in different banks
template <class T>
constexpr int kDepth = 64 / sizeof(T);  // of the operands of one stage
template <class T>
constexpr int kStageA = kLines * (kDepth<T> + kPad<T>);  // as lines; not less than as their transpose
template <class T>
constexpr int kStage = kStageA<T> + kColumns * (kDepth<T> + kPad<T>);  // elements
constexpr int kSlicePitch = kSlice + kPad<float>;

SSO_INLINE constexpr int ceil_div(int x, int multiple) { return (x + multiple - 1) / multiple; }

// Elements between rows of N in shared memory: (lines, rank), or (rank, lines) where left.
template <class T, bool left>
SSO_INLINE constexpr int kept_pitch(int rank) {
  return (left ? kLines : ceil_div(rank, kSlice) * kSlice) + kPad<T>;
}

// Where this thread's accumulators lie: those of target.cuh's mma, a warp having 32 lines and 16 columns of a slice.
struct Place {
  int line, column;  // of the warp
  int group, lane;   // g and t of target.cuh

  SSO_DEVICE Place()
      : line(threadIdx.x / 32 % 2 * 32),
        column(threadIdx.x / 64 * 16),
        group(threadIdx.x % 32 / 4),
        lane(threadIdx.x % 4) {}
};

struct Accumulators {
  float at[kSlices][2][2][4];  // slice, 16 lines, 8 columns, element

  SSO_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kSlices * 16; ++i) (&at[0][0][0][0])[i] = 0;
  }
};

// ---- operands -------------------------------------------------------------------------------------------------------

// A tile of a matrix (height, width) into shared memory, zero beyond its edges; only its first used_rows and
// used_columns are wanted. Asynchronous where the address allows it.
template <class T, int rows, int columns>
SSO_DEVICE void load_tile(T* to, const T* from, int row, int column, int height, int width, int used_rows = rows,
                          int used_columns = columns) {
  constexpr int each = sizeof(Bytes16) / sizeof(T), in_row = columns / each, pitch = columns + kPad<T>;
#pragma unroll 1
  for (int e = threadIdx.x; e < rows * in_row; e += kThreads) {
    const int i = e / in_row, j = e % in_row * each;
    if (i >= used_rows || j >= used_columns) continue;
    T* target = to + i * pitch + j;
    const int valid = row + i < height ? min(each, width - column - j) : 0;
    if (valid <= 0) {
      *reinterpret_cast<Bytes16*>(target) = Bytes16{};
      continue;
    }
    const T* source = from + static_cast<int64_t>(row + i) * width + column + j;
    if (valid == each && aligned(source)) {
      copy16(target, source);
    } else {
#pragma unroll 1
      for (int x = 0; x < each; ++x) target[x] = x < valid ? source[x] : T{};
    }
  }
}

// kDepth of the lines of a matrix (lines, depth), or (depth, lines) where left.
template <class T, bool left>
SSO_DEVICE void load_lines(T* to, const T* from, int line, int k, int lines, int depth) {
  if constexpr (left) {
    load_tile<T, kDepth<T>, kLines>(to, from, k, line, depth, lines);
  } else {
    load_tile<T, kLines, kDepth<T>>(to, from, line, k, lines, depth);
  }
}

// Likewise of what was in memory nowhere before: f(x, row, column, at, valid) makes the first `valid` of some neighbours,
// the element `at` of the matrix being the first. The others it sets to zero.
template <class T, bool left, class F>
SSO_DEVICE void load_made(T* to, int line, int k, int lines, int depth, const F& f) {
  constexpr int each = sizeof(Bytes16) / sizeof(T), rows = left ? kDepth<T> : kLines;
  constexpr int columns = left ? kLines : kDepth<T>, in_row = columns / each, pitch = columns + kPad<T>;
  const int row = left ? k : line, column = left ? line : k;
  const int height = left ? depth : lines, width = left ? lines : depth;
#pragma unroll 1
  for (int e = threadIdx.x; e < rows * in_row; e += kThreads) {
    const int i = e / in_row, j = e % in_row * each;
    const int valid = row + i < height ? max(0, min(each, width - column - j)) : 0;
    float x[each];
    f(x, row + i, column + j, static_cast<int64_t>(row + i) * width + column + j, valid);
    T made[each];
#pragma unroll
    for (int p = 0; p < each; ++p) narrow(x[p], made[p]);
    memcpy(to + i * pitch + j, made, sizeof(Bytes16));
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// C += A B over the depth of one stage. A is (line, k), or (k, line) where left; B is (k, column), or (column, k) where
// `turned`. a_pitch is A's; B's follows from its shape.
template <class T, bool left, bool turned>
SSO_DEVICE void multiply_halves(Accumulators& c, const T* a, int a_pitch, const T* b, int slices) {
  const Place place;
  const int row = threadIdx.x % 8, matrix = threadIdx.x % 32 / 8;
  constexpr int b_pitch = (turned ? kDepth<T> : kColumns) + kPad<T>;
#pragma unroll
  for (int k = 0; k < kDepth<T>; k += 16) {
    uint32_t lines[2][4], columns[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = place.line + 16 * i + matrix % 2 * 8, deep = k + matrix / 2 * 8;
      if constexpr (left) {
        load_matrices<true>(lines[i], a + (deep + row) * a_pitch + line);
      } else {
        load_matrices<false>(lines[i], a + (line + row) * a_pitch + deep);
      }
    }
#pragma unroll
    for (int q = 0; q < kSlices; ++q) {
      if (q >= slices) break;
      const int column = q * kSlice + place.column + matrix / 2 * 8, deep = k + matrix % 2 * 8;
      if constexpr (turned) {
        load_matrices<false>(columns, b + (column + row) * b_pitch + deep);
      } else {
        load_matrices<true>(columns, b + (deep + row) * b_pitch + column);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t half[2] = {columns[2 * j], columns[2 * j + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) mma<T>(c.at[q][i][j], lines[i], half);
      }
    }
  }
}

// SSO_TF32X3: float32 products on the matrix unit, as three of their leading and following 11 bits; accurate to 5e-7.
// Elsewhere, and on GPUs whose matrix unit is no faster at that (GeForce), fused multiply-adds.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
#define SSO_TF32X3
#endif

struct Split {
  uint32_t high, low;

  // Rounded to nearest, half of the last bit kept being 0x1000: the unit itself would cut off.
  SSO_DEVICE explicit Split(float x) : high((bits<uint32_t>(x) + 0x1000u) & 0xFFFFE000u) {
    low = bits<uint32_t>(x - bits<float>(high)) + 0x1000u;
  }
};

template <bool left, bool turned>
SSO_DEVICE void multiply_floats(Accumulators& c, const float* a, int a_pitch, const float* b, int slices) {
  const Place place;
  constexpr int b_pitch = (turned ? kDepth<float> : kColumns) + kPad<float>;
  const auto line = [=](int i, int k) { return left ? a[k * a_pitch + i] : a[i * a_pitch + k]; };
  const auto column = [=](int k, int j) { return turned ? b[j * b_pitch + k] : b[k * b_pitch + j]; };
#if defined(SSO_TF32X3)
#pragma unroll
  for (int k = 0; k < kDepth<float>; k += 8) {
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const Split split(line(place.line + 16 * i + 8 * (x % 2) + place.group, k + 4 * (x / 2) + place.lane));
        high[i][x] = split.high, low[i][x] = split.low;
      }
    }
#pragma unroll
    for (int q = 0; q < kSlices; ++q) {
      if (q >= slices) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = q * kSlice + place.column + 8 * j + place.group;
        const Split first(column(k + place.lane, at)), second(column(k + 4 + place.lane, at));
        const uint32_t column_high[2] = {first.high, second.high}, column_low[2] = {first.low, second.low};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<float>(c.at[q][i][j], low[i], column_high);
          mma<float>(c.at[q][i][j], high[i], column_low);
          mma<float>(c.at[q][i][j], high[i], column_high);
        }
      }
    }
  }
#else
#pragma unroll 2
  for (int k = 0; k < kDepth<float>; ++k) {
    float lines[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) lines[i / 2][i % 2] = line(place.line + 8 * i + place.group, k);
#pragma unroll
    for (int q = 0; q < kSlices; ++q) {
      if (q >= slices) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = column(k, q * kSlice + place.column + 8 * (j / 2) + 2 * place.lane + j % 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = c.at[q][i / 2][j / 2][2 * (i % 2) + j % 2];
          sum = fmaf(lines[i / 2][i % 2], x, sum);
        }
      }
    }
  }
#endif
}

// C += A B over all of its depth. load(stage, k) fetches the operands from k on; A is in `whole` (pitch whole_pitch), or
// where that is null in the stage. On return the stages are free.
template <class T, bool left, bool turned, class Load>
SSO_DEVICE void accumulate(Accumulators& c, int depth, int slices, T* stages, const T* whole, int whole_pitch,
                           const Load& load) {
  constexpr int own_pitch = (left ? kLines : kDepth<T>)+kPad<T>;
  const int steps = ceil_div(depth, kDepth<T>);
  load(stages, 0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copies_wait();
    __syncthreads();  // this stage is full, and the other one used up
    if (step + 1 < steps) load(stages + (step + 1) % kStages * kStage<T>, (step + 1) * kDepth<T>);
    const T* stage = stages + step % kStages * kStage<T>;
    const int pitch = whole ? whole_pitch : own_pitch;
    const T* a = whole ? whole + step * kDepth<T> * (left ? pitch : 1) : stage;
    if constexpr (std::is_same_v<T, float>) {
      multiply_floats<left, turned>(c, a, pitch, stage + kStageA<T>, slices);
    } else {
      multiply_halves<T, left, turned>(c, a, pitch, stage + kStageA<T>, slices);
    }
  }
  __syncthreads();
}

// Q is (depth, rank): as B of a projection, columns [column, ...) of rows [k, ...).
template <class T>
SSO_DEVICE void load_basis(T* stage, const T* q, int k, int column, int depth, int rank, int slices) {
  load_tile<T, kDepth<T>, kColumns>(stage + kStageA<T>, q, k, column, depth, rank, kDepth<T>, slices * kSlice);
}

// As B of a back-projection, turned: rows [column, ...), of them the entries [k, ...).
template <class T>
SSO_DEVICE void load_turned_basis(T* stage, const T* q, int column, int k, int depth, int rank, int slices) {
  load_tile<T, kColumns, kDepth<T>>(stage + kStageA<T>, q, column, k, depth, rank, slices * kSlice);
}

// ---- results --------------------------------------------------------------------------------------------------------

// Calls f(x, i, j, first, count) for the runs of eight of one slice of C: x begins at (i, j) of the slice and is the
// elements [first, first + count) of a matrix (lines, columns), or (columns, lines) where left. `stages` are used.
template <bool left, class F>
SSO_DEVICE void over_runs(const Accumulators& c, int q, void* stages, int line, int column, int lines, int columns,
                          const F& f) {
  const Place place;
  float* slice = static_cast<float*>(stages);
#pragma unroll
  for (int p = 0; p < kSlices; ++p) {
    if (p != q) continue;  // a loop, because registers have no address
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int i = place.line + e / 8 * 16 + e % 4 / 2 * 8 + place.group;
      const int j = place.column + e / 4 % 2 * 8 + 2 * place.lane + e % 2;
      slice[left ? j * kSlicePitch + i : i * kSlicePitch + j] = c.at[p][e / 8][e / 4 % 2][e % 4];
    }
  }
  __syncthreads();
  const int row = left ? column + q * kSlice : line, first = left ? line : column + q * kSlice;
  const int height = left ? columns : lines, width = left ? lines : columns;
#pragma unroll 1
  for (int e = threadIdx.x; e < kSlice * kSlice / kRun; e += kThreads) {
    const int i = e / (kSlice / kRun), j = e % (kSlice / kRun) * kRun;
    float x[kRun];
    read(slice + i * kSlicePitch + j, kRun, x);
    const int count = row + i < height ? max(0, min(kRun, width - first - j)) : 0;
    f(x, i, j, static_cast<int64_t>(row + i) * width + first + j, count);
  }
  __syncthreads();
}

}  // namespace sso
