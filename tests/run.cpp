// run.cpp and its parts for test_run.py and fuzz_run.py: run PART [...]. Texts on standard input have their number of
// bytes and a line end before them. One program serves all tests, because a build takes longer than they do.
//
// -DGUIDED makes a program of libFuzzer instead, for fuzz_run.py --guided.

#include <memory>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if defined(GUIDED)
namespace {
std::vector<std::unique_ptr<char[]>> contents;  // of files, each of exactly its size: the sanitizer sees accesses beyond

void* read_exactly(int file, size_t size) {
    contents.emplace_back(new char[size]);
    return read(file, contents.back().get(), size) == ssize_t(size) ? contents.back().get() : MAP_FAILED;
}
}  // namespace
#define mmap(place, size, protection, flags, file, offset) read_exactly(file, size)
#endif

#define POT_SHIFT_ONLY
#define main run
#include "../pot_kernel/run.cpp"
#undef main

#include <fstream>
#include <iostream>
#include <malloc.h>
#include <new>

namespace {
int run_folder(const string& folder) {
    string words[] = {"run", "--ckpt=" + folder, "--max_new_tokens=3", "--threads=1"};
    char* pointers[] = {&words[0][0], &words[1][0], &words[2][0], &words[3][0]};
    return run(4, pointers);
}
}  // namespace

#if defined(GUIDED)
// The first byte chooses a file of the model, the others are its content.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const string folder = std::getenv("GUIDED_FOLDER");
    if (!size) return -1;
    const bool model = data[0] == 'm';
    const string place = folder + (model ? "/model" : "/tokenizer");
    std::ofstream(place + (model ? "/model.safetensors" : "/tokenizer.json"), std::ios::binary)
        .write(reinterpret_cast<const char*>(data) + 1, std::streamsize(size - 1));
    contents.clear();
    run_folder(place);
    return 0;
}
#else

namespace {
size_t bytes = 0, peak = 0;  // of memory that `new` allocated
}

void* operator new(size_t size) {
    void* p = std::malloc(size);
    if (!p) throw std::bad_alloc();
    bytes += malloc_usable_size(p);
    peak = std::max(peak, bytes);
    return p;
}

void operator delete(void* p) noexcept {
    bytes -= p ? malloc_usable_size(p) : 0;
    std::free(p);
}

void operator delete(void* p, size_t) noexcept { operator delete(p); }

// Runs the program for each folder of standard input. Writes its status and its memory to standard error.
int fuzz() {
    for (string folder; std::getline(std::cin, folder);) {
        const size_t before = peak = bytes;
        const int status = run_folder(folder);
        std::fprintf(stderr, "done %d %zu\n", status, peak - before);
    }
    return 0;
}

int main(int count, char** words) {
    const string part = words[1];
    if (part == "fuzz") return fuzz();
    if (part == "text") return run(count - 1, words + 1);  // by shifts
    if (part == "draw") {  // TEMPERATURE TOP_K DRAWS: how often each of 20 tokens is drawn
        std::vector<float> logits(20);
        std::vector<int> counts(20);
        for (size_t i = 0; i < 20; i++) logits[i] = float(i * 7 % 20) / 4;
        std::mt19937_64 random{1};
        for (int i = 0; i < std::atoi(words[4]); i++)
            counts[size_t(draw(logits, std::atof(words[2]), std::atoll(words[3]), random))]++;
        for (const int n : counts) std::cout << n << ' ';
        return 0;
    }
    Model model(words[2]);
    const Tokenizer tokenizer(words[2]);
    for (string length; std::getline(std::cin, length); std::cout << '\n') {
        string text(size_t(std::stoll(length)), '\0');
        std::cin.read(&text[0], int64_t(text.size()));
        const std::vector<int64_t> ids = tokenizer.encode(text);
        if (part == "encode") {  // tokens, then their text in hexadecimal digits
            string back;
            for (const int64_t id : ids) std::cout << id << ' ', back += tokenizer.token(id);
            for (const char c : back) std::cout << "0123456789abcdef"[uint8_t(c) / 16] << "0123456789abcdef"[uint8_t(c) % 16];
        } else {  // TOKENS THREADS: greedy tokens by the best instruction set, or by shifts
            Settings s;
            if (part == "shifts") chosen = &shifts;
            s.temperature = 0, s.max_new_tokens = std::atoll(words[3]), s.threads = std::atoll(words[count - 1]);
            generate(model, ids, s, [](int64_t id) { return bool(std::cout << id << ' '); });
        }
    }
}
#endif
