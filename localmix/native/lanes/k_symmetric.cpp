// Q3_K and Q6_K: a signed scale for each sub-block of 16. One super-block of 256 in each lane.
// Follows quantize_row_q3_K_ref, quantize_row_q3_K_impl, quantize_row_q6_K_ref and make_q3_quants in ggml-quants.c.
#include "symmetric_search.h"

LANES_BEGIN
namespace {

// make_q3_quants with do_rmse: start at the largest, then move single levels while the fit improves. The levels
// go out with nmax added; lanes of (nearly) zeros keep level 0, as ggml leaves them.
template <int K>
LANES_INLINE void descend(const vf (*x)[16], int nmax, vf* scale, vi (*levels)[16]) {
    vf sum_lx[K], sum_l2[K], w[K][16], wx[K][16];
    vi none[K];
    for (int k = 0; k < K; k++) {
        vf amax = {}, max = {};
        for (int i = 0; i < 16; i++) {
            const vf ax = absolute(x[k][i]);
            const vi above = ax > amax;
            amax = select(above, ax, amax);
            max = select(above, x[k][i], max);
        }
        none[k] = amax < 1e-15f;
        const vf iscale = (float)-nmax / select(none[k], splat(1.f), max);
        sum_lx[k] = sum_l2[k] = vf{};
        for (int i = 0; i < 16; i++) {
            levels[k][i] = clamp(nearest_int(iscale * x[k][i]), -nmax, nmax - 1);
            const vf l = to_float(levels[k][i]);
            w[k][i] = x[k][i] * x[k][i];
            wx[k][i] = w[k][i] * x[k][i];
            sum_lx[k] += wx[k][i] * l;
            sum_l2[k] += w[k][i] * l * l;
        }
    }
    // A lane without a change in one round has none in the next: only all lanes together end early.
    for (int round = 0; round < 5; round++) {
        vi changed = {};
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < K; k++) {
                const vf l = to_float(levels[k][i]);
                vf slx = sum_lx[k] - wx[k][i] * l;
                vf sl2 = sum_l2[k] - w[k][i] * l * l;
                const vi possible = slx > 0;
                const vi next = clamp(nearest_int(x[k][i] * sl2 / slx), -nmax, nmax - 1);
                const vf lf = to_float(next);
                slx += wx[k][i] * lf;
                sl2 += w[k][i] * lf * lf;
                const vi better = possible & (next != levels[k][i]) & (sl2 > 0) &
                                  (slx * slx * sum_l2[k] > sum_lx[k] * sum_lx[k] * sl2) & ~none[k];
                levels[k][i] = select(better, next, levels[k][i]);
                sum_lx[k] = select(better, slx, sum_lx[k]);
                sum_l2[k] = select(better, sl2, sum_l2[k]);
                changed |= better;
            }
        if (!any(changed)) break;
    }
    for (int k = 0; k < K; k++) {
        for (int i = 0; i < 16; i++) levels[k][i] = select(none[k], vi{}, levels[k][i] + nmax);
        scale[k] = select(none[k] | ~(sum_l2[k] > 0), vf{}, sum_lx[k] / sum_l2[k]);
    }
}

// The scale of largest magnitude, the first of equals.
LANES_INLINE vf farthest(const vf* scales, vf& magnitude) {
    vf max = {};
    magnitude = vf{};
    for (int j = 0; j < 16; j++) {
        const vi above = absolute(scales[j]) > magnitude;
        magnitude = select(above, absolute(scales[j]), magnitude);
        max = select(above, scales[j], max);
    }
    return max;
}

// The final levels of a sub-block under the scale that a decoder will see; where it is zero those of the search stay.
LANES_INLINE void requantize(const vf* x, vf scale, int nmax, vi* levels) {
    const vi empty = scale == 0;
    for (int i = 0; i < 16; i++)
        levels[i] = select(empty, levels[i], nmax + clamp(nearest_int(x[i] / scale), -nmax, nmax - 1));
}

size_t quantize_q3_k(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    constexpr int K = 4;
    return for_blocks<256, 110>(src, dst, nrows, n_per_row, importance, [&](const Rows& rows, const Rows& q, vi* words) {
        vf x[16][16], scales[16];
        vi levels[16][16], ls[16], half;
        gather<256>(rows, x[0]);
        if (importance) {
            const vf sigma2 = 2.f * sum_of_squares(x[0], 256) / 256.f;
            vf sums[1][16];
            for (int j = 0; j < 16; j += K) {
                vf w[K][16];
                Symmetric found[K];
                for (int k = 0; k < K; k++) sums[0][j + k] = weigh<16>(x[j + k], q, 16 * (j + k), sigma2, w[k]);
                symmetric_search<16, K>(x + j, w, 4, found);
                for (int k = 0; k < K; k++) {
                    scales[j + k] = found[k].scale;
                    for (int i = 0; i < 16; i++) levels[j + k][i] = symmetric_level(found[k], x[j + k][i], 4);
                }
            }
            Symmetric found;
            symmetric_search<16, 1>((const vf(*)[16])scales, sums, 32, &found);
            for (int j = 0; j < 16; j++) ls[j] = symmetric_level(found, scales[j], 32);
            half = to_half(found.scale);
        } else {
            for (int j = 0; j < 16; j += K) descend<K>(x + j, 4, scales + j, levels + j);
            vf magnitude;
            const vf max = farthest(scales, magnitude);
            const vi none = max == 0;
            const vf iscale = -32.f / max;
            for (int j = 0; j < 16; j++)
                ls[j] = select(none, vi{}, 32 + clamp(signed_byte_of(nearest_int(iscale * scales[j])), -32, 31));
            half = to_half(select(none, vf{}, 1 / iscale));
        }
        vi packed[12];
        for (int j = 0; j < 8; j++) packed[j] = (ls[j] & 15) | (ls[j + 8] & 15) << 4;
        for (int j = 0; j < 4; j++)
            packed[8 + j] = ls[j] >> 4 | ls[j + 4] >> 4 << 2 | ls[j + 8] >> 4 << 4 | ls[j + 12] >> 4 << 6;
        pack_bytes<12>(packed, words + 24);
        words[27] = half;
        const vf d = from_half(half);
        for (int j = 0; j < 16; j++) requantize(x[j], d * to_float(ls[j] - 32), 4, levels[j]);
        const vi* l = levels[0];
        vi mask[32], quarters[64];
        for (int i = 0; i < 32; i++) {
            mask[i] = vi{};
            for (int j = 0; j < 8; j++) mask[i] |= l[32 * j + i] >> 2 << j;
            for (int j = 0; j < 2; j++) {
                const vi* at = l + 128 * j + i;
                quarters[32 * j + i] = (at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6;
            }
        }
        pack_bytes<32>(mask, words);
        pack_bytes<64>(quarters, words + 8);
    });
}

size_t quantize_q6_k(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    constexpr int K = 4;
    return for_blocks<256, 210>(src, dst, nrows, n_per_row, importance, [&](const Rows& rows, const Rows& q, vi* words) {
        vf x[16][16], scales[16];
        Symmetric found[16];
        gather<256>(rows, x[0]);
        for (int j = 0; j < 16; j += K) {
            vf w[K][16];
            if (importance) {
                Rows part;
                for (int lane = 0; lane < W; lane++) part.at[lane] = q.at[lane] + 16 * j;
                gather<16 * K>(part, w[0]);
            } else
                for (int k = 0; k < K; k++)
                    for (int i = 0; i < 16; i++) w[k][i] = x[j + k][i] * x[j + k][i];
            symmetric_search<16, K>(x + j, w, 32, found + j);
        }
        for (int j = 0; j < 16; j++) scales[j] = found[j].scale;
        vf magnitude;
        const vf max = farthest(scales, magnitude);
        const vi none = magnitude < 1e-15f;
        const vf iscale = -128.f / max;
        const vi half = to_half(1 / iscale);
        const vf d = from_half(half);
        vi ls[16], levels[256];
        for (int j = 0; j < 16; j++) {
            ls[j] = signed_byte_of(lesser(nearest_int(iscale * scales[j]), splat(127)));
            vi* l = levels + 16 * j;
            for (int i = 0; i < 16; i++) l[i] = symmetric_level(found[j], x[j][i], 32);
            requantize(x[j], d * to_float(ls[j]), 32, l);
        }
        vi low[128], high[64], signs[16];
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 32; i++) {
                const vi* l = levels + 128 * j + i;
                low[64 * j + i] = (l[0] & 15) | (l[64] & 15) << 4;
                low[64 * j + 32 + i] = (l[32] & 15) | (l[96] & 15) << 4;
                high[32 * j + i] = l[0] >> 4 | l[32] >> 4 << 2 | l[64] >> 4 << 4 | l[96] >> 4 << 6;
            }
        for (int j = 0; j < 16; j++) signs[j] = byte_of(ls[j]);
        pack_bytes<128>(low, words);
        pack_bytes<64>(high, words + 32);
        pack_bytes<16>(signs, words + 48);
        words[52] = half;
        if (any(none))
            for (int i = 0; i < 53; i++) words[i] = select(none, vi{}, words[i]);
    });
}

}  // namespace

extern const Kernel LANES_TABLE(k_symmetric)[];
const Kernel LANES_TABLE(k_symmetric)[] = {
    {11, EITHER, quantize_q3_k},
    {14, EITHER, quantize_q6_k},
    {0, EITHER, nullptr},
};
LANES_END
