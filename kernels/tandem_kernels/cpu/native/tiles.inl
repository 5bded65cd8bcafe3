// The inner loop of everything: some rows times one panel of 32 columns.
//
// Every element is one chain of multiply-adds over the inputs in order, so its bits depend neither
// on the other rows nor on how rows are grouped.

constexpr int kPanel = 32;
constexpr int kLanes = kPanel / VW;  // vectors across a panel

// How a tile reads its rows, in turn, [units][rows], or one after the other, `kStep` units apart;
// and what it asks memory for meanwhile. A little at every step: a burst of prefetches would only
// fill the core's miss buffers and stop it.
struct FromMemory {  // a panel that is streamed: the processor's own prefetcher stops at page ends
  static constexpr int64_t kStep = 0;
  static constexpr bool kLooksAhead = false;
  static inline void look_ahead(const uint32_t* panel, const void* const*, int64_t k) {
    __builtin_prefetch(panel + k * kPanel + 2048);
    __builtin_prefetch(panel + k * kPanel + 2048 + 16);
  }
};
struct FromCache {
  static constexpr int64_t kStep = 0;
  static constexpr bool kLooksAhead = false;
  static inline void look_ahead(const uint32_t*, const void* const*, int64_t) {}
};
struct FetchingLines {  // a panel in the cache; `ahead` are two lines for every step
  static constexpr int64_t kStep = 0;
  static constexpr bool kLooksAhead = true;
  static inline void look_ahead(const uint32_t*, const void* const* ahead, int64_t k) {
    __builtin_prefetch(ahead[2 * k]);
    __builtin_prefetch(ahead[2 * k + 1]);
  }
};
template <int64_t Step>
struct RowsApart {
  static constexpr int64_t kStep = Step;
  static constexpr bool kLooksAhead = false;
  static inline void look_ahead(const uint32_t*, const void* const*, int64_t) {}
};

template <class Rows, int R>
static inline int64_t unit_at(int64_t k, int r) {
  return Rows::kStep == 0 ? k * R + r : r * Rows::kStep + k;
}

template <class T, int R, class Rows>
struct Tile {
  // tile [R][32] = the inner products of R rows with one panel [units][32].
  static void run(const uint32_t* x, const uint32_t* panel, int64_t units, float* tile,
                  const void* const* ahead);
};

#if defined(TANDEM_DPBF16)
template <int R, class Rows>
struct Tile<bf16, R, Rows> {
  static void run(const uint32_t* x, const uint32_t* panel, int64_t units, float* tile,
                  const void* const* ahead) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < units; ++k) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(panel + k * kPanel);
      const __m512bh high = (__m512bh)_mm512_loadu_si512(panel + k * kPanel + 16);
      Rows::look_ahead(panel, ahead, k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[unit_at<Rows, R>(k, r)]));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], low, both);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], high, both);
      }
    }
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(tile + r * kPanel, sum[r][0]);
      _mm512_storeu_ps(tile + r * kPanel + 16, sum[r][1]);
    }
  }
};
#else
template <int R, class Rows>
struct Tile<bf16, R, Rows> {
  static void run(const uint32_t* x, const uint32_t* panel, int64_t units, float* tile,
                  const void* const* ahead) {
    vf sum[R][kLanes];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) sum[r][v] = vf{};
    for (int64_t k = 0; k < units; ++k) {
      Rows::look_ahead(panel, ahead, k);
#pragma GCC unroll 8
      for (int v = 0; v < kLanes; ++v) {
        const vu both = load<vu>(panel + k * kPanel + v * VW);
        const vf first = bits_as_float(both << 16), second = bits_as_float(both & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const uint32_t pair = x[unit_at<Rows, R>(k, r)];
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

template <int R, class Rows>
struct Tile<float, R, Rows> {
  static void run(const uint32_t* x, const uint32_t* panel, int64_t units, float* tile,
                  const void* const* ahead) {
    vf sum[R][kLanes];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) sum[r][v] = vf{};
    const float* rows = reinterpret_cast<const float*>(x);
    const float* weights = reinterpret_cast<const float*>(panel);
    for (int64_t k = 0; k < units; ++k) {
      Rows::look_ahead(panel, ahead, k);
      vf column[kLanes];
#pragma GCC unroll 8
      for (int v = 0; v < kLanes; ++v) column[v] = load<vf>(weights + k * kPanel + v * VW);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf both = splat(rows[unit_at<Rows, R>(k, r)]);
#pragma GCC unroll 8
        for (int v = 0; v < kLanes; ++v) sum[r][v] += column[v] * both;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kLanes; ++v) store(tile + r * kPanel + v * VW, sum[r][v]);
  }
};

// Calls `function` with a count of rows, 1 to kMaxRows, as a constant.
template <class Function>
static inline void with_rows(int64_t rows, Function&& function) {
  switch (rows) {
#define TANDEM_CASE(R) \
  case R:              \
    return function(std::integral_constant<int, (R <= kMaxRows ? R : 1)>{});
    TANDEM_CASE(1)
    TANDEM_CASE(2)
    TANDEM_CASE(3)
    TANDEM_CASE(4)
    TANDEM_CASE(5)
    TANDEM_CASE(6)
    TANDEM_CASE(7)
    TANDEM_CASE(8)
    TANDEM_CASE(9)
    TANDEM_CASE(10)
    TANDEM_CASE(11)
    TANDEM_CASE(12)
    TANDEM_CASE(13)
#undef TANDEM_CASE
    default:
      return;
  }
}

template <class T, class Rows>
static void run_tile(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t units,
                     float* tile, const void* const* ahead = nullptr) {
  with_rows(rows,
            [&](auto count) { Tile<T, count.value, Rows>::run(x, panel, units, tile, ahead); });
}
