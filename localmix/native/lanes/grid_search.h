// The best neighbour of a point off the grid: iq2_find_best_neighbour, iq3_find_best_neighbour and
// iq1_find_best_neighbour2 of ggml-quants.c, with the candidates in the lanes.
//
// The weighted distance is a sum with one term for each dimension, and a term knows only a few levels. So the terms
// are computed once for each level, and a lane sums its candidate's terms, looked up by level, in ggml's order.
#pragma once

#include "grids.h"
#include "lanes.h"

LANES_BEGIN
namespace {

// The terms of one dimension, by level, repeated over the lanes. Where the instruction set can look up by lane, a
// shifted point serves as its own index: what lies above the level falls on a repetition.
#if defined(__AVX512F__)
#define LANES_LOOKUP 1
LANES_INLINE vf look_up(vf table, vi index) { return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
#elif defined(__AVX2__)
#define LANES_LOOKUP 1
LANES_INLINE vf look_up(vf table, vi index) { return (vf)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index); }
#else
#define LANES_LOOKUP 0
#endif

LANES_INLINE vi load_points(const uint16_t* from) {
    typedef uint16_t points __attribute__((vector_size(2 * W)));
    points value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, vi);
}

LANES_INLINE float least(vf value) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_ps((__m512)value);
#elif defined(__SSE2__)
#if defined(__AVX2__)
    __m128 four = _mm_min_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
#else
    __m128 four = (__m128)value;
#endif
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_shuffle_ps(four, four, 1)));
#elif defined(__aarch64__)
    return vminvq_f32((float32x4_t)value);
#else
    float found = value[0];
    for (int lane = 1; lane < W; lane++) found = value[lane] < found ? value[lane] : found;
    return found;
#endif
}
// The first lane that holds `value`; W where none does.
LANES_INLINE int first_equal(vf values, float value) {
#if defined(__AVX512F__)
    return __builtin_ctz(_mm512_cmpeq_ps_mask((__m512)values, _mm512_set1_ps(value)) | 1u << W);
#elif defined(__AVX2__)
    return __builtin_ctz(_mm256_movemask_ps((__m256)(values == value)) | 1u << W);
#elif defined(__SSE2__)
    return __builtin_ctz(_mm_movemask_ps((__m128)(values == value)) | 1u << W);
#else
    int lane = 0;
    while (lane < W && values[lane] != value) lane++;
    return lane;
#endif
}

// The values that the levels stand for: 1, 3, 5... for most types. All of them are exact.
template <int BITS>
struct Levels {
    float first, step;
    vf low, high;  // by the lowest level of a lane's number, and by the one above (for pairs)
    Levels(float first, float step) : first(first), step(step) {
        constexpr int mask = (1 << BITS) - 1;
        for (int lane = 0; lane < W; lane++) {
            low[lane] = first + step * float(lane & mask);
            high[lane] = first + step * float(lane >> BITS & mask);
        }
    }
    // The value of one dimension of the points in the lanes, which the shift has brought down.
    vf operator()(vi shifted) const {
#if LANES_LOOKUP
        return look_up(low, shifted);
#else
        return to_float(shifted & ((1 << BITS) - 1)) * step + first;
#endif
    }
};

// The neighbour that lies nearest to x with the weights w, in the list that the map's entry names.
// x and w point at one lane of vectors: the next dimension is W floats away.
template <int DIMENSIONS, int BITS>
LANES_INLINE int best_neighbour(const Grid& grid, int entry, const Levels<BITS>& levels, const float* x,
                                const float* w, float scale) {
    const uint16_t* list = grid.neighbours + (size_t(entry) >> 9 << 4);
    const int length = entry & 511;
#if LANES_LOOKUP
    // A lane's number has room for the levels of two dimensions: the terms of the first two are summed beforehand.
    constexpr bool pair = W >= 1 << 2 * BITS;
    vf terms[DIMENSIONS];
    const vf reached = scale * levels.low;
    for (int i = 0; i < DIMENSIONS; i++) {
        const vf apart = (pair && i == 1 ? scale * levels.high : reached) - x[i * W];
        terms[i] = w[i * W] * apart * apart;
    }
    if (pair) terms[0] += terms[1];
    const auto distance = [&](const uint16_t* from) __attribute__((always_inline)) {
        const vi points = load_points(from);
        vf sum = look_up(terms[0], points);
        for (int i = pair ? 2 : 1; i < DIMENSIONS; i++) sum += look_up(terms[i], points >> BITS * i);
        return sum;
    };
#else
    const auto distance = [&](const uint16_t* from) __attribute__((always_inline)) {
        const vi points = load_points(from);
        vf sum = {};
        for (int i = 0; i < DIMENSIONS; i++) {
            const vf apart = scale * levels(points >> BITS * i) - x[i * W];
            sum += w[i * W] * apart * apart;
        }
        return sum;
    };
#endif
    if (length <= W) {
        const vf sum = distance(list);
        return list[first_equal(sum, least(sum)) & (W - 1)];
    }
    vf best = distance(list), sums[512 / W];
    sums[0] = best;
    const int batches = (length + W - 1) / W;
    for (int b = 1; b < batches; b++) {
        sums[b] = distance(list + b * W);
        best = lesser(sums[b], best);
    }
    const float smallest = least(best);
    for (int b = 0; b < batches; b++) {
        const int lane = first_equal(sums[b], smallest);
        if (lane < W) return list[b * W + lane];
    }
    return list[0];
}

}  // namespace
LANES_END
