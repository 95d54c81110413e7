// IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: magnitudes on a grid, signs beside them. One sub-block in each lane; the
// search among neighbours goes lane by lane, with the candidates in the lanes (grid_search.h).
// Follows quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl, quantize_row_iq2_s_impl, quantize_row_iq3_xxs_impl
// and quantize_row_iq3_s_impl in ggml-quants.c; see LICENSE.ggml in this folder.
#include "grid_search.h"
#include "scale_search.h"

LANES_BEGIN
namespace {

// What sets the types apart.
struct Iq2 {
    static constexpr int dimensions = 8, bits = 2, levels = 3;
};
struct Iq3 {
    static constexpr int dimensions = 4, bits = 3, levels = 8;
};

// What becomes of a sub-block.
struct SubBlock {
    float scale;
    bool none;  // (nearly) zero, and the rest is zero too
    uint16_t index[8];  // of each point, by number in the grid
    uint8_t signs[4];   // of each eight weights
};

enum Again { ALWAYS, ALL_IF_ANY, ONE_BY_ONE };

struct IQ2_XXS : Iq2 {
    static constexpr int type = 16, size = 32, bytes = 66, reach = 6;
    static constexpr GridName grid = GRID_IQ2_XXS;
    static constexpr float step = 0.1f, nothing = 1e-15f, sigma_factor = 1;
    static constexpr bool even_signs = true, scale_first = true, zeros_cleared = true;
    static constexpr Again again = ALWAYS;
    static constexpr float fudge = 1;
    LANES_INLINE vf weight(vf x, vf) { return x * x; }
    static void pack(const SubBlock* from, const int* scale, uint8_t* to) {
        for (int j = 0; j < 8; j++) {
            uint32_t signs = uint32_t(scale[j]) << 28;
            for (int k = 0; k < 4; k++) {
                to[8 * j + k] = uint8_t(from[j].index[k]);
                signs |= uint32_t(from[j].signs[k]) << 7 * k;
            }
            memcpy(to + 8 * j + 4, &signs, 4);
        }
    }
};

struct IQ2_XS : Iq2 {
    static constexpr int type = 17, size = 16, bytes = 74, reach = 9;
    static constexpr GridName grid = GRID_IQ2_XS;
    static constexpr float step = 0.1f, nothing = 1e-15f, sigma_factor = 1;
    static constexpr bool even_signs = true, scale_first = false, zeros_cleared = true;
    static constexpr Again again = ONE_BY_ONE;
    static constexpr float fudge = 1;
    LANES_INLINE vf weight(vf x, vf) { return x * x; }
    static void pack(const SubBlock* from, const int* scale, uint8_t* to) {
        for (int j = 0; j < 16; j++)
            for (int k = 0; k < 2; k++) {
                const uint16_t word = uint16_t(from[j].index[k] | from[j].signs[k] << 9);
                memcpy(to + 4 * j + 2 * k, &word, 2);
            }
        for (int j = 0; j < 8; j++) to[64 + j] = uint8_t(scale[2 * j] | scale[2 * j + 1] << 4);
    }
};

struct IQ2_S : Iq2 {
    static constexpr int type = 22, size = 16, bytes = 82, reach = 9;
    static constexpr GridName grid = GRID_IQ2_S;
    static constexpr float step = 0.1f, nothing = 1e-8f, sigma_factor = 2;
    static constexpr bool even_signs = false, scale_first = false, zeros_cleared = false;
    static constexpr Again again = ONE_BY_ONE;
    static constexpr float fudge = 0.9875f;
    LANES_INLINE vf weight(vf x, vf sigma2) { return 0.25f * sigma2 + x * x; }
    static void pack(const SubBlock* from, const int* scale, uint8_t* to) {
        for (int j = 0; j < 16; j++)
            for (int k = 0; k < 2; k++) {
                to[2 * j + k] = uint8_t(from[j].index[k]);
                to[32 + 2 * j + k] = from[j].signs[k];
                to[64 + j / 2] |= uint8_t(from[j].index[k] >> 8 << (4 * (j & 1) + 2 * k));
            }
        for (int j = 0; j < 8; j++) to[72 + j] = uint8_t(scale[2 * j] | scale[2 * j + 1] << 4);
    }
};

struct IQ3_XXS : Iq3 {
    static constexpr int type = 18, size = 32, bytes = 98, reach = 15;
    static constexpr GridName grid = GRID_IQ3_XXS;
    static constexpr float step = 0.2f, nothing = 1e-8f, sigma_factor = 2;
    static constexpr bool even_signs = true, scale_first = false, zeros_cleared = true;
    static constexpr Again again = ONE_BY_ONE;
    static constexpr float fudge = 1.0125f;
    LANES_INLINE vf weight(vf x, vf) { return x * x; }
    static void pack(const SubBlock* from, const int* scale, uint8_t* to) {
        for (int j = 0; j < 8; j++) {
            uint32_t signs = uint32_t(scale[j]) << 28;
            for (int k = 0; k < 8; k++) to[8 * j + k] = uint8_t(from[j].index[k]);
            for (int k = 0; k < 4; k++) signs |= uint32_t(from[j].signs[k]) << 7 * k;
            memcpy(to + 64 + 4 * j, &signs, 4);
        }
    }
};

struct IQ3_S : Iq3 {
    static constexpr int type = 21, size = 32, bytes = 110, reach = 9;
    static constexpr GridName grid = GRID_IQ3_S;
    // Every magnitude but zero counts.
    static constexpr float step = 0.2f, nothing = 0x1p-149f, sigma_factor = 2;
    static constexpr bool even_signs = false, scale_first = false, zeros_cleared = false;
    static constexpr Again again = ALL_IF_ANY;
    static constexpr float fudge = 1.033f;
    LANES_INLINE vf weight(vf x, vf) { return x * x; }
    static void pack(const SubBlock* from, const int* scale, uint8_t* to) {
        // As in ggml, a sub-block of zeros takes no room: what follows moves up, but for its high bits.
        uint8_t *low = to, *signs = to + 72;
        for (int j = 0; j < 8; j++) {
            if (from[j].none) continue;
            for (int k = 0; k < 8; k++) {
                *low++ = uint8_t(from[j].index[k]);
                to[64 + j] |= uint8_t(from[j].index[k] >> 8 << k);
            }
            memcpy(signs, from[j].signs, 4);
            signs += 4;
        }
        for (int j = 0; j < 4; j++) to[104 + j] = uint8_t(scale[2 * j] | scale[2 * j + 1] << 4);
    }
};

// The point nearest to inverse * x, on the grid or off. nearest_int(0.5f * v) reads from the mantissa of v + 2^23 * 3.
template <class T>
LANES_INLINE vi nearest_point(const vf* x, vf inverse) {
    vi point = {};
    uint32_t excess = 0;
#pragma GCC unroll 8
    for (int i = 0; i < T::dimensions; i++) {
        const vi mantissa = bits((inverse * x[i] - 1.f) + 25165824.f) & 0x007fffff;
        point += clamp(mantissa, 0x00400000, 0x00400000 + T::levels - 1) << T::bits * i;
        excess += 0x00400000u << T::bits * i;
    }
    return point - (int32_t)excess;
}

// Points that are off the grid move to their best neighbours, in the lanes wanted. Those that moved come back.
template <class T>
LANES_INLINE vi settle(const Levels<T::bits>& levels, vi& points, vi wanted, const vf* x, const vf* w, vf scale) {
    const Grid& grid = grids[T::grid];
    int32_t at[W], found[W], moved[W];
    float scales[W];
    store(at, points & wanted);
    store(scales, scale);
    for (int lane = 0; lane < W; lane++) {
        const int32_t entry = grid.map[at[lane]];
        found[lane] = at[lane];
        moved[lane] = entry < 0 ? -1 : 0;
        if (entry < 0)
            found[lane] = best_neighbour<T::dimensions, T::bits>(grid, ~entry, levels, (const float*)x + lane,
                                                                 (const float*)w + lane, scales[lane]);
    }
    points = select(wanted, load(found), points);
    return load(moved);
}

template <class T>
LANES_INLINE void fit(const Levels<T::bits>& levels, const vi* points, const vf* wx, const vf* w, vf& sum_qx,
                      vf& sum_q2) {
    sum_qx = sum_q2 = vf{};
    for (int k = 0; k < T::size / T::dimensions; k++)
#pragma GCC unroll 8
        for (int i = 0; i < T::dimensions; i++) {
            const vf q = levels(points[k] >> T::bits * i);
            sum_qx += wx[k * T::dimensions + i] * q;
            sum_q2 += w[k * T::dimensions + i] * q * q;
        }
}

// W sub-blocks: x are the weights, w how much each counts. Lanes of `wild` are left alone.
template <class T>
__attribute__((noinline)) void quantize_lanes(vf* x, const vf* w, vi wild, SubBlock* out) {
    constexpr int N = T::size, D = T::dimensions, K = N / D, top = 2 * T::levels - 1;
    const Levels<T::bits> levels(1, 2);
    vf root[N], wx[N];
    vi signs[N / 8];
    for (int k = 0; k < N / 8; k++) {
        vi negative = {}, least_at = {}, odd = {};
        vf least_error = {};
        for (int i = 0; i < 8; i++) {
            vf& value = x[8 * k + i];
            const vi minus = ~(value >= 0);
            if (T::even_signs) {
                const vf error = w[8 * k + i] * value * value;
                const vi smaller = i ? error < least_error : splat(-1);
                least_error = select(smaller, error, least_error);
                least_at = select(smaller, splat(i), least_at);
            }
            odd ^= minus;
            negative |= minus & 1 << i;
            value = select(minus, -value, value);
        }
        if (T::even_signs)
            for (int i = 0; i < 8; i++) {
                const vi flip = odd & (least_at == i);
                x[8 * k + i] = select(flip, -x[8 * k + i], x[8 * k + i]);
                negative ^= flip & 1 << i;
            }
        signs[k] = negative & (T::even_signs ? 127 : 255);
    }
    vf max = x[0];
    for (int i = 1; i < N; i++) max = greater(max, x[i]);
    for (int i = 0; i < N; i++) {
        root[i] = square_root(w[i]);
        wx[i] = w[i] * x[i];
    }
    vi none = wild | (max < T::nothing);
    vf scale = max / (float)top, reached = max;
    if constexpr (T::scale_first) {
        vi unused[N];
        scale = scale_search<N>(x, w, T::levels + 1, unused);
        reached = scale * (float)T::levels;
        none |= reached <= 0;
    }
    const vi wanted = ~none;
    if (any(wanted)) {
        reached = select(none, splat(1.f), reached);
        vf best = {};
        vi chosen[K] = {}, off_grid[K];
        for (int k = 0; k < K; k++) off_grid[k] = splat(T::again == ALL_IF_ANY ? -1 : 0);
        for (int is = -T::reach; is <= T::reach; is++) {
            const vf inverse = (top + is * T::step) / reached, this_scale = 1 / inverse;
            vi points[K], moved[K];
            for (int k = 0; k < K; k++) points[k] = nearest_point<T>(x + k * D, inverse);
            for (int k = 0; k < K; k++)
                moved[k] = settle<T>(levels, points[k], wanted, x + k * D, root + k * D, this_scale);
            vf sum_qx, sum_q2;
            fit<T>(levels, points, wx, w, sum_qx, sum_q2);
            const vi better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2);
            scale = select(better, sum_qx / sum_q2, scale);
            best = select(better, scale * sum_qx, best);
            for (int k = 0; k < K; k++) {
                chosen[k] = select(better, points[k], chosen[k]);
                off_grid[k] = select(better, moved[k], off_grid[k]);
            }
        }
        vi any_off = {};
        for (int k = 0; k < K; k++) any_off |= off_grid[k];
        vi again = wanted & (scale > 0);
        if (T::again != ALWAYS) again &= any_off;
        if (any(again)) {
            const vf inverse = 1 / scale;
            for (int k = 0; k < K; k++) {
                const vi here = T::again == ONE_BY_ONE ? again & off_grid[k] : again;
                vi points = nearest_point<T>(x + k * D, inverse);
                settle<T>(levels, points, here, x + k * D, root + k * D, scale);
                chosen[k] = select(here, points, chosen[k]);
            }
            vf sum_qx, sum_q2;
            fit<T>(levels, chosen, wx, w, sum_qx, sum_q2);
            scale = select(again & (sum_q2 > 0), sum_qx / sum_q2, scale);
        }
        const vi flip = scale < 0;
        scale = select(flip, -scale, scale);
        for (int k = 0; k < N / 8; k++) signs[k] ^= flip & (T::even_signs ? 127 : 255);
        for (int k = 0; k < K; k++) {
            int32_t numbers[W];
            store(numbers, chosen[k]);
            for (int lane = 0; lane < W; lane++) out[lane].index[k] = uint16_t(grids[T::grid].map[numbers[lane]]);
        }
        for (int lane = 0; lane < W; lane++) {
            out[lane].scale = scale[lane];
            out[lane].none = false;
            for (int k = 0; k < N / 8; k++) out[lane].signs[k] = uint8_t(signs[k][lane]);
        }
    }
    for (int lane = 0; lane < W; lane++)
        if (none[lane]) {
            out[lane] = SubBlock{};
            out[lane].none = true;
        }
}

template <class T>
LANES_INLINE void pack_block(const SubBlock* from, uint8_t* to) {
    constexpr int parts = 256 / T::size;
    memset(to, 0, T::bytes);
    float max = 0;
    for (int j = 0; j < parts; j++) max = max > from[j].scale ? max : from[j].scale;
    int scales[parts] = {};
    if (max != 0) {
        const float d = max / 31, inverse = 1 / d;
        const uint16_t half = to_half(d * T::fudge);
        memcpy(to, &half, 2);
        for (int j = 0; j < parts; j++) {
            const int l = nearest_int(0.5f * (inverse * from[j].scale - 1));
            scales[j] = l < 0 ? 0 : l > 15 ? 15 : l;
        }
    } else if (T::zeros_cleared)
        return;
    T::pack(from, scales, to + 2);
}

template <class T>
size_t quantize(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    constexpr int parts = 256 / T::size;
    const int64_t total = nrows * n_per_row / 256, per_row = n_per_row / 256;
    for (int64_t first = 0; first < total; first += W) {
        const int count = total - first < W ? int(total - first) : W;
        const float* from = src + first * 256;
        float sigma2[W];
        int32_t wild_blocks[W] = {};
        {
            Rows blocks;
            for (int lane = 0; lane < W; lane++) blocks.at[lane] = from + 256 * (lane < count ? lane : count - 1);
            vf x[256];
            gather<256>(blocks, x);
            store(sigma2, T::sigma_factor * sum_of_squares(x, 256) / 256.f);
        }
        SubBlock done[W * parts];
        for (int base = 0; base < count * parts; base += W) {
            Rows at, q;
            vf sigma;
            for (int lane = 0; lane < W; lane++) {
                const int part = base + lane < count * parts ? base + lane : count * parts - 1;
                at.at[lane] = from + part * T::size;
                if (importance) q.at[lane] = importance + (first + part / parts) % per_row * 256 + part % parts * T::size;
                sigma[lane] = sigma2[part / parts];
            }
            vf x[T::size], w[T::size], high = {}, heavy = {};
            gather<T::size>(at, x);
            if (importance)
                weigh<T::size>(x, q, 0, sigma, w);
            else
                for (int i = 0; i < T::size; i++) w[i] = T::weight(x[i], sigma);
            // Where distances could overflow, or are not numbers, ggml finds no neighbour and aborts.
            vi wild = {};
            for (int i = 0; i < T::size; i++) {
                high = greater(absolute(x[i]), high);
                heavy = greater(w[i], heavy);
                wild |= ~(absolute(x[i]) <= 1e15f) | ~(w[i] >= 0);
            }
            wild |= ~(greater(heavy, heavy * high) <= 1e34f) | ~(square_root(heavy) * high * high <= 1e34f);
            quantize_lanes<T>(x, w, wild, done + base);
            if (any(wild))
                for (int lane = 0; lane < W; lane++)
                    if (wild[lane] && base + lane < count * parts) wild_blocks[(base + lane) / parts] = 1;
        }
        for (int j = 0; j < count; j++) {
            uint8_t* to = (uint8_t*)dst + (first + j) * T::bytes;
            if (wild_blocks[j])
                quantize_by_reference(T::type, from + 256 * j, to, 256,
                                      importance ? importance + (first + j) % per_row * 256 : nullptr);
            else
                pack_block<T>(done + j * parts, to);
        }
    }
    return size_t(total) * T::bytes;
}

}  // namespace

extern const Kernel LANES_TABLE(grid_signed)[];
const Kernel LANES_TABLE(grid_signed)[] = {
    {16, WITH, quantize<IQ2_XXS>},
    {17, WITH, quantize<IQ2_XS>},
    {18, EITHER, quantize<IQ3_XXS>},
    {21, EITHER, quantize<IQ3_S>},
    {22, EITHER, quantize<IQ2_S>},
    {0, EITHER, nullptr},
};
LANES_END
