// The CPU kernels of the ops that subspace_optim/ops.py defines: lists in, loops of kernels.h and torch's own matrix
// products out. Only the LibTorch stable ABI, so that one library serves many versions of torch and Python.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace sso {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

enum Side : int64_t { kDense, kLeft, kRight, kBoth };  // the order of SIDES in ops.py

constexpr int64_t kBlock = 1 << 17;  // elements of a float32 copy of part of a matrix: 512 KiB
constexpr int64_t kGrain = 16;       // chunks that are worth a thread

// ---- tensors --------------------------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "only float32, float64, bfloat16 and float16 are supported");
  }
}

template <class A>
constexpr ScalarType scalar_type = sizeof(A) == sizeof(float) ? ScalarType::Float : ScalarType::Double;

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// In a type that loops over A can read, in contiguous memory.
template <class A>
Tensor readable(const Tensor& t) {
  return torch::stable::contiguous(is_double(t) == (sizeof(A) == sizeof(double)) ? t : torch::stable::to(t, scalar_type<A>));
}

// Calls f with a zero of the type that the arithmetic on `t` uses.
template <class F>
void with_type_of(const Tensor& t, const F& f) {
  is_double(t) ? f(double()) : f(float());
}

Source source(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t)}; }

// A tensor to be written by loops over contiguous memory, whatever its strides: `finish` stores what they wrote.
struct Written {
  Tensor original, memory;

  explicit Written(const Tensor& t) : original(t), memory(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}
  void finish() {
    if (memory.const_data_ptr() != original.const_data_ptr()) torch::stable::copy_(original, memory);
  }
};

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }
Tensor part(Tensor t, int64_t dim, int64_t begin, int64_t count) {
  return torch::stable::narrow(t, dim, begin, count);
}

// out ← beta·out + alpha·a b, by torch and so by its BLAS; beta = 0 ignores what is in `out`.
void product(const Tensor& out, const Tensor& a, const Tensor& b, double beta = 0, double alpha = 1) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

Tensor product_of(const Tensor& a, const Tensor& b) {
  const Tensor out = torch::stable::new_empty(a, std::vector{a.size(0), b.size(1)});
  product(out, a, b);
  return out;
}

// Memory that the matrices of a list take turns in.
class Scratch {
 public:
  Tensor take(const Tensor& like, ScalarType dtype, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    if (!memory_ || memory_->numel() < count || memory_->scalar_type() != dtype) {
      memory_ = torch::stable::new_empty(like, std::vector<int64_t>{count}, dtype);
    }
    return torch::stable::view(part(*memory_, 0, 0, count), shape);
  }

 private:
  std::optional<Tensor> memory_;
};

// ---- numbers --------------------------------------------------------------------------------------------------------

double value(const Tensor& t) {
  return is_double(t) ? *t.const_data_ptr<double>() : *torch::stable::to(t, ScalarType::Double).const_data_ptr<double>();
}

double increment(const Tensor& step) {
  if (is_double(step)) return *step.mutable_data_ptr<double>() += 1;
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float, "a step count must be float32 or float64");
  return *step.mutable_data_ptr<float>() += 1;
}

// The learning rate of each of `count` tensors.
std::vector<double> rates(const Tensor& lr, size_t count) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(lr, ScalarType::Double));
  STD_TORCH_CHECK(wide.dim() == 0 || wide.numel() == static_cast<int64_t>(count), "lr must be 0-d, or one a tensor");
  const double* data = wide.const_data_ptr<double>();
  return wide.dim() == 0 ? std::vector<double>(count, *data) : std::vector<double>(data, data + count);
}

struct AdamOptions {
  double beta1, beta2, eps;
  Transform transform;
  bool eps_inside;
};

Transform transform_of(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= 2, "transform must be 0 to 2");
  return static_cast<Transform>(index);
}

constexpr double kEpsFloor = 1e-19;  // as in reference.py

// N = M/(1-β₁ᵏ) / (√(V/(1-β₂ᵏ)) + ε), its constants gathered.
template <class A>
Adam<A> adam_at(const AdamOptions& o, double step) {
  const double correction1 = 1 - std::pow(o.beta1, step), correction2 = std::sqrt(1 - std::pow(o.beta2, step));
  const double floor = std::max(o.eps, kEpsFloor) * correction1 / (o.eps_inside ? correction2 : 1);
  return {
      static_cast<A>(o.beta1), static_cast<A>(1 - o.beta1), static_cast<A>(o.beta2), static_cast<A>(1 - o.beta2),
      static_cast<A>(correction1 / correction2), static_cast<A>(floor)};
}

// How a parameter is written: W ← decay·W + factor·U.
struct Writing {
  double decay, factor;
  bool sign;                    // of the update instead of the update
  std::optional<int64_t> seed;  // of the rounding
  double step;
  Window window = {};

  template <class A>
  Target<A> into(const Tensor& param) const {
    STD_TORCH_CHECK(is_double(param) == (sizeof(A) == sizeof(double)), "a float64 parameter has float64 moments");
    return {param.mutable_data_ptr(), dtype_of(param), static_cast<A>(decay), static_cast<A>(factor),
            seed.has_value(), {static_cast<uint64_t>(seed.value_or(0)), static_cast<uint32_t>(step), window}};
  }
};

// What cautious multiplies its update by: 1 / the share of elements kept.
double cautious_scale(Transform transform, int64_t kept, int64_t count) {
  return transform == Transform::cautious ? 1 / std::max(static_cast<double>(kept) / count, 1e-3) : 1;
}

// ---- loops over threads: boundaries fall on chunks, and no float is summed across them, so bits do not depend on them

template <class F>
void over_chunks(int64_t count, const F& f) {
  torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
    f(begin * kChunk, std::min(end * kChunk, count));
  });
}

// The same over rows of `columns` elements, which may be as few as one.
template <class F>
void over_rows(int64_t rows, int64_t columns, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain * kChunk / columns), f);
}

// N goes to `update`, or nowhere. Returns how many elements cautious kept.
template <class A>
int64_t adam(Transform transform, const Adam<A>& h, const Tensor& r, const Tensor& m, const Tensor& v, A* update) {
  STD_TORCH_CHECK(m.numel() == r.numel() && v.numel() == r.numel(), "moments must have the shape of the gradient");
  std::atomic<int64_t> kept = 0;
  const Source low = source(r);
  A *first = m.mutable_data_ptr<A>(), *second = v.mutable_data_ptr<A>();
  const auto loop = kernels().of<A>().adam[static_cast<int>(transform)];
  over_chunks(r.numel(), [&](int64_t begin, int64_t end) { kept += loop(h, low, first, second, update, begin, end); });
  return kept;
}

// U holds the elements of the target from `first` on.
template <class A>
void write(const Target<A>& t, const Tensor& u, bool sign, int64_t first = 0) {
  const Source data = source(u);
  const auto loop = kernels().of<A>().write;
  over_chunks(u.numel(), [&](int64_t begin, int64_t end) { loop(t, data, sign, first, first + begin, first + end); });
}

// ---- one matrix -----------------------------------------------------------------------------------------------------

struct Subspace {
  std::optional<Tensor> left, right;  // (m, r), (n, r); both empty: dense

  bool dense() const { return !left && !right; }
  Subspace as(ScalarType type) const {
    const auto cast = [=](const auto& q) { return q ? std::optional(torch::stable::to(*q, type)) : std::nullopt; };
    return {cast(left), cast(right)};
  }
};

// Lines of a block; of an empty shard they have no elements.
int64_t lines_of(int64_t length) { return std::max<int64_t>(16, kBlock / std::max<int64_t>(1, length)); }

enum Products : int64_t { kExact, kOwn, kRounded };  // the order of PRODUCTS in ops.py

// The type of products with a gradient or a parameter. Those in bfloat16 have float32 sums; G, the bases, R, N and
// back(N) are each rounded once, by at most 2^-9 of what they are.
template <class A>
ScalarType product_type(const Tensor& t, int64_t products) {
  const bool rounds = products == kRounded || (products == kOwn && t.scalar_type() == ScalarType::BFloat16);
  return rounds && !is_double(t) && kernels().multiplies_bfloat16 ? ScalarType::BFloat16 : scalar_type<A>;
}

// out ← beta·out + alpha·a b, where a and b are rounded to `type`, and if that is not out's own, a b as well.
template <class A>
void product_in(ScalarType type, Tensor out, const Tensor& a, const Tensor& b, double beta, double alpha,
                Scratch& scratch) {
  if (type == scalar_type<A>) return product(out, a, b, beta, alpha);
  if (beta == 0) torch::stable::zero_(out);
  const Tensor factor = torch::stable::to(b, type);
  const Target<A> t{out.mutable_data_ptr(), dtype_of(out), static_cast<A>(beta), static_cast<A>(alpha), false, {}};
  const int64_t rows = out.size(0), columns = out.size(1), step = lines_of(columns);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    const Tensor rounded = scratch.take(out, type, {count, columns});
    product(rounded, torch::stable::to(part(a, 0, begin, count), type), factor);
    write(t, rounded, false, begin * columns);
  }
}

// `multiply` of whole G (m, n) if it has the type of `out`; otherwise of converted blocks of rows or columns, so that no
// m×n copy exists.
template <class F>
void over_blocks(const Tensor& grad, int64_t dim, const Tensor& out, Scratch& scratch, const F& multiply) {
  if (grad.scalar_type() == out.scalar_type()) return multiply(out, grad);
  const int64_t size = grad.size(dim), other = grad.size(1 - dim), step = lines_of(other);
  for (int64_t begin = 0; begin < size; begin += step) {
    const int64_t count = std::min(step, size - begin);
    const auto shape = dim == 0 ? std::vector{count, other} : std::vector{other, count};
    Tensor block = scratch.take(out, out.scalar_type(), shape);
    torch::stable::copy_(block, part(grad, dim, begin, count));
    multiply(part(out, dim, begin, count), block);
  }
}

// R ← G Q, Pᵀ G or Pᵀ G Q, multiplied in `type`.
void project(ScalarType type, Tensor low, const Tensor& grad, const Subspace& s, Scratch& scratch) {
  if (type != low.scalar_type()) {
    const Tensor rounded = torch::stable::new_empty(low, std::vector{low.size(0), low.size(1)}, type);
    project(type, rounded, grad, s.as(type), scratch);
    torch::stable::copy_(low, rounded);
    return;
  }
  if (!s.left) {
    over_blocks(grad, 0, low, scratch, [&](const Tensor& out, const Tensor& g) { product(out, g, *s.right); });
    return;
  }
  const Tensor half = s.right ? torch::stable::new_empty(low, std::vector{low.size(0), grad.size(1)}) : low;
  const Tensor adjoint = transposed(*s.left);
  over_blocks(grad, 1, half, scratch, [&](const Tensor& out, const Tensor& g) { product(out, adjoint, g); });
  if (s.right) product(low, half, *s.right);
}

// The factors of back(N) = a b.
std::pair<Tensor, Tensor> back_factors(const Tensor& update, const Subspace& s) {
  if (!s.left) return {update, transposed(*s.right)};
  if (!s.right) return {*s.left, update};
  return {product_of(*s.left, update), transposed(*s.right)};
}

// Where torch's product can write the parameter it does; otherwise blocks of back(N) are rounded into it, each once.
template <class A>
void apply(int64_t products, const Tensor& param, const Tensor& update, const Subspace& s, const Writing& how,
           Scratch& scratch) {
  const ScalarType type = product_type<A>(param, products);
  if (!s.dense() && param.scalar_type() == type && type == scalar_type<A> && !how.sign) {
    const auto [a, b] = back_factors(update, s);
    return product(param, a, b, how.decay, how.factor);
  }
  Written w(param);
  const Target<A> t = how.into<A>(w.memory);
  if (s.dense()) {
    STD_TORCH_CHECK(update.numel() == param.numel(), "a dense update must have the shape of its parameter");
    write(t, update, how.sign);
  } else {
    const auto factors = back_factors(update, s);
    const Tensor a = torch::stable::to(factors.first, type), b = torch::stable::to(factors.second, type);
    const int64_t rows = param.size(0), columns = param.size(1), step = lines_of(columns);
    for (int64_t begin = 0; begin < rows; begin += step) {
      const int64_t count = std::min(step, rows - begin);
      const Tensor block = scratch.take(update, type, {count, columns});
      product(block, part(a, 0, begin, count), b);
      write(t, block, how.sign, begin * columns);
    }
  }
  w.finish();
}

// to ← diag(row) x diag(column), of x from its row `begin` on.
template <class A>
void scale(const Tensor& to, const Tensor& x, int64_t begin, const std::vector<A>& row, const std::vector<A>& column) {
  const int64_t columns = to.size(1);
  const Source data = source(x);
  A* out = to.mutable_data_ptr<A>();
  const auto loop = kernels().of<A>().scale;
  over_rows(to.size(0), columns, [&](int64_t first, int64_t last) {
    loop(data, (begin + first) * columns, last - first, columns, row.data() + begin + first, column.data(),
         out + first * columns);
  });
}

// The same of a dense U times a factor a row, a column or for all, in blocks of rows.
template <class A>
void apply_scaled(const Tensor& param, const Tensor& update, const Tensor& factor, const Writing& how, Scratch& scratch) {
  const int64_t rows = param.size(0), columns = param.size(1), step = lines_of(columns);
  STD_TORCH_CHECK(param.dim() == 2 && update.numel() == param.numel(), "an update must have the shape of its matrix");
  STD_TORCH_CHECK(factor.dim() == 2 && (factor.size(0) == 1 || factor.size(0) == rows) &&
                      (factor.size(1) == 1 || factor.size(1) == columns),
                  "factors must be one a row, one a column, or one");
  const Tensor factors = readable<A>(factor), readable_update = readable<A>(update);
  const A* given = factors.const_data_ptr<A>();
  std::vector<A> row(rows, 1), column(columns, 1);
  if (factor.size(0) == 1) {
    for (int64_t i = 0; i < columns; ++i) column[i] = given[factor.size(1) == 1 ? 0 : i];
  } else {
    row.assign(given, given + rows);
  }
  Written w(param);
  const Target<A> t = how.into<A>(w.memory);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const Tensor block = scratch.take(factors, scalar_type<A>, {std::min(step, rows - begin), columns});
    scale(block, readable_update, begin, row, column);
    write(t, block, false, begin * columns);
  }
  w.finish();
}

// Moments and parameter in one pass; cautious takes two.
template <class A>
void step_dense(const AdamOptions& options, const Adam<A>& h, const Tensor& param, const Tensor& grad, const Tensor& m,
                const Tensor& v, Writing how) {
  const int64_t count = param.numel();
  STD_TORCH_CHECK(grad.numel() == count && m.numel() == count && v.numel() == count, "shapes differ");
  const Source g = source(grad);
  A *first = m.mutable_data_ptr<A>(), *second = v.mutable_data_ptr<A>();
  if (options.transform == Transform::cautious) {
    how.factor *= cautious_scale(options.transform, adam<A>(options.transform, h, grad, m, v, nullptr), count);
  }
  Written w(param);
  const Target<A> t = how.into<A>(w.memory);
  const auto loop = kernels().of<A>().step[static_cast<int>(options.transform)];
  over_chunks(count, [&](int64_t begin, int64_t end) { loop(h, g, first, second, t, begin, end); });
  w.finish();
}

// Calls f with the first row of each block of rows and memory for it.
template <class A, class F>
void over_row_blocks(const Tensor& like, int64_t rows, int64_t columns, Scratch& blocks, const F& f) {
  const int64_t most = lines_of(columns);
  for (int64_t begin = 0; begin < rows; begin += most) {
    f(begin, blocks.take(like, scalar_type<A>, {std::min(most, rows - begin), columns}));
  }
}

// Adam on the directions of rows and on their lengths: two passes over W in blocks of rows, one of them over G as well.
template <class A>
void step_rows(int64_t products, const AdamOptions& options, const Tensor& param, const Tensor& grad, const Tensor& m,
               const Tensor& v, const Tensor& length_m, const Tensor& length_v, const Subspace& s, double step,
               double rate, double weight_decay, double scale, std::optional<int64_t> seed, Scratch& blocks,
               Scratch& lows) {
  const int64_t rows = param.size(0), columns = param.size(1);
  const Adam<A> h = adam_at<A>(options, step);
  const auto loops = kernels().of<A>();
  std::vector<A> norm(rows), growth(rows);  // ρ; ĝ, then Adam's step of it, then the new length

  Written w(param);
  const Tensor g = readable<A>(grad);
  const Source weights = source(w.memory), gradient = source(g);
  const ScalarType type = product_type<A>(grad, products);
  const Subspace basis = s.as(type);
  Scratch rounded;
  const Tensor low = lows.take(m, scalar_type<A>, {m.size(0), m.size(1)});
  const Tensor half = s.left && s.right ? torch::stable::new_empty(low, std::vector{low.size(0), columns}) : low;
  over_row_blocks<A>(m, rows, columns, blocks, [&](int64_t begin, const Tensor& block) {
    const int64_t count = block.size(0);
    A* tangent = block.mutable_data_ptr<A>();
    over_rows(count, columns, [&](int64_t first, int64_t last) {
      loops.tangent(gradient, weights, (begin + first) * columns, last - first, columns, tangent + first * columns,
                    growth.data() + begin + first, norm.data() + begin + first);
    });
    if (s.left) {
      product_in<A>(type, half, transposed(part(*basis.left, 0, begin, count)), block, begin > 0 ? 1 : 0, 1, rounded);
    } else {
      product_in<A>(type, part(low, 0, begin, count), block, *basis.right, 0, 1, rounded);
    }
  });
  if (s.left && s.right) product(low, half, *s.right);

  const int64_t kept = adam<A>(options.transform, h, low, m, v, low.template mutable_data_ptr<A>());
  A *first = length_m.mutable_data_ptr<A>(), *second = length_v.mutable_data_ptr<A>();
  const auto plain = loops.adam[static_cast<int>(Transform::none)];
  plain(h, {growth.data(), sizeof(A) == sizeof(float) ? Dtype::float32 : Dtype::float64}, first, second, growth.data(),
        0, rows);
  const A decay = static_cast<A>(1 - rate * weight_decay), lr = static_cast<A>(rate);
  for (int64_t i = 0; i < rows; ++i) growth[i] = std::max<A>(norm[i] * decay - lr * growth[i], 0);

  const auto factors = back_factors(low, s);
  const Tensor a = torch::stable::to(factors.first, type), b = torch::stable::to(factors.second, type);
  const double factor = -rate * scale * cautious_scale(options.transform, kept, low.numel());
  const Target<A> target = Writing{0, 1, false, seed, step}.into<A>(w.memory);
  over_row_blocks<A>(m, rows, columns, blocks, [&](int64_t begin, Tensor block) {
    const int64_t count = block.size(0);
    torch::stable::copy_(block, part(w.memory, 0, begin, count));
    product_in<A>(type, block, part(a, 0, begin, count), b, 1, factor, rounded);
    const A* moved = block.const_data_ptr<A>();
    over_rows(count, columns, [&](int64_t from, int64_t to) {
      loops.write_rows(target, moved + from * columns, norm.data() + begin + from, growth.data() + begin + from,
                       (begin + from) * columns, to - from, columns);
    });
  });
  w.finish();
}

// x ← x + weight·(y + least - x), and its sum.
template <class A>
double average(A* x, const std::vector<A>& y, double weight, A least) {
  double sum = 0;
  const A kept = static_cast<A>(1 - weight), fresh = static_cast<A>(weight);
  for (size_t i = 0; i < y.size(); ++i) sum += x[i] = kept * x[i] + fresh * (y[i] + least);
  return sum;
}

struct FloraOptions {
  double beta1, decay_rate, clip_threshold, weight_decay, scale;
  Transform transform;
};

// Σ x·y.
template <class A>
double inner(const Tensor& x, const Tensor& y) {
  const int64_t count = x.numel();
  const A *first = x.const_data_ptr<A>(), *second = y.const_data_ptr<A>();
  const auto loop = kernels().of<A>().inner;
  std::vector<double> sums((count + kChunk - 1) / kChunk);
  over_chunks(count, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kChunk) {
      sums[at / kChunk] = loop(first, second, at, std::min(at + kChunk, end));
    }
  });
  double all = 0;
  for (const double sum : sums) all += sum;
  return all;
}

bool same(const Subspace& a, const Subspace& b) {
  const auto one = [](const auto& p, const auto& q) { return !p || p->const_data_ptr() == q->const_data_ptr(); };
  return one(a.left, b.left) && one(a.right, b.right);
}

// Whether QᵀQ = I, by what it makes of one vector of random signs: ‖(QᵀQ - I)x‖² is ‖QᵀQ - I‖² on average (Freivalds).
template <class A>
bool orthonormal(const Tensor& q) {
  const Tensor x = torch::stable::new_empty(q, std::vector<int64_t>{q.size(1), 1});
  A* sign = x.mutable_data_ptr<A>();
  std::minstd_rand random;
  for (int64_t i = 0; i < x.numel(); ++i) sign[i] = random() % 2 ? 1 : -1;
  const Tensor again = product_of(transposed(q), product_of(q, x));
  const A* y = again.const_data_ptr<A>();
  double off = 0;
  for (int64_t i = 0; i < x.numel(); ++i) off += (y[i] - sign[i]) * (y[i] - sign[i]);
  return off < 1e-9 * x.numel();
}

// What `now` has of back(C) in `before`.
Tensor moved(const Tensor& c, const Subspace& before, const Subspace& now) {
  Tensor out = c;
  if (now.left) out = product_of(product_of(transposed(*now.left), *before.left), out);
  if (now.right) out = product_of(out, product_of(transposed(*before.right), *now.right));
  return out;
}

// Adafactor on the whole gradient with a compressed momentum C. D = (1-β₁)U + β₁·back(C) is formed in blocks of rows as
// it is written. Its norm has to be known before: from U and from products of the size of C, unless D is transformed or
// C has another basis than R, when D is formed once more.
template <class A>
void step_compressed(int64_t products, const FloraOptions& o, const Tensor& param, const Tensor& grad,
                     const Tensor& momentum, const Tensor& row_average, const Tensor& column_average,
                     const Subspace& before, const Subspace& now, bool carried, double step, double rate,
                     std::optional<int64_t> seed, Scratch& blocks, Scratch& lows) {
  const int64_t rows = param.size(0), columns = param.size(1), count = rows * columns;
  const auto loops = kernels().of<A>();
  const Tensor wide = readable<A>(grad);
  const Source g = source(wide);
  std::vector<A> row(rows), column(columns);
  over_rows(rows, columns, [&](int64_t first, int64_t last) {
    loops.square_rows(g, first * columns, last - first, columns, row.data() + first);
  });
  over_rows(columns, rows, [&](int64_t first, int64_t last) {
    loops.square_columns(g, rows, columns, first, last, column.data());
  });
  A *row_data = row_average.mutable_data_ptr<A>(), *column_data = column_average.mutable_data_ptr<A>();
  const double fresh = std::pow(step, -o.decay_rate);
  const double mean = average<A>(row_data, row, fresh, static_cast<A>(1e-30)) / rows;
  average<A>(column_data, column, fresh, static_cast<A>(1e-30));
  const A kept_share = static_cast<A>(o.beta1), fresh_share = static_cast<A>(1 - o.beta1);
  for (int64_t i = 0; i < rows; ++i) row[i] = fresh_share / std::sqrt(row_data[i] / static_cast<A>(mean));
  for (int64_t i = 0; i < columns; ++i) column[i] = 1 / std::sqrt(column_data[i]);

  // (1-β₁)U = diag(row) G diag(column), and R is what is projected of it: the bases and R take the factors.
  const Tensor low = lows.take(momentum, scalar_type<A>, {momentum.size(0), momentum.size(1)});
  const std::vector<A> ones(std::max(low.size(0), low.size(1)), 1);
  const auto scaled = [&](std::optional<Tensor> basis, const std::vector<A>& by) {
    if (basis) {
      const Tensor q = torch::stable::contiguous(*basis);
      basis = torch::stable::new_empty(q, std::vector{q.size(0), q.size(1)});
      scale(*basis, q, 0, by, ones);
    }
    return basis;
  };
  const ScalarType type = product_type<A>(grad, products);
  Scratch rounded;
  project(type, low, wide, {scaled(now.left, row), scaled(now.right, column)}, rounded);
  if (!now.left) scale(low, low, 0, row, ones);
  if (!now.right) scale(low, low, 0, ones, column);

  std::atomic<int64_t> kept = 0;
  const auto factors = back_factors(momentum, before);
  const Tensor a = torch::stable::to(factors.first, type), b = torch::stable::to(factors.second, type);
  const auto form = [&](int64_t begin, const Tensor& block) {
    scale(block, wide, begin, row, column);
    product_in<A>(type, block, part(a, 0, begin, block.size(0)), b, 1, o.beta1, rounded);
    if (o.transform == Transform::none) return;
    A* d = block.mutable_data_ptr<A>();
    const int64_t first = begin * columns;
    const auto transform = loops.transform[static_cast<int>(o.transform)];
    over_chunks(block.numel(), [&](int64_t from, int64_t to) {
      kept += transform(g, d, first, first + from, first + to);
    });
  };
  const bool forms = o.transform != Transform::none || !same(before, now);
  double squares = 0;
  over_row_blocks<A>(momentum, rows, columns, blocks, [&](int64_t begin, const Tensor& block) {
    forms ? form(begin, block) : scale(block, wide, begin, row, column);
    squares += inner<A>(block, block);
  });
  const A* present = low.const_data_ptr<A>();
  if (!forms) {  // ‖D‖² = ‖(1-β₁)U‖² + 2β₁⟨R, C⟩ + β₁²‖back(C)‖²
    const auto plain = [](const auto& q) { return !q || orthonormal<A>(*q); };
    const Tensor again = plain(now.left) && plain(now.right) ? momentum : moved(momentum, now, now);
    squares += o.beta1 * (2 * inner<A>(low, momentum) + o.beta1 * inner<A>(again, momentum));
  }
  const double rescale = cautious_scale(o.transform, kept, count);
  const double clip = std::max(rescale * std::sqrt(std::max(squares, 0.0) / count) / o.clip_threshold, 1.0);
  Written w(param);
  const Writing how{1 - rate * o.weight_decay, -rate * o.scale * rescale / clip, false, seed, step};
  const Target<A> target = how.into<A>(w.memory);
  over_row_blocks<A>(momentum, rows, columns, blocks, [&](int64_t begin, const Tensor& block) {
    form(begin, block);
    write(target, block, false, begin * columns);
  });
  w.finish();

  const Tensor history = carried ? moved(momentum, before, now) : momentum;
  const A* past = history.const_data_ptr<A>();
  A* next = momentum.mutable_data_ptr<A>();
  over_chunks(low.numel(), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) next[i] = kept_share * past[i] + present[i];
  });
}

// ---- ops ------------------------------------------------------------------------------------------------------------

void check(bool equal) { STD_TORCH_CHECK(equal, "lists must have one entry a tensor"); }

// Bases come flat: one a tensor, or all the left ones followed by all the right ones.
std::vector<Subspace> subspaces(const Tensors& bases, int64_t side, size_t count) {
  STD_TORCH_CHECK(side >= kDense && side <= kBoth, "side must be 0 to 3");
  check(bases.size() == count * (side == kDense ? 0 : side == kBoth ? 2 : 1));
  std::vector<Subspace> all(count);
  for (size_t i = 0; i < count && side != kDense; ++i) {
    (side == kRight ? all[i].right : all[i].left) = bases[i];
    if (side == kBoth) all[i].right = bases[count + i];
  }
  return all;
}

std::optional<int64_t> seed_of(const std::vector<int64_t>& seeds, size_t i) {
  return seeds.empty() ? std::nullopt : std::optional(seeds.at(i));
}

Window window_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 3 && numbers[1] > 0, "a window is an origin, columns and a pitch");
  return {numbers[0], numbers[1], numbers[2]};
}

Tensors project_op(Tensors grads, Tensors bases, int64_t side, ScalarType dtype, int64_t products) {
  STD_TORCH_CHECK(side != kDense, "a dense gradient needs no projection");
  const auto spaces = subspaces(bases, side, grads.size());
  Tensors lows;
  Scratch scratch;
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto& [left, right] = spaces[i];
    const std::vector shape{left ? left->size(1) : grads[i].size(0), right ? right->size(1) : grads[i].size(1)};
    lows.push_back(torch::stable::new_empty(grads[i], shape, dtype));
    with_type_of(lows[i], [&](auto zero) {
      project(product_type<decltype(zero)>(grads[i], products), lows[i], grads[i], spaces[i], scratch);
    });
  }
  return lows;
}

// n ← factor·n.
template <class A>
void multiply(A* n, double factor, int64_t count) {
  if (factor == 1) return;
  over_chunks(count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) n[i] *= static_cast<A>(factor);
  });
}

void adam_update_op(Tensors updates, Tensors lows, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, double beta1,
                    double beta2, double eps, int64_t transform, bool eps_inside) {
  check(updates.size() == lows.size() && exp_avgs.size() == lows.size());
  check(exp_avg_sqs.size() == lows.size() && steps.size() == lows.size());
  const AdamOptions options{beta1, beta2, eps, transform_of(transform), eps_inside};
  for (size_t i = 0; i < lows.size(); ++i) {
    with_type_of(exp_avgs[i], [&](auto zero) {
      using A = decltype(zero);
      const auto h = adam_at<A>(options, increment(steps[i]));
      Written update(updates[i]), m(exp_avgs[i]), v(exp_avg_sqs[i]);
      A* n = update.memory.template mutable_data_ptr<A>();
      const int64_t count = update.memory.numel();
      STD_TORCH_CHECK(count == lows[i].numel(), "an update must have the shape of its gradient");
      const int64_t kept = adam<A>(options.transform, h, readable<A>(lows[i]), m.memory, v.memory, n);
      multiply(n, cautious_scale(options.transform, kept, count), count);
      update.finish();
      m.finish();
      v.finish();
    });
  }
}

void linear_update_op(Tensors updates, Tensors lows, Tensors exp_avgs, Tensors steps, double look_mean, double look_low,
                      double keep_mean, double keep_low, int64_t transform) {
  check(updates.size() == lows.size() && exp_avgs.size() == lows.size() && steps.size() == lows.size());
  const Transform kind = transform_of(transform);
  for (size_t i = 0; i < lows.size(); ++i) {
    with_type_of(exp_avgs[i], [&](auto zero) {
      using A = decltype(zero);
      const Linear<A> h{static_cast<A>(look_mean), static_cast<A>(look_low), static_cast<A>(keep_mean),
                        static_cast<A>(keep_low)};
      increment(steps[i]);
      Written update(updates[i]), m(exp_avgs[i]);
      const Tensor low = readable<A>(lows[i]);
      const Source r = source(low);
      A *n = update.memory.template mutable_data_ptr<A>(), *mean = m.memory.template mutable_data_ptr<A>();
      const int64_t count = low.numel();
      STD_TORCH_CHECK(count == m.memory.numel() && count == update.memory.numel(), "moments must have the shape of R");
      std::atomic<int64_t> kept = 0;
      const auto loop = kernels().of<A>().linear[static_cast<int>(kind)];
      over_chunks(count, [&](int64_t begin, int64_t end) { kept += loop(h, r, mean, n, begin, end); });
      multiply(n, cautious_scale(kind, kept, count), count);
      update.finish();
      m.finish();
    });
  }
}

void apply_op(Tensors params, Tensors updates, Tensors bases, Tensors steps, std::vector<int64_t> seeds, Tensor lr,
              double weight_decay, double scale, int64_t side, bool sign, std::vector<int64_t> window, Tensors factors,
              int64_t products) {
  check(factors.empty() || (factors.size() == params.size() && side == kDense));
  check(updates.size() == params.size() && steps.size() == params.size());
  check(seeds.empty() || seeds.size() == params.size());
  const auto spaces = subspaces(bases, side, params.size());
  const auto rate = rates(lr, params.size());
  Scratch scratch;
  for (size_t i = 0; i < params.size(); ++i) {
    const Writing how{1 - rate[i] * weight_decay, -rate[i] * scale, sign, seed_of(seeds, i), value(steps[i]),
                      window_of(window)};
    with_type_of(params[i], [&](auto zero) {
      using A = decltype(zero);
      if (!factors.empty()) return apply_scaled<A>(params[i], updates[i], factors[i], how, scratch);
      const Tensor update = torch::stable::contiguous(torch::stable::to(updates[i], scalar_type<A>));
      apply<A>(products, params[i], update, spaces[i], how, scratch);
    });
  }
}

void projected_adam_op(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors bases,
                       Tensors steps, std::vector<int64_t> seeds, Tensor lr, double beta1, double beta2, double eps,
                       double weight_decay, double scale, int64_t side, int64_t transform,
                       std::vector<int64_t> window, int64_t products) {
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count);
  check(seeds.empty() || seeds.size() == count);
  const auto spaces = subspaces(bases, side, count);
  const auto rate = rates(lr, count);
  const AdamOptions options{beta1, beta2, eps, transform_of(transform), false};
  Scratch lows, blocks;
  for (size_t i = 0; i < count; ++i) {
    with_type_of(exp_avgs[i], [&](auto zero) {
      using A = decltype(zero);
      const double step = increment(steps[i]);
      const Adam<A> h = adam_at<A>(options, step);
      Writing how{1 - rate[i] * weight_decay, -rate[i] * scale, false, seed_of(seeds, i), step, window_of(window)};
      Written m(exp_avgs[i]), v(exp_avg_sqs[i]);
      if (spaces[i].dense()) {
        step_dense<A>(options, h, params[i], readable<A>(grads[i]), m.memory, v.memory, how);
      } else {
        const auto sizes = m.memory.sizes();
        const Tensor low = lows.take(m.memory, scalar_type<A>, {sizes.begin(), sizes.end()});
        project(product_type<A>(grads[i], products), low, grads[i], spaces[i], blocks);
        A* n = low.template mutable_data_ptr<A>();
        const int64_t kept = adam<A>(options.transform, h, low, m.memory, v.memory, n);
        how.factor *= cautious_scale(options.transform, kept, low.numel());
        apply<A>(products, params[i], low, spaces[i], how, blocks);
      }
      m.finish();
      v.finish();
    });
  }
}

void weight_norm_adam_op(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors length_avgs,
                         Tensors length_avg_sqs, Tensors bases, Tensors steps, std::vector<int64_t> seeds, Tensor lr,
                         double beta1, double beta2, double eps, double weight_decay, double scale, int64_t side,
                         int64_t transform, int64_t products) {
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count);
  check(length_avgs.size() == count && length_avg_sqs.size() == count && (seeds.empty() || seeds.size() == count));
  STD_TORCH_CHECK(side != kDense, "a dense tensor has no rows to normalise");
  const auto spaces = subspaces(bases, side, count);
  const auto rate = rates(lr, count);
  const AdamOptions options{beta1, beta2, eps, transform_of(transform), false};
  Scratch lows, blocks;
  for (size_t i = 0; i < count; ++i) {
    with_type_of(exp_avgs[i], [&](auto zero) {
      using A = decltype(zero);
      const int64_t rows = params[i].size(0);
      STD_TORCH_CHECK(grads[i].numel() == params[i].numel(), "shapes differ");
      STD_TORCH_CHECK(length_avgs[i].numel() == rows && length_avg_sqs[i].numel() == rows, "one length a row");
      Written m(exp_avgs[i]), v(exp_avg_sqs[i]), length_m(length_avgs[i]), length_v(length_avg_sqs[i]);
      step_rows<A>(products, options, params[i], grads[i], m.memory, v.memory, length_m.memory, length_v.memory,
                   spaces[i], increment(steps[i]), rate[i], weight_decay, scale, seed_of(seeds, i), blocks, lows);
      m.finish();
      v.finish();
      length_m.finish();
      length_v.finish();
    });
  }
}

void compressed_adafactor_op(Tensors params, Tensors grads, Tensors exp_avgs, Tensors row_averages,
                             Tensors column_averages, Tensors previous, Tensors bases, std::vector<bool> carried,
                             Tensors steps, std::vector<int64_t> seeds, Tensor lr, double beta1, double decay_rate,
                             double clip_threshold, double weight_decay, double scale, int64_t side,
                             int64_t transform, int64_t products) {
  const size_t count = params.size();
  check(grads.size() == count && exp_avgs.size() == count && carried.size() == count && steps.size() == count);
  check(row_averages.size() == count && column_averages.size() == count && (seeds.empty() || seeds.size() == count));
  STD_TORCH_CHECK(side != kDense, "a dense tensor has no compressed momentum");
  const auto before = subspaces(previous, side, count), now = subspaces(bases, side, count);
  const auto rate = rates(lr, count);
  const FloraOptions options{beta1, decay_rate, clip_threshold, weight_decay, scale, transform_of(transform)};
  Scratch blocks, lows;
  for (size_t i = 0; i < count; ++i) {
    with_type_of(exp_avgs[i], [&](auto zero) {
      using A = decltype(zero);
      STD_TORCH_CHECK(grads[i].numel() == params[i].numel(), "shapes differ");
      STD_TORCH_CHECK(row_averages[i].numel() == params[i].size(0), "one average a row");
      STD_TORCH_CHECK(column_averages[i].numel() == params[i].size(1), "one average a column");
      Written m(exp_avgs[i]), row(row_averages[i]), column(column_averages[i]);
      step_compressed<A>(products, options, params[i], grads[i], m.memory, row.memory, column.memory, before[i], now[i],
                         carried[i], increment(steps[i]), rate[i], seed_of(seeds, i), blocks, lows);
      m.finish();
      row.finish();
      column.finish();
    });
  }
}

// Lengths of the rows (dim -1) or columns (dim -2) of every matrix.
Tensors line_norms_op(Tensors grads, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(dim == -1 || dim == -2, "lines are rows or columns");
  Tensors norms;
  for (const Tensor& grad : grads) {
    const int64_t rows = grad.size(0), columns = grad.size(1), along = dim == -1 ? columns : rows;
    norms.push_back(torch::stable::new_empty(
        grad, dim == -1 ? std::vector<int64_t>{rows, 1} : std::vector<int64_t>{1, columns}, dtype));
    with_type_of(norms.back(), [&](auto zero) {
      using A = decltype(zero);
      const Tensor wide = readable<A>(grad);
      const Source g = source(wide);
      A* norm = norms.back().template mutable_data_ptr<A>();
      const auto loops = kernels().of<A>();
      const auto roots = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) norm[i] = along > 0 ? std::sqrt(norm[i] * static_cast<A>(along)) : 0;
      };
      if (dim == -1) {
        over_rows(rows, std::max<int64_t>(1, columns), [&](int64_t first, int64_t last) {
          loops.square_rows(g, first * columns, last - first, columns, norm + first);
          roots(first, last);
        });
      } else {
        over_rows(columns, std::max<int64_t>(1, rows), [&](int64_t first, int64_t last) {
          loops.square_columns(g, rows, columns, first, last, norm);
          roots(first, last);
        });
      }
    });
  }
  return norms;
}

// The largest |g| of every gradient, as float64; NaN if there is one.
Tensor grad_max_op(Tensors grads) {
  const auto count = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(count > 0, "no gradients");
  const Tensor out = torch::stable::new_empty(grads[0], std::vector{count}, ScalarType::Double);
  double* largest = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {
    with_type_of(grads[i], [&](auto zero) {
      using A = decltype(zero);
      const Tensor grad = torch::stable::contiguous(grads[i]);
      const Source s = source(grad);
      const int64_t chunks = (grad.numel() + kChunk - 1) / kChunk;
      std::vector<A> found(chunks);
      const auto loop = kernels().of<A>().absmax;
      over_chunks(grad.numel(), [&](int64_t begin, int64_t end) { found[begin / kChunk] = loop(s, begin, end); });
      largest[i] = 0;
      for (const A x : found) largest[i] = std::isnan(largest[i]) || x <= largest[i] ? largest[i] : x;
    });
  }
  return out;
}

void words_op(Tensor out, std::vector<int64_t> seeds) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Long && out.is_contiguous() && out.dim() == 3 && out.size(2) == 4,
                  "words are int64, by contiguous blocks of four");
  check(out.size(0) == static_cast<int64_t>(seeds.size()));
  const int64_t blocks = out.size(1);
  int64_t* data = out.mutable_data_ptr<int64_t>();
  const auto loop = kernels().words;
  for (size_t i = 0; i < seeds.size(); ++i) {
    torch::stable::parallel_for(0, blocks, kGrain * kChunk / 4, [&](int64_t begin, int64_t end) {
      loop(static_cast<uint64_t>(seeds[i]), begin, end, data + i * 4 * blocks);
    });
  }
}

// The rows of a tensor (axis -1) or of its transpose (axis -2), their codes and scales.
Coded coded(const Tensor& codes, const Tensor& scales, const Tensor& table, int64_t axis, int64_t length) {
  const bool packed = table.numel() <= 16, columns = axis == -2;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && scales.scalar_type() == ScalarType::Float &&
                      table.scalar_type() == ScalarType::Float && table.numel() >= 3 && table.numel() <= 256,
                  "codes are uint8, scales and the table of up to 256 values float32");
  STD_TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && table.is_contiguous(), "codes must be contiguous");
  STD_TORCH_CHECK(axis == -1 || (columns && codes.dim() == 2), "blocks run along rows, or along columns of a matrix");
  const int64_t bytes = packed ? (length + 1) / 2 : length, blocks = (length + 255) / 256;
  const int64_t rows = codes.numel() / std::max<int64_t>(bytes, 1);
  STD_TORCH_CHECK(codes.size(codes.dim() + axis) == bytes && scales.numel() == rows * blocks,
                  "codes and scales must fit the length of the blocks' dimension");
  return {codes.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(), table.const_data_ptr<float>(),
          table.numel(), rows, length, packed, columns};
}

constexpr int64_t kRowGrain = 16 * kChunk;  // elements that are worth a thread

// Boundaries fall on multiples of 8 rows, with which a Philox block begins.
template <class F>
void over_rows(const Coded& c, const F& f) {
  const int64_t groups = (c.rows + 7) / 8, grain = std::max<int64_t>(1, kRowGrain / (8 * c.length));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    f(8 * begin, std::min(8 * end, c.rows));
  });
}

// No seeds: to nearest.
void encode_op(Tensors xs, Tensors codes, Tensors scales, Tensor table, int64_t axis, std::vector<int64_t> seeds,
               Tensors steps, int64_t origin) {
  check(codes.size() == xs.size() && scales.size() == xs.size());
  check(seeds.empty() || (seeds.size() == xs.size() && steps.size() == xs.size()));
  const auto loop = kernels().encode;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(xs[i], ScalarType::Float));
    const Coded c = coded(codes[i], scales[i], table, axis, xs[i].size(xs[i].dim() + axis));
    STD_TORCH_CHECK(wide.numel() == c.rows * c.length, "codes must have the shape of the tensor");
    const float* data = wide.const_data_ptr<float>();
    Stream stream{0, 0, {origin}};
    if (!seeds.empty()) stream = {static_cast<uint64_t>(seeds[i]), static_cast<uint32_t>(value(steps[i])), {origin}};
    const Stream* random = seeds.empty() ? nullptr : &stream;
    over_rows(c, [&](int64_t begin, int64_t end) { loop(c, data, random, begin, end); });
  }
}

void decode_op(Tensors xs, Tensors codes, Tensors scales, Tensor table, int64_t axis) {
  check(codes.size() == xs.size() && scales.size() == xs.size());
  const auto loop = kernels().decode;
  for (size_t i = 0; i < xs.size(); ++i) {
    Tensor x = xs[i];
    const bool own = x.scalar_type() == ScalarType::Float && x.is_contiguous();
    const Tensor wide = own ? x : torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
    const Coded c = coded(codes[i], scales[i], table, axis, x.size(x.dim() + axis));
    STD_TORCH_CHECK(wide.numel() == c.rows * c.length, "codes must have the shape of the tensor");
    float* data = wide.mutable_data_ptr<float>();
    over_rows(c, [&](int64_t begin, int64_t end) { loop(c, data, begin, end); });
    if (!own) torch::stable::copy_(x, wide);
  }
}

// Moments come flat: all the first ones, then all the second ones.
void coded_adam_op(Tensors params, Tensors grads, Tensors codes, Tensors scales, Tensors tables,
                   std::vector<int64_t> streams, int64_t axis, int64_t origin, Tensors steps,
                   std::vector<int64_t> seeds, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                   double scale, int64_t transform, bool eps_inside) {
  const size_t count = params.size();
  check(grads.size() == count && steps.size() == count && (seeds.empty() || seeds.size() == count));
  check(codes.size() == 2 * count && scales.size() == 2 * count && streams.size() == 2 * count && tables.size() == 2);
  const auto rate = rates(lr, count);
  const AdamOptions options{beta1, beta2, eps, transform_of(transform), eps_inside};
  for (size_t i = 0; i < count; ++i) {
    with_type_of(steps[i], [&](auto zero) {
      using A = decltype(zero);
      const double step = increment(steps[i]);
      const Adam<A> h = adam_at<A>(options, step);
      Writing how{1 - rate[i] * weight_decay, -rate[i] * scale, false, seed_of(seeds, i), step, {origin}};
      const int64_t length = params[i].size(params[i].dim() + axis);
      const auto moment = [&](size_t j) {
        return coded(codes[j * count + i], scales[j * count + i], tables[j], axis, length);
      };
      const auto stream = [&](size_t j) {
        return Stream{static_cast<uint64_t>(streams[j * count + i]), static_cast<uint32_t>(step), {origin}};
      };
      const Coded m = moment(0), v = moment(1);
      const Stream of_m = stream(0), of_v = stream(1);
      const bool own = scalar_type<A> == params[i].scalar_type() && scalar_type<A> == grads[i].scalar_type();
      STD_TORCH_CHECK(own || !m.columns, "a moment coded by columns has a gradient and an update of its own type");
      STD_TORCH_CHECK(m.rows == v.rows && params[i].numel() == m.rows * length && grads[i].numel() == params[i].numel(),
                      "shapes differ");
      Written w(params[i]);
      const Tensor grad = readable<A>(grads[i]);
      const Source g = source(grad);
      const auto loop = kernels().of<A>().coded[static_cast<int>(options.transform)];
      if (options.transform == Transform::cautious) {
        std::atomic<int64_t> kept = 0;
        over_rows(m, [&](int64_t begin, int64_t end) { kept += loop(h, g, m, v, of_m, of_v, nullptr, begin, end); });
        how.factor *= cautious_scale(options.transform, kept, std::max<int64_t>(params[i].numel(), 1));
      }
      const Target<A> t = how.into<A>(w.memory);
      over_rows(m, [&](int64_t begin, int64_t end) { loop(h, g, m, v, of_m, of_v, &t, begin, end); });
      w.finish();
    });
  }
}

std::string isa_op() { return std::string(kernels().isa) + (kernels().multiplies_bfloat16 ? "_bf16" : ""); }

}  // namespace
}  // namespace sso

STABLE_TORCH_LIBRARY_FRAGMENT(subspace_optim, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(subspace_optim, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&sso::isa_op)); }

STABLE_TORCH_LIBRARY_IMPL(subspace_optim, CPU, m) {
  m.impl("project", TORCH_BOX(&sso::project_op));
  m.impl("adam_update_", TORCH_BOX(&sso::adam_update_op));
  m.impl("linear_update_", TORCH_BOX(&sso::linear_update_op));
  m.impl("apply_", TORCH_BOX(&sso::apply_op));
  m.impl("projected_adam_", TORCH_BOX(&sso::projected_adam_op));
  m.impl("weight_norm_adam_", TORCH_BOX(&sso::weight_norm_adam_op));
  m.impl("compressed_adafactor_", TORCH_BOX(&sso::compressed_adafactor_op));
  m.impl("line_norms", TORCH_BOX(&sso::line_norms_op));
  m.impl("grad_max", TORCH_BOX(&sso::grad_max_op));
  m.impl("words_", TORCH_BOX(&sso::words_op));
  m.impl("encode_", TORCH_BOX(&sso::encode_op));
  m.impl("decode_", TORCH_BOX(&sso::decode_op));
  m.impl("coded_adam_", TORCH_BOX(&sso::coded_adam_op));
}
