// What memory is asked for while decode rows are attended: the lines of the tile that comes next.
//
// Blocks lie anywhere and the rows of other heads lie between, so the processor's own prefetcher does
// not follow. Two lines are asked for at every step of a product: a burst would fill the core's miss
// buffers and stop it. A tile of few keys has few steps; what they leave is asked for at its end.
class Lookahead {
 public:
  // Look ahead to rows of `width` bytes, keys first.
  template <class T>
  void set(const TileRows<T>& rows, int64_t width) {
    clear();
    for (const T* const* side : {rows.keys, rows.values}) {
      for (int64_t key = 0; key < rows.used && count_ + width / kLine + 2 <= kMost; ++key) {
        const uintptr_t row = reinterpret_cast<uintptr_t>(side[key]);
        for (uintptr_t line = row / kLine * kLine; line < row + static_cast<uintptr_t>(width); line += kLine) {
          lines_[count_++] = reinterpret_cast<const void*>(line);
        }
      }
    }
    filled_ = count_;
  }
  // Look ahead to nothing.
  void clear() { count_ = taken_ = filled_ = 0; }

  // Two lines for each of the next `steps` steps, at most TANDEM_MOST_HEAD_DIM of them. Where there
  // are no more they were asked for before, which costs next to nothing.
  const void* const* take(int64_t steps) {
    const int64_t from = taken_ < count_ ? taken_ : 0, to = from + 2 * steps;
    if (taken_ < count_) taken_ = to;
    for (; filled_ < to; ++filled_) lines_[filled_] = kZeros;
    return lines_ + from;
  }
  // Ask for what no step has asked for.
  void finish() {
    for (; taken_ < count_; ++taken_) __builtin_prefetch(lines_[taken_]);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kMost = 2304;  // rows of up to 512 bytes; of longer ones not all
  int64_t count_ = 0, taken_ = 0, filled_ = 0;
  const void* lines_[kMost + 2 * TANDEM_MOST_HEAD_DIM];
};
