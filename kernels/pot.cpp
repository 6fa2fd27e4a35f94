// Products with weights packed to 4-bit codes. Plain C++17 with a C interface, no other headers: pot.py builds it at its
// first use, and other programs may lift it out.
//
// A weight is a matrix of codes, a row of which holds (columns + 1) / 2 bytes. Each run of 128 columns is 16 words of
// 32 bits, little-endian: nibble j of word i is column 16 j + i. So a vector of 16 words, shifted right by 4 j, indexes a
// table of 16 levels and yields 16 neighbouring weights: a shift, a look-up and a multiply-add for 16 weights, whatever
// the levels are. What is left of a row stays in order, two columns a byte. A weight's value is level * (scale / top) in
// float32, as everywhere in pot.py.
//
// Sections: weights, decoding, rows times x for each instruction set, threads, interface.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// -----------------------------------------------------------------------------
// Weights

extern "C" struct PotWeight {
    const uint8_t* codes;    // rows x (columns + 1) / 2
    const void* scale;       // (rows or 1) x groups, half or float
    int64_t rows, columns;
    int64_t groups;          // of columns / groups neighbouring columns, which share a scale
    int32_t scale_per_row;   // 0: one row of scales for all
    int32_t scale_is_half;
    float top;               // level that a scale is the value of
    float table[16];         // level of each code; that of code 8 + i is minus that of code i
};

namespace {

// The value of the smallest level in each group of a row. Scales are positive and finite.
void units(const PotWeight& w, int64_t row, float* out) {
    const int64_t start = w.scale_per_row ? row * w.groups : 0;
    if (w.scale_is_half) {
        const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + start;
        for (int64_t g = 0; g < w.groups; g++) {
            const uint32_t bits = uint32_t(scale[g]) << 13;  // a half's exponent and fraction, in a float's place
            float f;
            std::memcpy(&f, &bits, 4);
            out[g] = f * 0x1p112f / w.top;
        }
    } else {
        const float* scale = static_cast<const float*>(w.scale) + start;
        for (int64_t g = 0; g < w.groups; g++) out[g] = scale[g] / w.top;
    }
}

// The same for each run of 64 columns, of which a group has one or more; the runs behind the last group's end read as it.
void units_of_64(const PotWeight& w, int64_t row, float* unit, float* out) {
    units(w, row, unit);
    const int64_t runs = w.columns / 128 * 2, each = std::max<int64_t>(1, w.columns / w.groups / 64);
    for (int64_t run = 0, g = 0, left = each; run < runs; run++, left--) {
        if (left == 0 && g + 1 < w.groups) g++, left = each;
        out[run] = unit[g];
    }
}

const uint8_t* row_of(const PotWeight& w, int64_t row) { return w.codes + row * ((w.columns + 1) / 2); }

int tail_code(const uint8_t* row, int64_t whole, int64_t c) {
    return row[whole / 2 + (c - whole) / 2] >> (4 * ((c - whole) & 1)) & 15;
}

// -----------------------------------------------------------------------------
// Decoding: a row's weights in float32

void decode(const PotWeight& w, int64_t row, float* unit, float* out) {
    const uint8_t* p = row_of(w, row);
    const int64_t whole = w.columns / 128 * 128, size = w.columns / w.groups;
    for (int64_t c = 0; c < whole; c += 128, p += 64) {
        uint32_t word[16];
        std::memcpy(word, p, 64);  // little-endian, as the machines are that torch runs on
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 16; i++) out[c + 16 * j + i] = w.table[word[i] >> (4 * j) & 15];
    }
    for (int64_t c = whole; c < w.columns; c++) out[c] = w.table[tail_code(row_of(w, row), whole, c)];
    units(w, row, unit);
    for (int64_t g = 0; g < w.groups; g++)
        for (int64_t c = g * size; c < (g + 1) * size; c++) out[c] *= unit[g];
}

// -----------------------------------------------------------------------------
// Rows times x: y[i][row] = sum over columns of weight * x[i], for n <= 4 rows of x, for weight rows from ... to
//
// The fast kernels take groups that are a multiple of 64 columns, or one group: half a block shares a scale.

struct Job {
    const PotWeight* w;
    const float* bias;  // or null
    const float* x;
    int64_t n, x_stride;
    float* y;
    int64_t y_stride;
};

const int ROWS_OF_X = 4;

bool aligned_groups(const PotWeight& w) { return w.groups == 1 || w.columns / w.groups % 64 == 0; }

// What the whole blocks of 128 leave over, and the bias; returns y.
float finish(const Job& job, int64_t row, int64_t i, float sum, const float* unit) {
    const PotWeight& w = *job.w;
    const int64_t whole = w.columns / 128 * 128, size = w.columns / w.groups;
    const float* x = job.x + i * job.x_stride;
    for (int64_t c = whole; c < w.columns; c++)
        sum += w.table[tail_code(row_of(w, row), whole, c)] * unit[c / size] * x[c];
    return job.bias ? sum + job.bias[row] : sum;
}

void rows_portable(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    std::vector<float> row(w.columns), unit(w.groups);
    for (int64_t r = from; r < to; r++) {
        decode(w, r, unit.data(), row.data());
        for (int64_t i = 0; i < job.n; i++) {
            const float* x = job.x + i * job.x_stride;
            float part[16] = {};  // so that the compiler may keep a vector of sums
            int64_t c = 0;
            for (; c + 16 <= w.columns; c += 16)
                for (int k = 0; k < 16; k++) part[k] += row[c + k] * x[c + k];
            float sum = 0;
            for (; c < w.columns; c++) sum += row[c] * x[c];
            for (float p : part) sum += p;
            job.y[i * job.y_stride + r] = job.bias ? sum + job.bias[r] : sum;
        }
    }
}

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))

// M rows of the weight side by side keep the adders busy while each waits for its last sum.
template <int M, int N>
AVX512 void block_avx512(const Job& job, int64_t r, const float* const unit[], const float* const run[]) {
    const PotWeight& w = *job.w;
    const __m512 table = _mm512_loadu_ps(w.table);
    const int64_t blocks = w.columns / 128;
    const uint8_t* p[M];
    __m512 sum[M][N];
    for (int m = 0; m < M; m++) {
        p[m] = row_of(w, r + m);
        for (int i = 0; i < N; i++) sum[m][i] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b++) {
        const float* x = job.x + 128 * b;
        __m512i code[M];
        __m512 half[M][2];
        for (int m = 0; m < M; m++) {
            code[m] = _mm512_loadu_si512(p[m] + 64 * b);
            half[m][0] = _mm512_mul_ps(table, _mm512_set1_ps(run[m][2 * b]));
            half[m][1] = _mm512_mul_ps(table, _mm512_set1_ps(run[m][2 * b + 1]));
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            for (int m = 0; m < M; m++) {
                const __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(code[m], 4 * j), half[m][j / 4]);
                for (int i = 0; i < N; i++)
                    sum[m][i] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + i * job.x_stride + 16 * j), sum[m][i]);
            }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < N; i++)
            job.y[i * job.y_stride + r + m] =
                finish(job, r + m, i, _mm512_reduce_add_ps(sum[m][i]), unit[m]);
}

template <int N>
AVX512 void rows_avx512_n(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    const int64_t runs = w.columns / 128 * 2;
    std::vector<float> all(4 * (w.groups + runs));
    float *unit[4], *run[4];
    for (int m = 0; m < 4; m++) {
        unit[m] = all.data() + m * (w.groups + runs);
        run[m] = unit[m] + w.groups;
    }
    int64_t r = from;
    for (; r + 4 <= to; r += 4) {
        for (int m = 0; m < 4; m++) units_of_64(w, r + m, unit[m], run[m]);
        block_avx512<4, N>(job, r, unit, run);
    }
    for (; r < to; r++) {
        units_of_64(w, r, unit[0], run[0]);
        block_avx512<1, N>(job, r, unit, run);
    }
}

void rows_avx512(const Job& job, int64_t from, int64_t to) {
    switch (job.n) {
        case 1: return rows_avx512_n<1>(job, from, to);
        case 2: return rows_avx512_n<2>(job, from, to);
        case 3: return rows_avx512_n<3>(job, from, to);
        default: return rows_avx512_n<4>(job, from, to);
    }
}

// Eight levels in a register; a code's highest bit is the sign.
template <int N>
AVX2 void rows_avx2_n(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    const __m256 table = _mm256_loadu_ps(w.table);
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    const int64_t blocks = w.columns / 128;
    std::vector<float> unit(w.groups), run(2 * blocks);
    for (int64_t r = from; r < to; r++) {
        units_of_64(w, r, unit.data(), run.data());
        __m256 sum[N][2];
        for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            const float* x = job.x + 128 * b;
            const __m256 half[2] = {_mm256_mul_ps(table, _mm256_set1_ps(run[2 * b])),
                                    _mm256_mul_ps(table, _mm256_set1_ps(run[2 * b + 1]))};
            const uint8_t* p = row_of(w, r) + 64 * b;
            const __m256i code[2] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                for (int k = 0; k < 2; k++) {  // words 0 to 7, 8 to 15
                    const __m256 level = _mm256_permutevar8x32_ps(half[j / 4], _mm256_srli_epi32(code[k], 4 * j));
                    const __m256i minus = _mm256_and_si256(_mm256_slli_epi32(code[k], 28 - 4 * j), sign);
                    const __m256 v = _mm256_xor_ps(level, _mm256_castsi256_ps(minus));
                    for (int i = 0; i < N; i++)
                        sum[i][k] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + i * job.x_stride + 16 * j + 8 * k), sum[i][k]);
                }
        }
        for (int i = 0; i < N; i++) {
            float part[8], total = 0;
            _mm256_storeu_ps(part, _mm256_add_ps(sum[i][0], sum[i][1]));
            for (float f : part) total += f;
            job.y[i * job.y_stride + r] = finish(job, r, i, total, unit.data());
        }
    }
}

void rows_avx2(const Job& job, int64_t from, int64_t to) {
    switch (job.n) {
        case 1: return rows_avx2_n<1>(job, from, to);
        case 2: return rows_avx2_n<2>(job, from, to);
        case 3: return rows_avx2_n<3>(job, from, to);
        default: return rows_avx2_n<4>(job, from, to);
    }
}

#elif defined(__aarch64__)

// Levels are whole numbers below 128, so a byte look-up and widening give them; the unit comes in at the end of a half.
template <int N>
void rows_neon_n(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    const int64_t blocks = w.columns / 128;
    std::vector<float> unit(w.groups), run(2 * blocks);
    int8_t levels[16];
    for (int i = 0; i < 16; i++) levels[i] = int8_t(w.table[i]);
    const int8x16_t table = vld1q_s8(levels);
    for (int64_t r = from; r < to; r++) {
        units_of_64(w, r, unit.data(), run.data());
        float total[N] = {};
        for (int64_t b = 0; b < blocks; b++) {
            uint32x4_t code[4];
            for (int k = 0; k < 4; k++) code[k] = vreinterpretq_u32_u8(vld1q_u8(row_of(w, r) + 64 * b + 16 * k));
            float32x4_t sum[N][2];
            for (int i = 0; i < N; i++) sum[i][0] = sum[i][1] = vdupq_n_f32(0);
            for (int j = 0; j < 8; j++) {
                const int32x4_t shift = vdupq_n_s32(-4 * j);
                uint16x4_t narrow[4];
                for (int k = 0; k < 4; k++)
                    narrow[k] = vmovn_u32(vandq_u32(vshlq_u32(code[k], shift), vdupq_n_u32(15)));
                const uint8x16_t index = vcombine_u8(vmovn_u16(vcombine_u16(narrow[0], narrow[1])),
                                                     vmovn_u16(vcombine_u16(narrow[2], narrow[3])));
                const int8x16_t level = vqtbl1q_s8(table, index);
                const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(level)), vmovl_s8(vget_high_s8(level))};
                for (int k = 0; k < 4; k++) {
                    const int16x4_t four = k & 1 ? vget_high_s16(wide[k / 2]) : vget_low_s16(wide[k / 2]);
                    const float32x4_t v = vcvtq_f32_s32(vmovl_s16(four));
                    for (int i = 0; i < N; i++)
                        sum[i][j / 4] = vfmaq_f32(sum[i][j / 4], v, vld1q_f32(job.x + i * job.x_stride + 128 * b + 16 * j + 4 * k));
                }
            }
            for (int i = 0; i < N; i++)
                total[i] += vaddvq_f32(sum[i][0]) * run[2 * b] + vaddvq_f32(sum[i][1]) * run[2 * b + 1];
        }
        for (int i = 0; i < N; i++) job.y[i * job.y_stride + r] = finish(job, r, i, total[i], unit.data());
    }
}

void rows_neon(const Job& job, int64_t from, int64_t to) {
    switch (job.n) {
        case 1: return rows_neon_n<1>(job, from, to);
        case 2: return rows_neon_n<2>(job, from, to);
        case 3: return rows_neon_n<3>(job, from, to);
        default: return rows_neon_n<4>(job, from, to);
    }
}

#endif

struct InstructionSet {
    const char* name;
    bool here;
    void (*rows)(const Job&, int64_t, int64_t);
};

const std::vector<InstructionSet>& instruction_sets() {  // the best first
    static const std::vector<InstructionSet> all = {
#if defined(__x86_64__)
        {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"), rows_avx512},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), rows_avx2},
#elif defined(__aarch64__)
        {"neon", true, rows_neon},
#endif
        {"portable", true, rows_portable},
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

// -----------------------------------------------------------------------------
// Threads: workers spin for some 20 us after each job, as waking a sleeper takes longer than a product; then they sleep, so
// that they take no processor from torch's own threads.

class Team {
  public:
    // Calls work(part, parts) once for each part, this thread's included. One job at a time; a second caller does its own
    // work alone.
    void run(int parts, void (*work)(void*, int, int), void* context) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (parts <= 1 || !only || getpid() != process_) {  // a forked process has none of the workers
            for (int part = 0; part < parts; part++) work(context, part, parts);
            return;
        }
        while (int(workers_.size()) < parts - 1)
            workers_.emplace_back(&Team::serve, this, int(workers_.size()) + 1, epoch_.load());
        work_ = work, context_ = context, parts_ = parts;
        left_.store(int(workers_.size()), std::memory_order_relaxed);  // also those that have no part in this one
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        work(context, 0, parts);
        while (left_.load(std::memory_order_acquire) > 0) pause();
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void serve(int part, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < 500 && epoch_.load(std::memory_order_acquire) == seen; spin++) pause();
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
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int parts_ = 0;
    const pid_t process_ = getpid();
};

// Never destroyed: its threads may still wait when the process ends.
Team& team() {
    static Team* one = new Team;
    return *one;
}

// A thread's share of the rows, in runs of four.
void share(int64_t rows, int part, int parts, int64_t* from, int64_t* to) {
    const int64_t fours = (rows + 3) / 4;
    *from = std::min(rows, fours * part / parts * 4);
    *to = std::min(rows, fours * (part + 1) / parts * 4);
}

struct Unpack {
    const PotWeight* w;
    const int64_t* index;
    int64_t n;
    float* out;
};

}  // namespace

// -----------------------------------------------------------------------------
// Interface

extern "C" {

// y (n, rows) = x (n, columns) times the weight transposed, plus bias (rows) if it is not null. Rows of x and y lie
// x_stride and y_stride floats apart.
void pot_linear(const PotWeight* w, const float* bias, const float* x, int64_t n, int64_t x_stride, float* y,
                int64_t y_stride, int threads) {
    Job job{w, bias, x, n, x_stride, y, y_stride};
    team().run(threads, [](void* context, int part, int parts) {
        Job all = *static_cast<Job*>(context);
        const auto rows = aligned_groups(*all.w) ? instruction_set().rows : rows_portable;
        int64_t from, to;
        share(all.w->rows, part, parts, &from, &to);
        const int64_t step = rows == rows_portable ? all.n : ROWS_OF_X;
        for (int64_t i = 0; i < all.n; i += step) {
            Job some = all;
            some.n = std::min(step, all.n - i);
            some.x += i * all.x_stride;
            some.y += i * all.y_stride;
            rows(some, from, to);
        }
    }, &job);
}

// out (n, columns) = rows index[0 ... n - 1] of the weight in float32, or its first n if index is null.
void pot_unpack(const PotWeight* w, const int64_t* index, int64_t n, float* out, int threads) {
    Unpack job{w, index, n, out};
    team().run(threads, [](void* context, int part, int parts) {
        const Unpack& all = *static_cast<Unpack*>(context);
        int64_t from, to;
        share(all.n, part, parts, &from, &to);
        std::vector<float> unit(all.w->groups);
        for (int64_t i = from; i < to; i++)
            decode(*all.w, all.index ? all.index[i] : i, unit.data(), all.out + i * all.w->columns);
    }, &job);
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
