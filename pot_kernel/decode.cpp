// A GPT with packed weights in one call: tokens in, logits of the last one out. It serves GPT-2 and models of Llama's
// kind (RMSNorm, rotary positions, grouped key-value heads, SwiGLU).
//
// Running GPT-2 (124M) layer by layer starts threads for 49 products per token and calls PyTorch's small operations
// between them. For a single token both cost as much as the products; for a prompt PyTorch's attention and GELU cost
// half as much. Here one team of threads runs through all layers. Each thread computes its share of rows or heads, and a
// barrier follows where a thread needs results of the others. For a single token, norms and the rounding of activations
// are cheap, so every thread does them for itself. Keys and values are float16, because at a full context they take
// more memory than the weights.

#define POT_SPINS 5000  // more than in pot.cpp: between two tokens little else needs the cores
#include "pot.cpp"

extern "C" {

struct GptNorm {
    const float* weight;  // (n_embd)
    const float* bias;    // (n_embd), or null
};

struct GptLinear {
    PotWeight weight;   // (out, in)
    const float* bias;  // (out), or null
};

struct GptLayer {
    GptNorm ln_1, ln_2;
    GptLinear c_attn;       // ((n_head + 2 n_kv_head) head_size, n_embd): queries, keys, values
    GptLinear attn_c_proj;  // (n_embd, n_head head_size)
    GptLinear c_fc;         // (n_inner, n_embd), or (2 n_inner, n_embd) if gated: gates, then what they let through
    GptLinear mlp_c_proj;   // (n_embd, n_inner)
    uint16_t* keys;         // (n_kv_head, capacity, head_size) float16: the cache
    uint16_t* values;       // (n_kv_head, capacity, head_size) float16
};

struct Gpt {
    int64_t n_layer, n_head, n_kv_head, head_size, n_embd, n_inner;
    int64_t capacity;          // tokens that keys and values have room for
    int32_t rms;               // 1: RMSNorm; 0: LayerNorm
    int32_t gated;             // 1: SwiGLU; 0: GELU
    float norm_eps;
    const float* frequencies;  // (head_size / 2): radians a position, for rotary positions; null: learned positions
    PotWeight wte;             // (vocabulary, n_embd): token embedding
    PotWeight wpe;             // (context, n_embd): position embedding, if learned
    GptNorm ln_f;
    GptLinear lm_head;         // (vocabulary, n_embd)
    GptLayer* layers;          // (n_layer)
};

}

namespace {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
using Best = Avx512;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
using Best = Avx2;
#elif defined(__aarch64__)
using Best = Neon;
#else
using Best = Portable;
#endif

// Lets threads go on when all of them have arrived. It spins, as the waits are short.
class Barrier {
  public:
    explicit Barrier(int parts) : parts_(parts) {}

    void wait() {
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == parts_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; spin++)
            spin < 1000 ? relax() : std::this_thread::yield();  // a thread that is awaited may need this core
    }

  private:
    const int parts_;              // threads
    std::atomic<int> arrived_{0};  // threads that wait in this phase
    std::atomic<int> phase_{0};    // changes when all have arrived
};

// Rounds to float16, half to even. Values beyond its range become infinities.
uint16_t to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65,520 and more
    if (size < 0x38800000) {                                 // below float16's normal numbers, steps are 2^-24
        const float rounded = std::fabs(f) * 0x1p24f + MAGIC;  // the low bits of MAGIC + n are n
        std::memcpy(&bits, &rounded, 4);
        return uint16_t(sign | (bits & 0xffff));
    }
    return uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

// The loops below have 16 partial sums and no branches, so that compilers vectorize them.

float sum_of(float (&part)[16]) {
    for (int half = 8; half > 0; half /= 2)
        UNROLL for (int k = 0; k < half; k++) part[k] += part[k + half];
    return part[0];
}

// exp(x) by the polynomial of Cephes' expf, with an error of about 2 ulp. Compilers vectorize loops over it, unlike
// loops over std::exp.
inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    const float magic = 0x1.8p23f, shifted = x * 1.44269504f + magic, n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = int32_t(uint32_t(bits) << 23) + 0x3f800000;  // 2^n: the shift removes the bits of magic
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// LayerNorm or RMSNorm of x (n_embd).
void normalize(const Gpt& gpt, const GptNorm& norm, const float* x, float* y) {
    const int64_t n = gpt.n_embd;
    float part[16] = {}, square[16] = {};
    for (int64_t i = 0; i < n && !gpt.rms; i++) part[i % 16] += x[i];
    const float mean = sum_of(part) / n;
    for (int64_t i = 0; i < n; i++) square[i % 16] += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / std::sqrt(sum_of(square) / n + gpt.norm_eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * norm.weight[i];
    if (norm.bias)
        for (int64_t i = 0; i < n; i++) y[i] += norm.bias[i];
}

// GELU in its tanh form. (1 + tanh(u)) / 2 is the logistic function of 2 u, which needs only exp.
void gelu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float u = 0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1 + exponential(-2 * u));
    }
}

// Multiplies x by the SiLU of gate.
void gate(float* x, const float* gate, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= gate[i] / (1 + exponential(-gate[i]));
}

// Turns pairs of features, i and i + size / 2, by angles whose cosines and sines are turn (2, size / 2).
void rotate(float* x, const float* turn, int64_t size) {
    for (int64_t i = 0; i < size / 2; i++) {
        const float a = x[i], b = x[i + size / 2], cosine = turn[i], sine = turn[i + size / 2];
        x[i] = a * cosine - b * sine;
        x[i + size / 2] = b * cosine + a * sine;
    }
}

// Sum of a (n) float32 times b (n) float16.
float dot(const float* a, const uint16_t* b, int64_t n) {
    constexpr int lanes = sizeof(Best::F) / 4;
    auto sum = Best::set(0.0f), other = sum;
    float part[16] = {}, rest = 0;
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
        sum = Best::multiply_add(Best::load(a + i), Best::load_half(b + i), sum);
        other = Best::multiply_add(Best::load(a + i + lanes), Best::load_half(b + i + lanes), other);
    }
    Best::store(part, Best::multiply_add(other, Best::set(1.0f), sum));
    for (; i < n; i++) rest += a[i] * half_to_float(b[i]);
    return sum_of(part) + rest;
}

// out (n) += factor * b (n) float16.
void add(float factor, const uint16_t* b, int64_t n, float* out) {
    constexpr int lanes = sizeof(Best::F) / 4;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        Best::store(out + i, Best::multiply_add(Best::load_half(b + i), Best::set(factor), Best::load(out + i)));
    for (; i < n; i++) out[i] += factor * half_to_float(b[i]);
}

// Turns scores (n), times scale, into probabilities.
void softmax(float* score, int64_t n, float scale) {
    float high[16], sum[16] = {};
    std::fill_n(high, 16, -INFINITY);
    for (int64_t t = 0; t < n; t++) high[t % 16] = score[t] > high[t % 16] ? score[t] : high[t % 16];
    const float maximum = *std::max_element(high, high + 16);
    for (int64_t t = 0; t < n; t++) score[t] = exponential((score[t] - maximum) * scale);
    for (int64_t t = 0; t < n; t++) sum[t % 16] += score[t];
    const float inverse = 1 / sum_of(sum);
    for (int64_t t = 0; t < n; t++) score[t] *= inverse;
}

constexpr int64_t PROMPT = 144;  // tokens that run through the layers at once, so that results stay in the level 2 cache

// The state of a forward pass over n tokens, which all threads share.
struct Step {
    const Gpt* gpt;
    const int64_t* tokens = nullptr;  // (n)
    int64_t n = 0, position = 0;      // number of tokens, and the position of the first
    float* logits = nullptr;          // (vocabulary): of the last token; null if nobody needs them
    int64_t width;                // (n_head + 2 n_kv_head) head_size
    int64_t inner;                // n_inner, or 2 n_inner if gated
    std::vector<float> x;         // (n, n_embd): residual stream
    std::vector<float> normed;    // (n, n_embd): x after a norm
    std::vector<float> turn;      // (n, 2, head_size / 2): cosines and sines of a position's angles, if rotary
    std::vector<float> qkv;       // (n, width): queries, keys, values
    std::vector<float> attended;  // (n, n_head head_size): attention's output
    std::vector<float> hidden;    // (n, inner): inside the MLP
    std::vector<float> added;     // (n, n_embd): output of a projection, added to x
    Inputs inputs;                // of the current product

    Step(const Gpt& g, int64_t n)  // makes room for n tokens
        : gpt(&g), width((g.n_head + 2 * g.n_kv_head) * g.head_size), inner(g.n_inner * (g.gated ? 2 : 1)),
          x(n * g.n_embd), normed(n * g.n_embd), turn(g.frequencies ? n * g.head_size : 0), qkv(n * width),
          attended(n * g.n_head * g.head_size), hidden(n * inner), added(n * g.n_embd) {}
};

// One thread's path through the model.
class Walk {
  public:
    Walk(Step& step, Barrier& barrier, int part, int parts)
        : s(step), g(*step.gpt), barrier_(barrier), part_(part), parts_(parts), normed_(g.n_embd) {}

    void run() {
        const Share rows(s.n, 1, part_, parts_);
        for (int64_t i = rows.from; i < rows.to; i++) embed(i);
        barrier_.wait();
        for (int64_t l = 0; l < g.n_layer; l++) {
            const GptLayer& layer = g.layers[l];
            product(layer.c_attn, &layer.ln_1, s.x.data(), g.n_embd, s.n, s.qkv.data());
            barrier_.wait();
            store(layer);
            barrier_.wait();
            s.n == 1 ? attend_token(layer) : attend_prompt(layer);
            barrier_.wait();
            residual(layer.attn_c_proj, s.attended.data(), g.n_head * g.head_size);
            barrier_.wait();
            Share part = product(layer.c_fc, &layer.ln_2, s.x.data(), g.n_embd, s.n, s.hidden.data());
            if (g.gated) {
                barrier_.wait();
                part = Share(g.n_inner, 16, part_, parts_);
            }
            for (int64_t i = 0; i < s.n; i++) {
                float* hidden = &s.hidden[i * s.inner + part.from];
                g.gated ? gate(hidden + g.n_inner, hidden, part.to - part.from) : gelu(hidden, part.to - part.from);
            }
            barrier_.wait();
            residual(layer.mlp_c_proj, &s.hidden[g.gated ? g.n_inner : 0], s.inner);
            barrier_.wait();
        }
        if (s.logits) product(g.lm_head, &g.ln_f, &s.x[(s.n - 1) * g.n_embd], g.n_embd, 1, s.logits);
    }

  private:
    void embed(int64_t i) {
        float *x = &s.x[i * g.n_embd], *position = &s.added[i * g.n_embd], *turn = s.turn.data() + i * g.head_size;
        decode_row(g.wte, s.tokens[i], x);
        for (int64_t k = 0, n = g.head_size / 2; g.frequencies && k < n; k++) {
            const float angle = float(s.position + i) * g.frequencies[k];
            turn[k] = std::cos(angle), turn[n + k] = std::sin(angle);
        }
        if (g.frequencies) return;
        decode_row(g.wpe, s.position + i, position);
        for (int64_t k = 0; k < g.n_embd; k++) x[k] += position[k];
    }

    // Computes this thread's columns of y (n, rows of the weight) for x (n, columns), after a norm unless it is null.
    // Returns which columns they are.
    Share product(const GptLinear& linear, const GptNorm* norm, const float* x, int64_t stride, int64_t n, float* y) {
        const PotWeight& w = linear.weight;
        const bool single = n == 1;  // every thread prepares a single row for itself, because a barrier takes longer
        Inputs& inputs = single ? inputs_ : s.inputs;
        float* normed = single ? normed_.data() : s.normed.data();
        Job job{&w, linear.bias, norm ? normed : x, n, norm ? w.columns : stride, nullptr, y, w.rows};
        if (single || part_ == 0) inputs.reset(job);
        if (!single) barrier_.wait();
        const Share rows(n, 1, single ? 0 : part_, single ? 1 : parts_);
        for (int64_t i = rows.from; i < rows.to; i++) {
            if (norm) normalize(g, *norm, x + i * stride, normed + i * w.columns);
            inputs.fill(job, i);
        }
        if (!single) barrier_.wait();
        inputs.give(&job);
        Share columns((w.rows + 15) / 16, 1, part_, parts_);
        instruction_set().product(job, columns.from, columns.to);
        columns.from = std::min(w.rows, 16 * columns.from), columns.to = std::min(w.rows, 16 * columns.to);
        return columns;
    }

    void residual(const GptLinear& linear, const float* x, int64_t stride) {
        const Share share = product(linear, nullptr, x, stride, s.n, s.added.data());
        for (int64_t i = 0; i < s.n; i++)
            for (int64_t k = share.from; k < share.to; k++) s.x[i * g.n_embd + k] += s.added[i * g.n_embd + k];
    }

    // Turns queries and keys by their positions, and puts keys and values into the cache.
    void store(const GptLayer& layer) {
        const int64_t size = g.head_size, heads = g.n_head + 2 * g.n_kv_head;
        const Share share(s.n * heads, 1, part_, parts_);
        for (int64_t k = share.from; k < share.to; k++) {
            const int64_t i = k / heads, kv = k % heads - g.n_head;  // kv: keys, then values; negative: queries
            float* x = &s.qkv[k * size];
            if (g.frequencies && kv < g.n_kv_head) rotate(x, &s.turn[i * size], size);
            if (kv < 0) continue;
            uint16_t* cache = kv < g.n_kv_head ? layer.keys : layer.values;
            cache += (kv % g.n_kv_head * g.capacity + s.position + i) * size;
            for (int64_t d = 0; d < size; d++) cache[d] = to_half(x[d]);
        }
    }

    // Attention of a single token, which reads the cache as it is.
    void attend_token(const GptLayer& layer) {
        const int64_t size = g.head_size, n = s.position + 1;
        const Share heads(g.n_head, 1, part_, parts_);
        score_.resize(n);
        for (int64_t h = heads.from; h < heads.to; h++) {
            const int64_t offset = h / (g.n_head / g.n_kv_head) * g.capacity * size;
            const uint16_t *keys = layer.keys + offset, *values = layer.values + offset;
            float* out = &s.attended[h * size];
            for (int64_t t = 0; t < n; t++) score_[t] = dot(&s.qkv[h * size], keys + t * size, size);
            softmax(score_.data(), n, 1 / std::sqrt(float(size)));
            std::fill_n(out, size, 0.0f);
            for (int64_t t = 0; t < n; t++) add(score_[t], values + t * size, size, out);
        }
    }

    // Attention of several tokens, as products of tiles: scores = queries * keys^T, out = probabilities * values.
    void attend_prompt(const GptLayer& layer) {
        constexpr int64_t R = Best::FLOAT_ROWS;
        const int64_t size = g.head_size, tiles = (s.n + R - 1) / R, stride = (s.position + s.n + 15) / 16 * 16;
        const int64_t features = (size + 15) / 16 * 16;
        const Share share(g.n_head * tiles, 1, part_, parts_);
        keys_.resize(stride * size), values_.resize(stride * features), score_.resize(R * stride);
        for (int64_t k = share.from, kv = -1; k < share.to; k++) {
            const int64_t h = k / tiles, first = k % tiles * R, rows = std::min(R, s.n - first);
            const int64_t n = s.position + first + rows;  // keys that the last of these tokens sees
            if (kv != h / (g.n_head / g.n_kv_head)) {
                kv = h / (g.n_head / g.n_kv_head);
                decode_cache(layer, kv, stride);
            }
            alignas(64) float sums[R * 16];
            auto multiply = [&](const float* x, int64_t x_stride, const float* panel, int64_t columns) {
                std::fill_n(sums, 16 * rows, 0.0f);
                in_tiles<R>(rows, [&](int64_t i, auto count) {
                    float_tile<Best, count.value>(x + i * x_stride, x_stride, panel, columns, sums + 16 * i);
                });
            };
            for (int64_t t = 0; t < n; t += 16) {
                multiply(&s.qkv[first * s.width + h * size], s.width, &keys_[t * size], size);
                for (int64_t i = 0; i < rows; i++) std::copy_n(sums + 16 * i, 16, &score_[i * stride + t]);
            }
            for (int64_t i = 0; i < rows; i++) {
                const int64_t seen = n - rows + i + 1;
                softmax(&score_[i * stride], seen, 1 / std::sqrt(float(size)));
                std::fill_n(score_.data() + i * stride + seen, n - seen, 0.0f);
            }
            for (int64_t d = 0; d < size; d += 16) {
                multiply(score_.data(), stride, &values_[d * stride], n);
                for (int64_t i = 0; i < rows; i++)
                    std::copy_n(sums + 16 * i, std::min<int64_t>(16, size - d),
                                &s.attended[((first + i) * g.n_head + h) * size + d]);
            }
        }
    }

    // Decodes a head's keys to panels of 16 tokens, (head_size, 16), and its values to panels of 16 features,
    // (stride, 16).
    void decode_cache(const GptLayer& layer, int64_t kv, int64_t stride) {
        const int64_t size = g.head_size, n = s.position + s.n;
        for (int64_t t = 0; t < stride; t++)
            for (int64_t d = 0; d < size; d++) {
                const int64_t from = (kv * g.capacity + t) * size + d;
                keys_[t / 16 * 16 * size + d * 16 + t % 16] = t < n ? half_to_float(layer.keys[from]) : 0;
                values_[d / 16 * 16 * stride + t * 16 + d % 16] = t < n ? half_to_float(layer.values[from]) : 0;
            }
    }

    Step& s;
    const Gpt& g;
    Barrier& barrier_;
    const int part_, parts_;                    // number of this thread, and of all threads
    std::vector<float> normed_;                 // (n_embd): x of a single token after a norm
    std::vector<float> score_, keys_, values_;  // scratch memory of attention
    Inputs inputs_;                             // of the current product, if it has a single row
};

}  // namespace

// Computes logits (vocabulary) of the token that follows tokens (n). Reads keys and values of the tokens before
// `position`, and writes those of `tokens`. The caller checks that tokens and positions are in range.
extern "C" void gpt_decode(const Gpt* gpt, const int64_t* tokens, int64_t n, int64_t position, float* logits,
                           int threads) {
    Step step(*gpt, std::min(PROMPT, n));
    for (int64_t from = 0; from < n; from += PROMPT) {
        step.tokens = tokens + from, step.n = std::min(PROMPT, n - from), step.position = position + from;
        step.logits = from + step.n == n ? logits : nullptr;
        std::unique_ptr<Barrier> barrier;
        std::atomic<Barrier*> ready{nullptr};
        team().run(threads, [&](int part, int parts) {
            if (part == 0) {  // the number of threads is known only here
                barrier.reset(new Barrier(parts));
                ready.store(barrier.get(), std::memory_order_release);
            }
            Barrier* b;
            while (!(b = ready.load(std::memory_order_acquire))) relax();
            Walk(step, *b, part, parts).run();
        });
    }
}
