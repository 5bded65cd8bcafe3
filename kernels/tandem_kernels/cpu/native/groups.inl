// How the inputs of linear layers are counted: in units of 32 bits, in groups of rows.

template <class T>
static inline int64_t units_of(int64_t inputs) {
  return inputs / kPerUnit<T>;
}

// Rows fall into groups of nearly equal size.
struct Groups {
  int64_t rows, count;
  Groups(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t start(int64_t group) const { return group * (rows / count) + least(group); }
  int64_t size(int64_t group) const { return start(group + 1) - start(group); }

 private:
  int64_t least(int64_t group) const { return group < rows % count ? group : rows % count; }
};
