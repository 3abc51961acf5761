// The kernels for AVX2 (with F16C and BMI2), from Haswell and Zen on. FMA is not asked for: it must not be used.
#include "tu.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi,bmi2,lzcnt,popcnt")
#endif

namespace fedq {
namespace {
#include "vec_avx2.h"
#include "cast.inl"
#include "blocks.inl"
#include "sparse.inl"
#define FEDQ_CRC32_INSTRUCTION 1
#include "checksum.inl"
#include "xnor.inl"
}  // namespace
const Kernels avx2_kernels = FEDQ_TABLE;
}  // namespace fedq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
