#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fedq {
namespace {

constexpr int kMaxThreads = 256;

struct Job {
  Task task;
  void* context;
  int64_t num;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num;) task(context, i);
  }
};

class Pool {
 public:
  // Runs the job, or returns false because another thread's job has the workers.
  bool run(Job& job, int num_threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(num_threads - 1);
      job_ = &job;
      places_ = num_threads - 1 < num_workers_ ? num_threads - 1 : num_workers_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;  // who has not come by now finds nothing left to do
    done_.wait(lock, [this] { return num_busy_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void grow(int wanted) {
    // Signals are for the interpreter's threads; a new thread inherits the mask of its maker.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; num_workers_ < wanted; ++num_workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {
      // The system has no more threads to give: those that there are do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++num_busy_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--num_busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the thread whose job runs
  std::mutex mutex_;  // guards all that follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int places_ = 0;  // workers that may still join the job
  int num_busy_ = 0;
  int num_workers_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// A child has none of its parent's workers, and the locks may be held by threads that it does not have either: it
// leaves the parent's pool alone and makes its own.
void forget_pool() { the_pool.store(nullptr); }

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    Pool* made = new Pool;  // never deleted: its workers outlive every static object
    if (the_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void parallel(int64_t num, int num_threads, Task task, void* context) {
  if (num_threads > num) num_threads = static_cast<int>(num);
  if (num_threads > kMaxThreads) num_threads = kMaxThreads;
  Job job{task, context, num};
  if (num_threads <= 1 || !pool().run(job, num_threads)) job.work();
}

}  // namespace fedq
