// Products with weights packed to 4-bit codes. Plain C++17 with a C interface, no other headers: pot.py builds it at its
// first use, and other programs may lift it out.
//
// A weight is a matrix of codes, a row of which holds (columns + 1) / 2 bytes. Each run of 128 columns is 16 words of
// 32 bits, little-endian: nibble j of word i is column 16 j + i. So a vector of 16 words, shifted right by 4 j, indexes a
// table of 16 levels and yields 16 neighbouring weights: a shift, a look-up and a multiply-add for 16 weights, whatever
// the levels are. What is left of a row stays in order, two columns a byte. A weight's value is level * (scale / top) in
// float32, as everywhere in pot.py; levels are whole numbers, up to 64 where
// activations have 8 bits.
//
// Activations are float32, or 8 bits: q = round(x / scale) + zero, a scale and a zero point per row of x. Then
//     y = scale * (sum over groups of unit * (sum of q * level) - zero * (sum of unit * level)),
// the inner sum in integers, the last one a number per row of the weight that is known beforehand (row_sums).
//
// Sections: weights, activations, decoding, a few rows of x (portable, AVX-512, AVX2, NEON), many rows (AMX), threads,
// interface.

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
// Weights

extern "C" struct PotWeight {
    const uint8_t* codes;    // rows x (columns + 1) / 2
    const void* scale;       // (rows or 1) x groups, half or float
    const float* row_sums;   // rows: see pot_row_sums; null: activations stay float32
    int64_t rows, columns;
    int64_t groups;          // of columns / groups neighbouring columns, which share a scale
    int32_t scale_per_row;   // 0: one row of scales for all
    int32_t scale_is_half;
    float top;               // level that a scale is the value of
    float table[16];         // level of each code; that of code 8 + i is minus that of code i
};

namespace {

// The value of the smallest level in each group of rows row ... row + n - 1, groups each. Scales are positive and finite.
void units(const PotWeight& w, int64_t row, int64_t n, float* out) {
    if (!w.scale_per_row && n > 1) {
        units(w, row, 1, out);
        for (int64_t i = w.groups; i < n * w.groups; i++) out[i] = out[i - w.groups];
        return;
    }
    const int64_t start = w.scale_per_row ? row * w.groups : 0, count = n * w.groups;
    // Times 1 / top is the same as over top where top is a power of two, and much quicker.
    const bool power = (int64_t(w.top) & (int64_t(w.top) - 1)) == 0;
    const float over = power ? 1 : w.top, times = power ? 1 / w.top : 1;
    if (w.scale_is_half) {
        const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + start;
        for (int64_t g = 0; g < count; g++) {
            const uint32_t bits = uint32_t(scale[g]) << 13;  // a half's exponent and fraction, in a float's place
            float f;
            std::memcpy(&f, &bits, 4);
            out[g] = f * 0x1p112f * times;
        }
    } else {
        const float* scale = static_cast<const float*>(w.scale) + start;
        for (int64_t g = 0; g < count; g++) out[g] = scale[g] * times;
    }
    if (!power)
        for (int64_t g = 0; g < count; g++) out[g] /= over;
}

bool aligned_groups(const PotWeight& w) { return w.groups == 1 || w.columns / w.groups % 64 == 0; }

// Units of some rows, and the group of each run of 64 columns in the whole blocks of 128.
struct Runs {
    std::vector<float> unit;
    std::vector<int32_t> group;

    Runs(const PotWeight& w, int64_t rows) : unit(rows * w.groups), group(w.columns / 128 * 2) {
        const int64_t size = w.columns / w.groups;
        for (size_t k = 0; k < group.size(); k++) group[k] = int32_t(64 * k / size);
    }
};

const uint8_t* row_of(const PotWeight& w, int64_t row) { return w.codes + row * ((w.columns + 1) / 2); }

// -----------------------------------------------------------------------------
// Activations

// A row of x in 8 bits. `mixed` holds, for each 128 columns, four runs of 64 bytes that go with the words of codes: the
// columns of even and of odd nibbles in the block's first 64 columns, then in its last 64, zero elsewhere. Byte t of word
// i is column 32 t + i (even) or 32 t + 16 + i (odd).
struct Row8 {
    std::vector<uint8_t> q, mixed;
    float scale = 0;
    int32_t zero = 0;
};

// The function of pot.py's fake_quantize_activations. Returns false for NaN, infinities and what overflows.
bool quantize(const float* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
    float low[16] = {}, high[16] = {};  // so that the compiler may keep vectors of them
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
    const float magic = 0x1.8p23f;  // adding it rounds half to even
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
        row->scale = NAN;  // which the whole of y becomes
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
// Decoding

// Levels by arithmetic that a compiler can turn into vectors, as it cannot a table: each size of the eight is a byte.
struct Bytes {
    uint32_t low = 0, high = 0;

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

// Calls see(column, code) for every column of a row, in order but for what a block mixes.
template <class See>
inline void each_code(const PotWeight& w, int64_t row, See see) {
    const uint8_t* p = row_of(w, row);
    const int64_t whole = w.columns / 128 * 128;
    for (int64_t c = 0; c < whole; c += 128, p += 64) {
        uint32_t word[16];
        std::memcpy(word, p, 64);  // little-endian, as the machines are that torch runs on
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 16; i++) see(c + 16 * j + i, word[i] >> (4 * j) & 15);
    }
    for (int64_t c = whole; c < w.columns; c++, p += ~(c - whole) & 1) see(c, *p >> (4 * ((c - whole) & 1)) & 15);
}

// A row in float32. unit: room for the row's groups.
void decode(const PotWeight& w, int64_t row, float* unit, float* out) {
    const Bytes bytes(w);
    const int64_t size = w.columns / w.groups;
    each_code(w, row, [&](int64_t c, uint32_t code) { out[c] = float(bytes.level(code)); });
    units(w, row, 1, unit);
    for (int64_t g = 0; g < w.groups; g++)
        for (int64_t c = g * size; c < (g + 1) * size; c++) out[c] *= unit[g];
}

// -----------------------------------------------------------------------------
// A few rows of x: y[i][row] = sum over columns of weight * x[i], for the weight's rows from ... to
//
// The fast kernels take groups that are a multiple of 64 columns, or one group: half a block shares a scale. They take
// rows of the weight four at a time, and of x up to four, so that what was decoded is used as often.

float sum_of(const float (&part)[16]) {
    float sum = 0;
    for (float f : part) sum += f;
    return sum;
}

struct Job {
    const PotWeight* w;
    const float* bias;  // or null
    const float* x;
    int64_t n, x_stride;
    const Row8* x8;     // n, if the weight has row_sums
    float* y;
    int64_t y_stride;
};

// The product with the columns that whole blocks of 128 leave over.
float tail(const Job& job, int64_t row, int64_t i, const float* unit) {
    const PotWeight& w = *job.w;
    const int64_t whole = w.columns / 128 * 128, size = w.columns / w.groups, n = w.columns - whole;
    const Bytes bytes(w);
    const uint8_t* p = row_of(w, row) + whole / 2;
    const float* x = job.x + i * job.x_stride + whole;
    float value[128] = {}, part[16] = {};
    for (int64_t k = 0; k < (n + 1) / 2; k++) {
        value[2 * k] = float(bytes.level(p[k] & 15));
        value[2 * k + 1] = float(bytes.level(p[k] >> 4));
    }
    for (int64_t c = 0; c < n; c++)
        part[c % 16] += value[c] * unit[(whole + c) / size] * (job.x8 ? job.x8[i].q[whole + c] : x[c]);
    return sum_of(part);
}

// y, of the sum over whole blocks of 128.
inline float finish(const Job& job, int64_t row, int64_t i, float sum, const float* unit) {
    if (job.w->columns % 128) sum += tail(job, row, i, unit);
    if (job.x8) sum = job.x8[i].scale * (sum - float(job.x8[i].zero) * job.w->row_sums[row]);
    return job.bias ? sum + job.bias[row] : sum;
}

// Products with 8-bit activations by shifts alone: bit b of every level's size, as a mask over the codes.
struct Shifts {
    uint32_t plane[7] = {};

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
            each_code(w, r, [&](int64_t c, uint32_t one) { code[c] = one; });
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

// One block: rows of the weight from r on, whose units are loaded, times rows of x from i on. Of a kind there are blocks
// of one row times one, and of M rows times 1, 2, 3 and 4.
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

// Arrays of vectors stay in registers only where loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 8")

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))

// Processors fetch ahead by themselves, but not far enough for codes that are used as fast as they come.
inline void ahead(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + 6144), _MM_HINT_T0); }

template <int M, int N>
AVX512 inline void finish_avx512(const Job& job, int64_t r, int64_t i0, const __m512 (&sum)[M][N], const float* unit) {
    UNROLL for (int i = 0; i < N; i++) {
        float total[4];
        if (M == 4) {  // four sums at once
            __m256 half[4];
            UNROLL for (int m = 0; m < 4; m++)
                half[m] = _mm256_add_ps(_mm512_castps512_ps256(sum[m % M][i]), _mm512_extractf32x8_ps(sum[m % M][i], 1));
            const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
            _mm_storeu_ps(total, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
        } else {
            total[0] = _mm512_reduce_add_ps(sum[0][i]);
        }
        for (int m = 0; m < M; m++)
            job.y[(i0 + i) * job.y_stride + r + m] = finish(job, r + m, i0 + i, total[m], unit + m * job.w->groups);
    }
}

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
            UNROLL for (int h = 0; h < 2; h++) half[m][h] = _mm512_mul_ps(table, _mm512_set1_ps(unit[m * w.groups + group[2 * b + h]]));
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
                    const uint8_t* at = q[i] + 256 * b + 128 * h;
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(at), even);
                    dot = _mm512_dpbusd_epi32(dot, _mm512_loadu_si512(at + 64), odd);
                    sum[m][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(unit[m * w.groups + group[2 * b + h]]),
                                                sum[m][i]);
                }
        }
    finish_avx512<M, N>(job, r, i0, sum, unit);
}

void rows_avx512(const Job& job, int64_t from, int64_t to) {
    static const Block in_float[] = POT_BLOCKS(block_avx512, 4), in_8_bits[] = POT_BLOCKS(block8_avx512, 4);
    in_blocks(job, from, to, 4, job.x8 ? in_8_bits : in_float);
}

AVX2 float sum_of(__m256 v) {
    float part[8], total = 0;
    _mm256_storeu_ps(part, v);
    for (float f : part) total += f;
    return total;
}

// Eight levels in a register; a code's highest bit is the sign.
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
            UNROLL for (int k = 0; k < 2; k++) {  // words 0 to 7, 8 to 15
                const __m256 level = _mm256_permutevar8x32_ps(half[j / 4], _mm256_srli_epi32(code[k], 4 * j));
                const __m256i minus = _mm256_and_si256(_mm256_slli_epi32(code[k], 28 - 4 * j), sign);
                const __m256 v = _mm256_xor_ps(level, _mm256_castsi256_ps(minus));
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
            const __m256i by[2] = {_mm256_shuffle_epi8(levels, _mm256_and_si256(code, low)),
                                   _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(code, 4), low))};
            UNROLL for (int i = 0; i < N; i++)
                UNROLL for (int h = 0; h < 2; h++) {
                    __m256i dot = _mm256_setzero_si256();
                    UNROLL for (int odd = 0; odd < 2; odd++) {  // two products of 255 x 64 at most fit 16 bits
                        const uint8_t* at = job.x8[i0 + i].mixed.data() + 256 * b + 128 * h + 64 * odd + 32 * k;
                        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
                        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(_mm256_maddubs_epi16(q, by[odd]), ones));
                    }
                    sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(unit[runs.group[2 * b + h]]), sum[i]);
                }
        }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, sum_of(sum[i]), unit);
}

void rows_avx2(const Job& job, int64_t from, int64_t to) {
    static const Block in_float[] = POT_BLOCKS(block_avx2, 1), in_8_bits[] = POT_BLOCKS(block8_avx2, 1);
    in_blocks(job, from, to, 1, job.x8 ? in_8_bits : in_float);
}

#elif defined(__aarch64__)

int8x16_t levels_neon(const PotWeight& w) {
    int8_t level[16];
    for (int i = 0; i < 16; i++) level[i] = int8_t(w.table[i]);
    return vld1q_s8(level);
}

// A byte look-up and widening give the levels; the unit comes in at the end of a half.
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
            UNROLL for (int k = 0; k < 4; k++) narrow[k] = vmovn_u32(vandq_u32(vshlq_u32(code[k], shift), vdupq_n_u32(15)));
            const uint8x16_t index = vcombine_u8(vmovn_u16(vcombine_u16(narrow[0], narrow[1])),
                                                 vmovn_u16(vcombine_u16(narrow[2], narrow[3])));
            const int8x16_t level = vqtbl1q_s8(table, index);
            const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(level)), vmovl_s8(vget_high_s8(level))};
            UNROLL for (int k = 0; k < 4; k++) {
                const int16x4_t four = k & 1 ? vget_high_s16(wide[k / 2]) : vget_low_s16(wide[k / 2]);
                const float32x4_t v = vcvtq_f32_s32(vmovl_s16(four));
                UNROLL for (int i = 0; i < N; i++)
                    sum[i][j / 4] = vfmaq_f32(sum[i][j / 4], v, vld1q_f32(x + i * job.x_stride + 16 * j + 4 * k));
            }
        }
        UNROLL for (int i = 0; i < N; i++)
            total[i] += vaddvq_f32(sum[i][0]) * unit[runs.group[2 * b]] + vaddvq_f32(sum[i][1]) * unit[runs.group[2 * b + 1]];
    }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, total[i], unit);
}

// q times a level needs 16 bits, with a sign: bytes are widened first.
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
            const int8x16_t by[2] = {vqtbl1q_s8(table, vandq_u8(code, vdupq_n_u8(15))),
                                     vqtbl1q_s8(table, vshrq_n_u8(code, 4))};
            UNROLL for (int i = 0; i < N; i++)
                UNROLL for (int h = 0; h < 2; h++)
                    UNROLL for (int odd = 0; odd < 2; odd++) {
                        const uint8x16_t q = vld1q_u8(job.x8[i0 + i].mixed.data() + 256 * b + 128 * h + 64 * odd + 16 * k);
                        const int16x8_t a = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(q)));
                        const int16x8_t c = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(q)));
                        dot[i][h] = vpadalq_s16(dot[i][h], vmulq_s16(a, vmovl_s8(vget_low_s8(by[odd]))));
                        dot[i][h] = vpadalq_s16(dot[i][h], vmulq_s16(c, vmovl_s8(vget_high_s8(by[odd]))));
                    }
        }
        UNROLL for (int i = 0; i < N; i++)
            UNROLL for (int h = 0; h < 2; h++) total[i] += float(vaddvq_s32(dot[i][h])) * unit[runs.group[2 * b + h]];
    }
    UNROLL for (int i = 0; i < N; i++)
        job.y[(i0 + i) * job.y_stride + r] = finish(job, r, i0 + i, total[i], unit);
}

void rows_neon(const Job& job, int64_t from, int64_t to) {
    static const Block in_float[] = POT_BLOCKS(block_neon, 1), in_8_bits[] = POT_BLOCKS(block8_neon, 1);
    in_blocks(job, from, to, 1, job.x8 ? in_8_bits : in_float);
}

#endif

// -----------------------------------------------------------------------------
// Many rows of x: tiles of 16 x 64 bytes, multiplied by AMX
//
// x becomes bfloat16, or 8 bits if the weight has row_sums; levels are exact in either, so they are decoded without
// their units, which multiply the sums of a group in float32. Within a tile the columns' order is the decoding's: 32
// columns as the pairs (i, 16 + i), or 64 as (i, 16 + i, 32 + i, 48 + i).

#if defined(POT_AMX)

#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")))

bool has_amx() {
    static const bool here = [] {
        unsigned a, b, c, d, bf16 = 0;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) + (d >> 24 & 1) + (d >> 25 & 1) < 3) return false;
        if (!__get_cpuid_count(7, 1, &bf16, &b, &c, &d) || !(bf16 >> 5 & 1)) return false;
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // Linux lends the tiles' registers to who asks
    }();
    return here;
}

// Room for tiles, whose rows are to lie in one cache line each.
struct Aligned {
    std::unique_ptr<uint8_t[]> raw;
    uint8_t* data;

    explicit Aligned(int64_t bytes) : raw(new uint8_t[bytes + 63]) {
        data = raw.get() + (-reinterpret_cast<uintptr_t>(raw.get()) & 63);
    }
};

struct Tiles {
    const Job* job;
    bool in8;
    int64_t steps;                   // tiles in a row of x, or of the weight
    int64_t n;                       // rows of x, in whole pairs of tiles
    Aligned a;                       // x: [n / 16][steps][16][64]
    std::vector<float> scale, zero;  // of x in 8 bits

    explicit Tiles(const Job& j)
        : job(&j), in8(j.w->row_sums), steps((j.w->columns + 63) / 64 * (in8 ? 1 : 2)), n((j.n + 31) / 32 * 32),
          a(n * steps * 64), scale(n), zero(n) {}

    uint8_t* row(int64_t i, int64_t step) { return &a.data[((i / 16 * steps + step) * 16 + i % 16) * 64]; }
};

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
                    v = _mm512_or_si512(_mm512_slli_epi32(v, 8), _mm512_cvtepu8_epi32(_mm_loadu_si128(
                                                                     reinterpret_cast<__m128i*>(&q[64 * s + 16 * b]))));
            } else {
                for (int b = 1; b >= 0; b--)
                    v = _mm512_or_si512(_mm512_slli_epi32(v, 16), _mm512_cvtepu16_epi32(__m256i(
                                                                      _mm512_cvtneps_pbh(_mm512_loadu_ps(&x[32 * s + 16 * b])))));
            }
            _mm512_storeu_si512(tiles->row(i, s), v);
        }
    }
}

// 16 rows of the weight from r on as [steps][16][64] bytes and their units as [groups][16]. Rows behind the last are the
// last again.
AMX void tiles_of_weight(const Tiles& tiles, int64_t r, uint8_t* out, float* unit) {
    const PotWeight& w = *tiles.job->w;
    const int64_t row_bytes = (w.columns + 1) / 2, whole = w.columns / 128 * 128, last = w.rows - 1;
    const __m512 table = _mm512_loadu_ps(w.table);
    const __m512i in8 = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(table)));
    const __m512i in16 = _mm512_broadcast_i64x4(__m256i(_mm512_cvtneps_pbh(table)));
    alignas(64) int32_t offset[16];
    std::vector<float> units_of_row(w.groups);
    for (int m = 0; m < 16; m++) {
        offset[m] = int32_t((std::min(r + m, last) - r) * row_bytes);
        units(w, r + offset[m] / row_bytes, 1, units_of_row.data());
        for (int64_t g = 0; g < w.groups; g++) unit[16 * g + m] = units_of_row[g];
    }
    const __m512i at = _mm512_load_si512(offset);
    for (int64_t c = 0; c < whole; c += 128)
        for (int i = 0; i < 16; i++) {
            const __m512i words = _mm512_i32gather_epi32(at, row_of(w, r) + c / 2 + 4 * i, 1);
            if (tiles.in8) {
                UNROLL for (int h = 0; h < 2; h++) {
                    __m512i v = _mm512_and_si512(_mm512_srli_epi32(words, 16 * h), _mm512_set1_epi32(0xffff));
                    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 8)), _mm512_set1_epi32(0x00ff00ff));
                    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 4)), _mm512_set1_epi32(0x0f0f0f0f));
                    _mm512_storeu_si512(out + ((c / 64 + h) * 16 + i) * 64, _mm512_shuffle_epi8(in8, v));
                }
            } else {
                for (int t = 0; t < 4; t++) {
                    const __m512i v = _mm512_srli_epi32(words, 8 * t);
                    const __m512i pair = _mm512_mask_blend_epi16(0xaaaaaaaa, v, _mm512_slli_epi32(v, 12));
                    _mm512_storeu_si512(out + ((c / 32 + t) * 16 + i) * 64, _mm512_permutexvar_epi16(pair, in16));
                }
            }
        }
    if (whole == w.columns) return;
    const int64_t per = tiles.in8 ? 64 : 32, wide = 64 / per;  // columns in a step, bytes of a level
    std::memset(out + whole / per * 1024, 0, (tiles.steps - whole / per) * 1024);
    const Bytes bytes(w);
    for (int m = 0; m < 16; m++)
        for (int64_t c = whole; c < w.columns; c++) {
            const uint8_t pair = row_of(w, r)[offset[m] + c / 2];
            const int32_t level = bytes.level(pair >> 4 * (c & 1) & 15);
            const int64_t at_row = c / per * 16 + c % 16, at_byte = 4 * m + c % per / 16 * wide;
            const float f = float(level);
            if (tiles.in8)
                out[at_row * 64 + at_byte] = uint8_t(level);
            else
                std::memcpy(out + at_row * 64 + at_byte, reinterpret_cast<const uint8_t*>(&f) + 2, 2);
        }
}

// y for 32 rows of x from i on and 32 of the weight from r on.
AMX void product_of_tiles(Tiles& tiles, int64_t i, int64_t r, const uint8_t* b, const float* unit) {
    const Job& job = *tiles.job;
    const PotWeight& w = *job.w;
    const int64_t per = tiles.in8 ? 64 : 32, steps = tiles.steps, size = w.columns / w.groups;
    const uint8_t *a[2] = {tiles.row(i, 0), tiles.row(i + 16, 0)}, *b1 = b + steps * 1024;
    alignas(64) float sum[32][32] = {}, part[2][2][16][16];
    const int64_t rows = std::min<int64_t>(32, w.rows - r), last = std::min<int64_t>(32, job.n - i);
    for (int64_t m = 0; m < last; m++)  // every row of y lies in another page: to wait for them would take half the time
        for (int64_t c = 0; c < rows; c += 16) __builtin_prefetch(job.y + (i + m) * job.y_stride + r + c, 1);
    for (int64_t s = 0, end, g; s < steps; s = end) {
        g = std::min(s * per / size, w.groups - 1);
        end = std::min(steps, w.groups > 1 ? (g + 1) * size / per : s + 16);  // 1,024 columns of integers are exact in float
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
        for (int right = 0; right < 2; right++) {
            const __m512 u = _mm512_loadu_ps(unit + (right * w.groups + g) * 16);
            for (int m = 0; m < 32; m++) {
                const float* at = part[m / 16][right][m % 16];
                const __m512 v = tiles.in8 ? _mm512_cvtepi32_ps(_mm512_load_si512(at)) : _mm512_load_ps(at);
                float* to = &sum[m][16 * right];
                _mm512_store_ps(to, _mm512_fmadd_ps(v, u, _mm512_load_ps(to)));
            }
        }
    }
    for (int right = 0; right < 2 && 16 * right < rows; right++) {
        const int64_t c = r + 16 * right;
        const __mmask16 here = __mmask16((1u << std::min<int64_t>(16, rows - 16 * right)) - 1);
        const __m512 bias = job.bias ? _mm512_maskz_loadu_ps(here, job.bias + c) : _mm512_setzero_ps();
        const __m512 row_sums = tiles.in8 ? _mm512_maskz_loadu_ps(here, w.row_sums + c) : _mm512_setzero_ps();
        for (int64_t m = 0; m < last; m++) {
            __m512 v = _mm512_load_ps(&sum[m][16 * right]);
            if (tiles.in8)
                v = _mm512_mul_ps(_mm512_set1_ps(tiles.scale[i + m]),
                                  _mm512_fnmadd_ps(_mm512_set1_ps(tiles.zero[i + m]), row_sums, v));
            _mm512_mask_storeu_ps(job.y + (i + m) * job.y_stride + c, here, _mm512_add_ps(v, bias));
        }
    }
}

// Rows from ... to of the weight. If x does not stay in the second cache, so many are decoded at a time that they do.
AMX void rows_by_tiles(Tiles& tiles, int64_t from, int64_t to) {
    const PotWeight& w = *tiles.job->w;
    struct alignas(64) { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("" ::: "memory");  // compilers know of some of the bytes alone that tiles are loaded from
    _tile_loadconfig(&config);
    const int64_t bytes = tiles.steps * 1024, room = tiles.n * tiles.steps * 64 < 1 << 19 ? 0 : 768 << 10;
    const int64_t panels = std::max<int64_t>(2, room / bytes / 2 * 2);
    const Aligned b(panels * bytes);
    std::vector<float> unit(panels * w.groups * 16);
    for (int64_t r = from; r < to; r += 16 * panels) {
        const int64_t here = (std::min(panels * 16, to - r) + 31) / 32 * 2;
        for (int64_t p = 0; p < here; p++)
            tiles_of_weight(tiles, std::min(r + 16 * p, w.rows - 1), b.data + p * bytes, &unit[p * w.groups * 16]);
        asm volatile("" ::: "memory");
        for (int64_t i = 0; i < tiles.job->n; i += 32)
            for (int64_t p = 0; p < here; p += 2)
                product_of_tiles(tiles, i, r + 16 * p, b.data + p * bytes, &unit[p * w.groups * 16]);
    }
    _tile_release();
}

#else

bool has_amx() { return false; }

#endif

// -----------------------------------------------------------------------------
// Choice of an instruction set

struct InstructionSet {
    const char* name;
    bool here;
    void (*rows)(const Job&, int64_t, int64_t);
    bool tiles;
};

const std::vector<InstructionSet>& instruction_sets() {  // the best first
    static const std::vector<InstructionSet> all = {
#if defined(__x86_64__)
        {"amx", has_amx(), rows_avx512, true},
        {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"), rows_avx512, false},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), rows_avx2, false},
#elif defined(__aarch64__)
        {"neon", true, rows_neon, false},
#endif
        {"portable", true, rows_portable, false},
    };
    return all;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& instruction_set() {
    const InstructionSet* set = chosen.load(std::memory_order_relaxed);
    if (!set) {
        for (const InstructionSet& one : instruction_sets())
            if (one.here) {
                set = &one;
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
// Threads: torch's own, where GNU's OpenMP is in this process, as two pools take the processors from each other. Else
// workers that spin for some 20 us after each job, as waking a sleeper takes longer than a product, and then sleep.

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

// What GCC makes of `#pragma omp parallel`, found in the process rather than linked, which would bring a second pool.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
    int (*part)() = nullptr;
    int (*parts)() = nullptr;

    static const OpenMP& get() {
        static const OpenMP one = [] {
            OpenMP o;
            o.part = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
            o.parts = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
            if (o.part && o.parts)
                o.parallel = reinterpret_cast<decltype(o.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
            return o;
        }();
        return one;
    }
};

const pid_t loaded_in = getpid();

class Team {
  public:
    // Calls work(part, parts) once for each part, this thread's included. Our own threads do one job at a time: a second
    // caller gets parts = 1 and does its work alone. OpenMP has threads for every caller.
    template <class Work>
    void run(int parts, const Work& work) {
        if (parts <= 1 || getpid() != loaded_in) return work(0, 1);  // a forked process has none of the workers
        if (OpenMP::get().parallel) {
            OpenMP::get().parallel([](void* w) { (*static_cast<const Work*>(w))(OpenMP::get().part(), OpenMP::get().parts()); },
                                   const_cast<Work*>(&work), unsigned(parts), 0);
            return;
        }
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only) return work(0, 1);
        while (int(workers_.size()) < parts - 1)
            workers_.emplace_back(&Team::serve, this, int(workers_.size()) + 1, epoch_.load());
        work_ = [](const void* w, int part, int all) { (*static_cast<const Work*>(w))(part, all); };
        context_ = &work, parts_ = parts;
        left_.store(int(workers_.size()), std::memory_order_relaxed);  // also those that have no part in this one
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        work(0, parts);
        while (left_.load(std::memory_order_acquire) > 0) relax();
    }

  private:
    void serve(int part, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < POT_SPINS && epoch_.load(std::memory_order_acquire) == seen; spin++) relax();
            if (epoch_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleeping_++;
                wake_.wait(lock, [&] { return epoch_.load() != seen; });
                sleeping_--;
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (part < parts_) work_(context_, part, parts_);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> left_{0}, sleeping_{0};
    void (*work_)(const void*, int, int) = nullptr;
    const void* context_ = nullptr;
    int parts_ = 0;
};

// Never destroyed: its threads may still wait when the process ends.
Team& team() {
    static Team* one = new Team;
    return *one;
}

// A thread's share of n things, in runs of so many.
struct Share {
    int64_t from, to;

    Share(int64_t n, int64_t run, int part, int parts) {
        const int64_t runs = (n + run - 1) / run;
        from = std::min(n, runs * part / parts * run);
        to = std::min(n, runs * (part + 1) / parts * run);
    }
};

}  // namespace

// -----------------------------------------------------------------------------
// Interface

extern "C" {

// y (n, rows) = x (n, columns) times the weight transposed, plus bias (rows) if it is not null. Rows of x and y lie
// x_stride and y_stride floats apart. With row_sums x is rounded to 8 bits first. Meant for some 64 rows at most.
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

// The same for many rows: x is rounded to bfloat16, or to 8 bits with row_sums. Returns -1, having done nothing, if this
// machine cannot or the groups are no multiples of 64 columns.
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

// out (n, columns) = rows index[0 ... n - 1] of the weight in float32, or from ... from + n - 1 if index is null. Returns
// -1, having done nothing, if an index is out of range.
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

// out (rows) = sum over each row of unit * level, summed in integers within a group.
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
            int32_t of_group = 0;
            for (int64_t c = g * size; c < (g + 1) * size; c++) of_group += level[c];
            sum += double(of_group) * unit[g];
        }
        out[r] = float(sum);
    }
}

// q (columns) of a row x, with its scale and zero point; 0, or -1 if there are none as x holds NaN or infinities.
int pot_quantize(const float* x, int64_t columns, uint8_t* q, float* scale, int32_t* zero) {
    return quantize(x, columns, q, scale, zero) ? 0 : -1;
}

// Reads a buffer, as quickly as can be, and returns what nobody needs: for bench.py, to know the memory's bandwidth.
uint64_t pot_read(const uint64_t* buffer, int64_t n, int threads) {
    std::atomic<uint64_t> all{0};
    team().run(threads, [&](int part, int parts) {
        const Share mine(n, 64, part, parts);
        uint64_t sum[64] = {};
        for (int64_t i = mine.from; i + 64 <= mine.to; i += 64)
            for (int k = 0; k < 64; k++) sum[k] ^= buffer[i + k];
        for (uint64_t one : sum) all ^= one;
    });
    return all;
}

// Names of the instruction sets that this machine has, the best first, with spaces between.
const char* pot_instruction_sets() {
    static const std::string* names = [] {
        auto* all = new std::string;
        for (const InstructionSet& one : instruction_sets())
            if (one.here) *all += (all->empty() ? "" : " ") + std::string(one.name);
        return all;
    }();
    return names->c_str();
}

// 0, or -1 if this machine does not have the instruction set of that name.
int pot_choose(const char* name) {
    for (const InstructionSet& one : instruction_sets())
        if (one.here && std::strcmp(one.name, name) == 0) {
            chosen = &one;
            return 0;
        }
    return -1;
}

}  // extern "C"
