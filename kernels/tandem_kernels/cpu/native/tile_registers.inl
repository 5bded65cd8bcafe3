// Matrix tiles: eight registers of 16 rows of 64 bytes, and their product of bfloat16 pairs.
//
// TANDEM_TILES set to 1: Intel's AMX. Set to 2: the same operations in plain C++, by the manual's
// description of TDPBF16PS, so that what is written on them is tested on processors without AMX.

constexpr int kTileRows = 16;   // rows of a tile
constexpr int kTileUnits = 16;  // units of 32 bits in one of its rows

#if TANDEM_TILES == 1

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A thread's tiles, from here to the end of its scope.
class Tiles {
 public:
  Tiles() {
    const TileConfig config;
    settle_memory(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

// The instructions want the number of a register as a literal.
#define TANDEM_WITH_TILE(N, CALL)      \
  if constexpr (N == 0) { CALL(0); }   \
  if constexpr (N == 1) { CALL(1); }   \
  if constexpr (N == 2) { CALL(2); }   \
  if constexpr (N == 3) { CALL(3); }   \
  if constexpr (N == 4) { CALL(4); }   \
  if constexpr (N == 5) { CALL(5); }   \
  if constexpr (N == 6) { CALL(6); }   \
  if constexpr (N == 7) { CALL(7); }

  template <int N>
  inline void zero() {
#define TANDEM_CALL(I) _tile_zero(I)
    TANDEM_WITH_TILE(N, TANDEM_CALL)
#undef TANDEM_CALL
  }
  // Read 16 rows of 64 bytes that begin `stride` bytes apart.
  template <int N>
  inline void load(const void* from, int64_t stride) {
#define TANDEM_CALL(I) _tile_loadd(I, from, stride)
    settle_memory(from);
    TANDEM_WITH_TILE(N, TANDEM_CALL)
#undef TANDEM_CALL
  }
  template <int N>
  inline void store(void* to, int64_t stride) {
#define TANDEM_CALL(I) _tile_stored(I, to, stride)
    TANDEM_WITH_TILE(N, TANDEM_CALL)
    settle_memory(to);
#undef TANDEM_CALL
  }
  // Sums C, registers 0 to 3, are of rows A, 4 and 5, and columns B, 6 and 7.
  template <int A, int B>
  inline void multiply() {
    static_assert((A == 4 || A == 5) && (B == 6 || B == 7));
    if constexpr (A == 4 && B == 6) _tile_dpbf16ps(0, 4, 6);
    if constexpr (A == 4 && B == 7) _tile_dpbf16ps(1, 4, 7);
    if constexpr (A == 5 && B == 6) _tile_dpbf16ps(2, 5, 6);
    if constexpr (A == 5 && B == 7) _tile_dpbf16ps(3, 5, 7);
  }
#undef TANDEM_WITH_TILE

 private:
  // Some compilers' intrinsics do not say that they touch memory.
  static inline void settle_memory(const void* at) { __asm__ volatile("" ::"r"(at) : "memory"); }
};

#else

class Tiles {
 public:
  template <int N>
  void zero() {
    __builtin_memset(tiles_[N], 0, sizeof tiles_[N]);
  }
  template <int N>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row)
      __builtin_memcpy(tiles_[N][row], static_cast<const char*>(from) + row * stride, 64);
  }
  template <int N>
  void store(void* to, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row)
      __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles_[N][row], 64);
  }
  template <int A, int B>
  void multiply() {
    static_assert((A == 4 || A == 5) && (B == 6 || B == 7));
    constexpr int kSums = (A - 4) * 2 + (B - 6);
    for (int row = 0; row < kTileRows; ++row) {
      for (int column = 0; column < kTileUnits; ++column) {
        float first = 0, second = 0;
        for (int k = 0; k < kTileUnits; ++k) {
          const uint32_t a = tiles_[A][row][k], b = tiles_[B][k][column];
          first = __builtin_fmaf(low_half(a), low_half(b), first);
          second = __builtin_fmaf(high_half(a), high_half(b), second);
        }
        float sum;
        __builtin_memcpy(&sum, &tiles_[kSums][row][column], 4);
        sum = without_denormals(sum) + without_denormals(first + second);
        sum = without_denormals(sum);
        __builtin_memcpy(&tiles_[kSums][row][column], &sum, 4);
      }
    }
  }

 private:
  static float without_denormals(float value) {
    return __builtin_fabsf(value) < 1.17549435e-38f ? 0.0f : value;
  }
  static float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return without_denormals(value);
  }
  static float low_half(uint32_t unit) { return from_bits(unit << 16); }
  static float high_half(uint32_t unit) { return from_bits(unit & 0xffff0000u); }

  uint32_t tiles_[8][kTileRows][kTileUnits] = {};
};

#endif
