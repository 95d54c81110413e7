// What a model says about a text, reduced row by row.
#pragma once

#include <cstdint>

namespace localmix {

// rows x vocabulary logits of a model and, unless null, of the reference for the same tokens. For each row four
// numbers: -log of the target's probability, the same of the reference, the divergence from it, and 1 where both
// hold the same token likeliest; only the first without a reference.
typedef void (*Likelihoods)(const float* logits, const float* reference, int64_t rows, int64_t vocabulary,
                            const int32_t* targets, double* found);

}  // namespace localmix
