// IQ4_NL and IQ4_XS: sixteen levels at uneven distances. One block of 32, or one super-block of 256, in each lane.
// Follows quantize_row_iq4_nl_impl and best_index_int8 in ggml-quants.c.
#include "lanes.h"

LANES_BEGIN
namespace {

// kvalues_iq4nl (ggml-common.h), and the smallest x that best_index_int8 gives to each level but the first:
// the midpoint exactly, because both of its differences are exact near it.
constexpr float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float border(int level) { return (values[level - 1] + values[level]) / 2; }

#if defined(__AVX512F__)
// The line cut into 32 cells around the multiples of 8. No cell has more than one border in it, and none lies where two
// cells meet: cell k is found by k modulo 32, with the values below and above its border.
struct Cells {
    float border[32], below[32], above[32];
};
constexpr Cells make_cells() {
    Cells cells{};
    for (int k = -16; k < 16; k++) {
        int level = 0;  // of the cell's lower end
        while (level < 15 && border(level + 1) < 8 * k - 4) level++;
        const bool cut = level < 15 && border(level + 1) < 8 * k + 4;
        cells.border[k & 31] = cut ? border(level + 1) : 1000;
        cells.below[k & 31] = values[level];
        cells.above[k & 31] = values[cut ? level + 1 : level];
    }
    return cells;
}
constexpr Cells cells = make_cells();

LANES_INLINE vf look_up(const float* table, vi cell) {
    return (vf)_mm512_permutex2var_ps((__m512)load(table), (__m512i)cell, (__m512)load(table + 16));
}
// NaN goes to the last level, as in ggml.
LANES_INLINE vf best_value(vf x) {
    const vf inside = greater(lesser(x, splat(120.f)), splat(-128.f));
    const vi cell = bits(inside * 0.125f + 12582912.f);
    return select(inside < look_up(cells.border, cell), look_up(cells.below, cell), look_up(cells.above, cell));
}
#else
// Not "x >= border": NaN goes to the last level, as in ggml.
LANES_INLINE vf best_value(vf x) {
    vf value = splat(values[0]);
#pragma GCC unroll 16
    for (int level = 1; level < 16; level++) value = select(x < border(level), value, splat(values[level]));
    return value;
}
#endif
LANES_INLINE vi best_index(vf x) {
    vi index = splat(15);
#pragma GCC unroll 16
    for (int level = 1; level < 16; level++) index += x < border(level);
    return index;
}

// The scale of a block of 32 with the weights w; zero for a block of (nearly) zeros.
LANES_INLINE vf search(const vf* x, const vf* w) {
    vf amax = {}, max = {};
    for (int i = 0; i < 32; i++) {
        const vf ax = absolute(x[i]);
        const vi above = ax > amax;
        amax = select(above, ax, amax);
        max = select(above, x[i], max);
    }
    const vi none = amax < 1e-15f;
    max = select(none, splat(1.f), max);
    vf scale, best;
    for (int step = -8; step <= 7; step++) {
        const bool first = step == -8;
        const vf inverse = first ? 1 / (-max / values[0]) : (step + values[0]) / max;
        vf sum_qx = {}, sum_q2 = {};
        for (int i = 0; i < 32; i++) {
            const vf q = best_value(inverse * x[i]), wq = w[i] * q;
            sum_qx += wq * x[i];
            sum_q2 += wq * q;
        }
        const vf this_scale = sum_qx / sum_q2;
        if (first) {
            scale = select(sum_q2 > 0, this_scale, vf{});
            best = scale * sum_qx;
        } else {
            const vi better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2);
            scale = select(better, this_scale, scale);
            best = select(better, this_scale * sum_qx, best);
        }
    }
    return select(none, vf{}, scale);
}

LANES_INLINE void weigh_block(const vf* x, const Rows& importance, int from, vf sigma2, vf* w) {
    if (importance.at[0])
        weigh<32>(x, importance, from, sigma2, w);
    else
        for (int i = 0; i < 32; i++) w[i] = x[i] * x[i];
}

// 16 bytes: weight i below, weight i + 16 above.
LANES_INLINE void pack_block(const vf* x, vf inverse, vi* bytes) {
    for (int i = 0; i < 16; i++) bytes[i] = best_index(inverse * x[i]) | best_index(inverse * x[i + 16]) << 4;
}

size_t quantize_iq4_nl(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return for_blocks<32, 18>(src, dst, nrows, n_per_row, importance, [](const Rows& rows, const Rows& q, vi* words) {
        vf x[32], w[32];
        gather<32>(rows, x);
        weigh_block(x, q, 0, sum_of_squares(x, 32) * (2.f / 32), w);
        const vf scale = search(x, w);
        const vi half = to_half(scale);
        vi bytes[18];
        bytes[0] = half & 255;
        bytes[1] = half >> 8;
        pack_block(x, select(scale != 0, 1 / scale, vf{}), bytes + 2);
        pack_bytes<18>(bytes, words);
    });
}

size_t quantize_iq4_xs(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return for_blocks<256, 136>(src, dst, nrows, n_per_row, importance, [](const Rows& rows, const Rows& q, vi* words) {
        vf x[8][32], w[32], scales[8], max = {}, magnitude = {};
        gather<256>(rows, x[0]);
        const vf sigma2 = sum_of_squares(x[0], 256) * (2.f / 256);
        for (int j = 0; j < 8; j++) {
            weigh_block(x[j], q, 32 * j, sigma2, w);
            scales[j] = search(x[j], w);
            const vi above = absolute(scales[j]) > magnitude;
            magnitude = select(above, absolute(scales[j]), magnitude);
            max = select(above, scales[j], max);
        }
        const vf d = -max / 32.f, inverse = select(d != 0, 1 / d, vf{});
        vi low = {}, high = {};
        for (int j = 0; j < 8; j++) {
            const vi l = clamp(nearest_int(inverse * scales[j]), -32, 31);
            const vf scale = d * to_float(l);
            vi bytes[16];
            pack_block(x[j], select(scale != 0, 1 / scale, vf{}), bytes);
            pack_bytes<16>(bytes, words + 2 + 4 * j);
            low |= ((l + 32) & 15) << 4 * j;
            high |= (l + 32) >> 4 << 2 * j;
        }
        words[0] = to_half(d) | high << 16;
        words[1] = low;
    });
}

}  // namespace

extern const Kernel LANES_TABLE(nonlinear)[];
const Kernel LANES_TABLE(nonlinear)[] = {
    {20, EITHER, quantize_iq4_nl},
    {23, EITHER, quantize_iq4_xs},
    {0, EITHER, nullptr},
};
LANES_END
