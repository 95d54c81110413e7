// Q4_0, Q4_1, Q5_0 and Q5_1 with an importance row; without one ggml's own loops are quick. One block of 32 in each
// lane. Follows quantize_row_q4_0_impl, _q4_1_impl, _q5_0_impl and _q5_1_impl in ggml-quants.c.
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
    for (int i = 0; i < 32; i++) word |= levels[i] >> 4 << i;
    return word;
}

template <int NMAX, int BYTES>
LANES_INLINE size_t quantize_symmetric(const float* src, void* dst, int64_t nrows, int64_t n_per_row,
                                       const float* importance) {
    return for_weighted_blocks<BYTES>(
        src, dst, nrows, n_per_row, importance, [](const vf(*x)[32], const vf(*w)[32], vi* words) {
            Symmetric found;
            symmetric_search<32, 1>(x, w, NMAX, &found);
            vi levels[32], bytes[BYTES];
            for (int i = 0; i < 32; i++) levels[i] = symmetric_level(found, x[0][i], NMAX);
            const vi half = to_half(found.scale);
            bytes[0] = half & 255;
            bytes[1] = half >> 8;
            if (NMAX == 16) {
                const vi high = high_bits(levels);
                for (int b = 0; b < 4; b++) bytes[2 + b] = byte_of(high >> 8 * b);
            }
            pack_nibbles(levels, bytes + BYTES - 16);
            pack_bytes<BYTES>(bytes, words);
        });
}

template <int NMAX, int BYTES>
LANES_INLINE size_t quantize_with_minimum(const float* src, void* dst, int64_t nrows, int64_t n_per_row,
                                          const float* importance) {
    return for_weighted_blocks<BYTES>(
        src, dst, nrows, n_per_row, importance, [](const vf(*x)[32], const vf(*w)[32], vi* words) {
            Range found;
            range_search<32, 1, false>(x, w, Steps{NMAX, -0.9f, 0.05f, 36}, &found);
            vi levels[32], bytes[16];
            for (int i = 0; i < 32; i++) levels[i] = search_level(found, x[0][i], NMAX);
            words[0] = to_half(found.scale) | to_half(-found.minimum) << 16;
            if (NMAX == 31) words[1] = high_bits(levels);
            pack_nibbles(levels, bytes);
            pack_bytes<16>(bytes, words + BYTES / 4 - 4);
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

}  // namespace

extern const Kernel LANES_TABLE(legacy)[];
const Kernel LANES_TABLE(legacy)[] = {
    {2, WITH, quantize_q4_0},
    {3, WITH, quantize_q4_1},
    {6, WITH, quantize_q5_0},
    {7, WITH, quantize_q5_1},
    {0, EITHER, nullptr},
};
LANES_END
