// Vectors of VW floats, on GCC's and Clang's vector extensions, and conversions to and from the
// two dtypes. Included once per instruction set, inside that set's namespace.

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));

struct bf16 {
  uint16_t bits;
};

template <class V, class S>
static inline V load(const S* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class S>
static inline void store(S* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

static inline vf splat(float value) { return value - (vf){}; }

static inline vf bits_as_float(vu bits) { return (vf)bits; }

static inline float widen(float value) { return value; }
static inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t round_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void narrow(float value, float* to) { *to = value; }
static inline void narrow(float value, bf16* to) { to->bits = round_bits(value); }

// The same for VW values that lie together.
typedef uint16_t vh __attribute__((vector_size(VW * 2)));

static inline vf widen_lanes(const float* from) { return load<vf>(from); }
static inline vf widen_lanes(const bf16* from) {
  return bits_as_float(__builtin_convertvector(load<vh>(from), vu) << 16);
}

static inline void narrow_lanes(vf value, float* to) { store(to, value); }
static inline void narrow_lanes(vf value, bf16* to) {
  const vu bits = (vu)value;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu nan = (vu)(value != value);
  store(to, __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh));
}

// A unit is 32 bits: one float32, or two bfloat16 of neighbouring inputs.
template <class T>
constexpr int64_t kPerUnit = 4 / sizeof(T);

#if VW == 16
static inline float sum_lanes(vf value) { return _mm512_reduce_add_ps((__m512)value); }
static inline float max_lanes(vf value) { return _mm512_reduce_max_ps((__m512)value); }
#else
static inline float sum_lanes(vf value) {
  float total = 0;
  for (int lane = 0; lane < VW; ++lane) total += value[lane];
  return total;
}

static inline float max_lanes(vf value) {
  float most = value[0];
  for (int lane = 1; lane < VW; ++lane) most = value[lane] > most ? value[lane] : most;
  return most;
}
#endif

// e to the x, within two units in the last place; 0 below -87.3. Cephes' polynomial.
static inline vf exp_lanes(vf x) {
  const vf low = splat(-87.3f), high = splat(88.0f);
  const vi below = x < low;
  x = (vf)((vi)x & ~below) + (vf)((vi)low & below);
  x = x > high ? high : x;
  const vf magic = splat(12582912.0f);
  const vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  const vf result = p * (vf)exponent;
  return (vf)((vi)result & ~below);
}

static inline float exp_one(float x) { return exp_lanes(splat(x))[0]; }
