// The plain C functions of subspace_optim._cuda, which subspace_optim/kernels/cuda.py calls: no torch, no allocation,
// nothing waited for. Each returns CUDA's error code.
//
// A table is six rows of `count` numbers: the addresses of outputs, inputs, first moments, second moments and bases,
// and seeds. The tensors of a row have one shape and lie on the device; the table itself is read before the return.
#include <algorithm>

#include "codes.cuh"
#include "momentum.cuh"

#define SSO_API extern "C" __attribute__((visibility("default"))) int

namespace sso {
namespace {

// Calls f(number of the members of a group, place of the first) until an error.
template <class F>
int over_groups(int64_t count, const F& f, int64_t most = kGroup) {
  for (int64_t first = 0; first < count; first += most) {
    const int error = f(static_cast<int>(std::min<int64_t>(most, count - first)), first);
    if (error != 0) return error;
  }
  return 0;
}

Group group_of(const uint64_t* table, int64_t count, int members, int64_t first) {
  Group group{};
  const uint64_t* row = table + first;
  for (int i = 0; i < members; ++i) {
    group.out[i] = reinterpret_cast<void*>(row[i]);
    group.in[i] = reinterpret_cast<const void*>(row[count + i]);
    group.m[i] = reinterpret_cast<float*>(row[2 * count + i]);
    group.v[i] = reinterpret_cast<float*>(row[3 * count + i]);
    group.basis[i] = reinterpret_cast<const void*>(row[4 * count + i]);
    group.seed[i] = row[5 * count + i];
  }
  return group;
}

CodedGroup coded_group_of(const uint64_t* table, int64_t count, int members, int64_t first) {
  CodedGroup group{};
  const uint64_t* row = table + first;
  const auto kept = [&](int column) {
    return Kept{reinterpret_cast<uint8_t*>(row[column * count]), reinterpret_cast<float*>(row[(column + 2) * count])};
  };
  for (int i = 0; i < members; ++i, ++row) {
    group.out[i] = reinterpret_cast<void*>(row[0]);
    group.in[i] = reinterpret_cast<const void*>(row[count]);
    group.m[i] = kept(2);
    group.v[i] = kept(3);
    group.seed[i] = row[6 * count];
    group.of_m[i] = row[7 * count];
    group.of_v[i] = row[8 * count];
  }
  return group;
}

KeptGroup kept_group_of(const uint64_t* table, int64_t count, int members, int64_t first) {
  KeptGroup group{};
  const uint64_t* row = table + first;
  for (int i = 0; i < members; ++i, ++row) {
    group.x[i] = reinterpret_cast<void*>(row[0]);
    group.kept[i] = {reinterpret_cast<uint8_t*>(row[count]), reinterpret_cast<float*>(row[2 * count])};
  }
  return group;
}

Layout layout(int64_t rows, int64_t length, int columns, int packed) {
  int width = 1;
  while (width < kScaled / kRun && width * kRun < length) width *= 2;
  return {rows, length, columns != 0, packed != 0, width};
}

dim3 grid(int64_t blocks, int members) { return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(members)); }
int64_t blocks_of(int64_t size, int64_t each) { return (size + each - 1) / each; }

Moments moments(double beta1, double beta2, int transform) {
  return {static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
          static_cast<float>(1 - beta2), static_cast<Transform>(transform)};
}

// Calls f with a zero of the type and whether the projection is on the left, as types.
template <class F>
int with_kernel(int type, bool left, const F& f) {
  const auto sided = [&](auto zero) { return left ? f(zero, std::true_type()) : f(zero, std::false_type()); };
  switch (static_cast<Type>(type)) {
    case Type::float32: return sided(float());
    case Type::bfloat16: return sided(Bfloat16());
    case Type::float16: return sided(Float16());
  }
  return -1;
}

}  // namespace
}  // namespace sso

using namespace sso;

// Whether the current device and its driver can run these kernels.
SSO_API sso_usable() { return usable(prepare); }

SSO_API sso_scalars_bytes() { return sizeof(Scalars); }

// Scalars of `count` tensors from their step counts, which advance first if asked to. lr is on the device; where it is
// null, `rates` on the host are it. Tensors that `finite`, on the device, says no of are left alone by all kernels that
// are given these scalars; null: none.
SSO_API sso_prepare(int64_t count, const uint64_t* steps, const double* rates, const void* lr, int lr_double,
                    int lr_stride, const bool* finite, int advance, double beta1, double beta2, double eps,
                    int eps_inside, double weight_decay, double scale, void* scalars, void* stream) {
  return over_groups(count, [&](int members, int64_t first) {
    Steps group{};
    for (int i = 0; i < members; ++i) {
      group.step[i] = reinterpret_cast<float*>(steps[first + i]);
      group.rate[i] = lr ? 0 : rates[first + i];
    }
    const int64_t offset = first * lr_stride * static_cast<int64_t>(lr_double ? sizeof(double) : sizeof(float));
    const Schedule schedule{advance != 0, beta1, beta2, eps, eps_inside != 0, weight_decay, scale,
                            lr ? static_cast<const char*>(lr) + offset : nullptr, lr_double != 0, lr_stride,
                            finite ? finite + first : nullptr};
    return launch(prepare, dim3(1), kGroup, 0, stream, group, schedule, static_cast<Scalars*>(scalars) + first, members);
  });
}

// Words of every seed to `out` (count, blocks, 4).
SSO_API sso_words(int64_t count, const uint64_t* seeds, int64_t blocks, int64_t* out, void* stream) {
  if (blocks == 0) return 0;
  return over_groups(count, [&](int members, int64_t first) {
    Seeds group{};
    std::copy_n(seeds + first, members, group.seed);
    return launch(draw, grid(blocks_of(blocks, kThreads), members), kThreads, 0, stream, group, out + first * blocks * 4,
                  blocks);
  });
}

// The largest |x| of every tensor to `out`, which is zero before.
SSO_API sso_grad_max(int64_t count, const uint64_t* data, const int64_t* sizes, int type, double* out, void* stream) {
  return over_groups(count, [&](int members, int64_t first) {
    Sources sources{};
    int64_t largest = 0;
    for (int i = 0; i < members; ++i) {
      sources.data[i] = reinterpret_cast<const void*>(data[first + i]);
      sources.size[i] = sizes[first + i];
      largest = std::max(largest, sizes[first + i]);
    }
    if (largest == 0) return 0;
    const int64_t blocks = std::min<int64_t>(512, blocks_of(largest, kThreads * kRun));
    return launch(absmax, grid(blocks, members), kThreads, 0, stream, sources, static_cast<Type>(type), out + first);
  });
}

// See Dense. The outputs are float32 where N is stored. A window of several rows has a multiple of kRun columns.
SSO_API sso_dense(int64_t count, const uint64_t* table, int64_t size, int in, int out, int adam, int advance, int store,
                  int write, double beta1, double beta2, int transform, int64_t counted, int sign, int rounding,
                  int64_t origin, int64_t columns, int64_t pitch, int64_t width, int row_step, int column_step,
                  void* scalars, void* stream) {
  if (size == 0) return 0;
  const Dense how{static_cast<Type>(in), static_cast<Type>(out), adam != 0, advance != 0, store != 0, write != 0,
                  sign != 0, static_cast<Rounding>(rounding), counted, {origin, columns, pitch}, width, row_step,
                  column_step};
  return over_groups(count, [&](int members, int64_t first) {
    return launch(dense, grid(blocks_of(size, kThreads * kRun), members), kThreads, 0, stream,
                  group_of(table, count, members, first), how, moments(beta1, beta2, transform),
                  static_cast<Scalars*>(scalars) + first, size);
  });
}

// R of `type` to N in float32, by what Linear says; the moments advance.
SSO_API sso_linear_update(int64_t count, const uint64_t* table, int64_t size, int type, double look_mean, double look_low,
                          double keep_mean, double keep_low, int transform, void* scalars, void* stream) {
  if (size == 0) return 0;
  const Linear<float> how{static_cast<float>(look_mean), static_cast<float>(look_low), static_cast<float>(keep_mean),
                          static_cast<float>(keep_low)};
  return over_groups(count, [&](int members, int64_t first) {
    return launch(linear_update, grid(blocks_of(size, kThreads * kRun), members), kThreads, 0, stream,
                  group_of(table, count, members, first), static_cast<Type>(type), how,
                  static_cast<Transform>(transform), static_cast<Scalars*>(scalars) + first, size);
  });
}

SSO_API sso_rescale(int64_t count, const uint64_t* table, int64_t size, const void* scalars, void* stream) {
  if (size == 0) return 0;
  return over_groups(count, [&](int members, int64_t first) {
    return launch(rescale, grid(blocks_of(size, kThreads), members), kThreads, 0, stream,
                  group_of(table, count, members, first), static_cast<const Scalars*>(scalars) + first, size);
  });
}

// G (lines, depth), or (depth, lines) where left, and its bases (depth, rank), both of `type`; the outputs are of it as
// well, or float32 where `wide`.
SSO_API sso_project(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                    int wide, int adam, double beta1, double beta2, int transform, void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using T = decltype(zero);
    const int64_t tiles = blocks_of(lines, kLines) * blocks_of(rank, kColumns);
    return over_groups(count, [&](int members, int64_t first) {
      return launch(project<T, side>, grid(tiles, members), kThreads, shared_bytes<T>(), stream,
                    group_of(table, count, members, first), moments(beta1, beta2, transform), adam != 0,
                    wide != 0, static_cast<Scalars*>(scalars) + first, Shape{lines, depth, rank});
    });
  });
}

// W (lines, depth), or (depth, lines) where left, N and the bases, all of `type`. See Rows; null: nothing of that.
SSO_API sso_apply(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                  int64_t counted, int sign, int rounding, int64_t origin, int64_t columns, int64_t pitch,
                  float* squares, const float* factors, const void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using T = decltype(zero);
    const int64_t tiles = blocks_of(lines, kLines) * blocks_of(depth, kColumns);
    const int64_t rows = left ? depth : lines, slices = blocks_of(left ? lines : depth, kSlice);
    return over_groups(count, [&](int members, int64_t first) {
      const Rows own{squares ? squares + first * slices * rows : nullptr, factors ? factors + first * rows : nullptr};
      return launch(apply<T, side>, grid(tiles, members), kThreads, shared_bytes<T>(), stream,
                    group_of(table, count, members, first), sign != 0, static_cast<Rounding>(rounding),
                    Window{origin, columns, pitch}, counted, own, static_cast<const Scalars*>(scalars) + first,
                    Shape{lines, depth, rank});
    });
  });
}

// As both, for a rank of at most kColumns and a transform that needs no share: not cautious.
SSO_API sso_fused(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                  double beta1, double beta2, int transform, int rounding, int64_t origin, int64_t columns,
                  int64_t pitch, const void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using T = decltype(zero);
    return over_groups(count, [&](int members, int64_t first) {
      return launch(fused<T, side>, grid(blocks_of(lines, kLines), members), kThreads, fused_bytes<T, side>(rank),
                    stream, group_of(table, count, members, first), moments(beta1, beta2, transform), static_cast<Rounding>(rounding),
                    Window{origin, columns, pitch}, static_cast<const Scalars*>(scalars) + first, Shape{lines, depth, rank});
    });
  });
}

// W (rows, columns) in the place of outputs, G in that of inputs; `along` and `aims` (count, rows). See the kernel.
SSO_API sso_lengths(int64_t count, const uint64_t* table, int rows, int columns, int type, double beta1, double beta2,
                    float* along, float* aims, const void* scalars, void* stream) {
  return over_groups(count, [&](int members, int64_t first) {
    return launch(lengths, grid(blocks_of(rows, kThreads / 32), members), kThreads, 0, stream,
                  group_of(table, count, members, first), static_cast<Type>(type), moments(beta1, beta2, 0),
                  static_cast<const Scalars*>(scalars) + first, rows, columns,
                  along + first * rows, aims + first * rows);
  });
}

// As sso_project to float32, of G - diag(along) W; W is of `type` too, and in the place of the first moments.
SSO_API sso_project_tangents(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                             const float* along, const void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using T = decltype(zero);
    const int64_t tiles = blocks_of(lines, kLines) * blocks_of(rank, kColumns);
    return over_groups(count, [&](int members, int64_t first) {
      return launch(project_tangents<T, side>, grid(tiles, members), kThreads, shared_bytes<T>(), stream,
                    group_of(table, count, members, first), along + first * (left ? depth : lines),
                    static_cast<const Scalars*>(scalars) + first, Shape{lines, depth, rank});
    });
  });
}

// Factors in the place of `aims` (count, rows), from squares (count, slices of 64 columns, rows).
SSO_API sso_factors(int64_t count, const float* squares, float* aims, int columns, int rows, void* stream) {
  const int64_t slices = blocks_of(columns, kSlice);
  return over_groups(count, [&](int members, int64_t first) {
    return launch(factors, grid(blocks_of(rows, kThreads), members), kThreads, 0, stream,
                  squares + first * slices * rows, aims + first * rows, static_cast<int>(slices), rows);
  });
}

// Of every G (rows, columns), sums of squares, see square_sums; without scalars, of all of them.
SSO_API sso_square_sums(int64_t count, const uint64_t* table, int rows, int columns, int type, float* by_row,
                        float* by_column, const void* scalars, void* stream) {
  const int64_t across = blocks_of(columns, kSumColumns), down = blocks_of(rows, kSumRows);
  return over_groups(count, [&](int members, int64_t first) {
    return launch(square_sums, grid(across * down, members), kThreads, kThreads * kRun * sizeof(float), stream,
                  group_of(table, count, members, first), static_cast<Type>(type),
                  scalars ? static_cast<const Scalars*>(scalars) + first : nullptr, rows, columns,
                  by_row + first * across * rows, by_column + first * down * columns);
  });
}

// G (rows, columns) in the place of inputs, averages of its squares in that of moments: they advance, and numbers are
// (count, rows + columns). by_row (count, tiles of columns, rows) and by_column (count, tiles of rows, columns) are used.
SSO_API sso_normalisers(int64_t count, const uint64_t* table, int rows, int columns, int type, double decay,
                        float* by_row, float* by_column, float* numbers, const void* scalars, void* stream) {
  const int64_t across = blocks_of(columns, kSumColumns), down = blocks_of(rows, kSumRows);
  const int64_t lines = blocks_of(std::max(rows, columns), kThreads);
  const int failed = sso_square_sums(count, table, rows, columns, type, by_row, by_column, scalars, stream);
  if (failed != 0) return failed;
  return over_groups(count, [&](int members, int64_t first) {
    const Group group = group_of(table, count, members, first);
    const Scalars* all = static_cast<const Scalars*>(scalars) + first;
    float *row_sums = by_row + first * across * rows, *column_sums = by_column + first * down * columns;
    const int error = launch(averages, grid(lines, members), kThreads, 0, stream, group, all, decay, rows, columns, row_sums,
                   column_sums);
    if (error != 0) return error;
    return launch(normalisers, grid(lines, members), kThreads, kThreads / 32 * sizeof(float), stream, group, all, rows,
                  columns, numbers + first * (rows + columns));
  });
}

// W (lines, depth), or (depth, lines) where left, and G, in the place of the first moments, of `type`; M and the bases of
// its Operand. W takes its step along D, which is measured first, to `sums` (count, tiles).
SSO_API sso_blend(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                  double beta, int transform, int rounding, double threshold, const float* numbers, float* sums,
                  void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using S = decltype(zero);
    const int64_t tiles = blocks_of(lines, kLines) * blocks_of(depth, kColumns);
    const bool cautious = static_cast<Transform>(transform) == Transform::cautious;
    return over_groups(count, [&](int members, int64_t first) {
      Scalars* all = static_cast<Scalars*>(scalars) + first;
      Blend how{static_cast<float>(beta), static_cast<Transform>(transform), static_cast<Rounding>(rounding),
                numbers + first * (lines + depth), sums + first * tiles};
      const auto pass = [&] {
        return launch(blend<S, side>, grid(tiles, members), kThreads, shared_bytes<Operand<S>>(), stream,
                      group_of(table, count, members, first), how, all, Shape{lines, depth, rank});
      };
      int error = pass();
      if (error != 0) return error;
      error = launch(clip, grid(1, members), kThreads, kThreads / 32 * sizeof(float), stream, all, how.sums,
                     static_cast<int>(tiles), static_cast<int64_t>(lines) * depth, cautious, threshold);
      if (error != 0) return error;
      how.sums = nullptr;
      return pass();
    });
  });
}

// G of `type`, and bases of its Operand, to float32; see the kernel.
SSO_API sso_project_normalised(int64_t count, const uint64_t* table, int left, int lines, int depth, int rank, int type,
                               const float* numbers, double share, const void* scalars, void* stream) {
  return with_kernel(type, left != 0, [&](auto zero, auto side) {
    using S = decltype(zero);
    const int64_t tiles = blocks_of(lines, kLines) * blocks_of(rank, kColumns);
    return over_groups(count, [&](int members, int64_t first) {
      return launch(project_normalised<S, side>, grid(tiles, members), kThreads, shared_bytes<Operand<S>>(), stream,
                    group_of(table, count, members, first), numbers ? numbers + first * (lines + depth) : nullptr,
                    static_cast<float>(share), static_cast<const Scalars*>(scalars) + first, Shape{lines, depth, rank});
    });
  });
}

// x (rows, length), or its transpose where `columns`, to codes and scales; what is packed has two codes to a byte. The
// table is of five rows: the addresses of x, codes, scales and step counts, and seeds; `values` are those of the codes. To
// nearest, or by the streams (seed, step) from `begin` on.
SSO_API sso_encode(int64_t count, const uint64_t* table, int64_t rows, int64_t length, int columns, int packed, int type,
                   const void* values, int value_count, int stochastic, int64_t begin, void* stream) {
  const Layout l = layout(rows, length, columns, packed);
  if (l.tiles() == 0) return 0;
  return over_groups(count, [&](int members, int64_t first) {
    KeptGroup group = kept_group_of(table, count, members, first);
    for (int i = 0; i < members; ++i) {
      group.step[i] = reinterpret_cast<const float*>(table[3 * count + first + i]);
      group.seed[i] = table[4 * count + first + i];
    }
    return launch(encode, grid(l.tiles(), members), kThreads, sizeof(Shared), stream, group, static_cast<Type>(type), l,
                  Values{static_cast<const float*>(values), value_count}, stochastic != 0, begin);
  });
}

// Back from the first three rows of such a table.
SSO_API sso_decode(int64_t count, const uint64_t* table, int64_t rows, int64_t length, int columns, int packed, int type,
                   const void* values, int value_count, void* stream) {
  const Layout l = layout(rows, length, columns, packed);
  if (l.tiles() == 0) return 0;
  return over_groups(count, [&](int members, int64_t first) {
    return launch(decode, grid(l.tiles(), members), kThreads, sizeof(Shared), stream,
                  kept_group_of(table, count, members, first), static_cast<Type>(type), l,
                  Values{static_cast<const float*>(values), value_count});
  });
}

// See CodedHow. The table is of nine rows: the addresses of outputs, inputs, codes of the first and of the second
// moments, scales of the first and of the second ones; seeds of the outputs, of the first and of the second moments.
SSO_API sso_coded(int64_t count, const uint64_t* table, int64_t rows, int64_t length, int columns, int packed,
                  const void* signs, int sign_values, const void* squares, int square_values, int64_t begin, int in,
                  int out, int counts, int write, double beta1, double beta2, int transform, int64_t counted,
                  int rounding, void* scalars, void* stream) {
  const Layout l = layout(rows, length, columns, packed);
  if (l.tiles() == 0) return 0;
  const CodedHow how{static_cast<Type>(in), static_cast<Type>(out), counts != 0, write != 0, static_cast<Rounding>(rounding), counted,
                     begin};
  return over_groups(count, [&](int members, int64_t first) {
    return launch(coded, grid(l.tiles(), members), kThreads, 2 * sizeof(Shared), stream,
                  coded_group_of(table, count, members, first), how, l,
                  Values{static_cast<const float*>(signs), sign_values},
                  Values{static_cast<const float*>(squares), square_values}, moments(beta1, beta2, transform),
                  static_cast<Scalars*>(scalars) + first);
  }, kCodedGroup);
}

// The most shared memory that a block of any kernel asks for, in bytes, if `fused` takes ranks up to this.
SSO_API sso_shared_bytes(int type, int rank) {
  return with_kernel(type, false, [&](auto zero, auto) {
    using T = decltype(zero);
    return std::max(fused_bytes<T, false>(rank), fused_bytes<T, true>(rank));
  });
}

extern "C" __attribute__((visibility("default"))) const char* sso_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
