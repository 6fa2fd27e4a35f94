// Matrix products with weights packed to 4-bit codes. Reading the weight from memory limits a product with few rows of
// x. Codes take an eighth of float32's bytes, so kernels read codes and decode them in registers.
//
// The file is C++17 with a C interface and includes only system headers, so that other programs can use it alone.
// pot_kernel/__init__.py builds it at its first use.
//
// A weight is a matrix of codes (rows, (columns + 1) / 2 bytes). Each block of 128 columns is 16 little-endian words of
// 32 bits: nibble j of word i is the code of column 16 j + i. A vector of 16 words, shifted right by 4 j, then holds
// the codes of 16 neighbouring columns, and indexes a table of 16 levels. So 16 weights cost one shift, one table
// look-up and one multiply-add, for any grid. Columns after the last whole block are in order, two per byte.
//
// A weight's value is level * (scale / top) in float32, as in pot.py. Levels are whole numbers; with 8-bit activations
// they are at most 64.
//
// Activations are float32, or 8 bits: q = round(x / scale) + zero, with a scale and a zero point per row of x. Then
//     y = scale * (sum over groups of unit * (sum of q * level) - zero * (sum of unit * level)).
// The sum of q * level is exact in integers. The sum of unit * level does not depend on x: row_sums holds it.
//
// Sections: weights, activations, decoding, few rows of x (portable, AVX-512, AVX2, NEON), many rows of x (AMX), choice
// of an instruction set, threads, interface.

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

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#define POT_AMX
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// -----------------------------------------------------------------------------
// Weights: the packed matrix as the caller passes it, and the units of its groups. Units are computed once per row of
// the weight, because the kernels multiply levels by them for every row of x.

extern "C" struct PotWeight {
    const uint8_t* codes;   // (rows, (columns + 1) / 2), two codes per byte
    const void* scale;      // (rows or 1, groups), float16 or float32: value of the level `top`, positive and finite
    const float* row_sums;  // (rows), from pot_row_sums: activations are rounded to 8 bits; null: they stay float32
    int64_t rows;           // output features
    int64_t columns;        // input features
    int64_t groups;         // groups per row; columns / groups neighbouring columns share a scale
    int32_t scale_per_row;  // 1: each row has its scales; 0: all rows share one row of scales
    int32_t scale_is_half;  // 1: scale is float16; 0: float32
    float top;              // the level whose value is the scale
    float table[16];        // (codes): level of each code; code 8 + i is minus code i
};

namespace {

// Units (value of the smallest level, scale / top) of n rows from `row` on: out (n, groups).
void units(const PotWeight& w, int64_t row, int64_t n, float* out) {
    if (!w.scale_per_row && n > 1) {
        units(w, row, 1, out);
        for (int64_t i = w.groups; i < n * w.groups; i++) out[i] = out[i - w.groups];
        return;
    }
    const int64_t start = w.scale_per_row ? row * w.groups : 0, count = n * w.groups;
    // If top is a power of two, multiplying by 1 / top gives the same result and is much faster than dividing.
    const bool power_of_two = (int64_t(w.top) & (int64_t(w.top) - 1)) == 0;
    const float divisor = power_of_two ? 1 : w.top, factor = power_of_two ? 1 / w.top : 1;
    if (w.scale_is_half) {
        const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + start;
        for (int64_t g = 0; g < count; g++) {
            const uint32_t bits = uint32_t(scale[g]) << 13;  // float16's exponent and fraction at float32's position
            float f;
            std::memcpy(&f, &bits, 4);
            out[g] = f * 0x1p112f * factor;
        }
    } else {
        const float* scale = static_cast<const float*>(w.scale) + start;
        for (int64_t g = 0; g < count; g++) out[g] = scale[g] * factor;
    }
    if (!power_of_two)
        for (int64_t g = 0; g < count; g++) out[g] /= divisor;
}

// The fast kernels need this: then each half block of 64 columns has one scale.
bool aligned_groups(const PotWeight& w) { return w.groups == 1 || w.columns / w.groups % 64 == 0; }

// The units that a kernel needs for its rows of the weight.
struct Runs {
    std::vector<float> unit;     // (rows, groups)
    std::vector<int32_t> group;  // (columns / 128 * 2): group of each half block of 64 columns

    Runs(const PotWeight& w, int64_t rows) : unit(rows * w.groups), group(w.columns / 128 * 2) {
        const int64_t size = w.columns / w.groups;
        for (size_t k = 0; k < group.size(); k++) group[k] = int32_t(64 * k / size);
    }
};

const uint8_t* row_of(const PotWeight& w, int64_t row) { return w.codes + row * ((w.columns + 1) / 2); }

// -----------------------------------------------------------------------------
// Activations: rounds a row of x to 8 bits, and arranges it in the order of the packed codes. Instructions for 8-bit
// products multiply byte by byte, so x must be in the order in which decoding produces levels.

// A row of x in 8 bits. In `mixed`, byte t of word i belongs to nibble 2 t (even) or 2 t + 1 (odd) of a word of codes,
// that is, to column 32 t + i or 32 t + 16 + i of the block. Each half holds 64 columns, and zeros for the other 64, as
// the two may have different scales.
struct Row8 {
    std::vector<uint8_t> q;      // (columns)
    std::vector<uint8_t> mixed;  // (blocks, 2 halves, even and odd nibbles, 16 words, 4 bytes)
    float scale = 0;             // x = scale * (q - zero); NaN: x holds NaN or infinities
    int32_t zero = 0;            // zero point, 0 to 255
};

// Rounds x (columns) as pot.py's fake_quantize_activations does. Returns false if x holds NaN or infinities or if its
// range overflows float32.
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
    const float magic = 0x1.8p23f;  // adding and subtracting it rounds to nearest, half to even
    const float s = std::max((high[0] - low[0]) / 255, 0x1p-126f);
    if (nan[0] || !(s < INFINITY)) return false;
    const float z = (-low[0] / s + magic) - magic;
    *scale = s;
    *zero = int32_t(z);
    for (c = 0; c < columns; c++) {
        const float f = (x[c] / s + magic) - magic + z;
        q[c] = uint8_t(int32_t(f < 0 ? 0 : f > 255 ? 255 : f));
    }
    return true;
}

void quantize(const float* x, int64_t columns, Row8* row) {
    const int64_t blocks = columns / 128;
    row->q.resize(columns);
    row->mixed.assign(256 * blocks, 0);
    if (!quantize(x, columns, row->q.data(), &row->scale, &row->zero)) {
        row->scale = NAN;  // makes the row's y NaN
        std::fill(row->q.begin(), row->q.end(), 0);
    }
    for (int64_t b = 0; b < blocks; b++)
        for (int t = 0; t < 4; t++)
            for (int i = 0; i < 16; i++) {
                const uint8_t* q = &row->q[128 * b + 32 * t + i];
                uint8_t* mixed = &row->mixed[256 * b + 128 * (t / 2) + 4 * i + t];
                mixed[0] = q[0];
                mixed[64] = q[16];
            }
}

// -----------------------------------------------------------------------------
// Decoding: codes to levels in portable C++, for embeddings, for columns outside whole blocks and for machines without
// a fast kernel.

// Decodes by arithmetic, because compilers do not vectorize a table look-up. Each level's magnitude is one byte.
struct Bytes {
    uint32_t low = 0;   // magnitudes of codes 0 to 3
    uint32_t high = 0;  // magnitudes of codes 4 to 7

    explicit Bytes(const PotWeight& w) {
        for (int i = 0; i < 4; i++) {
            low |= uint32_t(w.table[i]) << 8 * i;
            high |= uint32_t(w.table[4 + i]) << 8 * i;
        }
    }

    int32_t level(uint32_t code) const {
        const int32_t size = ((code & 4 ? high : low) >> 8 * (code & 3)) & 255;
        return code & 8 ? -size : size;
    }
};

// Calls visit(column, code) for every column of a row, in the order in which codes are stored.
template <class Visit>
inline void each_code(const PotWeight& w, int64_t row, Visit visit) {
    const uint8_t* p = row_of(w, row);
    const int64_t block_end = w.columns / 128 * 128;
    for (int64_t c = 0; c < block_end; c += 128, p += 64) {
        uint32_t word[16];
        std::memcpy(word, p, 64);  // assumes a little-endian machine, as torch does
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 16; i++) visit(c + 16 * j + i, word[i] >> (4 * j) & 15);
    }
    for (int64_t c = block_end; c < w.columns; c++, p += ~(c - block_end) & 1)
        visit(c, *p >> (4 * ((c - block_end) & 1)) & 15);
}

// Decodes a row to float32: out (columns). unit (groups) is scratch memory.
void decode(const PotWeight& w, int64_t row, float* unit, float* out) {
    const Bytes bytes(w);
    const int64_t size = w.columns / w.groups;
    each_code(w, row, [&](int64_t c, uint32_t code) { out[c] = float(bytes.level(code)); });
    units(w, row, 1, unit);
    for (int64_t g = 0; g < w.groups; g++)
        for (int64_t c = g * size; c < (g + 1) * size; c++) out[c] *= unit[g];
}

// -----------------------------------------------------------------------------
// Few rows of x: y[i][row] = sum over columns of weight[row] * x[i], for rows `from` to `to` - 1 of the weight.
//
// Memory bandwidth limits these products. Fast kernels multiply decoded weights by up to four rows of x at once, so
// that decoding costs less per product; AVX-512 also takes four rows of the weight, so that loads of x cost less. They
// need aligned_groups; the portable kernel takes any groups.

float sum_of(const float (&part)[16]) {
    float sum = 0;
    for (float f : part) sum += f;
    return sum;
}

struct Job {
    const PotWeight* w;
    const float* bias;  // (rows), or null
    const float* x;     // (n, columns)
    int64_t n;          // rows of x
    int64_t x_stride;   // floats from a row of x to the next
    const Row8* x8;     // (n): x in 8 bits; null: x stays float32
    float* y;           // (n, rows)
    int64_t y_stride;   // floats from a row of y to the next
};

// Sum over the columns after the last whole block.
float tail(const Job& job, int64_t row, int64_t i, const float* unit) {
    const PotWeight& w = *job.w;
    const int64_t block_end = w.columns / 128 * 128, size = w.columns / w.groups, n = w.columns - block_end;
    const Bytes bytes(w);
    const uint8_t* p = row_of(w, row) + block_end / 2;
    const float* x = job.x + i * job.x_stride + block_end;
    float value[128] = {}, part[16] = {};
    for (int64_t k = 0; k < (n + 1) / 2; k++) {
        value[2 * k] = float(bytes.level(p[k] & 15));
        value[2 * k + 1] = float(bytes.level(p[k] >> 4));
    }
    for (int64_t c = 0; c < n; c++)
        part[c % 16] += value[c] * unit[(block_end + c) / size] * (job.x8 ? job.x8[i].q[block_end + c] : x[c]);
    return sum_of(part);
}

// One element of y from its sum over whole blocks: adds the tail, the zero point's correction and the bias.
inline float finish(const Job& job, int64_t row, int64_t i, float sum, const float* unit) {
    if (job.w->columns % 128) sum += tail(job, row, i, unit);
    if (job.x8) sum = job.x8[i].scale * (sum - float(job.x8[i].zero) * job.w->row_sums[row]);
    return job.bias ? sum + job.bias[row] : sum;
}

// Multiplies 8-bit activations by levels with shifts and adds alone. A level is a sum of powers of two; plane[b] says
// which codes' levels contain the power 2^b.
struct Shifts {
    uint32_t plane[7] = {};  // (bits of a level): bit c is bit b of the level of code c

    explicit Shifts(const PotWeight& w) {
        for (int code = 0; code < 16; code++)
            for (int b = 0; b < 7; b++)
                if (int(std::fabs(w.table[code])) >> b & 1) plane[b] |= 1u << code;
    }

    int32_t product(int32_t q, uint32_t code) const {
        int32_t sum = 0;
        for (int b = 0; b < 7; b++) sum += (q << b) & -int32_t(plane[b] >> code & 1);
        return code & 8 ? -sum : sum;
    }
};

void rows_portable(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    const int64_t size = w.columns / w.groups;
    std::vector<float> row(w.columns), unit(w.groups);
    std::vector<int32_t> code(w.columns);
    const Shifts shifts(w);
    for (int64_t r = from; r < to; r++) {
        if (job.x8) {
            each_code(w, r, [&](int64_t c, uint32_t nibble) { code[c] = nibble; });
            units(w, r, 1, unit.data());
        } else {
            decode(w, r, unit.data(), row.data());
        }
        for (int64_t i = 0; i < job.n; i++) {
            float total = 0;
            if (job.x8) {
                const uint8_t* q = job.x8[i].q.data();
                for (int64_t g = 0; g < w.groups; g++) {
                    int32_t sum = 0;
                    for (int64_t c = g * size; c < (g + 1) * size; c++) sum += shifts.product(q[c], code[c]);
                    total += float(sum) * unit[g];
                }
                total = job.x8[i].scale * (total - float(job.x8[i].zero) * w.row_sums[r]);
            } else {
                const float* x = job.x + i * job.x_stride;
                float part[16] = {};
                int64_t c = 0;
                for (; c + 16 <= w.columns; c += 16)
                    for (int k = 0; k < 16; k++) part[k] += row[c + k] * x[c + k];
                for (; c < w.columns; c++) total += row[c] * x[c];
                total += sum_of(part);
            }
            job.y[i * job.y_stride + r] = job.bias ? total + job.bias[r] : total;
        }
    }
}

// Computes one block of y: some rows of the weight from r on, whose units are in Runs, times some rows of x from i on.
// The sizes are template parameters, so that sums stay in registers. A kernel has five blocks: 1 row of the weight
// times 1 row of x, for the last rows, and M rows times 1, 2, 3 and 4.
using Block = void (*)(const Job&, int64_t r, int64_t i, const Runs&);
#define POT_BLOCKS(block, M) {block<1, 1>, block<M, 1>, block<M, 2>, block<M, 3>, block<M, 4>}

void in_blocks(const Job& job, int64_t from, int64_t to, int64_t M, const Block (&blocks)[5]) {
    Runs runs(*job.w, M);
    for (int64_t r = from, rows; r < to; r += rows) {
        rows = r + M <= to ? M : 1;
        units(*job.w, r, rows, runs.unit.data());
        for (int64_t i = 0, n; i < job.n; i += n) {
            n = rows == M ? std::min<int64_t>(4, job.n - i) : 1;
            blocks[rows == M ? n : 0](job, r, i, runs);
        }
    }
}

// Compilers keep an array of vectors in registers only if every loop over it is unrolled.
#define UNROLL _Pragma("GCC unroll 8")

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))

// Prefetches codes. The hardware prefetcher does not run far enough ahead for kernels limited by memory.
inline void ahead(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + 6144), _MM_HINT_T0); }

template <int M, int N>
AVX512 inline void finish_avx512(const Job& job, int64_t r, int64_t i0, const __m512 (&sum)[M][N], const float* unit) {
    UNROLL for (int i = 0; i < N; i++) {
        float total[4];
        if (M == 4) {  // reduces four vectors to four sums together
            __m256 half[4];
            UNROLL for (int m = 0; m < 4; m++)
                half[m] =
                    _mm256_add_ps(_mm512_castps512_ps256(sum[m % M][i]), _mm512_extractf32x8_ps(sum[m % M][i], 1));
            const __m256 partial = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
            _mm_storeu_ps(total, _mm_add_ps(_mm256_castps256_ps128(partial), _mm256_extractf128_ps(partial, 1)));
        } else {
            total[0] = _mm512_reduce_add_ps(sum[0][i]);
        }
        for (int m = 0; m < M; m++)
            job.y[(i0 + i) * job.y_stride + r + m] = finish(job, r + m, i0 + i, total[m], unit + m * job.w->groups);
    }
}

// The table is multiplied by the unit once per half block, so that a look-up yields weights, not levels.
template <int M, int N>
AVX512 void block_avx512(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    const __m512 table = _mm512_loadu_ps(w.table);
    const int64_t blocks = w.columns / 128, row_bytes = (w.columns + 1) / 2;
    const uint8_t* p = row_of(w, r);
    const float *x = job.x + i0 * job.x_stride, *unit = runs.unit.data();
    const int32_t* group = runs.group.data();
    __m512 sum[M][N];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < N; i++) sum[m][i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, p += 64, x += 128) {
        __m512i code[M];
        __m512 half[M][2];
        UNROLL for (int m = 0; m < M; m++) {
            code[m] = _mm512_loadu_si512(p + m * row_bytes);
            ahead(p + m * row_bytes);
            UNROLL for (int h = 0; h < 2; h++)
                half[m][h] = _mm512_mul_ps(table, _mm512_set1_ps(unit[m * w.groups + group[2 * b + h]]));
        }
        UNROLL for (int j = 0; j < 8; j++)
            UNROLL for (int m = 0; m < M; m++) {
                const __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(code[m], 4 * j), half[m][j / 4]);
                UNROLL for (int i = 0; i < N; i++)
                    sum[m][i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + i * job.x_stride + 16 * j), sum[m][i]);
            }
    }
    finish_avx512<M, N>(job, r, i0, sum, unit);
}

// A byte shuffle looks up 64 levels at once, and VNNI adds their products with q in integers.
template <int M, int N>
AVX512 void block8_avx512(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    const __m512i levels = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(_mm512_loadu_ps(w.table))));
    const __m512i low = _mm512_set1_epi8(15);
    const int64_t blocks = w.columns / 128, row_bytes = (w.columns + 1) / 2;
    const uint8_t* p = row_of(w, r);
    const float* unit = runs.unit.data();
    const int32_t* group = runs.group.data();
    const uint8_t* q[N];
    __m512 sum[M][N];
    UNROLL for (int i = 0; i < N; i++) q[i] = job.x8[i0 + i].mixed.data();
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int i = 0; i < N; i++) sum[m][i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, p += 64)
        UNROLL for (int m = 0; m < M; m++) {
            const __m512i code = _mm512_loadu_si512(p + m * row_bytes);
            ahead(p + m * row_bytes);
            const __m512i even = _mm512_shuffle_epi8(levels, _mm512_and_si512(code, low));
            const __m512i odd = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(code, 4), low));
            UNROLL for (int i = 0; i < N; i++)
                UNROLL for (int h = 0; h < 2; h++) {
                    const uint8_t* q_half = q[i] + 256 * b + 128 * h;
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(q_half), even);
                    dot = _mm512_dpbusd_epi32(dot, _mm512_loadu_si512(q_half + 64), odd);
                    sum[m][i] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(dot), _mm512_set1_ps(unit[m * w.groups + group[2 * b + h]]), sum[m][i]);
                }
        }
    finish_avx512<M, N>(job, r, i0, sum, unit);
}

void rows_avx512(const Job& job, int64_t from, int64_t to) {
    static const Block float_blocks[] = POT_BLOCKS(block_avx512, 4), int8_blocks[] = POT_BLOCKS(block8_avx512, 4);
    in_blocks(job, from, to, 4, job.x8 ? int8_blocks : float_blocks);
}

AVX2 float sum_of(__m256 v) {
    float part[8], total = 0;
    _mm256_storeu_ps(part, v);
    for (float f : part) total += f;
    return total;
}

// A register holds eight float levels, so the table has the magnitudes, and a code's highest bit sets the sign.
template <int M, int N>
AVX2 void block_avx2(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    const __m256 table = _mm256_loadu_ps(w.table);
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    const uint8_t* p = row_of(w, r);
    const float *x = job.x + i0 * job.x_stride, *unit = runs.unit.data();
    __m256 sum[N][2];
    UNROLL for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (int64_t b = 0; b < w.columns / 128; b++, p += 64, x += 128) {
        const __m256 half[2] = {_mm256_mul_ps(table, _mm256_set1_ps(unit[runs.group[2 * b]])),
                                _mm256_mul_ps(table, _mm256_set1_ps(unit[runs.group[2 * b + 1]]))};
        ahead(p);
        const __m256i code[2] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
        UNROLL for (int j = 0; j < 8; j++)
            UNROLL for (int k = 0; k < 2; k++) {  // words 0 to 7, then 8 to 15
                const __m256 level = _mm256_permutevar8x32_ps(half[j / 4], _mm256_srli_epi32(code[k], 4 * j));
                const __m256i sign_bit = _mm256_and_si256(_mm256_slli_epi32(code[k], 28 - 4 * j), sign);
                const __m256 v = _mm256_xor_ps(level, _mm256_castsi256_ps(sign_bit));
                UNROLL for (int i = 0; i < N; i++)
                    sum[i][k] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + i * job.x_stride + 16 * j + 8 * k), sum[i][k]);
            }
    }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] =
            finish(job, r, i0 + i, sum_of(_mm256_add_ps(sum[i][0], sum[i][1])), unit);
}

template <int M, int N>
AVX2 void block8_avx2(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    int8_t level[16];
    for (int i = 0; i < 16; i++) level[i] = int8_t(w.table[i]);
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(level)));
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t* p = row_of(w, r);
    const float* unit = runs.unit.data();
    __m256 sum[N];
    UNROLL for (int i = 0; i < N; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t b = 0; b < w.columns / 128; b++, p += 64)
        UNROLL for (int k = 0; k < 2; k++) {
            const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * k));
            const __m256i decoded[2] = {_mm256_shuffle_epi8(levels, _mm256_and_si256(code, low)),
                                   _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(code, 4), low))};
            UNROLL for (int i = 0; i < N; i++)
                UNROLL for (int h = 0; h < 2; h++) {
                    __m256i dot = _mm256_setzero_si256();
                    UNROLL for (int odd = 0; odd < 2; odd++) {  // 16 bits hold a sum of two products up to 255 * 64
                        const uint8_t* q_bytes = job.x8[i0 + i].mixed.data() + 256 * b + 128 * h + 64 * odd + 32 * k;
                        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q_bytes));
                        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_maddubs_epi16(q, decoded[odd]), ones));
                    }
                    sum[i] = _mm256_fmadd_ps(
                        _mm256_cvtepi32_ps(dot), _mm256_set1_ps(unit[runs.group[2 * b + h]]), sum[i]);
                }
        }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, sum_of(sum[i]), unit);
}

void rows_avx2(const Job& job, int64_t from, int64_t to) {
    static const Block float_blocks[] = POT_BLOCKS(block_avx2, 1), int8_blocks[] = POT_BLOCKS(block8_avx2, 1);
    in_blocks(job, from, to, 1, job.x8 ? int8_blocks : float_blocks);
}

#elif defined(__aarch64__)

int8x16_t levels_neon(const PotWeight& w) {
    int8_t level[16];
    for (int i = 0; i < 16; i++) level[i] = int8_t(w.table[i]);
    return vld1q_s8(level);
}

// A byte look-up gives levels, which are widened to float32. The unit multiplies the sum of each half block.
template <int M, int N>
void block_neon(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    const int8x16_t table = levels_neon(w);
    const uint8_t* p = row_of(w, r);
    const float *x = job.x + i0 * job.x_stride, *unit = runs.unit.data();
    float total[N] = {};
    for (int64_t b = 0; b < w.columns / 128; b++, p += 64, x += 128) {
        uint32x4_t code[4];
        UNROLL for (int k = 0; k < 4; k++) code[k] = vreinterpretq_u32_u8(vld1q_u8(p + 16 * k));
        float32x4_t sum[N][2];
        UNROLL for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = vdupq_n_f32(0);
        UNROLL for (int j = 0; j < 8; j++) {
            const int32x4_t shift = vdupq_n_s32(-4 * j);
            uint16x4_t narrow[4];
            UNROLL for (int k = 0; k < 4; k++)
                narrow[k] = vmovn_u32(vandq_u32(vshlq_u32(code[k], shift), vdupq_n_u32(15)));
            const uint8x16_t index = vcombine_u8(vmovn_u16(vcombine_u16(narrow[0], narrow[1])),
                                                 vmovn_u16(vcombine_u16(narrow[2], narrow[3])));
            const int8x16_t level = vqtbl1q_s8(table, index);
            const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(level)), vmovl_s8(vget_high_s8(level))};
            UNROLL for (int k = 0; k < 4; k++) {
                const int16x4_t quarter = k & 1 ? vget_high_s16(wide[k / 2]) : vget_low_s16(wide[k / 2]);
                const float32x4_t v = vcvtq_f32_s32(vmovl_s16(quarter));
                UNROLL for (int i = 0; i < N; i++)
                    sum[i][j / 4] = vfmaq_f32(sum[i][j / 4], v, vld1q_f32(x + i * job.x_stride + 16 * j + 4 * k));
            }
        }
        UNROLL for (int i = 0; i < N; i++)
            total[i] += vaddvq_f32(sum[i][0]) * unit[runs.group[2 * b]] +
                        vaddvq_f32(sum[i][1]) * unit[runs.group[2 * b + 1]];
    }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, total[i], unit);
}

// q * level needs 16 bits with a sign, so bytes are widened before they are multiplied.
template <int M, int N>
void block8_neon(const Job& job, int64_t r, int64_t i0, const Runs& runs) {
    const PotWeight& w = *job.w;
    const int8x16_t table = levels_neon(w);
    const uint8_t* p = row_of(w, r);
    const float* unit = runs.unit.data();
    float total[N] = {};
    for (int64_t b = 0; b < w.columns / 128; b++, p += 64) {
        int32x4_t dot[N][2];
        UNROLL for (int i = 0; i < N; i++) dot[i][0] = dot[i][1] = vdupq_n_s32(0);
        UNROLL for (int k = 0; k < 4; k++) {
            const uint8x16_t code = vld1q_u8(p + 16 * k);
            const int8x16_t decoded[2] = {vqtbl1q_s8(table, vandq_u8(code, vdupq_n_u8(15))),
                                     vqtbl1q_s8(table, vshrq_n_u8(code, 4))};
            UNROLL for (int i = 0; i < N; i++)
                UNROLL for (int h = 0; h < 2; h++)
                    UNROLL for (int odd = 0; odd < 2; odd++) {
                        const uint8x16_t q =
                            vld1q_u8(job.x8[i0 + i].mixed.data() + 256 * b + 128 * h + 64 * odd + 16 * k);
                        const int16x8_t q_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(q)));
                        const int16x8_t q_high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(q)));
                        dot[i][h] = vpadalq_s16(dot[i][h], vmulq_s16(q_low, vmovl_s8(vget_low_s8(decoded[odd]))));
                        dot[i][h] = vpadalq_s16(dot[i][h], vmulq_s16(q_high, vmovl_s8(vget_high_s8(decoded[odd]))));
                    }
        }
        UNROLL for (int i = 0; i < N; i++)
            UNROLL for (int h = 0; h < 2; h++) total[i] += float(vaddvq_s32(dot[i][h])) * unit[runs.group[2 * b + h]];
    }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, total[i], unit);
}

void rows_neon(const Job& job, int64_t from, int64_t to) {
    static const Block float_blocks[] = POT_BLOCKS(block_neon, 1), int8_blocks[] = POT_BLOCKS(block8_neon, 1);
    in_blocks(job, from, to, 1, job.x8 ? int8_blocks : float_blocks);
}

#endif

// -----------------------------------------------------------------------------
// Many rows of x: AMX multiplies tiles of 16 rows of 64 bytes. With many rows arithmetic is the limit, and AMX does by
// far the most of it per cycle.
//
// x is rounded to bfloat16, or to 8 bits if the weight has row_sums. Levels are exact in both types, so tiles hold
// levels without units, and units multiply the sums of each group in float32. A step is one tile along the columns. The
// order of columns in a tile is that of decoding: 4 bytes are columns (i, 16 + i) of 32, or (i, 16 + i, 32 + i, 48 + i)
// of 64.

#if defined(POT_AMX)

#define AMX \
    __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16," \
                          "fma,f16c")))

bool has_amx() {
    static const bool supported = [] {
        unsigned eax, ebx, ecx, edx, eax_1 = 0;
        if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
            (edx >> 22 & 1) + (edx >> 24 & 1) + (edx >> 25 & 1) < 3)  // amx-bf16, amx-tile, amx-int8
            return false;
        if (!__get_cpuid_count(7, 1, &eax_1, &ebx, &ecx, &edx) || !(eax_1 >> 5 & 1)) return false;  // avx512-bf16
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // asks Linux for the use of tile registers
    }();
    return supported;
}

// Memory for tiles, aligned so that each row of a tile is one cache line.
struct Aligned {
    std::unique_ptr<uint8_t[]> raw;  // (bytes + 63)
    uint8_t* data;                   // (bytes), inside raw

    explicit Aligned(int64_t bytes) : raw(new uint8_t[bytes + 63]) {
        data = raw.get() + (-reinterpret_cast<uintptr_t>(raw.get()) & 63);
    }
};

struct Tiles {
    const Job* job;
    bool in8;                  // x has 8 bits; otherwise bfloat16
    int64_t steps;             // tiles along the columns: 64 columns each in 8 bits, 32 in bfloat16
    int64_t n;                 // rows of x, padded to a multiple of 32
    Aligned a;                 // (n / 16, steps, 16, 64): x
    std::vector<float> scale;  // (n), if in8
    std::vector<float> zero;   // (n), if in8

    explicit Tiles(const Job& j)
        : job(&j), in8(j.w->row_sums), steps((j.w->columns + 63) / 64 * (in8 ? 1 : 2)), n((j.n + 31) / 32 * 32),
          a(n * steps * 64), scale(n), zero(n) {}

    uint8_t* row(int64_t i, int64_t step) { return &a.data[((i / 16 * steps + step) * 16 + i % 16) * 64]; }
};

// Writes rows `from` to `to` - 1 of x into tiles, with zeros where there is no x.
AMX void tiles_of_x(Tiles* tiles, int64_t from, int64_t to) {
    const int64_t columns = tiles->job->w->columns, padded = (columns + 63) / 64 * 64;
    std::vector<float> x(padded);
    std::vector<uint8_t> q(padded);
    for (int64_t i = from; i < to; i++) {
        if (i < tiles->job->n)
            std::memcpy(x.data(), tiles->job->x + i * tiles->job->x_stride, 4 * columns);
        else
            std::fill(x.begin(), x.end(), 0.0f);
        if (tiles->in8) {
            int32_t zero = 0;
            if (!quantize(x.data(), columns, q.data(), &tiles->scale[i], &zero)) tiles->scale[i] = NAN;
            tiles->zero[i] = float(zero);
        }
        for (int64_t s = 0; s < tiles->steps; s++) {
            __m512i v = _mm512_setzero_si512();
            if (tiles->in8) {
                for (int b = 3; b >= 0; b--)
                    v = _mm512_or_si512(
                        _mm512_slli_epi32(v, 8),
                        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i*>(&q[64 * s + 16 * b]))));
            } else {
                for (int b = 1; b >= 0; b--)
                    v = _mm512_or_si512(
                        _mm512_slli_epi32(v, 16),
                        _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(&x[32 * s + 16 * b])))));
            }
            _mm512_storeu_si512(tiles->row(i, s), v);
        }
    }
}

// Writes a panel, 16 rows of the weight from r on: out (steps, 16, 64) bytes, unit (groups, 16). After the weight's
// last row it repeats that row; the result is not used.
AMX void tiles_of_weight(const Tiles& tiles, int64_t r, uint8_t* out, float* unit) {
    const PotWeight& w = *tiles.job->w;
    const int64_t row_bytes = (w.columns + 1) / 2, block_end = w.columns / 128 * 128, last_row = w.rows - 1;
    const __m512 table = _mm512_loadu_ps(w.table);
    const __m512i int8_levels = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(table)));
    const __m512i bf16_levels = _mm512_broadcast_i64x4(__m256i(_mm512_cvtneps_pbh(table)));
    alignas(64) int32_t offset[16];
    std::vector<float> units_of_row(w.groups);
    for (int m = 0; m < 16; m++) {
        offset[m] = int32_t((std::min(r + m, last_row) - r) * row_bytes);
        units(w, r + offset[m] / row_bytes, 1, units_of_row.data());
        for (int64_t g = 0; g < w.groups; g++) unit[16 * g + m] = units_of_row[g];
    }
    const __m512i offsets = _mm512_load_si512(offset);
    for (int64_t c = 0; c < block_end; c += 128)
        for (int i = 0; i < 16; i++) {
            const __m512i words = _mm512_i32gather_epi32(offsets, row_of(w, r) + c / 2 + 4 * i, 1);
            if (tiles.in8) {
                UNROLL for (int h = 0; h < 2; h++) {
                    __m512i v = _mm512_and_si512(_mm512_srli_epi32(words, 16 * h), _mm512_set1_epi32(0xffff));
                    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 8)), _mm512_set1_epi32(0x00ff00ff));
                    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 4)), _mm512_set1_epi32(0x0f0f0f0f));
                    _mm512_storeu_si512(out + ((c / 64 + h) * 16 + i) * 64, _mm512_shuffle_epi8(int8_levels, v));
                }
            } else {
                for (int t = 0; t < 4; t++) {
                    const __m512i v = _mm512_srli_epi32(words, 8 * t);
                    const __m512i pair = _mm512_mask_blend_epi16(0xaaaaaaaa, v, _mm512_slli_epi32(v, 12));
                    _mm512_storeu_si512(out + ((c / 32 + t) * 16 + i) * 64,
                                        _mm512_permutexvar_epi16(pair, bf16_levels));
                }
            }
        }
    if (block_end == w.columns) return;
    const int64_t step_columns = tiles.in8 ? 64 : 32, level_bytes = 64 / step_columns;
    std::memset(out + block_end / step_columns * 1024, 0, (tiles.steps - block_end / step_columns) * 1024);
    const Bytes bytes(w);
    for (int m = 0; m < 16; m++)
        for (int64_t c = block_end; c < w.columns; c++) {
            const uint8_t pair = row_of(w, r)[offset[m] + c / 2];
            const int32_t level = bytes.level(pair >> 4 * (c & 1) & 15);
            const int64_t tile_row = c / step_columns * 16 + c % 16,
                          tile_byte = 4 * m + c % step_columns / 16 * level_bytes;
            const float f = float(level);
            if (tiles.in8)
                out[tile_row * 64 + tile_byte] = uint8_t(level);
            else
                std::memcpy(out + tile_row * 64 + tile_byte, reinterpret_cast<const uint8_t*>(&f) + 2, 2);
        }
}

// y for 32 rows of x from i on and 32 rows (two panels) of the weight from r on. Tile registers 0 to 3 hold the sums of
// 2 x 2 tiles, so that each loaded tile is used twice.
AMX void product_of_tiles(Tiles& tiles, int64_t i, int64_t r, const uint8_t* b, const float* unit) {
    const Job& job = *tiles.job;
    const PotWeight& w = *job.w;
    const int64_t step_columns = tiles.in8 ? 64 : 32, steps = tiles.steps, size = w.columns / w.groups;
    const uint8_t *a[2] = {tiles.row(i, 0), tiles.row(i + 16, 0)}, *b1 = b + steps * 1024;
    alignas(64) float sum[32][32] = {}, part[2][2][16][16];
    const int64_t w_rows = std::min<int64_t>(32, w.rows - r), x_rows = std::min<int64_t>(32, job.n - i);
    // Each row of y is in another page. Without this prefetch, waiting for them takes half of the time.
    for (int64_t m = 0; m < x_rows; m++)
        for (int64_t c = 0; c < w_rows; c += 16) __builtin_prefetch(job.y + (i + m) * job.y_stride + r + c, 1);
    for (int64_t s = 0, end, g; s < steps; s = end) {
        g = std::min(s * step_columns / size, w.groups - 1);
        // Without groups, sums are taken every 16 steps: at most 1,024 * 255 * 64, which float32 holds exactly.
        end = std::min(steps, w.groups > 1 ? (g + 1) * size / step_columns : s + 16);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = s; k < end; k++) {
            _tile_loadd(4, a[0] + k * 1024, 64);
            _tile_loadd(5, a[1] + k * 1024, 64);
            _tile_loadd(6, b + k * 1024, 64);
            _tile_loadd(7, b1 + k * 1024, 64);
            if (tiles.in8) {
                _tile_dpbusd(0, 4, 6);
                _tile_dpbusd(1, 4, 7);
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            } else {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, part[0][0], 64);
        _tile_stored(1, part[0][1], 64);
        _tile_stored(2, part[1][0], 64);
        _tile_stored(3, part[1][1], 64);
        for (int half = 0; half < 2; half++) {
            const __m512 u = _mm512_loadu_ps(unit + (half * w.groups + g) * 16);
            for (int m = 0; m < 32; m++) {
                const float* source = part[m / 16][half][m % 16];
                const __m512 v = tiles.in8 ? _mm512_cvtepi32_ps(_mm512_load_si512(source)) : _mm512_load_ps(source);
                float* target = &sum[m][16 * half];
                _mm512_store_ps(target, _mm512_fmadd_ps(v, u, _mm512_load_ps(target)));
            }
        }
    }
    for (int half = 0; half < 2 && 16 * half < w_rows; half++) {
        const int64_t c = r + 16 * half;
        const __mmask16 mask = __mmask16((1u << std::min<int64_t>(16, w_rows - 16 * half)) - 1);
        const __m512 bias = job.bias ? _mm512_maskz_loadu_ps(mask, job.bias + c) : _mm512_setzero_ps();
        const __m512 row_sums = tiles.in8 ? _mm512_maskz_loadu_ps(mask, w.row_sums + c) : _mm512_setzero_ps();
        for (int64_t m = 0; m < x_rows; m++) {
            __m512 v = _mm512_load_ps(&sum[m][16 * half]);
            if (tiles.in8)
                v = _mm512_mul_ps(_mm512_set1_ps(tiles.scale[i + m]),
                                  _mm512_fnmadd_ps(_mm512_set1_ps(tiles.zero[i + m]), row_sums, v));
            _mm512_mask_storeu_ps(job.y + (i + m) * job.y_stride + c, mask, _mm512_add_ps(v, bias));
        }
    }
}

// Computes y for rows `from` to `to` - 1 of the weight. If x's tiles fit the level 2 cache, two panels are decoded at a
// time. If not, as many panels as fit the cache are decoded, so that x is read from memory less often.
AMX void rows_by_tiles(Tiles& tiles, int64_t from, int64_t to) {
    const PotWeight& w = *tiles.job->w;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // (tile registers): bytes per row
        uint8_t rows[16] = {};    // (tile registers)
    } config;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("" ::: "memory");  // compilers do not know that tile instructions read all of these bytes
    _tile_loadconfig(&config);
    const int64_t bytes = tiles.steps * 1024, budget = tiles.n * tiles.steps * 64 < 1 << 19 ? 0 : 768 << 10;
    const int64_t panels = std::max<int64_t>(2, budget / bytes / 2 * 2);
    const Aligned b(panels * bytes);
    std::vector<float> unit(panels * w.groups * 16);
    for (int64_t r = from; r < to; r += 16 * panels) {
        const int64_t count = (std::min(panels * 16, to - r) + 31) / 32 * 2;
        for (int64_t p = 0; p < count; p++)
            tiles_of_weight(tiles, std::min(r + 16 * p, w.rows - 1), b.data + p * bytes, &unit[p * w.groups * 16]);
        asm volatile("" ::: "memory");
        for (int64_t i = 0; i < tiles.job->n; i += 32)
            for (int64_t p = 0; p < count; p += 2)
                product_of_tiles(tiles, i, r + 16 * p, b.data + p * bytes, &unit[p * w.groups * 16]);
    }
    _tile_release();
}

#else

bool has_amx() { return false; }

#endif

// -----------------------------------------------------------------------------
// Choice of an instruction set: the fastest that the processor has, unless pot_choose forces another. The choice is
// made at run time, so that one build serves several processors and tests can compare all sets.

struct InstructionSet {
    const char* name;                            // as in pot_choose
    bool here;                                   // this processor has it
    void (*rows)(const Job&, int64_t, int64_t);  // kernel for few rows of x: (job, from, to)
    bool tiles;                                  // pot_linear_tiles works
};

// Fastest first.
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
        {"amx", has_amx(), rows_avx512, true},
        {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vnni"), rows_avx512, false},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), rows_avx2, false},
#elif defined(__aarch64__)
        {"neon", true, rows_neon, false},
#endif
        {"portable", true, rows_portable, false},
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

void rows_of_product(const Job& job, int64_t from, int64_t to) {
    (aligned_groups(*job.w) ? instruction_set().rows : rows_portable)(job, from, to);
}

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
// are floats from a row to the next. If the weight has row_sums, x is rounded to 8 bits. With more than about 64 rows
// of x, unpacking the weight first is faster.
void pot_linear(const PotWeight* w, const float* bias, const float* x, int64_t n, int64_t x_stride, float* y,
                int64_t y_stride, int threads) {
    std::vector<Row8> x8(w->row_sums ? n : 0);
    for (size_t i = 0; i < x8.size(); i++) quantize(x + i * x_stride, w->columns, &x8[i]);
    const Job job{w, bias, x, n, x_stride, w->row_sums ? x8.data() : nullptr, y, y_stride};
    team().run(threads, [&](int part, int parts) {
        const Share rows(w->rows, 4, part, parts);
        rows_of_product(job, rows.from, rows.to);
    });
}

// The same for many rows of x, by AMX. x is rounded to bfloat16, or to 8 bits if the weight has row_sums. Returns 0, or
// -1 without doing anything if AMX is not in use or if a group is not a multiple of 64 columns.
int pot_linear_tiles(const PotWeight* w, const float* bias, const float* x, int64_t n, int64_t x_stride, float* y,
                     int64_t y_stride, int threads) {
    if (!instruction_set().tiles || !aligned_groups(*w)) return -1;
#if defined(POT_AMX)
    const Job job{w, bias, x, n, x_stride, nullptr, y, y_stride};
    Tiles tiles(job);
    team().run(threads, [&](int part, int parts) {
        const Share rows(tiles.n, 1, part, parts);
        tiles_of_x(&tiles, rows.from, rows.to);
    });
    team().run(threads, [&](int part, int parts) {
        const Share rows(w->rows, 32, part, parts);
        rows_by_tiles(tiles, rows.from, rows.to);
    });
#endif
    return 0;
}

// Unpacks rows index (n) of the weight, or rows from `from` on if index is null: out (n, columns) float32. Returns 0,
// or -1 without doing anything if an index is out of range.
int pot_unpack(const PotWeight* w, const int64_t* index, int64_t from, int64_t n, float* out, int threads) {
    for (int64_t i = 0; index && i < n; i++)
        if (index[i] < 0 || index[i] >= w->rows) return -1;
    team().run(threads, [&](int part, int parts) {
        const Share rows(n, 4, part, parts);
        std::vector<float> unit(w->groups);
        for (int64_t i = rows.from; i < rows.to; i++)
            decode(*w, index ? index[i] : from + i, unit.data(), out + i * w->columns);
    });
    return 0;
}

// out (rows) = sum of unit * level over each row. Sums within a group are exact integers. Products with 8-bit
// activations subtract zero times row_sums.
void pot_row_sums(const PotWeight* w, float* out) {
    const Bytes bytes(*w);
    const int64_t size = w->columns / w->groups;
    std::vector<float> unit(w->groups);
    std::vector<int32_t> level(w->columns);
    for (int64_t r = 0; r < w->rows; r++) {
        each_code(*w, r, [&](int64_t c, uint32_t code) { level[c] = bytes.level(code); });
        units(*w, r, 1, unit.data());
        double sum = 0;
        for (int64_t g = 0; g < w->groups; g++) {
            int32_t group_sum = 0;
            for (int64_t c = g * size; c < (g + 1) * size; c++) group_sum += level[c];
            sum += double(group_sum) * unit[g];
        }
        out[r] = float(sum);
    }
}

// Rounds one row x (columns) to q (columns), scale and zero. Returns 0, or -1 if x holds NaN or infinities.
int pot_quantize(const float* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
    return quantize(x, columns, q, scale, zero) ? 0 : -1;
}

// Reads a buffer (n) as fast as possible, so that bench.py can measure memory bandwidth. The sum of its words that it
// returns keeps the compiler from removing the loop. Eight sums in registers: a single one would make each addition wait
// for the one before it, and sums in an array would be loaded and stored again for each word.
uint64_t pot_read(const uint64_t* buffer, int64_t n, int threads) {
    typedef uint64_t Vector __attribute__((vector_size(32), aligned(8), may_alias));
    std::atomic<uint64_t> total{0};
    team().run(threads, [&](int part, int parts) {
        const Share share(n, 32, part, parts);
        Vector sum[8] = {};
        int64_t i = share.from;
        for (; i + 32 <= share.to; i += 32) {
            const Vector* words = reinterpret_cast<const Vector*>(buffer + i);
            UNROLL for (int k = 0; k < 8; k++) sum[k] += words[k];
        }
        uint64_t part_sum = 0;
        for (; i < share.to; i++) part_sum += buffer[i];
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
