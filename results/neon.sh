#!/bin/sh
# Products with 4-bit weights on ARM, ours and llama.cpp's. This is analysis, not measurement: we have no ARM processor.
# Each kernel runs once under emulation, which says which instructions it executes. llvm-mca estimates their cycles from
# its model of the processor, with all data in the first cache and no wrong predictions.
# Needs g++-aarch64-linux-gnu, qemu-user and LLVM 17 or newer, as older ones have no model of Neoverse N1. Cortex-A76 has
# almost the same core, but llvm-mca's model of it is that of the Cortex-A57 of 2015, in which a look-up takes three
# times as long.
# The arguments are llama.cpp's sources and llvm-mca. Takes a minute. CXX is the compiler, POT the kernel's file.
#     sh results/neon.sh llama.cpp llvm-mca-19
set -eu
ggml=$(realpath "$1")/ggml
mca=${2:-llvm-mca}
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cat > "$out/run.cpp" <<'CPP'
// Runs the kernel that argument 1 names: 64 rows of 1024 weights, in groups of 64, all zero. Argument 2: rows of x.
#include POT
#include <cstdlib>
using Kernel = void(int columns, float* y, size_t stride, const void* w, const void* x, int n, int rows);
extern "C" {
Kernel ggml_gemv_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x4_q8_0, ggml_gemv_iq4_nl_4x4_q8_0, ggml_gemm_iq4_nl_4x4_q8_0;
void ggml_vec_dot_q4_0_q8_0(int, float*, size_t, const void*, size_t, const void*, size_t, int);
float ggml_table_f32_f16[1 << 16];
}
constexpr int64_t ROWS = 64, COLUMNS = 1024;
alignas(64) char weight[ROWS * COLUMNS], x[16 * COLUMNS * 2];
float y[16 * ROWS];
void vec_dot(int columns, float* y, size_t, const void* w, const void* x, int, int rows) {
    for (int r = 0; r < rows; r++)
        ggml_vec_dot_q4_0_q8_0(columns, y + r, 0, static_cast<const char*>(w) + r * columns / 32 * 18, 0, x, 0, 1);
}
extern "C" __attribute__((noinline)) void measured(Kernel* kernel, const Job& job) {
    kernel ? kernel(COLUMNS, y, ROWS, weight, x, int(job.n), ROWS) : product<Neon>(job, 0, ROWS / 16);
}
int main(int, char** argument) {
    const std::string name = argument[1];
    PotWeight w{};
    w.codes = reinterpret_cast<uint8_t*>(weight), w.unit = weight, w.rows = ROWS, w.columns = COLUMNS;
    w.groups = COLUMNS / 64, w.bits = 4, w.unit_per_row = w.unit_is_half = 1, w.activations = 2;
    Rows8 rows;
    rows.reset(w, std::atoi(argument[2]), Neon::UNSIGNED);
    measured(name == "vec_dot"     ? vec_dot
             : name == "gemv"      ? ggml_gemv_q4_0_4x4_q8_0
             : name == "gemm"      ? ggml_gemm_q4_0_4x4_q8_0
             : name == "gemv_look" ? ggml_gemv_iq4_nl_4x4_q8_0
             : name == "gemm_look" ? ggml_gemm_iq4_nl_4x4_q8_0
                                   : nullptr,
             {&w, nullptr, nullptr, std::atoi(argument[2]), 0, &rows, y, ROWS});
}
CPP
pot=$(realpath "${POT:-pot_kernel/pot.cpp}")
flags="-O3 -mcpu=cortex-a76 -ffunction-sections -D_GNU_SOURCE -I$ggml/include -I$ggml/src -I$ggml/src/ggml-cpu"
aarch64-linux-gnu-gcc $flags -c "$ggml/src/ggml-cpu/arch/arm/quants.c" -o "$out/quants.o"
aarch64-linux-gnu-g++ $flags -c "$ggml/src/ggml-cpu/arch/arm/repack.cpp" -o "$out/repack.o"
${CXX:-aarch64-linux-gnu-g++} $flags -std=c++17 -DPOT="\"$pot\"" -c "$out/run.cpp" -o "$out/run.o"
aarch64-linux-gnu-g++ -static -pthread -Wl,--gc-sections "$out"/*.o -o "$out/run"
OUT=$out MCA=$mca CXX=${CXX:-aarch64-linux-gnu-g++} python - <<'PYTHON'
import json, os, re, subprocess
from machine import provenance

def text(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

out, mca = os.environ["OUT"], os.environ["MCA"]
program, instructions = out + "/run", {}  # address -> instruction as llvm-mca reads it
for line in text("aarch64-linux-gnu-objdump", "-d", program).splitlines():
    if match := re.match(r"\s+([0-9a-f]+):\s+[0-9a-f]{8}\s+(.*)", line):
        code = re.sub(r"\s*//.*", "", match[2].replace("\t", " "))
        code = re.sub(r"(?<![#\w])(0x)?[0-9a-f]+ <.*>", "#8", code)
        code = re.sub(r"^adrp (\w+),.*", r"adr \1, #8", code)
        # llvm-mca would take 100 cycles for a call
        instructions[int(match[1], 16)] = re.sub(r"^(bl|blr|br|ret)\b.*", "b #8", code)
    elif match := re.match(r"([0-9a-f]+) <measured>:", line):
        start = int(match[1], 16)

KERNELS = [("nanoPoT", "pot", (1, 4, 16)), ("llama.cpp Q4_0, ggml_vec_dot", "vec_dot", (1,)),
           ("llama.cpp Q4_0, repacked 4x4", "gemv", (1,)), ("llama.cpp Q4_0, repacked 4x4", "gemm", (4, 16)),
           ("llama.cpp IQ4_NL, repacked 4x4", "gemv_look", (1,)), ("llama.cpp IQ4_NL, repacked 4x4", "gemm_look", (4, 16))]
rows = []
print("per 1,000 multiplications; cycles and micro-ops are estimates")
widths = (10, 14, 11, 9, 12, 10)
heads = ("rows of x", "instructions", "N1 cycles", "N1 uops", "A76 cycles", "A76 uops")
print(f"{'kernel':<32}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths)))
for title, name, counts in KERNELS:
    for n in counts:
        span = f"{min(instructions):#x}..{max(instructions):#x}"
        text("qemu-aarch64", "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-dfilter", span, "-D", out + "/log",
             program, name, str(n))  # fmt: skip
        with open(out + "/log") as f:
            addresses = [int(line.split("/")[1], 16) for line in f if line.startswith("Trace")]
        first = addresses.index(start)
        last = addresses.index(addresses[first - 1] + 4, first)  # back behind the call
        with open(out + "/trace.s", "w") as f:
            f.writelines(instructions[a] + "\n" for a in addresses[first:last])
        thousands = 64 * 1024 * n / 1000
        row = {"kernel": title, "rows_of_x": n, "instructions": (last - first) / thousands}
        for cpu in ("neoverse-n1", "cortex-a76"):
            report = text(mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=1", "-instruction-info=false",
                          "-resource-pressure=false", out + "/trace.s")  # fmt: skip
            for key, words in (("cycles", "Total Cycles"), ("uops", "Total uOps")):
                row[f"{cpu} {key}"] = int(re.search(rf"{words}:\s+(\d+)", report)[1]) / thousands
        rows.append(row)
        figures = list(row.values())[1:]
        print(f"{title:<32}" + "".join(f"{v:>{width}.0f}" for v, width in zip(figures, widths)), flush=True)
version = {
    "compiler": text(os.environ["CXX"].split()[0], "--version").splitlines()[0],
    "llvm_mca": re.search(r"LLVM version \S+", text(mca, "--version"))[0],
    "qemu": text("qemu-aarch64", "--version").splitlines()[0],
}
with open("results/neon.json", "w") as f:
    note = "analysis with llvm-mca, per 1,000 multiplications; not measured on a processor"
    command = "sh results/neon.sh llama.cpp llvm-mca-19"
    json.dump({"note": note, "rows": rows, **version, **provenance(), "command": command}, f, indent=1)
print("written to results/neon.json")
PYTHON
