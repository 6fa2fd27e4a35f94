// Text from a packed model without Python: reads a run's folder and writes how the model continues a prompt.
//
//     g++ -O3 -march=native -std=c++17 -pthread -o run pot_kernel/run.cpp -ldl
//     ./run --ckpt=out-smollm2-pot4 --prompt="The sky is"
//
// It needs the C++ standard library and POSIX, nothing else. decode.cpp and pot.cpp compute; this file reads the folder:
//     model.safetensors       codes, units, norms, biases, and what kind of model they are; mapped, not copied
//     tokenizer.json          byte pairs as GPT-2 and SmolLM2 have them; a model of characters has its own in its file
//     tokenizer_config.json, generation_config.json    the tokens that end a text
// Files may be damaged or hostile. Every size and offset is checked before it is used, and a bad file ends the program
// with one line and exit status 2.
//
// -DPOT_SHIFT_ONLY multiplies by weights with shifts and additions alone (shift.h). It shows what hardware without a
// multiplier would compute; on a processor it is slower.
//
// Sections: files, JSON, UTF-8, tokenizer, model, products by shifts, generation, command line.

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
#include <utility>

namespace {

using std::string;
using std::string_view;
using std::to_string;

[[noreturn]] void fail(const string& message) { throw std::runtime_error(message); }

// Adds the path of a file to the errors that reading it raises.
template <class Read>
auto in_file(const string& path, const Read& read) {
    try {
        return read();
    } catch (const std::runtime_error& e) {
        fail(path + ": " + e.what());
    }
}

// -----------------------------------------------------------------------------
// Files

// A file in memory, as the system maps it. It is empty if the file is empty, or if it is optional and missing.
class MappedFile {
  public:
    explicit MappedFile(const string& path, bool optional = false) {
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
    string_view text() const { return {static_cast<const char*>(data_), size_}; }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;  // bytes
};

// -----------------------------------------------------------------------------
// JSON, read where it lies. Trees of objects would take many times the memory of a hostile file.

void append_utf8(string& out, uint32_t code) {
    if (code < 0x80) return void(out += char(code));
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
    out += char((0xf00 >> more & 0xff) | code >> 6 * more);
    for (int i = more - 1; i >= 0; i--) out += char(0x80 | (code >> 6 * i & 0x3f));
}

// A value: a part of a JSON text. Values that `parse` and the functions below return have no errors of syntax.
class Json {
  public:
    string_view text;  // from the first to the last byte of the value; empty: there is no such value

    static Json parse(string_view document) {
        const char *end = document.data() + document.size(), *start = blank(document.data(), end);
        const char* last = skip(start, end, 0);
        if (blank(last, end) != end) fail("damaged JSON: something follows its end");
        return {{start, size_t(last - start)}};
    }

    bool is_null() const { return text.empty() || text == "null"; }

    // Calls visit(key, value) for each part of an object or array; keys of an array are empty. False if it is neither.
    template <class Visit>
    bool each(const Visit& visit) const {
        if (text.empty() || (text[0] != '{' && text[0] != '[')) return false;
        const char *p = text.data() + 1, *end = text.data() + text.size() - 1;
        for (p = blank(p, end); p < end; p = blank(p, end)) {
            Json key, value;
            if (text[0] == '{') {
                key = next(&p, end);
                p = blank(blank(p, end) + 1, end);  // the colon
            }
            value = next(&p, end);
            visit(key, value);
            p = blank(p, end) + 1;  // the comma
        }
        return true;
    }

    // The value of a key in an object; empty if this is no object or has no such key.
    Json operator[](string_view name) const {
        Json out;
        if (text.empty() || text[0] != '{') return out;
        const char *p = text.data() + 1, *end = text.data() + text.size() - 1;
        for (p = blank(p, end); p < end; p = blank(p, end)) {
            const Json key = next(&p, end);
            p = blank(blank(p, end) + 1, end);
            out = next(&p, end);
            if (key.equals(name)) return out;
            p = blank(p, end) + 1;
        }
        return {};
    }

    // Is it this text? `value` has no quotes, backslashes or control bytes.
    bool equals(string_view value) const {
        return text.size() == value.size() + 2 && text[0] == '"' && text.substr(1, value.size()) == value;
    }

    bool is_string() const { return !text.empty() && text[0] == '"'; }

    // The text of a string, without quotes and escapes. name is for the error.
    string as_string(const char* name) const {
        if (!is_string()) fail(string(name) + " is missing or no text");
        string out;
        for (size_t i = 1; i < text.size() - 1; i++) {
            if (text[i] != '\\') {
                out += text[i];
                continue;
            }
            const char letter = text[++i];
            const size_t known = string_view("bfnrt").find(letter);
            if (letter != 'u') {
                out += known == string_view::npos ? letter : "\b\f\n\r\t"[known];
                continue;
            }
            uint32_t code = hex(text.substr(i + 1, 4)), low = 0;
            i += 4;
            if (code >> 10 == 0x36 && text.substr(i + 1, 2) == "\\u") low = hex(text.substr(i + 3, 4));
            if (low >> 10 == 0x37) code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff)), i += 6;
            append_utf8(out, code >> 11 == 0x1b ? 0xfffd : code);  // half of a pair is no character
        }
        return out;
    }

    // A whole number from `least` to `most`.
    int64_t as_integer(const char* name, int64_t least, int64_t most) const {
        const size_t start = !text.empty() && text[0] == '-' ? 1 : 0;
        const bool digits = text.size() > start && text.size() < 19 && text.find_first_not_of("0123456789", start) == text.npos;
        const int64_t value = digits ? std::strtoll(string(text).c_str(), nullptr, 10) : least - 1;
        if (value < least || value > most)
            fail(string(name) + " is missing or no whole number from " + to_string(least) + " to " + to_string(most));
        return value;
    }

    double as_number(const char* name) const {
        const bool number = !text.empty() && text.size() < 50 && string_view("-0123456789").find(text[0]) != text.npos;
        const double value = number ? std::strtod(string(text).c_str(), nullptr) : NAN;
        if (!std::isfinite(value)) fail(string(name) + " is missing or no number");
        return value;
    }

    bool as_bool(const char* name) const {
        if (text != "true" && text != "false") fail(string(name) + " is missing or neither true nor false");
        return text == "true";
    }

  private:
    static const char* blank(const char* p, const char* end) {  // behind white space
        while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')) p++;
        return p;
    }

    static Json next(const char** p, const char* end) {
        const char* start = *p;
        *p = skip(start, end, 0);
        return {{start, size_t(*p - start)}};
    }

    static uint32_t hex(string_view digits) { return uint32_t(std::strtoul(string(digits).c_str(), nullptr, 16)); }

    // Returns where the value at p ends. Raises an error of syntax.
    static const char* skip(const char* p, const char* end, int depth) {
        const auto need = [&](bool good) {
            if (!good) fail("damaged JSON");
        };
        need(p < end && depth < 100);
        if (*p == '"') {
            for (p++; p < end && *p != '"'; p++) {
                need(uint8_t(*p) >= 0x20);
                if (*p != '\\') continue;
                need(++p < end && string_view("\"\\/bfnrtu").find(*p) != string_view::npos);
                if (*p != 'u') continue;
                need(end - p > 4 && string_view(p + 1, 4).find_first_not_of("0123456789abcdefABCDEF") == string_view::npos);
                p += 4;
            }
            need(p < end);
            return p + 1;
        }
        if (*p == '{' || *p == '[') {
            const bool object = *p == '{';
            const char close = object ? '}' : ']';
            p = blank(p + 1, end);
            if (p < end && *p == close) return p + 1;
            for (;; p = blank(p + 1, end)) {
                if (object) {
                    need(p < end && *p == '"');
                    p = blank(skip(p, end, depth + 1), end);
                    need(p < end && *p == ':');
                    p = blank(p + 1, end);
                }
                p = blank(skip(p, end, depth + 1), end);
                need(p < end && (*p == close || *p == ','));
                if (*p == close) return p + 1;
            }
        }
        const char* start = p;  // a number, or a word such as true
        while (p < end && (std::isalnum(uint8_t(*p)) || *p == '-' || *p == '+' || *p == '.')) p++;
        need(p > start);
        return p;
    }
};

// -----------------------------------------------------------------------------
// UTF-8

constexpr uint32_t REPLACEMENT = 0xfffd;

// Decodes the code point at p and moves p behind it. Bytes that are no UTF-8 become REPLACEMENT as with Python's
// errors="replace": one for each longest beginning of a code point. *cut: the text ended inside of a code point.
uint32_t decode_utf8(const char** p, const char* end, bool* cut = nullptr) {
    const uint8_t first = uint8_t(*(*p)++);
    if (first < 0x80) return first;
    const int more = first < 0xc2 || first > 0xf4 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    uint8_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;    // bounds of the second byte: no longer form
    uint8_t high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;   // than needed, no surrogate, below 0x110000
    uint32_t code = first & (0x3f >> more);
    for (int i = 0; i < more; i++, low = 0x80, high = 0xbf) {
        if (cut && *p == end) *cut = true;
        if (*p == end || uint8_t(**p) < low || uint8_t(**p) > high) return REPLACEMENT;
        code = code << 6 | (uint8_t(*(*p)++) & 0x3f);
    }
    return more ? code : REPLACEMENT;
}

// Moves `bytes` into valid UTF-8. Unless it is the last part of a text, an unfinished code point stays in `bytes`.
string take_utf8(string& bytes, bool last) {
    string out;
    const char *p = bytes.data(), *end = p + bytes.size(), *start = p;
    for (bool cut = false; p < end; start = p) {
        const uint32_t code = decode_utf8(&p, end, &cut);
        if (cut && !last) break;
        append_utf8(out, code);
    }
    bytes.erase(0, size_t(start - bytes.data()));
    return out;
}

// The bytes of a byte-level token are letters in files: a printable byte is its own letter, the others follow from 256
// on. letter_of[byte] is such a letter.
struct ByteLetters {
    uint32_t letter_of[256];
    int byte_of[324];  // -1: not the letter of a byte

    ByteLetters() {
        std::fill_n(byte_of, 324, -1);
        for (uint32_t b = 0, other = 256; b < 256; b++) {
            const bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
            letter_of[b] = printable ? b : other++;
            byte_of[letter_of[b]] = int(b);
        }
    }
};

// -----------------------------------------------------------------------------
// Tokenizer: byte pairs from a tokenizer.json, or characters.

enum Kind { LETTER, NUMBER, SPACE, OTHER };  // as GPT-2's pattern tells code points apart

template <size_t N>
bool contains(const uint32_t (&ranges)[N][2], uint32_t code) {
    const auto* range = std::upper_bound(ranges, ranges + N, code, [](uint32_t c, const uint32_t* r) { return c < r[0]; });
    return range != ranges && code <= (*(range - 1))[1];
}

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

struct Added {  // a token that is cut out of the text before all else, such as <|endoftext|>
    string content;
    int64_t id;
    bool normalized;  // cut out after the others
};

class Tokenizer {
  public:
    std::vector<int64_t> stops;  // tokens that end a text

    // The tokenizer of a run's folder. meta: "tokenizer" in the model's metadata. vocabulary: of the model.
    Tokenizer(const string& folder, Json meta, int64_t vocabulary) {
        const string kind = meta["tokenizer"].as_string("the kind of its tokenizer");
        if (kind == "char") {
            characters_ = true;
            string chars = meta["chars"].as_string("the characters of its tokenizer");
            letters_ = take_utf8(chars, true);
            const char *p = letters_.data(), *end = p + letters_.size();
            for (const char* start = p; p < end; start = p) {
                decode_utf8(&p, end);
                tokens_.push_back({uint32_t(start - letters_.data()), uint32_t(p - start)});
            }
            sort_tokens();
        } else if (kind == "gpt2" || kind == "file") {
            const MappedFile file(folder + "/tokenizer.json"), config(folder + "/tokenizer_config.json", true);
            const MappedFile generation(folder + "/generation_config.json", true);
            in_file(folder + "/tokenizer.json", [&] { read(Json::parse(file.text())); });
            in_file(folder, [&] { read_stops(config.text(), generation.text()); });
        } else {
            fail("unknown tokenizer: " + kind);
        }
        if (int64_t(tokens_.size()) > vocabulary)
            fail("its tokenizer has more than the " + to_string(vocabulary) + " tokens of the model");
    }

    // Tokens of a text. Bytes that are no UTF-8 count as U+FFFD.
    std::vector<int64_t> encode(string text) const {
        text = take_utf8(text, true);
        std::vector<int64_t> ids = first_;
        if (!characters_) cut(text, false, &ids);
        const char *p = text.data(), *end = p + text.size();
        for (const char* start = p; characters_ && p < end; start = p) {
            decode_utf8(&p, end);
            const int64_t id = find({start, size_t(p - start)});
            if (id < 0) fail("the character " + string(start, p) + " is not in this model's vocabulary");
            ids.push_back(id);
        }
        ids.insert(ids.end(), last_.begin(), last_.end());
        return ids;
    }

    // Bytes of a token, which may be a part of a character. A model may have more rows than tokens: these are empty.
    string bytes(int64_t id) const {
        const string_view text = id < int64_t(tokens_.size()) ? letters(uint32_t(id)) : string_view();
        string out;
        const char *p = text.data(), *end = p + text.size();
        while (!characters_ && p < end) {
            const uint32_t code = decode_utf8(&p, end);
            if (code >= 324 || bytes_.byte_of[code] < 0) return string(text);  // a token that was added as text
            out += char(bytes_.byte_of[code]);
        }
        return characters_ ? string(text) : out;
    }

  private:
    struct Token {
        uint32_t start, length;  // of its letters, in letters_; length 0: no token has this id
    };
    struct Merge {
        uint64_t pair;  // left token << 32 | right token
        uint32_t rank;  // the lowest is merged first
        uint32_t id;    // the token that replaces the pair
    };

    string_view letters(uint32_t id) const { return {letters_.data() + tokens_[id].start, tokens_[id].length}; }

    void sort_tokens() {
        for (uint32_t id = 0; id < tokens_.size(); id++)
            if (tokens_[id].length) sorted_.push_back(id);
        std::sort(sorted_.begin(), sorted_.end(), [&](uint32_t a, uint32_t b) { return letters(a) < letters(b); });
    }

    // The token with these letters, or -1.
    int64_t find(string_view text) const {
        const auto before = [&](uint32_t id, string_view t) { return letters(id) < t; };
        const auto at = std::lower_bound(sorted_.begin(), sorted_.end(), text, before);
        return at != sorted_.end() && letters(*at) == text ? int64_t(*at) : -1;
    }

    void add_token(string_view text, int64_t id) {
        if (id >= int64_t(tokens_.size())) tokens_.resize(size_t(id) + 1, {0, 0});
        if (tokens_[size_t(id)].length || text.empty()) fail("token " + to_string(id) + " is empty or there twice");
        tokens_[size_t(id)] = {uint32_t(letters_.size()), uint32_t(text.size())};
        letters_ += text;
    }

    void read(Json file) {
        const Json model = file["model"], vocabulary = model["vocab"], added = file["added_tokens"];
        const auto plain = [&](Json value) { return value.is_null() || value.text == "false" || value.text == "\"\""; };
        if (!model["type"].equals("BPE") || !plain(model["dropout"]) || !plain(model["byte_fallback"]) ||
            !plain(model["ignore_merges"]) || !plain(model["continuing_subword_prefix"]) ||
            !plain(model["end_of_word_suffix"]) || !file["normalizer"].is_null())
            fail("it is no byte-level BPE as GPT-2 and SmolLM2 have it");
        read_cuts(file["pre_tokenizer"]);
        const int64_t most = int64_t(file.text.size());  // more tokens than bytes are not possible
        letters_.reserve(vocabulary.text.size());
        vocabulary.each([&](Json token, Json id) { add_token(token.as_string("a token"), id.as_integer("an id", 0, most)); });
        sort_tokens();
        for (uint32_t b = 0; b < 256; b++) {
            string letter;
            append_utf8(letter, bytes_.letter_of[b]);
            const int64_t id = find(letter);
            if (id < 0) fail("its vocabulary has no token for the byte " + to_string(b));
            byte_ids_[b] = uint32_t(id);
        }
        size_t count = 0;
        model["merges"].each([&](Json, Json) { count++; });
        merges_.reserve(count);
        model["merges"].each([&](Json, Json merge) { read_merge(merge); });
        std::sort(merges_.begin(), merges_.end(), [](const Merge& a, const Merge& b) {
            return a.pair != b.pair ? a.pair < b.pair : a.rank > b.rank;  // of two equal pairs the last counts
        });
        added.each([&](Json, Json token) {
            for (const char* key : {"single_word", "lstrip", "rstrip"})
                if (!plain(token[key])) fail(string("an added token with ") + key + " is not known here");
            const string content = token["content"].as_string("an added token");
            int64_t id = find(content);
            if (id < 0) add_token(content, id = token["id"].as_integer("the id of an added token", 0, most));
            added_.push_back({content, id, token["normalized"].text == "true"});
        });
        sorted_.clear();
        sort_tokens();
        read_template(file["post_processor"]);
    }

    // How a text is cut into words: by GPT-2's pattern, in SmolLM2 after single digits are cut off.
    void read_cuts(Json cuts) {
        std::vector<Json> steps{cuts};
        if (cuts["type"].equals("Sequence")) {
            steps.clear();
            cuts["pretokenizers"].each([&](Json, Json step) { steps.push_back(step); });
        }
        for (size_t i = 0; i < steps.size(); i++) {
            const Json step = steps[i];
            if (i + 2 == steps.size() && step["type"].equals("Digits") && step["individual_digits"].text == "true")
                digits_ = true;
            else if (i + 1 != steps.size() || i > size_t(digits_) || !step["type"].equals("ByteLevel") ||
                     step["add_prefix_space"].text == "true" || step["use_regex"].text == "false")
                steps.clear();
        }
        if (steps.empty()) fail("it cuts text in another way than GPT-2 and SmolLM2");
    }

    void read_merge(Json merge) {  // "left right" or ["left", "right"]
        std::vector<string> parts;
        if (merge.is_string()) {
            const string both = merge.as_string("a merge");
            const size_t space = both.find(' ');
            if (space != string::npos) parts = {both.substr(0, space), both.substr(space + 1)};
        }
        merge.each([&](Json, Json part) { parts.push_back(part.as_string("a part of a merge")); });
        const int64_t left = parts.size() == 2 ? find(parts[0]) : -1, right = parts.size() == 2 ? find(parts[1]) : -1;
        const int64_t id = left < 0 || right < 0 ? -1 : find(parts[0] + parts[1]);
        if (id < 0) fail("merge " + to_string(merges_.size()) + " is not of two tokens that make a third");
        merges_.push_back({uint64_t(left) << 32 | uint64_t(right), uint32_t(merges_.size()), uint32_t(id)});
    }

    // What a model expects around a text, such as Llama's first token.
    void read_template(Json processor) {
        if (processor.is_null() || processor["type"].equals("ByteLevel")) return;
        if (!processor["type"].equals("TemplateProcessing")) fail("its post_processor is not known here");
        std::vector<int64_t>* around = &first_;
        processor["single"].each([&](Json, Json part) {
            if (!part["Sequence"].is_null()) return void(around = &last_);
            const string name = part["SpecialToken"]["id"].as_string("a token of the template");
            const int64_t id = find(name);
            if (id < 0) fail("its template has a token that it does not know");
            around->push_back(id);
        });
    }

    void read_stops(string_view config_text, string_view generation_text) {
        const auto add = [&](int64_t id) { id >= 0 ? stops.push_back(id) : void(); };
        const Json config = config_text.empty() ? Json() : Json::parse(config_text);
        const Json end = config["eos_token"], content = end.is_string() ? end : end["content"];
        const string eos = content.is_string() ? content.as_string("eos_token") : string();
        add(find(eos));
        for (const string& name : {string("<|endoftext|>"), string("<|end_of_text|>"), eos})
            if (find(name) >= 0) {
                add(find(name));
                break;
            }
        const Json ends = (generation_text.empty() ? Json() : Json::parse(generation_text))["eos_token_id"];
        const auto add_id = [&](Json, Json id) { add(id.as_integer("eos_token_id", 0, 1 << 28)); };
        if (!ends.is_null() && !ends.each(add_id)) add_id({}, ends);
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
            if (normalized)
                append_words(text.substr(0, at), ids);
            else
                cut(text.substr(0, at), true, ids);
            if (!token) return;
            ids->push_back(token->id);
            text.remove_prefix(at + token->content.size());
        }
    }

    void append_words(string_view text, std::vector<int64_t>* ids) const {
        while (!text.empty()) {
            size_t piece = text.size();  // bytes up to the next digit, or of a digit
            if (digits_) {
                const char *p = text.data(), *end = p + piece;
                for (const char* start = p; p < end; start = p) {
                    const uint32_t code = decode_utf8(&p, end);
                    if (!contains(NUMBERS, code) && !contains(NEW_NUMBERS, code)) continue;
                    piece = size_t((start == text.data() ? p : start) - text.data());
                    break;
                }
            }
            for (string_view rest = text.substr(0, piece); !rest.empty();) {
                const size_t length = word_length(rest);
                append_word(rest.substr(0, length), ids);
                rest.remove_prefix(length);
            }
            text.remove_prefix(piece);
        }
    }

    // Byte pair encoding of a word: merges the pair of the lowest rank until no pair is left.
    void append_word(string_view word, std::vector<int64_t>* ids) const {
        std::vector<uint32_t> parts;         // (parts): tokens
        std::vector<const Merge*> merges{};  // (parts - 1): of each token with the next; null: they do not merge
        const auto merge_of = [&](size_t i) -> const Merge* {
            const uint64_t pair = uint64_t(parts[i]) << 32 | parts[i + 1];
            const auto before = [](const Merge& merge, uint64_t p) { return merge.pair < p; };
            const auto at = std::lower_bound(merges_.begin(), merges_.end(), pair, before);
            return at != merges_.end() && at->pair == pair ? &*at : nullptr;
        };
        for (const char c : word) parts.push_back(byte_ids_[uint8_t(c)]);
        for (size_t i = 0; i + 1 < parts.size(); i++) merges.push_back(merge_of(i));
        for (;;) {
            size_t best = merges.size();
            for (size_t i = 0; i < merges.size(); i++)
                if (merges[i] && (best == merges.size() || merges[i]->rank < merges[best]->rank)) best = i;
            if (best == merges.size()) break;
            parts[best] = merges[best]->id;
            parts.erase(parts.begin() + int64_t(best) + 1);
            merges.erase(merges.begin() + int64_t(best));
            if (best < merges.size()) merges[best] = merge_of(best);
            if (best > 0) merges[best - 1] = merge_of(best - 1);
        }
        ids->insert(ids->end(), parts.begin(), parts.end());
    }

    const ByteLetters bytes_;
    bool characters_ = false;            // tokens are characters
    bool digits_ = false;                // single digits are cut off first
    string letters_;                     // of all tokens
    std::vector<Token> tokens_;          // (vocabulary)
    std::vector<uint32_t> sorted_;       // (vocabulary): tokens in the order of their letters
    std::vector<Merge> merges_;          // (merges): in the order of their pairs
    uint32_t byte_ids_[256] = {};        // (256): token of each byte
    std::vector<Added> added_;           // (added tokens)
    std::vector<int64_t> first_, last_;  // tokens before and after every text
};

// -----------------------------------------------------------------------------
// Model: the content of model.safetensors as decode.cpp takes it.

constexpr int64_t MOST = 1 << 28;  // of any size in a model

class Model {
  public:
    Gpt gpt{};
    int64_t vocabulary = 0, context = 0;
    Json tokenizer;  // meta of its tokenizer

    explicit Model(const string& folder) : file_(folder + "/model.safetensors") {
        in_file(folder + "/model.safetensors", [&] { read(); });
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
        Json name, entry;  // entry: {"dtype", "shape", "data_offsets"}
        bool used;
    };

    // A file is 8 bytes with the length of the header, the header in JSON, then the tensors.
    void read() {
        const string_view text = file_.text();
        uint64_t length = 0;
        if (text.size() >= 8) std::memcpy(&length, text.data(), 8);
        if (length < 2 || length > text.size() - 8) fail("it is no safetensors file, or it is truncated");
        const Json header = Json::parse(text.substr(8, length));
        data_ = text.substr(8 + length);
        size_t count = 0;
        header.each([&](Json, Json) { count++; });
        tensors_.reserve(count);
        header.each([&](Json name, Json entry) { tensors_.push_back({name, entry, name.equals("__metadata__")}); });
        const Json nanopot = header["__metadata__"]["nanopot"];
        if (!nanopot.is_string()) fail("it is not of nanoPoT: pass the out_dir of a training run");
        metadata_ = nanopot.as_string("its metadata");
        const Json info = Json::parse(metadata_);
        packed_ = info["packed"], tokenizer = info["tokenizer"];
        if (!packed_["layers"].each([](Json, Json) {}) || info["pot"].is_null())
            fail("it holds float weights: quantize them by train.py --pot_bits=4");
        read_model(info["model_args"]);
        for (const Tensor& t : tensors_)
            if (!t.used) fail("its tensor " + string(t.name.text) + " is not part of such a model");
    }

    void read_model(Json args) {
        const auto size = [&](const char* name) { return args[name].as_integer(name, 1, MOST); };
        const auto choice = [&](const char* name, const char* first, const char* second) {
            if (!args[name].equals(first) && !args[name].equals(second)) fail(string(name) + " is not known here");
            return args[name].equals(second);
        };
        gpt.n_layer = size("n_layer"), gpt.n_head = size("n_head"), gpt.n_kv_head = size("n_kv_head");
        gpt.head_size = size("head_size"), gpt.n_embd = size("n_embd"), gpt.n_inner = size("n_inner");
        vocabulary = size("vocab_size"), context = size("block_size");
        gpt.rms = choice("norm", "layer", "rms"), gpt.gated = choice("mlp", "gelu", "swiglu");
        gpt.norm_eps = float(args["norm_eps"].as_number("norm_eps"));
        const bool rotary = choice("position", "learned", "rotary"), bias = args["bias"].as_bool("bias");
        if (gpt.n_head % gpt.n_kv_head || !(gpt.norm_eps > 0) || (rotary && gpt.head_size % 2))
            fail("n_head must be a multiple of n_kv_head, head_size even and norm_eps above 0");
        const int64_t heads = (gpt.n_head + 2 * gpt.n_kv_head) * gpt.head_size, inner = gpt.n_inner * (1 + gpt.gated);
        gpt.wte = weight("transformer.wte", vocabulary, gpt.n_embd);
        gpt.wpe = rotary ? gpt.wte : weight("transformer.wpe", context, gpt.n_embd);
        gpt.ln_f = norm("transformer.ln_f", bias);
        gpt.lm_head = {weight("lm_head", vocabulary, gpt.n_embd), nullptr};
        const auto linear = [&](const string& name, int64_t rows, int64_t columns, bool has_bias) {
            const float* vector = has_bias ? floats(name + ".bias", rows) : nullptr;
            return GptLinear{weight(name, rows, columns), vector};
        };
        for (int64_t i = 0; i < gpt.n_layer; i++) {
            const string name = "transformer.h." + to_string(i) + ".";
            GptLayer layer{};
            layer.ln_1 = norm(name + "ln_1", bias), layer.ln_2 = norm(name + "ln_2", bias);
            layer.c_attn = linear(name + "attn.c_attn", heads, gpt.n_embd, args["qkv_bias"].as_bool("qkv_bias"));
            layer.attn_c_proj = linear(name + "attn.c_proj", gpt.n_embd, gpt.n_head * gpt.head_size, bias);
            layer.c_fc = linear(name + "mlp.c_fc", inner, gpt.n_embd, bias);
            layer.mlp_c_proj = linear(name + "mlp.c_proj", gpt.n_embd, gpt.n_inner, bias);
            layers_.push_back(layer);
        }
        gpt.layers = layers_.data();
        if (rotary) read_frequencies(args["rope_theta"].as_number("rope_theta"), args["rope_scaling"]);
    }

    // Radians a position for each pair of features. Llama 3's scaling slows the pairs that turn less than once in the
    // original context.
    void read_frequencies(double theta, Json scaling) {
        if (!(theta > 0)) fail("rope_theta must be above 0");
        for (int64_t i = 0; i < gpt.head_size; i += 2) {
            float frequency = 1 / std::pow(float(theta), float(i) / float(gpt.head_size));
            if (!scaling.is_null()) {
                const auto number = [&](const char* name) { return float(scaling[name].as_number(name)); };
                const float factor = number("factor"), low = number("low_freq_factor"), high = number("high_freq_factor");
                const float original = number("original_max_position_embeddings");
                if (!(factor > 0 && 0 < low && low < high && original > 0)) fail("rope_scaling must be positive");
                const float turns = original * frequency / float(2 * M_PI);
                const float kept = std::min(1.0f, std::max(0.0f, (turns - low) / (high - low)));
                frequency *= kept + (1 - kept) / factor;
            }
            frequencies_.push_back(frequency);
        }
        gpt.frequencies = frequencies_.data();
    }

    // Data of a tensor. Checks its dtype, its shape and its place in the file.
    const char* tensor(string name, const char* dtype, int64_t item, std::initializer_list<int64_t> expected) {
        const Json alias = packed_["aliases"][name];
        if (!alias.is_null()) name = alias.as_string("an alias");
        const auto t = std::find_if(tensors_.begin(), tensors_.end(), [&](const Tensor& t) { return t.name.equals(name); });
        if (t == tensors_.end()) fail(name + " is missing");
        t->used = true;
        string shape, wanted;
        int64_t size = item, place[2] = {}, n = 0;
        t->entry["shape"].each([&](Json, Json length) { shape += to_string(length.as_integer("a shape", 0, INT64_MAX)) + ", "; });
        for (const int64_t length : expected) {
            wanted += to_string(length) + ", ";
            if (__builtin_mul_overflow(size, length, &size)) fail(name + " cannot be that large");
        }
        t->entry["data_offsets"].each([&](Json, Json at) { place[n++ > 0] = at.as_integer("an offset", 0, int64_t(data_.size())); });
        if (!t->entry["dtype"].equals(dtype) || shape != wanted)
            fail(name + " is not " + dtype + " of shape " + wanted + "as its settings say");
        if (n != 2 || place[1] - place[0] != size || reinterpret_cast<uintptr_t>(data_.data() + place[0]) % size_t(item))
            fail(name + " does not lie in the file as its header says");
        return data_.data() + place[0];
    }

    const float* floats(const string& name, int64_t n) {
        return reinterpret_cast<const float*>(tensor(name, "F32", 4, {n}));
    }

    GptNorm norm(const string& name, bool bias) {
        return {floats(name + ".weight", gpt.n_embd), bias && !gpt.rms ? floats(name + ".bias", gpt.n_embd) : nullptr};
    }

    // A packed weight (rows, columns), as pot.py's packed_state writes it.
    PotWeight weight(const string& name, int64_t rows, int64_t columns) {
        const Json layer = packed_["layers"][name];
        if (layer.is_null()) fail(name + " is not packed: this program takes models whose layers all are");
        if (!layer["dtype"].equals("float32")) fail(name + " is not of float32");
        const int64_t number = layer["config"].as_integer("config", 0, MOST);
        Json config;
        int64_t i = 0;
        packed_["configs"].each([&](Json, Json c) { i++ == number ? void(config = c) : void(); });
        const Json grid = config["grid"];
        const int64_t bits = config["bits"].as_integer("bits", 3, 8), terms = config["terms"].as_integer("terms", 1, 2);
        const bool uniform = grid.equals("uniform"), paper = grid.equals("paper");
        if ((bits > 4 && bits < 8) || (bits == 8 && !uniform) || (!uniform && !paper && !grid.equals("pot")) ||
            !config["layout"].equals("tiles-16"))
            fail(name + " has weights that this program does not know: it takes 3, 4 and uniform 8 bits");
        const int64_t half = 1 << (bits - 1), full = half - 1;  // codes without a sign, and levels above 0
        const Json range = config["range"];
        int64_t top = range.is_null() ? full : range.as_integer("range", 1, full - paper) + paper;
        if (!range.is_null() && (uniform || terms == 2)) fail(name + " has a range, which its grid has not");

        PotWeight w{};
        w.rows = rows, w.columns = columns, w.bits = int32_t(bits), w.groups = 1;
        for (int64_t code = 0; code < 2 * half && bits < 8; code++) {
            const int64_t index = std::min(code % half, uniform || terms == 2 ? full : top);
            const int64_t two = index < 2 ? index : (2 + index % 2) << (index / 2 - 1);
            const int64_t level = uniform ? index : terms == 2 ? two : index ? 1 << (index - 1) : 0;
            w.table[code] = int8_t(code < half ? level : -level);
        }
        if (config["granularity"].equals("group")) {
            const int64_t size = config["group_size"].as_integer("group_size", 1, columns);
            if (columns % size) fail(name + ": its groups do not divide its columns");
            w.groups = columns / size;
        }
        const int64_t blocks = (rows + 15) / 16, width = tile_columns(w);
        const char* codes = tensor(name + ".packed.codes", "U8", 1, {blocks, (columns + width - 1) / width * tile_bytes(w)});
        w.codes = reinterpret_cast<const uint8_t*>(codes);
        read_units(name + ".packed.unit", !config["granularity"].equals("tensor") && rows > 1, blocks, &w);
        w.activations = config["act_bits"].is_null() ? 2 : 1;
        if (w.activations == 1) {
            row_sums_.emplace_back(size_t(rows));
            pot_row_sums(&w, row_sums_.back().data());
            w.row_sums = row_sums_.back().data();
        }
        return w;
    }

    void read_units(const string& name, bool per_row, int64_t blocks, PotWeight* w) {
        const Json alias = packed_["aliases"][name];
        const string source = alias.is_null() ? name : alias.as_string("an alias");
        for (const Tensor& t : tensors_)
            if (t.name.equals(source)) w->unit_is_half = t.entry["dtype"].equals("F16");
        const char* dtype = w->unit_is_half ? "F16" : "F32";
        const int64_t item = w->unit_is_half ? 2 : 4, n = per_row ? blocks * w->groups * 16 : w->groups;
        w->unit_per_row = per_row;
        w->unit = per_row ? tensor(name, dtype, item, {blocks, w->groups, 16}) : tensor(name, dtype, item, {1, w->groups});
        for (int64_t i = 0; i < n; i++) {
            const uint16_t* halves = static_cast<const uint16_t*>(w->unit);
            const float* singles = static_cast<const float*>(w->unit);
            const bool good = w->unit_is_half ? halves[i] > 0 && halves[i] < 0x7c00 : singles[i] > 0 && singles[i] < INFINITY;
            if (!good) fail(name + " holds a value that is no positive number");
        }
    }

    const MappedFile file_;
    string_view data_;             // of all tensors
    string metadata_;              // JSON of the model, without the escapes of the header
    Json packed_;                  // a part of it: metadata of pot.py's packed_state
    std::vector<Tensor> tensors_;  // (tensors): where they are
    std::vector<GptLayer> layers_;
    std::vector<float> frequencies_;           // (head_size / 2), if rotary
    std::vector<std::vector<float>> row_sums_;  // (weights with activations of 8 bits per row; rows)
    std::unique_ptr<uint16_t[]> cache_;        // (n_layer, 2, n_kv_head, capacity, head_size) float16
};

// -----------------------------------------------------------------------------
// Generation

// Draws a token from the top_k most likely ones of logits (vocabulary); temperature 0: the most likely one.
int64_t draw(const std::vector<float>& logits, double temperature, int64_t top_k, std::mt19937_64& random) {
    if (temperature == 0) return std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::vector<int32_t> order(logits.size());
    std::vector<double> sums;  // (top_k): of the probabilities up to a token
    std::iota(order.begin(), order.end(), 0);
    order.resize(size_t(std::min(top_k, int64_t(order.size()))));
    const auto more = [&](int32_t a, int32_t b) { return logits[size_t(a)] > logits[size_t(b)]; };
    std::vector<int32_t> all(logits.size());
    std::iota(all.begin(), all.end(), 0);
    std::partial_sort_copy(all.begin(), all.end(), order.begin(), order.end(), more);
    for (const int32_t id : order) {
        const double share = std::exp((logits[size_t(id)] - logits[size_t(order[0])]) / temperature);
        sums.push_back(share + (sums.empty() ? 0 : sums.back()));
    }
    const double place = double(random() >> 11) * 0x1p-53 * sums.back();  // 53 random bits: the same on every machine
    const size_t i = size_t(std::upper_bound(sums.begin(), sums.end(), place) - sums.begin());
    return order[std::min(i, order.size() - 1)];
}

struct Settings {  // as sample.py has them
    string ckpt = "out", prompt = "\n", prompt_file;
    int64_t max_new_tokens = 500, top_k = 200, seed = 1337, threads = 0;
    double temperature = 0.8;
};

// Calls visit(token) for each token that follows ids, until it returns false. Beyond the context, the window slides and
// is computed anew for each token.
template <class Visit>
void generate(Model& model, std::vector<int64_t> ids, const Settings& s, const Visit& visit) {
    std::vector<float> logits(size_t(model.vocabulary));
    std::mt19937_64 random{uint64_t(s.seed)};
    model.allocate(std::min(model.context, int64_t(ids.size()) + s.max_new_tokens));
    for (int64_t i = 0, done = 0; i < s.max_new_tokens; i++) {
        const int64_t n = int64_t(ids.size()), from = n > model.context ? n - model.context : done;
        const int64_t position = n > model.context ? 0 : from;
        gpt_decode(&model.gpt, ids.data() + from, n - from, position, logits.data(), int(s.threads));
        done = n;
        for (const float logit : logits)
            if (!std::isfinite(logit)) fail("the model's logits are not finite: its file is damaged, or its training diverged");
        ids.push_back(draw(logits, s.temperature, s.top_k, random));
        if (!visit(ids.back())) return;
    }
}

// -----------------------------------------------------------------------------
// Command line

const char* const USAGE =
    "usage: run [--key=value ...]\n\n"
    "  --ckpt=out              folder of a packed model\n"
    "  --prompt=TEXT           the text to continue\n"
    "  --prompt_file=FILE      a file with the prompt, instead\n"
    "  --max_new_tokens=500    most tokens of the text, which ends earlier at an end-of-text token\n"
    "  --temperature=0.8       0: always the most likely token; higher: more surprising\n"
    "  --top_k=200             draw from this many most likely tokens\n"
    "  --seed=1337             same seed, same text\n"
    "  --threads=0             threads; 0: one for each core\n";

Settings read_settings(int count, char** words) {
    Settings s;
    for (int i = 1; i < count; i++) {
        const string word = words[i];
        const size_t equals = word.find('=');
        const string key = word.substr(0, equals);
        if (equals == string::npos && i + 1 == count) fail(word + " needs a value: " + word + "=...");
        const string value = equals == string::npos ? words[++i] : word.substr(equals + 1);
        const auto integer = [&](int64_t least) { return Json{value}.as_integer(key.c_str(), least, INT64_MAX); };
        if (key == "--ckpt") s.ckpt = value;
        else if (key == "--prompt") s.prompt = value;
        else if (key == "--prompt_file") s.prompt_file = value;
        else if (key == "--max_new_tokens") s.max_new_tokens = integer(1);
        else if (key == "--temperature") s.temperature = Json{value}.as_number(key.c_str());
        else if (key == "--top_k") s.top_k = integer(1);
        else if (key == "--seed") s.seed = integer(0);
        else if (key == "--threads") s.threads = integer(0);
        else fail("unknown setting " + key + ": --help lists them");
    }
    if (!(s.temperature >= 0)) fail("--temperature must be at least 0");
    if (!s.prompt_file.empty()) s.prompt = MappedFile(s.prompt_file).text();
    if (s.prompt.empty()) fail("the prompt is empty: pass at least one character");
    if (s.threads == 0) s.threads = std::max(1u, std::thread::hardware_concurrency());
    return s;
}

void write_text(const Settings& s) {
    const char* name = std::getenv("NANOPOT_KERNEL");
    if (name && *name && pot_choose(name)) fail(string("NANOPOT_KERNEL: this machine has ") + pot_instruction_sets());
    Model model(s.ckpt);
    const Tokenizer tokenizer(s.ckpt, model.tokenizer, model.vocabulary);
    string pending = s.prompt;  // bytes that are not written yet
    int64_t count = 0;
    const auto write = [&](bool last) {
        const string text = take_utf8(pending, last);
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    };
    write(true);
    const auto start = std::chrono::steady_clock::now();
    generate(model, tokenizer.encode(s.prompt), s, [&](int64_t id) {
        count++;
        if (std::count(tokenizer.stops.begin(), tokenizer.stops.end(), id)) return false;
        pending += tokenizer.bytes(id);
        write(false);
        return true;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    pending += '\n';
    write(true);
    std::fprintf(stderr, "--- %lld tokens, %.0f tokens/s, %s\n", static_cast<long long>(count),
                 double(count) / seconds.count(), s.ckpt.c_str());
}

}  // namespace

int main(int count, char** words) {
    if (count > 1 && (string(words[1]) == "--help" || string(words[1]) == "-h")) return std::printf("%s", USAGE) < 0;
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
