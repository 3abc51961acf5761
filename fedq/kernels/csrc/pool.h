// Threads of the kernels: one small pool a process, made when it is first needed and again after a fork.
#pragma once
#include <stdint.h>

namespace fedq {

using Task = void (*)(void* context, int64_t index);

// Calls task(context, i) once for every i in [0, num), on up to num_threads threads, the caller's among them, and
// returns when all are done. Which thread takes which index is left to chance: results must not depend on it.
void parallel(int64_t num, int num_threads, Task task, void* context);

}  // namespace fedq
