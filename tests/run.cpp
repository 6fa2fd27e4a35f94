// run.cpp and its parts for test_run.py and fuzz_run.py: run PART [...]. Texts on standard input have their number of
// bytes and a line end before them. One program serves all tests, because a build takes longer than they do.

#define POT_SHIFT_ONLY
#define main run
#include "../pot_kernel/run.cpp"
#undef main

#include <iostream>
#include <malloc.h>
#include <new>

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
        string words[] = {"run", "--ckpt=" + folder, "--max_new_tokens=3", "--threads=1"};
        char* pointers[] = {&words[0][0], &words[1][0], &words[2][0], &words[3][0]};
        const size_t before = peak = bytes;
        const int status = run(4, pointers);
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
