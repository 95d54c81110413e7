// What Python sees of likelihood.cpp: the function of each instruction set, numbered as in registry.cpp.
// Compiled without flags of any instruction set, because it runs before the choice.
#include "likelihood.h"

namespace localmix {
#define ISA(name) \
    namespace name { \
    extern const Likelihoods likelihoods; \
    }
#include "isas.def"
#undef ISA

static const Likelihoods* const all[] = {
#define ISA(name) &name::likelihoods,
#include "isas.def"
#undef ISA
};
}  // namespace localmix

// Null past the end; whether the processor runs it is `localmix_isa_runs`.
extern "C" __attribute__((visibility("default"))) localmix::Likelihoods localmix_likelihoods(int index) {
    return index >= 0 && index < int(sizeof localmix::all / sizeof *localmix::all) ? *localmix::all[index] : nullptr;
}
