// The table of loops that every instruction set fills (kernels.inc), and the choice among them (dispatch.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core.h"

namespace sso {

constexpr int64_t kChunk = 1024;  // elements worked on at a time: their buffers stay in the first-level cache

enum class Dtype { float32, float64, bfloat16, float16 };

struct Source {
  const void* data;
  Dtype dtype;
};

// Random numbers, of which an element of a tensor uses the half-word that its window names.
struct Stream {
  uint64_t seed;
  uint32_t step;
  Window window;
};

// W ← decay·W + factor·U; bfloat16 rounds stochastically where that is asked for.
template <class A>
struct Target {
  void* data;
  Dtype dtype;
  A decay, factor;
  bool stochastic;
  Stream stream;
};

// A float32 tensor as codes: `rows` rows of `length` elements, each in blocks that share a scale. The rows of a tensor
// coded by columns are its columns.
struct Coded {
  uint8_t* codes;
  float* scales;
  const float* table;
  int64_t values;  // of the table: up to 16, two codes to a byte, or up to 256
  int64_t rows, length;
  bool packed, columns;
};

// All ranges are of element indices into contiguous tensors. A is the type of the moments and of all arithmetic; a
// float64 source or target goes with float64 only.
template <class A>
struct Kernels {
  // By Transform. Advances the moments and writes N: where R stood if that is `n`, nowhere if it is null. Returns how
  // many elements "cautious" kept.
  int64_t (*adam[3])(const Adam<A>&, Source r, A* m, A* v, A* n, int64_t begin, int64_t end);
  // By Transform. The same of other rules.
  int64_t (*linear[3])(const Linear<A>&, Source r, A* m, A* n, int64_t begin, int64_t end);
  // By Transform. As Adam's for a dense tensor, and N goes into the parameter at once. "cautious" finds its moments
  // advanced, since its scale is known only after a first pass.
  void (*step[3])(const Adam<A>&, Source r, A* m, A* v, const Target<A>&, int64_t begin, int64_t end);
  // U, or its sign; it holds the elements of the target from `first` on.
  void (*write)(const Target<A>&, Source u, bool sign, int64_t first, int64_t begin, int64_t end);
  // The largest absolute value; NaN if there is one.
  A (*absmax)(Source, int64_t begin, int64_t end);
  // Of each of `rows` rows, from the element `begin` on: ρ = ‖w‖, ĝ = ⟨g, w⟩/ρ and t = g - (ĝ/ρ)w; of a zero row t = g.
  void (*tangent)(Source g, Source w, int64_t begin, int64_t rows, int64_t columns, A* t, A* radial, A* norm);
  // W ← (length/‖u‖)·u by rows, from the element `begin` of the target on; where ‖u‖ or the old norm is zero, W ← u.
  void (*write_rows)(Target<A>, const A* u, const A* norm, const A* length, int64_t begin, int64_t rows,
                     int64_t columns);
  // The mean of the squares of each of `rows` rows, from the element `begin` on.
  void (*square_rows)(Source, int64_t begin, int64_t rows, int64_t columns, A* means);
  // The same of the columns [first, last).
  void (*square_columns)(Source, int64_t rows, int64_t columns, int64_t first, int64_t last, A* means);
  // u = diag(row) G diag(column), of `rows` rows from the element `begin` on.
  void (*scale)(Source g, int64_t begin, int64_t rows, int64_t columns, const A* row, const A* column, A* u);
  // By Transform: of u, in place, by the gradient g, whose elements from `first` on it holds. Returns how many elements
  // "cautious" kept.
  int64_t (*transform[3])(Source g, A* u, int64_t first, int64_t begin, int64_t end);
  // Σ x·y.
  double (*inner)(const A* x, const A* y, int64_t begin, int64_t end);
  // By Transform. A step of Adam on the rows [begin, end) of a tensor whose moments are codes; without a target nothing
  // is written. By columns, R and the target are of type A. Returns how many elements "cautious" kept.
  int64_t (*coded[3])(const Adam<A>&, Source r, const Coded& m, const Coded& v, const Stream& of_m, const Stream& of_v,
                      const Target<A>*, int64_t begin, int64_t end);
};

struct Table {
  const char* isa;
  bool multiplies_bfloat16;  // faster than float32: set by dispatch.cpp
  // The words of the blocks [begin, end) of a seed, from which bases are drawn.
  void (*words)(uint64_t seed, int64_t begin, int64_t end, int64_t* out);
  // Rows [begin, end) of x into codes, by a stream stochastically, without one to nearest.
  void (*encode)(const Coded&, const float* x, const Stream*, int64_t begin, int64_t end);
  void (*decode)(const Coded&, float* x, int64_t begin, int64_t end);
  Kernels<float> float32;
  Kernels<double> float64;

  template <class A>
  const Kernels<A>& of() const {
    if constexpr (std::is_same_v<A, float>) {
      return float32;
    } else {
      return float64;
    }
  }
};

extern const Table base, avx2, avx512;

// The widest that this CPU has, or the one that SSO_ISA names; throws if the CPU lacks that.
const Table& kernels();

}  // namespace sso
