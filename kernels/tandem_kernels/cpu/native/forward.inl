// A range of layers in one region: the threads go from phase to phase, not through the caller.

template <class T>
struct ForwardState {
  Scratch& scratch;
  const Forward& f;
  int64_t num_windows;
  Attention attention;  // of a layer all but keys, values and window
};

// The entry for a window in an array of `count`; its end where there is none.
static inline WindowUnits* find_window(WindowUnits* windows, int64_t count, int64_t window) {
  int64_t i = 0;
  while (i < count && windows[i].window != window) ++i;
  return windows + i;
}

// Keep only the wanted rows, in their order, of `residual` and `seen`.
template <class T>
static void gather_rows(Scratch& scratch, const Forward& f) {
  const int64_t hidden = f.model->hidden, width = f.model->heads * f.model->head_dim;
  float* residual = scratch.residual.as<float>();
  T* seen = scratch.seen.as<T>();
  float* kept = scratch.gathered.as<float>();
  T* kept_seen = reinterpret_cast<T*>(kept + f.num_wanted * hidden);
  for (int64_t i = 0; i < f.num_wanted; ++i) {
    const int64_t row = f.wanted_rows[i];
    __builtin_memcpy(kept + i * hidden, residual + row * hidden, static_cast<size_t>(hidden) * 4);
    __builtin_memcpy(kept_seen + i * width, seen + row * width,
                     static_cast<size_t>(width) * sizeof(T));
  }
  __builtin_memcpy(residual, kept, static_cast<size_t>(f.num_wanted * hidden) * 4);
  __builtin_memcpy(seen, kept_seen, static_cast<size_t>(f.num_wanted * width) * sizeof(T));
}

template <class T>
static void layer_phases(Member& member, const ForwardState<T>& state, int64_t index) {
  const Forward& f = state.f;
  const TandemModel& model = *f.model;
  const TandemLayer& layer = model.layers[index];
  Scratch& scratch = state.scratch;
  const float eps = static_cast<float>(model.eps);
  int64_t rows = f.batch->num_tokens;
  float* residual = scratch.residual.as<float>();
  T* normed = scratch.normed.as<T>();
  T* keys = static_cast<T*>(f.cache->kv) + 2 * index * f.cache->plane_stride;
  T* values = keys + f.cache->plane_stride;

  norm_phase<T>(member, residual, layer.attention_norm, rows, model.hidden, eps, normed);
  linear_phase<T, false>(member, scratch, layer.qkv, normed, rows, scratch.projected.as<float>());
  rotary_kv_phase<T>(member, model, layer, *f.batch, scratch.angles.as<float>(), scratch.projected.as<float>(),
                     scratch.query.as<T>(), keys, values, f.cache->block_stride);
  const bool last = index == model.num_layers - 1;
  if (last && f.num_wanted == 0) return;
  Attention attention = state.attention;
  attention.keys = keys;
  attention.values = values;
  attention.window = layer.window;
  attention_phase<T>(member, scratch, attention,
                     *find_window(scratch.windows.as<WindowUnits>(), state.num_windows, layer.window));
  if (last && f.num_wanted >= 0) {
    member.phase(1, [&](int64_t) { gather_rows<T>(scratch, f); });
    rows = f.num_wanted;
  }
  linear_phase<T, true>(member, scratch, layer.output, scratch.seen.as<T>(), rows, residual);
  norm_phase<T>(member, residual, layer.feed_forward_norm, rows, model.hidden, eps, normed);
  gated_phase<T>(member, scratch, layer.gate_up, normed, rows, scratch.inner.as<T>());
  linear_phase<T, true>(member, scratch, layer.down, scratch.inner.as<T>(), rows, residual);
  if (last) {
    norm_phase<T>(member, residual, model.final_norm, rows, model.hidden, eps,
                  static_cast<T*>(f.hidden));
  }
}

template <class T>
static void forward_region(Member& member, void* argument) {
  const ForwardState<T>& state = *static_cast<const ForwardState<T>*>(argument);
  const Forward& f = state.f;
  angle_phase(member, *f.model, *f.batch, state.scratch.angles.template as<float>());
  if (f.first_layer == 0) {
    float* residual = state.scratch.residual.template as<float>();
    row_phase(member, f.batch->num_tokens, [&](int64_t row) {
      unpack_row<T>(f.model->embedding, f.token_ids[row], residual + row * f.model->hidden);
    });
  }
  for (int64_t index = f.first_layer; index < f.first_layer + f.num_layers; ++index) {
    layer_phases<T>(member, state, index);
  }
}

template <class T>
static void run_forward(Team& team, Scratch& scratch, const Forward& f) {
  const TandemModel& m = *f.model;
  const int64_t rows = f.batch->num_tokens, attended = m.heads * m.head_dim;
  const int64_t size = static_cast<int64_t>(sizeof(T));
  int64_t widest = m.hidden > m.inner ? m.hidden : m.inner;
  if (attended > widest) widest = attended;
  if (f.first_layer == 0) scratch.residual.reserve(rows * m.hidden * 4);
  scratch.normed.reserve(rows * m.hidden * size);
  scratch.angles.reserve(rows * m.head_dim * 4);
  scratch.projected.reserve(rows * (m.heads + 2 * m.kv_heads) * m.head_dim * 4);
  scratch.query.reserve(rows * attended * size);
  scratch.seen.reserve(rows * attended * size);
  scratch.inner.reserve(rows * m.inner * size);
  scratch.packed.reserve(packed_bytes<T>(rows, widest));
  if (f.num_wanted >= 0) scratch.gathered.reserve(f.num_wanted * (m.hidden * 4 + attended * size) + 64);
  ForwardState<T> state{scratch, f, 0, {}};
  state.attention = {f.batch, scratch.query.as<T>(), nullptr, nullptr, f.cache->block_stride,
                     scratch.seen.as<T>(), m.heads, m.kv_heads, m.head_dim,
                     1.0f / __builtin_sqrtf(static_cast<float>(m.head_dim)), 0};
  scratch.windows.reserve(f.num_layers * static_cast<int64_t>(sizeof(WindowUnits)));
  WindowUnits* windows = scratch.windows.as<WindowUnits>();
  for (int64_t i = f.first_layer; i < f.first_layer + f.num_layers; ++i) {
    WindowUnits* found = find_window(windows, state.num_windows, m.layers[i].window);
    if (found == windows + state.num_windows) {
      *found = {m.layers[i].window, {}, 0, 0};
      ++state.num_windows;
    }
  }
  prepare_attention<T>(scratch, state.attention, team.size(), windows, state.num_windows);
  team.run(forward_region<T>, &state);
}
