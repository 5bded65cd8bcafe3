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

// Whether a number that only grows, and may wrap round, has got as far as another.
inline bool reached(uint32_t number, uint32_t other) {
  return static_cast<int32_t>(number - other) >= 0;
}

// The parts of Team::inside_, from below: over or not, 10 bits for workers, the region's number.
constexpr uint32_t kOver = 1, kWorker = 2, kRegion = 1 << 11;

}  // namespace

Member::Member(Team& team, int index)
    : team_(team), index_(index), phase_(team.first_phase_), target_(team.first_target_) {}

int Member::size() const { return team_.size(); }

void Member::begin(int64_t count) {
  ++phase_;
  count_ = static_cast<uint32_t>(count);
  target_ += count_;
}

int64_t Member::next() {
  uint64_t seen = team_.tickets_.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t open = static_cast<uint32_t>(seen >> 32);
    const uint32_t task = open == phase_ ? static_cast<uint32_t>(seen) : 0;
    // Who is here has seen the end of the phase before, so it may open this one.
    if (task >= count_ || (open != phase_ && reached(open, phase_))) return -1;
    const uint64_t taken = static_cast<uint64_t>(phase_) << 32 | (task + 1);
    if (team_.tickets_.compare_exchange_weak(seen, taken, std::memory_order_acq_rel)) return task;
  }
}

void Member::completed(uint32_t tasks) {
  const uint32_t now = team_.done_.value.fetch_add(tasks, std::memory_order_seq_cst) + tasks;
  if (now == target_) Team::wake(team_.done_);
}

void Member::end() {
  Team::Word& done = team_.done_;
  for (;;) {
    const uint32_t seen = done.value.load(std::memory_order_acquire);
    if (reached(seen, target_)) return;
    if (Team::changes(done, seen)) continue;
    if (index_ == 0) {
      Team::sleep_while(done, seen);
      continue;
    }
    // The caller does not wait for a worker that sleeps: it may find the region gone.
    const uint32_t region = team_.started_.value.load(std::memory_order_relaxed);
    team_.leave();
    Team::sleep_while(done, seen);
    if (!team_.enter(region)) throw Team::RegionOver{};
  }
}

Team::Team(int threads) {
  inside_.value.store(kOver, std::memory_order_relaxed);
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
  first_phase_ = static_cast<uint32_t>(tickets_.load(std::memory_order_relaxed) >> 32);
  first_target_ = done_.value.load(std::memory_order_relaxed);
  if (!workers_.empty()) {
    const uint32_t number = started_.value.load(std::memory_order_relaxed) + 1;
    inside_.value.store(number * kRegion, std::memory_order_seq_cst);
    started_.value.store(number, std::memory_order_seq_cst);
    wake(started_);
  }
  Member self(*this, 0);
  region(self, argument);
  if (workers_.empty()) return;
  // Nobody may enter any more; who is in it still looks at the argument.
  for (uint32_t seen = inside_.value.fetch_or(kOver, std::memory_order_seq_cst) | kOver;
       seen % kRegion != kOver; seen = inside_.value.load(std::memory_order_seq_cst)) {
    if (!changes(inside_, seen)) sleep_while(inside_, seen);
  }
  if (done_.sleepers.load(std::memory_order_seq_cst) != 0) wake(done_);
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
    if (!changes(started_, seen)) sleep_while(started_, seen);
    seen = started_.value.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (!enter(seen)) continue;
    try {
      Member self(*this, index);
      region_(self, argument_);
    } catch (const RegionOver&) {
      continue;
    }
    leave();
  }
}

// Go into a region; false if it is over.
bool Team::enter(uint32_t region) {
  uint32_t seen = inside_.value.load(std::memory_order_seq_cst);
  do {
    if ((seen & kOver) != 0 || seen / kRegion != region % (UINT32_MAX / kRegion + 1)) return false;
  } while (!inside_.value.compare_exchange_weak(seen, seen + kWorker, std::memory_order_seq_cst));
  return true;
}

void Team::leave() {
  const uint32_t left = inside_.value.fetch_sub(kWorker, std::memory_order_seq_cst) - kWorker;
  if (left % kRegion == kOver) wake(inside_);
}

// Spin for a while; false if the word is still what was seen.
bool Team::changes(Word& word, uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.value.load(std::memory_order_acquire) != seen) return true;
    pause();
  }
  return false;
}

// Sleep until someone wakes the word, unless it has changed.
void Team::sleep_while(Word& word, uint32_t seen) {
  word.sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (word.value.load(std::memory_order_seq_cst) == seen) {
    futex(word.value, FUTEX_WAIT_PRIVATE, seen);
  }
  word.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void Team::wake(Word& word) {
  if (word.sleepers.load(std::memory_order_seq_cst) != 0) {
    futex(word.value, FUTEX_WAKE_PRIVATE, INT_MAX);
  }
}

}  // namespace tandem
