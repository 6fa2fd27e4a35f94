// The parts of run.cpp for test_run.py and fuzz_run.py. The first word of the command line says which.

#define main program
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

int main(int count, char** words) {
    const string part = words[1];
    if (part == "fuzz") {  // runs the program for each folder of standard input; writes status and memory to stderr
        for (string folder; std::getline(std::cin, folder);) {
            string values[] = {"run", "--ckpt=" + folder, "--max_new_tokens=3", "--threads=1"};
            char* arguments[] = {&values[0][0], &values[1][0], &values[2][0], &values[3][0]};
            const size_t before = peak = bytes;
            const int status = program(4, arguments);
            std::fprintf(stderr, "done %d %zu\n", status, peak - before);
        }
        return 0;
    }
    const Model model(words[2]);
    const Tokenizer tokenizer(words[2], model.tokenizer, model.vocabulary);
    const string text((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    if (part == "encode") {  // texts end with a zero byte
        for (size_t start = 0, end; (end = text.find('\0', start)) != string::npos; start = end + 1) {
            for (const int64_t id : tokenizer.encode(text.substr(start, end - start))) std::cout << id << ' ';
            std::cout << '\n';
        }
    } else if (part == "decode") {  // ids, to bytes
        const char* p = text.c_str();
        for (char* end; *p; p = end) std::cout << tokenizer.bytes(std::strtoll(p, &end, 10));
    } else if (part == "draw") {  // temperature top_k draws: how often each token is drawn, with logits 0, 1, 2, ... / 4
        std::vector<float> logits(20);
        for (size_t i = 0; i < 20; i++) logits[i] = float(i * 7 % 20) / 4;
        std::vector<int> counts(20);
        std::mt19937_64 random{1};
        for (int i = 0; i < std::atoi(words[5]); i++)
            counts[size_t(draw(logits, std::atof(words[3]), std::atoll(words[4]), random))]++;
        for (const int n : counts) std::cout << n << ' ';
    } else if (part == "generate") {  // folder tokens threads: greedy tokens, and the last logits to the bit
        Model again(words[2]);
        Settings s;
        s.temperature = 0, s.max_new_tokens = std::atoll(words[3]), s.threads = std::atoll(words[4]);
        generate(again, tokenizer.encode(text), s, [&](int64_t id) {
            std::cout << id << ' ';
            return true;
        });
    }
}
