// Matrix products with packed weights. Reading the weight from memory limits a product with few rows of x. Codes take
// an eighth of float32's bytes, so kernels read codes and decode them in the cache.
//
// The file is C++17 with a C interface and includes only system headers, so that other programs can use it alone.
// pot_kernel/__init__.py builds it at its first use.
//
// Codes are stored in tiles of 16 rows, because then one vector holds a column's weights of 16 rows, sums need no
// additions across a vector, and one vector of units serves 16 rows. A vector of 64 bytes has 16 lanes of 32 bits, and
// lane i belongs to row i of the tile. Byte b of a lane is:
//     8 bits: the level of column b, as a signed integer. A tile has 4 columns and 64 bytes.
//     4 bits: the code of column b in the low half, and of column 4 + b in the high half. 8 columns, 64 bytes.
//     3 bits: three vectors, 32 columns, 192 bytes. Bits 2 j and 2 j + 1 of the first vector are the low bits of
//             column 4 j + b, of the second vector those of column 16 + 4 j + b. Bit j of the third vector is the high
//             bit of column 4 j + b.
// Tiles follow each other along the columns, then along the rows. The matrix is padded with zeros to whole tiles. That
// costs at most 15 rows and 31 columns.
//
// For a few rows of x in 8 bits, a kernel decodes 4-bit codes in registers as it multiplies by them. For more rows, it
// decodes 256 columns of a tile row into a panel in the cache, and multiplies the panel by up to 144 rows of x:
//     bytes: (columns / 4, 16 rows, 4) levels, for activations of 8 bits
//     floats: (columns, 16 rows) weights, for activations of float32
// A weight's value is level * unit. Levels are whole numbers; with 4 bits they are at most 64.
//
// Activations are float32 or 8 bits. There are two kinds of 8 bits, with q a signed byte:
//     per group: x = scale * q, with a scale for each 64 columns. It is fast and serves models with outliers.
//     per row:   x = scale * (q + 128 - zero), pot.py's act_bits=8. The part of 128 - zero is added at the end, as
//                scale * (128 - zero) * row_sums, where row_sums is the sum of unit * level over a row of the weight.
// Sums of q * level are exact integers within a group of the weight.
//
// Sections: weights, activations, vectors (portable, AVX2, AVX-VNNI, AVX-512, NEON), AMX, products, choice of an
// instruction set, threads, interface.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(POT_EMULATE)  // tests/kernel.cpp has the intrinsics
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#endif

// -----------------------------------------------------------------------------
// Weights: the packed matrix as the caller passes it.

extern "C" struct PotWeight {
    const uint8_t* codes;    // tiles, as above
    const void* unit;        // (rows / 16, groups, 16), or (groups) if rows share them: float16 or float32
    const float* row_sums;   // (rows), from pot_row_sums; needed for activations of 8 bits per row only
    int64_t rows;            // output features
    int64_t columns;         // input features
    int64_t groups;          // groups per row; columns / groups neighbouring columns share a unit
    int32_t bits;            // 3, 4 or 8
    int32_t unit_per_row;    // 1: each row has its units; 0: all rows share one row of units
    int32_t unit_is_half;    // 1: units are float16; 0: float32
    int32_t activations;     // 0: float32; 1: 8 bits per row; 2: 8 bits per 64 columns
    int8_t table[16];        // (codes): level of each code, for 3 and 4 bits
};

namespace {

// Compilers keep an array of vectors in registers only if every loop over it is unrolled.
#define UNROLL _Pragma("GCC unroll 16")

constexpr int64_t CHUNK = 256;     // columns of a panel: its floats fill half of a level 1 cache of 32 KiB
constexpr int64_t ACT_GROUP = 64;  // columns that share a scale of activations
constexpr int64_t AHEAD = 4096;    // bytes to fetch before use; a processor alone does not go beyond the end of a page

int64_t tile_columns(const PotWeight& w) { return w.bits == 8 ? 4 : w.bits == 4 ? 8 : 32; }

int64_t tile_bytes(const PotWeight& w) { return w.bits == 3 ? 192 : 64; }

// Codes of 16 rows from 16 * block on, from a column on that is a multiple of 32.
const uint8_t* codes_at(const PotWeight& w, int64_t block, int64_t column) {
    const int64_t width = tile_columns(w), tiles = (w.columns + width - 1) / width;
    return w.codes + (block * tiles + column / width) * tile_bytes(w);
}

float half_to_float(uint16_t half) {  // of a finite number
    const uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;  // at float32's position
    float f;
    std::memcpy(&f, &bits, 4);
    return f * 0x1p112f;
}

// Unit of a row in a group.
float unit_at(const PotWeight& w, int64_t row, int64_t group) {
    const int64_t i = w.unit_per_row ? (row / 16 * w.groups + group) * 16 + row % 16 : group;
    return w.unit_is_half ? half_to_float(static_cast<const uint16_t*>(w.unit)[i]) : static_cast<const float*>(w.unit)[i];
}

// Level of one weight.
int level_at(const PotWeight& w, int64_t row, int64_t column) {
    const uint8_t* p = codes_at(w, row / 16, column / 32 * 32);
    const int64_t c = column % 32, lane = row % 16 * 4;
    if (w.bits == 8) return int8_t(p[c / 4 * 64 + lane + c % 4]);
    if (w.bits == 4) return w.table[p[c / 8 * 64 + lane + c % 4] >> (c & 4) & 15];
    const int low = p[c / 16 * 64 + lane + c % 4] >> c % 16 / 4 * 2 & 3, high = p[128 + lane + c % 4] >> c / 4 & 1;
    return w.table[low | high << 2];
}

// Decodes a row to float32: out (columns).
void decode_row(const PotWeight& w, int64_t row, float* out) {
    const int64_t size = w.columns / w.groups;
    float unit = 0;
    for (int64_t c = 0; c < w.columns; c++) {
        if (c % size == 0) unit = unit_at(w, row, c / size);
        out[c] = float(level_at(w, row, c)) * unit;
    }
}

// -----------------------------------------------------------------------------
// Activations: rows of x rounded to 8 bits.

const float MAGIC = 0x1.8p23f;  // adding and subtracting it rounds to nearest, half to even

// Rounds x (columns) as pot.py's fake_quantize_activations does: x = scale * (q - zero), q from 0 to 255. Returns false
// if x holds NaN or infinities or if its range overflows float32.
bool quantize(const float* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
    float low[16] = {}, high[16] = {};  // 16 partial results: the compiler vectorizes the loop
    int32_t nan[16] = {};
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16)
        for (int k = 0; k < 16; k++) {
            low[k] = x[c + k] < low[k] ? x[c + k] : low[k];
            high[k] = x[c + k] > high[k] ? x[c + k] : high[k];
            nan[k] |= x[c + k] != x[c + k];
        }
    for (; c < columns; c++) {
        low[0] = std::min(low[0], x[c]);
        high[0] = std::max(high[0], x[c]);
        nan[0] |= x[c] != x[c];
    }
    for (int k = 1; k < 16; k++) {
        low[0] = std::min(low[0], low[k]);
        high[0] = std::max(high[0], high[k]);
        nan[0] |= nan[k];
    }
    const float s = std::max((high[0] - low[0]) / 255, 0x1p-126f);
    if (nan[0] || !(s < INFINITY)) return false;
    const float z = (-low[0] / s + MAGIC) - MAGIC;
    *scale = s;
    *zero = int32_t(z);
    for (c = 0; c < columns; c++) {
        const float f = (x[c] / s + MAGIC) - MAGIC + z;
        q[c] = uint8_t(int32_t(f < 0 ? 0 : f > 255 ? 255 : f));
    }
    return true;
}

// Rounds up to 64 values of x to q, which has room for 64: x = scale * q, q from -127 to 127. Returns the scale: NaN if
// x holds NaN or infinities. The rest of q becomes zero.
float quantize_group(const float* x, int64_t n, int8_t* q) {
    float v[ACT_GROUP] = {}, most;
    int32_t bits[ACT_GROUP], high = 0;
    std::memcpy(v, x, 4 * n);
    std::memcpy(bits, v, sizeof v);
    for (int32_t b : bits) high = std::max(high, b & 0x7fffffff);  // absolute values are ordered as their bits are
    std::memcpy(&most, &high, 4);
    const bool finite = high < 0x7f800000;
    const float scale = std::max(most, 0x1p-100f) / 127;
    if (!finite) std::fill_n(v, ACT_GROUP, 0.0f);
    for (float& f : v) f = f / scale + MAGIC;  // the low bits of MAGIC + n are n
    std::memcpy(bits, v, sizeof v);
    for (int c = 0; c < ACT_GROUP; c++) q[c] = int8_t(bits[c]);
    return finite ? scale : NAN;
}

// n, rounded up to an odd number of cache lines of `line` values. A cache has only a few places for lines that are 4,096
// bytes apart, so rows with such a stride would push each other out.
int64_t padded(int64_t n, int64_t line) { return ((n + line - 1) / line | 1) * line; }

// Columns of a chunk that share a unit of the weight and a scale of x.
struct Segment {
    int64_t column;  // first column, a multiple of 4
    int64_t quads;   // columns / 4
    int64_t group;   // of the weight
};

// Rows of x in 8 bits, for products with a weight whose groups are multiples of 4 columns.
struct Rows8 {
    int64_t stride = 0;             // bytes from a row to the next: columns, padded by `padded`
    std::vector<Segment> segments;  // of all columns
    std::vector<int8_t> q;          // (n, padded to 16; stride)
    std::vector<float> scale;       // (n, segments): of x within the segment, without the row's scale
    std::vector<int32_t> start;     // (n, segments): -bias * sum of q, the value with which a sum of products starts
    std::vector<float> row_scale;   // (n): 1 if scales are per group; NaN if x holds NaN or infinities
    std::vector<float> offset;      // (n): 128 - zero, or 0
    int bias = 0;                   // added to levels of the weight, so that they are not negative

    // Makes room for n rows.
    void reset(const PotWeight& w, int64_t n, bool is_unsigned) {
        const int64_t size = w.columns / w.groups;
        stride = padded(w.columns, 64);
        segments.clear();
        for (int64_t c = 0, end; c < w.columns; c = end) {
            end = std::min({w.columns, (c / size + 1) * size, (c / CHUNK + 1) * CHUNK});
            if (w.activations == 2) end = std::min(end, (c / ACT_GROUP + 1) * ACT_GROUP);
            segments.push_back({c, (end - c + 3) / 4, c / size});
        }
        q.assign((n + 15) / 16 * 16 * stride, 0);
        scale.assign(n * segments.size(), 1.0f);
        start.resize(n * segments.size());
        row_scale.assign(n, 1.0f);
        offset.assign(n, 0.0f);
        bias = is_unsigned && w.bits != 8 ? *std::max_element(w.table, w.table + 16) : 0;
    }

    // Rounds row i, which is x (columns).
    void round(const PotWeight& w, const float* x, int64_t i) {
        int8_t* row = &q[i * stride];
        float group_scale = 1;
        if (w.activations == 1) {
            int32_t zero = 0;
            auto* bytes = reinterpret_cast<uint8_t*>(row);
            if (!quantize(x, w.columns, bytes, &row_scale[i], &zero)) {
                row_scale[i] = NAN;
                std::fill_n(bytes, w.columns, 128);
            }
            for (int64_t c = 0; c < w.columns; c++) row[c] = int8_t(bytes[c] ^ 128);
            offset[i] = float(128 - zero);
        }
        for (size_t s = 0; s < segments.size(); s++) {
            const Segment& segment = segments[s];
            if (w.activations == 2) {
                if (segment.column % ACT_GROUP == 0)
                    group_scale = quantize_group(x + segment.column, std::min(ACT_GROUP, w.columns - segment.column),
                                                 row + segment.column);
                scale[i * segments.size() + s] = group_scale;
            }
            int32_t total = 0;
            for (int64_t c = 0; c < 4 * segment.quads; c++) total += row[segment.column + c];
            start[i * segments.size() + s] = -bias * total;
        }
    }
};

// -----------------------------------------------------------------------------
// Vectors: what the kernels need of each instruction set. I is a register of integers, F one of floats; the 64 bytes of
// a tile's vector take N = 64 / sizeof(I) registers. The compiler's flags (-march=native) say which sets there are.
//
// dot adds the products of four bytes of w and of x to each lane. If UNSIGNED, it takes bytes of w as 0 to 255. Then a
// panel holds level + bias, and a sum begins at -bias times the sum of x. dot_signed takes signed bytes of w everywhere.

template <class V>
constexpr int N = 64 / sizeof(typename V::I);

struct Portable {
    typedef int32_t I __attribute__((vector_size(16)));
    typedef float F __attribute__((vector_size(16)));
    static constexpr int ROWS = 2, FLOAT_ROWS = 4;  // rows of x whose sums fit the registers
    static constexpr bool UNSIGNED = false;

    static F set(float f) { return F{f, f, f, f}; }
    static F load(const float* p) { F f; std::memcpy(&f, p, 16); return f; }
    static F load_half(const uint16_t* p) {
        return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
    }
    static void store(float* p, F f) { std::memcpy(p, &f, 16); }
    static F multiply_add(F a, F b, F c) { return a * b + c; }
    static F multiply(F a, F b) { return a * b; }
    static I add(I a, I b) { return a + b; }
    static F to_float(I a) { return __builtin_convertvector(a, F); }
    static I set(int32_t n) { return I{n, n, n, n}; }
    static I load(const void* p) { I a; std::memcpy(&a, p, 16); return a; }
    static void store(void* p, I a) { std::memcpy(p, &a, 16); }
    static I and_bits(I a, I b) { return a & b; }
    static I or_bits(I a, I b) { return a | b; }
    static I shift(I a, int left) { return left < 0 ? I((Unsigned(a) >> -left)) : a << left; }
    static I byte(I a, int b) { return a << (24 - 8 * b) >> 24; }
    static I look_up(I table, I codes) {
        uint8_t t[16], c[16];
        store(t, table), store(c, codes);
        for (uint8_t& code : c) code = t[code];
        return load(c);
    }
    static I dot(I sum, I w, I x) {
        UNROLL for (int b = 0; b < 4; b++) sum += byte(w, b) * byte(x, b);
        return sum;
    }
    static I dot_signed(I sum, I w, I x) { return dot(sum, w, x); }

  private:
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Avx2 {
    using I = __m256i;
    using F = __m256;
    static constexpr int ROWS = 3, FLOAT_ROWS = 6;
    static constexpr bool UNSIGNED = true;

    static F set(float f) { return _mm256_set1_ps(f); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load_half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store(float* p, F f) { _mm256_storeu_ps(p, f); }
    static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static I set(int32_t n) { return _mm256_set1_epi32(n); }
    static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
    static void store(void* p, I a) { _mm256_storeu_si256(static_cast<I*>(p), a); }
    static I and_bits(I a, I b) { return _mm256_and_si256(a, b); }
    static I or_bits(I a, I b) { return _mm256_or_si256(a, b); }
    static I shift(I a, int left) { return left < 0 ? _mm256_srli_epi32(a, -left) : _mm256_slli_epi32(a, left); }
    static I byte(I a, int b) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * b), 24); }
    static I look_up(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }
    // A sum of two products is at most 2 * 128 * 128 in size, which fits 16 bits.
    static I dot(I sum, I w, I x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }
    static I dot_signed(I sum, I w, I x) { return dot(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w)); }
};
#endif

#if defined(__AVXVNNI__)
struct AvxVnni : Avx2 {  // Intel's processors without AVX-512
    static I dot(I sum, I w, I x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
    static I dot_signed(I sum, I w, I x) { return dot(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w)); }
};
#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
struct Avx512 {
    using I = __m512i;
    using F = __m512;
    static constexpr int ROWS = 12, FLOAT_ROWS = 12;
    static constexpr bool UNSIGNED = true;

    static F set(float f) { return _mm512_set1_ps(f); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
    static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static I set(int32_t n) { return _mm512_set1_epi32(n); }
    static I load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, I a) { _mm512_storeu_si512(p, a); }
    static I and_bits(I a, I b) { return _mm512_and_si512(a, b); }
    static I or_bits(I a, I b) { return _mm512_or_si512(a, b); }
    static I shift(I a, int left) {
        return left < 0 ? _mm512_srli_epi32(a, unsigned(-left)) : _mm512_slli_epi32(a, unsigned(left));
    }
    static I byte(I a, int b) { return _mm512_srai_epi32(_mm512_slli_epi32(a, unsigned(24 - 8 * b)), 24); }
    static I look_up(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }
    static I dot(I sum, I w, I x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static I dot_signed(I sum, I w, I x) {  // a product's sign goes from w to x
        const __mmask64 negative = _mm512_movepi8_mask(w);
        return dot(sum, _mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x));
    }
};
#endif

#if defined(__aarch64__)
struct Neon {
    using I = int32x4_t;
    using F = float32x4_t;
    static constexpr int ROWS = 4, FLOAT_ROWS = 4;
    static constexpr bool UNSIGNED = false;

    static F set(float f) { return vdupq_n_f32(f); }
    static F load(const float* p) { return vld1q_f32(p); }
    static F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static void store(float* p, F f) { vst1q_f32(p, f); }
    static F multiply_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F multiply(F a, F b) { return vmulq_f32(a, b); }
    static I add(I a, I b) { return vaddq_s32(a, b); }
    static F to_float(I a) { return vcvtq_f32_s32(a); }
    static I set(int32_t n) { return vdupq_n_s32(n); }
    static I load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
    static void store(void* p, I a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
    static I and_bits(I a, I b) { return vandq_s32(a, b); }
    static I or_bits(I a, I b) { return vorrq_s32(a, b); }
    static I shift(I a, int left) {
        return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(left)));
    }
    static I byte(I a, int b) { return vshrq_n_s32(vshlq_s32(a, vdupq_n_s32(24 - 8 * b)), 24); }
    static I look_up(I table, I codes) {
        return vreinterpretq_s32_s8(vqtbl1q_s8(vreinterpretq_s8_s32(table), vreinterpretq_u8_s32(codes)));
    }
    static I dot(I sum, I w, I x) {
        const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, a, b);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
    static I dot_signed(I sum, I w, I x) { return dot(sum, w, x); }
};
#endif

// Units of a register of rows, from 16 * block + h * lanes on, in a group.
template <class V>
typename V::F load_unit(const PotWeight& w, int64_t block, int64_t group, int h) {
    if (!w.unit_per_row) return V::set(unit_at(w, 0, group));
    const int64_t i = (block * w.groups + group) * 16 + h * int(sizeof(typename V::F) / 4);
    return w.unit_is_half ? V::load_half(static_cast<const uint16_t*>(w.unit) + i)
                          : V::load(static_cast<const float*>(w.unit) + i);
}

// -----------------------------------------------------------------------------
// AMX multiplies tiles: 16 rows of x times a panel of 64 columns and 16 rows of the weight in one instruction. It serves
// many rows of x with 8 bits.

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#define POT_AMX
struct Amx : Avx512 {};

// The system lets a process use AMX only after it asks.
bool has_amx() {
    const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return allowed && __builtin_cpu_supports("avx512f");
}

// As byte_tile, for 16 rows of x and segments of 64 columns.
void amx_tile(const PotWeight& w, const Rows8& x, int64_t i, int64_t block, const uint8_t* panel, int64_t from,
              int64_t to, float* sums) {
    const int64_t count = int64_t(x.segments.size());
    alignas(64) int32_t product[16][16];
    for (int64_t s = from; s < to; s++, panel += 1024) {
        _tile_zero(0);
        _tile_loadd(1, &x.q[i * x.stride + x.segments[s].column], size_t(x.stride));
        _tile_loadd(2, panel, 64);
        if (w.bits == 8)
            _tile_dpbssd(0, 1, 2);
        else
            _tile_dpbsud(0, 1, 2);
        _tile_stored(0, product, 64);
        const __m512 units = load_unit<Avx512>(w, block, x.segments[s].group, 0);
        UNROLL for (int r = 0; r < 16; r++) {
            const int64_t k = (i + r) * count + s;
            const __m512i total = _mm512_add_epi32(_mm512_load_si512(product[r]), _mm512_set1_epi32(x.start[k]));
            const __m512 scaled = _mm512_mul_ps(units, _mm512_set1_ps(x.scale[k]));
            _mm512_storeu_ps(sums + 16 * r, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scaled,
                                                            _mm512_loadu_ps(sums + 16 * r)));
        }
    }
}

// Sets the shape of the tile registers while it lives: 16 rows of 64 bytes.
struct AmxTiles {
    AmxTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};  // (tile registers): bytes per row
            uint8_t rows[16] = {};    // (tile registers)
        } config;
        for (int t = 0; t < 3; t++) config.bytes[t] = 64, config.rows[t] = 16;
        asm volatile("" ::: "memory");  // compilers do not know that tile instructions read all of these bytes
        _tile_loadconfig(&config);
    }
    ~AmxTiles() { _tile_release(); }
};
#endif

// -----------------------------------------------------------------------------
// Products: y (n, rows) = x times the weight transposed.

struct Job {
    const PotWeight* w;
    const float* bias;  // (rows), or null
    const float* x;     // (n, columns); not used if x8 is there
    int64_t n;          // rows of x
    int64_t x_stride;   // floats from a row of x to the next
    const Rows8* x8;    // x in 8 bits; null: x is float32
    float* y;           // (n, rows)
    int64_t y_stride;   // floats from a row of y to the next
};

// Decodes 16 rows of a chunk of columns to a panel of bytes, which has room for CHUNK columns. levels (64) is the table,
// four times.
template <class V>
void decode_bytes(const PotWeight& w, const uint8_t* codes, int64_t columns, const uint8_t* levels, uint8_t* out) {
    using I = typename V::I;
    constexpr int size = sizeof(I);
    const I table = V::load(levels), ones = V::set(0x01010101);
    if (w.bits == 4)
        for (const uint8_t* end = codes + (columns + 7) / 8 * 64; codes < end; codes += 64, out += 128)
            UNROLL for (int h = 0; h < N<V>; h++) {
                const I c = V::load(codes + h * size), mask = V::set(0x0f0f0f0f);
                V::store(out + h * size, V::look_up(table, V::and_bits(c, mask)));
                V::store(out + 64 + h * size, V::look_up(table, V::and_bits(V::shift(c, -4), mask)));
            }
    else
        for (const uint8_t* end = codes + (columns + 31) / 32 * 192; codes < end; codes += 192, out += 512)
            for (int h = 0; h < N<V>; h++) {
                const I high = V::load(codes + 128 + h * size), three = V::set(0x03030303);
                for (int half = 0; half < 2; half++) {
                    const I low = V::load(codes + 64 * half + h * size);
                    UNROLL for (int j = 0; j < 4; j++) {
                        const I bit = V::and_bits(V::shift(high, -4 * half - j), ones);
                        const I code = V::or_bits(V::and_bits(V::shift(low, -2 * j), three), V::shift(bit, 2));
                        V::store(out + 256 * half + 64 * j + h * size, V::look_up(table, code));
                    }
                }
            }
}

// What byte_tile reads.
enum Source {
    LEVELS,  // a panel of levels + bias
    SIGNED,  // a panel of levels: weights of 8 bits
    CODES,   // tiles of 4-bit codes: for few rows of x a panel costs more than it saves
};

// Multiplies R rows of x, from row i on, by the levels of segments `from` to `to` - 1 of 16 rows of the weight, and adds
// the products to sums (R, 16). p: where these segments begin. levels (64): the table + bias, four times, for CODES.
template <class V, int R, Source S>
void byte_tile(const PotWeight& w, const Rows8& x, int64_t i, int64_t block, const uint8_t* p, const uint8_t* levels,
               int64_t from, int64_t to, float* sums) {
    using I = typename V::I;
    constexpr int size = sizeof(I), lanes = size / 4, QUADS = S == CODES ? 2 : 1;
    // An addition to a sum waits for the one before it. Few rows have few sums, so each is split into two.
    constexpr int CHAINS = R < 4 ? QUADS : 1;
    const I table = V::load(levels), mask = V::set(0x0f0f0f0f);
    const int64_t count = int64_t(x.segments.size()), stride = x.stride;
    const float* scale = &x.scale[i * count];
    const int32_t* start = &x.start[i * count];
    typename V::F total[R][N<V>];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < N<V>; h++) total[r][h] = V::load(sums + 16 * r + h * lanes);
    for (int64_t s = from; s < to; s++) {
        const Segment& segment = x.segments[s];
        const int8_t* q = &x.q[i * stride + segment.column];
        I sum[CHAINS][R][N<V>];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int h = 0; h < N<V>; h++) {
                sum[0][r][h] = V::set(start[r * count + s]);
                if (CHAINS == 2) sum[CHAINS - 1][r][h] = V::set(0);
            }
        for (int64_t quad = 0; quad < segment.quads; quad += QUADS, p += 64, q += 4 * QUADS) {
            if (S != LEVELS && R < 3) __builtin_prefetch(p + AHEAD);
            UNROLL for (int h = 0; h < N<V>; h++) {
                const I vector = V::load(p + h * size);
                UNROLL for (int k = 0; k < QUADS; k++) {
                    const I code = V::and_bits(k ? V::shift(vector, -4) : vector, mask);
                    const I v = S == CODES ? V::look_up(table, code) : vector;
                    UNROLL for (int r = 0; r < R; r++) {
                        int32_t four;
                        std::memcpy(&four, q + r * stride + 4 * k, 4);
                        I& out = sum[k % CHAINS][r][h];
                        out = S == SIGNED ? V::dot_signed(out, v, V::set(four)) : V::dot(out, v, V::set(four));
                    }
                }
            }
        }
        UNROLL for (int h = 0; h < N<V>; h++) {
            const auto unit = load_unit<V>(w, block, segment.group, h);
            UNROLL for (int r = 0; r < R; r++) {
                if (CHAINS == 2) sum[0][r][h] = V::add(sum[0][r][h], sum[CHAINS - 1][r][h]);
                total[r][h] = V::multiply_add(V::to_float(sum[0][r][h]), V::multiply(unit, V::set(scale[r * count + s])),
                                              total[r][h]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < N<V>; h++) V::store(sums + 16 * r + h * lanes, total[r][h]);
}

// Decodes 16 rows of a chunk to a panel of floats (columns, 16). bytes is a panel of levels without bias.
template <class V>
void decode_floats(const PotWeight& w, int64_t block, int64_t column, int64_t columns, const uint8_t* bytes, float* out) {
    using I = typename V::I;
    constexpr int size = sizeof(I), lanes = size / 4;
    const int64_t group_size = w.columns / w.groups;
    typename V::F u[N<V>] = {};
    for (int64_t c = 0, change = 0; c < columns; c += 4, bytes += 64)
        for (int64_t k = 0; k < 4 && c + k < columns; k++, out += 16) {
            if (c + k == change) {
                const int64_t group = (column + c + k) / group_size;
                for (int h = 0; h < N<V>; h++) u[h] = load_unit<V>(w, block, group, h);
                change = (group + 1) * group_size - column;
            }
            for (int h = 0; h < N<V>; h++)
                V::store(out + h * lanes, V::multiply(V::to_float(V::byte(V::load(bytes + h * size), int(k))), u[h]));
        }
}

// Multiplies R rows of x (columns), from `x` on, by a panel of floats, and adds the products to sums (R, 16).
template <class V, int R>
void float_tile(const float* x, int64_t stride, const float* panel, int64_t columns, float* sums) {
    constexpr int lanes = sizeof(typename V::F) / 4, S = R < 4 ? 4 / R : 1;
    typename V::F sum[S][R][N<V>];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < N<V>; h++) {
            sum[0][r][h] = V::load(sums + 16 * r + h * lanes);
            UNROLL for (int k = 1; k < S; k++) sum[k][r][h] = V::set(0.0f);
        }
    auto add = [&](int k, int64_t c) {
        UNROLL for (int r = 0; r < R; r++) {
            const auto value = V::set(x[r * stride + c]);
            UNROLL for (int h = 0; h < N<V>; h++)
                sum[k][r][h] = V::multiply_add(V::load(panel + 16 * c + h * lanes), value, sum[k][r][h]);
        }
    };
    int64_t c = 0;
    for (; c + S <= columns; c += S)
        UNROLL for (int k = 0; k < S; k++) add(k, c + k);
    for (; c < columns; c++) add(0, c);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int h = 0; h < N<V>; h++) {
            auto total = sum[0][r][h];
            UNROLL for (int k = 1; k < S; k++) total = V::multiply_add(sum[k][r][h], V::set(1.0f), total);
            V::store(sums + 16 * r + h * lanes, total);
        }
}

// Calls tile(i, size) for rows i of x, in tiles of M, 4, 2 and 1 rows; size is a std::integral_constant.
template <int M, class Tile>
void in_tiles(int64_t n, const Tile& tile) {
    int64_t i = 0;
    for (; i + M <= n; i += M) tile(i, std::integral_constant<int, M>());
    if (M > 4)
        for (; i + 4 <= n; i += 4) tile(i, std::integral_constant<int, 4>());
    if (M > 2)
        for (; i + 2 <= n; i += 2) tile(i, std::integral_constant<int, 2>());
    for (; i < n; i++) tile(i, std::integral_constant<int, 1>());
}

// Computes y for tile rows `from` to `to` - 1 of the weight.
template <class V>
void product(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    constexpr int64_t MOST = 144;  // rows of x that a panel is multiplied by; in 8 bits they fit the level 2 cache
    const bool few = job.x8 && job.n <= V::ROWS && w.columns / w.groups % 8 == 0;
    const Source source = w.bits == 8 ? SIGNED : w.bits == 4 && few ? CODES : LEVELS;
    const int64_t width = job.x8 && source != LEVELS ? w.columns : CHUNK;  // columns of a chunk
    const int64_t chunks = (w.columns + width - 1) / width;
    std::vector<int64_t> first(chunks + 1);  // (chunks + 1): first segment of each chunk
    if (job.x8) {
        first[chunks] = int64_t(job.x8->segments.size());
        for (int64_t s = first[chunks] - 1; s >= 0; s--) first[job.x8->segments[s].column / width] = s;
    }
    alignas(64) uint8_t levels[64], bytes[CHUNK * 16];  // vectors that cross a cache line cost twice the time
    alignas(64) float floats[CHUNK * 16], sums[MOST * 16];
    for (int i = 0; i < 64; i++) levels[i] = uint8_t(w.table[i % 16] + (job.x8 ? job.x8->bias : 0));
    auto multiply = [&](int64_t block, int64_t chunk, int64_t row, int64_t n) {  // adds to sums (n, 16)
        const int64_t column = chunk * width, columns = std::min(width, w.columns - column);
        const uint8_t *codes = codes_at(w, block, column), *panel = codes;
        if (source == LEVELS) decode_bytes<V>(w, codes, columns, levels, bytes), panel = bytes;
        if (!job.x8) {
            decode_floats<V>(w, block, column, columns, panel, floats);
            in_tiles<V::FLOAT_ROWS>(n, [&](int64_t i, auto size) {
                const float* x = job.x + (row + i) * job.x_stride + column;
                float_tile<V, size.value>(x, job.x_stride, floats, columns, &sums[16 * i]);
            });
            return;
        }
        const int64_t start = first[chunk], end = first[chunk + 1];
        int64_t done = 0;  // rows of x
#if defined(POT_AMX)
        const auto* segments = job.x8->segments.data();
        const auto is_tile = [](const Segment& s) { return 4 * s.quads == ACT_GROUP; };
        if (std::is_same<V, Amx>::value && n >= 16 && columns % ACT_GROUP == 0 &&
            std::all_of(segments + start, segments + end, is_tile))
            for (const AmxTiles tiles; done + 16 <= n; done += 16)
                amx_tile(w, *job.x8, row + done, block, panel, start, end, &sums[16 * done]);
#endif
        in_tiles<V::ROWS>(n - done, [&](int64_t k, auto size) {
            auto tile = source == LEVELS   ? byte_tile<V, size.value, LEVELS>
                        : source == SIGNED ? byte_tile<V, size.value, SIGNED>
                                           : byte_tile<V, size.value, CODES>;
            const int64_t i = done + k;
            tile(w, *job.x8, row + i, block, panel, levels, start, end, &sums[16 * i]);
        });
    };
    for (int64_t row = 0; row < job.n; row += MOST)
        for (int64_t block = from; block < to; block++) {
            const int64_t n = std::min(MOST, job.n - row), rows = std::min<int64_t>(16, w.rows - 16 * block);
            std::fill_n(sums, 16 * n, 0.0f);
            for (int64_t chunk = 0; chunk < chunks; chunk++) multiply(block, chunk, row, n);
            float bias[16] = {}, row_sums[16] = {};  // zero where there are none
            if (job.bias) std::copy_n(job.bias + 16 * block, rows, bias);
            if (job.x8 && w.activations == 1) std::copy_n(w.row_sums + 16 * block, rows, row_sums);
            for (int64_t i = 0; i < n; i++) {
                float *y = job.y + (row + i) * job.y_stride + 16 * block, *sum = &sums[16 * i];
                const float scale = job.x8 ? job.x8->row_scale[row + i] : 1;
                const float offset = job.x8 ? job.x8->offset[row + i] : 0;
                for (int r = 0; r < 16; r++) sum[r] = scale * (sum[r] + offset * row_sums[r]) + bias[r];
                rows == 16 ? std::memcpy(y, sum, 64) : std::memcpy(y, sum, 4 * rows);
            }
        }
}

// -----------------------------------------------------------------------------
// Choice of an instruction set: the fastest that the processor has, unless pot_choose forces another.

struct InstructionSet {
    const char* name;                               // as in pot_choose
    bool here;                                      // this processor has it
    void (*product)(const Job&, int64_t, int64_t);  // (job, from, to): tile rows of the weight
    bool is_unsigned;                               // its dot takes bytes of w as 0 to 255
};

// Fastest first.
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = {
#if defined(POT_AMX)
        {"amx", has_amx(), product<Amx>, Amx::UNSIGNED},
#endif
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
        {"avx512", bool(__builtin_cpu_supports("avx512vnni")), product<Avx512>, Avx512::UNSIGNED},
#endif
#if defined(__AVXVNNI__)
        {"avxvnni", true, product<AvxVnni>, AvxVnni::UNSIGNED},
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
        {"avx2", bool(__builtin_cpu_supports("avx2")), product<Avx2>, Avx2::UNSIGNED},
#endif
#if defined(__aarch64__)
        {"neon", true, product<Neon>, Neon::UNSIGNED},
#endif
        {"portable", true, product<Portable>, Portable::UNSIGNED},
    };
    return sets;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& instruction_set() {
    const InstructionSet* set = chosen.load(std::memory_order_relaxed);
    if (!set) {
        for (const InstructionSet& candidate : instruction_sets())
            if (candidate.here) {
                set = &candidate;
                break;
            }
        chosen = set;
    }
    return *set;
}

// Can the kernel multiply by activations of 8 bits as integers? If not, they are rounded and stay float32. Where bytes
// are unsigned, dot_signed negates bytes of x, so x must not be -128.
bool takes_bytes(const PotWeight& w) {
    return (w.groups == 1 || w.columns / w.groups % 4 == 0) &&
           !(w.activations == 1 && w.bits == 8 && instruction_set().is_unsigned);
}

// Rounds x (columns) to 8 bits and back.
void round_floats(const PotWeight& w, const float* x, float* out) {
    if (w.activations == 1) {
        std::vector<uint8_t> q(w.columns);
        float scale = NAN;
        int32_t zero = 0;
        if (!quantize(x, w.columns, q.data(), &scale, &zero)) scale = NAN;
        for (int64_t c = 0; c < w.columns; c++) out[c] = scale * float(q[c] - zero);
        return;
    }
    int8_t q[ACT_GROUP];
    for (int64_t c = 0; c < w.columns; c += ACT_GROUP) {
        const int64_t n = std::min(ACT_GROUP, w.columns - c);
        const float scale = quantize_group(x + c, n, q);
        for (int64_t k = 0; k < n; k++) out[c + k] = scale * float(q[k]);
    }
}

// The rows of x as a product takes them. A caller calls reset once, fill for each row, and then give. Threads may share
// the rows among them.
struct Inputs {
    Rows8 rows8;
    std::vector<float> floats;  // (n, stride)
    int64_t stride = 0;         // of floats; 0: floats are not used

    void reset(const Job& job) {
        const PotWeight& w = *job.w;
        const bool bytes = w.activations && takes_bytes(w);
        // Many rows are copied only for a good stride. For a few rows that takes longer than it saves.
        stride = !bytes && (w.activations || job.n >= 8) ? padded(w.columns, 16) : 0;
        if (bytes) rows8.reset(w, job.n, instruction_set().is_unsigned);
        floats.resize(job.n * stride);
    }

    void fill(const Job& job, int64_t i) {
        const PotWeight& w = *job.w;
        const float* x = job.x + i * job.x_stride;
        if (stride && w.activations)
            round_floats(w, x, &floats[i * stride]);
        else if (stride)
            std::copy_n(x, w.columns, &floats[i * stride]);
        else if (w.activations)
            rows8.round(w, x, i);
    }

    void give(Job* job) const {
        if (stride)
            job->x = floats.data(), job->x_stride = stride;
        else if (job->w->activations)
            job->x8 = &rows8;
    }
};

// -----------------------------------------------------------------------------
// Threads: splits a job among threads. If the process has GNU's OpenMP, as torch on Linux does, its threads are used,
// because two thread pools would compete for cores. Otherwise the team starts workers. They spin for about 20 us after
// a job and then sleep, because waking a thread takes longer than a product.

#ifndef POT_SPINS
#define POT_SPINS 500
#endif

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The functions that GCC calls for `#pragma omp parallel`. dlsym finds those that torch loaded; linking OpenMP could
// load a second copy with a second pool.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;  // null: no GNU OpenMP
    int (*part)() = nullptr;   // number of the calling thread
    int (*parts)() = nullptr;  // threads in the parallel region

    static const OpenMP& get() {
        static const OpenMP instance = [] {
            OpenMP openmp;
            openmp.part = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
            openmp.parts = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
            if (openmp.part && openmp.parts)
                openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
            return openmp;
        }();
        return instance;
    }
};

const pid_t loaded_in = getpid();

class Team {
  public:
    // Calls work(part, parts) once for each part; the calling thread does part 0. The team's workers do one job at a
    // time, so a second caller does all of its work alone (parts = 1). OpenMP has threads for every caller.
    template <class Work>
    void run(int parts, const Work& work) {
        if (parts <= 1 || getpid() != loaded_in) return work(0, 1);  // fork does not copy threads
        if (OpenMP::get().parallel) {
            OpenMP::get().parallel(
                [](void* w) { (*static_cast<const Work*>(w))(OpenMP::get().part(), OpenMP::get().parts()); },
                const_cast<Work*>(&work), unsigned(parts), 0);
            return;
        }
        std::unique_lock<std::mutex> busy_lock(busy_, std::try_to_lock);
        if (!busy_lock) return work(0, 1);
        while (int(workers_.size()) < parts - 1)
            workers_.emplace_back(&Team::serve, this, int(workers_.size()) + 1, epoch_.load());
        work_ = [](const void* w, int part, int count) { (*static_cast<const Work*>(w))(part, count); };
        context_ = &work, parts_ = parts;
        left_.store(int(workers_.size()), std::memory_order_relaxed);  // workers without a part in this job count, too
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        work(0, parts);
        while (left_.load(std::memory_order_acquire) > 0) relax();
    }

  private:
    void serve(int part, uint64_t epoch) {
        for (;;) {
            for (int spin = 0; spin < POT_SPINS && epoch_.load(std::memory_order_acquire) == epoch; spin++) relax();
            if (epoch_.load(std::memory_order_acquire) == epoch) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleeping_++;
                wake_.wait(lock, [&] { return epoch_.load() != epoch; });
                sleeping_--;
            }
            epoch = epoch_.load(std::memory_order_acquire);
            if (part < parts_) work_(context_, part, parts_);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_;                                // held during a job
    std::mutex sleep_;                               // guards the change of epoch_ that sleepers wait for
    std::condition_variable wake_;
    std::vector<std::thread> workers_;               // (parts - 1 of the largest job)
    std::atomic<uint64_t> epoch_{0};                 // number of the current job
    std::atomic<int> left_{0};                       // workers that have not finished the job
    std::atomic<int> sleeping_{0};                   // workers that wait for wake_
    void (*work_)(const void*, int, int) = nullptr;  // the job: work_(context_, part, parts_)
    const void* context_ = nullptr;
    int parts_ = 0;
};

// The team is never destroyed, because its threads may still wait when the process ends.
Team& team() {
    static Team* instance = new Team;
    return *instance;
}

// A thread's share of n items: `from` to `to` - 1. Shares begin at multiples of `chunk`.
struct Share {
    int64_t from;
    int64_t to;

    Share(int64_t n, int64_t chunk, int part, int parts) {
        const int64_t chunks = (n + chunk - 1) / chunk;
        from = std::min(n, chunks * part / parts * chunk);
        to = std::min(n, chunks * (part + 1) / parts * chunk);
    }
};

}  // namespace

// -----------------------------------------------------------------------------
// Interface: C functions, so that ctypes can call them.

extern "C" {

// y (n, rows) = x (n, columns) times the weight transposed, plus bias (rows) unless it is null. x_stride and y_stride
// are floats from a row to the next.
void pot_linear(const PotWeight* w, const float* bias, const float* x, int64_t n, int64_t x_stride, float* y,
                int64_t y_stride, int threads) {
    Job job{w, bias, x, n, x_stride, nullptr, y, y_stride};
    Inputs inputs;
    inputs.reset(job);
    team().run(n < 8 ? 1 : threads, [&](int part, int parts) {  // a few rows take less time than waking threads
        const Share rows(n, 1, part, parts);
        for (int64_t i = rows.from; i < rows.to; i++) inputs.fill(job, i);
    });
    inputs.give(&job);
    team().run(threads, [&](int part, int parts) {
        const Share blocks((w->rows + 15) / 16, 1, part, parts);
        instruction_set().product(job, blocks.from, blocks.to);
    });
}

// Unpacks rows index (n) of the weight, or rows from `from` on if index is null: out (n, columns) float32. Returns 0,
// or -1 without doing anything if an index is out of range.
int pot_unpack(const PotWeight* w, const int64_t* index, int64_t from, int64_t n, float* out, int threads) {
    for (int64_t i = 0; index && i < n; i++)
        if (index[i] < 0 || index[i] >= w->rows) return -1;
    team().run(threads, [&](int part, int parts) {
        const Share rows(n, 1, part, parts);
        for (int64_t i = rows.from; i < rows.to; i++)
            decode_row(*w, index ? index[i] : from + i, out + i * w->columns);
    });
    return 0;
}

// out (rows) = sum of unit * level over each row. Sums within a group are exact integers. Products with activations of 8
// bits per row need them.
void pot_row_sums(const PotWeight* w, float* out) {
    const int64_t size = w->columns / w->groups;
    for (int64_t r = 0; r < w->rows; r++) {
        double sum = 0;
        for (int64_t g = 0; g < w->groups; g++) {
            int64_t group_sum = 0;
            for (int64_t c = g * size; c < (g + 1) * size; c++) group_sum += level_at(*w, r, c);
            sum += double(group_sum) * unit_at(*w, r, g);
        }
        out[r] = float(sum);
    }
}

// Rounds one row x (columns) to q (columns), scale and zero. Returns 0, or -1 if x holds NaN or infinities.
int pot_quantize(const float* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
    return quantize(x, columns, q, scale, zero) ? 0 : -1;
}

// Reads a buffer (n) as fast as possible, so that bench.py can measure memory bandwidth. The sum of its words that it
// returns keeps the compiler from removing the loop. Each thread reads from four parts of its share in turn, because a
// processor fetches ahead in several places at once. Eight sums in registers: a single sum would make each addition wait
// for the one before it, and sums in an array would be loaded and stored again for each word.
uint64_t pot_read(const uint64_t* buffer, int64_t n, int threads) {
    typedef uint64_t Vector __attribute__((vector_size(32), aligned(8), may_alias));
    std::atomic<uint64_t> total{0};
    team().run(threads, [&](int part, int parts) {
        const Share share(n, 32, part, parts);
        const int64_t quarter = (share.to - share.from) / 32 * 8;
        Vector sum[8] = {};
        for (int64_t i = share.from; i < share.from + quarter; i += 8)
            UNROLL for (int k = 0; k < 8; k++)
                sum[k] += *reinterpret_cast<const Vector*>(buffer + i + k / 2 * quarter + k % 2 * 4);
        uint64_t part_sum = 0;
        for (int64_t i = share.from + 4 * quarter; i < share.to; i++) part_sum += buffer[i];
        for (const Vector& vector : sum) part_sum += vector[0] + vector[1] + vector[2] + vector[3];
        total += part_sum;
    });
    return total;
}

// Names of the instruction sets that this machine has, fastest first, separated by spaces.
const char* pot_instruction_sets() {
    static const std::string* names = [] {
        auto* text = new std::string;
        for (const InstructionSet& set : instruction_sets())
            if (set.here) *text += (text->empty() ? "" : " ") + std::string(set.name);
        return text;
    }();
    return names->c_str();
}

// Uses the instruction set of this name from now on. Returns 0, or -1 if this machine does not have it.
int pot_choose(const char* name) {
    for (const InstructionSet& set : instruction_sets())
        if (set.here && std::strcmp(set.name, name) == 0) {
            chosen = &set;
            return 0;
        }
    return -1;
}

}  // extern "C"
