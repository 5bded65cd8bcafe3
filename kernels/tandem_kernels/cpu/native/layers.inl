// What lies between the linear layers and attention: norms, rotary embedding and the KV write.

// Runs `each(row)` for all rows, a few of them per task. All threads; one phase.
template <class Each>
static void row_phase(Member& member, int64_t rows, Each&& each) {
  constexpr int64_t kTasksPerThread = 4;
  const int64_t step = (rows + kTasksPerThread * member.size() - 1) / (kTasksPerThread * member.size());
  member.phase(step == 0 ? 0 : (rows + step - 1) / step, [&](int64_t task) {
    const int64_t end = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (int64_t row = task * step; row < end; ++row) each(row);
  });
}

// out = weight * x / rms(x), row by row. The normed value is rounded to T once, with its weight.
template <class T>
static void norm_row(const float* x, const T* weight, int64_t width, float eps, T* out) {
  vf squares = vf{};
  int64_t c = 0;
  for (; c + VW <= width; c += VW) {
    const vf value = load<vf>(x + c);
    squares += value * value;
  }
  float total = sum_lanes(squares);
  for (; c < width; ++c) total += x[c] * x[c];
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
  for (c = 0; c + VW <= width; c += VW) {
    narrow_lanes(load<vf>(x + c) * factor * widen_lanes(weight + c), out + c);
  }
  for (; c < width; ++c) narrow(x[c] * factor * widen(weight[c]), out + c);
}

// All threads; one phase.
template <class T>
static void norm_phase(Member& member, const float* x, const void* weight, int64_t rows,
                       int64_t width, float eps, T* out) {
  row_phase(member, rows, [&](int64_t row) {
    norm_row(x + row * width, static_cast<const T*>(weight), width, eps, out + row * width);
  });
}

// Rotate one head, element i of its first half with element i of its second.
template <class T>
static void rotate_head(const float* x, const float* cosines, const float* sines, int64_t half,
                        T* out) {
  int64_t i = 0;
  for (; i + VW <= half; i += VW) {
    const vf first = load<vf>(x + i), second = load<vf>(x + i + half);
    const vf cosine = load<vf>(cosines + i), sine = load<vf>(sines + i);
    narrow_lanes(first * cosine - second * sine, out + i);
    narrow_lanes(second * cosine + first * sine, out + i + half);
  }
  for (; i < half; ++i) {
    narrow(x[i] * cosines[i] - x[i + half] * sines[i], out + i);
    narrow(x[i + half] * cosines[i] + x[i] * sines[i], out + i + half);
  }
}

// Norm one query or key head in place, where the model does so.
template <class T>
static void norm_head(float* x, const T* weight, int64_t width, float eps) {
  float total = 0.0f;
  for (int64_t i = 0; i < width; ++i) total += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; ++i) x[i] = x[i] * factor * widen(weight[i]);
}

// The cosines and then the sines of a batch's rows, [tokens][head_dim]. All threads; one phase.
static void angle_phase(Member& member, const TandemModel& model, const TandemBatch& batch,
                        float* angles) {
  const int64_t half = model.head_dim / 2;
  row_phase(member, batch.num_tokens, [&](int64_t row) {
    const float position = static_cast<float>(batch.positions[row]);
    float* to = angles + row * model.head_dim;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = position * model.inverse_frequencies[i];
      to[i] = __builtin_cosf(angle);
      to[i + half] = __builtin_sinf(angle);
    }
  });
}

// Queries go to `query`; keys and values to their slots. All threads; one phase.
template <class T>
static void rotary_kv_phase(Member& member, const TandemModel& model, const TandemLayer& layer,
                            const TandemBatch& batch, const float* angles, const float* projected,
                            T* query, T* keys, T* values, int64_t block_stride) {
  const int64_t width = model.head_dim, half = width / 2;
  const int64_t heads = model.heads, kv_heads = model.kv_heads;
  float head[TANDEM_MOST_HEAD_DIM];
  row_phase(member, batch.num_tokens, [&](int64_t row) {
    const float* x = projected + row * (heads + 2 * kv_heads) * width;
    const float *cosines = angles + row * width, *sines = cosines + half;
    const int64_t slot = batch.slots[row];
    const int64_t at = slot / batch.block_size * block_stride + slot % batch.block_size * kv_heads * width;
    T* key_out = keys + at;
    for (int64_t h = 0; h < heads + kv_heads; ++h) {
      const float* from = x + h * width;
      if (layer.head_norm != nullptr) {
        __builtin_memcpy(head, from, static_cast<size_t>(width) * 4);
        norm_head(head, static_cast<const T*>(layer.head_norm) + h * width, width,
                  static_cast<float>(model.eps));
        from = head;
      }
      T* to = h < heads ? query + (row * heads + h) * width : key_out + (h - heads) * width;
      rotate_head(from, cosines, sines, half, to);
    }
    const float* from = x + (heads + kv_heads) * width;
    T* value_out = values + at;
    int64_t i = 0;
    for (; i + VW <= kv_heads * width; i += VW) narrow_lanes(load<vf>(from + i), value_out + i);
    for (; i < kv_heads * width; ++i) narrow(from[i], value_out + i);
  });
}
