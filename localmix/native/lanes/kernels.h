// The table of kernels: what a family of types offers, and how a kernel hands a block to ggml.
#pragma once

#include <cstddef>
#include <cstdint>

namespace localmix {

// ggml's own signature (ggml-quants.h): rows of n_per_row floats in, packed blocks out; the bytes written come back.
// importance is one row of n_per_row floats, the same for every row, or null.
typedef size_t (*Quantize)(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance);

enum Importance { WITHOUT = 1, WITH = 2, EITHER = WITHOUT | WITH };

struct Kernel {
    int type;  // enum ggml_type
    Importance importance;
    Quantize quantize;
};

// ggml_quantize_chunk, as ggml.h declares it; set by the caller, null until then.
typedef size_t (*Reference)(int type, const float* src, void* dst, int64_t start, int64_t nrows, int64_t n_per_row,
                            const float* importance);
extern Reference reference;

// Quantize one piece of a row by ggml itself, and count it: for what lanes cannot do with equal bytes.
void quantize_by_reference(int type, const float* src, void* dst, int64_t count, const float* importance);

}  // namespace localmix

// One table for each family and instruction set, ended by a null function. A family's file opens with
//   const Kernel LANES_TABLE(name)[] = {...};
// inside LANES_BEGIN and LANES_END, and its name stands in families.def.
#define LANES_TABLE(family) kernels_##family
