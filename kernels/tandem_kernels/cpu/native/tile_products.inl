// Rows times a panel of 32 columns on matrix tiles: up to 32 rows at once, in four sums of 16 x 16.
//
// Every number of rows goes through the same sums, padded with rows of zeros, so the bits of a row do
// not depend on how many there are.

constexpr int kMostTiledRows = 2 * kTileRows;

static inline int64_t padded_units(int64_t units) {
  return (units + kTileUnits - 1) / kTileUnits * kTileUnits;
}

// Lay a group's rows, each `units` long, out one after the other, filled up with zeros to whole tiles.
static void pad_rows(const uint32_t* rows, int64_t count, int64_t units, uint32_t* packed) {
  const int64_t width = padded_units(units);
  for (int64_t r = 0; r < kMostTiledRows; ++r) {
    const int64_t filled = r < count ? units : 0;
    if (filled > 0)
      __builtin_memcpy(packed + r * width, rows + r * units, static_cast<size_t>(units) * 4);
    __builtin_memset(packed + r * width + filled, 0, static_cast<size_t>(width - filled) * 4);
  }
}

// One step of 16 units: x begins at the step, rows `width` units apart; `columns` is [16][32].
template <bool Both>
static inline void multiply_step(Tiles& tiles, const uint32_t* x, int64_t width,
                                 const uint32_t* columns) {
  tiles.load<6>(columns, kPanel * 4);
  tiles.load<7>(columns + kTileUnits, kPanel * 4);
  tiles.load<4>(x, width * 4);
  tiles.multiply<4, 6>();
  tiles.multiply<4, 7>();
  if constexpr (Both) {
    tiles.load<5>(x + kTileRows * width, width * 4);
    tiles.multiply<5, 6>();
    tiles.multiply<5, 7>();
  }
}

template <bool Both>
static void tiled_product(Tiles& tiles, const uint32_t* x, const uint32_t* panel, int64_t units,
                          float* out) {
  const int64_t width = padded_units(units), whole = units / kTileUnits * kTileUnits;
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t k = 0; k < whole; k += kTileUnits) {
    for (int line = 0; line < 2 * kTileUnits; ++line)  // the panel 8 KiB ahead, wherever it ends
      __builtin_prefetch(panel + k * kPanel + 2048 + line * 16);
    multiply_step<Both>(tiles, x + k, width, panel + k * kPanel);
  }
  if (whole < units) {
    alignas(64) uint32_t rest[kTileUnits * kPanel] = {};
    __builtin_memcpy(rest, panel + whole * kPanel, static_cast<size_t>((units - whole) * kPanel) * 4);
    multiply_step<Both>(tiles, x + whole, width, rest);
  }
  tiles.store<0>(out, kPanel * 4);
  tiles.store<1>(out + kTileUnits, kPanel * 4);
  if constexpr (Both) {
    tiles.store<2>(out + kTileRows * kPanel, kPanel * 4);
    tiles.store<3>(out + kTileRows * kPanel + kTileUnits, kPanel * 4);
  }
}

// out [32][32] = the inner products of padded rows with one panel [units][32]; those beyond `rows`
// may be left as they were.
static void tiled_product(Tiles& tiles, int64_t rows, const uint32_t* x, const uint32_t* panel,
                          int64_t units, float* out) {
  rows > kTileRows ? tiled_product<true>(tiles, x, panel, units, out)
                   : tiled_product<false>(tiles, x, panel, units, out);
}

struct TiledProducts {
  static constexpr int kRows = kMostTiledRows;
  static int64_t room(int64_t rows, int64_t units) {
    return Groups(rows, kRows).count * kRows * padded_units(units);
  }
  static int64_t offset(const Groups&, int64_t group, int64_t units) {
    return group * kRows * padded_units(units);
  }
  void operator()(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t units, float* out) {
    tiled_product(tiles_, rows, x, panel, units, out);
  }
  // All threads; one phase.
  static const uint32_t* pack(Member& member, const uint32_t* x, const Groups& groups, int64_t units,
                              uint32_t* packed) {
    member.phase(groups.count, [&](int64_t group) {
      pad_rows(x + groups.start(group) * units, groups.size(group), units,
               packed + offset(groups, group, units));
    });
    return packed;
  }

 private:
  Tiles tiles_;
};
