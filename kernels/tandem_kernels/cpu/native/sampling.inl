// Choosing tokens: the likeliest, or a draw from the softmax, truncated or not, by Gumbel noise.
//
// The noise is that of `tandem_kernels/gumbel.py`, bit for bit up to the logarithms. They are taken
// only where they can matter: noise is at most -log(u), and a token whose bound stays below the best
// so far cannot win. Rows are cut into spans, so that one row keeps all threads busy.

struct Best {
  float value;
  int64_t index;
};

static inline int64_t spans_of(int64_t vocab) { return (vocab + kSpan - 1) / kSpan; }

static Best likeliest(const float* logits, int64_t from, int64_t to) {
  vf most = splat(-__builtin_inff());
  int64_t i = from;
  for (; i + VW <= to; i += VW) {
    const vf value = load<vf>(logits + i);
    most = value > most ? value : most;
  }
  Best best{max_lanes(most), from};
  for (; i < to; ++i) best.value = logits[i] > best.value ? logits[i] : best.value;
  for (i = from; i < to; ++i) {
    if (logits[i] == best.value) return {best.value, i};
  }
  return best;
}

static inline uint64_t split_mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

template <class U>
static inline U low_bias(U x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

static inline float gumbel(float uniform) {
  const float capped = uniform < 1.0f - 0x1p-24f ? uniform : 1.0f - 0x1p-24f;
  return -__builtin_logf(-__builtin_log1pf(-capped));
}

struct Draw {
  const Choice& choice;
  Best* found;     // [2][rows][spans]: the likeliest, the drawn
  float* lowest;   // [rows]: what truncation keeps at least, or null
  float* scratch;  // [threads][3][vocab], where there is truncation
};

static Best draw_span(const Choice& d, int64_t row, float most, float lowest, int64_t from,
                      int64_t to) {
  const float* logits = d.logits + row * d.vocab;
  const uint64_t key = split_mix(split_mix(static_cast<uint64_t>(d.seeds[row])) +
                                 static_cast<uint64_t>(d.positions[row]));
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  const float temperature = d.temperatures[row];
  Best best{-__builtin_inff(), from};
  vu lane;
  for (uint32_t i = 0; i < VW; ++i) lane[i] = i;
  for (int64_t i = from; i < to; i += VW) {
    const int64_t count = to - i < VW ? to - i : VW;
    vf scaled = splat(-__builtin_inff());
    __builtin_memcpy(&scaled, logits + i, static_cast<size_t>(count) * 4);
    scaled = (scaled - most) / temperature;
    scaled = scaled >= lowest ? scaled : splat(-__builtin_inff());
    const vu token = lane + static_cast<uint32_t>(i);
    const vu bits = low_bias(low_bias(token * 0x9E3779B9u + low) ^ high);
    const vf uniform = (__builtin_convertvector((vi)(bits >> 1), vf) + 0.5f) * 0x1p-31f;
    const vi exponent = ((vi)uniform >> 23) - 127;
    const vf bound = scaled + __builtin_convertvector(-exponent, vf) * 0.69315f;
    if (max_lanes(bound) < best.value) continue;
    for (int64_t c = 0; c < count; ++c) {
      if (bound[c] < best.value) continue;
      const float value = scaled[c] + gumbel(uniform[c]);
      if (value > best.value) best = {value, i + c};
    }
  }
  return best;
}

static Best best_of(const Best* found, int64_t count) {
  Best best = found[0];
  for (int64_t i = 1; i < count; ++i) best = found[i].value > best.value ? found[i] : best;
  return best;
}

static void choose_region(Member& member, void* argument) {
  const Draw& d = *static_cast<const Draw*>(argument);
  const Choice& c = d.choice;
  const int64_t spans = spans_of(c.vocab);
  member.phase(c.rows * spans, [&](int64_t task) {
    const int64_t from = task % spans * kSpan;
    d.found[task] = likeliest(c.logits + task / spans * c.vocab, from, least_of(from + kSpan, c.vocab));
  });
  if (c.temperatures == nullptr) {
    if (member.index() != 0) return;
    for (int64_t row = 0; row < c.rows; ++row) c.out[row] = best_of(d.found + row * spans, spans).index;
    return;
  }
  if (d.lowest != nullptr) {
    member.phase(c.rows, [&](int64_t row) {
      d.lowest[row] = lowest_kept(c, row, best_of(d.found + row * spans, spans).value,
                                  d.scratch + member.index() * 3 * c.vocab);
    });
  }
  Best* drawn = d.found + c.rows * spans;
  member.phase(c.rows * spans, [&](int64_t task) {
    const int64_t row = task / spans, from = task % spans * kSpan;
    const float most = best_of(d.found + row * spans, spans).value;
    const float lowest = d.lowest == nullptr ? -__builtin_inff() : d.lowest[row];
    drawn[task] = draw_span(c, row, most, lowest, from, least_of(from + kSpan, c.vocab));
  });
  if (member.index() != 0) return;
  for (int64_t row = 0; row < c.rows; ++row) c.out[row] = best_of(drawn + row * spans, spans).index;
}
