#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace sso {
namespace {

const Table& choose() {
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("SSO_ISA");
  const std::string isa = wanted ? wanted : has_avx512 ? "avx512" : has_avx2 ? "avx2" : "base";
  if (isa == "avx512" && has_avx512) return avx512;
  if (isa == "avx2" && has_avx2) return avx2;
  if (isa == "base") return base;
  throw std::runtime_error("SSO_ISA=" + isa + " is not one of base, avx2, avx512, or this CPU lacks it");
}

}  // namespace

const Table& kernels() {
  static const Table& chosen = choose();
  return chosen;
}

}  // namespace sso
