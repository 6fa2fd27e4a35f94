// Tests the kernels against sums in double, on every instruction set of this machine or on the one that argument 1 names:
// products with activations of float32 and of 8 bits, unpacking, and the decode step of GPT-2 and of models of Llama's
// kind. Argument 1 may hold several names, separated by spaces. Buffers have exactly the size that the kernels need, so
// that -fsanitize=address,undefined finds every access outside of them. With "threads" as argument 1, it tests only what
// threads share, so that -fsanitize=thread finds every access that is not ordered. With "shapes N", decode steps of N
// random models of odd sizes. "threads N" and "shapes N" take minutes for a large N.
// tests/test_kernel.py builds and runs this file, also for 64-bit ARM:
//
//     aarch64-linux-gnu-g++ -O1 -std=c++17 -static -pthread tests/kernel.cpp -o kernel && qemu-aarch64 ./kernel neon
//
// -DPOT_EMULATE tests the kernels for AVX-VNNI, AVX-512 and AMX on any machine: SIMDe has the intrinsics in portable C++.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(POT_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// AMX: the instructions that pot.cpp uses, by Intel's manual. Tile registers are 16 rows of 64 bytes.
thread_local uint8_t tile_register[8][16][64];
thread_local bool tiles_have_shape = false;

inline void _tile_loadconfig(const void* config) {
    const uint8_t* bytes = static_cast<const uint8_t*>(config);
    tiles_have_shape = bytes[0] == 1;
    for (int t = 0; t < 3; t++) tiles_have_shape &= bytes[16 + 2 * t] == 64 && !bytes[17 + 2 * t] && bytes[48 + t] == 16;
}
inline void _tile_release() { tiles_have_shape = false; }
inline void _tile_zero(int t) { std::memset(tile_register[t], 0, 1024); }
inline void _tile_loadd(int t, const void* from, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(tile_register[t][r], static_cast<const char*>(from) + r * stride, 64);
}
inline void _tile_stored(int t, void* to, size_t stride) {
    for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(to) + r * stride, tile_register[t][r], 64);
}
template <class B>
void tile_dot(int sum, int a, int b) {
    if (!tiles_have_shape) std::abort();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t total;
            std::memcpy(&total, &tile_register[sum][m][4 * n], 4);
            for (int k = 0; k < 64; k++)
                total += int8_t(tile_register[a][m][k]) * B(tile_register[b][k / 4][4 * n + k % 4]);
            std::memcpy(&tile_register[sum][m][4 * n], &total, 4);
        }
}
#define _tile_dpbssd tile_dot<int8_t>
#define _tile_dpbsud tile_dot<uint8_t>
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

// What SIMDe lacks, by halves.
typedef simde__mmask64 __mmask64;
inline __m512 join(__m256 low, __m256 high) {
    float f[16];
    _mm256_storeu_ps(f, low), _mm256_storeu_ps(f + 8, high);
    return _mm512_loadu_ps(f);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    int32_t n[16];
    float f[16];
    _mm512_storeu_si512(n, a);
    for (int i = 0; i < 16; i++) f[i] = float(n[i]);
    return _mm512_loadu_ps(f);
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned count) {
    int32_t n[16];
    _mm512_storeu_si512(n, a);
    for (int32_t& i : n) i >>= count;
    return _mm512_loadu_si512(n);
}

// This processor has everything now.
#define syscall(...) 0
#define __builtin_cpu_supports(name) true
#define __AVX2__ 1
#define __FMA__ 1
#define __F16C__ 1
#define __AVXVNNI__ 1
#define __AVX512BW__ 1
#define __AVX512VNNI__ 1
#define __AMX_INT8__ 1
#endif

#include "../pot_kernel/decode.cpp"

thread_local std::mt19937 random_bits(1);  // each thread has its own, as it has `worst`

float normal() { return std::normal_distribution<float>()(random_bits); }

template <class T>
struct Buffer {  // on the heap; bytes begin at an odd address, because kernels must not rely on alignment
    std::unique_ptr<char[]> raw;
    int64_t size;  // elements
    T* data;       // (size), inside raw

    explicit Buffer(int64_t n) : raw(new char[n * sizeof(T) + (sizeof(T) == 1)]), size(n) {
        data = reinterpret_cast<T*>(raw.get() + (sizeof(T) == 1));
        for (int64_t i = 0; i < n; i++) data[i] = T();
    }
};

double from_half(uint16_t half) {  // of a finite number
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
}

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A random packed weight. Codes are made first and then laid out, so that values need none of the kernel's decoders.
struct Matrix {
    Buffer<uint8_t> codes;      // tiles
    Buffer<uint16_t> half;      // (rows / 16, groups, 16) or (groups): float16 units, or empty
    Buffer<float> single;       // the same in float32, or empty
    Buffer<float> sums;         // (rows)
    std::vector<double> value;  // (rows, columns)
    PotWeight w{};

    Matrix(int64_t rows, int64_t columns, int64_t groups, bool per_row, bool is_half, int bits, int activations)
        : codes(up(rows, 16) * up(columns, bits == 3 ? 32 : bits == 4 ? 8 : 4) * bits / 8),
          half(is_half ? groups * (per_row ? up(rows, 16) : 1) : 0),
          single(is_half ? 0 : groups * (per_row ? up(rows, 16) : 1)), sums(rows), value(rows * columns) {
        static const int8_t grids[4][8] = {{0, 1, 2, 4, 8, 16, 32, 64}, {0, 1, 2, 3, 4, 6, 8, 12},
                                           {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 48, 64}};
        const int8_t* grid = grids[random_bits() % 4];
        const int magnitudes = bits == 3 ? 4 : 8;
        for (int i = 0; i < magnitudes && bits < 8; i++) w.table[i] = grid[i], w.table[magnitudes + i] = -grid[i];
        for (int64_t i = 0; i < half.size; i++) half.data[i] = uint16_t(0x2400 + random_bits() % 0x800);
        for (int64_t i = 0; i < single.size; i++) single.data[i] = 0.01f + random_bits() % 100 * 1e-3f;
        w.codes = codes.data;
        w.unit = is_half ? static_cast<const void*>(half.data) : single.data;
        w.rows = rows, w.columns = columns, w.groups = groups, w.bits = bits, w.activations = activations;
        w.unit_per_row = per_row, w.unit_is_half = is_half;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) {
                const int code = bits == 8 ? int(random_bits() % 256) : int(random_bits() % (1 << bits));
                put(r, c, code);
                const int64_t group = c / (columns / groups), i = per_row ? (r / 16 * groups + group) * 16 + r % 16 : group;
                const int level = bits == 8 ? int8_t(code) : w.table[code];
                value[r * columns + c] = level * (is_half ? from_half(half.data[i]) : double(single.data[i]));
            }
        if (activations == 1) pot_row_sums(&w, sums.data), w.row_sums = sums.data;
    }

    void put(int64_t r, int64_t c, int code) {  // as the head of pot.cpp says
        const int width = w.bits == 3 ? 32 : w.bits == 4 ? 8 : 4;
        const int64_t tiles = up(w.columns, width) / width, tile = r / 16 * tiles + c / width, byte = 4 * (r % 16) + c % 4;
        const int quad = c % width / 4;
        uint8_t* p = codes.data + tile * 2 * width * w.bits + byte;
        if (w.bits == 8)
            *p = uint8_t(code);
        else if (w.bits == 4)
            *p |= code << (quad ? 4 : 0);
        else
            p[quad < 4 ? 0 : 64] |= (code & 3) << 2 * (quad % 4), p[128] |= code >> 2 << quad;
    }
};

thread_local double worst = 0;

// Exits if the error is larger than tolerance * bound, where bound is the size of the values that were summed.
void check(double actual, double expected, double bound, double tolerance, const char* name) {
    const double error = std::fabs(actual - expected) / (bound + 1e-30);
    worst = std::max(worst, error);
    if (!(error <= tolerance)) {
        std::printf("%s with %s: %g instead of %g\n", name, instruction_set().name, actual, expected);
        std::exit(1);
    }
}

// Rounds x (columns) as the weight asks: out (columns). Returns how much the integers of 8 bits per row are shifted.
double rounded(const PotWeight& w, const float* x, double* out) {
    for (int64_t c = 0; c < w.columns; c++) out[c] = x[c];
    if (w.activations == 1) {
        Buffer<uint8_t> q(w.columns);
        float scale = 0, low = 0, high = 0;
        int32_t zero = 0;
        for (int64_t c = 0; c < w.columns; c++) low = std::min(low, x[c]), high = std::max(high, x[c]);
        if (pot_quantize(x, w.columns, q.data, &scale, &zero)) std::exit(1);
        check(scale, (double(high) - low) / 255, scale, 1e-6, "scale of a row");
        for (int64_t c = 0; c < w.columns; c++) {
            out[c] = double(scale) * (q.data[c] - zero);
            check(out[c], x[c], 0.51 * scale, 1, "rounded to 8 bits"), worst = 0;
        }
        return scale * (128.0 - zero);
    }
    for (int64_t c = 0; c < w.columns && w.activations == 2; c += 64) {
        const int64_t end = std::min(w.columns, c + 64);
        float largest = 0;
        for (int64_t k = c; k < end; k++) largest = std::max(largest, std::fabs(x[k]));
        const float scale = largest / 127;
        for (int64_t k = c; k < end; k++) out[k] = double(scale) * std::nearbyint(x[k] / scale);  // half to even
    }
    return 0;
}

// Products of the first n rows of x, for each n of counts, the largest last.
void products(const Matrix& m, std::vector<int64_t> counts) {
    const PotWeight& w = m.w;
    const int64_t stride = w.columns + random_bits() % 2 * 3, most = counts.back();
    Buffer<float> all((most - 1) * stride + w.columns), bias(w.rows);
    for (int64_t i = 0; i < all.size; i++) all.data[i] = normal() + 0.3f;
    for (int64_t i = 0; i < bias.size; i++) bias.data[i] = normal();
    std::vector<double> expected(most * w.rows), bound(most * w.rows), x(w.columns);
    for (int64_t i = 0; i < most; i++) {
        const double shift = rounded(w, all.data + i * stride, x.data());
        for (int64_t r = 0; r < w.rows; r++) {
            double sum = 0, size = 0;
            const double* value = &m.value[r * w.columns];
            for (int64_t c = 0; c < w.columns; c++)
                sum += value[c] * x[c], size += std::fabs(value[c]) * (std::fabs(x[c]) + std::fabs(shift));
            expected[i * w.rows + r] = sum, bound[i * w.rows + r] = size;
        }
    }
    for (int64_t n : counts) {
        const int64_t y_stride = w.rows + random_bits() % 2 * 5;
        const bool biased = random_bits() % 2;
        Buffer<float> rows((n - 1) * stride + w.columns), y((n - 1) * y_stride + w.rows);
        std::copy_n(all.data, rows.size, rows.data);
        pot_linear(&w, biased ? bias.data : nullptr, rows.data, n, stride, y.data, y_stride, 2);
        for (int64_t i = 0; i < n; i++)
            for (int64_t r = 0; r < w.rows; r++) {
                const double b = biased ? bias.data[r] : 0;
                check(y.data[i * y_stride + r], expected[i * w.rows + r] + b, bound[i * w.rows + r] + std::fabs(b), 2e-6,
                      "product");
            }
    }
}

void unpacking(const Matrix& m) {
    const PotWeight& w = m.w;
    const int64_t count = (w.rows + 1) / 2;
    Buffer<float> unpacked(w.rows * w.columns), selected(count * w.columns);
    Buffer<int64_t> index(count);
    pot_unpack(&w, nullptr, 0, w.rows, unpacked.data, 2);
    for (int64_t i = 0; i < unpacked.size; i++)
        check(unpacked.data[i], m.value[i], std::fabs(m.value[i]), 1e-7, "unpacked");
    for (int64_t i = 0; i < count; i++) index.data[i] = i ? random_bits() % w.rows : w.rows - 1;
    if (pot_unpack(&w, index.data, 0, count, selected.data, 2)) std::exit(1);
    for (int64_t i = 0; i < selected.size; i++)
        check(selected.data[i], unpacked.data[index.data[i / w.columns] * w.columns + i % w.columns], 0, 0, "rows");
    for (int64_t bad : {w.rows, int64_t(-1)}) {
        index.data[count - 1] = bad;
        if (!pot_unpack(&w, index.data, 0, count, selected.data, 2)) std::exit(1);
    }
}

// A row of zeros gives the bias. NaN and infinities spoil their own row and no other.
void special_rows() {
    for (int bits : {3, 4, 8})
        for (int activations = 0; activations < 3; activations++)
            for (int64_t n : {1, 2, 5, 20})
                for (float special : {0.0f, NAN, INFINITY, -INFINITY}) {
                    const Matrix m(19, 128, 2, true, true, bits, activations);
                    Buffer<float> x(n * 128), bias(19), y(n * 19);
                    for (int64_t i = 0; i < x.size; i++) x.data[i] = normal();
                    for (int64_t r = 0; r < 19; r++) bias.data[r] = normal();
                    float* row = x.data + n / 2 * 128;
                    if (special == 0) std::fill_n(row, 128, 0.0f);
                    row[random_bits() % 128] = special;
                    pot_linear(&m.w, bias.data, x.data, n, 128, y.data, 19, 2);
                    for (int64_t i = 0; i < y.size; i++) {
                        const bool finite = std::isfinite(y.data[i]), spoiled = i / 19 == n / 2 && special != 0;
                        check(finite, !spoiled, 0, 0, "finite");
                        if (spoiled && activations) check(std::isnan(y.data[i]), 1, 0, 0, "NaN");
                        if (i / 19 == n / 2 && special == 0) check(y.data[i], bias.data[i % 19], 0, 0, "zeros");
                    }
                }
}

// float16: every value, the middle between it and the next, which rounds to the even one, and the middle's neighbours.
void halves() {
    for (int sign : {1, -1})
        for (int half = 0; half < 0x7c00; half++) {
            const float value = float(from_half(uint16_t(half)));
            const float next = half == 0x7bff ? 0x1p16f : float(from_half(uint16_t(half + 1)));
            const float middle = (value + next) / 2;
            const int bit = sign < 0 ? 0x8000 : 0;
            check(half_to_float(uint16_t(half | bit)), sign * value, 0, 0, "half_to_float");
            check(to_half(sign * value), half | bit, 0, 0, "to_half");
            check(to_half(sign * middle), (half + half % 2) | bit, 0, 0, "to_half of a middle");
            check(to_half(sign * std::nextafter(middle, 0.0f)), half | bit, 0, 0, "to_half below a middle");
            check(to_half(sign * std::nextafter(middle, 1e9f)), (half + 1) | bit, 0, 0, "to_half above a middle");
        }
    check(to_half(INFINITY), 0x7c00, 0, 0, "to_half");
    check(to_half(-INFINITY), 0xfc00, 0, 0, "to_half");
    check((to_half(NAN) & 0x7fff) > 0x7c00, 1, 0, 0, "to_half of NaN");
}

void exponentials() {
    for (float x = -87; x < 88; x += 0.01f) {
        const double expected = std::exp(double(x));
        check(exponential(x), expected, expected, 5e-7, "exponential");
    }
    for (float size : {1.0f, 100.0f, 1e6f})  // std::exp of such scores overflows
        for (int64_t n = 1; n < 40; n++) {
            Buffer<float> score(n);
            Buffer<double> p(n);
            double largest = -INFINITY, sum = 0;
            for (int64_t t = 0; t < n; t++) {
                score.data[t] = size * normal();
                largest = std::max<double>(largest, score.data[t]);
            }
            for (int64_t t = 0; t < n; t++) sum += p.data[t] = std::exp((score.data[t] - largest) * 0.3);
            softmax(score.data, n, 0.3f);
            for (int64_t t = 0; t < n; t++) check(score.data[t], p.data[t] / sum, 1, 5e-6, "softmax");
        }
}

void all_products() {
    struct Shape {
        int64_t columns, group_size;  // 0: one group
    };
    const Shape shapes[] = {{1, 0},    {7, 0},    {64, 0},   {77, 0},   {268, 4},  {276, 12}, {300, 20}, {288, 32},
                            {320, 64}, {258, 6}, {400, 80}, {288, 96}, {384, 128}, {200, 0}, {520, 0},  {518, 7}};
    const int64_t all_rows[] = {1, 6, 16, 37};
    int64_t turn = 0;
    for (int bits : {3, 4, 8})
        for (int activations = 0; activations < 3; activations++) {
            for (const Shape& s : shapes) {
                const int64_t rows = all_rows[turn % 4];
                const bool per_row = s.group_size || turn % 3;
                const Matrix m(rows, s.columns, s.group_size ? s.columns / s.group_size : 1, per_row, random_bits() % 2,
                               bits, activations);
                products(m, turn % 5 ? std::vector<int64_t>{1, 2, 3, 4, 5, 17, 33} : std::vector<int64_t>{1, 3, 13, 70});
                if (activations == 0) unpacking(m);
                turn++;
            }
            products(Matrix(18, 320, 5, true, true, bits, activations), {530});
        }
}

struct Sizes {
    int64_t vocabulary, layers, heads, kv_heads, size, E, inner;
    bool llama, bias, qkv_bias;
    int64_t context = 17;
};

// Reads tokens, several or one at a time, with random weights, and compares the logits with those of the same model in double. Attention
// reads the keys and values that the decoder rounds to float16, which are compared with the model's own.
void decode_step(const Sizes& z, int bits, int activations) {
    const int64_t context = z.context, queries = z.heads / z.kv_heads, n_qkv = (z.heads + 2 * z.kv_heads) * z.size;
    // The reference does not round activations to 8 bits, which changes a lot where features are few.
    const double tolerance = activations ? z.E < 16 ? 2 : 0.1 : 1e-5, epsilon = 0.01;
    using Vector = std::vector<double>;
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<std::unique_ptr<Buffer<float>>> floats;
    std::vector<std::unique_ptr<Buffer<uint16_t>>> halves;
    std::map<const void*, const double*> values_of;
    auto matrix = [&](int64_t rows, int64_t columns) {
        const int64_t groups = columns % 32 || random_bits() % 2 ? 1 : columns / 32;
        matrices.push_back(std::make_unique<Matrix>(rows, columns, groups, true, true, bits, activations));
        Matrix& m = *matrices.back();
        double square = 0;  // weights of about 1 / sqrt(columns) keep scores and logits of ordinary size
        for (double v : m.value) square += v * v / m.value.size();
        const int steps = std::min(8, int(std::lround(std::log2(std::sqrt(square * columns) + 1e-3))));
        for (int64_t i = 0; i < m.half.size; i++) m.half.data[i] -= uint16_t(steps * 1024);
        for (double& v : m.value) v = std::ldexp(v, -steps);
        if (activations == 1) pot_row_sums(&m.w, m.sums.data);
        values_of[m.w.codes] = m.value.data();
        return m.w;
    };
    auto buffer = [&](int64_t n, float deviation, float mean) {
        floats.push_back(std::make_unique<Buffer<float>>(n));
        for (int64_t i = 0; i < n; i++) floats.back()->data[i] = mean + deviation * normal();
        return floats.back()->data;
    };
    auto cache = [&] {
        halves.push_back(std::make_unique<Buffer<uint16_t>>(z.kv_heads * context * z.size));
        return halves.back()->data;
    };
    auto norm = [&] { return GptNorm{buffer(z.E, 0.1f, 1), z.bias ? buffer(z.E, 0.1f, 0) : nullptr}; };
    auto linear = [&](int64_t rows, int64_t columns, bool biased) {
        return GptLinear{matrix(rows, columns), biased ? buffer(rows, 0.1f, 0) : nullptr};
    };
    std::vector<GptLayer> layers;
    for (int64_t l = 0; l < z.layers; l++)
        layers.push_back({norm(), norm(), linear(n_qkv, z.E, z.qkv_bias), linear(z.E, z.heads * z.size, z.bias),
                          linear(z.llama ? 2 * z.inner : z.inner, z.E, z.bias), linear(z.E, z.inner, z.bias), cache(),
                          cache()});
    Buffer<float> frequencies(z.size / 2);
    for (int64_t i = 0; i < frequencies.size; i++) frequencies.data[i] = std::pow(100.0f, -2.0f * i / z.size);
    const PotWeight wte = matrix(z.vocabulary, z.E), wpe = z.llama ? wte : matrix(context, z.E);
    Gpt gpt{z.layers, z.heads, z.kv_heads, z.size, z.E, z.inner, context, z.llama, z.llama, float(epsilon),
            z.llama ? frequencies.data : nullptr, wte, wpe, norm(), linear(z.vocabulary, z.E, false), layers.data()};

    auto normalize = [&](const GptNorm& n, const Vector& x) {
        double mean = 0, square = 0;
        for (double f : x) mean += z.llama ? 0 : f / z.E;
        for (double f : x) square += (f - mean) * (f - mean) / z.E;
        Vector y(z.E);
        for (int64_t i = 0; i < z.E; i++)
            y[i] = (x[i] - mean) / std::sqrt(square + epsilon) * n.weight[i] + (n.bias ? n.bias[i] : 0);
        return y;
    };
    auto product = [&](const GptLinear& l, const Vector& x) {
        Vector y(l.weight.rows);
        const double* w = values_of[l.weight.codes];
        for (int64_t r = 0; r < l.weight.rows; r++) {
            y[r] = l.bias ? l.bias[r] : 0;
            for (int64_t c = 0; c < l.weight.columns; c++) y[r] += *w++ * x[c];
        }
        return y;
    };
    Buffer<int64_t> tokens(context);
    Buffer<float> logits(z.vocabulary);
    for (int64_t t = 0; t < context; t++) tokens.data[t] = random_bits() % z.vocabulary;
    for (int64_t t = 0; t < context; t++) {
        if (t < 2 || t == context - 3 || t == context - 2)
            gpt_decode(&gpt, tokens.data + t, t == 1 ? context - 4 : t == context - 2 ? 2 : 1, t, logits.data,
                       t == context - 2 ? 7 : 1 + t % 3);
        const int64_t token = tokens.data[t];
        Vector x(z.E);
        for (int64_t i = 0; i < z.E; i++)
            x[i] = values_of[wte.codes][token * z.E + i] + (z.llama ? 0 : values_of[wpe.codes][t * z.E + i]);
        for (const GptLayer& layer : layers) {
            Vector qkv = product(layer.c_attn, normalize(layer.ln_1, x));
            for (int64_t h = 0; z.llama && h < z.heads + z.kv_heads; h++)  // pairs are complex numbers that turn
                for (int64_t i = 0; i < z.size / 2; i++) {
                    double &a = qkv[h * z.size + i], &b = qkv[h * z.size + i + z.size / 2];
                    const double angle = t * double(frequencies.data[i]), re = a, im = b;
                    a = re * std::cos(angle) - im * std::sin(angle), b = re * std::sin(angle) + im * std::cos(angle);
                }
            for (int64_t i = 0; i < 2 * z.kv_heads * z.size; i++) {
                const int64_t kv = i / z.size % z.kv_heads, place = (kv * context + t) * z.size + i % z.size;
                const double expected = qkv[z.heads * z.size + i], size = activations ? 1 : std::fabs(expected);
                const double kept = from_half((i < z.kv_heads * z.size ? layer.keys : layer.values)[place]);
                check(kept, expected, size + 0.01, activations ? 0.5 : 5.1e-4, "key or value");
            }
            worst = 0;
            Vector attended(z.heads * z.size);
            for (int64_t h = 0; h < z.heads; h++) {
                Vector p(t + 1);
                double sum = 0;
                const int64_t start = h / queries * context * z.size;
                for (int64_t u = 0; u <= t; u++) {
                    for (int64_t i = 0; i < z.size; i++)
                        p[u] += qkv[h * z.size + i] * from_half(layer.keys[start + u * z.size + i]);
                    sum += p[u] = std::exp(p[u] / std::sqrt(double(z.size)));
                }
                for (int64_t u = 0; u <= t; u++)
                    for (int64_t i = 0; i < z.size; i++)
                        attended[h * z.size + i] += p[u] / sum * from_half(layer.values[start + u * z.size + i]);
            }
            const Vector a = product(layer.attn_c_proj, attended);
            for (int64_t i = 0; i < z.E; i++) x[i] += a[i];
            Vector hidden = product(layer.c_fc, normalize(layer.ln_2, x));
            for (int64_t i = 0; i < z.inner; i++) {
                double& f = hidden[i];
                f = z.llama ? f / (1 + std::exp(-f)) * hidden[z.inner + i]
                            : f * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (f + 0.044715 * f * f * f)));
            }
            const Vector b = product(layer.mlp_c_proj, hidden);
            for (int64_t i = 0; i < z.E; i++) x[i] += b[i];
        }
        const Vector expected = product(gpt.lm_head, normalize(gpt.ln_f, x));
        double largest = 0;
        for (double f : expected) largest = std::max(largest, std::fabs(f));
        const bool last = t == 0 || t == context - 4 || t == context - 3 || t == context - 1;  // token of a call
        for (int64_t i = 0; i < z.vocabulary && last; i++)
            check(logits.data[i], expected[i], largest, tolerance, "decode");
    }
}

// Threads that call products and decode steps at once with different numbers of threads, some of them after pauses, in
// which the team falls asleep, and a forked process, which has no team. turns: products of each thread.
void threads(int turns) {
    const Sizes models[] = {{50, 2, 3, 3, 64, 192, 200, false, false, false},
                            {77, 2, 4, 2, 20, 96, 136, true, false, false},
                            {3, 1, 1, 1, 5, 5, 1, false, true, true}};
    decode_step(models[0], 4, 2);  // alone, so that it has the team
    decode_step(models[1], 4, 0);
    const int64_t n = 9, columns = 320, rows = 100;
    const Matrix m(rows, columns, 5, true, true, 4, 2);
    Buffer<float> x(n * columns), expected(n * rows);
    for (int64_t i = 0; i < x.size; i++) x.data[i] = normal();
    pot_linear(&m.w, nullptr, x.data, n, columns, expected.data, rows, 1);
    auto call = [&](int parts) {
        Buffer<float> y(n * rows);
        pot_linear(&m.w, nullptr, x.data, n, columns, y.data, rows, parts);
        if (std::memcmp(y.data, expected.data, n * rows * 4)) std::abort();
    };
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; c++) {
        callers.emplace_back([&call, turns, c] {
            for (int turn = 0; turn < turns; turn++) call(1 + (c + turn) % 4), usleep(turn % 8 ? 0 : 3000);
        });
        callers.emplace_back([&models, turns, c] {
            for (int turn = 0; turn < turns / 40; turn++) decode_step(models[c], 3 + turn % 2, 2 * (turn % 2));
        });
    }
    for (std::thread& caller : callers) caller.join();
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a hang ends, too
        call(3);
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(status, 0, 0, 0, "forked process");
}

// Decode steps of random models: sizes that no vector divides, heads that share keys, a single feature or token.
void shapes(int count) {
    const auto draw = [](int64_t most) { return 1 + int64_t(random_bits()) % most; };
    for (int i = 0; i < count; i++) {
        Sizes z{};
        z.vocabulary = draw(70), z.layers = draw(2), z.kv_heads = draw(3), z.heads = z.kv_heads * draw(3);
        z.llama = random_bits() % 2, z.bias = random_bits() % 2, z.qkv_bias = random_bits() % 2;
        z.size = z.llama ? 2 * draw(20) : draw(40), z.E = draw(90), z.inner = draw(130), z.context = 5 + draw(40);
        const int bits = int(random_bits() % 3), activations = int(random_bits() % 3);
        decode_step(z, bits == 2 ? 8 : 3 + bits, activations);
    }
}

int main(int count, char** arguments) {
    const std::string names = count > 1 ? arguments[1] : pot_instruction_sets();
    const int amount = count > 2 ? std::atoi(arguments[2]) : 40;
    if (names == "threads" || names == "shapes") {
        names == "threads" ? threads(amount) : shapes(amount);
        std::printf("%s pass\n", names.c_str());
        return 0;
    }
    halves();
    exponentials();
    for (size_t start = 0, end; start < names.size(); start = end + 1) {
        end = std::min(names.find(' ', start), names.size());
        const std::string name = names.substr(start, end - start);
        if (pot_choose(name.c_str())) return 1;
        all_products();
        special_rows();
        for (int activations = 2; activations >= 0; activations--)
            for (int bits : {3, 4, 8}) {
                decode_step({101, 2, 4, 4, 32, 128, 512, false, true, true}, bits, activations);
                decode_step({50, 1, 3, 3, 64, 192, 200, false, false, false}, bits, activations);
                decode_step({77, 2, 4, 2, 20, 96, 136, true, false, false}, bits, activations);
                decode_step({33, 2, 6, 2, 16, 64, 160, true, false, true}, bits, activations);
                decode_step({3, 1, 1, 1, 5, 5, 1, false, true, true}, bits, activations);
                decode_step({2, 1, 7, 1, 2, 9, 17, true, false, true}, bits, activations);
            }
        decode_step({40, 1, 2, 1, 24, 32, 40, true, false, false, 150}, 4, 0);  // more tokens than a part of a prompt
        shapes(5);
        std::printf("%s passes\n", name.c_str());
        std::fflush(stdout);
    }
}
