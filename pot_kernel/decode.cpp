// The decode step of a GPT with packed weights: one token in, logits out, in one call. It serves GPT-2 and models of
// Llama's kind (RMSNorm, rotary positions, grouped key-value heads, SwiGLU).
//
// Running GPT-2 (124M) layer by layer starts threads for 49 products per token and calls PyTorch's small operations
// between them. At this size both cost as much as the products. Here one team of threads runs through all layers. Each
// thread computes its share of rows or heads, and a barrier follows where a thread needs results of the others. Norms
// and the rounding of activations are cheap, so every thread does them for itself. Keys and values are float16, because
// at a full context they take more memory than the weights.

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

float sum_of(const float (&part)[16]) {
    float sum = 0;
    for (float f : part) sum += f;
    return sum;
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

// Attention of a head over n tokens of the cache and a new one: out (size) = softmax(q keys / sqrt(size)) values.
// keys, values (n, size); key, value (size): the new token's; score (n + 1) is scratch memory.
void attend(const uint16_t* keys, const uint16_t* values, const uint16_t* key, const uint16_t* value, int64_t size,
            const float* q, int64_t n, float* score, float* out) {
    const float scale = 1 / std::sqrt(float(size));
    float maximum = -INFINITY, sum[16] = {};
    for (int64_t t = 0; t <= n; t++) {
        score[t] = dot(q, t < n ? keys + t * size : key, size) * scale;
        maximum = std::max(maximum, score[t]);
    }
    for (int64_t t = 0; t <= n; t++) score[t] = exponential(score[t] - maximum);
    for (int64_t t = 0; t <= n; t++) sum[t % 16] += score[t];
    const float inverse = 1 / sum_of(sum);
    std::fill_n(out, size, 0.0f);
    for (int64_t t = 0; t <= n; t++) add(score[t] * inverse, t < n ? values + t * size : value, size, out);
}

// The state of one decode step, which all threads share.
struct Step {
    const Gpt* gpt;
    int64_t token, position;
    float* logits;                // (vocabulary)
    std::vector<float> x;         // (n_embd): residual stream
    std::vector<float> turn;      // (2, head_size / 2): cosines and sines of the position's angles, if rotary
    std::vector<float> qkv;       // ((n_head + 2 n_kv_head) head_size)
    std::vector<float> attended;  // (n_head head_size): attention's output
    std::vector<float> hidden;    // (n_inner, or 2 n_inner if gated): inside the MLP
    std::vector<float> added;     // (n_embd): output of a projection, added to x

    Step(const Gpt& g, int64_t token, int64_t position, float* logits)
        : gpt(&g), token(token), position(position), logits(logits), x(g.n_embd), turn(g.frequencies ? g.head_size : 0),
          qkv((g.n_head + 2 * g.n_kv_head) * g.head_size), attended(g.n_head * g.head_size),
          hidden(g.n_inner * (g.gated ? 2 : 1)), added(g.n_embd) {}
};

// One thread's path through the model.
class Walk {
  public:
    Walk(Step& step, Barrier& barrier, int part, int parts)
        : s(step), g(*step.gpt), barrier_(barrier), part_(part), parts_(parts), normed_(g.n_embd),
          score_(step.position + 1), query_(g.head_size), key_(2 * g.head_size) {}

    void run() {
        if (part_ == 0) embed();
        barrier_.wait();
        for (int64_t l = 0; l < g.n_layer; l++) {
            const GptLayer& layer = g.layers[l];
            normalize(g, layer.ln_1, s.x.data(), normed_.data());
            product(layer.c_attn, normed_.data(), s.qkv.data());
            barrier_.wait();
            attention(layer);
            barrier_.wait();
            residual(layer.attn_c_proj, s.attended.data());
            barrier_.wait();
            normalize(g, layer.ln_2, s.x.data(), normed_.data());
            const Share share = product(layer.c_fc, normed_.data(), s.hidden.data());
            if (!g.gated) gelu(&s.hidden[share.from], share.to - share.from);
            barrier_.wait();
            if (g.gated) {
                const Share part(g.n_inner, 16, part_, parts_);
                gate(&s.hidden[g.n_inner + part.from], &s.hidden[part.from], part.to - part.from);
                barrier_.wait();
            }
            residual(layer.mlp_c_proj, &s.hidden[g.gated ? g.n_inner : 0]);
            barrier_.wait();
        }
        normalize(g, g.ln_f, s.x.data(), normed_.data());
        product(g.lm_head, normed_.data(), s.logits);
    }

  private:
    void embed() {
        decode_row(g.wte, s.token, s.x.data());
        for (int64_t i = 0, n = g.head_size / 2; g.frequencies && i < n; i++) {
            const float angle = float(s.position) * g.frequencies[i];
            s.turn[i] = std::cos(angle), s.turn[n + i] = std::sin(angle);
        }
        if (g.frequencies) return;
        decode_row(g.wpe, s.position, s.added.data());
        for (int64_t i = 0; i < g.n_embd; i++) s.x[i] += s.added[i];
    }

    // Computes this thread's rows of the product, and returns which rows they are.
    Share product(const GptLinear& linear, const float* x, float* y) {
        const PotWeight& w = linear.weight;
        Job job{&w, linear.bias, x, 1, w.columns, nullptr, y, w.rows};
        inputs_.round(&job, [](const auto& round) { round(0); });
        Share rows((w.rows + 15) / 16, 1, part_, parts_);
        instruction_set().product(job, rows.from, rows.to);
        rows.from = std::min(w.rows, 16 * rows.from), rows.to = std::min(w.rows, 16 * rows.to);
        return rows;
    }

    void residual(const GptLinear& linear, const float* x) {
        const Share share = product(linear, x, s.added.data());
        for (int64_t i = share.from; i < share.to; i++) s.x[i] += s.added[i];
    }

    void attention(const GptLayer& layer) {
        const int64_t size = g.head_size, queries = g.n_head / g.n_kv_head;  // queries that share a key
        const Share heads(g.n_head, 1, part_, parts_);
        for (int64_t h = heads.from; h < heads.to; h++) {
            const int64_t kv = h / queries, offset = kv * g.capacity * size;
            for (int part = 0; part < 2; part++) {  // the new token's key and value, for each thread that needs them
                const int64_t head = g.n_head + kv + part * g.n_kv_head;
                std::copy_n(&s.qkv[head * size], size, query_.data());
                if (part == 0 && g.frequencies) rotate(query_.data(), s.turn.data(), size);
                for (int64_t i = 0; i < size; i++) key_[part * size + i] = to_half(query_[i]);
            }
            if (h % queries == 0) {  // nobody reads this position of the cache in this step
                std::copy_n(key_.data(), size, layer.keys + offset + s.position * size);
                std::copy_n(key_.data() + size, size, layer.values + offset + s.position * size);
            }
            std::copy_n(&s.qkv[h * size], size, query_.data());
            if (g.frequencies) rotate(query_.data(), s.turn.data(), size);
            attend(layer.keys + offset, layer.values + offset, key_.data(), key_.data() + size, size, query_.data(),
                   s.position, score_.data(), &s.attended[h * size]);
        }
    }

    Step& s;
    const Gpt& g;
    Barrier& barrier_;
    const int part_, parts_;     // number of this thread, and of all threads
    std::vector<float> normed_;  // (n_embd)
    std::vector<float> score_;   // (position + 1)
    std::vector<float> query_;   // (head_size): of the current head, or its key or value
    std::vector<uint16_t> key_;  // (2, head_size): the new token's key and value of the current head, float16
    Inputs inputs_;              // of the current product
};

}  // namespace

// Computes logits (vocabulary) of the token that follows `token`. Reads keys and values of the tokens before
// `position`, and writes those of `token`. The caller checks that token and position are in range.
extern "C" void gpt_decode(const Gpt* gpt, int64_t token, int64_t position, float* logits, int threads) {
    Step step(*gpt, token, position, logits);
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
