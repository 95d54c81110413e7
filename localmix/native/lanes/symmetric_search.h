// The best scale without a minimum: make_qx_quants of ggml-quants.c with rmse_type 1, in each lane.
#pragma once

#include "lanes.h"

LANES_BEGIN
namespace {

struct Symmetric {
    vf scale;
    vf level_scale;  // the levels are nearest_int(level_scale * x), clamped
    vi none;         // lanes where everything is (nearly) zero: ggml's levels are 0 there, not nmax
};

LANES_INLINE vi symmetric_level(const Symmetric& found, vf x, int nmax) {
    return select(found.none, vi{}, nmax + clamp(nearest_int(found.level_scale * x), -nmax, nmax - 1));
}

// EXACT follows nearest_int also for NaN. The quick way rounds in floats: |scale * x| is below nmax + 1 as long as
// all x are finite, and scales of overflowing weights may not be. True: to be done again exactly.
//
// K groups of N values at once: their sums are independent, which hides the latency of the additions.
template <int N, int K, bool EXACT>
LANES_INLINE bool symmetric_search_as(const vf (*x)[N], const vf (*w)[N], int nmax, Symmetric* out) {
    const vf low = splat((float)-nmax), high = splat(nmax - 1.f);
    vf max[K], best[K], wx[K][N];
    vi odd = {};
    for (int k = 0; k < K; k++) {
        vf amax = {};
        max[k] = vf{};
        for (int i = 0; i < N; i++) {
            const vf ax = absolute(x[k][i]);
            const vi above = ax > amax;
            amax = select(above, ax, amax);
            max[k] = select(above, x[k][i], max[k]);
            wx[k][i] = w[k][i] * x[k][i];
            odd |= ~(ax <= 3.402823466e+38f);
        }
        out[k].none = amax < 1e-15f;
        max[k] = select(out[k].none, splat(1.f), max[k]);
    }
    for (int step = -10; step <= 9; step++) {
        if (step == 0) continue;
        const bool first = step == -10;
        vf iscale[K], sum_lx[K], sum_l2[K];
        for (int k = 0; k < K; k++) {
            iscale[k] = first ? (float)-nmax / max[k] : -(nmax + 0.1f * step) / max[k];
            sum_lx[k] = sum_l2[k] = vf{};
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const vf moved = iscale[k] * x[k][i];
                const vf l = EXACT ? to_float(clamp(nearest_int(moved), -nmax, nmax - 1))
                                   : round_even(greater(lesser(moved, high), low));
                sum_lx[k] += wx[k][i] * l;
                sum_l2[k] += w[k][i] * l * l;
            }
        for (int k = 0; k < K; k++) {
            const vf scale = sum_lx[k] / sum_l2[k];
            if (first) {
                out[k].scale = select(sum_l2[k] != 0, scale, vf{});
                out[k].level_scale = iscale[k];
                best[k] = out[k].scale * sum_lx[k];
            } else {
                const vi better = (sum_l2[k] > 0) & (sum_lx[k] * sum_lx[k] > best[k] * sum_l2[k]);
                out[k].scale = select(better, scale, out[k].scale);
                out[k].level_scale = select(better, iscale[k], out[k].level_scale);
                best[k] = select(better, scale * sum_lx[k], best[k]);
            }
        }
    }
    for (int k = 0; k < K; k++) out[k].scale = select(out[k].none, vf{}, out[k].scale);
    return any(odd);
}

template <int N, int K>
__attribute__((noinline)) void symmetric_search_exact(const vf (*x)[N], const vf (*w)[N], int nmax, Symmetric* out) {
    symmetric_search_as<N, K, true>(x, w, nmax, out);
}
template <int N, int K>
LANES_INLINE void symmetric_search(const vf (*x)[N], const vf (*w)[N], int nmax, Symmetric* out) {
    if (__builtin_expect(symmetric_search_as<N, K, false>(x, w, nmax, out), 0))
        symmetric_search_exact<N, K>(x, w, nmax, out);
}

}  // namespace
LANES_END
