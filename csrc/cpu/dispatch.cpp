#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sso {
namespace {

// "_bf16" behind an instruction set: products of bfloat16 are faster than of float32. It may be forced on any CPU.
Table choose() {
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");  // so have CPUs with matrix units (AMX)
  const std::string widest = has_bf16 ? "avx512_bf16" : has_avx512 ? "avx512" : has_avx2 ? "avx2" : "base";
  const char* forced = std::getenv("SSO_ISA");
  const std::string wanted = forced ? forced : widest;
  const size_t suffix = wanted.rfind("_bf16");
  const std::string isa = wanted.substr(0, suffix);
  const auto with = [&](Table table) {
    table.multiplies_bfloat16 = suffix != std::string::npos;
    return table;
  };
  if (isa == "avx512" && has_avx512) return with(avx512);
  if (isa == "avx2" && has_avx2) return with(avx2);
  if (isa == "base") return with(base);
  throw std::runtime_error("SSO_ISA=" + wanted + " is not one of base, avx2, avx512, or this CPU lacks it");
}

}  // namespace

const Table& kernels() {
  static const Table chosen = choose();
  return chosen;
}

}  // namespace sso
