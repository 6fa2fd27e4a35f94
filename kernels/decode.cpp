// GPT-2's decode step with packed weights: one token in, logits out, in one call and with one team of threads through all
// layers. The layer-by-layer way hands over to the threads 49 times a token, and pays for PyTorch's small operations in
// between; at this size both cost as much as the products. All threads do the same steps, each its share of the rows or
// heads, and wait for each other where one needs what all have computed. What is cheap, layer norm and the rounding of
// activations, every thread does for itself.

#define POT_SPINS 5000  // there is little between two tokens that wants the processor
#include "pot.cpp"

extern "C" {

struct GptNorm {
    const float *weight, *bias;  // n_embd; bias may be null
};

struct GptLinear {
    PotWeight weight;
    const float* bias;  // or null
};

struct GptLayer {
    GptNorm ln_1, ln_2;
    GptLinear c_attn, attn_c_proj, c_fc, mlp_c_proj;
    float *keys, *values;  // n_head x capacity x n_embd / n_head
};

struct Gpt {
    int64_t n_layer, n_head, n_embd, capacity;
    PotWeight wte, wpe;
    GptNorm ln_f;
    GptLinear lm_head;
    GptLayer* layers;
};

}

namespace {

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
            spin < 1000 ? relax() : std::this_thread::yield();  // it may be waiting for this processor
    }

  private:
    const int parts_;
    std::atomic<int> arrived_{0}, phase_{0};
};

// Loops below have no branches and sixteen sums, so that compilers make vectors of them.

float dot(const float* a, const float* b, int64_t n) {
    float part[16] = {}, rest = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) part[k] += a[i + k] * b[i + k];
    for (; i < n; i++) rest += a[i] * b[i];
    return sum_of(part) + rest;
}

// exp with the polynomial of Cephes' expf, to some 2 ulp.
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
    bits = int32_t(uint32_t(bits) << 23) + 0x3f800000;  // the magic number's own bits are shifted out
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

// GELU by tanh, as x times the logistic function of twice tanh's argument.
void gelu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float u = 0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1 + exponential(-2 * u));
    }
}

// Head `head` of a layer: out = softmax(q keys / sqrt(size)) values, over n tokens. score: room for n.
void attend(const GptLayer& layer, int64_t head, int64_t capacity, int64_t size, const float* q, int64_t n, float* score,
            float* out) {
    const float *k = layer.keys + head * capacity * size, *v = layer.values + head * capacity * size;
    const float scale = 1 / std::sqrt(float(size));
    float highest = -INFINITY, sum[16] = {};
    for (int64_t t = 0; t < n; t++) {
        score[t] = dot(q, k + t * size, size) * scale;
        highest = std::max(highest, score[t]);
    }
    for (int64_t t = 0; t < n; t++) score[t] = exponential(score[t] - highest);
    for (int64_t t = 0; t < n; t++) sum[t % 16] += score[t];
    const float over = 1 / sum_of(sum);
    for (int64_t i = 0; i < size; i++) out[i] = 0;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < size; i++) out[i] += score[t] * v[t * size + i];
    for (int64_t i = 0; i < size; i++) out[i] *= over;
}

struct Step {
    const Gpt* gpt;
    int64_t token, position;
    float* logits;
    std::vector<float> x, qkv, attended, hidden, added;  // shared by the threads
};

// One thread's way through the model.
class Walk {
  public:
    Walk(Step& step, Barrier& barrier, int part, int parts)
        : s(step), barrier_(barrier), part_(part), parts_(parts), normed_(step.gpt->n_embd), score_(step.position + 1) {}

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
            const Share mine = product(layer.c_fc, normed_.data(), s.hidden.data());
            gelu(&s.hidden[mine.from], mine.to - mine.from);
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

    // This thread's rows of the product, which it returns.
    Share product(const GptLinear& linear, const float* x, float* y) {
        const PotWeight& w = linear.weight;
        if (w.row_sums) quantize(x, w.columns, &x8_);
        const Share rows(w.rows, 4, part_, parts_);
        rows_of_product({&w, linear.bias, x, 1, w.columns, w.row_sums ? &x8_ : nullptr, y, w.rows}, rows.from, rows.to);
        return rows;
    }

    void residual(const GptLinear& linear, const float* x) {
        const Share mine = product(linear, x, s.added.data());
        for (int64_t i = mine.from; i < mine.to; i++) s.x[i] += s.added[i];
    }

    void attention(const GptLayer& layer) {
        const Gpt& g = *s.gpt;
        const int64_t E = g.n_embd, size = E / g.n_head;
        const Share heads(g.n_head, 1, part_, parts_);
        for (int64_t h = heads.from; h < heads.to; h++) {
            const float* q = &s.qkv[h * size];
            const int64_t at = (h * g.capacity + s.position) * size;
            std::memcpy(layer.keys + at, q + E, 4 * size);
            std::memcpy(layer.values + at, q + 2 * E, 4 * size);
            attend(layer, h, g.capacity, size, q, s.position + 1, score_.data(), &s.attended[h * size]);
        }
    }

    Step& s;
    Barrier& barrier_;
    const int part_, parts_;
    std::vector<float> normed_, score_;
    Row8 x8_;
};

}  // namespace

// logits (rows of lm_head) of the token after `token`, which stands at `position` and sees the keys and values of those
// before it; adds its own. The caller has seen to it that token and position are there.
extern "C" void gpt_decode(const Gpt* gpt, int64_t token, int64_t position, float* logits, int threads) {
    const int64_t E = gpt->n_embd;
    Step step{gpt, token, position, logits, {}, {}, {}, {}, {}};
    for (auto [part, n] : {std::pair(&step.x, E), {&step.qkv, 3 * E}, {&step.attended, E}, {&step.hidden, 4 * E}, {&step.added, E}})
        part->resize(n);
    std::unique_ptr<Barrier> barrier;
    std::atomic<Barrier*> ready{nullptr};
    team().run(threads, [&](int part, int parts) {
        if (part == 0) {  // how many parts there are is known only now
            barrier.reset(new Barrier(parts));
            ready.store(barrier.get(), std::memory_order_release);
        }
        Barrier* b;
        while (!(b = ready.load(std::memory_order_acquire))) relax();
        Walk(step, *b, part, parts).run();
    });
}
