// The C interface of the library: plain structs of numbers and pointers, mirrored by
// `tandem_kernels/cpu/library.py`. Whoever calls owns every buffer; nothing is kept but the context.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TANDEM_MOST_HEAD_DIM 1024

enum TandemDtype { TANDEM_FLOAT32 = 0, TANDEM_BFLOAT16 = 1 };

// A weight matrix [outputs, inputs], packed by tandem_pack_weight. Its panels hold 32 outputs each:
// [panels][inputs / per unit][32] units of 32 bits, a unit being one float32 or two bfloat16 of
// neighbouring inputs. Outputs are filled up to whole panels with zeros.
struct TandemLinear {
  const uint32_t* panels;
  const void* bias;  // [outputs], or null
  int64_t outputs;
  int64_t inputs;
};

struct TandemLayer {
  const void* attention_norm;
  const void* feed_forward_norm;
  const void* head_norm;  // [heads + kv_heads, head_dim], or null
  struct TandemLinear qkv;
  struct TandemLinear output;
  struct TandemLinear gate_up;  // panels of gate and up in turn; bias [2, inner]
  struct TandemLinear down;
  int64_t window;  // 0: none
};

struct TandemModel {
  int64_t dtype;
  int64_t num_layers;
  int64_t hidden;
  int64_t inner;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  double eps;
  const struct TandemLayer* layers;
  const void* final_norm;
  struct TandemLinear embedding;
  const float* inverse_frequencies;  // [head_dim / 2]
};

// Field by field a `RaggedBatch`.
struct TandemBatch {
  int64_t num_sequences;
  int64_t num_tokens;
  int64_t table_width;
  int64_t block_size;
  const int64_t* query_starts;
  const int64_t* context_lens;
  const int64_t* block_tables;
  const int64_t* positions;
  const int64_t* slots;
};

// A plane is one layer's keys, or its values, of all blocks: [num_blocks][block_size, kv_heads,
// head_dim], blocks `block_stride` elements apart. Plane 2 * layer holds keys, the next one values;
// they begin `plane_stride` elements apart.
struct TandemCache {
  void* kv;
  int64_t plane_stride;
  int64_t block_stride;
};

#ifdef __cplusplus
}
#endif
