// Top-k, top-p and min-p as the lowest scaled logit that is kept, without sorting the vocabulary.
//
// Where the cut lies is searched by halving the range of values, counting (top-k) or weighing
// (top-p) what lies above; only the few values around it are sorted. One thread works out one row,
// so its result does not depend on the batch.

constexpr int64_t kSpan = 16384;  // of a row, that one thread looks at in one go
constexpr int64_t kSorted = 512;  // values around a cut that are sorted

struct Above {
  int64_t count;
  double weight;
  double size(bool weighed) const { return weighed ? weight : static_cast<double>(count); }
};

// A row after temperature: values are at most 0, weights are e to their power.
struct ScaledRow {
  float* values;
  float* weights;
  float* room;  // for the values that are sorted
  int64_t size;

  ScaledRow(float* memory, int64_t size)
      : values(memory), weights(memory + size), room(memory + 2 * size), size(size) {}

  // What lies at `cut` or above it.
  Above above(float cut) const {
    Above found{0, 0.0};
    for (int64_t from = 0; from < size; from += kSpan) {
      const int64_t to = least_of(from + kSpan, size);
      vf weight = vf{};
      vi count = vi{};
      int64_t i = from;
      for (; i + VW <= to; i += VW) {
        const vi inside = load<vf>(values + i) >= cut;
        count -= inside;
        weight += (vf)((vi)load<vf>(weights + i) & inside);
      }
      for (int lane = 0; lane < VW; ++lane) found.count += count[lane];
      found.weight += sum_lanes(weight);
      for (; i < to; ++i) {
        if (values[i] < cut) continue;
        ++found.count;
        found.weight += weights[i];
      }
    }
    return found;
  }
};

static void scale_row(const Choice& c, int64_t index, float most, const ScaledRow& row) {
  const float* logits = c.logits + index * c.vocab;
  for (int64_t i = 0; i < row.size; i += VW) {
    const size_t bytes = static_cast<size_t>(least_of(VW, row.size - i)) * 4;
    vf value = vf{};
    __builtin_memcpy(&value, logits + i, bytes);
    value = (value - most) / c.temperatures[index];
    const vf weight = exp_lanes(value);
    __builtin_memcpy(row.values + i, &value, bytes);
    __builtin_memcpy(row.weights + i, &weight, bytes);
  }
}

// Of the values in [low, high), from the greatest down, the last one before which less than
// `target` lies; `before` lies at `high` or above it.
static float last_within(const ScaledRow& row, float low, float high, double before, double target,
                         bool weighed) {
  int64_t count = 0;
  for (int64_t i = 0; i < row.size; ++i) {
    if (row.values[i] >= low && row.values[i] < high) row.room[count++] = row.values[i];
  }
  std::sort(row.room, row.room + count, [](float a, float b) { return a > b; });
  float last = count > 0 ? row.room[0] : low;
  for (int64_t i = 0; i < count && before < target; ++i) {
    last = row.room[i];
    before += weighed ? exp_one(last) : 1.0;
  }
  return last;
}

// From the greatest value down, the last one before which less than `target` lies.
static float cut_at(const ScaledRow& row, double target, bool weighed) {
  float low = -1.0f, high = 1.0f;
  Above under = row.above(low), over{0, 0.0};
  while (under.size(weighed) < target) {
    if (low == -__FLT_MAX__) return -__builtin_inff();  // all that can be drawn is kept
    high = low;
    over = under;
    low = low < -1e4f ? -__FLT_MAX__ : low * 4;
    under = row.above(low);
  }
  while (under.count - over.count > kSorted) {
    const float middle = low / 2 + high / 2;
    if (!(middle > low && middle < high)) break;  // equal values: nothing to halve
    const Above half = row.above(middle);
    (half.size(weighed) < target ? high : low) = middle;
    (half.size(weighed) < target ? over : under) = half;
  }
  return last_within(row, low, high, over.size(weighed), target, weighed);
}

// The lowest scaled logit that top-k, then top-p, then min-p keep. memory: [3][vocab]
static float lowest_kept(const Choice& c, int64_t index, float most, float* memory) {
  const int64_t top_k = c.top_k[index];
  const double top_p = c.top_p[index];
  float lowest = c.min_p[index] > 0 ? __builtin_logf(c.min_p[index]) : -__builtin_inff();
  const bool counts = top_k > 0 && top_k < c.vocab;
  if (!counts && top_p >= 1.0) return lowest;
  const ScaledRow row(memory, c.vocab);
  scale_row(c, index, most, row);
  double total = 0.0;
  if (counts) {
    const float cut = cut_at(row, static_cast<double>(top_k), false);
    const Above above = row.above(__builtin_nextafterf(cut, 1.0f));
    // Of the values that tie with the last one kept, only as many as fill up k have mass.
    total = above.weight + exp_one(cut) * static_cast<double>(top_k - above.count);
    lowest = cut > lowest ? cut : lowest;
  } else {
    total = row.above(-__builtin_inff()).weight;
  }
  if (top_p < 1.0) {
    const float cut = cut_at(row, top_p * total, true);
    lowest = cut > lowest ? cut : lowest;
  }
  return lowest;
}
