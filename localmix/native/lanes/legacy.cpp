// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and F16. One block of 32 in each lane. Follows quantize_row_q4_0_ref and _impl, the
// same of Q4_1, Q5_0 and Q5_1, and quantize_row_q8_0_ref in ggml-quants.c.
#include "range_search.h"
#include "symmetric_search.h"

LANES_BEGIN
namespace {

// `pack(x, w, words)` for all blocks, W at a time, with the weights ggml gives them: importance times
// sqrt(mean square of the row + x^2). The sums over whole rows are made for W rows at once.
template <int BYTES, class Pack>
LANES_INLINE size_t for_weighted_blocks(const float* src, void* dst, int64_t nrows, int64_t n_per_row,
                                        const float* importance, Pack pack) {
    const int64_t per_row = n_per_row / 32;
    size_t written = 0;
    for (int64_t row = 0; row < nrows; row += W) {
        const int64_t rows = nrows - row < W ? nrows - row : W;
        const float* from = src + row * n_per_row;
        Rows each;
        for (int lane = 0; lane < W; lane++) each.at[lane] = from + (lane < rows ? lane : rows - 1) * n_per_row;
        vf sum = {};
        for (int64_t block = 0; block < per_row; block++) {
            vf x[32];
            gather<32>(each, x);
            for (int i = 0; i < 32; i++) sum += x[i] * x[i];
            for (int lane = 0; lane < W; lane++) each.at[lane] += 32;
        }
        const vf sigma2 = sum / (float)n_per_row;
        written += for_blocks<32, BYTES>(
            from, (uint8_t*)dst + written, rows, n_per_row, importance, [&](const Rows& at, const Rows& q, vi* words) {
                vf x[1][32], w[1][32], mean;
                gather<32>(at, x[0]);
                for (int lane = 0; lane < W; lane++) mean[lane] = sigma2[(at.at[lane] - from) / n_per_row];
                weigh<32>(x[0], q, 0, mean, w[0]);
                pack(x, w, words);
            });
    }
    return written;
}

// The 16 bytes of low nibbles: weight i below, weight i + 16 above.
LANES_INLINE void pack_nibbles(const vi* levels, vi* bytes) {
    for (int i = 0; i < 16; i++) bytes[i] = (levels[i] & 15) | (levels[i + 16] & 15) << 4;
}
// The fifth bits of all 32.
LANES_INLINE vi high_bits(const vi* levels) {
    vi word = {};
    for (int i = 0; i < 32; i++) word |= (levels[i] >> 4 & 1) << i;
    return word;
}

// A block with a scale; NMAX is 8 or 16, the levels lie between 0 and twice that.
template <int NMAX, int BYTES>
LANES_INLINE void pack_symmetric(vf scale, const vi* levels, vi* words) {
    vi bytes[BYTES];
    const vi half = to_half(scale);
    bytes[0] = half & 255;
    bytes[1] = half >> 8;
    if (NMAX == 16) {
        const vi high = high_bits(levels);
        for (int b = 0; b < 4; b++) bytes[2 + b] = byte_of(high >> 8 * b);
    }
    pack_nibbles(levels, bytes + BYTES - 16);
    pack_bytes<BYTES>(bytes, words);
}
// A block with a scale and a minimum; NMAX is 15 or 31.
template <int NMAX, int BYTES>
LANES_INLINE void pack_with_minimum(vf scale, vf minimum, const vi* levels, vi* words) {
    vi bytes[16];
    words[0] = to_half(scale) | to_half(minimum) << 16;
    if (NMAX == 31) words[1] = high_bits(levels);
    pack_nibbles(levels, bytes);
    pack_bytes<16>(bytes, words + BYTES / 4 - 4);
}

// C's conversion to an integer, which cuts off; what does not fit becomes -2^31, as x86 has it.
LANES_INLINE vi cut(vf value) {
    return select(absolute(value) < 2147483648.f, __builtin_convertvector(value, vi), splat(INT32_MIN));
}

template <int NMAX, int BYTES>
LANES_INLINE size_t quantize_symmetric(const float* src, void* dst, int64_t nrows, int64_t n_per_row,
                                       const float* importance) {
    if (importance)
        return for_weighted_blocks<BYTES>(
            src, dst, nrows, n_per_row, importance, [](const vf(*x)[32], const vf(*w)[32], vi* words) {
                Symmetric found;
                vi levels[32];
                symmetric_search<32, 1>(x, w, NMAX, &found);
                for (int i = 0; i < 32; i++) levels[i] = symmetric_level(found, x[0][i], NMAX);
                pack_symmetric<NMAX, BYTES>(found.scale, levels, words);
            });
    return for_blocks<32, BYTES>(src, dst, nrows, n_per_row, nullptr, [](const Rows& rows, const Rows&, vi* words) {
        vf x[32], amax = {}, max = {};
        vi levels[32];
        gather<32>(rows, x);
        for (int i = 0; i < 32; i++) {
            const vi above = amax < absolute(x[i]);
            amax = select(above, absolute(x[i]), amax);
            max = select(above, x[i], max);
        }
        const vf d = max / (float)-NMAX, inverse = select(d != 0, 1.f / d, vf{});
        for (int i = 0; i < 32; i++)
            levels[i] = byte_of(lesser(signed_byte_of(cut(x[i] * inverse + (NMAX + 0.5f))), splat(2 * NMAX - 1)));
        pack_symmetric<NMAX, BYTES>(d, levels, words);
    });
}

template <int NMAX, int BYTES>
LANES_INLINE size_t quantize_with_minimum(const float* src, void* dst, int64_t nrows, int64_t n_per_row,
                                          const float* importance) {
    if (importance)
        return for_weighted_blocks<BYTES>(
            src, dst, nrows, n_per_row, importance, [](const vf(*x)[32], const vf(*w)[32], vi* words) {
                Range found;
                vi levels[32];
                range_search<32, 1, false>(x, w, Steps{NMAX, -0.9f, 0.05f, 36}, &found);
                for (int i = 0; i < 32; i++) levels[i] = search_level(found, x[0][i], NMAX);
                pack_with_minimum<NMAX, BYTES>(found.scale, -found.minimum, levels, words);
            });
    return for_blocks<32, BYTES>(src, dst, nrows, n_per_row, nullptr, [](const Rows& rows, const Rows&, vi* words) {
        vf x[32], min = splat(3.402823466e+38f), max = -min;
        vi levels[32];
        gather<32>(rows, x);
        for (int i = 0; i < 32; i++) {
            min = lesser(x[i], min);
            max = greater(x[i], max);
        }
        const vf d = (max - min) / (float)NMAX, inverse = select(d != 0, 1.f / d, vf{});
        for (int i = 0; i < 32; i++) {
            const vi level = cut((x[i] - min) * inverse + 0.5f);
            levels[i] = byte_of(NMAX == 15 ? lesser(signed_byte_of(level), splat(15)) : level);
        }
        pack_with_minimum<NMAX, BYTES>(d, min, levels, words);
    });
}

size_t quantize_q4_0(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return quantize_symmetric<8, 18>(src, dst, nrows, n_per_row, importance);
}
size_t quantize_q5_0(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return quantize_symmetric<16, 22>(src, dst, nrows, n_per_row, importance);
}
size_t quantize_q4_1(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return quantize_with_minimum<15, 20>(src, dst, nrows, n_per_row, importance);
}
size_t quantize_q5_1(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    return quantize_with_minimum<31, 24>(src, dst, nrows, n_per_row, importance);
}

// roundf: halves go away from zero. From 2^23 on every float is whole.
LANES_INLINE vi round_away(vf value) {
    const vi whole = cut(value);
    const vf rest = value - to_float(whole);
    return whole + ((absolute(value) < 8388608.f) & ((rest <= -0.5f) - (rest >= 0.5f)));
}

// The importance row has no say here.
size_t quantize_q8_0(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float*) {
    return for_blocks<32, 34>(src, dst, nrows, n_per_row, nullptr, [](const Rows& rows, const Rows&, vi* words) {
        vf x[32], amax = {};
        gather<32>(rows, x);
        for (int i = 0; i < 32; i++) amax = greater(amax, absolute(x[i]));
        const vf d = amax / 127.f, inverse = select(d != 0, 1.f / d, vf{});
        const vi half = to_half(d);
        vi bytes[34];
        bytes[0] = half & 255;
        bytes[1] = half >> 8;
        for (int i = 0; i < 32; i++) bytes[2 + i] = byte_of(round_away(x[i] * inverse));
        pack_bytes<34>(bytes, words);
    });
}

// Each float by itself: consecutive ones lie in the lanes.
size_t convert_f16(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float*) {
    typedef uint16_t Halves __attribute__((vector_size(2 * W)));
    const int64_t count = nrows * n_per_row;
    uint16_t* to = (uint16_t*)dst;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const Halves halves = __builtin_convertvector(to_half(load(src + i)), Halves);
        memcpy(to + i, &halves, sizeof halves);
    }
    for (; i < count; i++) to[i] = to_half(src[i]);
    return size_t(count) * 2;
}

}  // namespace

extern const Kernel LANES_TABLE(legacy)[];
const Kernel LANES_TABLE(legacy)[] = {
    {1, EITHER, convert_f16},
    {2, EITHER, quantize_q4_0},
    {3, EITHER, quantize_q4_1},
    {6, EITHER, quantize_q5_0},
    {7, EITHER, quantize_q5_1},
    {8, EITHER, quantize_q8_0},
    {0, EITHER, nullptr},
};
LANES_END
