// How attention is cut into pieces of work.
//
// The context is cut into tiles of 128 keys at fixed positions. What a query finds in a tile is
// computed by itself and tiles are merged in order, so a query's bits depend neither on the chunk
// or batch that it came in nor on the number of threads.

constexpr int64_t kTileKeys = 128;
constexpr int64_t kChunkRows = 192;  // query rows (tokens times heads per KV head) of a chunk's unit
constexpr int64_t kFewRows = 16;     // up to so many rows, each tile is a unit of its own
constexpr int64_t kRun = 8;          // most such units that a thread takes at a time

// Some queries of one sequence and one KV head. Many queries: all tiles that they see, written to
// the output. Few queries: one tile, and what they found goes to `partial`.
struct Unit {
  int64_t sequence, kv_head, first_row, num_rows, first_tile, num_tiles;
  int64_t partial;  // index of its first partial, or -1
};

// The partials of one sequence and KV head: tile by tile, `stride` partials apart.
struct Merge {
  int64_t sequence, kv_head, num_rows, num_tiles, partial, stride;
};

struct UnitList {
  int64_t units, merges, partials;
  // The units of few queries come first; a thread takes a run of them, to look ahead.
  int64_t split_units, run;
};

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct AttentionShape {
  int64_t shared;      // query heads per KV head
  int64_t head_units;  // units of one head
  int64_t columns;     // head_dim, filled up to whole panels
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

// The units of a sequence of few queries, `kRun` tiles of a head in turn: a thread goes on with the
// queries that it has, and the heads of those tiles, which lie side by side in memory, are read soon
// after each other.
static void list_split(const Attention& a, int64_t sequence, int64_t rows, UnitList& list,
                       Unit* units, Merge* merges) {
  const int64_t end = a.batch->context_lens[sequence], count = rows * (a.heads / a.kv_heads);
  const int64_t from = first_tile(a, end - rows), tiles = (end - 1) / kTileKeys + 1 - from;
  if (units != nullptr) {
    Unit* unit = units + list.units;
    for (int64_t first = 0; first < tiles; first += kRun) {
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        for (int64_t tile = first; tile < least_of(first + kRun, tiles); ++tile) {
          *unit++ = {sequence, head, 0, rows, from + tile, 1,
                     list.partials + (tile * a.kv_heads + head) * count};
        }
      }
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      merges[list.merges + head] = {sequence, head, rows, tiles, list.partials + head * count,
                                    a.kv_heads * count};
    }
  }
  list.units += tiles * a.kv_heads;
  list.merges += a.kv_heads;
  list.partials += tiles * a.kv_heads * count;
}

// The units of a prompt chunk, the longest first.
static void list_chunk(const Attention& a, int64_t sequence, int64_t rows, UnitList& list,
                       Unit* units) {
  const int64_t start = a.batch->context_lens[sequence] - rows, step = chunk_rows(a);
  for (int64_t row = (rows - 1) / step * step; row >= 0; row -= step) {
    const int64_t count = least_of(step, rows - row);
    const int64_t from = first_tile(a, start + row);
    const int64_t to = (start + row + count - 1) / kTileKeys + 1;
    for (int64_t head = 0; head < a.kv_heads; ++head, ++list.units) {
      if (units != nullptr) units[list.units] = {sequence, head, row, count, from, to - from, -1};
    }
  }
}

// Split the batch into units; writes them if there is room given for them.
static UnitList list_units(const Attention& a, int threads, Unit* units, Merge* merges) {
  const TandemBatch& batch = *a.batch;
  UnitList list{0, 0, 0, 0, 1};
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t s = 0; s < batch.num_sequences; ++s) {
      const int64_t rows = batch.query_starts[s + 1] - batch.query_starts[s];
      const bool split = rows * (a.heads / a.kv_heads) <= kFewRows;
      if (rows == 0 || split != (pass == 0)) continue;
      split ? list_split(a, s, rows, list, units, merges) : list_chunk(a, s, rows, list, units);
    }
    if (pass == 0) list.split_units = list.units;
  }
  list.run = most_of(1, least_of(kRun, list.split_units / (threads * 4)));
  return list;
}
