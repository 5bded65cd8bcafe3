// Causal attention over KV blocks, read in place: prompt chunks and decode rows by the same steps.

// The buffers of one thread.
template <class T>
struct Workbench {
  static constexpr int64_t kUnits = kTileKeys / kPerUnit<T>;  // of the keys of a tile
  TileRows<T> rows[2];  // of this tile and of the next
  Lookahead ahead;      // to the next
  uint32_t* keys;     // [4][head units][32]
  uint32_t* values;   // [columns / 32][kUnits][32], for chunks
  uint32_t* query;    // [head units][rows of group], for chunks group after group
  uint32_t* weights;  // [kMaxRows][kUnits]
  float* scores;      // [4][kMaxRows][32]
  float* found;       // [columns / 32][kMaxRows][32]
  float* merged;      // [rows of a chunk][partial], for chunks

  static int64_t floats(const AttentionShape& shape, int64_t rows) {
    return kTileKeys * shape.head_units + kUnits * shape.columns +
           most_of(kMaxRows, rows) * shape.head_units +
           kMaxRows * (kUnits + kTileKeys + shape.columns) + rows * partial_size(shape.columns) + 64;
  }
  // `rows`: the most of a chunk.
  Workbench(float* memory, const AttentionShape& shape, int64_t rows) {
    keys = reinterpret_cast<uint32_t*>(memory);
    values = keys + kTileKeys * shape.head_units;
    query = values + kUnits * shape.columns;
    weights = query + most_of(kMaxRows, rows) * shape.head_units;
    scores = reinterpret_cast<float*>(weights + kMaxRows * kUnits);
    found = scores + kMaxRows * kTileKeys;
    merged = found + kMaxRows * shape.columns;
  }
  // Floats that one partial takes: maximum, sum, and the weighted values.
  static int64_t partial_size(int64_t columns) { return columns + kPanel; }
};

template <class T>
static void pack_values(const TileRows<T>& rows, int64_t head_dim, uint32_t* values) {
  constexpr int64_t kUnits = Workbench<T>::kUnits;
  for (int64_t k = 0; k * kPerUnit<T> < rows.used; ++k) {
    for (int64_t column = 0; column < head_dim; column += kPanel) {
      value_units(rows.values + k * kPerUnit<T>, column, least_of(kPanel, head_dim - column),
                  values + (column / kPanel * kUnits + k) * kPanel);
    }
  }
}

// Turn a row's scores over keys [0, padded) into weights; those outside of [low, high) weigh 0.
// scores: [panels][stride]; returns the maximum and the sum, which is 0 where the row sees nothing.
template <class T>
static void weigh(const float* scores, int64_t stride, int64_t padded, int64_t low, int64_t high,
                  float scale, uint32_t* weights, float* maximum, float* sum) {
  alignas(64) float row[kTileKeys];
  vi lane;
  for (int i = 0; i < VW; ++i) lane[i] = i;
  const vf nothing = splat(-__builtin_inff());
  vf most = nothing;
  for (int64_t key = 0; key < padded; key += VW) {
    const vf score = load<vf>(scores + key / kPanel * stride + key % kPanel) * scale;
    const vi at = lane + static_cast<int32_t>(key);
    const vi seen = (at >= static_cast<int32_t>(low)) & (at < static_cast<int32_t>(high));
    const vf kept = seen ? score : nothing;
    store(row + key, kept);
    most = kept > most ? kept : most;
  }
  *maximum = max_lanes(most);
  const bool none = *maximum == -__builtin_inff();
  T* narrowed = reinterpret_cast<T*>(weights);
  vf total = vf{};
  for (int64_t key = 0; key < padded; key += VW) {
    const vf weight = none ? vf{} : exp_lanes(load<vf>(row + key) - *maximum);
    total += weight;
    narrow_lanes(weight, narrowed + key);
  }
  *sum = sum_lanes(total);
}

// Bring a group of a unit's query rows together, [head units][rows].
template <class T>
static void gather_query(const Attention& a, const AttentionShape& shape, const Unit& unit,
                         int64_t first, int64_t rows, uint32_t* query) {
  const int64_t row_of_sequence = a.batch->query_starts[unit.sequence];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = row_of_sequence + unit.first_row + (first + r) / shape.shared;
    const int64_t head = unit.kv_head * shape.shared + (first + r) % shape.shared;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(a.query) +
                                                             (token * a.heads + head) * a.head_dim);
    for (int64_t k = 0; k < shape.head_units; ++k) query[k * rows + r] = from[k];
  }
}

// Scores of one group over the packed keys of a tile, then its weights.
template <class T, class Rows>
static void score_group(const Attention& a, const AttentionShape& shape, const Unit& unit,
                        int64_t tile, const TileRows<T>& tile_rows, int64_t first, int64_t rows,
                        const uint32_t* query, Workbench<T>& bench, float* maxima, float* sums) {
  const TandemBatch& batch = *a.batch;
  const int64_t chunk = batch.query_starts[unit.sequence + 1] - batch.query_starts[unit.sequence];
  const int64_t position_of_row = batch.context_lens[unit.sequence] - chunk + unit.first_row;
  for (int64_t panel = 0; panel * kPanel < tile_rows.used; ++panel) {
    run_tile<T, Rows>(rows, query, bench.keys + panel * kPanel * shape.head_units,
                      shape.head_units, bench.scores + panel * kMaxRows * kPanel,
                      Rows::kLooksAhead ? bench.ahead.take(shape.head_units) : nullptr);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = position_of_row + (first + r) / shape.shared;
    const int64_t high = most_of(0, position + 1 - tile * kTileKeys);
    const int64_t low = a.window == 0 ? 0 : least_of(kTileKeys, most_of(0, high - a.window));
    weigh<T>(bench.scores + r * kPanel, kMaxRows * kPanel, tile_rows.padded, low,
             least_of(high, tile_rows.used), a.scale, bench.weights + r * Workbench<T>::kUnits,
             maxima + r, sums + r);
  }
}

// Few queries and one tile: keys through the first-level cache, values where they are. The tile
// after it is asked for meanwhile. `fresh`: the queries are not those of the tile before.
template <class T>
static void attend_tile(const Attention& a, const AttentionShape& shape, const Unit& unit,
                        const TileRows<T>& rows, bool fresh, Workbench<T>& bench, float* partials) {
  for (int64_t first = 0; first < rows.used; first += kPanel) {
    pack_keys(reinterpret_cast<const uint32_t* const*>(rows.keys + first), shape.head_units,
              bench.keys + first * shape.head_units);
  }
  const int64_t units = (rows.used + kPerUnit<T> - 1) / kPerUnit<T>;
  const int64_t size = Workbench<T>::partial_size(shape.columns);
  const Groups groups(unit.num_rows * shape.shared, kMaxRows);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.start(group), count = groups.size(group);
    float maxima[kMaxRows], sums[kMaxRows];
    if (fresh || groups.count > 1) gather_query<T>(a, shape, unit, first, count, bench.query);
    score_group<T, FetchingLines>(a, shape, unit, unit.first_tile, rows, first, count, bench.query,
                                  bench, maxima, sums);
    for (int64_t column = 0; column < a.head_dim; column += kPanel) {
      const void* const* ahead = bench.ahead.take(units);
      with_rows(count, [&](auto constant) {
        ValueTile<T, constant.value>::run(bench.weights, rows.values, ahead, units, column,
                                          least_of(kPanel, a.head_dim - column),
                                          bench.found + column * kMaxRows);
      });
    }
    for (int64_t r = 0; r < count; ++r) {
      put_partial(partials + (unit.partial + first + r) * size, maxima[r], sums[r],
                  bench.found + r * kPanel, kMaxRows * kPanel, shape.columns);
    }
  }
  bench.ahead.finish();
}

static inline int64_t keys_end(const Attention& a, const Unit& unit) {
  const TandemBatch& batch = *a.batch;
  const int64_t chunk = batch.query_starts[unit.sequence + 1] - batch.query_starts[unit.sequence];
  return batch.context_lens[unit.sequence] - chunk + unit.first_row + unit.num_rows;
}

// The units of few queries that one thread works on: run after run, as they are handed out.
struct Runs {
  Member& member;
  const UnitList& list;
  int64_t first_task;  // the number of the first run among the tasks
  int64_t at, end;     // of the run in hand

  void take(int64_t task) {
    at = (task - first_task) * list.run;
    end = least_of(at + list.run, list.split_units);
  }
  // The next unit, or -1.
  int64_t next() {
    if (at >= end) {
      const int64_t task = member.next();
      if (task < 0) return -1;
      take(task);
    }
    return at++;
  }
};

// All units of few queries that the thread gets. While one is worked on, the next is on its way.
template <class T>
static void attend_runs(const Attention& a, const AttentionShape& shape, const Unit* units,
                        Runs& runs, Workbench<T>& bench, float* partials) {
  const int64_t width = a.head_dim * static_cast<int64_t>(sizeof(T));
  const Unit* before = nullptr;
  int64_t i = runs.next();
  find_rows(a, units[i], units[i].first_tile, keys_end(a, units[i]), bench.rows[0]);
  bench.ahead.set(bench.rows[0], width);
  bench.ahead.finish();
  for (int side = 0; i >= 0; side = 1 - side) {
    const Unit& unit = units[i];
    const bool ends_run = runs.at == runs.end;
    i = runs.next();
    bench.ahead.clear();
    if (i >= 0) {
      find_rows(a, units[i], units[i].first_tile, keys_end(a, units[i]), bench.rows[1 - side]);
      bench.ahead.set(bench.rows[1 - side], width);
    }
    const bool fresh = before == nullptr || unit.sequence != before->sequence ||
                       unit.kv_head != before->kv_head;
    attend_tile<T>(a, shape, unit, bench.rows[side], fresh, bench, partials);
    before = &unit;
    if (ends_run) runs.member.completed(1);
  }
}

// Many queries of one sequence and KV head, over all tiles that they see.
template <class T>
static void attend_chunk(const Attention& a, const AttentionShape& shape, const Unit& unit,
                         Workbench<T>& bench) {
  constexpr int64_t kUnits = Workbench<T>::kUnits;
  const int64_t rows = unit.num_rows * shape.shared, size = bench.partial_size(shape.columns);
  TileRows<T>& tile_rows = bench.rows[0];
  for (int64_t row = 0; row < rows; ++row) {
    float* at = bench.merged + row * size;
    for (int64_t c = 0; c < size; ++c) at[c] = 0.0f;
    at[0] = -__builtin_inff();
  }
  const Groups groups(rows, kMaxRows);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.start(group);
    gather_query<T>(a, shape, unit, first, groups.size(group), bench.query + first * shape.head_units);
  }
  for (int64_t tile = unit.first_tile; tile < unit.first_tile + unit.num_tiles; ++tile) {
    find_rows(a, unit, tile, keys_end(a, unit), tile_rows);
    prefetch_rows(tile_rows.keys, 0, tile_rows.used, a.head_dim);
    prefetch_rows(tile_rows.values, 0, tile_rows.used, a.head_dim);
    for (int64_t first = 0; first < tile_rows.used; first += kPanel) {
      pack_keys(reinterpret_cast<const uint32_t* const*>(tile_rows.keys + first), shape.head_units,
                bench.keys + first * shape.head_units);
    }
    pack_values(tile_rows, a.head_dim, bench.values);
    const int64_t units = (tile_rows.used + kPerUnit<T> - 1) / kPerUnit<T>;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.start(group), count = groups.size(group);
      float maxima[kMaxRows], sums[kMaxRows];
      score_group<T, FromCache>(a, shape, unit, tile, tile_rows, first, count,
                                bench.query + first * shape.head_units, bench, maxima, sums);
      for (int64_t panel = 0; panel < shape.columns / kPanel; ++panel) {
        run_tile<T, RowsApart<kUnits>>(count, bench.weights, bench.values + panel * kUnits * kPanel,
                                   units, bench.found + panel * kMaxRows * kPanel);
      }
      for (int64_t r = 0; r < count; ++r) {
        merge(bench.merged + (first + r) * size, maxima[r], sums[r], bench.found + r * kPanel,
              kMaxRows * kPanel, shape.columns);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    write_out<T>(a, a.batch->query_starts[unit.sequence] + unit.first_row + row / shape.shared,
                 unit.kv_head * shape.shared + row % shape.shared, bench.merged + row * size);
  }
}

// Merge the partials of a sequence's tiles, in order, and write the result.
template <class T>
static void merge_tiles(const Attention& a, const AttentionShape& shape, const Merge& m,
                        float* partials) {
  const int64_t rows = m.num_rows * shape.shared;
  const int64_t size = Workbench<T>::partial_size(shape.columns);
  float* into = partials + m.partial * size;
  for (int64_t tile = 1; tile < m.num_tiles; ++tile) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = into + (tile * m.stride + row) * size;
      merge(into + row * size, from[0], from[1], from + kPanel, kPanel, shape.columns);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    write_out<T>(a, a.batch->query_starts[m.sequence] + row / shape.shared,
                 m.kv_head * shape.shared + row % shape.shared, into + row * size);
  }
}
