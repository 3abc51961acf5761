// The library's surface: picks the instruction set and hands every call to its table.
#include <string.h>

#include <atomic>

#include "kernels.h"

#define FEDQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fedq {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

// The best first. Every processor with AVX2 has the F16C, BMI, LZCNT, POPCNT and SSE4.2 (CRC32) that the AVX units use
// as well.
const Isa isas[] = {
#if defined(__x86_64__)
    {"avx512", &avx512_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
     }},
    {"avx2", &avx2_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }},
#endif
    {"portable", &portable_kernels, [] { return true; }},
};

const Isa* best() {
  for (const Isa& isa : isas)
    if (isa.runs_here()) return &isa;
  return nullptr;  // never: the last one always runs
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_relaxed);
  if (isa == nullptr) chosen.store(isa = best(), std::memory_order_relaxed);
  return *isa;
}

}  // namespace
}  // namespace fedq

FEDQ_EXPORT int64_t fedq_abi() { return FEDQ_ABI; }

FEDQ_EXPORT const char* fedq_isa() { return fedq::current().name; }

// Chooses the instruction set by name. Returns 0, -1 for an unknown name, -2 if this machine cannot run it.
FEDQ_EXPORT int64_t fedq_select(const char* name) {
  for (const fedq::Isa& isa : fedq::isas) {
    if (strcmp(isa.name, name) != 0) continue;
    if (!isa.runs_here()) return -2;
    fedq::chosen.store(&isa);
    return 0;
  }
  return -1;
}

using namespace fedq;  // the types in the lists of parameters

#define FEDQ_CALL(name, params, args) \
  FEDQ_EXPORT int64_t fedq_##name params { return fedq::current().kernels->name args; }
FEDQ_KERNELS(FEDQ_CALL)
