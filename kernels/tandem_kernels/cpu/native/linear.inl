// Linear layers over packed weights, for any number of rows.
//
// Every output is one chain of multiply-adds over the inputs in order, so its bits depend neither on
// the other rows, nor on how rows are grouped, nor on the number of threads. Weights are read once
// per group of rows from memory and from the second-level cache after that. A `Products` is how one
// group's rows are laid out and multiplied: on vectors, or on matrix tiles.

// Vectors: a group's inputs lie together, [units][rows of group].
template <class T>
struct VectorProducts {
  static constexpr int kRows = kMaxRows;
  static int64_t room(int64_t rows, int64_t units) { return rows * units; }
  static int64_t offset(const Groups& groups, int64_t group, int64_t units) {
    return groups.start(group) * units;
  }
  void operator()(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t units, float* tile) {
    run_tile<T, FromMemory>(rows, x, panel, units, tile);
  }

  // Bring the rows of x [rows][inputs] into groups. All threads; one phase.
  static const uint32_t* pack(Member& member, const uint32_t* x, const Groups& groups, int64_t units,
                              uint32_t* packed) {
    if (groups.rows == 1) return x;
    constexpr int64_t kSpan = 512;
    const int64_t spans = (units + kSpan - 1) / kSpan;
    member.phase(groups.count * spans, [&](int64_t task) {
      const int64_t group = task / spans, from = task % spans * kSpan, start = groups.start(group);
      interleave(x + start * units, groups.size(group), units, from,
                 from + kSpan < units ? from + kSpan : units, packed + start * units);
    });
    return packed;
  }

 private:
  // Lay units [from, to) of one group's rows, each `units` long, out as [units][rows].
  static void interleave(const uint32_t* rows, int64_t count, int64_t units, int64_t from,
                         int64_t to, uint32_t* packed) {
    for (int64_t r = 0; r < count; ++r) {
      const uint32_t* row = rows + r * units;
      for (int64_t k = from; k < to; ++k) packed[k * count + r] = row[k];
    }
  }
};

template <class T>
struct ProductsOf {
  using Type = VectorProducts<T>;
};

#if defined(TANDEM_TILES)
template <>
struct ProductsOf<bf16> {
  using Type = TiledProducts;
};
#endif

template <class T>
using Products = typename ProductsOf<T>::Type;

// Bytes that the rows of a linear layer's input take when they are packed.
template <class T>
static int64_t packed_bytes(int64_t rows, int64_t inputs) {
  return Products<T>::room(rows, units_of<T>(inputs)) * 4;
}

// How many panels a thread takes at a time: where there are more groups of rows as many as its cache
// keeps for the next, but few enough that all threads have work.
static int64_t panels_per_task(int64_t panels, int64_t units, bool again, int threads) {
  constexpr int64_t kCacheBytes = 384 * 1024;
  const int64_t even = panels / (threads * 4) > 1 ? panels / (threads * 4) : 1;
  const int64_t small = 65536 / (units * kPanel * 4) > 1 ? 65536 / (units * kPanel * 4) : 1;
  const int64_t fits = kCacheBytes / (units * kPanel * 4) > 1 ? kCacheBytes / (units * kPanel * 4) : 1;
  const int64_t wanted = again ? fits : small;
  return wanted < even ? wanted : even;
}

template <class T>
static inline float bias_at(const TandemLinear& linear, int64_t index) {
  return linear.bias == nullptr ? 0.0f : widen(static_cast<const T*>(linear.bias)[index]);
}

// Put one tile, [rows][32], into out [..., width], added to what is there or in its place.
template <class T, bool Add>
static void put_tile(const TandemLinear& linear, const float* tile, int64_t rows, int64_t column,
                     float* out) {
  const int64_t width = linear.outputs;
  const int64_t count = width - column < kPanel ? width - column : kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * width + column;
    const float* from = tile + r * kPanel;
    if (linear.bias != nullptr) {
      for (int64_t c = 0; c < count; ++c) {
        const float value = from[c] + bias_at<T>(linear, column + c);
        to[c] = Add ? to[c] + value : value;
      }
    } else {
      for (int64_t c = 0; c < count; ++c) to[c] = Add ? to[c] + from[c] : from[c];
    }
  }
}

// out [rows, outputs] = x W^T + bias, or out += it. All threads, in phases.
template <class T, bool Add>
static void linear_phase(Member& member, Scratch& scratch, const TandemLinear& linear,
                         const void* x, int64_t rows, float* out) {
  const int64_t units = units_of<T>(linear.inputs);
  const int64_t panels = (linear.outputs + kPanel - 1) / kPanel;
  Products<T> products;
  const Groups groups(rows, products.kRows);
  const uint32_t* packed = products.pack(member, static_cast<const uint32_t*>(x), groups, units,
                                         scratch.packed.as<uint32_t>());
  const int64_t step = panels_per_task(panels, units, groups.count > 1, member.size());
  alignas(64) float tile[Products<T>::kRows * kPanel];
  member.phase((panels + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step;
    const int64_t end = first + step < panels ? first + step : panels;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t start = groups.start(group), size = groups.size(group);
      for (int64_t panel = first; panel < end; ++panel) {
        products(size, packed + products.offset(groups, group, units),
                 linear.panels + panel * units * kPanel, units, tile);
        put_tile<T, Add>(linear, tile, size, panel * kPanel, out + start * linear.outputs);
      }
    }
  });
}

// Put silu(gate) * up of two tiles into out [..., width].
template <class T>
static void put_gated(const TandemLinear& linear, float* gate, float* up, int64_t rows,
                      int64_t column, T* out) {
  const int64_t width = linear.outputs / 2;
  const int64_t count = width - column < kPanel ? width - column : kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    float *g = gate + r * kPanel, *u = up + r * kPanel;
    if (linear.bias != nullptr) {
      for (int64_t c = 0; c < count; ++c) {
        g[c] += bias_at<T>(linear, column + c);
        u[c] += bias_at<T>(linear, width + column + c);
      }
    }
    for (int64_t c = 0; c < kPanel; c += VW) {
      const vf value = load<vf>(g + c);
      store(g + c, value / (exp_lanes(-value) + 1.0f) * load<vf>(u + c));
    }
    for (int64_t c = 0; c < count; ++c) narrow(g[c], out + r * width + column + c);
  }
}

// out [rows, outputs / 2] = silu(gate) * up, the panels of gate and up in turn. All threads, in phases.
template <class T>
static void gated_phase(Member& member, Scratch& scratch, const TandemLinear& linear, const void* x,
                        int64_t rows, T* out) {
  const int64_t units = units_of<T>(linear.inputs), width = linear.outputs / 2;
  const int64_t pairs = (width + kPanel - 1) / kPanel;
  Products<T> products;
  const Groups groups(rows, products.kRows);
  const uint32_t* packed = products.pack(member, static_cast<const uint32_t*>(x), groups, units,
                                         scratch.packed.as<uint32_t>());
  const int64_t step = panels_per_task(pairs, 2 * units, groups.count > 1, member.size());
  alignas(64) float gate[Products<T>::kRows * kPanel];
  alignas(64) float up[Products<T>::kRows * kPanel];
  member.phase((pairs + step - 1) / step, [&](int64_t task) {
    const int64_t first = task * step;
    const int64_t end = first + step < pairs ? first + step : pairs;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t start = groups.start(group), size = groups.size(group);
      for (int64_t pair = first; pair < end; ++pair) {
        const uint32_t* panels = linear.panels + 2 * pair * units * kPanel;
        const uint32_t* inputs = packed + products.offset(groups, group, units);
        products(size, inputs, panels, units, gate);
        products(size, inputs, panels + units * kPanel, units, up);
        put_gated<T>(linear, gate, up, size, pair * kPanel, out + start * width);
      }
    }
  });
}

// Lay rows [outputs, inputs] of a weight out in every panel_step-th panel from first_panel on.
template <class T>
static void pack_weight(const T* weight, int64_t rows, int64_t inputs, uint32_t* panels,
                        int64_t first_panel, int64_t panel_step) {
  const int64_t units = units_of<T>(inputs);
  const uint32_t* source = reinterpret_cast<const uint32_t*>(weight);
  for (int64_t row = 0; row < (rows + kPanel - 1) / kPanel * kPanel; ++row) {
    const int64_t panel = first_panel + row / kPanel * panel_step;
    uint32_t* to = panels + panel * units * kPanel + row % kPanel;
    for (int64_t k = 0; k < units; ++k) to[k * kPanel] = row < rows ? source[row * units + k] : 0;
  }
}

// Read row `index` of a packed weight, as float32.
template <class T>
static void unpack_row(const TandemLinear& linear, int64_t index, float* out) {
  const int64_t units = units_of<T>(linear.inputs);
  const uint32_t* from = linear.panels + index / kPanel * units * kPanel + index % kPanel;
  for (int64_t k = 0; k < units; ++k) {
    T parts[kPerUnit<T>];
    __builtin_memcpy(parts, from + k * kPanel, 4);
    for (int64_t part = 0; part < kPerUnit<T>; ++part)
      out[k * kPerUnit<T> + part] = widen(parts[part]);
  }
}
