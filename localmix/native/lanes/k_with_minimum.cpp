// Q2_K, Q4_K and Q5_K: scale and minimum for each sub-block. One super-block of 256 in each lane.
// Follows quantize_row_q2_K_ref, _q4_K_ref, _q5_K_ref and their _impl in ggml-quants.c.
#include "range_search.h"
#include "scale_search.h"

LANES_BEGIN
namespace {

// The weights of a sub-block; those with an importance row come with their sum.
LANES_INLINE void weights_without(const vf* x, vf* w) {  // 32 of them
    const vf average = square_root(sum_of_squares(x, 32) / 32.f);
    for (int i = 0; i < 32; i++) w[i] = average + absolute(x[i]);
}

// The largest of the sub-blocks' scales or minima that is above zero, else zero.
template <int N>
LANES_INLINE vf largest(const vf* values) {
    vf max = {};
    for (int j = 0; j < N; j++) max = greater(values[j], max);
    return max;
}

// The 6-bit scales and minima of eight sub-blocks in 12 bytes. A scale can be negative and then fills its whole
// byte: the bits that spill over are part of ggml's bytes.
LANES_INLINE void pack_scales(const vi* ls, const vi* lm, vi* words) {
    words[0] = words[1] = words[2] = vi{};
    for (int j = 0; j < 4; j++) {
        words[0] |= byte_of(ls[j] | (ls[j + 4] >> 4) << 6) << 8 * j;
        words[1] |= byte_of(lm[j] | (lm[j + 4] >> 4) << 6) << 8 * j;
        words[2] |= byte_of((ls[j + 4] & 15) | (lm[j + 4] & 15) << 4) << 8 * j;
    }
}
// What a decoder finds in the 12 bytes (get_scale_min_k4).
LANES_INLINE void unpack_scales(const vi* words, vi* ls, vi* lm) {
    for (int j = 0; j < 4; j++) {
        const vi a = byte_of(words[0] >> 8 * j), b = byte_of(words[1] >> 8 * j), c = byte_of(words[2] >> 8 * j);
        ls[j] = a & 63;
        lm[j] = b & 63;
        ls[j + 4] = (c & 15) | (a >> 6) << 4;
        lm[j + 4] = c >> 4 | (b >> 6) << 4;
    }
}

// The final levels of a sub-block under the scale and minimum that a decoder will see. Where that scale is zero,
// ggml leaves the levels of the search.
template <int N, int NMAX>
LANES_INLINE void requantize(const vf* x, vf scale, vf min, const Range& range, vi* levels) {
    for (int i = 0; i < N; i++) levels[i] = clamp(nearest_int((x[i] + min) / scale), 0, NMAX);
    const vi empty = scale == 0;
    if (any(empty))
        for (int i = 0; i < N; i++) levels[i] = select(empty, search_level(range, x[i], NMAX), levels[i]);
}

// Scales, minima and levels of a super-block whose eight sub-blocks have 32 weights: Q4_K and Q5_K.
template <int NMAX>
LANES_INLINE void encode_32(const Rows& rows, const Rows& importance, const Steps& steps, int most, vi* words,
                            vi* levels) {
    constexpr int K = 4;
    vf x[8][32], scales[8], minima[8], sums[8];
    Range ranges[8];
    gather<256>(rows, x[0]);
    const bool weighted = importance.at[0];
    const vf sigma2 = weighted ? 2.f * sum_of_squares(x[0], 256) / 256.f : vf{};
    for (int j = 0; j < 8; j += K) {
        vf w[K][32];
        for (int k = 0; k < K; k++)
            if (weighted)
                sums[j + k] = weigh<32>(x[j + k], importance, 32 * (j + k), sigma2, w[k]);
            else
                weights_without(x[j + k], w[k]);
        range_search<32, K, false>(x + j, w, steps, ranges + j);
    }
    for (int j = 0; j < 8; j++) {
        scales[j] = ranges[j].scale;
        minima[j] = ranges[j].minimum;
    }
    vi ls[8], lm[8];
    vf d, dmin;
    if (weighted) {
        d = scale_search<8>(scales, sums, 63, ls);
        dmin = scale_search<8>(minima, sums, 63, lm);
        for (int j = 0; j < 8; j++) {
            ls[j] = at_most(ls[j], most);
            lm[j] = at_most(lm[j], most);
        }
    } else {
        const vf max_scale = largest<8>(scales), max_min = largest<8>(minima);
        const vf inv_scale = select(max_scale > 0, 63.f / max_scale, vf{});
        const vf inv_min = select(max_min > 0, 63.f / max_min, vf{});
        for (int j = 0; j < 8; j++) {
            ls[j] = at_most(byte_of(nearest_int(inv_scale * scales[j])), 63);
            lm[j] = at_most(byte_of(nearest_int(inv_min * minima[j])), 63);
        }
        d = max_scale / 63.f;
        dmin = max_min / 63.f;
    }
    const vi half_d = to_half(d), half_dmin = to_half(dmin);
    words[0] = half_d | half_dmin << 16;
    pack_scales(ls, lm, words + 1);
    unpack_scales(words + 1, ls, lm);
    const vf rounded_d = from_half(half_d), rounded_dmin = from_half(half_dmin);
    for (int j = 0; j < 8; j++)
        requantize<32, NMAX>(x[j], rounded_d * to_float(ls[j]), rounded_dmin * to_float(lm[j]), ranges[j],
                             levels + 32 * j);
}

// Low nibbles of 64 weights in 32 bytes: the first 32 below, the second 32 above.
LANES_INLINE void pack_nibbles(const vi* levels, vi* words) {
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i += 4) {
            vi word = {};
            for (int b = 0; b < 4; b++)
                word |= ((levels[64 * j + i + b] & 15) | (levels[64 * j + 32 + i + b] & 15) << 4) << 8 * b;
            words[8 * j + i / 4] = word;
        }
}

size_t quantize_q4_k(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    const Steps steps = importance ? Steps{15, -0.9f, 0.05f, 36} : Steps{15, -1.f, 0.1f, 20};
    return for_blocks<256, 144>(src, dst, nrows, n_per_row, importance, [&](const Rows& x, const Rows& q, vi* words) {
        vi levels[256];
        encode_32<15>(x, q, steps, 255, words, levels);
        pack_nibbles(levels, words + 4);
    });
}

size_t quantize_q5_k(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    const Steps steps = importance ? Steps{31, -0.9f, 0.05f, 36} : Steps{31, -0.5f, 0.1f, 15};
    return for_blocks<256, 176>(src, dst, nrows, n_per_row, importance, [&](const Rows& x, const Rows& q, vi* words) {
        vi levels[256], high[32];
        encode_32<31>(x, q, steps, 63, words, levels);
        for (int i = 0; i < 32; i++) {
            high[i] = vi{};
            for (int j = 0; j < 8; j++) high[i] |= levels[32 * j + i] >> 4 << j;
        }
        pack_bytes<32>(high, words + 4);
        pack_nibbles(levels, words + 12);
    });
}

size_t quantize_q2_k(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    constexpr int K = 4;
    const Steps steps = importance ? Steps{3, -0.9f, 0.05f, 36} : Steps{3, -0.5f, 0.1f, 15};
    return for_blocks<256, 84>(src, dst, nrows, n_per_row, importance, [&](const Rows& rows, const Rows& q, vi* words) {
        vf x[16][16], scales[16], minima[16], sums[16];
        Range ranges[16];
        gather<256>(rows, x[0]);
        const vf sigma2 = importance ? sum_of_squares(x[0], 256) / 256.f : vf{};
        for (int j = 0; j < 16; j += K) {
            vf w[K][16];
            for (int k = 0; k < K; k++)
                if (importance)
                    sums[j + k] = weigh<16>(x[j + k], q, 16 * (j + k), sigma2, w[k]);
                else
                    for (int i = 0; i < 16; i++) w[k][i] = absolute(x[j + k][i]);
            if (importance)
                range_search<16, K, false>(x + j, w, steps, ranges + j);
            else
                range_search<16, K, true>(x + j, w, steps, ranges + j);
        }
        for (int j = 0; j < 16; j++) {
            scales[j] = ranges[j].scale;
            minima[j] = ranges[j].minimum;
        }
        vi ls[16], lm[16];
        vf d, dmin;
        if (importance) {
            d = scale_search<16>(scales, sums, 15, ls);
            dmin = scale_search<16>(minima, sums, 15, lm);
        } else {
            const vf max_scale = largest<16>(scales), max_min = largest<16>(minima);
            for (int j = 0; j < 16; j++) {
                ls[j] = select(max_scale > 0, byte_of(nearest_int(15.f / max_scale * scales[j])), vi{});
                lm[j] = select(max_min > 0, nearest_int(15.f / max_min * minima[j]), vi{});
            }
            d = max_scale / 15.f;
            dmin = max_min / 15.f;
        }
        vi both[16], levels[256];
        for (int j = 0; j < 16; j++) both[j] = byte_of(ls[j] | lm[j] << 4);
        pack_bytes<16>(both, words);
        const vi half_d = to_half(d), half_dmin = to_half(dmin);
        words[20] = half_d | half_dmin << 16;
        const vf rounded_d = from_half(half_d), rounded_dmin = from_half(half_dmin);
        for (int j = 0; j < 16; j++)
            requantize<16, 3>(x[j], rounded_d * to_float(both[j] & 15), rounded_dmin * to_float(both[j] >> 4), ranges[j],
                              levels + 16 * j);
        vi quarters[64];
        for (int j = 0; j < 2; j++)
            for (int i = 0; i < 32; i++) {
                const vi* l = levels + 128 * j + i;
                quarters[32 * j + i] = l[0] | l[32] << 2 | l[64] << 4 | l[96] << 6;
            }
        pack_bytes<64>(quarters, words + 4);
    });
}

}  // namespace

extern const Kernel LANES_TABLE(k_with_minimum)[];
const Kernel LANES_TABLE(k_with_minimum)[] = {
    {10, EITHER, quantize_q2_k},
    {12, EITHER, quantize_q4_k},
    {13, EITHER, quantize_q5_k},
    {0, EITHER, nullptr},
};
LANES_END
