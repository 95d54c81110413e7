// The scales of a super-block in few bits, each with its weight: make_qp_quants of ggml-quants.c, in each lane.
#pragma once

#include "lanes.h"

LANES_BEGIN
namespace {

LANES_INLINE vi at_most(vi value, int high) { return lesser(value, splat(high)); }

// N scales in x with weights w; the quantized ones go to levels, the common scale comes back.
template <int N>
__attribute__((noinline)) vf scale_search(const vf* x, const vf* w, int nmax, vi* levels) {
    vf max = {};
    for (int i = 0; i < N; i++) max = greater(max, x[i]);
    const vi none = max < 1e-15f;
    const vf divisor = select(none, splat(1.f), max);
    vf iscale = (float)nmax / divisor;
    vf scale = 1 / iscale, best = {};
    for (int i = 0; i < N; i++) {
        const vf diff = x[i] - scale * to_float(byte_of(nearest_int(iscale * x[i])));
        best += w[i] * diff * diff;
    }
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        const vf iscale_now = (0.1f * step + nmax) / divisor, scale_now = 1 / iscale_now;
        vf error = {};
        for (int i = 0; i < N; i++) {
            const vf diff = x[i] - scale_now * to_float(at_most(nearest_int(iscale_now * x[i]), nmax));
            error += w[i] * diff * diff;
        }
        const vi better = error < best;
        best = select(better, error, best);
        iscale = select(better, iscale_now, iscale);
    }
    vf sum_lx = {}, sum_l2 = {};
    for (int i = 0; i < N; i++) {
        const vi l = at_most(nearest_int(iscale * x[i]), nmax);
        levels[i] = byte_of(l);
        const vf lf = to_float(l);
        sum_lx += w[i] * x[i] * lf;
        sum_l2 += w[i] * lf * lf;
    }
    // A lane without a change in one round has none in the next: only all lanes together end early.
    for (int round = 0; round < 5; round++) {
        vi changed = {};
        for (int i = 0; i < N; i++) {
            const vf l = to_float(levels[i]);
            vf slx = sum_lx - w[i] * x[i] * l;
            vf sl2 = sum_l2 - w[i] * l * l;
            const vi possible = (slx > 0) & (sl2 > 0);
            const vi next = at_most(nearest_int(x[i] * sl2 / slx), nmax);
            const vf lf = to_float(next);
            slx += w[i] * x[i] * lf;
            sl2 += w[i] * lf * lf;
            const vi better = possible & (next != levels[i]) & (slx * slx * sum_l2 > sum_lx * sum_lx * sl2);
            levels[i] = select(better, byte_of(next), levels[i]);
            sum_lx = select(better, slx, sum_lx);
            sum_l2 = select(better, sl2, sum_l2);
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < N; i++) levels[i] = select(none, vi{}, levels[i]);
    return select(none | ~(sum_l2 > 0), vf{}, sum_lx / sum_l2);
}

}  // namespace
LANES_END
