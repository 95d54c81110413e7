// Log-likelihoods and divergences of rows of logits, one row after the other, W logits at once.
// Unlike the kernels of the types this one promises no bytes, only float32's precision: sums are float64.
#include "likelihood.h"

#include <cmath>

#include "lanes.h"

LANES_BEGIN
namespace {

typedef double vd __attribute__((vector_size(8 * W)));
LANES_INLINE vd widen(vf value) { return __builtin_convertvector(value, vd); }
LANES_INLINE double sum_of(vd value) {
    double sum = 0;
    for (int lane = 0; lane < W; lane++) sum += value[lane];
    return sum;
}

// The part of a row from `at` on; what lies behind its end is as impossible as a logit of minus infinity.
LANES_INLINE vf load_part(const float* row, int64_t at, int64_t count) {
    if (at + W <= count) return load(row + at);
    float part[W];
    for (int lane = 0; lane < W; lane++) part[lane] = at + lane < count ? row[at + lane] : -INFINITY;
    return load(part);
}

// e^x for x <= 0 within two units of the last place; 0 where that is no normal number. NaN stays NaN.
LANES_INLINE vf exponential(vf x) {
    const vi vanishes = x < splat(-87.f);
    const vf y = select(vanishes, splat(0.f), x);
    const vf power = round_even(y * 1.44269504f);
    // ln 2 in two parts, the first exact in products with whole numbers
    const vf rest = (y - power * 0.693359375f) - power * -2.12194440e-4f;
    vf series = splat(1.9875691500e-4f);
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * (rest * rest) + rest + 1.f;
    const vf scale = from_bits((__builtin_convertvector(power, vi) + 127) << 23);
    return select(vanishes, splat(0.f), series * scale);
}

LANES_INLINE float largest_of(const float* row, int64_t count) {
    vf found = splat(-INFINITY);
    for (int64_t at = 0; at < count; at += W) found = greater(load_part(row, at, count), found);
    float largest = found[0];
    for (int lane = 1; lane < W; lane++) largest = found[lane] > largest ? found[lane] : largest;
    return largest;
}

// Where a row holds a value first; `count` if it does not.
LANES_INLINE int64_t first_of(const float* row, int64_t count, float value) {
    int64_t at = 0;
    while (at + W <= count && !any(load(row + at) == splat(value))) at += W;
    while (at < count && row[at] != value) at++;
    return at;
}

}  // namespace

extern const Likelihoods likelihoods;
static void measure(const float* logits, const float* reference, int64_t rows, int64_t vocabulary,
                    const int32_t* targets, double* found) {
    for (int64_t row = 0; row < rows; row++, logits += vocabulary, found += 4) {
        const float largest = largest_of(logits, vocabulary);
        if (!reference) {
            vd sum = {};
            for (int64_t at = 0; at < vocabulary; at += W)
                sum += widen(exponential(load_part(logits, at, vocabulary) - largest));
            found[0] = std::log(sum_of(sum)) + (double(largest) - logits[targets[row]]);
            continue;
        }
        const float reference_largest = largest_of(reference, vocabulary);
        vd sum = {}, reference_sum = {}, weighted = {};
        for (int64_t at = 0; at < vocabulary; at += W) {
            const vf x = load_part(logits, at, vocabulary) - largest;
            const vf y = load_part(reference, at, vocabulary) - reference_largest;
            const vf weight = exponential(y);
            sum += widen(exponential(x));
            reference_sum += widen(weight);
            // a token that the reference excludes counts nothing, whatever the model says
            weighted += widen(select(weight > splat(0.f), weight * (y - x), splat(0.f)));
        }
        const double total = sum_of(sum), reference_total = sum_of(reference_sum);
        found[0] = std::log(total) + (double(largest) - logits[targets[row]]);
        found[1] = std::log(reference_total) + (double(reference_largest) - reference[targets[row]]);
        found[2] = sum_of(weighted) / reference_total + (std::log(total) - std::log(reference_total));
        found[3] = first_of(logits, vocabulary, largest) == first_of(reference, vocabulary, reference_largest);
        reference += vocabulary;
    }
}
const Likelihoods likelihoods = measure;
LANES_END
