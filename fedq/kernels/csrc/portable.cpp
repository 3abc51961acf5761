// The kernels for whatever the compiler makes of plain C++: other processors, and x86-64 before AVX2.
#include "tu.h"

namespace fedq {
namespace {
#include "vec_portable.h"
#include "cast.inl"
#include "blocks.inl"
#include "sparse.inl"
#include "checksum.inl"
#include "xnor.inl"
}  // namespace
const Kernels portable_kernels = FEDQ_TABLE;
}  // namespace fedq
