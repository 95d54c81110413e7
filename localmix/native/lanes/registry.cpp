// What Python sees: the instruction sets compiled in, which of them this processor runs, and their kernels.
// Compiled without flags of any instruction set, because it runs before the choice.
#include <atomic>

#include "kernels.h"

namespace localmix {

Reference reference = nullptr;
static std::atomic<int64_t> reference_calls{0};

void quantize_by_reference(int type, const float* src, void* dst, int64_t count, const float* importance) {
    reference_calls++;
    reference(type, src, dst, 0, 1, count, importance);
}

#define ISA(name) \
    namespace name { \
    extern const Kernel* const families[]; \
    }
#include "isas.def"
#undef ISA

static bool runs_baseline() { return true; }
#if defined(LANES_X86)
static bool runs_avx2() { return __builtin_cpu_supports("avx2"); }
static bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct InstructionSet {
    const char* name;
    bool (*runs)();
    const Kernel* const* families;
};
static const InstructionSet instruction_sets[] = {
#define ISA(name) {#name, runs_##name, name::families},
#include "isas.def"
#undef ISA
};
constexpr int count = sizeof instruction_sets / sizeof *instruction_sets;

}  // namespace localmix

#define EXPORT extern "C" __attribute__((visibility("default")))

// The widest instruction set comes last. Null past the end.
EXPORT const char* localmix_isa(int index) {
    return index >= 0 && index < localmix::count ? localmix::instruction_sets[index].name : nullptr;
}

EXPORT int localmix_isa_runs(int index) {
    return index >= 0 && index < localmix::count && localmix::instruction_sets[index].runs();
}

// The kernel of a type (enum ggml_type) in one instruction set, with or without an importance row; null: use ggml.
EXPORT localmix::Quantize localmix_kernel(int index, int type, int with_importance) {
    if (!localmix_isa_runs(index)) return nullptr;
    const int wanted = with_importance ? localmix::WITH : localmix::WITHOUT;
    for (auto family = localmix::instruction_sets[index].families; *family; family++)
        for (auto kernel = *family; kernel->quantize; kernel++)
            if (kernel->type == type && (kernel->importance & wanted)) return kernel->quantize;
    return nullptr;
}

// To be called before any kernel.
EXPORT void localmix_set_reference(localmix::Reference quantize_chunk) { localmix::reference = quantize_chunk; }

// How many pieces went to ggml because lanes could not give equal bytes.
EXPORT int64_t localmix_reference_calls() { return localmix::reference_calls; }
