// Chooses the kernels for the current processor.
#include <cstring>

#include "unvanish.h"

namespace unvanish {

#define UV_DECLARE(isa)                  \
  namespace isa {                        \
  const Kernels<float>* float_kernels();  \
  const Kernels<double>* double_kernels(); \
  }
UV_DECLARE(baseline)
#if defined(UV_X86)
UV_DECLARE(avx2)
UV_DECLARE(avx512)
#endif

namespace {

template <class Real>
struct Entry {
  const char* name;
  bool runs;
  const Kernels<Real>* kernels;
};

template <class Real, class Float, class Double>
const Kernels<Real>* pick(Float f, Double d) {
  if constexpr (sizeof(Real) == sizeof(float))
    return f();
  else
    return d();
}

}  // namespace

int64_t block_rows(int64_t B) {
  constexpr int64_t alone = 6;
  const int64_t blocks = B <= alone ? 1 : 2 * ((B + 2 * kMostRows - 1) / (2 * kMostRows));
  return B < 1 ? 1 : (B + blocks - 1) / blocks;
}

template <class Real>
const Kernels<Real>* kernels(const char* isa) {
  const Entry<Real> entries[] = {
#if defined(UV_X86)
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       pick<Real>(avx512::float_kernels, avx512::double_kernels)},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       pick<Real>(avx2::float_kernels, avx2::double_kernels)},
#endif
      {"baseline", true, pick<Real>(baseline::float_kernels, baseline::double_kernels)},
  };
  for (const auto& entry : entries)
    if (entry.runs && (isa == nullptr || std::strcmp(isa, entry.name) == 0)) return entry.kernels;
  return nullptr;
}

template const Kernels<float>* kernels<float>(const char*);
template const Kernels<double>* kernels<double>(const char*);

}  // namespace unvanish
