// What every lane kernel stands on: vectors of W lanes, ggml's roundings in each lane, and the table of kernels.
//
// A lane performs exactly the sequence of scalar operations that ggml performs on one block, so the bytes are
// ggml's: no sum crosses lanes, nothing is contracted into FMA (-ffp-contract=off), and a quotient is a division.
// The same sources are compiled once for each instruction set, each time into a namespace of its own; the caller
// asks for a kernel by instruction set and type (kernels.h).
//
// The algorithms follow ggml-quants.c of llama.cpp; see LICENSE.ggml in this folder.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef LANES_WIDTH
#error "LANES_WIDTH and LANES_ISA come from CMakeLists.txt, one value for each instruction set"
#endif

#define LANES_BEGIN \
    namespace localmix { \
    namespace LANES_ISA {
#define LANES_END \
    } \
    }
#define LANES_INLINE static inline __attribute__((always_inline))

LANES_BEGIN
// Unnamed: an inline function compiled for AVX-512 must never stand in for the baseline's.
namespace {

constexpr int W = LANES_WIDTH;

template <int N>
struct Vector {
    typedef float f __attribute__((vector_size(4 * N)));
    typedef int32_t i __attribute__((vector_size(4 * N)));
    typedef uint32_t u __attribute__((vector_size(4 * N)));
};
typedef Vector<W>::f vf;
typedef Vector<W>::i vi;  // also a mask: all bits of a lane set or none
typedef Vector<W>::u vu;

LANES_INLINE vf splat(float value) { return vf{} + value; }
LANES_INLINE vi splat(int32_t value) { return vi{} + value; }

LANES_INLINE vf load(const float* from) {
    vf value;
    memcpy(&value, from, sizeof value);
    return value;
}
LANES_INLINE void store(float* to, vf value) { memcpy(to, &value, sizeof value); }
LANES_INLINE vi load(const int32_t* from) {
    vi value;
    memcpy(&value, from, sizeof value);
    return value;
}
LANES_INLINE void store(int32_t* to, vi value) { memcpy(to, &value, sizeof value); }

LANES_INLINE vi bits(vf value) { return (vi)value; }
LANES_INLINE vf from_bits(vi value) { return (vf)value; }
LANES_INLINE vf to_float(vi value) { return __builtin_convertvector(value, vf); }
LANES_INLINE vf absolute(vf value) { return from_bits(bits(value) & 0x7fffffff); }

// As C's conditional operator in each lane.
LANES_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
LANES_INLINE vi select(vi mask, vi yes, vi no) { return mask ? yes : no; }

// Whether a mask has any lane set.
LANES_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    if constexpr (W == 8) return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
    if constexpr (W == 4) return _mm_movemask_epi8((__m128i)mask) != 0;
#endif
    int32_t found = 0;
    for (int lane = 0; lane < W; lane++) found |= mask[lane];
    return found != 0;
}

// a < b ? a : b and a > b ? a : b, the operands in this order: it decides between equal zeros and about NaN.
#if defined(__AVX512F__)
LANES_INLINE vf lesser(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
LANES_INLINE vf greater(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
LANES_INLINE vi lesser(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
LANES_INLINE vi greater(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
LANES_INLINE vf square_root(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
#elif defined(__AVX2__)
LANES_INLINE vf lesser(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
LANES_INLINE vf greater(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
LANES_INLINE vi lesser(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
LANES_INLINE vi greater(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
LANES_INLINE vf square_root(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
#elif defined(__SSE2__)
LANES_INLINE vf lesser(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
LANES_INLINE vf greater(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
LANES_INLINE vi lesser(vi a, vi b) { return a < b ? a : b; }
LANES_INLINE vi greater(vi a, vi b) { return a > b ? a : b; }
LANES_INLINE vf square_root(vf a) { return (vf)_mm_sqrt_ps((__m128)a); }
#else
LANES_INLINE vf lesser(vf a, vf b) { return a < b ? a : b; }
LANES_INLINE vf greater(vf a, vf b) { return a > b ? a : b; }
LANES_INLINE vi lesser(vi a, vi b) { return a < b ? a : b; }
LANES_INLINE vi greater(vi a, vi b) { return a > b ? a : b; }
LANES_INLINE vf square_root(vf a) {
#if defined(__aarch64__)
    if constexpr (W == 4) return (vf)vsqrtq_f32((float32x4_t)a);
#endif
    for (int lane = 0; lane < W; lane++) a[lane] = __builtin_sqrtf(a[lane]);
    return a;
}
#endif

// Whole numbers, halves to even; only for |value| <= 4194303.
LANES_INLINE vf round_even(vf value) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (vf)_mm256_round_ps((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return value + 12582912.f - 12582912.f;
#endif
}

LANES_INLINE vi clamp(vi value, int low, int high) { return greater(lesser(value, splat(high)), splat(low)); }

// nearest_int: round to nearest even by adding 1.5 * 2^23; outside of +-4194303 the same odd numbers as ggml's.
LANES_INLINE vi nearest_int(vf value) { return (bits(value + 12582912.f) & 0x007fffff) - 0x00400000; }
LANES_INLINE int nearest_int(float value) {
    float moved = value + 12582912.f;
    int32_t found;
    memcpy(&found, &moved, sizeof found);
    return (found & 0x007fffff) - 0x00400000;
}

// What is left of an int32 in ggml's uint8_t and int8_t.
LANES_INLINE vi byte_of(vi value) { return value & 255; }
LANES_INLINE vi signed_byte_of(vi value) { return value << 24 >> 24; }

// ggml_compute_fp32_to_fp16 and back, in integers and exact products: the same for every processor.
LANES_INLINE uint16_t to_half(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    const uint32_t doubled = word + word;
    if (doubled > 0xff000000u) return uint16_t(word >> 16 & 0x8000u) | 0x7e00u;
    uint32_t exponent = doubled & 0xff000000u;
    if (exponent < 0x71000000u) exponent = 0x71000000u;
    // The sum rounds the mantissa at the half's last bit; the two products turn what is too large into infinity.
    float base = (__builtin_fabsf(value) * 0x1.0p+112f) * 0x1.0p-110f, offset;
    const uint32_t offset_word = (exponent >> 1) + 0x07800000u;
    memcpy(&offset, &offset_word, sizeof offset);
    base = offset + base;
    uint32_t rounded;
    memcpy(&rounded, &base, sizeof rounded);
    return uint16_t(word >> 16 & 0x8000u) | uint16_t((rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu));
}
LANES_INLINE vi to_half(vf value) {
    const vu word = (vu)value, doubled = word + word;
    vu exponent = doubled & 0xff000000u;
    exponent = exponent < 0x71000000u ? vu{} + 0x71000000u : exponent;
    const vf base = (vf)((exponent >> 1) + 0x07800000u) + (absolute(value) * 0x1.0p+112f) * 0x1.0p-110f;
    const vu rounded = (vu)base;
    vu half = (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
    half = doubled > 0xff000000u ? vu{} + 0x7e00u : half;
    return (vi)(half | (word >> 16 & 0x8000u));
}
LANES_INLINE vf from_half(vi half) {
    const vu word = (vu)half << 16, doubled = word + word;
    const vf normal = (vf)((doubled >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
    const vf small = (vf)((doubled >> 17) | (126u << 23)) - 0.5f;
    return (vf)((vu)(doubled < (1u << 27) ? small : normal) | (word & 0x80000000u));
}
LANES_INLINE float from_half(uint16_t half) {
    const uint32_t word = uint32_t(half) << 16, doubled = word + word;
    uint32_t normal_word = (doubled >> 4) + (0xe0u << 23), small_word = (doubled >> 17) | (126u << 23);
    float normal, small;
    memcpy(&normal, &normal_word, sizeof normal);
    memcpy(&small, &small_word, sizeof small);
    normal *= 0x1.0p-112f;
    small -= 0.5f;
    uint32_t found;
    memcpy(&found, doubled < (1u << 27) ? &small : &normal, sizeof found);
    found |= word & 0x80000000u;
    float value;
    memcpy(&value, &found, sizeof value);
    return value;
}

// One step of a transposition: what lies S to the right in row a and what lies S to the left in row b change places.
template <int S>
constexpr int upper(int lane) { return lane & S ? W + (lane ^ S) : lane; }
template <int S>
constexpr int lower(int lane) { return lane & S ? W + lane : lane ^ S; }
template <int S>
LANES_INLINE void exchange(vf& a, vf& b) {
    vf high, low;
#define LANES_PICK4(pick, at) pick<S>(at), pick<S>(at + 1), pick<S>(at + 2), pick<S>(at + 3)
#if LANES_WIDTH == 4
    high = __builtin_shufflevector(a, b, LANES_PICK4(upper, 0));
    low = __builtin_shufflevector(a, b, LANES_PICK4(lower, 0));
#elif LANES_WIDTH == 8
    high = __builtin_shufflevector(a, b, LANES_PICK4(upper, 0), LANES_PICK4(upper, 4));
    low = __builtin_shufflevector(a, b, LANES_PICK4(lower, 0), LANES_PICK4(lower, 4));
#else
    high = __builtin_shufflevector(a, b, LANES_PICK4(upper, 0), LANES_PICK4(upper, 4), LANES_PICK4(upper, 8),
                                   LANES_PICK4(upper, 12));
    low = __builtin_shufflevector(a, b, LANES_PICK4(lower, 0), LANES_PICK4(lower, 4), LANES_PICK4(lower, 8),
                                  LANES_PICK4(lower, 12));
#endif
#undef LANES_PICK4
    a = high;
    b = low;
}
template <int S>
LANES_INLINE void exchange_rows(vf* rows) {
    for (int row = 0; row < W; row++)
        if (!(row & S)) exchange<S>(rows[row], rows[row + S]);
}
LANES_INLINE void transpose(vf (&rows)[W]) {
    exchange_rows<1>(rows);
    exchange_rows<2>(rows);
    if constexpr (W > 4) exchange_rows<4>(rows);
    if constexpr (W > 8) exchange_rows<8>(rows);
}

LANES_INLINE vf sum_of_squares(const vf* x, int count) {
    vf sum = {};
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return sum;
}

// Where the W lanes read: lane k takes N consecutive floats (N a multiple of W), element i lands in out[i].
struct Rows {
    const float* at[W];
};
template <int N>
LANES_INLINE void gather(const Rows& rows, vf* out) {
    static_assert(N % W == 0, "whole tiles");
    for (int from = 0; from < N; from += W) {
        vf tile[W];
        for (int lane = 0; lane < W; lane++) tile[lane] = load(rows.at[lane] + from);
        transpose(tile);
        for (int i = 0; i < W; i++) out[from + i] = tile[i];
    }
}
// Four byte-sized values to a word, count of them (whole words only up to the last, which is filled with zeros).
template <int COUNT>
LANES_INLINE void pack_bytes(const vi* bytes, vi* words) {
    for (int i = 0; i < COUNT; i += 4) {
        vi word = bytes[i];
        for (int b = 1; b < 4 && i + b < COUNT; b++) word |= bytes[i + b] << 8 * b;
        words[i / 4] = word;
    }
}

// N weights of a sub-block from where the importance row is read, and their sum.
template <int N>
LANES_INLINE vf weigh(const vf* x, const Rows& importance, int from, vf sigma2, vf* w) {
    Rows part;
    for (int lane = 0; lane < W; lane++) part.at[lane] = importance.at[lane] + from;
    gather<N>(part, w);
    vf sum = {};
    for (int i = 0; i < N; i++) {
        w[i] *= square_root(sigma2 + x[i] * x[i]);
        sum += w[i];
    }
    return sum;
}

// Packed blocks, one in each lane as little-endian words, to count consecutive blocks of BYTES bytes each.
template <int BYTES>
LANES_INLINE void write_blocks(const vi* words, uint8_t* to, int count) {
    constexpr int whole = BYTES / 4, columns = (BYTES + 3) / 4;
    for (int from = 0; from < columns; from += W) {
        vf tile[W];
        for (int i = 0; i < W; i++) tile[i] = from + i < columns ? from_bits(words[from + i]) : vf{};
        transpose(tile);
        const int bytes = from + W <= whole ? 4 * W : BYTES - 4 * from;
        for (int lane = 0; lane < count; lane++) memcpy(to + lane * BYTES + 4 * from, &tile[lane], bytes);
    }
}

// Walk over all blocks of BLOCK weights, W at a time. `pack(x, importance, words)` gets where each lane reads and
// fills the BYTES bytes of each lane's block; importance.at[k] is null where there is none. The last batch
// repeats the last block in the lanes left over.
template <int BLOCK, int BYTES, class Pack>
LANES_INLINE size_t for_blocks(const float* src, void* dst, int64_t nrows, int64_t n_per_row, const float* importance,
                               Pack pack) {
    const int64_t per_row = n_per_row / BLOCK, total = nrows * per_row;
    for (int64_t first = 0; first < total; first += W) {
        Rows x, q;
        for (int lane = 0; lane < W; lane++) {
            const int64_t block = first + lane < total ? first + lane : total - 1;
            x.at[lane] = src + block * BLOCK;
            q.at[lane] = importance ? importance + block % per_row * BLOCK : nullptr;
        }
        vi words[(BYTES + 3) / 4];
        pack(x, q, words);
        write_blocks<BYTES>(words, (uint8_t*)dst + first * BYTES, int(total - first < W ? total - first : W));
    }
    return size_t(total) * BYTES;
}

}  // namespace
LANES_END
