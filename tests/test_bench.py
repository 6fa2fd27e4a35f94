"""bench.py: the measured rows, the formats that it leaves out, and its checks."""

import json

import pytest
import torch


def test_speed(workdir, sh, monkeypatch):
    def compile(self, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr("bench.check_read", lambda read, reference: None)  # a timing, which other processes disturb
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
    assert list(rows) == ["float32", "float32-best", "bfloat16", "int8", "int4", "pot4", "pot4-int8"]
    expected_bytes = 4 * (50304 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64)  # without the position table
    for name, row in rows.items():
        assert name in done.stdout and set(row["ways"]) == {"decode", "prompt"}
        assert row["bytes_per_token"] < row["file_bytes"] and row["peak_bytes"] > 0
        for kind in ("decode", "prompt"):
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
    assert rows["float32"]["decode_ratio"] == rows["float32-best"]["decode_ratio_best"] == 1


def test_missing_onednn_path_is_left_out(workdir, sh, monkeypatch):
    import bench

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
    import bench

    monkeypatch.setitem(bench.TOLERANCE, "bfloat16", 1e-9)
    done = sh("bench.py --ckpt=gpt2 --compile=False --new_tokens=4 --prompt_tokens=20", ok=False)
    assert "bfloat16 eager: its logits are off by" in done.stderr


def test_shapes():
    import bench

    config = bench.build(bench.Settings(model="gpt2-medium", n_layer=1, vocab_multiple=64)).config
    assert (config.n_layer, config.n_head, config.n_embd, config.vocab_size) == (1, 16, 1024, 50304)
    assert config.block_size == 1024 and bench.build(bench.Settings(n_layer=None)).config.n_layer == 12


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
        ("bench.py --model=gpt3", "choose speed or qat, and one of gpt2, gpt2-medium"),
        ("bench.py --rounds=1", "rounds=1 has no spread"),
        ("bench.py --ckpt=gpt2 --n_layer=1", "n_layer=1 shortens random weights only"),
    ],
)
def test_errors(sh, qat_run, command, message):
    done = sh(command.format(qat=qat_run), ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "error: " in done.stderr and message in done.stderr


def test_a_slow_read_is_refused():
    import bench

    bench.check_read([9e9, 10e9, 11e9], [10e9, 10e9, 11e9])
    with pytest.raises(ValueError, match="reads memory at 9.0 GB/s, torch.sum at 30.0 GB/s"):
        bench.check_read([9e9, 9e9], [30e9, 30e9])
