// The threads of one context: the caller and the workers that it owns.
//
// A region runs one function on every thread of the team. Inside it work comes in phases: the tasks
// of a phase are handed out one by one, and a phase is over when its tasks are done, not when all
// threads have come. So nobody waits for a thread that has no core: whoever is there does the work,
// and who comes late passes over what is done. Waiting spins for a bounded time and then sleeps in
// the kernel, so an idle team takes no core.
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
  Member(Team& team, int index);
  int index() const { return index_; }
  int size() const;

  // Runs `task(i)` for tasks of [0, count) until none is left, and returns when all of them are done,
  // by whomever. Every thread calls the same phases in the same order. What a task writes is seen
  // after its phase; tasks of one phase must not depend on each other.
  template <class Task>
  void phase(int64_t count, Task&& task) {
    begin(count);
    for (int64_t i; (i = next()) >= 0;) {
      task(i);
      completed(1);
    }
    end();
  }

  // The same by hand, for a task that is taken before the last one is done: `next` is the number of a
  // task, or -1.
  void begin(int64_t count);
  int64_t next();
  void completed(uint32_t tasks);
  void end();

 private:
  Team& team_;
  int index_;
  uint32_t phase_;   // the number of the phase that this thread is in
  uint32_t target_;  // how many tasks are done when it is over
  uint32_t count_ = 0;
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
  struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};
  };
  struct RegionOver {};  // thrown in a worker that slept until its region was over

  void work(int index);
  bool enter(uint32_t region);
  void leave();
  static bool changes(Word& word, uint32_t seen);
  static void sleep_while(Word& word, uint32_t seen);
  static void wake(Word& word);

  std::vector<std::thread> workers_;
  // Of the region that runs; only read by who has entered it.
  Region region_ = nullptr;
  void* argument_ = nullptr;
  uint32_t first_phase_ = 0, first_target_ = 0;
  std::atomic<bool> stopping_{false};
  Word started_;  // the number of regions so far
  Word done_;     // the number of tasks done so far, of all regions
  Word inside_;   // the region's number, the workers in it, and whether it is over
  // The number of the open phase, and of its next task in the lower half.
  alignas(64) std::atomic<uint64_t> tickets_{0};
};

}  // namespace tandem
