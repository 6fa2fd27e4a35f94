"""bench.py: the measured rows, the formats that it leaves out, and its checks."""

import json
import sys

import numpy as np
import pytest
import torch

import bench


def test_speed(workdir, sh, monkeypatch):
    def compile(self, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr("bench.check_read", lambda read, reference: None)  # a timing, which other processes disturb
    peak = bench.peak_bytes
    monkeypatch.setattr("bench.peak_bytes", lambda kind, *args: peak(kind, *args) if kind in ("float32", "pot4") else 1)
    settings = torch.get_float32_matmul_precision(), torch.backends.quantized.engine
    done = sh("bench.py --ckpt=gpt2 --rounds=2 --new_tokens=4 --prompt_tokens=20 --vocab_multiple=64 --json=speed.json")
    assert settings == (torch.get_float32_matmul_precision(), torch.backends.quantized.engine)
    results = json.loads((workdir / "speed.json").read_text())
    assert results["vocab_size"] == 50304 and results["threads"] == 2
    assert results["read_gb_s"] > 0 and results["machine"]
    left_out = results["left_out"]
    left_out.pop("bfloat16, oneDNN", None)  # depends on the processor
    assert left_out == {f"{f}, compiled": "RuntimeError: no compiler" for f in ("float32", "bfloat16")}
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == ["float32", "float32-best", "bfloat16", "int8", "int4", "pot4", "pot4-two"]
    expected_bytes = 4 * (50304 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64)  # without the position table
    for name, row in rows.items():
        assert name in done.stdout and set(row["ways"]) == {"decode", "decode8", "decode16", "prompt"}
        assert row["bytes_per_token"] < row["file_bytes"] and row["peak_bytes"] > 0
        for kind in row["ways"]:
            lower, upper = row[f"{kind}_tok_s_quartiles"]
            assert 0 < lower <= row[f"{kind}_tok_s"] <= upper
            # The median of two rounds is their mean.
            ways = {(w["format"], w["way"]): w[kind] for w in results["ways"]}
            rates = ways["float32" if name.startswith("float") else name, row["ways"][kind]]
            ratio = sum(r / b for r, b in zip(rates, ways["float32", "eager"])) / 2
            assert ratio == pytest.approx(row[f"{kind}_ratio"])
    assert rows["float32"]["bytes_per_token"] == rows["float32-best"]["bytes_per_token"] == expected_bytes
    assert rows["bfloat16"]["bytes_per_token"] == expected_bytes / 2
    assert expected_bytes / 8 < rows["pot4"]["bytes_per_token"] < expected_bytes / 7 > rows["int4"]["bytes_per_token"]
    assert {w["way"] for w in results["ways"] if w["format"] == "pot4-two"} == {"float32", "int8"}
    assert rows["float32"]["decode_ratio"] == rows["float32-best"]["decode_ratio_best"] == 1


QUANTIZE = """
import shutil, sys
import gguf
pure, source, file, kind, threads = sys.argv[1:]
assert pure == "--pure" and int(threads) == 2
shutil.copy(source, __file__ + ".source")
kind = gguf.GGMLQuantizationType[kind.removesuffix("_MOE")]
writer = gguf.GGUFWriter(file, "gpt2")
for t in gguf.GGUFReader(source).tensors:
    try:
        if len(t.shape) == 2 and t.name != "position_embd.weight":
            writer.add_tensor(t.name, gguf.quants.quantize(t.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(t.name, t.data)
    except (NotImplementedError, gguf.QuantError):
        sys.exit("a long story\\nno such type")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
BENCH = """
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(__file__ + ".log", "a") as log:
    log.write(" ".join(sys.argv[3:]) + chr(10))
rate = {"Q4_0.gguf": 1e5, "MXFP4.gguf": 2e5, "Q8_0.gguf": 4e5, "F32.gguf": 8e5}[os.path.basename(options["-m"])]
print(json.dumps([{"avg_ts": rate, "build_commit": "abc", "build_number": 7}]))
"""


def test_llama_cpp(workdir, tmp_path, sh, monkeypatch):
    """Stands in for llama.cpp: two scripts, of which the first knows what the package gguf can quantize."""
    gguf = pytest.importorskip("gguf")
    import transformers

    for name, code in (("llama-quantize", QUANTIZE), ("llama-bench", BENCH)):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("bench.check_read", lambda read, reference: None)  # a timing, which other processes disturb
    monkeypatch.setattr("bench.peak_bytes", lambda *args: None)  # takes a new process each
    command = (
        f"bench.py --ckpt=gpt2 --compile=False --rounds=2 --new_tokens=2 --prompt_tokens=8 --json={tmp_path}/b.json"
    )
    command += f" --vocab_multiple=64 --llama_bench={tmp_path}/llama-bench"
    done = sh(command)
    results = json.loads((tmp_path / "b.json").read_text())
    left_out = {k: v for k, v in results["left_out"].items() if "llama" in k}
    assert left_out == {f"llama.cpp-{kind}": "llama-quantize fails: no such type" for kind in ("IQ4_NL", "Q4_K")}
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows)[-4:] == [f"llama.cpp-{kind}" for kind in ("Q4_0", "MXFP4", "Q8_0", "F32")]
    batches = {key for key in rows["float32"] if key.startswith(("decode8", "decode16"))}
    assert all(set(r) - batches == set(rows["llama.cpp-Q4_0"]) for r in rows.values())
    assert rows["llama.cpp-F32"]["bytes_per_token"] == rows["float32"]["bytes_per_token"]
    assert rows["llama.cpp-Q4_0"]["peak_bytes"] is None and rows["llama.cpp-Q4_0"]["decode_tok_s"] == 1e5
    assert 4.5 / 32 < rows["llama.cpp-Q4_0"]["bytes_per_token"] / rows["float32"]["bytes_per_token"] < 4.7 / 32
    assert results["llama_cpp"]["best"] == {"decode": "llama.cpp-MXFP4", "prompt": "llama.cpp-MXFP4"}
    assert rows["pot4"]["prompt_ratio_llama"] == pytest.approx(rows["pot4"]["prompt_tok_s"] / 2e5)
    assert "x llama.cpp-MXFP4" in done.stdout
    expected = {
        "-p 0 -n 1 -d 1 -t 2 -r 1 -o json",
        "-p 0 -n 2 -d 32 -t 2 -r 1 -o json",
        "-p 8 -n 0 -d 0 -t 2 -r 1 -o json",
    }
    assert set((tmp_path / "llama-bench.log").read_text().splitlines()) == expected

    source = gguf.GGUFReader(tmp_path / "llama-quantize.source")
    keys = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 256, "attention.head_count": 2}
    for key, value in (keys | {"context_length": 96, "vocab_size": 50304}).items():
        assert source.get_field(f"gpt2.{key}").contents() == value
    tensors = {t.name: t.data for t in source.tensors}
    model = transformers.GPT2LMHeadModel.from_pretrained(workdir / "gpt2")
    assert len(tensors) == len(model.state_dict()) - 1  # the head is the token table
    block = model.transformer.h[1]
    pairs = {
        "attn_norm": block.ln_1,
        "attn_output": block.attn.c_proj,
        "ffn_norm": block.ln_2,
        "ffn_up": block.mlp.c_fc,
    }
    pairs |= {"attn_qkv": block.attn.c_attn, "ffn_down": block.mlp.c_proj}
    for name, module in pairs.items():
        assert np.array_equal(tensors[f"blk.1.{name}.weight"], module.weight.detach().numpy().T)
        assert np.array_equal(tensors[f"blk.1.{name}.bias"], module.bias.detach().numpy())
    assert np.array_equal(tensors["token_embd.weight"][:50257], model.transformer.wte.weight.detach().numpy())
    assert np.array_equal(tensors["position_embd.weight"], model.transformer.wpe.weight.detach().numpy())
    assert np.array_equal(tensors["output_norm.weight"], model.transformer.ln_f.weight.detach().numpy())

    monkeypatch.setattr("bench.load_ways", lambda *_: pytest.fail("long work"))
    for code, message in (
        ("sys.exit(3)", "llama-bench fails: exit status 3, without a message"),
        ("print('a table')", "prints 'a table\\n', and no JSON"),
        ('print(json.dumps([{"avg_ts": 1}]))', "take a newer llama.cpp"),
    ):
        (tmp_path / "llama-bench").write_text(f"#!{sys.executable}\nimport json, sys\n{code}")
        assert message in sh(command, ok=False).stderr
    done = sh(command.replace("vocab_multiple=64", "vocab_multiple=1"), ok=False)
    assert "a vocabulary of 50257 keeps llama.cpp from its fast code" in done.stderr
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in sh(command, ok=False).stderr


def test_gguf_of_a_llama(tmp_path):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = bench.build(bench.Settings(model="smollm2-135m", n_layer=1))
    bench.write_gguf(gguf, model, tmp_path / "F32.gguf")
    reader = gguf.GGUFReader(tmp_path / "F32.gguf")
    assert reader.get_field("general.architecture").contents() == "llama"
    sizes = {"attention.head_count": 9, "attention.head_count_kv": 3, "feed_forward_length": 1536, "vocab_size": 49152}
    assert all(reader.get_field(f"llama.{key}").contents() == value for key, value in sizes.items())
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    block = model.transformer.h[0]
    for expected, names in (
        (block.attn.c_attn, ("attn_q", "attn_k", "attn_v")),
        (block.mlp.c_fc, ("ffn_gate", "ffn_up")),
    ):
        assert torch.equal(torch.cat([tensors.pop(f"blk.0.{name}.weight") for name in names]), expected.weight)
    others = {"blk.0.attn_output": block.attn.c_proj, "blk.0.ffn_down": block.mlp.c_proj, "blk.0.attn_norm": block.ln_1}
    others |= {"blk.0.ffn_norm": block.ln_2, "output_norm": model.transformer.ln_f, "token_embd": model.transformer.wte}
    assert tensors.keys() == {f"{name}.weight" for name in others}
    assert all(torch.equal(tensors[f"{name}.weight"], module.weight) for name, module in others.items())


def test_batches_and_prompt_are_what_the_figures_say(monkeypatch):
    """Counts the tokens that a way reads while it is timed."""
    calls = []
    way = bench.Way.__new__(bench.Way)
    way.format, way.decoder = "float32", None
    way.model = bench.GPT(bench.GPTConfig(block_size=64, vocab_size=32, n_layer=1, n_head=1, n_embd=16)).eval()
    way.model.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape)))
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    with torch.no_grad():
        rates = way.measure(bench.Settings(new_tokens=10, prompt_tokens=40), torch.zeros(1, 40, dtype=torch.long))
    assert calls[:11] == [(1, 32)] + 10 * [(1, 1)]
    assert calls[11:] == [(8, 32), (8, 1), (8, 1), (16, 32), (16, 1), (1, 40)]
    assert rates == {"decode": 10, "decode8": 16, "decode16": 16, "prompt": 40}  # in a second each


def test_missing_onednn_path_is_left_out(workdir, sh, monkeypatch):
    def reorder(module):
        raise RuntimeError("bf16 path needs the cpu support\nof a newer processor")

    monkeypatch.setattr(bench, "reorder_weight", reorder)
    monkeypatch.setattr("bench.check_read", lambda read, reference: None)  # a timing, which other processes disturb
    monkeypatch.setattr(bench, "peak_bytes", lambda *args: None)  # some systems cannot measure it
    command = "bench.py --ckpt=gpt2 --compile=False --rounds=2 --new_tokens=2 --prompt_tokens=8 --json=left_out.json"
    done = sh(command)
    reason = "RuntimeError: bf16 path needs the cpu support"
    left_out = json.loads((workdir / "left_out.json").read_text())["left_out"]
    assert left_out == {f"{f}, oneDNN": reason for f in ("float32", "bfloat16")}
    assert f"bfloat16 oneDNN is left out: {reason}" in done.stdout


def test_wrong_logits_are_not_timed(sh, monkeypatch):
    monkeypatch.setitem(bench.WAYS["bfloat16"], "eager", 1e-9)
    done = sh("bench.py --ckpt=gpt2 --compile=False --new_tokens=4 --prompt_tokens=20", ok=False)
    assert "bfloat16 eager: its logits are off by" in done.stderr


def test_shapes():
    config = bench.build(bench.Settings(model="gpt2-medium", n_layer=1, vocab_multiple=64)).config
    assert (config.n_layer, config.n_head, config.n_embd, config.vocab_size) == (1, 16, 1024, 50304)
    assert config.block_size == 1024 and bench.build(bench.Settings(n_layer=None)).config.n_layer == 12


def test_rows(workdir, sh, monkeypatch):
    monkeypatch.setattr("bench.COPIES", 100_000)
    command = "bench.py --what=rows --ckpt=llama --rounds=2"
    done = sh(command)
    results = json.loads((workdir / "results" / "bench_rows.json").read_text())
    ways = [("float32", "eager")] + [(f, w) for f in ("int4", "pot4", "pot4-two") for w in ("float32", "int8")]
    shapes = [[128, 64], [64, 64], [256, 64], [64, 128], [300, 64]]
    assert [r["shape"] for r in results["rows"]] == [shape for shape in shapes for _ in ways]
    assert [(r["format"], r["way"]) for r in results["rows"]] == ways * len(shapes)
    for row in results["rows"]:
        assert row["rows"] == [1, 2, 4, 8, 16, 32, 64, 128, 512] and len(row["us"]) == len(row["ratio"]) == 9
        assert all(0 < lower <= median <= upper for lower, median, upper in row["ratio"]) and min(row["us"]) > 0
        assert row["format"] != "float32" or row["ratio"] == 9 * [[1, 1, 1]]
    assert "300 x 64: times as fast as float32" in done.stdout and results["rounds"] == 2

    monkeypatch.setitem(bench.WAYS, "pot4", {"float32": -1})
    assert "pot4 float32: 1 rows of 128 x 64 are off by" in sh(command, ok=False).stderr


def test_qat(workdir, sh):
    done = sh("bench.py --what=qat --ckpt=gpt2 --rounds=2 --steps=1 --block_size=16 --batch_size=2")
    results = json.loads((workdir / "results" / "bench_qat.json").read_text())
    names = ["float32", "PoT 4 bits, groups of 64", "distilled"]
    assert [r["name"] for r in results["rows"]] == names and results["tokens"] == 32
    for row in results["rows"]:
        lower, median, upper = row["step_s"]
        assert 0 < lower <= median <= upper and row["name"] in done.stdout
    assert results["rows"][0]["ratio"] == [1, 1, 1]


@pytest.mark.parametrize(
    "command, message",
    [
        ("bench.py --what=qat --ckpt=gpt2 --block_size=97", "block_size=97 is more than the context of gpt2: 96"),
        ("bench.py --ckpt=gpt2 --prompt_tokens=97", "prompt_tokens=97 is more than the context of 96"),
        ("bench.py --ckpt={qat}", "is quantized (QAT): pass the float checkpoint"),
        ("bench.py --model=gpt3", "choose speed, rows, qat, and one of gpt2, gpt2-medium"),
        ("bench.py --rounds=1", "rounds=1 has no spread"),
        ("bench.py --json={qat}/model.safetensors", "must be the name of a .json file"),
        ("bench.py --n_layer=1 --llama_bench=nowhere/llama-bench", "there is no nowhere/llama-bench"),
        ("bench.py --ckpt=gpt2 --n_layer=1", "n_layer=1 shortens random weights only"),
    ],
)
def test_errors(sh, qat_run, command, message):
    done = sh(command.format(qat=qat_run), ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "error: " in done.stderr and message in done.stderr


def test_a_slow_read_is_refused():
    bench.check_read([9e9, 10e9, 11e9], [10e9, 10e9, 11e9])
    with pytest.raises(ValueError, match="reads memory at 9.0 GB/s, torch.sum at 30.0 GB/s"):
        bench.check_read([9e9, 9e9], [30e9, 30e9])
