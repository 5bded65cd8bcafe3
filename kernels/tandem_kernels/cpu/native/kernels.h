// One table of entry points per instruction set; `api.cpp` picks one at start.
//
// `Scratch` is the memory that a context lends to a region; it only grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "abi.h"
#include "team.h"

// Whether the compiler knows matrix tiles: GCC and Clang from version 11 on, unless
// TANDEM_WITHOUT_AMX is defined.
#if defined(__x86_64__) && !defined(TANDEM_WITHOUT_AMX)
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>))
#define TANDEM_HAS_AMX
#endif
#endif

namespace tandem {

// Asks for huge pages where a whole one fits: weights and KV are read faster than 4 KiB pages can be
// looked up. Only advice: nothing depends on it.
void prefer_huge_pages(void* memory, int64_t bytes);

// A buffer of one kind that grows and never shrinks. 64-byte aligned, contents undefined.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* reserve(int64_t bytes) {
    if (bytes > capacity_) {
#if defined(__SANITIZE_ADDRESS__)
      const int64_t rounded = (bytes + 63) / 64 * 64;  // tight, so that a step past it is seen
#else
      const int64_t rounded = (bytes + bytes / 8 + 4095) / 4096 * 4096;
#endif
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(64, static_cast<size_t>(rounded));
      if (data_ == nullptr) throw std::bad_alloc();
      prefer_huge_pages(data_, rounded);
      capacity_ = rounded;
    }
    return data_;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

struct Scratch {
  Buffer residual;   // float32 [tokens, hidden]
  Buffer normed;     // T [tokens, hidden]
  Buffer angles;     // float32 [tokens, head_dim]
  Buffer projected;  // float32 [tokens, qkv outputs]
  Buffer query;      // T [tokens, heads * head_dim]
  Buffer seen;       // T [tokens, heads * head_dim]
  Buffer inner;      // T [tokens, inner]
  Buffer packed;     // the input of a linear layer, in groups of rows
  Buffer windows;    // the different windows of the layers, and where in the two below theirs is
  Buffer units;      // the work lists of attention
  Buffer merges;     // the lists of what is merged after it
  Buffer partials;   // what attention found in each tile of keys
  Buffer gathered;   // rows that the last layer keeps
  Buffer per_thread;
};

struct Forward {
  const TandemModel* model;
  const TandemBatch* batch;
  const TandemCache* cache;
  const int64_t* token_ids;
  int64_t first_layer;
  int64_t num_layers;
  const int64_t* wanted_rows;
  int64_t num_wanted;  // -1: all rows, in their order
  void* hidden;        // T [num_wanted, hidden], written by the last layer
};

struct Attention {
  const TandemBatch* batch;
  const void* query;
  const void* keys;
  const void* values;
  int64_t block_stride;
  void* output;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  float scale;
  int64_t window;
};

// The likeliest token of each row, or, with temperatures, a draw; with top_k and the two after it, a
// draw from what they leave.
struct Choice {
  const float* logits;  // [rows, vocab]
  int64_t rows, vocab;
  const float* temperatures;  // [rows], as all that follows, or null
  const int64_t* seeds;
  const int64_t* positions;
  const int64_t* top_k;  // or null, with the two after it
  const double* top_p;
  const float* min_p;
  int64_t* out;
};

struct Kernels {
  const char* name;
  void (*pack)(int64_t dtype, const void* weight, int64_t rows, int64_t inputs, uint32_t* panels,
               int64_t first_panel, int64_t panel_step);
  void (*linear)(Team&, Scratch&, int64_t dtype, const TandemLinear&, const void* x, int64_t rows,
                 float* out);
  void (*silu_linear)(Team&, Scratch&, int64_t dtype, const TandemLinear&, const void* x,
                      int64_t rows, void* out);
  void (*rms_norm)(Team&, int64_t dtype, const float* x, const void* weight, int64_t rows,
                   int64_t width, float eps, void* out);
  void (*rotary_kv_write)(Team&, Scratch&, const TandemModel&, const TandemLayer&, const TandemBatch&,
                          const float* projected, void* query, void* keys, void* values,
                          int64_t block_stride);
  void (*attention)(Team&, Scratch&, int64_t dtype, const Attention&);
  void (*forward)(Team&, Scratch&, const Forward&);
  void (*choose)(Team&, Scratch&, const Choice&);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif
#if defined(TANDEM_HAS_AMX)
extern const Kernels kAmxKernels;
#endif
extern const Kernels kEmulatedAmxKernels;

}  // namespace tandem
