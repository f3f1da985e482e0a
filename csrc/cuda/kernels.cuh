// The kernels. blockIdx.y says which tensor of a group, all of one shape.
#pragma once

#include "product.cuh"

namespace sso {

constexpr int kGroup = 64;  // tensors of one launch: their addresses are its arguments, which may take 4 KB

struct Group {
  void* out[kGroup];         // W, or where an update goes
  const void* in[kGroup];    // G, R or N
  float *m[kGroup], *v[kGroup];
  const void* basis[kGroup];
  uint64_t seed[kGroup];
};

// ---- of one number a tensor -----------------------------------------------------------------------------------------

struct Steps {
  float* step[kGroup];
  double rate[kGroup];  // where the learning rate is not on the device
};

struct Schedule {
  bool advance;
  double beta1, beta2, eps;
  bool eps_inside;
  double weight_decay, scale;
  const void* lr;  // on the device, or null
  bool lr_double;
  int lr_stride;       // 0: one for all
  const bool* finite;  // on the device, or null: all are
};

constexpr double kEpsFloor = 1e-19;  // as in reference.py

__global__ void prepare(Steps steps, Schedule s, Scalars* scalars, int count) {
  const int i = threadIdx.x;
  if (i >= count) return;
  const bool skip = s.finite && !s.finite[i];
  const float step = *steps.step[i] + (s.advance && !skip);
  if (s.advance) *steps.step[i] = step;
  const double correction1 = 1 - pow(s.beta1, static_cast<double>(step));
  const double correction2 = std::sqrt(1 - pow(s.beta2, static_cast<double>(step)));
  const double eps = s.eps > kEpsFloor ? s.eps : kEpsFloor;
  double rate = steps.rate[i];
  if (s.lr) {
    rate = s.lr_double ? static_cast<const double*>(s.lr)[i * s.lr_stride]
                       : static_cast<const float*>(s.lr)[i * s.lr_stride];
  }
  scalars[i] = {static_cast<float>(correction1 / correction2),
                static_cast<float>(eps * correction1 / (s.eps_inside ? correction2 : 1)),
                static_cast<float>(1 - rate * s.weight_decay), static_cast<uint32_t>(step), skip, -rate * s.scale, 0};
}

struct Seeds {
  uint64_t seed[kGroup];
};

// The words of every seed by blocks of four, of which bases are drawn.
__global__ void __launch_bounds__(kThreads) draw(Seeds seeds, int64_t* out, int64_t blocks) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= blocks) return;
  uint32_t words[4];
  philox(seeds.seed[blockIdx.y], static_cast<uint32_t>(block), 0, kBasis, words);
  int64_t* to = out + (blockIdx.y * blocks + block) * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = words[i];
}

struct Sources {
  const void* data[kGroup];
  int64_t size[kGroup];
};

// The largest absolute value to `out`, which is zero before; NaN if there is one. Without the sign bit the order of
// floating-point numbers is that of their bits, infinity below every NaN.
__global__ void __launch_bounds__(kThreads) absmax(Sources sources, Type type, double* out) {
  const int64_t size = sources.size[blockIdx.y];
  uint32_t largest = 0;
  with_type(type, [&](auto* null) {
    const auto* x = static_cast<const std::remove_pointer_t<decltype(null)>*>(sources.data[blockIdx.y]);
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun; i < size;
         i += static_cast<int64_t>(gridDim.x) * kThreads * kRun) {
      float run[kRun];
      read(x + i, static_cast<int>(min(static_cast<int64_t>(kRun), size - i)), run);
#pragma unroll
      for (int j = 0; j < kRun; ++j) largest = max(largest, bits<uint32_t>(run[j]) & 0x7FFFFFFFu);
    }
  });
#pragma unroll
  for (int other = 16; other > 0; other /= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, other));
  if (threadIdx.x % 32 == 0 && largest > 0) {
    const auto code = bits<unsigned long long>(static_cast<double>(bits<float>(largest)));
    atomicMax(reinterpret_cast<unsigned long long*>(out + blockIdx.y), code & 0x7FFFFFFFFFFFFFFFu);
  }
}

// ---- element by element ---------------------------------------------------------------------------------------------

struct Dense {
  Type in, out;
  bool adam, advance;  // in is R, not N; and the moments have yet to advance
  bool store, write;   // N to out; or into W, which is out
  bool sign;
  Rounding rounding;
  int64_t counted;  // elements that the share of cautious is of, once it is known
  Window window;
  int64_t width;  // of a row, and how far apart the factors of rows, and of columns, are: in the place of a basis
  int row_step, column_step;
};

__global__ void __launch_bounds__(kThreads) dense(Group group, Dense how, Moments moments, Scalars* all, int64_t size) {
  Scalars& scalars = all[blockIdx.y];
  if (scalars.skip) return;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun;
  const int count = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kRun), size - first)));
  int kept = 0;
  if (count > 0) {
    float x[kRun];
    with_type(how.in, [&](auto* null) {
      read(static_cast<const std::remove_pointer_t<decltype(null)>*>(group.in[blockIdx.y]) + first, count, x);
    });
    if (how.adam) {
      float *m = group.m[blockIdx.y] + first, *v = group.v[blockIdx.y] + first;
      const Adam<float> h = moments.at(scalars);
      if (how.advance) {
        kept = adam_run<true>(h, moments.transform, m, v, count, x);
      } else {
        adam_run<false>(h, moments.transform, m, v, count, x);
      }
    }
    if (how.store) write(static_cast<float*>(group.out[blockIdx.y]) + first, count, x);
    if (const auto* factors = static_cast<const float*>(group.basis[blockIdx.y])) {
      for (int i = 0; i < count; ++i) {
        x[i] *= factors[(first + i) / how.width * how.row_step + (first + i) % how.width * how.column_step];
      }
    }
    if (how.write) {
      const Writing writing(scalars, how.counted, how.sign, how.rounding, group.seed[blockIdx.y],
                            group.out[blockIdx.y], how.window);
      with_type(how.out, [&](auto* null) {
        writing.move(static_cast<decltype(null)>(group.out[blockIdx.y]) + first, first, count, x);
      });
    }
  }
  if (how.advance && moments.transform == Transform::cautious) count_kept(scalars, kept);
}

__global__ void __launch_bounds__(kThreads) linear_update(Group group, Type in, Linear<float> how, Transform transform,
                                                          Scalars* all, int64_t size) {
  Scalars& scalars = all[blockIdx.y];
  if (scalars.skip) return;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun;
  const int count = static_cast<int>(max(static_cast<int64_t>(0), min(static_cast<int64_t>(kRun), size - first)));
  int kept = 0;
  if (count > 0) {
    float low[kRun], mean[kRun], x[kRun], *m = group.m[blockIdx.y] + first;
    with_type(in, [&](auto* null) {
      read(static_cast<const std::remove_pointer_t<decltype(null)>*>(group.in[blockIdx.y]) + first, count, low);
    });
    read(m, count, mean);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      x[i] = turned(transform, linear(how, low[i], mean[i]), low[i], i < count, kept);
    }
    store(static_cast<float*>(group.out[blockIdx.y]) + first, count, x);
    store(m, count, mean);
  }
  if (transform == Transform::cautious) count_kept(scalars, kept);
}

// N ← N / the share that cautious kept.
__global__ void __launch_bounds__(kThreads) rescale(Group group, const Scalars* scalars, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  static_cast<float*>(group.out[blockIdx.y])[i] *= static_cast<float>(cautious_scale(scalars[blockIdx.y], size));
}

// ---- matrices: registers of 256 threads allow two blocks on a multiprocessor ----------------------------------------

struct Shape {
  int lines, depth, rank;
};

template <class T, bool left>
SSO_DEVICE void project_lines(Accumulators& c, const T* grad, const T* basis, Shape s, int line, int column, int slices,
                              T* stages) {
  accumulate<T, left, false>(c, s.depth, slices, stages, nullptr, 0, [=](T* stage, int k) {
    load_lines<T, left>(stage, grad, line, k, s.lines, s.depth);
    load_basis(stage, basis, k, column, s.depth, s.rank, slices);
  });
}

// Of the rows of W, where they are brought to lengths: the sums of squares that they would have, (slices of 64 columns,
// rows), or what they are multiplied by. Both null: nothing of that.
struct Rows {
  float* squares;
  const float* factors;
};

template <class T, bool left>
SSO_DEVICE void write_columns(const Accumulators& c, int slices, T* stages, T* w, int line, int column, Shape s,
                              const Writing& writing, Rows rows = {}) {
#pragma unroll 1
  for (int q = 0; q < slices; ++q) {
    const int row = left ? column + q * kSlice : line, slice = (left ? line : column + q * kSlice) / kSlice;
    over_runs<left>(c, q, stages, line, column, s.lines, s.depth,
                    [&](const float(&x)[kRun], int i, int j, int64_t first, int count) {
                      if (rows.squares) {
                        const float sum = warp_sum<kSlice / kRun>(writing.squares(w + first, count, x));
                        if (j == 0 && count > 0) rows.squares[slice * (left ? s.depth : s.lines) + row + i] = sum;
                      } else if (count > 0) {
                        writing.move(w + first, first, count, x, 1, rows.factors ? rows.factors[row + i] : 1);
                      }
                    });
  }
}

// R = G Q, or where `adam` N, to out: in float32 where `wide`, otherwise as G.
template <class T, bool left>
__global__ void __launch_bounds__(kThreads, 2)
    project(Group group, Moments moments, bool adam, bool wide, Scalars* all, Shape s) {
  if (adam && all[blockIdx.y].skip) return;
  T* stages = shared_memory<T>();
  const int tiles = ceil_div(s.rank, kColumns), y = blockIdx.y;
  const int line = blockIdx.x / tiles * kLines, column = blockIdx.x % tiles * kColumns;
  const int slices = min(kSlices, ceil_div(s.rank - column, kSlice));
  Accumulators c;
  c.clear();
  project_lines<T, left>(c, static_cast<const T*>(group.in[y]), static_cast<const T*>(group.basis[y]), s, line, column,
                         slices, stages);
  int kept = 0;
#pragma unroll 1
  for (int q = 0; q < slices; ++q) {
    over_runs<left>(c, q, stages, line, column, s.lines, s.rank,
                    [&](float(&x)[kRun], int, int, int64_t first, int count) {
                      if (count == 0) return;
                      if (adam) {
                        kept += adam_run<true>(moments.at(all[y]), moments.transform, group.m[y] + first,
                                               group.v[y] + first, count, x);
                      }
                      if (wide) {
                        write(static_cast<float*>(group.out[y]) + first, count, x);
                      } else {
                        write(static_cast<T*>(group.out[y]) + first, count, x);
                      }
                    });
  }
  if (adam && moments.transform == Transform::cautious) count_kept(all[y], kept);
}

// W ← decay·W + factor·N Qᵀ, N being `in`.
template <class T, bool left>
__global__ void __launch_bounds__(kThreads, 2)
    apply(Group group, bool sign, Rounding rounding, Window window, int64_t counted, Rows rows, const Scalars* all,
          Shape s) {
  if (all[blockIdx.y].skip) return;
  T* stages = shared_memory<T>();
  const int tiles = ceil_div(s.depth, kColumns), y = blockIdx.y;
  const int line = blockIdx.x / tiles * kLines, column = blockIdx.x % tiles * kColumns;
  const int slices = min(kSlices, ceil_div(s.depth - column, kSlice));
  const T *update = static_cast<const T*>(group.in[y]), *basis = static_cast<const T*>(group.basis[y]);
  Accumulators c;
  c.clear();
  accumulate<T, left, true>(c, s.rank, slices, stages, nullptr, 0, [=](T* stage, int k) {
    load_lines<T, left>(stage, update, line, k, s.lines, s.rank);
    load_turned_basis(stage, basis, column, k, s.depth, s.rank, slices);
  });
  const Writing writing(all[y], counted, sign, rounding, group.seed[y], group.out[y], window);
  const int height = left ? s.depth : s.lines, width = left ? s.lines : s.depth;
  if (rows.squares) rows.squares += static_cast<int64_t>(y) * ceil_div(width, kSlice) * height;
  if (rows.factors) rows.factors += static_cast<int64_t>(y) * height;
  write_columns<T, left>(c, slices, stages, static_cast<T*>(group.out[y]), line, column, s, writing, rows);
}

// The whole step of 64 lines: G is read once, W is read and written once, R and N never leave the multiprocessor.
// Beyond its edges N is zero, as the tiles of G and Q are that it comes from.
template <class T, bool left>
__global__ void __launch_bounds__(kThreads, 2)
    fused(Group group, Moments moments, Rounding rounding, Window window, const Scalars* all, Shape s) {
  if (all[blockIdx.y].skip) return;
  T *stages = shared_memory<T>(), *updates = stages + kStages * kStage<T>;
  const int line = blockIdx.x * kLines, y = blockIdx.y, slices = ceil_div(s.rank, kSlice);
  const int pitch = kept_pitch<T, left>(s.rank);
  const T* basis = static_cast<const T*>(group.basis[y]);
  Accumulators c;
  c.clear();
  project_lines<T, left>(c, static_cast<const T*>(group.in[y]), basis, s, line, 0, slices, stages);
#pragma unroll 1
  for (int q = 0; q < slices; ++q) {
    over_runs<left>(c, q, stages, line, 0, s.lines, s.rank,
                    [&](float(&x)[kRun], int i, int j, int64_t first, int count) {
                      if (count > 0) {
                        adam_run<true>(moments.at(all[y]), moments.transform, group.m[y] + first, group.v[y] + first,
                                       count, x);
                      }
                      write(updates + (left ? (q * kSlice + i) * pitch + j : i * pitch + q * kSlice + j), kRun, x);
                    });
  }
  const Writing writing(all[y], 0, false, rounding, group.seed[y], group.out[y], window);
#pragma unroll 1
  for (int column = 0; column < s.depth; column += kColumns) {
    const int own = min(kSlices, ceil_div(s.depth - column, kSlice));
    c.clear();
    accumulate<T, left, true>(c, s.rank, own, stages, updates, pitch, [=](T* stage, int k) {
      load_turned_basis(stage, basis, column, k, s.depth, s.rank, own);
    });
    write_columns<T, left>(c, own, stages, static_cast<T*>(group.out[y]), line, column, s, writing);
  }
}

// ---- directions and lengths of rows (GradNormLoRP) ------------------------------------------------------------------

// Of every row of W (rows, columns), `out`: what of it is in G, of the same type, to `along`, and the length that Adam's step takes it to,
// to `aims`; -1 for a row of zeros, which has no direction. A row a warp.
__global__ void __launch_bounds__(kThreads)
    lengths(Group group, Type type, Moments moments, const Scalars* all, int rows, int columns,
            float* along, float* aims) {
  const int y = blockIdx.y, lane = threadIdx.x % 32, row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (all[y].skip || row >= rows) return;
  float square = 0, product = 0;
  with_type(type, [&](auto* null) {
    const int64_t first = static_cast<int64_t>(row) * columns;
    const auto* w = static_cast<decltype(null)>(group.out[y]) + first;
    const auto* g = static_cast<const std::remove_pointer_t<decltype(null)>*>(group.in[y]) + first;
    for (int j = lane * kRun; j < columns; j += 32 * kRun) {
      float a[kRun], b[kRun];
      read(w + j, min(kRun, columns - j), a);
      read(g + j, min(kRun, columns - j), b);
#pragma unroll
      for (int i = 0; i < kRun; ++i) square += a[i] * a[i], product += a[i] * b[i];
    }
  });
  const float norm = std::sqrt(warp_sum(square)), divisor = norm > 0 ? norm : 1;
  const float radial = warp_sum(product) / divisor;
  if (lane != 0) return;
  const int64_t at = static_cast<int64_t>(y) * rows + row;
  const float growth = adam<float, true>(moments.at(all[y]), radial, group.m[y][row], group.v[y][row]);
  along[at] = radial / divisor;
  aims[at] = norm > 0 ? max(norm * all[y].decay + static_cast<float>(all[y].factor) * growth, 0.0f) : -1;
}

// C = A Q for the tile of this block, A being what `make` makes (see load_made); `take` gets its runs.
template <class T, bool left, class Make, class Take>
SSO_DEVICE void project_made(const T* basis, Shape s, const Make& make, const Take& take) {
  T* stages = shared_memory<T>();
  const int tiles = ceil_div(s.rank, kColumns);
  const int line = blockIdx.x / tiles * kLines, column = blockIdx.x % tiles * kColumns;
  const int slices = min(kSlices, ceil_div(s.rank - column, kSlice));
  Accumulators c;
  c.clear();
  accumulate<T, left, false>(c, s.depth, slices, stages, nullptr, 0, [=](T* stage, int k) {
    load_made<T, left>(stage, line, k, s.lines, s.depth, make);
    load_basis(stage, basis, k, column, s.depth, s.rank, slices);
  });
#pragma unroll 1
  for (int q = 0; q < slices; ++q) {
    over_runs<left>(c, q, stages, line, column, s.lines, s.rank,
                    [&](float(&x)[kRun], int, int, int64_t first, int count) {
                      if (count > 0) take(x, first, count);
                    });
  }
}

// R = (G - diag(along) W) Q in float32, W being in the place of the first moments.
template <class T, bool left>
__global__ void __launch_bounds__(kThreads, 2)
    project_tangents(Group group, const float* along, const Scalars* all, Shape s) {
  const int y = blockIdx.y;
  if (all[y].skip) return;
  const T *grad = static_cast<const T*>(group.in[y]), *w = reinterpret_cast<const T*>(group.m[y]);
  along += static_cast<int64_t>(y) * (left ? s.depth : s.lines);
  const auto tangent = [=](auto& x, int row, int, int64_t at, int valid) {
    std::remove_reference_t<decltype(x)> of_w;
    read(grad + at, valid, x);
    read(w + at, valid, of_w);
    const float share = valid > 0 ? along[row] : 0;
#pragma unroll
    for (int p = 0; p < static_cast<int>(sizeof(x) / sizeof(float)); ++p) x[p] -= share * of_w[p];
  };
  float* const out = static_cast<float*>(group.out[y]);
  project_made<T, left>(static_cast<const T*>(group.basis[y]), s, tangent,
                        [=](const float(&x)[kRun], int64_t first, int count) { write(out + first, count, x); });
}

// What takes every row to the length it aims at, in the place of that; `squares` (slices, rows) of what it would have.
__global__ void __launch_bounds__(kThreads) factors(const float* squares, float* aims, int slices, int rows) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= rows) return;
  squares += static_cast<int64_t>(blockIdx.y) * slices * rows + row;
  float sum = 0;
  for (int slice = 0; slice < slices; ++slice) sum += squares[static_cast<int64_t>(slice) * rows];
  float& aim = aims[static_cast<int64_t>(blockIdx.y) * rows + row];
  const float length = std::sqrt(sum);
  aim = aim >= 0 && length > 0 ? aim / length : 1;
}

// Bytes of shared memory: of the stages, and where fused of N as well.
template <class T>
int shared_bytes() {
  return kStages * kStage<T> * static_cast<int>(sizeof(T));
}
template <class T, bool left>
int fused_bytes(int rank) {
  const int rows = left ? ceil_div(rank, kSlice) * kSlice : kLines;
  return shared_bytes<T>() + rows * kept_pitch<T, left>(rank) * static_cast<int>(sizeof(T));
}

}  // namespace sso
