// What queries found in a tile: a maximum, a sum of weights and the weighted values, `partial_size`
// floats apart. Merged in the order of tiles, so that the bits are always the same.

// Merge what was found in a tile into what was found before it.
static inline void merge(float* into, float maximum, float sum, const float* found,
                         int64_t panel_step, int64_t columns) {
  if (sum == 0.0f) return;
  const float before = into[0];
  const float keep = before < maximum ? exp_one(before - maximum) : 1.0f;
  const float add = before > maximum ? exp_one(maximum - before) : 1.0f;
  into[0] = before > maximum ? before : maximum;
  into[1] = into[1] * keep + sum * add;
  for (int64_t c = 0; c < columns; c += VW) {
    float* to = into + kPanel + c;
    store(to, load<vf>(to) * keep + load<vf>(found + c / kPanel * panel_step + c % kPanel) * add);
  }
}

// Set a partial to what was found in its only tile.
static inline void put_partial(float* into, float maximum, float sum, const float* found,
                               int64_t panel_step, int64_t columns) {
  into[0] = maximum;
  into[1] = sum;
  for (int64_t c = 0; c < columns; c += VW) {
    const vf value = load<vf>(found + c / kPanel * panel_step + c % kPanel);
    store(into + kPanel + c, sum == 0.0f ? vf{} : value);  // of what is not seen, not even a NaN
  }
}

template <class T>
static void write_out(const Attention& a, int64_t token, int64_t head, const float* partial) {
  T* to = static_cast<T*>(a.output) + (token * a.heads + head) * a.head_dim;
  const float factor = 1.0f / partial[1];
  int64_t c = 0;
  for (; c + VW <= a.head_dim; c += VW) narrow_lanes(load<vf>(partial + kPanel + c) * factor, to + c);
  for (; c < a.head_dim; ++c) narrow(partial[kPanel + c] * factor, to + c);
}
