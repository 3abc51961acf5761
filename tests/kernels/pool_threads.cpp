// The pool of threads under ThreadSanitizer (`.ci/sanitize`): every index exactly once, from several callers at a time.
#include <stdio.h>

#include <atomic>
#include <thread>
#include <vector>

#include "../../fedq/kernels/csrc/pool.h"

namespace {

struct Sums {
  std::vector<int64_t> seen;  // not atomic: each index belongs to one thread
  std::atomic<int64_t> sum{0};
};

bool runs_each_index_once(int64_t num, int num_threads) {
  Sums sums;
  sums.seen.resize(static_cast<size_t>(num));
  fedq::parallel(
      num, num_threads,
      [](void* context, int64_t i) {
        Sums& own = *static_cast<Sums*>(context);
        ++own.seen[static_cast<size_t>(i)];
        own.sum += i;
      },
      &sums);
  for (int64_t count : sums.seen)
    if (count != 1) return false;
  return sums.sum == num * (num - 1) / 2;
}

}  // namespace

int main() {
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int64_t round = 0; round < 300; ++round)
        if (!runs_each_index_once(round % 50, static_cast<int>(round % 6))) ++num_wrong;
    });
  for (std::thread& caller : callers) caller.join();
  printf("pool of threads: %d wrong\n", num_wrong.load());
  return num_wrong == 0 ? 0 : 1;
}
