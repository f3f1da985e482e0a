// The whole step of Flora: U = diag(row) G diag(column), whose first moment is kept under a projection.
//   D = (1-β₁)U + β₁ back(M);   W ← decay·W + factor·D;   M ← M + (1-β₁)(project(U) - M)
// U and D are nowhere as wholes. Neither they nor M have a bound that float16 keeps to: what is not bfloat16 is multiplied
// as float32.
#pragma once

#include "kernels.cuh"

namespace sso {

constexpr int kSumRows = 64, kSumColumns = 32 * kRun;  // a tile of square_sums (_SUMS in kernels/cuda.py)

template <class S>
using Operand = std::conditional_t<std::is_same_v<S, Bfloat16>, Bfloat16, float>;

// Of all threads of the block, in any order of theirs; `shared` has a number for each warp.
SSO_DEVICE double block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[warp];
  return sum;
}

// Of a tile of G (rows, columns), sums of squares: by rows (tile of columns, row), and by columns (tile of rows, column).
__global__ void __launch_bounds__(kThreads)
    square_sums(Group group, Type type, const Scalars* all, int rows, int columns, float* by_row, float* by_column) {
  const int64_t y = blockIdx.y;
  if (all && all[y].skip) return;
  float* shared = shared_memory<float>();  // (warp, column)
  const int across = ceil_div(columns, kSumColumns), i = blockIdx.x / across, j = blockIdx.x % across;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = j * kSumColumns + lane * kRun;
  const int count = max(0, min(kRun, columns - column));
  float sums[kRun] = {};
  with_type(type, [&](auto* null) {
    const auto* g = static_cast<const std::remove_pointer_t<decltype(null)>*>(group.in[y]);
    for (int row = i * kSumRows + warp; row < min(rows, (i + 1) * kSumRows); row += kThreads / 32) {
      float x[kRun], sum = 0;
      read(g + static_cast<int64_t>(row) * columns + column, count, x);
#pragma unroll
      for (int p = 0; p < kRun; ++p) sums[p] += x[p] * x[p], sum += x[p] * x[p];
      sum = warp_sum(sum);
      if (lane == 0) by_row[(y * across + j) * rows + row] = sum;
    }
  });
  store(shared + threadIdx.x * kRun, kRun, sums);
  __syncthreads();
  const int own = j * kSumColumns + threadIdx.x;
  if (own >= columns) return;
  float sum = 0;
  for (int other = 0; other < kThreads / 32; ++other) sum += shared[other * kSumColumns + threadIdx.x];
  by_column[(y * ceil_div(rows, kSumRows) + i) * columns + own] = sum;
}

SSO_DEVICE void average(float* kept, const float* sums, int tiles, int length, int elements, float fresh) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= length) return;
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) sum += sums[static_cast<int64_t>(tile) * length + at];
  kept[at] += fresh * (sum / static_cast<float>(elements) + 1e-30f - kept[at]);
}

// Averages of squares by rows, in the place of the first moments, and by columns, in that of the second ones, advance.
__global__ void __launch_bounds__(kThreads)
    averages(Group group, const Scalars* all, double decay, int rows, int columns, const float* by_row,
             const float* by_column) {
  const int64_t y = blockIdx.y;
  if (all[y].skip) return;
  const int across = ceil_div(columns, kSumColumns), down = ceil_div(rows, kSumRows);
  const auto fresh = static_cast<float>(pow(static_cast<double>(all[y].step), -decay));  // 1 - β₂
  average(group.m[y], by_row + y * across * rows, across, rows, columns, fresh);
  average(group.v[y], by_column + y * down * columns, down, columns, rows, fresh);
}

// What rows and columns of G are multiplied by to be U, (rows + columns) numbers a tensor.
__global__ void __launch_bounds__(kThreads)
    normalisers(Group group, const Scalars* all, int rows, int columns, float* numbers) {
  const int64_t y = blockIdx.y;
  if (all[y].skip) return;
  const float *by_row = group.m[y], *by_column = group.v[y];
  float sum = 0;
  for (int row = threadIdx.x; row < rows; row += kThreads) sum += by_row[row];
  const auto root = static_cast<float>(std::sqrt(block_sum(sum, shared_memory<float>()) / rows));
  const int at = blockIdx.x * kThreads + threadIdx.x;
  numbers += y * (rows + columns);
  if (at < rows) numbers[at] = root / std::sqrt(by_row[at]);
  if (at < columns) numbers[rows + at] = 1 / std::sqrt(by_column[at]);
}

struct Blend {
  float beta;
  Transform transform;
  Rounding rounding;
  const float* numbers;
  float* sums;  // of the squares of D by tiles; null: W is written
};

// D = β·M Qᵀ + (1-β)U, M being `in` and G in the place of the first moments.
template <class S, bool left>
__global__ void __launch_bounds__(kThreads, 2) blend(Group group, Blend how, Scalars* all, Shape s) {
  using T = Operand<S>;
  const int64_t y = blockIdx.y;
  if (all[y].skip) return;
  T* stages = shared_memory<T>();
  const int tiles = ceil_div(s.depth, kColumns);
  const int line = blockIdx.x / tiles * kLines, column = blockIdx.x % tiles * kColumns;
  const int slices = min(kSlices, ceil_div(s.depth - column, kSlice));
  const T *momentum = static_cast<const T*>(group.in[y]), *basis = static_cast<const T*>(group.basis[y]);
  Accumulators c;
  c.clear();
  accumulate<T, left, true>(c, s.rank, slices, stages, nullptr, 0, [=](T* stage, int k) {
    load_lines<T, left>(stage, momentum, line, k, s.lines, s.rank);
    load_turned_basis(stage, basis, column, k, s.depth, s.rank, slices);
  });
  const Writing writing(all[y], 0, false, how.rounding, group.seed[y], group.out[y]);
  const S* grad = reinterpret_cast<const S*>(group.m[y]);
  S* w = static_cast<S*>(group.out[y]);
  const float *by_row = how.numbers + y * (s.lines + s.depth), *by_column = by_row + (left ? s.depth : s.lines);
  float square = 0;
  int kept = 0;
#pragma unroll 1
  for (int q = 0; q < slices; ++q) {
    const int row = left ? column + q * kSlice : line, from = left ? line : column + q * kSlice;
    over_runs<left>(c, q, stages, line, column, s.lines, s.depth,
                    [&](float(&x)[kRun], int i, int j, int64_t first, int count) {
                      if (count == 0) return;
                      float fresh[kRun], by[kRun];
                      read(grad + first, count, fresh);
                      read(by_column + from + j, count, by);
#pragma unroll
                      for (int p = 0; p < kRun; ++p) {
                        fresh[p] *= by_row[row + i] * by[p];
                        x[p] = how.beta * x[p] + (1 - how.beta) * fresh[p];
                        if (how.transform == Transform::grams) x[p] = std::fabs(x[p]) * sign(fresh[p]);
                        if (how.transform == Transform::cautious) {
                          x[p] = sign(x[p]) == sign(fresh[p]) ? x[p] : 0;
                          kept += x[p] != 0;
                        }
                        square += x[p] * x[p];
                      }
                      if (!how.sums) writing.move(w + first, first, count, x);
                    });
  }
  if (!how.sums) return;
  const double sum = block_sum(square, reinterpret_cast<float*>(stages));
  if (threadIdx.x == 0) how.sums[y * gridDim.x + blockIdx.x] = static_cast<float>(sum);
  if (how.transform == Transform::cautious) count_kept(all[y], kept);
}

// The step is as long as to leave D, of `size` elements, a root mean square of at most the threshold.
__global__ void __launch_bounds__(kThreads)
    clip(Scalars* all, const float* sums, int tiles, int64_t size, bool cautious, double threshold) {
  const int64_t y = blockIdx.y;
  if (all[y].skip) return;
  float sum = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += kThreads) sum += sums[y * tiles + tile];
  const double longer = cautious_scale(all[y], cautious ? size : 0);
  const double length = longer * std::sqrt(block_sum(sum, shared_memory<float>()) / static_cast<double>(size));
  if (threadIdx.x == 0) all[y].factor *= longer / max(length / threshold, 1.0);
}

// project(U) in float32, or of G itself where there are no numbers. Where they are given, the second moments, to which it
// is averaged with this share, are what the output was.
template <class S, bool left>
__global__ void __launch_bounds__(kThreads, 2)
    project_normalised(Group group, const float* numbers, float share, const Scalars* all, Shape s) {
  using T = Operand<S>;
  const int64_t y = blockIdx.y;
  if (all[y].skip) return;
  const S* grad = static_cast<const S*>(group.in[y]);
  const float* by_row = numbers ? numbers + y * (s.lines + s.depth) : nullptr;
  const auto normalised = [=](auto& x, int row, int column, int64_t at, int valid) {
    std::remove_reference_t<decltype(x)> by;
    read(grad + at, valid, x);
    if (!by_row || valid == 0) return;
    read(by_row + (left ? s.depth : s.lines) + column, valid, by);
#pragma unroll
    for (int p = 0; p < static_cast<int>(sizeof(x) / sizeof(float)); ++p) x[p] *= by_row[row] * by[p];
  };
  float* const out = static_cast<float*>(group.out[y]);
  const float* const past = group.v[y];
  project_made<T, left>(static_cast<const T*>(group.basis[y]), s, normalised,
                        [=](float(&x)[kRun], int64_t first, int count) {
                          if (past) {
                            float was[kRun];
                            read(past + first, count, was);
#pragma unroll
                            for (int p = 0; p < kRun; ++p) x[p] = was[p] + share * (x[p] - was[p]);
                          }
                          write(out + first, count, x);
                        });
}

}  // namespace sso
