// IQ1_S and IQ1_M: three levels on a grid, shifted up or down by an eighth. One sub-block in each lane.
// Follows quantize_row_iq1_s_impl and quantize_row_iq1_m_impl in ggml-quants.c; see LICENSE.ggml in this folder.
#include <cstdlib>

#include "grid_search.h"

LANES_BEGIN
namespace {

constexpr float delta = 0.125f;
constexpr float raised[3] = {-1 + delta, delta, 1 + delta}, lowered[3] = {-1 - delta, -delta, 1 - delta};

struct SubBlock {
    float scale;
    uint16_t index[4];  // of each point, by number in the grid
    uint16_t point[4];
    int lowered;  // bit k: the levels of half k lie lower (IQ1_M); bit 0: those of the whole (IQ1_S)
};

// The values of a sub-block in ascending order, each with its weight and where it came from.
template <int N>
struct Sorted {
    vf x[N], w[N];
    vi from[N];
};

template <int N>
LANES_INLINE void exchange(Sorted<N>& s, int a, int b) {
    const vf xa = s.x[a], xb = s.x[b], wa = s.w[a], wb = s.w[b];
    const vi ia = s.from[a], ib = s.from[b];
    const vi swap = (xa > xb) | ((xa == xb) & (ia > ib));
    s.x[a] = select(swap, xb, xa);
    s.x[b] = select(swap, xa, xb);
    s.w[a] = select(swap, wb, wa);
    s.w[b] = select(swap, wa, wb);
    s.from[a] = select(swap, ib, ia);
    s.from[b] = select(swap, ia, ib);
}

// ggml leaves the order of equal values to qsort. glibc's is stable on so few, which the network is too; elsewhere
// qsort itself has to say.
#if defined(__GLIBC__) && !defined(LANES_ASK_QSORT)
template <int N>
LANES_INLINE void order_equals(Sorted<N>&, const vf*, const vf*) {}
#else
struct Pair {
    float x;
    int32_t from;
};
int by_value(const void* left, const void* right) {
    const float l = ((const Pair*)left)->x, r = ((const Pair*)right)->x;
    return l < r ? -1 : l > r;
}
template <int N>
void order_equals(Sorted<N>& sorted, const vf* x, const vf* w) {
    vi equal = {};
    for (int i = 1; i < N; i++) equal |= sorted.x[i] == sorted.x[i - 1];
    if (!any(equal)) return;
    for (int lane = 0; lane < W; lane++) {
        if (!equal[lane]) continue;
        Pair pairs[N];
        for (int i = 0; i < N; i++) pairs[i] = {x[i][lane], i};
        qsort(pairs, N, sizeof *pairs, by_value);
        for (int i = 0; i < N; i++) {
            const int from = pairs[i].from;
            sorted.x[i][lane] = x[from][lane];
            sorted.w[i][lane] = w[from][lane];
            sorted.from[i][lane] = from;
        }
    }
}
#endif

// Batcher's network: the same exchanges for every input.
template <int N>
LANES_INLINE void sort(const vf* x, const vf* w, Sorted<N>& sorted) {
    for (int i = 0; i < N; i++) {
        sorted.x[i] = x[i];
        sorted.w[i] = w[i];
        sorted.from[i] = splat(i);
    }
    for (int p = 1; p < N; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < N; j += 2 * k)
                for (int i = j; i < j + k && i + k < N; i++)
                    if (i / (2 * p) == (i + k) / (2 * p)) exchange(sorted, i, i + k);
    order_equals(sorted, x, w);
}

// The best way to cut the sorted values into three groups found so far.
struct Best {
    vf scale, score = splat(-3.40282347e+38f);
    vi cuts = splat(-1);  // where the second group begins, where the third begins, which shifts: a byte each
};

LANES_INLINE vi is_promising(const Best& best, vf sum_qx, vf sum_q2) { return sum_qx * sum_qx > best.score * sum_q2; }
LANES_INLINE void consider(Best& best, vf sum_qx, vf sum_q2, int first, int second, int shifts) {
    const vi better = (sum_q2 > 0) & is_promising(best, sum_qx, sum_q2);
    const vf found = sum_qx / sum_q2;
    best.scale = select(better, found, best.scale);
    best.score = select(better, found * sum_qx, best.score);
    best.cuts = select(better, splat(first << 16 | second << 8 | shifts), best.cuts);
}

// All cuts of 32 sorted values, both shifts. `shifts` 0: raised, 1: lowered.
LANES_INLINE void search(const Sorted<32>& sorted, Best& best) {
    constexpr int N = 32;
    vf sum_x[N + 1], sum_w[N + 1], high_x[N + 1], low_x[N + 1], high_w[N + 1], low_w[N + 1];
    sum_x[0] = sum_w[0] = vf{};
    for (int i = 0; i < N; i++) {
        sum_x[i + 1] = sum_x[i] + sorted.w[i] * sorted.x[i];
        sum_w[i + 1] = sum_w[i] + sorted.w[i];
    }
    for (int i = 0; i <= N; i++) {
        const vf x = sum_x[N] - sum_x[i], w = sum_w[N] - sum_w[i];
        high_x[i] = x * raised[2];
        low_x[i] = x * lowered[2];
        high_w[i] = w * raised[2] * raised[2];
        low_w[i] = w * lowered[2] * lowered[2];
    }
    for (int first = 0; first <= N; first++) {
        const vf x_high = sum_x[first] * raised[0], x_low = sum_x[first] * lowered[0];
        const vf w_high = sum_w[first] * raised[0] * raised[0], w_low = sum_w[first] * lowered[0] * lowered[0];
        for (int second = first; second <= N; second++) {
            const vf x = (sum_x[second] - sum_x[first]) * delta;
            const vf w = (sum_w[second] - sum_w[first]) * delta * delta;
            const vf qx_high = x_high + x + high_x[second], q2_high = w_high + w + high_w[second];
            const vf qx_low = x_low - x + low_x[second], q2_low = w_low + w + low_w[second];
            if (any(is_promising(best, qx_high, q2_high) | is_promising(best, qx_low, q2_low))) {
                consider(best, qx_high, q2_high, first, second, 0);
                consider(best, qx_low, q2_low, first, second, 1);
            }
        }
    }
}

// All cuts of 16 sorted values, each half of the sub-block raised or lowered. Bit k of `shifts`: half k is lowered.
LANES_INLINE void search(const Sorted<16>& sorted, Best& best) {
    constexpr int N = 16;
    // The sums of each half; by how much each cut changes the sums of the squares.
    vf sum_x[2][N + 1], sum_w[2][N + 1], first_high[2][N + 1], first_low[2][N + 1], second_high[2][N + 1],
        second_low[2][N + 1];
    vf high_x[2], low_x[2];
    for (int half = 0; half < 2; half++) {
        sum_x[half][0] = sum_w[half][0] = vf{};
        for (int i = 0; i < N; i++) {
            const vi here = (sorted.from[i] < N / 2) == splat(half ? 0 : -1);
            const vf x = sum_x[half][i], w = sum_w[half][i];
            sum_x[half][i + 1] = select(here, x + sorted.w[i] * sorted.x[i], x);
            sum_w[half][i + 1] = select(here, w + sorted.w[i], w);
        }
        const vf w = sum_w[half][N];
        high_x[half] = sum_x[half][N] * raised[2];
        low_x[half] = sum_x[half][N] * lowered[2];
        for (int i = 0; i <= N; i++) {
            const vf part = sum_w[half][i];
            first_high[half][i] = w * raised[2] * raised[2] + part * (raised[0] * raised[0] - raised[1] * raised[1]);
            second_high[half][i] = part * (raised[1] * raised[1] - raised[2] * raised[2]);
            first_low[half][i] =
                w * lowered[2] * lowered[2] + part * (lowered[0] * lowered[0] - lowered[1] * lowered[1]);
            second_low[half][i] = part * (lowered[1] * lowered[1] - lowered[2] * lowered[2]);
        }
    }
    for (int first = 0; first <= N; first++)
        for (int second = first; second <= N; second++) {
            vf qx[2][2], q2[2][2];  // by half, by whether it is lowered
            for (int half = 0; half < 2; half++) {
                const vf x = sum_x[half][first] + sum_x[half][second];
                qx[half][0] = high_x[half] - x;
                qx[half][1] = low_x[half] - x;
                q2[half][0] = first_high[half][first] + second_high[half][second];
                q2[half][1] = first_low[half][first] + second_low[half][second];
            }
            vf sum_qx[4], sum_q2[4];
            vi promising = {};
            for (int k = 0; k < 4; k++) {
                sum_qx[k] = qx[0][k >> 1] + qx[1][k & 1];
                sum_q2[k] = q2[0][k >> 1] + q2[1][k & 1];
                promising |= is_promising(best, sum_qx[k], sum_q2[k]);
            }
            if (any(promising))
                for (int k = 0; k < 4; k++)
                    consider(best, sum_qx[k], sum_q2[k], first, second, (k >> 1) | (k & 1) << 1);
        }
}

// W sub-blocks of N: x are the weights, w how much each counts. Lanes of `wild` are left alone.
template <int N>
__attribute__((noinline)) void quantize_lanes(const vf* x, const vf* w, vi wild, float nothing, SubBlock* out) {
    constexpr int K = N / 8, SHIFTS = N == 16 ? 2 : 1;
    memset(out, 0, W * sizeof *out);
    vf max = absolute(x[0]);
    for (int i = 1; i < N; i++) max = greater(max, absolute(x[i]));
    vi none = wild | (max < nothing);
    if (!any(~none)) return;
    Sorted<N> sorted;
    sort<N>(x, w, sorted);
    Best best;
    best.scale = max;
    search(sorted, best);
    none |= best.cuts < 0;

    // The levels as points, two to a word.
    const vi first = best.cuts >> 16 & 255, second = best.cuts >> 8 & 255;
    vi points[N / 16] = {};
    for (int i = 0; i < N; i++) {
        const vi level = -((first <= i) + (second <= i)), shift = (sorted.from[i] & 15) * 2;
        for (int word = 0; word < N / 16; word++)
            points[word] |= select(sorted.from[i] >> 4 == word, level << shift, vi{});
    }
    const vi flip = best.scale < 0;
    vf scale = select(flip, -best.scale, best.scale);
    const vi shifts = (best.cuts ^ (flip & ((1 << SHIFTS) - 1))) & 255;
    for (int word = 0; word < N / 16; word++)
        points[word] = select(flip, (int32_t)0xaaaaaaaa - points[word], points[word]);

    const Grid& grid = grids[GRID_IQ1];
    const Levels<2> levels[2] = {Levels<2>(raised[0], 1), Levels<2>(lowered[0], 1)}, ternary(-1, 1);
    vi off_grid = {}, settled[K];
    for (int k = 0; k < K; k++) {
        int32_t at[W], found[W], moved[W], low[W];
        float scales[W];
        store(at, select(none, vi{}, points[k / 2] >> 16 * (k & 1) & 0xffff));
        store(low, shifts >> (SHIFTS == 2 ? k : 0) & 1);
        store(scales, scale);
        for (int lane = 0; lane < W; lane++) {
            const int32_t entry = grid.map[at[lane]];
            found[lane] = at[lane];
            moved[lane] = entry < 0 ? -1 : 0;
            if (entry < 0)
                found[lane] = best_neighbour<8, 2>(grid, ~entry, levels[low[lane]], (const float*)(x + 8 * k) + lane,
                                                   (const float*)(w + 8 * k) + lane, scales[lane]);
        }
        settled[k] = load(found);
        off_grid |= load(moved);
    }
    if (any(off_grid)) {
        vf sum_qx = {}, sum_q2 = {};
        for (int k = 0; k < K; k++) {
            const vf shift = select((shifts >> (SHIFTS == 2 ? k : 0) & 1) == 1, splat(-delta), splat(delta));
            for (int i = 0; i < 8; i++) {
                const vf q = ternary(settled[k] >> 2 * i) + shift, wq = w[8 * k + i] * q;
                sum_qx += wq * x[8 * k + i];
                sum_q2 += wq * q;
            }
        }
        scale = select(off_grid & (sum_qx > 0) & (sum_q2 > 0), sum_qx / sum_q2, scale);
    }
    for (int lane = 0; lane < W; lane++) {
        if (none[lane]) continue;
        out[lane].scale = scale[lane];
        out[lane].lowered = shifts[lane];
        for (int k = 0; k < K; k++) {
            out[lane].point[k] = uint16_t(settled[k][lane]);
            out[lane].index[k] = uint16_t(grid.map[settled[k][lane]]);
        }
    }
}

// The scales of a super-block in three bits each, and what they are multiples of. False: all zero.
template <int PARTS>
LANES_INLINE bool pack_scales(const SubBlock* from, int* levels, float& d) {
    float max = 0;
    for (int j = 0; j < PARTS; j++) max = max > from[j].scale ? max : from[j].scale;
    if (max == 0) return false;
    d = max / 15;
    const float inverse = 1 / d;
    for (int j = 0; j < PARTS; j++) {
        const int l = nearest_int(0.5f * (inverse * from[j].scale - 1));
        levels[j] = l < 0 ? 0 : l > 7 ? 7 : l;
    }
    return true;
}

struct IQ1_S {
    static constexpr int type = 19, size = 32, bytes = 50;
    static constexpr float nothing = 1e-12f;

    static void pack(const SubBlock* done, int count, const vf*, const vf*, uint8_t* to) {
        for (int block = 0; block < count; block++, done += 8, to += bytes) {
            int scales[8] = {};
            float d = 0;
            const bool some = pack_scales<8>(done, scales, d);
            const uint16_t half = some ? to_half(d * 1.125f) : 0;
            memcpy(to, &half, 2);
            for (int j = 0; j < 8; j++) {
                uint16_t high = uint16_t(scales[j] << 12);
                // Where every scale is zero ggml leaves out the shifts too.
                if (some) high |= uint16_t(done[j].lowered << 15);
                for (int k = 0; k < 4; k++) {
                    to[2 + 4 * j + k] = uint8_t(done[j].index[k]);
                    high |= uint16_t(done[j].index[k] >> 8 << 3 * k);
                }
                memcpy(to + 34 + 2 * j, &high, 2);
            }
        }
    }
};

struct IQ1_M {
    static constexpr int type = 29, size = 16, bytes = 56;
    static constexpr float nothing = 1e-7f;

    // x and w: W super-blocks, one in each lane, to fit their scales once more.
    static void pack(const SubBlock* done, int count, const vf* x, const vf* w, uint8_t* to) {
        int scales[W][16] = {};
        float d[W] = {};
        bool some[W] = {};
        for (int block = 0; block < count; block++) some[block] = pack_scales<16>(done + 16 * block, scales[block], d[block]);
        const Levels<2> ternary(-1, 1);
        vf sum_qx = {}, sum_q2 = {};
        for (int j = 0; j < 16; j++) {
            vf factor = {};
            for (int lane = 0; lane < count; lane++) factor[lane] = float(2 * scales[lane][j] + 1);
            for (int k = 0; k < 2; k++) {
                vi points = {};
                vf shift = {};
                for (int lane = 0; lane < count; lane++) {
                    points[lane] = done[16 * lane + j].point[k];
                    shift[lane] = done[16 * lane + j].lowered >> k & 1 ? -delta : delta;
                }
                for (int i = 0; i < 8; i++) {
                    const int at = 16 * j + 8 * k + i;
                    const vf q = (ternary(points >> 2 * i) + shift) * factor, wq = w[at] * q;
                    sum_qx += wq * x[at];
                    sum_q2 += wq * q;
                }
            }
        }
        for (int block = 0; block < count; block++, done += 16, to += bytes) {
            memset(to, 0, bytes);
            uint16_t words[4] = {};
            if (some[block]) {
                const float fitted = sum_q2[block] > 0 ? sum_qx[block] / sum_q2[block] : d[block];
                const uint16_t half = to_half(fitted * 1.1125f);
                for (int i = 0; i < 4; i++) words[i] = uint16_t(half >> 4 * i << 12);
            }
            for (int j = 0; j < 16; j++) {
                to[2 * j] = uint8_t(done[j].index[0]);
                to[2 * j + 1] = uint8_t(done[j].index[1]);
                to[32 + j] = uint8_t(done[j].index[0] >> 8 | done[j].index[1] >> 8 << 4);
                if (!some[block]) continue;
                to[32 + j] |= uint8_t((done[j].lowered & 1) << 3 | (done[j].lowered >> 1) << 7);
                words[j / 4] |= uint16_t(scales[block][j] << 3 * (j % 4));
            }
            memcpy(to + 48, words, 8);
        }
    }
};

template <class T>
size_t quantize(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance) {
    constexpr int parts = 256 / T::size;
    const int64_t total = nrows * n_per_row / 256, per_row = n_per_row / 256;
    for (int64_t first = 0; first < total; first += W) {
        const int count = total - first < W ? int(total - first) : W;
        const float* from = src + first * 256;
        // One super-block in each lane: ggml's weights, and where distances could overflow or are not numbers, so
        // that ggml finds no neighbour and aborts.
        Rows blocks, q = {};
        for (int lane = 0; lane < W; lane++) {
            const int block = lane < count ? lane : count - 1;
            blocks.at[lane] = from + 256 * block;
            if (importance) q.at[lane] = importance + (first + block) % per_row * 256;
        }
        vf x[256], w[256], high = {}, heavy = {};
        vi wild = {};
        gather<256>(blocks, x);
        if (importance)
            weigh<256>(x, q, 0, 2 * sum_of_squares(x, 256) / 256.f, w);
        else
            for (int i = 0; i < 256; i++) w[i] = x[i] * x[i];
        for (int i = 0; i < 256; i++) {
            high = greater(absolute(x[i]), high);
            heavy = greater(w[i], heavy);
            wild |= ~(absolute(x[i]) <= 1e15f) | ~(w[i] >= 0);
        }
        wild |= ~(greater(heavy, heavy * high) <= 1e34f) | ~(heavy * high * high <= 1e33f);

        // One sub-block in each lane.
        float weights[W][256];
        for (int at = 0; at < 256; at += W) {
            vf tile[W];
            for (int i = 0; i < W; i++) tile[i] = w[at + i];
            transpose(tile);
            for (int lane = 0; lane < W; lane++) store(weights[lane] + at, tile[lane]);
        }
        SubBlock done[W * parts];
        for (int base = 0; base < count * parts; base += W) {
            Rows at, weights_at;
            vi leave = {};
            for (int lane = 0; lane < W; lane++) {
                const int part = base + lane < count * parts ? base + lane : count * parts - 1;
                at.at[lane] = from + part * T::size;
                weights_at.at[lane] = weights[part / parts] + part % parts * T::size;
                leave[lane] = wild[part / parts];
            }
            vf values[T::size], counts[T::size];
            gather<T::size>(at, values);
            gather<T::size>(weights_at, counts);
            quantize_lanes<T::size>(values, counts, leave, T::nothing, done + base);
        }
        uint8_t* to = (uint8_t*)dst + first * T::bytes;
        T::pack(done, count, x, w, to);
        if (any(wild))
            for (int j = 0; j < count; j++)
                if (wild[j]) quantize_by_reference(T::type, from + 256 * j, to + T::bytes * j, 256, q.at[j]);
    }
    return size_t(total) * T::bytes;
}

}  // namespace

extern const Kernel LANES_TABLE(grid_ternary)[];
const Kernel LANES_TABLE(grid_ternary)[] = {
    {19, WITH, quantize<IQ1_S>},
    {29, EITHER, quantize<IQ1_M>},
    {0, EITHER, nullptr},
};
LANES_END
