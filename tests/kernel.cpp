// Tests the kernels against sums in double, on every instruction set of this machine: products with float32 and 8-bit
// activations, AMX tiles, unpacking, and GPT-2's decode step. Buffers have exactly the size that the kernels need, so
// that -fsanitize=address,undefined finds every access outside of them. tests/test_kernel.py builds and runs this file,
// also for 64-bit ARM:
//
//     aarch64-linux-gnu-g++ -O2 -std=c++17 -static -pthread tests/kernel.cpp -o kernel && qemu-aarch64 ./kernel

#include "../pot_kernel/decode.cpp"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>

std::mt19937 random_bits(1);

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

// A random packed weight, with a decoder of its own for comparison.
struct Matrix {
    Buffer<uint8_t> codes;  // (rows, (columns + 1) / 2)
    Buffer<uint16_t> half;  // (rows or 1, groups): float16 scales, or empty
    Buffer<float> single;   // (rows or 1, groups): float32 scales, or empty
    Buffer<float> sums;     // (rows)
    PotWeight w{};

    Matrix(int64_t rows, int64_t columns, int64_t groups, bool per_row, bool is_half, bool in8, int grid)
        : codes(rows * ((columns + 1) / 2)), half(is_half ? groups * (per_row ? rows : 1) : 0),
          single(is_half ? 0 : groups * (per_row ? rows : 1)), sums(rows) {
        static const float levels[3][8] = {
            {0, 1, 2, 4, 8, 16, 32, 64}, {0, 1, 2, 3, 4, 6, 8, 12}, {0, 1, 2, 3, 4, 5, 6, 7}};
        for (int64_t i = 0; i < codes.size; i++) codes.data[i] = uint8_t(random_bits());
        if (columns % 2)  // the last four bits of a row are padding and must be zero
            for (int64_t r = 0; r < rows; r++) codes.data[(r + 1) * ((columns + 1) / 2) - 1] &= 15;
        for (int64_t i = 0; i < half.size; i++) half.data[i] = uint16_t(0x2c00 + random_bits() % 0x800);
        for (int64_t i = 0; i < single.size; i++) single.data[i] = 0.01f + random_bits() % 100 * 1e-3f;
        w.codes = codes.data;
        w.scale = is_half ? static_cast<const void*>(half.data) : single.data;
        w.rows = rows, w.columns = columns, w.groups = groups;
        w.scale_per_row = per_row, w.scale_is_half = is_half;
        w.top = levels[grid][7];
        for (int i = 0; i < 8; i++) w.table[i] = levels[grid][i], w.table[8 + i] = -levels[grid][i];
        if (in8) pot_row_sums(&w, sums.data), w.row_sums = sums.data;
    }

    double scale(int64_t r, int64_t c) const {
        const int64_t i = (w.scale_per_row ? r * w.groups : 0) + c / (w.columns / w.groups);
        if (!w.scale_is_half) return single.data[i];
        return std::ldexp(1024 + (half.data[i] & 1023), (half.data[i] >> 10) - 25);
    }

    int code(int64_t r, int64_t c) const {
        const uint8_t* row = codes.data + r * ((w.columns + 1) / 2);
        if (c >= w.columns / 128 * 128) return row[c / 2] >> 4 * (c & 1) & 15;
        const int64_t column = c % 128, word = column % 16, nibble = column / 16;
        return row[c / 128 * 64 + 4 * word + nibble / 2] >> 4 * (nibble & 1) & 15;
    }

    double value(int64_t r, int64_t c) const { return w.table[code(r, c)] * scale(r, c) / w.top; }
};

double worst = 0;

// Exits if the error is larger than tolerance * bound, where bound is the size of the values that were summed.
void check(double actual, double expected, double bound, double tolerance, const char* name) {
    const double error = std::fabs(actual - expected) / (bound + 1e-30);
    worst = std::max(worst, error);
    if (!(error <= tolerance)) {
        std::printf("%s: %g instead of %g\n", name, actual, expected);
        std::exit(1);
    }
}

float bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&f, &bits, 4);
    return f;
}

void products(const Matrix& m, int64_t n, bool tiles) {
    const PotWeight& w = m.w;
    const int64_t stride = w.columns + (n % 2 ? 0 : 3), count = (w.rows + 1) / 2;
    const bool biased = n % 3 > 0;
    Buffer<float> x((n - 1) * stride + w.columns), y(n * w.rows), bias(biased ? w.rows : 0);
    Buffer<float> unpacked(w.rows * w.columns), selected(count * w.columns);
    Buffer<int64_t> index(count);
    for (int64_t i = 0; i < x.size; i++) x.data[i] = normal() + 0.3f;
    for (int64_t i = 0; i < bias.size; i++) bias.data[i] = normal();
    const float* b = biased ? bias.data : nullptr;
    if (tiles && pot_linear_tiles(&w, b, x.data, n, stride, y.data, w.rows, 2) == -1) return;
    if (!tiles) pot_linear(&w, b, x.data, n, stride, y.data, w.rows, 2);
    pot_unpack(&w, nullptr, 0, w.rows, unpacked.data, 2);
    for (int64_t i = 0; i < count; i++) index.data[i] = i ? random_bits() % w.rows : w.rows - 1;
    if (pot_unpack(&w, index.data, 0, count, selected.data, 2)) std::exit(1);
    for (int64_t i = 0; i < selected.size; i++)
        check(selected.data[i], unpacked.data[index.data[i / w.columns] * w.columns + i % w.columns], 0, 0, "rows");
    index.data[count - 1] = w.rows;
    if (!pot_unpack(&w, index.data, 0, count, selected.data, 2)) std::exit(1);
    std::vector<double> value(unpacked.size);
    for (int64_t i = 0; i < unpacked.size; i++) {
        value[i] = m.value(i / w.columns, i % w.columns);
        check(unpacked.data[i], value[i], std::fabs(value[i]), 1e-6, "unpacked");
    }
    for (int64_t i = 0; i < n; i++) {
        std::vector<double> rounded(w.columns);
        Buffer<uint8_t> q(w.columns);
        float scale = 0;
        int32_t zero = 0;
        if (w.row_sums && pot_quantize(x.data + i * stride, w.columns, q.data, &scale, &zero)) std::exit(1);
        for (int64_t c = 0; c < w.columns; c++) {
            const float f = x.data[i * stride + c];
            rounded[c] = w.row_sums ? double(scale) * (q.data[c] - zero) : tiles ? bf16(f) : f;
            if (w.row_sums && !(std::fabs(rounded[c] - f) <= 0.51 * scale)) return check(rounded[c], f, 0, 0, "8 bits");
        }
        for (int64_t r = 0; r < w.rows; r++) {
            double sum = b ? b[r] : 0, bound = std::fabs(sum);
            for (int64_t c = 0; c < w.columns; c++) {
                const double part = value[r * w.columns + c] * rounded[c];
                sum += part, bound += std::fabs(part);
            }
            check(y.data[i * w.rows + r], sum, bound, 3e-6, tiles ? "tiles" : "product");
        }
    }
}

// Decodes a few tokens with random weights, and compares the logits with those of the same model in double.
void decode_step(int64_t vocabulary, int64_t layers, int64_t heads, int64_t E, bool biased, int grid, bool in8) {
    const int64_t size = E / heads, context = 9;
    using Vector = std::vector<double>;
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<std::unique_ptr<Buffer<float>>> floats;
    std::map<const void*, Vector> values_of;
    auto matrix = [&](int64_t rows, int64_t columns) {
        matrices.push_back(std::make_unique<Matrix>(rows, columns, grid ? 1 : columns / 64, true, true, in8, grid));
        const Matrix& m = *matrices.back();
        for (int64_t i = 0; i < rows * columns; i++) values_of[m.w.codes].push_back(m.value(i / columns, i % columns));
        return m.w;
    };
    auto buffer = [&](int64_t n, float deviation, float mean) {
        floats.push_back(std::make_unique<Buffer<float>>(n));
        for (int64_t i = 0; i < n; i++) floats.back()->data[i] = mean + deviation * normal();
        return floats.back()->data;
    };
    auto bias = [&](int64_t n) { return biased ? buffer(n, 0.1f, 0) : nullptr; };
    auto norm = [&] { return GptNorm{buffer(E, 0.1f, 1), bias(E)}; };
    auto linear = [&](int64_t rows, int64_t columns) { return GptLinear{matrix(rows, columns), bias(rows)}; };
    std::vector<GptLayer> gpt_layers;
    for (int64_t l = 0; l < layers; l++)
        gpt_layers.push_back({norm(), norm(), linear(3 * E, E), linear(E, E), linear(4 * E, E), linear(E, 4 * E),
                              buffer(E * context, 0, 0), buffer(E * context, 0, 0)});
    Gpt gpt{layers, heads, E, context, matrix(vocabulary, E), matrix(context, E), norm(), linear(vocabulary, E),
            gpt_layers.data()};

    auto normalize = [&](const GptNorm& n, const Vector& x) {
        double mean = 0, square = 0;
        for (double f : x) mean += f / E;
        for (double f : x) square += (f - mean) * (f - mean) / E;
        Vector y(E);
        for (int64_t i = 0; i < E; i++)
            y[i] = (x[i] - mean) / std::sqrt(square + 1e-5) * n.weight[i] + (biased ? n.bias[i] : 0);
        return y;
    };
    auto product = [&](const GptLinear& l, const Vector& x) {
        Vector y(l.weight.rows);
        const double* w = values_of[l.weight.codes].data();
        for (int64_t r = 0; r < l.weight.rows; r++) {
            y[r] = l.bias ? l.bias[r] : 0;
            for (int64_t c = 0; c < l.weight.columns; c++) y[r] += *w++ * x[c];
        }
        return y;
    };
    std::vector<std::vector<Vector>> keys(layers), values(layers);
    for (int64_t t = 0; t < context; t++) {
        const int64_t token = random_bits() % vocabulary;
        Buffer<float> logits(vocabulary);
        gpt_decode(&gpt, token, t, logits.data, 1 + t % 3);
        Vector x(E);
        for (int64_t i = 0; i < E; i++)
            x[i] = values_of[gpt.wte.codes][token * E + i] + values_of[gpt.wpe.codes][t * E + i];
        for (int64_t l = 0; l < layers; l++) {
            const Vector qkv = product(gpt_layers[l].c_attn, normalize(gpt_layers[l].ln_1, x));
            keys[l].emplace_back(qkv.begin() + E, qkv.begin() + 2 * E);
            values[l].emplace_back(qkv.begin() + 2 * E, qkv.end());
            Vector attended(E);
            for (int64_t h = 0; h < heads; h++) {
                Vector p(t + 1);
                double sum = 0;
                for (int64_t u = 0; u <= t; u++) {
                    for (int64_t i = h * size; i < (h + 1) * size; i++) p[u] += qkv[i] * keys[l][u][i];
                    sum += p[u] = std::exp(p[u] / std::sqrt(double(size)));
                }
                for (int64_t u = 0; u <= t; u++)
                    for (int64_t i = h * size; i < (h + 1) * size; i++) attended[i] += p[u] / sum * values[l][u][i];
            }
            const Vector a = product(gpt_layers[l].attn_c_proj, attended);
            for (int64_t i = 0; i < E; i++) x[i] += a[i];
            Vector hidden = product(gpt_layers[l].c_fc, normalize(gpt_layers[l].ln_2, x));
            for (double& f : hidden) f *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (f + 0.044715 * f * f * f)));
            const Vector b = product(gpt_layers[l].mlp_c_proj, hidden);
            for (int64_t i = 0; i < E; i++) x[i] += b[i];
        }
        const Vector expected = product(gpt.lm_head, normalize(gpt.ln_f, x));
        double largest = 0;
        for (double f : expected) largest = std::max(largest, std::fabs(f));
        for (int64_t i = 0; i < vocabulary; i++)  // the reference does not round activations to 8 bits
            check(logits.data[i], expected[i], largest, in8 ? 0.1 : 1e-5, "decode");
    }
}

void all_scales(int64_t rows, int64_t columns, std::vector<int64_t> few_rows, std::vector<int64_t> many_rows) {
    for (int64_t size : {0, 32, 64, 128}) {
        if (size && columns % size) continue;
        const int choice = int(random_bits() % 6);
        for (bool in8 : {false, true}) {
            const Matrix m(rows, columns, size ? columns / size : 1, size || choice % 2, choice < 3, in8, choice % 3);
            for (int64_t n : few_rows) products(m, n, false);
            for (int64_t n : many_rows) products(m, n, true);
        }
    }
}

int main() {
    const std::string names = pot_instruction_sets();
    for (size_t start = 0, end; start < names.size(); start = end + 1) {
        end = std::min(names.find(' ', start), names.size());
        const std::string name = names.substr(start, end - start);
        if (pot_choose(name.c_str())) return 1;
        worst = 0;
        for (int64_t columns : {1, 7, 64, 77, 128, 192, 200, 384})
            for (int64_t rows : {1, 6, 33}) all_scales(rows, columns, {1, 2, 3, 4, 5}, {17, 33});
        const int64_t shapes[][2] = {{5, 128}, {64, 768}, {7, 200}, {3, 1000}, {2, 1}, {9, 77}, {100, 1600}};
        for (auto& [rows, columns] : shapes) all_scales(rows, columns, {1, 8}, {70});  // as in tests/test_kernel.py
        std::printf("%s: largest error of a product %.1e of what is summed", name.c_str(), worst);
        for (int kind = 2; kind >= 0; kind--) {  // 2: 8-bit activations, whose larger errors are not reported
            if (kind == 1) worst = 0;
            const int grid = kind % 2;  // 0: single powers in groups; 1: two terms per channel
            decode_step(101, 3, 4, 128, true, grid, kind == 2);
            decode_step(300, 2, 3, 192, false, grid, kind == 2);
            decode_step(50, 1, 1, 64, true, grid, kind == 2);
        }
        std::printf(", of a decode step %.1e of the largest logit\n", worst);
    }
}
