// The sparse codecs: their plan and the list of their kernels.
#pragma once
#include <stdint.h>

namespace fedq {

enum SparseKind { kTopK = 0, kBlockTopK = 1, kRandK = 2, kThreshold = 3 };

struct SparsePlan {
  int64_t kind;
  int64_t bits;    // of a kept value: 1 to 8, 16 (bfloat16), 32 (float32)
  int64_t k;       // kBlockTopK: kept of each block
  int64_t block;   // kBlockTopK: a power of two
  int64_t unbias;  // kRandK: values times the length of their run
  int64_t key;     // kRandK: the hash key of the positions
  float value;     // kThreshold: the smallest magnitude that is kept
  float largest_scale;  // of coded values: the largest scale that decodes to finite ones
};

// Elements to encode: x (dtype 0 float32, 1 bfloat16, 2 float16) plus, unless null, a residual.
struct SparseInput {
  const void* x;
  int64_t dtype;
  float* residual;
  int64_t num;
};

}  // namespace fedq

// sparse_select chooses what is kept (`kept` values, except for kThreshold) and makes a Selection of it; it returns the
// number kept. sparse_write turns a Selection into the payload, of the size that follows from that number, and the
// residual of the same input into what was lost; it returns the payload's bytes. sparse_free frees a Selection.
// sparse_check returns the number of positions found in a payload of the right size, or -2 where they do not rise inside
// the tensor (of kBlockTopK: inside each block). sparse_decode sets or adds the decoded values and returns the same; it
// touches `out` only where that is `kept`. All return -1 without memory.
#define FEDQ_SPARSE_KERNELS(X)                                                                                        \
  X(sparse_select,                                                                                                    \
    (const SparsePlan* plan, const SparseInput* input, int64_t kept, int64_t num_threads, void** selection),          \
    (plan, input, kept, num_threads, selection))                                                                      \
  X(sparse_write,                                                                                                     \
    (const SparsePlan* plan, const SparseInput* input, void* selection, uint8_t* out, int64_t num_threads),            \
    (plan, input, selection, out, num_threads))                                                               \
  X(sparse_free, (void* selection), (selection))                                                                      \
  X(sparse_check,                                                                                                     \
    (const SparsePlan* plan, const uint8_t* data, int64_t num, int64_t kept, int64_t num_threads),                    \
    (plan, data, num, kept, num_threads))                                                                             \
  X(sparse_decode,                                                                                                    \
    (const SparsePlan* plan, const uint8_t* data, int64_t num, int64_t kept, float* out,           \
     int64_t adds, float weight, int64_t num_threads),                                                                \
    (plan, data, num, kept, out, adds, weight, num_threads))
