// The C interface: checks nothing that its Python caller has checked, throws nothing across.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "kernels.h"
#if defined(TANDEM_HAS_AMX)
#include <cpuid.h>
#endif

namespace tandem {

void prefer_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end >= start + (1 << 21)) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}

namespace {

#if defined(TANDEM_HAS_AMX)
// Whether the processor has tiles with bfloat16 products and the kernel lets this process use them.
bool may_use_tiles() {
  constexpr unsigned kTiles = 1u << 24, kProducts = 1u << 22;  // of cpuid 7.0's edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, its feature
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kProducts) == 0) {
    return false;
  }
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels* choose_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool halves = wide && __builtin_cpu_supports("avx512bf16");
#if defined(TANDEM_HAS_AMX)
  if (halves && may_use_tiles()) return &kAmxKernels;
#endif
  if (halves) return &kAvx512Bf16Kernels;
  if (wide) return &kAvx512Kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2Kernels;
#endif
  return &kGenericKernels;
}

const Kernels* best_kernels() {
  static const Kernels* const best = choose_kernels();
  return best;
}

// The best set that this machine has, or a lesser one by name; null if it has no such set.
const Kernels* find_kernels(const char* name) {
  const Kernels* best = best_kernels();
  if (name == nullptr || std::strcmp(name, best->name) == 0) return best;
  if (std::strcmp(name, kEmulatedAmxKernels.name) == 0) return &kEmulatedAmxKernels;
#if defined(__x86_64__)
  const Kernels* all[] = {
#if defined(TANDEM_HAS_AMX)
      &kAmxKernels,
#endif
      &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels, &kGenericKernels};
  bool reached = false;
  for (const Kernels* kernels : all) {
    reached = reached || kernels == best;
    if (reached && std::strcmp(name, kernels->name) == 0) return kernels;
  }
#endif
  return nullptr;
}

struct Context {
  Context(int threads, const Kernels* kernels) : team(threads), kernels(kernels) {}
  Team team;
  Scratch scratch;
  const Kernels* kernels;
};

template <class Function>
int guarded(Function&& function) {
  try {
    function();
    return 0;
  } catch (...) {
    return 1;  // out of memory: nothing else is thrown
  }
}

}  // namespace
}  // namespace tandem

using tandem::Context;

extern "C" {

const char* tandem_kernels_name() { return tandem::best_kernels()->name; }

// name: null for the best set. Returns null if there is no such set or no memory.
Context* tandem_context_create(int64_t threads, const char* name) {
  const tandem::Kernels* kernels = tandem::find_kernels(name);
  if (kernels == nullptr) return nullptr;
  try {
    return new Context(static_cast<int>(threads), kernels);
  } catch (...) {
    return nullptr;
  }
}

void tandem_context_destroy(Context* context) { delete context; }

// cores: one for each thread of the context; the first, the caller's, is not looked at.
void tandem_context_pin(Context* context, const int64_t* cores) { context->team.pin(cores); }

// For memory that has not been written yet.
void tandem_prefer_huge_pages(void* memory, int64_t bytes) {
  tandem::prefer_huge_pages(memory, bytes);
}

void tandem_pack(Context* context, int64_t dtype, const void* weight, int64_t rows, int64_t inputs,
                 uint32_t* panels, int64_t first_panel, int64_t panel_step) {
  context->kernels->pack(dtype, weight, rows, inputs, panels, first_panel, panel_step);
}

int tandem_linear(Context* context, int64_t dtype, const TandemLinear* linear, const void* x,
                  int64_t rows, float* out) {
  return tandem::guarded([&] {
    context->kernels->linear(context->team, context->scratch, dtype, *linear, x, rows, out);
  });
}

int tandem_silu_linear(Context* context, int64_t dtype, const TandemLinear* linear, const void* x,
                       int64_t rows, void* out) {
  return tandem::guarded([&] {
    context->kernels->silu_linear(context->team, context->scratch, dtype, *linear, x, rows, out);
  });
}

void tandem_rms_norm(Context* context, int64_t dtype, const float* x, const void* weight,
                     int64_t rows, int64_t width, float eps, void* out) {
  context->kernels->rms_norm(context->team, dtype, x, weight, rows, width, eps, out);
}

void tandem_rotary_kv_write(Context* context, const TandemModel* model, const TandemLayer* layer,
                            const TandemBatch* batch, const float* projected, void* query,
                            void* keys, void* values, int64_t block_stride) {
  context->kernels->rotary_kv_write(context->team, context->scratch, *model, *layer, *batch,
                                    projected, query, keys, values, block_stride);
}

int tandem_paged_attention(Context* context, int64_t dtype, const TandemBatch* batch,
                           const void* query, const void* keys, const void* values,
                           int64_t block_stride, void* output, int64_t heads, int64_t kv_heads,
                           int64_t head_dim, float scale, int64_t window) {
  const tandem::Attention attention{batch, query,    keys,     values, block_stride, output,
                                    heads, kv_heads, head_dim, scale,  window};
  return tandem::guarded([&] {
    context->kernels->attention(context->team, context->scratch, dtype, attention);
  });
}

// Layers [first_layer, first_layer + num_layers) of a batch; the calls of a batch follow each other.
int tandem_forward(Context* context, const TandemModel* model, const TandemBatch* batch,
                   const TandemCache* cache, const int64_t* token_ids, int64_t first_layer,
                   int64_t num_layers, const int64_t* wanted_rows, int64_t num_wanted,
                   void* hidden) {
  const tandem::Forward forward{model,      batch,       cache,      token_ids, first_layer,
                                num_layers, wanted_rows, num_wanted, hidden};
  return tandem::guarded(
      [&] { context->kernels->forward(context->team, context->scratch, forward); });
}

int tandem_choose(Context* context, const float* logits, int64_t rows, int64_t vocab,
                  const float* temperatures, const int64_t* seeds, const int64_t* positions,
                  const int64_t* top_k, const double* top_p, const float* min_p, int64_t* out) {
  const tandem::Choice choice{logits,    rows,  vocab, temperatures, seeds,
                              positions, top_k, top_p, min_p,        out};
  return tandem::guarded(
      [&] { context->kernels->choose(context->team, context->scratch, choice); });
}

// Copy the KV of tokens at `slots` out of the cache, whose elements are bytes here, into staging,
// [layers, 2, num_slots, token bytes], or back. Needs no context: any thread may call.
void tandem_kv_copy(const TandemCache* cache, int64_t first_layer, int64_t num_layers,
                    int64_t block_size, int64_t token_bytes, const int64_t* slots,
                    int64_t num_slots, char* staging, int64_t into_cache) {
  for (int64_t plane = 2 * first_layer; plane < 2 * (first_layer + num_layers); ++plane) {
    char* blocks = static_cast<char*>(cache->kv) + plane * cache->plane_stride;
    for (int64_t i = 0, run; i < num_slots; i += run, staging += run * token_bytes) {
      const int64_t block = slots[i] / block_size, offset = slots[i] % block_size;
      const int64_t most = std::min(block_size - offset, num_slots - i);
      run = 1;
      while (run < most && slots[i + run] == slots[i] + run) ++run;
      char* at = blocks + block * cache->block_stride + offset * token_bytes;
      std::memcpy(into_cache ? at : staging, into_cache ? staging : at,
                  static_cast<size_t>(run * token_bytes));
    }
  }
}

}  // extern "C"
