// Text from a packed model without Python: reads a run's folder and writes how the model continues a prompt.
//
//     g++ -O3 -march=native -std=c++17 -pthread -o run pot_kernel/run.cpp -ldl
//     ./run --ckpt=out-smollm2-pot4 --prompt="The sky is"
//
// It needs the C++ standard library and POSIX, nothing else. decode.cpp and pot.cpp compute. This file reads
// model.safetensors (mapped, not copied), tokenizer.json (byte pairs as GPT-2 and SmolLM2 have them), and the tokens
// that end a text from tokenizer_config.json and generation_config.json, which may be missing. Files may be damaged or
// hostile: sizes and offsets are checked before their use, and a bad file ends the program with one line and status 2.
//
// -DPOT_SHIFT_ONLY: products by shifts and additions alone (shift.h), as hardware without a multiplier computes them.

#include "decode.cpp"
#include "shift.h"
#include "unicode.h"
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string_view>
#include <sys/mman.h>
#include <sys/stat.h>

namespace {
using std::string, std::string_view, std::to_string;
[[noreturn]] void fail(const string& message) { throw std::runtime_error(message); }

// Calls use(text of the file), and adds the path to an error that it raises. The file stays mapped until the program
// ends. An optional file may be missing.
template <class Use>
void read_file(const string& path, bool optional, const Use& use) {
    const int file = open(path.c_str(), O_RDONLY | O_NONBLOCK);  // never waits at a pipe
    if (file < 0 && optional && errno == ENOENT) return;
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) fail(path + ": " + std::strerror(errno));
    const size_t size = S_ISREG(status.st_mode) ? size_t(status.st_size) : 0;
    const void* data = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : "";
    close(file);
    if (data == MAP_FAILED) fail(path + ": " + std::strerror(errno));
    try {
        use(string_view(static_cast<const char*>(data), size));
    } catch (const std::runtime_error& e) {
        fail(path + ": " + e.what());
    }
}

// --- UTF-8 ---

void append_utf8(string& out, uint32_t code) {
    if (code < 0x80) return void(out += char(code));
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
    out += char((0xff << (7 - more) & 0xff) | code >> 6 * more);
    for (int i = more - 1; i >= 0; i--) out += char(0x80 | (code >> 6 * i & 0x3f));
}

// Takes the first code point off a text. Bytes that are no UTF-8 become U+FFFD as with Python's errors="replace": one
// for each longest beginning of a code point.
uint32_t take_code(string_view* text) {
    const auto byte = [&] { return text->empty() ? 0 : uint8_t(text->front()); };
    const uint8_t first = byte();
    text->remove_prefix(1);
    if (first < 0x80) return first;
    const int more = first < 0xc2 || first > 0xf4 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    uint8_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;   // bounds of the second byte: no longer form
    uint8_t high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;  // than needed, no surrogate, below 0x110000
    uint32_t code = first & (0x3f >> more);
    for (int i = 0; i < more; i++, low = 0x80, high = 0xbf) {
        if (byte() < low || byte() > high) return 0xfffd;
        code = code << 6 | (byte() & 0x3f);
        text->remove_prefix(1);
    }
    return more ? code : 0xfffd;
}

// --- JSON, read where it lies: a tree of objects would take many times the memory of a hostile file. ---

struct Json {  // a value within a JSON text, whose syntax is checked where it is used
    string_view text;  // from the first to the last byte of the value; empty: there is no such value

    // Takes the first value, and white space around it, off a text.
    static Json take(string_view* text) {
        skip(text, 0);
        const string_view t = *text;
        size_t n = 0, depth = 0;  // bytes of the value; brackets that are open
        bool quoted = false;
        do {
            if (n >= t.size()) fail("damaged JSON");
            const char c = t[n++];
            if (quoted && c == '\\') n++;
            else if (c == '"') quoted = !quoted;
            else if (!quoted) depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        } while (quoted || depth > 0 || (n < t.size() && string_view(",:]} \t\n\r").find(t[n]) == t.npos));
        text->remove_prefix(n);
        skip(text, 0);
        return {t.substr(0, n)};
    }

    static Json parse(string_view document) { return take(&document); }
    bool is_null() const { return text.empty() || text == "null"; }
    size_t count() const { return each([](Json, Json) {}); }
    bool equals(string_view value) const {  // a text without escapes
        return text.size() == value.size() + 2 && text[0] == '"' && text.substr(1, value.size()) == value;
    }

    // Calls visit(key, value) for each part of an object or array; an array has no keys. Returns the number of parts.
    template <class Visit>
    size_t each(const Visit& visit) const {
        if (text.empty() || (text[0] != '{' && text[0] != '[')) return 0;
        string_view rest = text.substr(1, text.size() - 2);  // without brackets
        size_t n = 0;
        for (skip(&rest, 0); !rest.empty(); n++) {
            if (n) skip(&rest, ',');
            const Json key = text[0] == '{' ? take(&rest) : Json();
            if (text[0] == '{') skip(&rest, ':');
            visit(key, take(&rest));
        }
        return n;
    }

    // The value of a key of an object; empty if there is none.
    Json operator[](string_view name) const {
        Json out;
        each([&](Json key, Json value) { out = key.equals(name) ? value : out; });
        return out;
    }

    // The text of a string, without quotes and escapes. The names here and below are for the error.
    string as_string(const string& name) const {
        if (text.empty() || text[0] != '"') fail(name + " is missing or no text");
        string out;
        out.reserve(text.size());
        for (size_t i = 1; i + 1 < text.size(); i++) {
            const bool escape = text[i] == '\\';
            const size_t known = escape ? string_view("bfnrtu").find(text[++i]) : string_view::npos;
            if (known == 5) {
                const auto code = std::strtoul(string(text.substr(i + 1, 4)).c_str(), nullptr, 16) & 0xffff;
                if (code >> 11 == 0x1b) fail(name + " has a letter of two escapes, which are not known here");
                append_utf8(out, uint32_t(code)), i += 4;
            } else {
                out += known == string_view::npos ? text[i] : "\b\f\n\r\t"[known];
            }
        }
        return out;
    }

    int64_t as_integer(const string& name, int64_t least, int64_t most) const {
        const bool digits = !text.empty() && text.size() < 19 && text.find_first_not_of("0123456789") == text.npos;
        const int64_t value = digits ? std::strtoll(string(text).c_str(), nullptr, 10) : -1;
        if (value < least || value > most)
            fail(name + " is missing or no whole number from " + to_string(least) + " to " + to_string(most));
        return value;
    }

    double as_positive(const string& name) const {
        const double value = text.size() < 50 ? std::strtod(string(text).c_str(), nullptr) : 0;
        if (!(value > 0 && value < INFINITY)) fail(name + " is missing or no number above 0");
        return value;
    }

    static void skip(string_view* text, char expected) {  // unless it is 0, and white space behind it
        if (expected && (text->empty() || text->front() != expected)) fail("damaged JSON");
        text->remove_prefix(expected != 0);
        text->remove_prefix(std::min(text->size(), text->find_first_not_of(" \t\n\r")));
    }
};

// --- Words: a tokenizer cuts text into words first, as GPT-2 does:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// SmolLM2's cuts off single digits before that: a digit is a word, and a text ends before it.

// Bytes of the first word of a text that is valid UTF-8 and not empty. digits: single digits are cut off.
size_t word_length(string_view text, bool digits) {
    for (string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.substr(0, ending.size()) == ending) return ending.size();
    const auto take_kind = [&](string_view* rest) { return kind_of(take_code(rest), digits); };
    string_view rest = text, last = text;  // behind the word; from its last code point on
    Kind kind = take_kind(&rest), next = kind;
    if (text[0] == ' ' && !rest.empty()) {  // a space belongs to the word behind it
        string_view behind = rest;
        next = take_kind(&behind);
        if (next != SPACE && next != DIGIT) kind = next, rest = behind;
    }
    next = kind;
    for (string_view behind = rest; next == kind && kind != DIGIT && !rest.empty();)
        if ((next = take_kind(&behind)) == kind) last = rest, rest = behind;
    // White space leaves its last code point to the word behind it.
    const bool leaves = kind == SPACE && next != SPACE && next != DIGIT && last.size() < text.size();
    return text.size() - (leaves ? last : rest).size();
}

// --- Tokenizer: byte pair encoding, as a tokenizer.json describes it.

class Tokenizer {
  public:
    std::vector<int64_t> stops;  // tokens that end a text

    explicit Tokenizer(const string& folder) {
        read_file(folder + "/tokenizer.json", false, [&](string_view text) { read(Json::parse(text)); });
        stops.push_back(find(find("<|endoftext|>") < 0 ? "<|end_of_text|>" : "<|endoftext|>"));
        read_file(folder + "/tokenizer_config.json", true, [&](string_view text) {
            const Json token = Json::parse(text)["eos_token"], content = token["content"];
            if (!token.is_null()) stops.push_back(find((content.is_null() ? token : content).as_string("eos_token")));
        });
        read_file(folder + "/generation_config.json", true, [&](string_view text) {
            const Json ends = Json::parse(text)["eos_token_id"];
            const auto add = [&](Json, Json id) { stops.push_back(id.as_integer("eos_token_id", 0, INT32_MAX)); };
            if (ends.count() > 100) fail("it has more than 100 tokens that end a text");
            if (!ends.is_null() && !ends.each(add)) add({}, ends);
        });
    }

    int64_t size() const { return int64_t(places_.size()); }
    string_view token(int64_t id) const { return {&bytes_[places_[id][0]], places_[id][1]}; }  // bytes

    // Tokens of a text. Bytes that are no UTF-8 count as U+FFFD.
    std::vector<int64_t> encode(string_view raw) const {
        string valid;
        while (!raw.empty()) append_utf8(valid, take_code(&raw));
        std::vector<int64_t> ids;
        for (string_view text = valid; !text.empty();) {
            size_t at = text.size(), length = 0;  // of the leftmost added token, and of several there the longest
            int64_t next = 0;
            for (const int64_t id : added_) {
                const size_t i = text.find(token(id)), n = token(id).size();
                if (i < at || (i == at && n > length)) at = i, length = n, next = id;
            }
            for (size_t i = 0, n; i < at; i += n) {
                n = word_length(text.substr(i, at - i), digits_);
                append_word(text.substr(i, n), &ids);
            }
            if (length) ids.push_back(next);
            text.remove_prefix(at + length);
        }
        return ids;
    }

  private:
    // The token with these bytes, or -1.
    int64_t find(string_view text) const {
        const auto at = std::partition_point(sorted_.begin(), sorted_.end(), [&](auto id) { return token(id) < text; });
        return at != sorted_.end() && token(*at) == text ? int64_t(*at) : -1;
    }

    void read(Json file) {
        const Json model = file["model"], vocabulary = model["vocab"], merges = model["merges"];
        const Json added = file["added_tokens"], steps = file["pre_tokenizer"]["pretokenizers"];
        Json digits, cut = file["pre_tokenizer"];  // the last two steps of it
        steps.each([&](Json, Json step) { digits = cut, cut = step; });
        digits_ = digits["type"].equals("Digits") && digits["individual_digits"].text == "true";
        bool known = model["type"].equals("BPE") && cut["type"].equals("ByteLevel") && steps.count() <= 1u + digits_ &&
                     cut["add_prefix_space"].text != "true" && cut["use_regex"].text != "false" &&
                     file["normalizer"].is_null() && file["truncation"].is_null() && file.text.size() < UINT32_MAX &&
                     file["post_processor"]["single"].count() <= 1;  // the text, nothing around it
        for (const char* key : {"dropout", "unk_token", "byte_fallback", "ignore_merges"})
            known = known && (model[key].is_null() || model[key].text == "false");
        if (!known) fail("it is no tokenizer of GPT-2's or SmolLM2's kind");
        // Memory for a hostile file stays below twice its size: a token takes 8 bytes of the file or more, except the
        // tokens of the lowest ids; a merge takes 6.
        size_t most = (vocabulary.text.size() + added.text.size()) / 8 + 100, letters = 0;
        const auto count = [&](Json token, Json) { letters += std::max(token.text.size(), size_t(2)) - 2; };
        most = std::min(most, vocabulary.each(count) + added.each([&](Json, Json t) { count(t["content"], t); }));
        bytes_.reserve(letters), places_.reserve(most), sorted_.reserve(most);
        merges_.reserve(std::min(merges.count(), merges.text.size() / 6));
        const auto add_token = [&](const string& text, Json number) {
            const size_t id = size_t(number.as_integer("an id", 0, int64_t(most) - 1));
            if (id >= places_.size()) places_.resize(id + 1);
            if (token(id) == text) return int64_t(id);
            if (places_[id][1]) fail("the id " + to_string(id) + " is there twice");
            places_[id] = {uint32_t(bytes_.size()), uint32_t(text.size())};
            bytes_ += text;
            return int64_t(id);
        };
        vocabulary.each([&](Json token, Json id) { add_token(to_bytes(token.as_string("a token")), id); });
        added.each([&](Json, Json token) {
            added_.push_back(add_token(token["content"].as_string("an added token"), token["id"]));
            for (const char* setting : {"single_word", "lstrip", "rstrip", "normalized"})
                known = known && token[setting].text != "true";
            if (!known || !places_[added_.back()][1]) fail("it has an added token of a kind that is not known here");
        });
        for (uint32_t id = 0; id < places_.size(); id++) sorted_.push_back(id);
        const auto is_before = [&](auto a, auto b) { return token(a) != token(b) ? token(a) < token(b) : a < b; };
        std::sort(sorted_.begin(), sorted_.end(), is_before);
        for (int byte = 0; byte < 256; byte++) byte_ids_[byte] = find(string(1, char(byte)));
        merges.each([&](Json, Json merge) { read_merge(merge); });
        std::sort(merges_.begin(), merges_.end());
    }

    // Bytes of a token as the file spells it: a printable byte is its own letter, the others are the letters from 256
    // on. A token with any other letter stays as it is.
    static string to_bytes(const string& spelled) {
        if (spelled.size() > 4096) fail("a token is longer than 4,096 bytes");
        const auto is_printable = [](uint32_t b) { return (b > 32 && b < 127) || (b > 160 && b != 173); };
        string out;
        for (string_view rest = spelled; !rest.empty();) {
            const uint32_t code = take_code(&rest), other = code - 256;
            if (code < 256 ? !is_printable(code) : other >= 68) return spelled;
            out += char(code < 256 ? code : other < 33 ? other : other < 67 ? other + 94 : 173);
        }
        return out;
    }

    void read_merge(Json merge) {  // "left right" or ["left", "right"]
        string parts[2];
        size_t n = 0;
        if (!merge.each([&](Json, Json part) { parts[n++ % 2] = part.as_string("a part of a merge"); })) {
            const string both = merge.as_string("a merge");
            parts[0] = both.substr(0, both.find(' ')), parts[1] = both.substr(both.find(' ') + 1);
        }
        const string a = to_bytes(parts[0]), b = to_bytes(parts[1]);
        const int64_t left = find(a), right = find(b);
        if (a.empty() || b.empty() || left < 0 || right < 0 || find(a + b) < 0)
            fail("a merge is not of two tokens that make a third");
        merges_.push_back({uint32_t(left), uint32_t(right), uint32_t(merges_.size())});
    }

    uint32_t rank_of(int64_t left, int64_t right) const {  // of a pair; UINT32_MAX if it is not merged
        const std::array<uint32_t, 3> pair{uint32_t(left), uint32_t(right), 0};
        const auto at = std::lower_bound(merges_.begin(), merges_.end(), pair);
        return at != merges_.end() && (*at)[0] == pair[0] && (*at)[1] == pair[1] ? (*at)[2] : UINT32_MAX;
    }

    // Byte pair encoding: merges the pair of the lowest rank until no pair is left.
    void append_word(string_view word, std::vector<int64_t>* ids) const {
        std::vector<int64_t> parts;  // tokens
        for (const char c : word)
            if (byte_ids_[uint8_t(c)] >= 0) parts.push_back(byte_ids_[uint8_t(c)]);
        std::vector<uint32_t> ranks;  // of each part and the next; all are kept, because a word may be long
        for (size_t i = 0; i + 1 < parts.size(); i++) ranks.push_back(rank_of(parts[i], parts[i + 1]));
        for (;;) {
            const auto best = std::min_element(ranks.begin(), ranks.end());
            if (best == ranks.end() || *best == UINT32_MAX) break;
            const size_t at = size_t(best - ranks.begin());
            parts[at] = find(string(token(parts[at])) + string(token(parts[at + 1])));
            parts.erase(parts.begin() + int64_t(at) + 1);
            ranks.erase(best);
            for (size_t i = at - (at > 0); i <= at && i < ranks.size(); i++) ranks[i] = rank_of(parts[i], parts[i + 1]);
        }
        ids->insert(ids->end(), parts.begin(), parts.end());
    }

    string bytes_;                  // of all tokens
    std::vector<std::array<uint32_t, 2>> places_;  // (vocabulary, 2): start and size of each token in bytes_
    std::vector<uint32_t> sorted_;  // (vocabulary): tokens in the order of their bytes
    std::vector<std::array<uint32_t, 3>> merges_;  // (merges, 3): left token, right token, rank; sorted
    int64_t byte_ids_[256];         // (256): token of each byte; -1: there is none, and the byte is left out
    std::vector<int64_t> added_;    // (added tokens): they are cut out of a text before all else
    bool digits_;                   // single digits are cut off first
};

#if defined(POT_SHIFT_ONLY)
// --- Products by shifts: vectors as pot.cpp has them for each instruction set. ---

struct Shifts : Portable {
    static I dot(I sum, I w, I x) {
        static const auto shifts = [] {  // (256): by level
            std::vector<PotShift> table(256);
            for (int level = -128; level < 128; level++) pot_shift_of(level, &table[uint8_t(level)]);
            return table;
        }();
        int32_t sums[4];           // (lanes)
        int8_t levels[16], q[16];  // (lanes, 4)
        store(sums, sum), store(levels, w), store(q, x);
        for (int i = 0; i < 4; i++) sums[i] = pot_shift_dot(sums[i], levels + 4 * i, q + 4 * i, 4, shifts.data());
        return load(sums);
    }
};

const InstructionSet shifts{"shifts", true, product<Shifts>, Shifts::UNSIGNED};
#endif

// --- Model: the content of model.safetensors as decode.cpp takes it.

class Model {
  public:
    Gpt gpt{};
    int64_t context = 0;  // most tokens that it sees at once

    explicit Model(const string& folder) {
        read_file(folder + "/model.safetensors", false, [&](string_view text) { read(text); });
    }

  private:
    // The file is 8 bytes with the length of its header, the header in JSON, then the tensors.
    void read(string_view text) {
        uint64_t length = 0;
        if (text.size() >= 8) std::memcpy(&length, text.data(), 8);
        if (length < 2 || length > text.size() - 8) fail("it is no safetensors file, or it is truncated");
        header_ = Json::parse(text.substr(8, length)), data_ = text.substr(8 + length);
        metadata_ = header_["__metadata__"]["nanopot"].as_string("nanopot, the metadata of a model of train.py,");
        const Json metadata = Json::parse(metadata_), kind = metadata["tokenizer"]["tokenizer"];
        if (kind.equals("char")) fail("it is a model of characters, which only sample.py knows");
        packed_ = metadata["packed"];
        read_model(metadata["model_args"]);
        if (header_.count() != used_ + 1) fail("it has tensors that are no part of such a model");
    }

    void read_model(Json args) {
        const auto size = [&](const char* name) { return args[name].as_integer(name, 1, 1 << 28); };
        const auto is_true = [&](const char* name) { return args[name].text == "true"; };
        gpt.n_layer = size("n_layer"), gpt.n_head = size("n_head"), gpt.n_kv_head = size("n_kv_head");
        gpt.head_size = size("head_size"), gpt.n_embd = size("n_embd"), gpt.n_inner = size("n_inner");
        gpt.rms = args["norm"].equals("rms"), gpt.gated = args["mlp"].equals("swiglu");
        gpt.norm_eps = float(args["norm_eps"].as_positive("norm_eps"));
        context = size("block_size");
        const bool rotary = args["position"].equals("rotary"), bias = is_true("bias");
        if (gpt.n_head % gpt.n_kv_head || !(gpt.rms || args["norm"].equals("layer"))) fail("bad n_kv_head or norm");
        if (!args["rope_scaling"].is_null()) fail("it has Llama 3's rotary scaling, which only sample.py knows");
        // Each tensor is looked for in the whole header: a few seconds at most.
        if (int64_t(header_.text.size()) > (1 << 26) / gpt.n_layer) fail("its header is too long for its layers");
        const auto floats = [&](const string& name, int64_t n) { return (const float*)data(name, "F32", 4, {n}); };
        const auto norm = [&](const string& name) {
            const float* weight = floats(name + ".weight", gpt.n_embd);
            return GptNorm{weight, bias && !gpt.rms ? floats(name + ".bias", gpt.n_embd) : nullptr};
        };
        const auto linear = [&](const string& name, int64_t rows, int64_t columns, bool has_bias) {
            return GptLinear{weight(name, rows, columns), has_bias ? floats(name + ".bias", rows) : nullptr};
        };
        gpt.wte = weight("transformer.wte", size("vocab_size"), gpt.n_embd);
        gpt.wpe = rotary ? gpt.wte : weight("transformer.wpe", context, gpt.n_embd);
        gpt.ln_f = norm("transformer.ln_f");
        gpt.lm_head.weight = is_true("tie") ? gpt.wte : weight("lm_head", gpt.wte.rows, gpt.n_embd);
        for (int64_t i = 0; i < gpt.n_layer; i++) {
            const string name = "transformer.h." + to_string(i) + ".";
            const int64_t heads = gpt.n_head + 2 * gpt.n_kv_head, inner = gpt.n_inner * (1 + gpt.gated);
            layers_.push_back({norm(name + "ln_1"), norm(name + "ln_2"),
                linear(name + "attn.c_attn", heads * gpt.head_size, gpt.n_embd, is_true("qkv_bias")),
                linear(name + "attn.c_proj", gpt.n_embd, gpt.n_head * gpt.head_size, bias),
                linear(name + "mlp.c_fc", inner, gpt.n_embd, bias),
                linear(name + "mlp.c_proj", gpt.n_embd, gpt.n_inner, bias), nullptr, nullptr});
        }
        gpt.layers = layers_.data();
        const auto theta = float(args["rope_theta"].as_positive("rope_theta"));
        for (int64_t i = 0; i < gpt.head_size; i += 2)
            frequencies_.push_back(1 / std::pow(theta, float(i) / float(gpt.head_size)));
        gpt.frequencies = rotary ? frequencies_.data() : nullptr;
    }

    // Data of a tensor. Checks its dtype, its shape and its place in the file. item: bytes of an element.
    const void* data(const string& name, const char* dtype, int64_t item, const std::vector<int64_t>& lengths) {
        const Json entry = header_[name];
        string shape;
        int64_t size = item, n = 0, place[2] = {};
        for (const int64_t length : lengths) {
            shape += (shape.empty() ? "[" : ",") + to_string(length);
            if (__builtin_mul_overflow(size, length, &size)) fail(name + " cannot be that large");
        }
        const auto most = int64_t(data_.size());
        entry["data_offsets"].each([&](Json, Json at) { place[n++ % 2] = at.as_integer("data_offsets", 0, most); });
        const char* start = data_.data() + place[0];
        if (!entry["dtype"].equals(dtype) || entry["shape"].text != shape + "]" || n != 2 ||
            place[1] - place[0] != size || reinterpret_cast<uintptr_t>(start) % size_t(item))
            fail(name + " is missing or damaged, or not " + dtype + " of shape " + shape + "], as the settings say");
        used_++;
        return start;
    }

    // A packed weight (rows, columns), as pot.py's packed_state writes it.
    PotWeight weight(const string& name, int64_t rows, int64_t columns) {
        const Json layer = packed_["layers"][name];
        if (layer.is_null()) fail(name + " is not packed: quantize the model by train.py --pot_bits=4");
        Json config;
        int64_t number = layer["config"].as_integer("a layer's config", 0, INT32_MAX);
        packed_["configs"].each([&](Json, Json c) { config = number-- == 0 ? c : config; });
        const Json terms = config["terms"], kind = config["granularity"];
        PotWeight w{};
        w.rows = rows, w.columns = columns, w.bits = int32_t(config["bits"].as_integer("bits", 3, 4));
        w.groups = kind.equals("group") ? columns / config["group_size"].as_integer("group_size", 1, columns) : 1;
        w.activations = 2;  // as sample.py
        if (!layer["dtype"].equals("float32") || !config["layout"].equals("tiles-16") || !takes_bytes(w) ||
            !config["grid"].equals("pot") || !config["act_bits"].is_null() || columns % w.groups)
            fail(name + " is not of powers of two with 3 or 4 bits in groups of a multiple of 4, without act_bits");
        const int half = w.bits == 3 ? 4 : 8;  // codes of one sign
        for (int i = 1; i < half; i++) {       // as PoTConfig.levels
            const int level = i == 1 ? 1 : terms.text == "1" ? 1 << (i - 1) : (2 + i % 2) << (i / 2 - 1);
            w.table[i] = int8_t(level), w.table[half + i] = int8_t(-level);
        }
        const int64_t blocks = (rows + 15) / 16, tiles = (columns + tile_columns(w) - 1) / tile_columns(w);
        w.codes = static_cast<const uint8_t*>(data(name + ".packed.codes", "U8", 1, {blocks, tiles * tile_bytes(w)}));
        const string unit = name + ".packed.unit";
        w.unit_is_half = header_[unit]["dtype"].equals("F16");
        w.unit_per_row = !kind.equals("tensor") && rows > 1;
        std::vector<int64_t> shape{1, w.groups};
        if (w.unit_per_row) shape = {blocks, w.groups, 16};
        w.unit = data(unit, w.unit_is_half ? "F16" : "F32", w.unit_is_half ? 2 : 4, shape);
        return w;
    }

    Json header_;                     // of the file
    string_view data_;                // of all tensors
    size_t used_ = 0;                 // tensors that were read
    string metadata_;                 // JSON, without the escapes that it has in the header
    Json packed_;                     // the part of it that packed_state wrote
    std::vector<GptLayer> layers_;    // (n_layer)
    std::vector<float> frequencies_;  // (head_size / 2)
};

// --- Generation ---

struct Settings {  // as sample.py has them
    string ckpt = "out", prompt = "\n";
    int64_t max_new_tokens = 500, top_k = 200, seed = 1337, threads = std::max(1u, std::thread::hardware_concurrency());
    double temperature = 0.8;
};

// Draws a token from the top_k most likely ones of logits (vocabulary); temperature 0: the most likely one.
int64_t draw(const std::vector<float>& logits, double temperature, int64_t top_k, std::mt19937_64& random) {
    if (temperature == 0) return std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::vector<uint32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    const auto end = order.begin() + std::min(top_k, int64_t(order.size()));
    std::partial_sort(order.begin(), end, order.end(), [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
    std::vector<double> weights;  // (top_k)
    for (auto i = order.begin(); i != end; i++)
        weights.push_back(std::exp((logits[*i] - logits[order[0]]) / temperature));
    return int64_t(order[std::discrete_distribution<size_t>(weights.begin(), weights.end())(random)]);
}

// Calls visit(token) for each token that follows ids, until it returns false. Beyond the context the window slides.
template <class Visit>
void generate(Model& model, std::vector<int64_t> ids, const Settings& s, const Visit& visit) {
    Gpt& gpt = model.gpt;
    gpt.capacity = std::min(model.context, int64_t(ids.size()) + s.max_new_tokens);
    const int64_t size = gpt.n_kv_head * gpt.capacity * gpt.head_size;
    const std::unique_ptr<uint16_t[]> cache(new uint16_t[2 * gpt.n_layer * size]);  // (n_layer, 2, size) float16
    for (int64_t i = 0; i < gpt.n_layer; i++)
        gpt.layers[i].keys = &cache[2 * i * size], gpt.layers[i].values = &cache[(2 * i + 1) * size];
    std::vector<float> logits(gpt.wte.rows);
    std::mt19937_64 random{uint64_t(s.seed)};
    for (int64_t i = 0, done = 0; i < s.max_new_tokens; i++) {  // done: tokens in the cache
        const int64_t n = int64_t(ids.size()), beyond = n - model.context, from = beyond > 0 ? beyond : done;
        gpt_decode(&gpt, &ids[from], n - from, beyond > 0 ? 0 : done, logits.data(), int(s.threads));
        done = n;
        if (!std::all_of(logits.begin(), logits.end(), [](float f) { return std::isfinite(f); }))
            fail("the model's logits are not finite: its file is damaged, or its training diverged");
        ids.push_back(draw(logits, s.temperature, s.top_k, random));
        if (!visit(ids.back())) return;
    }
}

// --- Command line ---

Settings read_settings(int count, char** words) {
    Settings s;
    for (int i = 1; i < count; i++) {
        const string word = words[i], key = word.substr(0, word.find('='));
        const string value = key == word ? "" : word.substr(key.size() + 1);
        if (key == "--ckpt") s.ckpt = value;
        else if (key == "--prompt") s.prompt = value;
        else if (key == "--max_new_tokens") s.max_new_tokens = Json{value}.as_integer(key, 1, INT32_MAX);
        else if (key == "--temperature") s.temperature = value == "0" ? 0 : Json{value}.as_positive(key);
        else if (key == "--top_k") s.top_k = Json{value}.as_integer(key, 1, INT32_MAX);
        else if (key == "--seed") s.seed = Json{value}.as_integer(key, 0, INT32_MAX);
        else if (key == "--threads") s.threads = Json{value}.as_integer(key, 1, 1024);
        else fail("there is no setting " + key + "; usage: run --ckpt=FOLDER --prompt=TEXT [--max_new_tokens=500] "
                  "[--temperature=0.8] [--top_k=200] [--seed=1337] [--threads=N]");
    }
    return s;
}

void write_text(const Settings& s) {
#if defined(POT_SHIFT_ONLY)
    chosen = &shifts;
#endif
    Model model(s.ckpt);
    const Tokenizer tokenizer(s.ckpt);
    if (tokenizer.size() > model.gpt.wte.rows) fail(s.ckpt + ": the model has fewer tokens");
    const std::vector<int64_t> ids = tokenizer.encode(s.prompt);
    if (ids.empty()) fail("the prompt is empty: pass at least one character");
    const auto write = [](string_view text) { std::fwrite(text.data(), 1, text.size(), stdout), std::fflush(stdout); };
    int64_t count = 0;
    write(s.prompt);
    const auto start = std::chrono::steady_clock::now();
    generate(model, ids, s, [&](int64_t id) {
        count++;
        if (std::count(tokenizer.stops.begin(), tokenizer.stops.end(), id)) return false;
        if (id < tokenizer.size()) write(tokenizer.token(id));  // a model may have more rows
        return true;
    });
    write("\n");
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "--- %d tokens, %.1f tokens/s, %s\n", int(count), count / seconds.count(), s.ckpt.c_str());
}

}  // namespace

int main(int count, char** words) {
    try {
        return write_text(read_settings(count, words)), 0;
    } catch (const std::exception& e) {  // a name in the message may come from a hostile file
        string line = string(e.what()).substr(0, 500);
        for (char& c : line) c = uint8_t(c) < 0x20 || uint8_t(c) == 0x7f ? ' ' : c;
        std::fprintf(stderr, "run: error: %s\n", line.c_str());
        return 2;
    }
}
