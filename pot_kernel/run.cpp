// Text from a packed model without Python: reads a run's folder and writes how the model continues a prompt.
//
//     g++ -O3 -march=native -std=c++17 -pthread -o run pot_kernel/run.cpp -ldl
//     ./run --ckpt=out-smollm2-pot4 --prompt="The sky is"
//
// It needs the C++ standard library and POSIX, nothing else. decode.cpp and pot.cpp compute; this file reads the folder:
//     model.safetensors       codes, units, norms, biases, and what kind of model they are; mapped, not copied
//     tokenizer.json          byte pairs as GPT-2 and SmolLM2 have them; a model of characters needs none
//     tokenizer_config.json, generation_config.json    the tokens that end a text; may be missing
// Files may be damaged or hostile: every size and offset is checked before it is used, and a bad file ends the program
// with one line and exit status 2.
//
// -DPOT_SHIFT_ONLY multiplies by weights with shifts and additions alone (shift.h), as hardware without a multiplier
// would. On a processor that is slower.
//
// Sections: files, JSON, UTF-8, tokenizer, products by shifts, model, generation, command line.

#include "decode.cpp"
#include "unicode.h"
#if defined(POT_SHIFT_ONLY)
#include "shift.h"
#endif

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <initializer_list>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string_view>
#include <sys/mman.h>
#include <sys/stat.h>

namespace {

using std::string;
using std::string_view;
using std::to_string;

[[noreturn]] void fail(const string& message) { throw std::runtime_error(message); }

// -----------------------------------------------------------------------------
// Files

// A file in memory, as the system maps it. An optional file may be missing; then it is empty.
class MappedFile {
  public:
    explicit MappedFile(const string& path, bool optional = false) : path_(path) {
        const int file = open(path.c_str(), O_RDONLY);
        if (file < 0 && optional && errno == ENOENT) return;
        struct stat status;
        if (file < 0 || fstat(file, &status) != 0) fail(path + ": " + std::strerror(errno));
        size_ = S_ISREG(status.st_mode) ? size_t(status.st_size) : 0;
        if (size_) data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
        close(file);
        if (data_ == MAP_FAILED) fail(path + ": " + std::strerror(errno));
    }
    MappedFile(const MappedFile&) = delete;
    ~MappedFile() {
        if (data_) munmap(data_, size_);
    }

    // Calls use(text of the file), and adds the path to an error that it raises.
    template <class Use>
    void read(const Use& use) const {
        try {
            use(string_view(static_cast<const char*>(data_), size_));
        } catch (const std::runtime_error& e) {
            fail(path_ + ": " + e.what());
        }
    }

  private:
    const string path_;
    void* data_ = nullptr;
    size_t size_ = 0;  // bytes
};

// -----------------------------------------------------------------------------
// JSON, read where it lies: a tree of objects would take many times the memory of a hostile file.

void append_utf8(string& out, uint32_t code) {
    if (code < 0x80) return void(out += char(code));
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
    out += char((0xff << (7 - more) & 0xff) | code >> 6 * more);
    for (int i = more - 1; i >= 0; i--) out += char(0x80 | (code >> 6 * i & 0x3f));
}

// A value within a JSON text. Syntax is checked where a value is used.
struct Json {
    string_view text;  // from the first to the last byte of the value; empty: there is no such value

    static Json parse(string_view document) {
        const char* p = document.data();
        return next(&p, p + document.size());
    }

    bool is_null() const { return text.empty() || text == "null"; }

    // Is it this text, without escapes?
    bool equals(string_view value) const {
        return text.size() == value.size() + 2 && text[0] == '"' && text.substr(1, value.size()) == value;
    }

    // Calls visit(key, value) for each part of an object or array; an array has no keys. False if it is neither.
    template <class Visit>
    bool each(const Visit& visit) const {
        return until([&](Json key, Json value) { return visit(key, value), false; });
    }

    // The same, until visit returns true.
    template <class Visit>
    bool until(const Visit& visit) const {
        if (text.empty() || (text[0] != '{' && text[0] != '[')) return false;
        const char *p = text.data(), *end = p + text.size() - 1;
        do {
            if ((p = blank(p + 1, end)) == end) break;  // behind a bracket or a comma
            const Json key = text[0] == '{' ? next(&p, end) : Json();
            if (text[0] == '{' && (p == end || *p++ != ':')) fail("damaged JSON");
            const Json value = next(&p, end);
            if (p < end && *p != ',') fail("damaged JSON");
            if (visit(key, value)) break;
        } while (p < end);
        return true;
    }

    // The value of a key of an object; empty if there is none.
    Json operator[](string_view name) const {
        Json out;
        until([&](Json key, Json value) { return key.equals(name) && (out = value, true); });
        return out;
    }

    // The text of a string, without quotes and escapes. The names here and below are for the error.
    string as_string(const string& name) const {
        if (text.empty() || text[0] != '"') fail(name + " is missing or no text");
        string out;
        for (size_t i = 1; i + 1 < text.size(); i++) {
            const char letter = text[i] == '\\' ? text[++i] : '\0';
            const size_t known = letter ? string_view("bfnrt").find(letter) : string_view::npos;
            if (letter == 'u') {
                uint32_t code = hex(i + 1);
                i += 4;
                const uint32_t low = code >> 10 == 0x36 && text.substr(i + 1, 2) == "\\u" ? hex(i + 3) : 0;
                if (low >> 10 == 0x37) code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff)), i += 6;
                append_utf8(out, code >> 11 == 0x1b ? 0xfffd : code);  // half of a pair is no character
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

  private:
    static const char* blank(const char* p, const char* end) {  // behind white space
        while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')) p++;
        return p;
    }

    static Json next(const char** p, const char* end) {  // the value at p; moves p behind it and white space
        const char *start = blank(*p, end), *at = start;
        bool inside = true;  // of a string, of brackets, or of a number or a word
        for (int64_t depth = 0; inside; at++) {
            if (at >= end) fail("damaged JSON");
            if (*at == '"')
                for (at++; at < end && *at != '"'; at++)
                    if (*at == '\\' && at + 1 < end) at++;
            if (at == end) fail("damaged JSON");
            depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
            const bool is_word = *start != '"' && *start != '{' && *start != '[';
            inside = depth > 0 || (is_word && at + 1 < end && !std::strchr(",:]} \t\n\r", at[1]));
        }
        *p = blank(at, end);
        return {{start, size_t(at - start)}};
    }

    uint32_t hex(size_t at) const {
        if (at + 4 >= text.size()) fail("damaged JSON");
        return uint32_t(std::strtoul(string(text.substr(at, 4)).c_str(), nullptr, 16)) & 0xffff;
    }
};

// -----------------------------------------------------------------------------
// UTF-8

// Decodes the code point at p and moves p behind it. Bytes that are no UTF-8 become U+FFFD as with Python's
// errors="replace": one for each longest beginning of a code point. *cut: the text ended inside of a code point.
uint32_t decode_utf8(const char** p, const char* end, bool* cut = nullptr) {
    const uint8_t first = uint8_t(*(*p)++);
    if (first < 0x80) return first;
    const int more = first < 0xc2 || first > 0xf4 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    uint8_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;   // bounds of the second byte: no longer form
    uint8_t high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;  // than needed, no surrogate, below 0x110000
    uint32_t code = first & (0x3f >> more);
    for (int i = 0; i < more; i++, low = 0x80, high = 0xbf) {
        if (cut && *p == end) *cut = true;
        if (*p == end || uint8_t(**p) < low || uint8_t(**p) > high) return 0xfffd;
        code = code << 6 | (uint8_t(*(*p)++) & 0x3f);
    }
    return more ? code : 0xfffd;
}

// Moves `bytes` into valid UTF-8. An unfinished code point stays in `bytes`, unless this is the end of the text.
string take_utf8(string& bytes, bool is_end) {
    string out;
    const char *p = bytes.data(), *end = p + bytes.size(), *start = p;
    for (bool cut = false; p < end; start = p) {
        const uint32_t code = decode_utf8(&p, end, &cut);
        if (cut && !is_end) break;
        append_utf8(out, code);
    }
    bytes.erase(0, size_t(start - bytes.data()));
    return out;
}

// -----------------------------------------------------------------------------
// Tokenizer: byte pairs from a tokenizer.json, or characters.

template <size_t N>
bool contains(const uint32_t (&ranges)[N][2], uint32_t code) {
    const auto* range = std::upper_bound(ranges, ranges + N, code, [](uint32_t c, const uint32_t* r) { return c < r[0]; });
    return range != ranges && code <= (*(range - 1))[1];
}

enum Kind { LETTER, NUMBER, SPACE, OTHER };

Kind kind_of(uint32_t code) {
    for (uint32_t space : {0x20, 0x85, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000})
        if (code == space) return SPACE;
    if ((code >= 9 && code <= 13) || (code >= 0x2000 && code <= 0x200a)) return SPACE;
    return contains(LETTERS, code) ? LETTER : contains(NUMBERS, code) ? NUMBER : OTHER;
}

// Bytes of the first word of text (valid UTF-8, not empty), as GPT-2 cuts text into words:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t word_length(string_view text) {
    for (string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.substr(0, ending.size()) == ending) return ending.size();
    const char *start = text.data(), *end = start + text.size(), *p = start, *last = start;
    Kind kind = kind_of(decode_utf8(&p, end));
    if (*start == ' ' && p < end) {  // a space belongs to the word behind it
        const char* second = p;
        const Kind next = kind_of(decode_utf8(&second, end));
        if (next != SPACE) p = second, kind = next;
    }
    for (const char* q = p; q < end; p = q) {  // p: behind the code points of this kind; last: where the last begins
        if (kind_of(decode_utf8(&q, end)) != kind) break;
        last = p;
    }
    // White space leaves its last code point to the word behind it.
    return size_t((kind == SPACE && p < end && last > start ? last : p) - start);
}

class Tokenizer {
  public:
    std::vector<int64_t> stops;  // tokens that end a text

    // The tokenizer of a run's folder. meta: "tokenizer" in the model's metadata. vocabulary: size of the model's.
    Tokenizer(const string& folder, Json meta, int64_t vocabulary) : is_char_(meta["tokenizer"].equals("char")) {
        if (is_char_) {
            string chars = meta["chars"].as_string("the characters of its tokenizer"), text = take_utf8(chars, true);
            const char *p = text.data(), *end = p + text.size();
            for (const char* start = p; p < end; start = p) {
                decode_utf8(&p, end);
                add_token({start, size_t(p - start)}, int64_t(tokens_.size()));
            }
            sort_tokens();
        } else if (meta["tokenizer"].equals("gpt2") || meta["tokenizer"].equals("file")) {
            MappedFile(folder + "/tokenizer.json").read([&](string_view text) { read(Json::parse(text)); });
            MappedFile(folder + "/tokenizer_config.json", true).read([&](string_view text) {
                const Json end = text.empty() ? Json() : Json::parse(text)["eos_token"];
                const Json content = end["content"].is_null() ? end : end["content"];
                if (!content.is_null()) add_stop(find(content.as_string("eos_token")));
            });
            MappedFile(folder + "/generation_config.json", true).read([&](string_view text) {
                const Json ends = text.empty() ? Json() : Json::parse(text)["eos_token_id"];
                const auto add = [&](Json, Json id) { add_stop(id.as_integer("eos_token_id", 0, MOST)); };
                if (!ends.is_null() && !ends.each(add)) add({}, ends);
            });
            add_stop(find("<|endoftext|>") < 0 ? find("<|end_of_text|>") : find("<|endoftext|>"));
        } else {
            fail("the model has an unknown tokenizer");
        }
        if (int64_t(tokens_.size()) > vocabulary)
            fail("the tokenizer has more than the " + to_string(vocabulary) + " tokens of the model");
    }

    // Tokens of a text. Bytes that are no UTF-8 count as U+FFFD.
    std::vector<int64_t> encode(string text) const {
        text = take_utf8(text, true);
        std::vector<int64_t> ids;
        if (!is_char_) cut(text, false, &ids);
        const char *p = text.data(), *end = p + text.size();
        for (const char* start = p; is_char_ && p < end; start = p) {
            decode_utf8(&p, end);
            ids.push_back(find({start, size_t(p - start)}));
            if (ids.back() < 0) fail("the character " + string(start, p) + " is not in this model's vocabulary");
        }
        return ids;
    }

    // Bytes of a token, which may be a part of a character. A model may have more rows than tokens: these are empty.
    string bytes(int64_t id) const {
        const string_view text = id < int64_t(tokens_.size()) ? letters(uint32_t(id)) : string_view();
        string out;
        const char *p = text.data(), *end = p + text.size();
        while (!is_char_ && p < end) {
            const uint32_t code = decode_utf8(&p, end);
            if (code >= 324 || (code < 256 && !is_printable(code))) return string(text);  // it was added as text
            out += char(byte_of_[code]);
        }
        return is_char_ ? string(text) : out;
    }

  private:
    static constexpr int64_t MOST = 1 << 28;  // ids

    struct Token {
        uint32_t start, length;  // of its letters, in letters_; length 0: no token has this id
    };
    struct Merge {
        uint64_t pair;  // left token << 32 | right token
        uint32_t rank;  // the lowest is merged first
        uint32_t id;    // the token that replaces the pair
    };
    struct Added {  // a token that is cut out of the text before all else, such as <|endoftext|>
        string content;
        int64_t id;
        bool normalized;  // cut out after the others
    };

    static bool is_printable(uint32_t byte) { return (byte > 32 && byte < 127) || (byte > 160 && byte != 173); }

    string_view letters(uint32_t id) const { return {letters_.data() + tokens_[id].start, tokens_[id].length}; }

    // The token with these letters, or -1.
    int64_t find(string_view text) const {
        const auto before = [&](uint32_t id, string_view t) { return letters(id) < t; };
        const auto at = std::lower_bound(sorted_.begin(), sorted_.end(), text, before);
        return at != sorted_.end() && letters(*at) == text ? int64_t(*at) : -1;
    }

    void add_stop(int64_t id) {
        if (id >= 0) stops.push_back(id);
    }

    void add_token(string_view text, int64_t id) {
        if (id >= int64_t(tokens_.size())) tokens_.resize(size_t(id) + 1, {0, 0});
        if (tokens_[size_t(id)].length || text.empty()) fail("token " + to_string(id) + " is empty or there twice");
        tokens_[size_t(id)] = {uint32_t(letters_.size()), uint32_t(text.size())};
        letters_ += text;
    }

    void sort_tokens() {
        sorted_.clear();
        for (uint32_t id = 0; id < tokens_.size(); id++)
            if (tokens_[id].length) sorted_.push_back(id);
        std::sort(sorted_.begin(), sorted_.end(), [&](uint32_t a, uint32_t b) { return letters(a) < letters(b); });
    }

    void read(Json file) {
        const auto off = [](Json value) { return value.is_null() || value.text == "false" || value.text == "\"\""; };
        const Json model = file["model"], unknown = model["unk_token"], added = file["added_tokens"], around = file["post_processor"];
        bool known = model["type"].equals("BPE") && off(file["normalizer"]) && off(file["truncation"]);
        for (const char* key : {"dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix"})
            known = known && off(model[key]);
        std::vector<Json> cuts;
        const Json cut = file["pre_tokenizer"];
        if (!cut["pretokenizers"].each([&](Json, Json step) { cuts.push_back(step); })) cuts = {cut};
        digits_ = cuts.size() == 2 && cuts[0]["type"].equals("Digits") && cuts[0]["individual_digits"].text == "true";
        known = known && cuts.size() == (digits_ ? 2 : 1) && cuts.back()["type"].equals("ByteLevel") &&
                off(cuts.back()["add_prefix_space"]) && cuts.back()["use_regex"].text != "false";
        size_t parts = 1;  // of the template: the text alone
        if (!around.is_null() && !around["type"].equals("ByteLevel"))
            parts = 0, around["single"].each([&](Json, Json) { parts++; });
        if (!known || parts != 1) fail("it is no tokenizer of GPT-2's or SmolLM2's kind");

        const int64_t most = std::min(MOST, int64_t(file.text.size()));  // each token takes some bytes
        letters_.reserve(model["vocab"].text.size());
        model["vocab"].each([&](Json text, Json id) { add_token(text.as_string("a token"), id.as_integer("an id", 0, most)); });
        sort_tokens();
        for (uint32_t b = 0, other = 256; b < 256; b++) {  // a byte that is not printable has a letter from 256 on
            const uint32_t code = is_printable(b) ? b : other++;
            string letter;
            byte_of_[code] = uint8_t(b);
            append_utf8(letter, code);
            byte_ids_[b] = find(letter) < 0 && !unknown.is_null() ? find(unknown.as_string("unk_token")) : find(letter);
        }
        size_t count = 0;
        model["merges"].each([&](Json, Json) { count++; });
        merges_.reserve(count);
        model["merges"].each([&](Json, Json merge) { read_merge(merge); });
        std::sort(merges_.begin(), merges_.end(), [](const Merge& a, const Merge& b) { return a.pair < b.pair; });
        added.each([&](Json, Json token) {
            const string content = token["content"].as_string("an added token");
            int64_t id = find(content);
            if (id < 0) add_token(content, id = token["id"].as_integer("the id of an added token", 0, most));
            if (!off(token["single_word"]) || !off(token["lstrip"]) || !off(token["rstrip"]) || content.empty())
                fail("the added token " + content + " has a setting that is not known here");
            added_.push_back({content, id, token["normalized"].text == "true"});
        });
        sort_tokens();
    }

    void read_merge(Json merge) {  // "left right" or ["left", "right"]
        std::vector<string> parts;
        if (!merge.each([&](Json, Json part) { parts.push_back(part.as_string("a part of a merge")); })) {
            const string both = merge.as_string("a merge");
            const size_t space = std::min(both.size(), both.find(' '));
            parts = {both.substr(0, space), both.substr(std::min(both.size(), space + 1))};
        }
        parts.resize(2);
        const int64_t left = find(parts[0]), right = find(parts[1]), id = find(parts[0] + parts[1]);
        if (left < 0 || right < 0 || id < 0) fail("a merge is not of two tokens that make a third");
        merges_.push_back({uint64_t(left) << 32 | uint64_t(right), uint32_t(merges_.size()), uint32_t(id)});
    }

    // Cuts added tokens out of the text, the leftmost and longest first, and appends the tokens of the rest.
    void cut(string_view text, bool normalized, std::vector<int64_t>* ids) const {
        for (;;) {
            const Added* token = nullptr;
            size_t at = text.size();
            for (const Added& a : added_) {
                const size_t i = a.normalized == normalized ? text.find(a.content) : string_view::npos;
                if (i < at || (token && i == at && a.content.size() > token->content.size())) token = &a, at = i;
            }
            normalized ? append_words(text.substr(0, at), ids) : cut(text.substr(0, at), true, ids);
            if (!token) return;
            ids->push_back(token->id);
            text.remove_prefix(at + token->content.size());
        }
    }

    void append_words(string_view text, std::vector<int64_t>* ids) const {
        const char *p = text.data(), *end = p + text.size(), *start = p;
        for (const char* next = p; p < end; p = next) {  // start: behind the last digit that was cut off
            const uint32_t code = decode_utf8(&next, end);
            const bool digit = digits_ && (contains(NUMBERS, code) || contains(NEW_NUMBERS, code));
            if (!digit && next < end) continue;
            append_piece({start, size_t((digit ? p : next) - start)}, ids);
            if (digit) append_piece({p, size_t(next - p)}, ids);
            start = next;
        }
    }

    // Byte pair encoding of each word: merges the pair of the lowest rank until no pair is left.
    void append_piece(string_view text, std::vector<int64_t>* ids) const {
        for (size_t length; !text.empty(); text.remove_prefix(length)) {
            length = word_length(text);
            std::vector<uint32_t> parts;  // tokens
            for (const char c : text.substr(0, length))
                if (byte_ids_[uint8_t(c)] >= 0) parts.push_back(uint32_t(byte_ids_[uint8_t(c)]));
            for (;;) {
                size_t at = 0;
                const Merge* best = nullptr;
                for (size_t i = 0; i + 1 < parts.size(); i++) {
                    const uint64_t pair = uint64_t(parts[i]) << 32 | parts[i + 1];
                    const auto before = [](const Merge& merge, uint64_t other) { return merge.pair < other; };
                    const auto merge = std::lower_bound(merges_.begin(), merges_.end(), pair, before);
                    const bool is_pair = merge != merges_.end() && merge->pair == pair;
                    if (is_pair && (!best || merge->rank < best->rank)) best = &*merge, at = i;
                }
                if (!best) break;
                parts[at] = best->id;
                parts.erase(parts.begin() + int64_t(at) + 1);
            }
            ids->insert(ids->end(), parts.begin(), parts.end());
        }
    }

    const bool is_char_;            // tokens are characters
    bool digits_ = false;           // single digits are cut off first
    string letters_;                // of all tokens
    std::vector<Token> tokens_;     // (vocabulary)
    std::vector<uint32_t> sorted_;  // (vocabulary): tokens in the order of their letters
    std::vector<Merge> merges_;     // (merges): in the order of their pairs
    int64_t byte_ids_[256] = {};    // (256): token of each byte; -1: there is none, and the byte is left out
    uint8_t byte_of_[324] = {};     // (324): byte of each letter in the tokens of a file
    std::vector<Added> added_;      // (added tokens)
};

// -----------------------------------------------------------------------------
// Products by shifts: integers within a segment, as every other instruction set has them. A scale for each segment
// follows in float32.

#if defined(POT_SHIFT_ONLY)
void shift_product(const Job& job, int64_t from, int64_t to) {
    const PotWeight& w = *job.w;
    const Rows8& x = *job.x8;
    PotShift levels[16];
    for (int code = 0; code < 16; code++) pot_shift_of(w.table[code], &levels[code]);
    for (int64_t block = from; block < to; block++)
        for (int64_t i = 0; i < job.n; i++) {
            float total[16] = {};
            for (size_t s = 0; s < x.segments.size(); s++) {
                const Segment& segment = x.segments[s];
                int32_t sums[16] = {};
                pot_shift_products(codes_at(w, block, 0), w.bits, int32_t(segment.column), int32_t(4 * segment.quads),
                                   &x.q[size_t(i * x.stride + segment.column)], levels, sums);
                for (int r = 0; r < 16; r++) {
                    const float scale = unit_at(w, 16 * block + r, segment.group) * x.scale[size_t(i) * x.segments.size() + s];
                    total[r] = float(sums[r]) * scale + total[r];
                }
            }
            for (int64_t r = 16 * block; r < std::min(w.rows, 16 * block + 16); r++) {
                const float zero = w.activations == 1 ? x.offset[size_t(i)] * w.row_sums[r] : 0;
                job.y[i * job.y_stride + r] = x.row_scale[size_t(i)] * (total[r % 16] + zero) + (job.bias ? job.bias[r] : 0);
            }
        }
}

const InstructionSet shifts{"shifts", true, shift_product, false};
#endif

// -----------------------------------------------------------------------------
// Model: the content of model.safetensors as decode.cpp takes it.

class Model {
  public:
    Gpt gpt{};
    int64_t vocabulary = 0, context = 0;  // tokens
    Json tokenizer;                       // meta of its tokenizer

    explicit Model(const string& folder) : file_(folder + "/model.safetensors") {
        file_.read([&](string_view text) { read(text); });
    }

    // Makes room for keys and values of `capacity` tokens.
    void allocate(int64_t capacity) {
        const size_t size = size_t(gpt.n_kv_head * gpt.head_size * capacity);  // of a layer's keys
        cache_.reset(new uint16_t[2 * size * layers_.size()]);
        gpt.capacity = capacity;
        for (size_t i = 0; i < layers_.size(); i++) {
            layers_[i].keys = cache_.get() + 2 * i * size;
            layers_[i].values = layers_[i].keys + size;
        }
    }

  private:
    struct Tensor {
        Json name;
        Json entry;  // {"dtype", "shape", "data_offsets"}
        bool used;
    };

    // The file is 8 bytes with the length of its header, the header in JSON, then the tensors.
    void read(string_view text) {
#if defined(POT_SHIFT_ONLY)
        chosen = &shifts;
#endif
        uint64_t length = 0;
        if (text.size() >= 8) std::memcpy(&length, text.data(), 8);
        if (length < 2 || length > text.size() - 8) fail("it is no safetensors file, or it is truncated");
        const Json header = Json::parse(text.substr(8, length)), nanopot = header["__metadata__"]["nanopot"];
        data_ = text.substr(8 + length);
        if (nanopot.is_null()) fail("it is not of nanoPoT: pass the out_dir of a training run");
        metadata_ = nanopot.as_string("its metadata");
        const Json info = Json::parse(metadata_);
        packed_ = info["packed"], tokenizer = info["tokenizer"];
        size_t count = 0;
        header.each([&](Json, Json) { count++; });
        tensors_.reserve(count);
        header.each([&](Json name, Json entry) { tensors_.push_back({name, entry, name.equals("__metadata__")}); });
        read_model(info["model_args"]);
        if (end_ != int64_t(data_.size())) fail("it is longer than its tensors");
        for (const Tensor& t : tensors_)
            if (!t.used) fail("its tensor " + string(t.name.text) + " is no part of such a model");
    }

    void read_model(Json args) {
        const auto size = [&](const char* name) { return args[name].as_integer(name, 1, 1 << 28); };
        const auto second = [&](const char* name, const char* first, const char* other) {
            if (!args[name].equals(first) && !args[name].equals(other)) fail(string(name) + " is not known here");
            return args[name].equals(other);
        };
        gpt.n_layer = size("n_layer"), gpt.n_head = size("n_head"), gpt.n_kv_head = size("n_kv_head");
        gpt.head_size = size("head_size"), gpt.n_embd = size("n_embd"), gpt.n_inner = size("n_inner");
        vocabulary = size("vocab_size"), context = size("block_size");
        gpt.rms = second("norm", "layer", "rms"), gpt.gated = second("mlp", "gelu", "swiglu");
        gpt.norm_eps = float(args["norm_eps"].as_positive("norm_eps"));
        const bool rotary = second("position", "learned", "rotary"), bias = args["bias"].text == "true";
        if (gpt.n_head % gpt.n_kv_head || (rotary && gpt.head_size % 2))
            fail("n_head must be a multiple of n_kv_head, and head_size even with rotary positions");
        const int64_t heads = (gpt.n_head + 2 * gpt.n_kv_head) * gpt.head_size, inner = gpt.n_inner * (1 + gpt.gated);
        gpt.wte = weight("transformer.wte", vocabulary, gpt.n_embd);
        gpt.wpe = rotary ? gpt.wte : weight("transformer.wpe", context, gpt.n_embd);
        gpt.ln_f = norm("transformer.ln_f", bias);
        gpt.lm_head = {weight("lm_head", vocabulary, gpt.n_embd), nullptr};
        const auto linear = [&](const string& name, int64_t rows, int64_t columns, bool has_bias) {
            const PotWeight w = weight(name, rows, columns);
            return GptLinear{w, has_bias ? floats(name + ".bias", rows) : nullptr};
        };
        for (int64_t i = 0; i < gpt.n_layer; i++) {
            const string name = "transformer.h." + to_string(i) + ".";
            GptLayer layer{};
            layer.ln_1 = norm(name + "ln_1", bias), layer.ln_2 = norm(name + "ln_2", bias);
            layer.c_attn = linear(name + "attn.c_attn", heads, gpt.n_embd, args["qkv_bias"].text == "true");
            layer.attn_c_proj = linear(name + "attn.c_proj", gpt.n_embd, gpt.n_head * gpt.head_size, bias);
            layer.c_fc = linear(name + "mlp.c_fc", inner, gpt.n_embd, bias);
            layer.mlp_c_proj = linear(name + "mlp.c_proj", gpt.n_embd, gpt.n_inner, bias);
            layers_.push_back(layer);
        }
        gpt.layers = layers_.data();
        if (rotary) read_frequencies(args["rope_theta"].as_positive("rope_theta"), args["rope_scaling"]);
    }

    // As model.py's rotary_frequencies. Llama 3's scaling slows pairs that turn less than once in the original context.
    void read_frequencies(double theta, Json scaling) {
        const auto number = [&](const char* name) { return float(scaling[name].as_positive(name)); };
        for (int64_t i = 0; i < gpt.head_size; i += 2) {
            float frequency = 1 / std::pow(float(theta), float(i) / float(gpt.head_size));
            if (!scaling.is_null()) {
                const float low = number("low_freq_factor"), range = number("high_freq_factor") - low;
                const float turns = number("original_max_position_embeddings") * frequency / float(2 * M_PI);
                const float kept = std::min(1.0f, std::max(0.0f, (turns - low) / range));
                frequency *= kept + (1 - kept) / number("factor");
            }
            frequencies_.push_back(frequency);
        }
        gpt.frequencies = frequencies_.data();
    }

    Tensor& find(string name) {
        const Json alias = packed_["aliases"][name];
        if (!alias.is_null()) name = alias.as_string("an alias");
        const auto t = std::find_if(tensors_.begin(), tensors_.end(), [&](Tensor& t) { return t.name.equals(name); });
        if (t == tensors_.end()) fail(name + " is missing");
        return *t;
    }

    // Data of a tensor. Checks its dtype, its shape and its place in the file. item: bytes of an element.
    const char* data(const string& name, const char* dtype, int64_t item, std::initializer_list<int64_t> expected) {
        Tensor& t = find(name);
        string shape, wanted;
        int64_t size = item, n = 0, place[3] = {};
        const auto integer = [&](Json value) { return value.as_integer(name + "'s header", 0, int64_t(data_.size())); };
        t.entry["shape"].each([&](Json, Json length) { shape += to_string(integer(length)) + " "; });
        t.entry["data_offsets"].each([&](Json, Json at) { place[std::min<int64_t>(n++, 2)] = integer(at); });
        for (const int64_t length : expected) {
            wanted += to_string(length) + " ";
            if (__builtin_mul_overflow(size, length, &size)) fail(name + " cannot be that large");
        }
        if (!t.entry["dtype"].equals(dtype) || shape != wanted)
            fail(name + " is not " + dtype + " of shape " + wanted + "as the settings of its model say");
        const char* start = data_.data() + place[0];
        if (n != 2 || place[1] - place[0] != size || reinterpret_cast<uintptr_t>(start) % size_t(item))
            fail(name + " does not lie where a tensor of its shape may lie");
        t.used = true, end_ = std::max(end_, place[1]);
        return start;
    }

    const float* floats(const string& name, int64_t n) {
        return reinterpret_cast<const float*>(data(name, "F32", 4, {n}));
    }

    GptNorm norm(const string& name, bool bias) {
        return {floats(name + ".weight", gpt.n_embd), bias && !gpt.rms ? floats(name + ".bias", gpt.n_embd) : nullptr};
    }

    // A packed weight (rows, columns), as pot.py's packed_state writes it.
    PotWeight weight(const string& name, int64_t rows, int64_t columns) {
        const Json layer = packed_["layers"][name];
        if (layer.is_null()) fail(name + " is not packed: quantize the model by train.py --pot_bits=4");
        Json config;
        int64_t number = layer["config"].as_integer("a layer's config", 0, 1 << 28);
        packed_["configs"].each([&](Json, Json c) { number-- == 0 ? void(config = c) : void(); });
        const int64_t bits = config["bits"].as_integer("bits", 3, 8), terms = config["terms"].as_integer("terms", 1, 2);
        const bool uniform = config["grid"].equals("uniform");
        const Json range = config["range"];
        const int64_t half = 1 << (bits - 1), full = half - 1;  // codes of one sign; levels above 0
        const int64_t top = range.is_null() ? full : range.as_integer("range", 1, full);
        if (!config["layout"].equals("tiles-16") || !layer["dtype"].equals("float32") || (bits > 4 && bits < 8) ||
            (bits == 8 && !uniform) || (!uniform && !config["grid"].equals("pot")))
            fail(name + " is packed in a way that this program does not know: it takes 3, 4 and uniform 8 bits");

        PotWeight w{};
        w.rows = rows, w.columns = columns, w.groups = 1, w.bits = int32_t(bits);
        for (int64_t code = 0; code < 2 * half && bits < 8; code++) {  // as PoTConfig.levels
            const int64_t i = std::min(code % half, uniform || terms == 2 ? full : top);
            const int64_t power = i ? 1 << (i - 1) : 0, two = i < 2 ? i : (2 + i % 2) << (i / 2 - 1);
            const int64_t level = uniform ? i : terms == 2 ? two : power;
            w.table[code] = int8_t(code < half ? level : -level);
        }
        if (config["granularity"].equals("group")) w.groups = columns / config["group_size"].as_integer("group_size", 1, columns);
        if (columns % w.groups) fail(name + ": its groups do not divide its columns");
        const int64_t blocks = (rows + 15) / 16, tiles = (columns + tile_columns(w) - 1) / tile_columns(w);
        w.codes = reinterpret_cast<const uint8_t*>(data(name + ".packed.codes", "U8", 1, {blocks, tiles * tile_bytes(w)}));

        const string units = name + ".packed.unit";
        w.unit_is_half = find(units).entry["dtype"].equals("F16");
        w.unit_per_row = !config["granularity"].equals("tensor") && rows > 1;
        const auto unit = [&](auto shape) { return data(units, w.unit_is_half ? "F16" : "F32", w.unit_is_half ? 2 : 4, shape); };
        typedef std::initializer_list<int64_t> Shape;
        w.unit = w.unit_per_row ? unit(Shape{blocks, w.groups, 16}) : unit(Shape{1, w.groups});
        for (int64_t row = 0; row < (w.unit_per_row ? 16 * blocks : 1); row++)
            for (int64_t g = 0; g < w.groups; g++) {
                const float f = unit_at(w, row, g);
                if (!(f > 0 && f < (w.unit_is_half ? 65520 : INFINITY))) fail(units + " holds a value that is no positive number");
            }
        w.activations = config["act_bits"].is_null() ? 2 : 1;  // as sample.py
#if defined(POT_SHIFT_ONLY)
        PotShift level;
        for (const int8_t value : w.table)
            if (uniform || pot_shift_of(value, &level) || !takes_bytes(w)) fail(name + " takes more than two shifts a weight");
#endif
        if (w.activations == 1) {
            row_sums_.emplace_back(rows);
            pot_row_sums(&w, row_sums_.back().data());
            w.row_sums = row_sums_.back().data();
        }
        return w;
    }

    const MappedFile file_;
    string_view data_;                          // of all tensors
    int64_t end_ = 0;                           // of the last tensor that was read
    string metadata_;                           // JSON, without the escapes that it has in the header
    Json packed_;                               // the part of it that packed_state wrote
    std::vector<Tensor> tensors_;               // (tensors)
    std::vector<GptLayer> layers_;              // (n_layer)
    std::vector<float> frequencies_;            // (head_size / 2), if rotary
    std::vector<std::vector<float>> row_sums_;  // (weights with activations of 8 bits per row; rows)
    std::unique_ptr<uint16_t[]> cache_;         // (n_layer, 2, n_kv_head, capacity, head_size) float16
};

// -----------------------------------------------------------------------------
// Generation

struct Settings {  // as sample.py has them
    string ckpt = "out", prompt = "\n";
    int64_t max_new_tokens = 500, top_k = 200, seed = 1337, threads = 0;
    double temperature = 0.8;
};

// Draws a token from the top_k most likely ones of logits (vocabulary); temperature 0: the most likely one.
int64_t draw(const std::vector<float>& logits, double temperature, int64_t top_k, std::mt19937_64& random) {
    if (temperature == 0) return std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    const size_t n = size_t(std::min(top_k, int64_t(order.size())));
    const auto more = [&](int32_t a, int32_t b) { return logits[size_t(a)] > logits[size_t(b)]; };
    std::partial_sort(order.begin(), order.begin() + int64_t(n), order.end(), more);
    std::vector<double> sums(n);  // of the probabilities up to a token
    for (size_t i = 0; i < n; i++)
        sums[i] = (i ? sums[i - 1] : 0) + std::exp((logits[size_t(order[i])] - logits[size_t(order[0])]) / temperature);
    const double place = double(random() >> 11) * 0x1p-53 * sums.back();  // 53 random bits
    const auto at = std::upper_bound(sums.begin(), sums.end() - 1, place);
    return order[size_t(at - sums.begin())];
}

// Calls visit(token) for each token that follows ids, until it returns false. Beyond the context the window slides, and
// each token computes the whole window.
template <class Visit>
void generate(Model& model, std::vector<int64_t> ids, const Settings& s, const Visit& visit) {
    std::vector<float> logits(size_t(model.vocabulary));
    std::mt19937_64 random{uint64_t(s.seed)};
    model.allocate(std::min(model.context, int64_t(ids.size()) + s.max_new_tokens));
    for (int64_t i = 0, done = 0; i < s.max_new_tokens; i++) {
        const int64_t n = int64_t(ids.size()), before = n - model.context;
        const int64_t from = before > 0 ? before : done, position = before > 0 ? 0 : done;
        gpt_decode(&model.gpt, ids.data() + from, n - from, position, logits.data(), int(s.threads));
        done = n;
        if (!std::all_of(logits.begin(), logits.end(), [](float f) { return std::isfinite(f); }))
            fail("the model's logits are not finite: its file is damaged, or its training diverged");
        ids.push_back(draw(logits, s.temperature, s.top_k, random));
        if (!visit(ids.back())) return;
    }
}

// -----------------------------------------------------------------------------
// Command line

Settings read_settings(int count, char** words) {
    Settings s;
    for (int i = 1; i < count; i++) {
        const string word = words[i], key = word.substr(0, word.find('='));
        if (key == word && i + 1 == count) fail(word + " needs a value: " + word + "=...");
        const string value = key == word ? words[++i] : word.substr(key.size() + 1);
        if (key == "--ckpt") s.ckpt = value;
        else if (key == "--prompt") s.prompt = value;
        else if (key == "--max_new_tokens") s.max_new_tokens = Json{value}.as_integer(key, 1, INT32_MAX);
        else if (key == "--temperature" && value.find_first_not_of("0.") == string::npos) s.temperature = 0;
        else if (key == "--temperature") s.temperature = Json{value}.as_positive(key);
        else if (key == "--top_k") s.top_k = Json{value}.as_integer(key, 1, INT32_MAX);
        else if (key == "--seed") s.seed = Json{value}.as_integer(key, 0, INT32_MAX);
        else if (key == "--threads") s.threads = Json{value}.as_integer(key, 0, 1024);
        else fail("unknown setting " + key + ": --help lists them");
    }
    if (s.prompt.empty()) fail("the prompt is empty: pass at least one character");
    if (s.threads == 0) s.threads = std::max(1u, std::thread::hardware_concurrency());
    return s;
}

void write_text(const Settings& s) {
    const char* set = std::getenv("NANOPOT_KERNEL");
    if (set && *set && pot_choose(set)) fail(string("NANOPOT_KERNEL: this machine has ") + pot_instruction_sets());
    Model model(s.ckpt);
    const Tokenizer tokenizer(s.ckpt, model.tokenizer, model.vocabulary);
    string bytes = s.prompt;  // that are not written yet
    int64_t count = 0;
    const auto write = [&](bool is_end) {
        const string text = take_utf8(bytes, is_end);
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    };
    write(true);
    const auto start = std::chrono::steady_clock::now();
    generate(model, tokenizer.encode(s.prompt), s, [&](int64_t id) {
        count++;
        if (std::count(tokenizer.stops.begin(), tokenizer.stops.end(), id)) return false;
        bytes += tokenizer.bytes(id);
        write(false);
        return true;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    bytes += '\n';
    write(true);
    std::fprintf(stderr, "--- %d tokens, %.0f tokens/s, %s\n", int(count), double(count) / seconds.count(), s.ckpt.c_str());
}

}  // namespace

int main(int count, char** words) {
    if (count > 1 && (string(words[1]) == "--help" || string(words[1]) == "-h")) {
        std::printf("usage: run [--key=value ...]\n\n"
                    "  --ckpt=out              folder of a packed model\n"
                    "  --prompt=TEXT           the text to continue\n"
                    "  --max_new_tokens=500    most tokens of the text, which ends earlier at an end-of-text token\n"
                    "  --temperature=0.8       0: always the most likely token; higher: more surprising\n"
                    "  --top_k=200             draw from this many most likely tokens\n"
                    "  --seed=1337             same seed, same text\n"
                    "  --threads=0             0: one for each core\n");
        return 0;
    }
    try {
        write_text(read_settings(count, words));
        return 0;
    } catch (const std::exception& e) {  // a name in the message may come from a hostile file
        string line = string(e.what()).substr(0, 500);
        for (char& c : line)
            if (uint8_t(c) < 0x20 || uint8_t(c) == 0x7f) c = ' ';
        std::fprintf(stderr, "run: error: %s\n", line.c_str());
        return 2;
    }
}
