// Causal attention over KV blocks, read in place: prompt chunks and decode rows by the same code.
//
// The context is cut into tiles of 128 keys at fixed positions. What a query finds in a tile is
// computed by itself and tiles are merged in order, so a query's bits depend neither on the chunk
// or batch that it came in nor on the number of threads. Keys and values of a tile are rearranged
// into panels once for all queries of a unit; then both products are those of a linear layer.

constexpr int64_t kTileKeys = 128;
alignas(64) static const uint32_t kZeros[TANDEM_MOST_HEAD_DIM] = {};  // stands for missing keys
constexpr int64_t kChunkRows = 192;  // query rows (tokens times heads per KV head) of a chunk's unit

// A piece of work: some queries of one sequence and one KV head. A unit of a long prompt chunk sees
// all its tiles and writes the result; a unit of few queries sees one tile and writes what it found
// to `partial`.
struct Unit {
  int64_t sequence, kv_head, first_row, num_rows, first_tile, num_tiles;
  int64_t partial;  // index of its first partial, or -1
};

struct UnitList {
  int64_t count, partials;
};

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct AttentionShape {
  int64_t shared;     // query heads per KV head
  int64_t head_units; // units of one head
  int64_t columns;    // head_dim, filled up to whole panels
};

template <class T>
static AttentionShape shape_of(const Attention& a) {
  return {a.heads / a.kv_heads, units_of<T>(a.head_dim), (a.head_dim + kPanel - 1) / kPanel * kPanel};
}

static inline int64_t chunk_rows(const Attention& a) {
  return most_of(1, kChunkRows / (a.heads / a.kv_heads));
}

static inline int64_t first_tile(const Attention& a, int64_t position) {
  return a.window == 0 ? 0 : most_of(0, position - a.window + 1) / kTileKeys;
}

// Split the batch into units; writes them if `units` is given.
static UnitList list_units(const Attention& a, Unit* units) {
  const TandemBatch& batch = *a.batch;
  const int64_t shared = a.heads / a.kv_heads;
  UnitList list{0, 0};
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t rows = batch.query_starts[s + 1] - batch.query_starts[s];
    const int64_t start = batch.context_lens[s] - rows;
    const bool split = rows * shared <= kMaxRows;
    const int64_t step = split ? rows : chunk_rows(a);
    for (int64_t row = rows > 0 ? (rows - 1) / step * step : -1; row >= 0; row -= step) {
      const int64_t count = least_of(step, rows - row);
      const int64_t from = first_tile(a, start + row);
      const int64_t to = (start + row + count - 1) / kTileKeys + 1;
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        for (int64_t tile = from; tile < to; tile += split ? 1 : to - from) {
          if (units != nullptr) {
            units[list.count] = {s, head, row, count, tile, split ? 1 : to - from,
                                 split ? list.partials : -1};
          }
          list.partials += split ? count * shared : 0;
          ++list.count;
        }
      }
    }
  }
  return list;
}

// Floats that one partial takes: maximum, sum, and the weighted values.
static inline int64_t partial_size(int64_t columns) { return columns + kPanel; }

#if VW == 16
static void transpose_16(const uint32_t* const* rows, int64_t offset, uint32_t* to) {
  __m512i in[16], out[16];
  for (int i = 0; i < 16; ++i) in[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 16; i += 2) {
    out[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    out[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    in[i] = _mm512_unpacklo_epi64(out[i], out[i + 2]);
    in[i + 1] = _mm512_unpackhi_epi64(out[i], out[i + 2]);
    in[i + 2] = _mm512_unpacklo_epi64(out[i + 1], out[i + 3]);
    in[i + 3] = _mm512_unpackhi_epi64(out[i + 1], out[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(in[i], in[i + 4], 0x88);
    out[i + 4] = _mm512_shuffle_i32x4(in[i], in[i + 4], 0xdd);
    out[i + 8] = _mm512_shuffle_i32x4(in[i + 8], in[i + 12], 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(in[i + 8], in[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * kPanel, _mm512_shuffle_i32x4(out[i], out[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * kPanel, _mm512_shuffle_i32x4(out[i], out[i + 8], 0xdd));
  }
}
#endif

// Lay the keys at rows[0..32) out as one panel, [head units][32].
static void pack_keys(const uint32_t* const* rows, int64_t units, uint32_t* panel) {
  int64_t done = 0;
#if VW == 16
  for (; done + 16 <= units; done += 16) {
    transpose_16(rows, done, panel + done * kPanel);
    transpose_16(rows + 16, done, panel + done * kPanel + 16);
  }
#endif
  for (int key = 0; key < kPanel; ++key) {
    for (int64_t k = done; k < units; ++k) panel[k * kPanel + key] = rows[key][k];
  }
}

static inline uint32_t value_unit(const float* const* rows, int64_t unit, int64_t column) {
  uint32_t bits;
  __builtin_memcpy(&bits, rows[unit] + column, 4);
  return bits;
}

static inline uint32_t value_unit(const bf16* const* rows, int64_t unit, int64_t column) {
  return rows[2 * unit][column].bits |
         static_cast<uint32_t>(rows[2 * unit + 1][column].bits) << 16;
}

// Lay the values of neighbouring keys out as one row of units of the panels over a head's columns.
template <class T>
static void pack_values(const T* const* rows, int64_t unit, int64_t units, int64_t width,
                        uint32_t* panels) {
  for (int64_t first = 0; first < width; first += kPanel) {
    uint32_t* to = panels + (first / kPanel * units + unit) * kPanel;
    if (first + kPanel <= width) {
      for (int64_t c = 0; c < kPanel; ++c) to[c] = value_unit(rows, unit, first + c);
    } else {
      for (int64_t c = 0; c < kPanel; ++c) to[c] = first + c < width ? value_unit(rows, unit, first + c) : 0;
    }
  }
}

// The rearranged keys and values of one tile, and the buffers of one thread.
template <class T>
struct Workbench {
  uint32_t* keys;     // [4][head units][32]
  uint32_t* values;   // [columns / 32][units of 128 keys][32]
  uint32_t* query;    // [head units][rows of group]
  uint32_t* weights;  // [units of 128 keys][rows of group]
  float* scores;      // [4][kMaxRows][32]
  float* found;       // [columns / 32][kMaxRows][32]
  float* merged;      // [rows of a chunk][partial]

  static int64_t floats(const AttentionShape& shape, int64_t rows) {
    return kTileKeys * shape.head_units + kTileKeys / kPerUnit<T> * shape.columns +
           kMaxRows * (shape.head_units + kTileKeys / kPerUnit<T> + kTileKeys + shape.columns) +
           rows * partial_size(shape.columns) + 64;
  }
  Workbench(float* memory, const AttentionShape& shape) {
    keys = reinterpret_cast<uint32_t*>(memory);
    values = keys + kTileKeys * shape.head_units;
    query = values + kTileKeys / kPerUnit<T> * shape.columns;
    weights = query + kMaxRows * shape.head_units;
    scores = reinterpret_cast<float*>(weights + kMaxRows * (kTileKeys / kPerUnit<T>));
    found = scores + kMaxRows * kTileKeys;
    merged = found + kMaxRows * shape.columns;
  }
};

template <class T>
static void pack_tile(const Attention& a, const AttentionShape& shape, const Unit& unit,
                      int64_t tile, int64_t keys_end, const Workbench<T>& bench) {
  const TandemBatch& batch = *a.batch;
  const int64_t* table = batch.block_tables + unit.sequence * batch.table_width;
  const int64_t begin = tile * kTileKeys;
  const T *keys[kTileKeys], *values[kTileKeys];
  for (int64_t key = 0; key < kTileKeys; ++key) {
    keys[key] = values[key] = reinterpret_cast<const T*>(kZeros);
    const int64_t position = begin + key;
    if (position >= keys_end) continue;
    const int64_t slot =
        table[position / batch.block_size] * batch.block_size + position % batch.block_size;
    const int64_t offset = (slot * a.kv_heads + unit.kv_head) * a.head_dim;
    keys[key] = static_cast<const T*>(a.keys) + offset;
    values[key] = static_cast<const T*>(a.values) + offset;
  }
  const int64_t used = least_of(kTileKeys, keys_end - begin);
  for (int64_t first = 0; first < used; first += kPanel) {
    pack_keys(reinterpret_cast<const uint32_t* const*>(keys + first), shape.head_units,
              bench.keys + first * shape.head_units);
  }
  const int64_t units = kTileKeys / kPerUnit<T>;
  for (int64_t k = 0; k * kPerUnit<T> < used; ++k) {
    pack_values<T>(values, k, units, a.head_dim, bench.values);
  }
}

// Turn a row's scores over `used` keys into weights; return {maximum, sum}, sum 0 where it sees none.
template <class T>
static void weigh(float* const* scores, int64_t used, int64_t low, int64_t high, float scale,
                  uint32_t* weights, int64_t stride, float* maximum, float* sum) {
  alignas(64) float row[kTileKeys];
  vf most = splat(-__builtin_inff());
  for (int64_t key = 0; key < used; key += VW) {
    const vf score = load<vf>(scores[key / kPanel] + key % kPanel) * scale;
    store(row + key, score);
  }
  for (int64_t key = 0; key < least_of(low, used); ++key) row[key] = -__builtin_inff();
  for (int64_t key = most_of(high, 0); key < used; ++key) row[key] = -__builtin_inff();
  for (int64_t key = 0; key < used; key += VW) {
    const vf score = load<vf>(row + key);
    most = score > most ? score : most;
  }
  *maximum = max_lanes(most);
  vf total = vf{};
  const bool none = *maximum == -__builtin_inff();
  for (int64_t key = 0; key < used; key += VW) {
    const vf weight = none ? vf{} : exp_lanes(load<vf>(row + key) - *maximum);
    total += weight;
    store(row + key, weight);
  }
  *sum = sum_lanes(total);
  T narrowed[kTileKeys];
  for (int64_t key = 0; key < used; ++key) narrow(row[key], narrowed + key);
  const uint32_t* units = reinterpret_cast<const uint32_t*>(narrowed);
  for (int64_t k = 0; k < used / kPerUnit<T>; ++k) __builtin_memcpy(weights + k * stride, units + k, 4);
}

// Merge what was found in a tile into what was found before it.
static void merge(float* into, const float* maximum, const float* sum, const float* const* found,
                  int64_t columns) {
  if (*sum == 0.0f) return;
  const float before = into[0], most = before > *maximum ? before : *maximum;
  const float keep = before == -__builtin_inff() ? 0.0f : exp_one(before - most);
  const float add = exp_one(*maximum - most);
  into[0] = most;
  into[1] = into[1] * keep + *sum * add;
  for (int64_t c = 0; c < columns; c += VW) {
    float* to = into + kPanel + c;
    store(to, load<vf>(to) * keep + load<vf>(found[c / kPanel] + c % kPanel) * add);
  }
}

static void clear_partials(float* partials, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    float* at = partials + row * partial_size(columns);
    for (int64_t c = 0; c < partial_size(columns); ++c) at[c] = 0.0f;
    at[0] = -__builtin_inff();
  }
}

// Attend one group of query rows to a packed tile and merge into their partials.
template <class T>
static void attend_group(const Attention& a, const AttentionShape& shape, const Unit& unit,
                         int64_t tile, int64_t used, int64_t first, int64_t rows,
                         const Workbench<T>& bench, float* partials) {
  const TandemBatch& batch = *a.batch;
  const int64_t row_of_sequence = batch.query_starts[unit.sequence];
  const int64_t position_of_row = batch.context_lens[unit.sequence] -
                                  (batch.query_starts[unit.sequence + 1] - row_of_sequence);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = unit.first_row + (first + r) / shape.shared;
    const int64_t head = unit.kv_head * shape.shared + (first + r) % shape.shared;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(
        static_cast<const T*>(a.query) + ((row_of_sequence + token) * a.heads + head) * a.head_dim);
    for (int64_t k = 0; k < shape.head_units; ++k) bench.query[k * rows + r] = from[k];
  }
  for (int64_t panel = 0; panel * kPanel < used; ++panel) {
    run_tile<T>(rows, bench.query, bench.keys + panel * kPanel * shape.head_units,
                shape.head_units, bench.scores + panel * kMaxRows * kPanel);
  }
  float maxima[kMaxRows], sums[kMaxRows];
  // Whole vectors and whole units: keys past the end have weight 0.
  const int64_t padded = (used + kPanel - 1) / kPanel * kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = position_of_row + unit.first_row + (first + r) / shape.shared;
    const int64_t high = position + 1 - tile * kTileKeys;
    const int64_t low = a.window == 0 ? 0 : high - a.window;
    float* scores[kTileKeys / kPanel];
    for (int64_t panel = 0; panel < kTileKeys / kPanel; ++panel) {
      scores[panel] = bench.scores + (panel * kMaxRows + r) * kPanel;
    }
    weigh<T>(scores, padded, low, least_of(high, used), a.scale, bench.weights + r, rows,
             maxima + r, sums + r);
  }
  const int64_t units = kTileKeys / kPerUnit<T>;
  const int64_t used_units = (used + kPerUnit<T> - 1) / kPerUnit<T>;
  for (int64_t panel = 0; panel < shape.columns / kPanel; ++panel) {
    run_tile<T>(rows, bench.weights, bench.values + panel * units * kPanel, used_units,
                bench.found + panel * kMaxRows * kPanel);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* found[TANDEM_MOST_HEAD_DIM / kPanel];
    for (int64_t panel = 0; panel < shape.columns / kPanel; ++panel) {
      found[panel] = bench.found + (panel * kMaxRows + r) * kPanel;
    }
    merge(partials + (first + r) * partial_size(shape.columns), maxima + r, sums + r, found,
          shape.columns);
  }
}

template <class T>
static void write_out(const Attention& a, int64_t token, int64_t head, const float* partial) {
  T* to = static_cast<T*>(a.output) + (token * a.heads + head) * a.head_dim;
  const float factor = 1.0f / partial[1];
  for (int64_t c = 0; c < a.head_dim; ++c) narrow(partial[kPanel + c] * factor, to + c);
}

template <class T>
static void attend(const Attention& a, const AttentionShape& shape, const Unit& unit,
                   const Workbench<T>& bench, float* partials) {
  const TandemBatch& batch = *a.batch;
  const int64_t rows = unit.num_rows * shape.shared;
  const int64_t chunk = batch.query_starts[unit.sequence + 1] - batch.query_starts[unit.sequence];
  const int64_t keys_end =
      batch.context_lens[unit.sequence] - chunk + unit.first_row + unit.num_rows;
  float* into = unit.partial < 0 ? bench.merged
                                 : partials + unit.partial * partial_size(shape.columns);
  clear_partials(into, rows, shape.columns);
  const Groups groups(rows, kMaxRows);
  for (int64_t tile = unit.first_tile; tile < unit.first_tile + unit.num_tiles; ++tile) {
    pack_tile<T>(a, shape, unit, tile, keys_end, bench);
    const int64_t used = least_of(kTileKeys, keys_end - tile * kTileKeys);
    for (int64_t group = 0; group < groups.count; ++group) {
      attend_group<T>(a, shape, unit, tile, used, groups.start(group), groups.size(group), bench,
                      into);
    }
  }
  if (unit.partial >= 0) return;
  for (int64_t row = 0; row < rows; ++row) {
    write_out<T>(a, batch.query_starts[unit.sequence] + unit.first_row + row / shape.shared,
                 unit.kv_head * shape.shared + row % shape.shared,
                 into + row * partial_size(shape.columns));
  }
}

// Merge the partials of units that share their queries, which follow each other in the list.
template <class T>
static void merge_units(const Attention& a, const AttentionShape& shape, const Unit* units,
                        int64_t count, float* partials) {
  const int64_t rows = units[0].num_rows * shape.shared, size = partial_size(shape.columns);
  float* into = partials + units[0].partial * size;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 1; i < count; ++i) {
      const float* from = partials + (units[i].partial + row) * size;
      const float* found[TANDEM_MOST_HEAD_DIM / kPanel];
      for (int64_t panel = 0; panel < shape.columns / kPanel; ++panel) {
        found[panel] = from + kPanel + panel * kPanel;
      }
      merge(into + row * size, from, from + 1, found, shape.columns);
    }
    write_out<T>(a, a.batch->query_starts[units[0].sequence] + units[0].first_row + row / shape.shared,
                 units[0].kv_head * shape.shared + row % shape.shared, into + row * size);
  }
}

// Make room for a batch and list its units. One thread, before `attention_phase`.
template <class T>
static UnitList prepare_attention(Scratch& scratch, const Attention& a, int threads) {
  const AttentionShape shape = shape_of<T>(a);
  const UnitList list = list_units(a, nullptr);
  scratch.units.reserve((list.count + 1) * static_cast<int64_t>(sizeof(Unit)));
  scratch.partials.reserve((list.partials * partial_size(shape.columns) + 1) * 4);
  scratch.per_thread.reserve(threads * Workbench<T>::floats(shape, chunk_rows(a) * shape.shared) * 4);
  return list_units(a, scratch.units.as<Unit>());
}

// All threads; ends with a barrier.
template <class T>
static void attention_phase(Member& member, Scratch& scratch, const Attention& a, UnitList list) {
  const AttentionShape shape = shape_of<T>(a);
  const Unit* units = scratch.units.as<Unit>();
  float* partials = scratch.partials.as<float>();
  const int64_t floats = Workbench<T>::floats(shape, chunk_rows(a) * shape.shared);
  const Workbench<T> bench(scratch.per_thread.as<float>() + member.index() * floats, shape);
  member.open();
  for (int64_t i; (i = member.next()) < list.count;) attend<T>(a, shape, units[i], bench, partials);
  member.barrier();
  if (list.partials == 0) return;
  int64_t turn = 0;
  for (int64_t i = 0, end; i < list.count; i = end) {
    end = i + 1;
    if (units[i].partial < 0) continue;
    while (end < list.count && units[end].partial >= 0 && units[end].sequence == units[i].sequence &&
           units[end].kv_head == units[i].kv_head)
      ++end;
    if (turn++ % member.size() == member.index()) {
      merge_units<T>(a, shape, units + i, end - i, partials);
    }
  }
  member.barrier();
}
