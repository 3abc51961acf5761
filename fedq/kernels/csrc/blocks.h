// Casts and block codecs: their plan and the list of their kernels.
#pragma once
#include <stdint.h>

namespace fedq {

enum Kind : int32_t { kInteger = 0, kTernary = 1, kSign = 2, kFp32 = 3, kBf16 = 4, kFp16 = 5 };

// `CastPlan` and `BlockPlan` of fedq/kernels/plan.py.
struct BlockPlan {
  int32_t kind;
  int32_t bits;  // of an integer code
  int64_t block;
  int32_t rotate;
  int32_t stochastic;
  int32_t unbiased;
  float step;  // integer: step of the mid-rise grid over the block's mean magnitude
  float largest_scale;  // the largest scale that decodes to finite values
};

// One payload of a reduction.
struct Part {
  const uint8_t* data;
  uint64_t seed;
  float weight;
};

}  // namespace fedq

// All return 0, or -1 if there is no memory. `dtype` of x: 0 float32, 1 bfloat16, 2 float16; `residual` may be null;
// `weighted` says whether weight·decoded is added to out instead of decoded stored.
#define FEDQ_BLOCK_KERNELS(X)                                                                                         \
  X(encode_blocks,                                                                                                    \
    (const BlockPlan* plan, const void* x, int64_t dtype, float* residual, int64_t num, uint64_t seed, uint8_t* out,  \
     int64_t num_threads),                                                                                            \
    (plan, x, dtype, residual, num, seed, out, num_threads))                                                          \
  X(decode_blocks,                                                                                                    \
    (const BlockPlan* plan, const uint8_t* data, int64_t num, uint64_t seed, float* out, int64_t weighted,            \
     float weight, int64_t num_threads),                                                                              \
    (plan, data, num, seed, out, weighted, weight, num_threads))                                                      \
  X(reduce_blocks,                                                                                                    \
    (const BlockPlan* plan_in, const Part* parts, int64_t num_parts, const BlockPlan* plan_out, int64_t num,          \
     uint64_t seed, uint8_t* out, float* residual, int64_t num_threads),                                              \
    (plan_in, parts, num_parts, plan_out, num, seed, out, residual, num_threads))
