// All kernels for one instruction set. The including file sets:
//   TANDEM_NAMESPACE, TANDEM_KERNELS, TANDEM_NAME: what this set is called,
//   VW: floats per vector; kMaxRows: rows that the registers hold beside a panel of 32 outputs,
//   TANDEM_DPBF16: defined where there is an instruction for bfloat16 inner products,
//   TANDEM_TILES: defined where linear layers in bfloat16 run on matrix tiles; see tile_registers.inl.
// It switches the compiler to the set after the system headers, and everything here has internal
// linkage, so no code of this set can be picked on a machine without it.

namespace tandem {
namespace TANDEM_NAMESPACE {
namespace {

#include "vectors.inl"

constexpr int kMaxRows = TANDEM_MAX_ROWS;

#include "tiles.inl"
#include "groups.inl"
#if defined(TANDEM_TILES)
#include "tile_registers.inl"
#include "tile_products.inl"
#endif
#include "linear.inl"

#include "attention_units.inl"
#include "attention_tiles.inl"
#include "attention_lookahead.inl"
#include "attention_partials.inl"
#include "attention.inl"
#include "attention_phase.inl"
#include "layers.inl"
#include "forward.inl"
#include "truncation.inl"
#include "sampling.inl"

void pack(int64_t dtype, const void* weight, int64_t rows, int64_t inputs, uint32_t* panels,
          int64_t first_panel, int64_t panel_step) {
  if (dtype == TANDEM_BFLOAT16) {
    pack_weight(static_cast<const bf16*>(weight), rows, inputs, panels, first_panel, panel_step);
  } else {
    pack_weight(static_cast<const float*>(weight), rows, inputs, panels, first_panel, panel_step);
  }
}

struct LinearCall {
  Scratch& scratch;
  const TandemLinear& linear;
  const void* x;
  int64_t rows;
  void* out;
};

template <class T>
void linear_region(Member& member, void* argument) {
  const LinearCall& c = *static_cast<const LinearCall*>(argument);
  linear_phase<T, false>(member, c.scratch, c.linear, c.x, c.rows, static_cast<float*>(c.out));
}

template <class T>
void gated_region(Member& member, void* argument) {
  const LinearCall& c = *static_cast<const LinearCall*>(argument);
  gated_phase<T>(member, c.scratch, c.linear, c.x, c.rows, static_cast<T*>(c.out));
}

void linear(Team& team, Scratch& scratch, int64_t dtype, const TandemLinear& linear, const void* x,
            int64_t rows, float* out) {
  const bool half = dtype == TANDEM_BFLOAT16;
  scratch.packed.reserve(half ? packed_bytes<bf16>(rows, linear.inputs)
                              : packed_bytes<float>(rows, linear.inputs));
  LinearCall call{scratch, linear, x, rows, out};
  team.run(half ? linear_region<bf16> : linear_region<float>, &call);
}

void silu_linear(Team& team, Scratch& scratch, int64_t dtype, const TandemLinear& linear,
                 const void* x, int64_t rows, void* out) {
  const bool half = dtype == TANDEM_BFLOAT16;
  scratch.packed.reserve(half ? packed_bytes<bf16>(rows, linear.inputs)
                              : packed_bytes<float>(rows, linear.inputs));
  LinearCall call{scratch, linear, x, rows, out};
  team.run(half ? gated_region<bf16> : gated_region<float>, &call);
}

struct NormCall {
  const float* x;
  const void* weight;
  int64_t rows, width;
  float eps;
  void* out;
};

template <class T>
void norm_region(Member& member, void* argument) {
  const NormCall& c = *static_cast<const NormCall*>(argument);
  norm_phase<T>(member, c.x, c.weight, c.rows, c.width, c.eps, static_cast<T*>(c.out));
}

void rms_norm(Team& team, int64_t dtype, const float* x, const void* weight, int64_t rows,
              int64_t width, float eps, void* out) {
  NormCall call{x, weight, rows, width, eps, out};
  team.run(dtype == TANDEM_BFLOAT16 ? norm_region<bf16> : norm_region<float>, &call);
}

struct RotaryCall {
  float* angles;
  const TandemModel& model;
  const TandemLayer& layer;
  const TandemBatch& batch;
  const float* projected;
  void *query, *keys, *values;
  int64_t block_stride;
};

template <class T>
void rotary_region(Member& member, void* argument) {
  const RotaryCall& c = *static_cast<const RotaryCall*>(argument);
  angle_phase(member, c.model, c.batch, c.angles);
  rotary_kv_phase<T>(member, c.model, c.layer, c.batch, c.angles, c.projected, static_cast<T*>(c.query),
                     static_cast<T*>(c.keys), static_cast<T*>(c.values), c.block_stride);
}

void rotary_kv_write(Team& team, Scratch& scratch, const TandemModel& model, const TandemLayer& layer,
                     const TandemBatch& batch, const float* projected, void* query, void* keys,
                     void* values, int64_t block_stride) {
  scratch.angles.reserve(batch.num_tokens * model.head_dim * 4);
  RotaryCall call{scratch.angles.as<float>(), model, layer, batch, projected, query, keys, values,
                  block_stride};
  team.run(model.dtype == TANDEM_BFLOAT16 ? rotary_region<bf16> : rotary_region<float>, &call);
}

struct AttentionCall {
  Scratch& scratch;
  const Attention& attention;
  WindowUnits units;
};

template <class T>
void attention_region(Member& member, void* argument) {
  const AttentionCall& c = *static_cast<const AttentionCall*>(argument);
  attention_phase<T>(member, c.scratch, c.attention, c.units);
}

template <class T>
void run_attention(Team& team, Scratch& scratch, const Attention& attention) {
  AttentionCall call{scratch, attention, {attention.window, {}, 0, 0}};
  prepare_attention<T>(scratch, attention, team.size(), &call.units, 1);
  team.run(attention_region<T>, &call);
}

void attention(Team& team, Scratch& scratch, int64_t dtype, const Attention& a) {
  dtype == TANDEM_BFLOAT16 ? run_attention<bf16>(team, scratch, a)
                           : run_attention<float>(team, scratch, a);
}

void forward(Team& team, Scratch& scratch, const Forward& f) {
  f.model->dtype == TANDEM_BFLOAT16 ? run_forward<bf16>(team, scratch, f)
                                    : run_forward<float>(team, scratch, f);
}

void choose(Team& team, Scratch& scratch, const Choice& choice) {
  const int64_t rows = choice.rows, bests = 2 * rows * spans_of(choice.vocab);
  const bool truncates = choice.top_k != nullptr;
  scratch.partials.reserve(bests * static_cast<int64_t>(sizeof(Best)) + rows * 4);
  if (truncates) scratch.per_thread.reserve(team.size() * 3 * choice.vocab * 4);
  Best* found = scratch.partials.as<Best>();
  Draw draw{choice, found, truncates ? reinterpret_cast<float*>(found + bests) : nullptr,
            scratch.per_thread.as<float>()};
  team.run(choose_region, &draw);
}

}  // namespace
}  // namespace TANDEM_NAMESPACE

extern const Kernels TANDEM_KERNELS = {
    TANDEM_NAME,
    TANDEM_NAMESPACE::pack,
    TANDEM_NAMESPACE::linear,
    TANDEM_NAMESPACE::silu_linear,
    TANDEM_NAMESPACE::rms_norm,
    TANDEM_NAMESPACE::rotary_kv_write,
    TANDEM_NAMESPACE::attention,
    TANDEM_NAMESPACE::forward,
    TANDEM_NAMESPACE::choose,
};

}  // namespace tandem
