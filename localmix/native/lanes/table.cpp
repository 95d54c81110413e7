// The families of one instruction set, in one list; compiled once for each.
#include "lanes.h"

LANES_BEGIN
#define FAMILY(name) extern const Kernel LANES_TABLE(name)[];
#include "families.def"
#undef FAMILY

extern const Kernel* const families[];
const Kernel* const families[] = {
#define FAMILY(name) LANES_TABLE(name),
#include "families.def"
#undef FAMILY
    nullptr,
};
LANES_END
