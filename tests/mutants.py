"""
Breaks the kernel in one place at a time and runs tests/kernel.cpp, which must fail. A mutant that passes shows code that
no test asks for.

    python tests/mutants.py
    python tests/mutants.py --only=barrier  # mutants whose kind, file or name holds a text

The needs are those of the tests that it runs: a compiler with sanitizers, and SIMDe (Debian's libsimde-dev) for the kind
"emulated". The script ends with an error if a mutant passes, or if tests/kernel.cpp fails on the unbroken kernel.

All mutants are compiled at once, as `mutant == 7 ? (broken) : (whole)`, because compiling takes longer than most tests.
The environment variable MUTANT chooses one.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import run

ROOT = Path(__file__).parent.parent
KINDS = {  # flags of the compiler, argument of the program, limit in seconds of processor time
    "portable": ([], "portable", 120),
    "native": (["-march=native"], "", 120),
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "portable", 240),
    "threads": (["-fsanitize=thread"], "threads", 30),
    "emulated": (["-DPOT_EMULATE", "-Wno-psabi"], "amx avx512 avxvnni", 240),
}
CHOICE = (
    "#include <cstdlib>\nnamespace {\n"
    'const int mutant = std::getenv("MUTANT") ? std::atoi(std::getenv("MUTANT")) : 0;\n}\n'
)


@dataclass
class Mutant:
    name: str
    kind: str  # the part of the tests that must notice it, a key of KINDS
    place: str  # text that stands in the file once; « and » enclose the expression or statement to break
    broken: str  # what replaces it
    file: str = "pot.cpp"


@dataclass
class Settings:
    only: str = ""


def main(s: Settings):
    passed = total = 0
    for kind in KINDS:
        chosen = {i: m for i, m in enumerate(MUTANTS, 1) if m.kind == kind and s.only in f"{kind} {m.file} {m.name}"}
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            build(folder, kind)
            if failure := test(folder, kind, 0):
                raise ValueError(f"{kind}: tests/kernel.cpp fails on the unbroken kernel: {failure}")
            print(f"{kind}: the unbroken kernel passes", flush=True)
            for i, m in chosen.items():
                failure = test(folder, kind, i)
                print(f"{kind}, mutant {i}, {m.name}: {failure or 'PASSES'}", flush=True)
                passed, total = passed + (not failure), total + 1
    if passed or not total:
        raise ValueError(f"{passed} of {total} mutants pass")
    print(f"the tests notice all {total} mutants")


def mutate(file: str) -> str:
    """The text of a file of pot_kernel/ with all of its mutants, which `mutant` chooses from."""
    text, changes = (ROOT / "pot_kernel" / file).read_text(), []
    for i, m in enumerate(MUTANTS, 1):
        if m.file != file:
            continue
        (before, whole, _), place = m.place.replace("»", "«").split("«"), m.place.replace("«", "").replace("»", "")
        if text.count(place) != 1:
            raise ValueError(f"{m.name}: {file} holds {text.count(place)} times, not once: {place}")
        start = text.index(place) + len(before)
        statement = whole.endswith(";")
        new = f"if (mutant == {i}) {{ {m.broken} }} else {{ {whole} }}"
        changes.append((start, start + len(whole), new if statement else f"(mutant == {i} ? ({m.broken}) : ({whole}))"))
    changes.sort(reverse=True)
    for (start, end, new), following in zip(changes, [(len(text),), *changes]):
        if end > following[0]:
            raise ValueError(f"two mutants of {file} change the same text: {new}")
        text = text[:start] + new + text[end:]
    return text


def build(folder: str, kind: str):
    """Builds tests/kernel.cpp with all mutants in a folder."""
    for name in ("pot_kernel", "tests"):
        os.mkdir(os.path.join(folder, name))
    Path(folder, "pot_kernel", "pot.cpp").write_text(CHOICE + mutate("pot.cpp"))
    Path(folder, "pot_kernel", "decode.cpp").write_text(mutate("decode.cpp"))
    shutil.copy(ROOT / "tests" / "kernel.cpp", os.path.join(folder, "tests"))
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "c++")
    command = [compiler, "-O1", *KINDS[kind][0], "-std=c++17", "-pthread", "tests/kernel.cpp", "-o", "kernel"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if built.returncode:
        errors = [line for line in built.stderr.splitlines() if "error" in line] or [built.stderr]
        raise ValueError(f"{kind}: tests/kernel.cpp does not compile: {errors[0]}")


def test(folder: str, kind: str, mutant: int) -> str:
    """Runs the program that `build` built. Returns how it fails, or "" if it passes."""
    _, argument, seconds = KINDS[kind]
    done = subprocess.run(
        [os.path.join(folder, "kernel"), *filter(None, [argument])],
        capture_output=True, text=True, errors="replace", env=os.environ | {"MUTANT": str(mutant)},
        # A mutant may never end. Threads that wait spin, so a hang takes processor time.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),
    )  # fmt: skip
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.splitlines() if "Sanitizer: " in line or "runtime error" in line]
    lines += [line for line in done.stdout.splitlines() if not line.endswith("passes")]
    return lines[0][:150] if lines else f"exit {done.returncode}"


DECODE = "decode.cpp"
MUTANTS = [
    # Layout and units
    Mutant("tiles are rounded down", "portable", "tiles = «(w.columns + width - 1) / width»;", "w.columns / width"),
    Mutant("float16 loses its sign", "portable", "«(half & 0x8000u) << 16» | (half", "0"),
    Mutant("unit_at takes the first group", "portable", "(row / 16 * w.groups + «group») * 16", "0"),
    Mutant("level_at takes low nibbles only", "portable", "+ c % 4] >> «(c & 4)» & 15]", "0"),
    Mutant("level_at takes another high bit", "portable", "p[128 + lane + c % 4] >> «c / 4» & 1;", "c / 8"),
    Mutant("a row keeps its first unit", "portable", "if («c % size == 0») unit", "c == 0"),
    Mutant("units of one lane serve all", "portable", "* 16 + «h * int(sizeof(typename V::F) / 4)»;", "0"),
    # Activations
    Mutant("range of a row without its tail", "portable", "for (; «c < columns»; c++) {\n        low[0]", "c + 1 < columns"),
    Mutant("range of a row in 256 steps", "portable", "std::max((high[0] - low[0]) / «255», 0x1p-126f)", "256"),
    Mutant("the smallest step is 0", "portable", "std::max((high[0] - low[0]) / 255, «0x1p-126f»)", "0.0f"),
    Mutant("NaN in a row is not seen", "portable", "nan[0] |= «nan[k]»;", "0"),
    Mutant("a row's largest integer is 254", "portable", "f > 255 ? «255» : f", "254"),
    Mutant("sign bits are not flipped", "portable", "int8_t(bytes[c] ^ «128»)", "127"),
    Mutant("the offset is off by one", "portable", "float(«128» - zero)", "127"),
    Mutant("a group's largest integer is 128", "portable", "std::max(most, 0x1p-100f) / «127»", "128"),
    Mutant("the smallest scale of a group is 0", "portable", "std::max(most, «0x1p-100f») / 127", "0.0f"),
    Mutant("infinity is finite", "portable", "finite = «high < 0x7f800000»;", "high <= 0x7f800000"),
    Mutant("a short group is read whole", "address", "std::memcpy(v, x, «4 * n»);", "4 * ACT_GROUP"),
    Mutant("segments span two scales of x", "portable", "std::min(end, («c / ACT_GROUP + 1») * ACT_GROUP)",
           "c / ACT_GROUP + 2"),
    Mutant("segments lose a short quad", "portable", "«(end - c + 3) / 4», c / size}", "(end - c) / 4"),
    Mutant("segments take the first group", "portable", "(end - c + 3) / 4, «c / size»}", "0"),
    Mutant("x is rounded twice in a group", "portable", "if («segment.column % ACT_GROUP == 0»)",
           "segment.column % 32 == 0"),
    Mutant("sums start with the wrong sign", "native", "= «-bias * total»;", "bias * total"),
    Mutant("the bias is too small", "native", "? «*std::max_element(w.table, w.table + 16)» : 0",
           "*std::max_element(w.table, w.table + 16) - 1"),
    # Instruction sets
    Mutant("bytes lose their sign", "portable", "return «a << (24 - 8 * b) >> 24»;",
           "I(Unsigned(a << (24 - 8 * b)) >> 24)"),
    Mutant("AVX2 swaps signed and unsigned", "native", "«_mm256_maddubs_epi16(w, x)»", "_mm256_maddubs_epi16(x, w)"),
    Mutant("AVX-VNNI swaps signed and unsigned", "emulated", "«_mm256_dpbusd_avx_epi32(sum, w, x)»",
           "_mm256_dpbusd_avx_epi32(sum, x, w)"),
    Mutant("AVX-512 loses a sign", "emulated", "«_mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x)»", "x"),
    Mutant("AMX takes signed bytes as unsigned", "emulated", "if («w.bits == 8»)\n            _tile_dpbssd", "false"),
    Mutant("AMX takes the scales of one row", "emulated", "k = («i + r») * count + s;", "i"),
    Mutant("AMX forgets what sums start with", "emulated", "_mm512_set1_epi32(«x.start[k]»)", "0"),
    Mutant("AMX tiles have 15 rows", "emulated", "config.rows[t] = «16»;", "15"),
    # Products
    Mutant("a 4-bit panel lacks its tail", "portable", "codes + «(columns + 7) / 8 * 64»", "columns / 8 * 64"),
    Mutant("a 3-bit panel repeats high bits", "portable", "V::shift(high, «-4 * half - j»)", "-j"),
    Mutant("codes lose a bit", "portable", "mask = V::set(«0x0f0f0f0f»);\n    const int64_t count", "0x07070707"),
    Mutant("one of two sums is lost", "portable",
           "«if (CHAINS == 2) sum[0][r][h] = V::add(sum[0][r][h], sum[CHAINS - 1][r][h]);»", ""),
    Mutant("both quads take the same x", "portable", "q + r * stride + «4 * k», 4)", "0"),
    Mutant("a chunk begins with an old unit", "portable", "change = «(group + 1) * group_size - column»;",
           "(group + 1) * group_size"),
    Mutant("float products lack their tail", "portable", "«for (; c < columns; c++) add(0, c);»", ""),
    Mutant("tiles of codes span two groups", "portable", "«w.columns / w.groups % 8 == 0»;",
           "w.columns / w.groups % 4 == 0"),
    Mutant("quads span two groups", "portable", "«w.columns / w.groups % 4 == 0») &&", "w.columns / w.groups % 2 == 0"),
    Mutant("many rows read the first of x", "portable", "job.x + («row + i») * job.x_stride + column", "i"),
    Mutant("many rows take the first scales", "portable", "tile(w, *job.x8, «row + i», block", "i"),
    Mutant("every tile takes the first bias", "portable", "std::copy_n(«job.bias + 16 * block», rows", "job.bias"),
    Mutant("row sums have the wrong sign", "portable", "sum[r] + «offset» * row_sums[r]", "-offset"),
    Mutant("16 results are written of fewer", "address", "«rows == 16» ? std::memcpy(y, sum, 64)", "true"),
    Mutant("-128 is negated", "native", "«!(w.activations == 1 && w.bits == 8 && instruction_set().is_unsigned)»",
           "true"),
    Mutant("rounded floats forget zero", "portable", "float(«q[c] - zero»)", "q[c]"),
    Mutant("shares lose a short chunk", "portable", "chunks = «(n + chunk - 1) / chunk»;", "n / chunk"),
    Mutant("an index may equal the rows", "address", "«index[i] >= w->rows»", "index[i] > w->rows"),
    Mutant("row sums lack a group's last column", "portable", "c < «(g + 1) * size»; c++", "(g + 1) * size - 1"),
    # Threads
    Mutant("a second caller shares the team", "threads", "«if (!busy_lock) return work(0, 1);»", ""),
    Mutant("idle workers are not awaited", "threads", "left_.store(«int(workers_.size())»,", "parts - 1"),
    Mutant("a job is not released", "threads", "epoch_.fetch_add(1, «std::memory_order_release»);",
           "std::memory_order_relaxed"),
    Mutant("results are not released", "threads", "left_.fetch_sub(1, «std::memory_order_release»);",
           "std::memory_order_relaxed"),
    Mutant("sleepers are not woken", "threads", "«if (sleeping_.load() > 0) wake_.notify_all();»", ""),
    Mutant("a forked process waits for a team", "threads", "parts <= 1 || «getpid() != loaded_in»", "false"),
    Mutant("workers without a part work", "threads", "if («part < parts_») work_", "true"),
    Mutant("a barrier does not release", "threads", "phase_.store(phase + 1, «std::memory_order_release»);",
           "std::memory_order_relaxed", DECODE),
    Mutant("arrivals at a barrier have no order", "threads", "«std::memory_order_acq_rel»", "std::memory_order_relaxed",
           DECODE),
    Mutant("a barrier opens too early", "threads", "== «parts_ - 1»)", "std::max(parts_ - 2, 0)", DECODE),
    Mutant("no barrier after the embedding", "threads", "embed(i);\n        «barrier_.wait();»", "", DECODE),
    Mutant("no barrier after queries, keys, values", "threads", "s.qkv.data());\n            «barrier_.wait();»", "",
           DECODE),
    Mutant("no barrier after the cache", "threads", "store(layer);\n            «barrier_.wait();»", "", DECODE),
    Mutant("no barrier after attention", "threads", "attend_prompt(layer);\n            «barrier_.wait();»", "", DECODE),
    Mutant("no barrier after attention's projection", "threads",
           "g.n_head * g.head_size);\n            «barrier_.wait();»", "", DECODE),
    Mutant("no barrier before gates", "threads", "if (g.gated) {\n                «barrier_.wait();»", "", DECODE),
    Mutant("no barrier before the last projection", "threads",
           "«barrier_.wait();»\n            residual(layer.mlp_c_proj", "", DECODE),
    Mutant("no barrier after a layer", "threads", "s.inner);\n            «barrier_.wait();»", "", DECODE),
    Mutant("no barrier after a reset", "threads", "inputs.reset(job);\n        if (!single) «barrier_.wait();»", "",
           DECODE),
    Mutant("no barrier after inputs are filled", "threads", "if (!single) «barrier_.wait();»\n        inputs.give(&job);",
           "", DECODE),
    # The decode step
    Mutant("float16 rounds middles up", "portable", "«0xfff + (size >> 13 & 1)»", "0x1000", DECODE),
    Mutant("float16 overflows too early", "portable", "size >= «0x477ff000»", "0x477fe000", DECODE),
    Mutant("exp loses a term", "portable", "«n * 2.12194440e-4f»", "0.0f", DECODE),
    Mutant("softmax overflows", "portable", "(score[t] - «maximum») * scale", "0.0f", DECODE),
    Mutant("a norm has no epsilon", "portable", "sum_of(square) / n + «gpt.norm_eps»", "0.0f", DECODE),
    Mutant("a norm loses its bias", "portable", "y[i] += «norm.bias[i]»", "0.0f", DECODE),
    Mutant("GELU's cube has another factor", "portable", "«0.044715f»", "0.0447f", DECODE),
    Mutant("gates have the wrong sign", "portable", "exponential(«-gate[i]»)", "gate[i]", DECODE),
    Mutant("rotation turns the wrong way", "portable", "b * cosine + «a» * sine", "-a", DECODE),
    Mutant("scores lack a head's tail", "portable", "«for (; i < n; i++) rest += a[i] * half_to_float(b[i]);»", "", DECODE),
    Mutant("values lack a head's tail", "portable", "«for (; i < n; i++) out[i] += factor * half_to_float(b[i]);»", "",
           DECODE),
    Mutant("angles begin at 0", "portable", "float(«s.position» + i) * g.frequencies[k]", "0", DECODE),
    Mutant("positions begin at 0", "portable", "decode_row(g.wpe, «s.position» + i, position)", "0", DECODE),
    Mutant("logits of the first token", "portable", "&s.x[«(s.n - 1) * g.n_embd»]", "0", DECODE),
    Mutant("keys are not turned", "portable", "g.frequencies && kv < «g.n_kv_head»)", "0", DECODE),
    Mutant("tokens overwrite each other in the cache", "portable", "g.capacity + s.position + «i») * size;", "0", DECODE),
    Mutant("a token does not see itself", "portable", "n = «s.position + 1»;", "std::max<int64_t>(1, s.position)", DECODE),
    Mutant("heads share the wrong keys", "portable", "offset = «h / (g.n_head / g.n_kv_head)» * g.capacity",
           "h % g.n_kv_head", DECODE),
    Mutant("tokens of a prompt see the next", "portable", "seen = «n - rows + i + 1»;", "std::min(n, n - rows + i + 2)",
           DECODE),
    Mutant("hidden tokens keep their scores", "portable", "seen, «n - seen», 0.0f);", "int64_t(0)", DECODE),
    Mutant("the cache is read beyond its end", "address", "«t < n» ? half_to_float(layer.keys[from]) : 0;", "true", DECODE),
    Mutant("parts of a prompt begin at one place", "portable", "step.position = «position + from»;", "position", DECODE),
]  # fmt: skip

if __name__ == "__main__":
    run(main, Settings)
