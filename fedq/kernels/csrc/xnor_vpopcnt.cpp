// The binary convolution for AVX-512 with VPOPCNTDQ, which counts bits in one instruction: from Ice Lake and Zen 4 on.
#include "tu.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,f16c,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
#endif

#define FEDQ_VPOPCNT 1

namespace fedq {
namespace {
#include "vec_avx512.h"
#include "xnor.inl"
}  // namespace

int64_t xnor_conv_vpopcnt(const XnorPlan* plan, const uint64_t* signs, const uint64_t* weights, const int32_t* sums,
                          const float* scales, const float* bias, float* out, int64_t num_threads) {
  return xnor_conv_here(plan, signs, weights, sums, scales, bias, out, num_threads);
}
}  // namespace fedq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
