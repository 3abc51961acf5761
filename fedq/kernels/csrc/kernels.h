// The table of kernels: every function is listed once, compiled once for each instruction set, and called by name.
//
// A listed function is written in one of the .inl files as `static int64_t name(params)`; the library exports it as
// `fedq_name`. It returns the bytes that it wrote, or a negative number that its list explains.
#pragma once
#include <stdint.h>

#include "blocks.h"
#include "checksum.h"
#include "sparse.h"
#include "xnor.h"

// Raised with every change to a listed function or to a plan, so that a library of another version is never called;
// `fedq/kernels/cpu/library.py` says the same number.
#define FEDQ_ABI 4

#define FEDQ_KERNELS(X) \
  FEDQ_BLOCK_KERNELS(X) FEDQ_SPARSE_KERNELS(X) FEDQ_XNOR_KERNELS(X) FEDQ_CHECKSUM_KERNELS(X)

namespace fedq {

struct Kernels {
#define FEDQ_FIELD(name, params, args) int64_t(*name) params;
  FEDQ_KERNELS(FEDQ_FIELD)
#undef FEDQ_FIELD
};

#define FEDQ_POINTER(name, params, args) name,
// For the end of each translation unit, inside its namespace: the table of the functions compiled there.
#define FEDQ_TABLE {FEDQ_KERNELS(FEDQ_POINTER)}

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

// xnor_conv with VPOPCNTDQ, for which the rest of the table has no use.
int64_t xnor_conv_vpopcnt(const XnorPlan* plan, const uint64_t* signs, const uint64_t* weights, const int32_t* sums,
                          const float* scales, const float* bias, float* out, int64_t num_threads);
#endif

}  // namespace fedq
