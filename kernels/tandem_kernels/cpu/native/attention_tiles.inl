// One tile of keys and values: where its rows lie in the blocks, and both products with it.
//
// Keys are turned into panels, in registers and through a buffer that stays in the first-level
// cache; values are read where they are. For the many queries of a prompt chunk values are put into
// panels too, once for all of them. Both roads add in the same order: the same bits.

alignas(64) static const uint32_t kZeros[TANDEM_MOST_HEAD_DIM] = {};  // stands for missing keys

// Where the keys and values of one tile and KV head lie; filled up to a whole panel with zeros.
template <class T>
struct TileRows {
  int64_t used, padded;
  const T* keys[kTileKeys];
  const T* values[kTileKeys];
};

template <class T>
static void find_rows(const Attention& a, const Unit& unit, int64_t tile, int64_t keys_end,
                      TileRows<T>& rows) {
  const TandemBatch& batch = *a.batch;
  const int64_t* table = batch.block_tables + unit.sequence * batch.table_width;
  const int64_t begin = tile * kTileKeys, step = a.kv_heads * a.head_dim;
  rows.used = least_of(kTileKeys, keys_end - begin);
  rows.padded = (rows.used + kPanel - 1) / kPanel * kPanel;
  int64_t block = begin / batch.block_size, offset = begin % batch.block_size;
  for (int64_t key = 0; key < rows.used; ++block, offset = 0) {
    int64_t at = table[block] * a.block_stride + offset * step + unit.kv_head * a.head_dim;
    for (; offset < batch.block_size && key < rows.used; ++offset, ++key, at += step) {
      rows.keys[key] = static_cast<const T*>(a.keys) + at;
      rows.values[key] = static_cast<const T*>(a.values) + at;
    }
  }
  for (int64_t key = rows.used; key < rows.padded; ++key) {
    rows.keys[key] = rows.values[key] = reinterpret_cast<const T*>(kZeros);
  }
}

// Ask for rows [from, to) of a tile that is next. Blocks lie anywhere and rows of other heads lie
// between ours: the processor's own prefetcher does not follow.
template <class T>
static inline void prefetch_rows(const T* const* rows, int64_t from, int64_t to, int64_t width) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t key = from; key < to; ++key) {
    for (int64_t ahead = 0; ahead < width; ahead += kLine) __builtin_prefetch(rows[key] + ahead);
  }
}

#if VW == 16
// Put units [offset, offset + count) of 16 rows, count up to 16, into columns: to[unit][row].
static void transpose_16(const uint32_t* const* rows, int64_t offset, int64_t count, uint32_t* to) {
  const __mmask16 kept = static_cast<__mmask16>((1u << count) - 1);
  __m512i in[16], out[16];
  for (int i = 0; i < 16; ++i) in[i] = _mm512_maskz_loadu_epi32(kept, rows[i] + offset);
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
    in[i] = _mm512_shuffle_i32x4(out[i], out[i + 8], 0x88);
    in[i + 8] = _mm512_shuffle_i32x4(out[i], out[i + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) {
    if (i < count) _mm512_storeu_si512(to + i * kPanel, in[i]);
  }
}
#endif

// Lay the keys at rows[0..32) out as one panel, [head units][32].
static void pack_keys(const uint32_t* const* rows, int64_t units, uint32_t* panel) {
#if VW == 16
  for (int64_t done = 0; done < units; done += 16) {
    const int64_t count = units - done < 16 ? units - done : 16;
    transpose_16(rows, done, count, panel + done * kPanel);
    transpose_16(rows + 16, done, count, panel + done * kPanel + 16);
  }
#else
  for (int key = 0; key < kPanel; ++key) {
    for (int64_t k = 0; k < units; ++k) panel[k * kPanel + key] = rows[key][k];
  }
#endif
}

// One unit row of a panel over columns of a head: the values of the keys that share a unit.
static inline void value_units(const float* const* rows, int64_t column, int64_t count,
                               uint32_t* to) {
  const float* from = rows[0] + column;
  if (count == kPanel) {
    __builtin_memcpy(to, from, kPanel * 4);
    return;
  }
  float* out = reinterpret_cast<float*>(to);
#if VW == 16
  _mm512_storeu_ps(out, _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1u << count) - 1, from));
  const __mmask16 high = count > 16 ? (1u << (count - 16)) - 1 : 0;
  _mm512_storeu_ps(out + 16, _mm512_maskz_loadu_ps(high, from + 16));
#else
  for (int64_t c = 0; c < kPanel; ++c) out[c] = c < count ? from[c] : 0.0f;
#endif
}

static inline void value_units(const bf16* const* rows, int64_t column, int64_t count,
                               uint32_t* to) {
  const bf16 *first = rows[0] + column, *second = rows[1] + column;
#if VW == 16
  const __mmask32 mask = count == kPanel ? ~0u : (1u << count) - 1;
  const __m512i whole_a = _mm512_maskz_loadu_epi16(mask, first);
  const __m512i whole_b = _mm512_maskz_loadu_epi16(mask, second);
  const __m512i a = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(whole_a));
  const __m512i b = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(whole_b));
  const __m512i a_high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(whole_a, 1));
  const __m512i b_high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(whole_b, 1));
  _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  _mm512_storeu_si512(to + 16, _mm512_or_si512(a_high, _mm512_slli_epi32(b_high, 16)));
#else
  for (int64_t c = 0; c < kPanel; ++c) {
    to[c] = c < count ? first[c].bits | static_cast<uint32_t>(second[c].bits) << 16 : 0;
  }
#endif
}

// `count` columns of a row, or a copy that is filled up with zeros to a whole panel.
template <class T>
static inline const T* whole_columns(const T* row, int64_t count, T* copy) {
  if (count == kPanel) return row;
  for (int64_t c = 0; c < kPanel; ++c) copy[c] = c < count ? row[c] : T{};
  return copy;
}

// tile [R][32] = the weights of R rows, [R][units of a tile], times one panel's columns of values.
// Asks memory for two lines of `ahead` at every step.
template <class T, int R>
struct ValueTile {
  static void run(const uint32_t* weights, const T* const* values, const void* const* ahead,
                  int64_t units, int64_t column, int64_t count, float* tile);
};

#if defined(TANDEM_DPBF16)
template <int R>
struct ValueTile<bf16, R> {
  static void run(const uint32_t* weights, const bf16* const* values, const void* const* ahead,
                  int64_t units, int64_t column, int64_t count, float* tile) {
    __m512 low[R], high[R];
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_ps();
    const __mmask32 mask = count == kPanel ? ~0u : (1u << count) - 1;
    for (int64_t k = 0; k < units; ++k) {
      FetchingLines::look_ahead(nullptr, ahead, k);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, values[2 * k] + column);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, values[2 * k + 1] + column);
      // Pairs of columns 0-3, 8-11, ... and of columns 4-7, 12-15, ...
      const __m512bh even = (__m512bh)_mm512_unpacklo_epi16(a, b);
      const __m512bh odd = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const uint32_t weight = weights[r * (kTileKeys / 2) + k];
        const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(weight));
        low[r] = _mm512_dpbf16_ps(low[r], even, both);
        high[r] = _mm512_dpbf16_ps(high[r], odd, both);
      }
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_castps_si512(low[r]), b = _mm512_castps_si512(high[r]);
      _mm512_storeu_si512(tile + r * kPanel, _mm512_permutex2var_epi64(a, first, b));
      _mm512_storeu_si512(tile + r * kPanel + 16, _mm512_permutex2var_epi64(a, second, b));
    }
  }
};
#else
template <int R>
struct ValueTile<bf16, R> {
  static void run(const uint32_t* weights, const bf16* const* values, const void* const* ahead,
                  int64_t units, int64_t column, int64_t count, float* tile) {
    vf sum[R][kLanes];
    bf16 copies[2][kPanel];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) sum[r][v] = vf{};
    for (int64_t k = 0; k < units; ++k) {
      FetchingLines::look_ahead(nullptr, ahead, k);
      const bf16* a = whole_columns(values[2 * k] + column, count, copies[0]);
      const bf16* b = whole_columns(values[2 * k + 1] + column, count, copies[1]);
#pragma GCC unroll 8
      for (int v = 0; v < kLanes; ++v) {
        const vf first = widen_lanes(a + v * VW), second = widen_lanes(b + v * VW);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const uint32_t pair = weights[r * (kTileKeys / 2) + k];
          sum[r][v] += first * bits_as_float((vu){} + (pair << 16));
          sum[r][v] += second * bits_as_float((vu){} + (pair & 0xffff0000u));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) store(tile + r * kPanel + v * VW, sum[r][v]);
  }
};
#endif

template <int R>
struct ValueTile<float, R> {
  static void run(const uint32_t* weights, const float* const* values, const void* const* ahead,
                  int64_t units, int64_t column, int64_t count, float* tile) {
    vf sum[R][kLanes];
    float copy[kPanel];
    const float* factors = reinterpret_cast<const float*>(weights);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) sum[r][v] = vf{};
    for (int64_t k = 0; k < units; ++k) {
      FetchingLines::look_ahead(nullptr, ahead, k);
      const float* row = whole_columns(values[k] + column, count, copy);
      vf columns[kLanes];
#pragma GCC unroll 8
      for (int v = 0; v < kLanes; ++v) columns[v] = load<vf>(row + v * VW);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf both = splat(factors[r * kTileKeys + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kLanes; ++v) sum[r][v] += columns[v] * both;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) store(tile + r * kPanel + v * VW, sum[r][v]);
  }
};
