// The threads of one context: the caller and the workers that it owns.
//
// A region runs one function on every thread of the team; inside it, phases are separated by
// `barrier`, and the tasks of a phase are handed out by `next`. Waiting spins for a bounded time
// and then sleeps in the kernel, so an idle team takes no core.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tandem {

class Team;

// What one thread sees of its team inside a region.
class Member {
 public:
  Member(Team& team, int index) : team_(team), index_(index) {}
  int index() const { return index_; }
  int size() const;
  void barrier();
  // Opens a phase whose tasks `next` hands out. A barrier must lie between two phases.
  void open();
  // The next task of the open phase, counted from 0.
  int64_t next();

 private:
  Team& team_;
  int index_;
  uint32_t phase_ = ~0u;
};

class Team {
 public:
  using Region = void (*)(Member&, void*);

  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  void run(Region region, void* argument);
  // Keep worker i on cores[i]. A core that the process may not use is passed over.
  void pin(const int64_t* cores);

 private:
  friend class Member;
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};
  };

  void work(int index);
  static uint32_t wait_while(Word& word, uint32_t seen);
  static void wake(Word& word);
  void arrive();

  std::vector<std::thread> workers_;
  Region region_ = nullptr;
  void* argument_ = nullptr;
  std::atomic<bool> stopping_{false};
  Word started_;
  Word barrier_;
  Counter arrived_;
  Counter counters_[3];
};

inline int Member::size() const { return team_.size(); }

inline void Member::barrier() {
  if (team_.size() > 1) team_.arrive();
}

inline void Member::open() {
  // Three counters take turns: while one is in use nobody can still be at the one after it, since
  // a barrier ended the phase before.
  ++phase_;
  if (index_ == 0) team_.counters_[(phase_ + 1) % 3].value.store(0, std::memory_order_relaxed);
}

inline int64_t Member::next() {
  return team_.counters_[phase_ % 3].value.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace tandem
