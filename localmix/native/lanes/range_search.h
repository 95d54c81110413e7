// The best scale and minimum for a sub-block: make_qkx2_quants and make_qkx3_quants of ggml-quants.c, in each lane.
#pragma once

#include "lanes.h"

LANES_BEGIN
namespace {

// What a search ends with. The levels are clamp(nearest_int(level_scale * (x - level_min))), as ggml leaves them
// in L: they belong to the step that won, whose own minimum was still the previous winner's.
struct Range {
    vf scale, minimum;  // minimum with ggml's sign: what is subtracted
    vf level_scale, level_min;
};

struct Steps {
    int nmax;
    float rmin, rdelta;
    int nstep;
};

// EXACT follows nearest_int also where it overflows. The quick way stays in floats, and reports in `wild` where
// it is not allowed: levels are monotone in x, so the largest and the smallest x tell for the whole sub-block.
template <bool EXACT>
LANES_INLINE vf level_of(vf value, int nmax) {
    if constexpr (EXACT) return to_float(clamp(nearest_int(value), 0, nmax));
    return round_even(greater(lesser(value, splat((float)nmax)), vf{}));
}
LANES_INLINE vi is_wild(vf scale, vf min, vf low, vf high) {
    const vf limit = splat(4194303.f);
    return ~((absolute(scale * (low - min)) <= limit) & (absolute(scale * (high - min)) <= limit));
}

// K groups of N values at once: their sums are independent, which hides the latency of the additions.
template <int N, int K, bool MAD, bool EXACT>
LANES_INLINE vi range_search_as(const vf (*x)[N], const vf (*w)[N], const Steps& steps, Range* out) {
    vf low[K], high[K], sum_w[K], sum_x[K], min[K], scale[K], best[K], level_scale[K], level_min[K];
    vi flat[K], wild = {};
    for (int k = 0; k < K; k++) {
        low[k] = high[k] = x[k][0];
        sum_w[k] = w[k][0];
        sum_x[k] = sum_w[k] * x[k][0];
    }
    for (int i = 1; i < N; i++)
        for (int k = 0; k < K; k++) {
            low[k] = lesser(x[k][i], low[k]);
            high[k] = greater(x[k][i], high[k]);
            sum_w[k] += w[k][i];
            sum_x[k] += w[k][i] * x[k][i];
        }
    for (int k = 0; k < K; k++) {
        min[k] = select(low[k] > 0, vf{}, low[k]);
        flat[k] = high[k] <= min[k];
        level_scale[k] = (float)steps.nmax / select(flat[k], splat(1.f), high[k] - min[k]);
        level_min[k] = min[k];
        scale[k] = 1 / level_scale[k];
        best[k] = vf{};
        wild |= is_wild(level_scale[k], min[k], low[k], high[k]);
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            const vf l = level_of<EXACT>(level_scale[k] * (x[k][i] - min[k]), steps.nmax);
            vf diff = scale[k] * l + min[k] - x[k][i];
            diff = MAD ? absolute(diff) : diff * diff;
            best[k] += w[k][i] * diff;
        }
    for (int step = 0; step <= steps.nstep; step++) {
        vf levels[K][N], iscale[K], sum_l[K], sum_l2[K], sum_xl[K], this_scale[K], this_min[K], error[K];
        vi solvable[K];
        const float top = steps.rmin + steps.rdelta * step + steps.nmax;
        for (int k = 0; k < K; k++) {
            iscale[k] = top / select(flat[k], splat(1.f), high[k] - min[k]);
            sum_l[k] = sum_l2[k] = sum_xl[k] = error[k] = vf{};
            if (!EXACT) wild |= is_wild(iscale[k], min[k], low[k], high[k]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const vf l = level_of<EXACT>(iscale[k] * (x[k][i] - min[k]), steps.nmax);
                levels[k][i] = l;
                const vf wl = w[k][i] * l;
                sum_l[k] += wl;
                sum_l2[k] += wl * l;
                sum_xl[k] += wl * x[k][i];
            }
        for (int k = 0; k < K; k++) {
            const vf det = sum_w[k] * sum_l2[k] - sum_l[k] * sum_l[k];
            solvable[k] = det > 0;
            this_scale[k] = (sum_w[k] * sum_xl[k] - sum_x[k] * sum_l[k]) / det;
            this_min[k] = (sum_l2[k] * sum_x[k] - sum_l[k] * sum_xl[k]) / det;
            const vi above = this_min[k] > 0;
            this_scale[k] = select(above, sum_xl[k] / sum_l2[k], this_scale[k]);
            this_min[k] = select(above, vf{}, this_min[k]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                vf diff = this_scale[k] * levels[k][i] + this_min[k] - x[k][i];
                diff = MAD ? absolute(diff) : diff * diff;
                error[k] += w[k][i] * diff;
            }
        for (int k = 0; k < K; k++) {
            const vi better = solvable[k] & (error[k] < best[k]);
            best[k] = select(better, error[k], best[k]);
            scale[k] = select(better, this_scale[k], scale[k]);
            level_scale[k] = select(better, iscale[k], level_scale[k]);
            level_min[k] = select(better, min[k], level_min[k]);
            min[k] = select(better, this_min[k], min[k]);
        }
    }
    for (int k = 0; k < K; k++) {
        out[k].scale = select(flat[k], vf{}, scale[k]);
        out[k].minimum = -min[k];
        out[k].level_scale = select(flat[k], vf{}, level_scale[k]);
        out[k].level_min = level_min[k];
    }
    return wild;
}

template <int N, int K, bool MAD>
__attribute__((noinline)) void range_search_exact(const vf (*x)[N], const vf (*w)[N], const Steps& steps, Range* out) {
    range_search_as<N, K, MAD, true>(x, w, steps, out);
}
template <int N, int K, bool MAD>
LANES_INLINE void range_search(const vf (*x)[N], const vf (*w)[N], const Steps& steps, Range* out) {
    if (__builtin_expect(any(range_search_as<N, K, MAD, false>(x, w, steps, out)), 0))
        range_search_exact<N, K, MAD>(x, w, steps, out);
}

// L of the search, for the sub-blocks whose quantized scale is zero: ggml leaves them as the search had them.
LANES_INLINE vi search_level(const Range& range, vf x, int nmax) {
    return clamp(nearest_int(range.level_scale * (x - range.level_min)), 0, nmax);
}

}  // namespace
LANES_END
