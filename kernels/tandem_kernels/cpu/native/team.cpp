#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace tandem {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds, then the thread sleeps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

}  // namespace

Team::Team(int threads) {
  for (int index = 1; index < threads; ++index) {
    workers_.emplace_back([this, index] { work(index); });
  }
}

Team::~Team() {
  stopping_.store(true, std::memory_order_relaxed);
  started_.value.fetch_add(1, std::memory_order_seq_cst);
  wake(started_);
  for (auto& worker : workers_) worker.join();
}

void Team::run(Region region, void* argument) {
  region_ = region;
  argument_ = argument;
  counters_[0].value.store(0, std::memory_order_relaxed);
  if (!workers_.empty()) {
    started_.value.fetch_add(1, std::memory_order_seq_cst);
    wake(started_);
  }
  Member self(*this, 0);
  region(self, argument);
  self.barrier();
}

void Team::pin(const int64_t* cores) {
  for (size_t i = 0; i < workers_.size(); ++i) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<int>(cores[i + 1]), &set);
    pthread_setaffinity_np(workers_[i].native_handle(), sizeof set, &set);
  }
}

void Team::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    seen = wait_while(started_, seen);
    if (stopping_.load(std::memory_order_relaxed)) return;
    Member self(*this, index);
    region_(self, argument_);
    self.barrier();
  }
}

void Team::arrive() {
  const uint32_t seen = barrier_.value.load(std::memory_order_relaxed);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.value.store(0, std::memory_order_relaxed);
    barrier_.value.fetch_add(1, std::memory_order_seq_cst);
    wake(barrier_);
  } else {
    wait_while(barrier_, seen);
  }
}

uint32_t Team::wait_while(Word& word, uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    const uint32_t now = word.value.load(std::memory_order_acquire);
    if (now != seen) return now;
    pause();
  }
  for (;;) {
    word.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (word.value.load(std::memory_order_seq_cst) == seen) {
      futex(word.value, FUTEX_WAIT_PRIVATE, seen);
    }
    word.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    const uint32_t now = word.value.load(std::memory_order_acquire);
    if (now != seen) return now;
  }
}

void Team::wake(Word& word) {
  if (word.sleepers.load(std::memory_order_seq_cst) != 0) {
    futex(word.value, FUTEX_WAKE_PRIVATE, INT_MAX);
  }
}

}  // namespace tandem
