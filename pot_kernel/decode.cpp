// GPT-2's decode step with packed weights: one token in, logits out, in one call.
//
// Running GPT-2 (124M) layer by layer starts threads for 49 products per token and calls PyTorch's small operations
// between them. At this size both cost as much as the products. Here one team of threads runs through all layers. Each
// thread computes its share of rows or heads, and a barrier follows where a thread needs results of the others. Layer
// norm and the rounding of activations are cheap, so every thread does them for itself.

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
    GptLinear c_attn;       // (3 n_embd, n_embd): queries, keys, values
    GptLinear attn_c_proj;  // (n_embd, n_embd)
    GptLinear c_fc;         // (4 n_embd, n_embd)
    GptLinear mlp_c_proj;   // (n_embd, 4 n_embd)
    float* keys;            // (n_head, capacity, n_embd / n_head): the cache
    float* values;          // (n_head, capacity, n_embd / n_head)
};

struct Gpt {
    int64_t n_layer, n_head, n_embd;
    int64_t capacity;   // tokens that keys and values have room for
    PotWeight wte;      // (vocabulary, n_embd): token embedding
    PotWeight wpe;      // (context, n_embd): position embedding
    GptNorm ln_f;
    GptLinear lm_head;  // (vocabulary, n_embd)
    GptLayer* layers;   // (n_layer)
};

}

namespace {

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

// The loops below have 16 partial sums and no branches, so that compilers vectorize them.

float dot(const float* a, const float* b, int64_t n) {
    float part[16] = {}, rest = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) part[k] += a[i + k] * b[i + k];
    for (; i < n; i++) rest += a[i] * b[i];
    return sum_of(part) + rest;
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

void layer_norm(const GptNorm& norm, const float* x, int64_t n, float* y) {
    float part[16] = {};
    for (int64_t i = 0; i < n; i++) part[i % 16] += x[i];
    const float mean = sum_of(part) / n;
    float square[16] = {};
    for (int64_t i = 0; i < n; i++) square[i % 16] += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / std::sqrt(sum_of(square) / n + 1e-5f);
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

// Attention of one head over n tokens: out (size) = softmax(q keys / sqrt(size)) values. score (n) is scratch memory.
void attend(const GptLayer& layer, int64_t head, int64_t capacity, int64_t size, const float* q, int64_t n,
            float* score, float* out) {
    const float *k = layer.keys + head * capacity * size, *v = layer.values + head * capacity * size;
    const float scale = 1 / std::sqrt(float(size));
    float maximum = -INFINITY, sum[16] = {};
    for (int64_t t = 0; t < n; t++) {
        score[t] = dot(q, k + t * size, size) * scale;
        maximum = std::max(maximum, score[t]);
    }
    for (int64_t t = 0; t < n; t++) score[t] = exponential(score[t] - maximum);
    for (int64_t t = 0; t < n; t++) sum[t % 16] += score[t];
    const float inverse = 1 / sum_of(sum);
    for (int64_t i = 0; i < size; i++) out[i] = 0;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < size; i++) out[i] += score[t] * v[t * size + i];
    for (int64_t i = 0; i < size; i++) out[i] *= inverse;
}

// The state of one decode step, which all threads share.
struct Step {
    const Gpt* gpt;
    int64_t token, position;
    float* logits;                // (vocabulary)
    std::vector<float> x;         // (n_embd): residual stream
    std::vector<float> qkv;       // (3 n_embd)
    std::vector<float> attended;  // (n_embd): attention's output
    std::vector<float> hidden;    // (4 n_embd): inside the MLP
    std::vector<float> added;     // (n_embd): output of a projection, added to x
};

// One thread's path through the model.
class Walk {
  public:
    Walk(Step& step, Barrier& barrier, int part, int parts)
        : s(step), barrier_(barrier), part_(part), parts_(parts), normed_(step.gpt->n_embd),
          score_(step.position + 1) {}

    void run() {
        const Gpt& g = *s.gpt;
        const int64_t E = g.n_embd;
        if (part_ == 0) embed();
        barrier_.wait();
        for (int64_t l = 0; l < g.n_layer; l++) {
            const GptLayer& layer = g.layers[l];
            layer_norm(layer.ln_1, s.x.data(), E, normed_.data());
            product(layer.c_attn, normed_.data(), s.qkv.data());
            barrier_.wait();
            attention(layer);
            barrier_.wait();
            residual(layer.attn_c_proj, s.attended.data());
            barrier_.wait();
            layer_norm(layer.ln_2, s.x.data(), E, normed_.data());
            const Share share = product(layer.c_fc, normed_.data(), s.hidden.data());
            gelu(&s.hidden[share.from], share.to - share.from);
            barrier_.wait();
            residual(layer.mlp_c_proj, s.hidden.data());
            barrier_.wait();
        }
        layer_norm(g.ln_f, s.x.data(), E, normed_.data());
        product(g.lm_head, normed_.data(), s.logits);
    }

  private:
    void embed() {
        const Gpt& g = *s.gpt;
        std::vector<float> unit(std::max(g.wte.groups, g.wpe.groups)), position(g.n_embd);
        decode(g.wte, s.token, unit.data(), s.x.data());
        decode(g.wpe, s.position, unit.data(), position.data());
        for (int64_t i = 0; i < g.n_embd; i++) s.x[i] += position[i];
    }

    // Computes this thread's rows of the product, and returns which rows they are.
    Share product(const GptLinear& linear, const float* x, float* y) {
        const PotWeight& w = linear.weight;
        if (w.row_sums) quantize(x, w.columns, &x8_);
        const Share rows(w.rows, 4, part_, parts_);
        rows_of_product({&w, linear.bias, x, 1, w.columns, w.row_sums ? &x8_ : nullptr, y, w.rows}, rows.from, rows.to);
        return rows;
    }

    void residual(const GptLinear& linear, const float* x) {
        const Share share = product(linear, x, s.added.data());
        for (int64_t i = share.from; i < share.to; i++) s.x[i] += s.added[i];
    }

    void attention(const GptLayer& layer) {
        const Gpt& g = *s.gpt;
        const int64_t E = g.n_embd, size = E / g.n_head;
        const Share heads(g.n_head, 1, part_, parts_);
        for (int64_t h = heads.from; h < heads.to; h++) {
            const float* q = &s.qkv[h * size];
            const int64_t offset = (h * g.capacity + s.position) * size;
            std::memcpy(layer.keys + offset, q + E, 4 * size);
            std::memcpy(layer.values + offset, q + 2 * E, 4 * size);
            attend(layer, h, g.capacity, size, q, s.position + 1, score_.data(), &s.attended[h * size]);
        }
    }

    Step& s;
    Barrier& barrier_;
    const int part_, parts_;     // number of this thread, and of all threads
    std::vector<float> normed_;  // (n_embd)
    std::vector<float> score_;   // (position + 1)
    Row8 x8_;                    // input of the current product, in 8 bits
};

}  // namespace

// Computes logits (vocabulary) of the token that follows `token`. Reads keys and values of the tokens before
// `position`, and writes those of `token`. The caller checks that token and position are in range.
extern "C" void gpt_decode(const Gpt* gpt, int64_t token, int64_t position, float* logits, int threads) {
    const int64_t E = gpt->n_embd;
    Step step{gpt, token, position, logits, {}, {}, {}, {}, {}};
    for (auto [vector, n] : {std::pair(&step.x, E), {&step.qkv, 3 * E}, {&step.attended, E}, {&step.hidden, 4 * E},
                             {&step.added, E}})
        vector->resize(n);
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
