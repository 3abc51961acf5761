// The kernels for AVX-512 (F, BW, DQ, VL), from Skylake-X and Zen 4 on.
#include "tu.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
#endif

namespace fedq {
namespace {
#include "vec_avx512.h"
#include "cast.inl"
#include "blocks.inl"
#include "sparse.inl"
#define FEDQ_CRC32_INSTRUCTION 1
#include "checksum.inl"
#define FEDQ_ASKS_FOR_VPOPCNT 1
#include "xnor.inl"
}  // namespace
const Kernels avx512_kernels = FEDQ_TABLE;
}  // namespace fedq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
