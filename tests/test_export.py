"""extras/export.py: transformers and the package gguf load the same weights as nanoPoT."""

import math
import os
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, transformers_model, write_tokenizer

import checkpoint
import pot
from extras import export
from model import ROPE_SCALING, GPTConfig, rotary_frequencies
from pot import PoTConfig
from tokenizer import FileTokenizer

TEXT = "The naïve café costs 3,000 €;\n\n  don't ask — 日本語 \U0001f600\x00 tabs\tand Ünïcödé<|endoftext|>1234"
MXFP4 = PoTConfig(terms=2, group_size=32, scale_format="e8m0")


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def save_gpt2(workdir, name, config, source="gpt2"):
    """Saves the small GPT-2 of the tests, packed if `config` is given. Returns the new folder."""
    model, info = checkpoint.load_float(str(workdir / source))
    if config:
        pot.quantize_(model, config)
    folder = workdir / name
    folder.mkdir()
    checkpoint.save_model(str(folder), model, replace(info, pot=config, method="PTQ" if config else "float"))
    return str(folder)


@pytest.mark.parametrize("config", [None, PoTConfig(), MXFP4], ids=str)
def test_transformers_loads_the_same_model(workdir, tmp_path, config):
    transformers = pytest.importorskip("transformers")
    folder = save_gpt2(workdir, f"out-hf-{config}", config)
    export.main(export.Settings(folder, str(tmp_path / "hf")))
    model, _ = checkpoint.load_model(folder)
    exported = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    assert exported.dtype == torch.float32 and exported.lm_head.weight is exported.transformer.wte.weight
    x = torch.randint(50257, (2, 40))
    with torch.no_grad():
        expected, logits = model(x), exported(x).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    from safetensors import safe_open

    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as f:
        dtype = f.get_tensor("transformer.h.0.mlp.c_fc.weight").dtype
    assert dtype == (torch.bfloat16 if config == MXFP4 else torch.float32)  # bfloat16 if it is exact
    reloaded, _ = checkpoint.load_model(str(tmp_path / "hf"))  # nanoPoT reads the exported folder too
    with torch.no_grad():
        assert torch.allclose(reloaded(x), expected, atol=1e-5)


def test_tokenizer_equals_tiktoken(workdir, tmp_path):
    """Needs GPT-2's real byte pairs. All other tests use a stand-in."""
    pytest.importorskip("transformers")
    folder, out = save_gpt2(workdir, "out-hf-tokens", None), tmp_path / "hf"
    code = (
        "import sys, tiktoken, transformers, extras.export as export\n"
        "try: bpe = tiktoken.get_encoding('gpt2')\n"
        "except Exception: sys.exit(77)\n"
        f"export.main(export.Settings({folder!r}, {str(out)!r}))\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(out)!r})\n"
        f"text = {TEXT!r}\n"
        "assert tokenizer(text)['input_ids'] == bpe.encode(text, allowed_special='all')\n"
        "assert tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257\n"
    )
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode == 77:
        pytest.skip("GPT-2's byte pairs are not available")
    assert done.returncode == 0, done.stderr[-2000:]


def test_message_about_8_bit_activations(workdir, tmp_path, capsys):
    export.main(export.Settings(save_gpt2(workdir, "out-hf-act", PoTConfig(act_bits=8)), str(tmp_path / "hf")))
    assert "8-bit activations are left out" in capsys.readouterr().out


def test_character_models_with_and_without_biases(workdir, sh, tmp_path, qat_run, capsys):
    transformers = pytest.importorskip("transformers")
    shape = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --bias=False"
    sh(f"train.py --dataset=tiny {shape} --max_iters=1 --out_dir=out-nobias")
    for run in (qat_run, "out-nobias"):
        export.main(export.Settings(str(workdir / run), str(tmp_path / run)))
        assert "without a tokenizer" in capsys.readouterr().out
        model, _ = checkpoint.load_model(str(workdir / run))
        exported = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / run).eval()
        x = torch.randint(28, (2, 16))
        with torch.no_grad():
            assert torch.allclose(exported(x).logits, model(x), atol=1e-4)


KINDS = {  # format of llama.cpp: (weights, bytes of a block of 32)
    "MXFP4": (MXFP4, 17),
    "MXFP4 3 bits": (PoTConfig(bits=3, scale_format="e8m0"), 17),
    "Q4_0": (PoTConfig(bits=3), 18),
    "Q4_0 uniform": (PoTConfig(grid="uniform", granularity="channel"), 18),
    "Q5_0": (PoTConfig(terms=2), 22),
    "Q8_0": (PoTConfig(group_size=32), 34),
    "Q8_0 tensor": (PoTConfig(granularity="tensor"), 34),
    "Q8_0 uniform": (PoTConfig(grid="uniform", bits=8), 34),
    "BF16": (PoTConfig(bits=6, terms=2, scale_format="e8m0"), 64),
    "F32": (None, 128),
}


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0"])
def test_gguf_has_the_same_weights_to_the_bit(workdir, tmp_path, kind, capsys):
    gguf = pytest.importorskip("gguf")
    config, size = KINDS[kind]
    folder, path = save_gpt2(workdir, f"out-gguf-{kind}", config), str(tmp_path / "model.gguf")
    export.main(export.Settings(folder, path))
    out = capsys.readouterr().out
    assert f"9 matrices as {kind}: " in out and f", {size / 4:g} bits per weight" in out
    assert ("llama.cpp has no smaller format" in out) == ("take 4.25 bits" in out) == (kind == "Q8_0")
    reader, (model, _) = gguf.GGUFReader(path), checkpoint.load_model(folder)
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 + 2 + 12 * 2

    def decoded(name):
        t = tensors[name]
        return torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))

    for i, block in enumerate(model.transformer.h):
        parts = {
            "attn_norm": block.ln_1, "attn_qkv": block.attn.c_attn, "attn_output": block.attn.c_proj,
            "ffn_norm": block.ln_2, "ffn_up": block.mlp.c_fc, "ffn_down": block.mlp.c_proj,
        }  # fmt: skip
        for name, module in parts.items():
            assert same_bits(decoded(f"blk.{i}.{name}.weight"), module.weight), name
            assert same_bits(decoded(f"blk.{i}.{name}.bias"), module.bias), name
    assert same_bits(decoded("token_embd.weight"), model.lm_head.weight)
    assert same_bits(decoded("position_embd.weight"), model.transformer.wpe.weight)
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType[kind]
    assert tensors["token_embd.weight"].n_bytes == 50257 * 64 * size // 32
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["gpt2.block_count"] == 2
    assert fields["gpt2.context_length"] == 96 and fields["gpt2.attention.head_count"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == 50257 and len(fields["tokenizer.ggml.merges"]) == 50000
    # Token 256 + 256 a + b of the stand-in is the bytes a, b. GPT-2 maps unprintable bytes to letters from 256 on.
    assert fields["tokenizer.ggml.tokens"][256 + 256 * 65 + 32] == "AĠ"
    assert fields["tokenizer.ggml.merges"][256 * 65 + 32] == "A Ġ"


@pytest.mark.parametrize("family", ["llama", "llama grouped", "llama 3", "llama biases", "qwen2", "gpt2 untied"])
def test_transformers_loads_other_families(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    reference = transformers_model(family)
    reference.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    model, info = checkpoint.load_float(str(tmp_path / "model"))
    pot.quantize_(model, PoTConfig(group_size=32))
    (tmp_path / "run").mkdir()
    checkpoint.save_model(str(tmp_path / "run"), model, replace(info, pot=PoTConfig(group_size=32), method="PTQ"))
    shutil.copy(tmp_path / "model" / "tokenizer.json", tmp_path / "run")
    shutil.copy(tmp_path / "model" / "tokenizer_config.json", tmp_path / "run")
    export.main(export.Settings(str(tmp_path / "run"), str(tmp_path / "hf")))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(exported) is type(reference) and exported.config.eos_token_id == 0
    x = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = model(x), exported(x).logits
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(checkpoint.load_model(str(tmp_path / "hf"))[0](x), expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the end")["input_ids"] == FileTokenizer(str(tmp_path / "model")).encode("the end")


def save_other(tmp_path, family, config):
    """Saves a small untied model of a Llama-type family, with a tokenizer. Returns (model, folder)."""
    shape = {"num_attention_heads": 4, "hidden_size": 128, "head_dim": 32, "tie_word_embeddings": False}
    transformers_model(family, **shape).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    model, info = checkpoint.load_float(str(tmp_path / "model"))
    if config:
        pot.quantize_(model, config)
    (tmp_path / "run").mkdir()
    checkpoint.save_model(str(tmp_path / "run"), model, replace(info, pot=config, method="PTQ"))
    for file in (*(tmp_path / "model").glob("*token*"), tmp_path / "model" / "chat_template.jinja"):
        shutil.copy(file, tmp_path / "run")
    return model, str(tmp_path / "run")


CASES = list(zip(KINDS, ["llama grouped", "llama 3", "qwen2"] * 4))


@pytest.mark.parametrize("kind, family", CASES)
def test_gguf_of_other_families(tmp_path, kind, family):
    """The package gguf and transformers read the file back. transformers has its own map of names, order of rows and
    vocabulary."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from extras import import_gguf

    config, size = KINDS[kind]
    model, run = save_other(tmp_path, family, config)
    export.main(export.Settings(run, str(tmp_path / "model.gguf")))
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        if tensor.n_elements > 1000:
            assert (tensor.tensor_type.name, tensor.n_bytes) == (kind.split()[0], tensor.n_elements * size // 32)
    import_gguf.main(import_gguf.Settings(str(tmp_path / "model.gguf"), str(tmp_path / "back")))
    back, back_info = checkpoint.load_model(str(tmp_path / "back"))
    keys = ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_inner", "block_size", "tie", "qkv_bias")
    assert [getattr(back.config, k) for k in keys] == [getattr(model.config, k) for k in keys]
    assert torch.allclose(*map(rotary_frequencies, (back.config, model.config)), rtol=1e-5)
    weights = model.state_dict() | {f"{n}.weight": m.weight for n, m in model.named_modules() if hasattr(m, "packed")}
    for name, tensor in back.state_dict().items():
        assert same_bits(tensor, weights[name]), name
    assert back_info.tokenizer["vocab_size"] == 300 and back_info.tokenizer["tokenizer"] == "file"
    own, read = FileTokenizer(run), FileTokenizer(str(tmp_path / "back"))
    assert read.encode("the other") == own.encode("the other") and read.template == own.template
    assert 0 in read.stops


@pytest.mark.parametrize("kind, family", [case for case in CASES if " " not in case[0]])
def test_llama_cpp_continues_a_prompt(tmp_path, kind, family):
    """llama.cpp gives the same probabilities. It rounds activations to 8 bits."""
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    model, run = save_other(tmp_path, family, KINDS[kind][0])
    path = str(tmp_path / "model.gguf")
    export.main(export.Settings(run, path))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = path, 64, False
    own = FileTokenizer(run)
    not_ascii = [i for i in range(300) if not own.decode([i]).isascii() or i < 3 or i > 260]
    request = {"prompt": "the other", "n_predict": 8, "temperature": 0.0, "n_probs": 5}
    request["logit_bias"] = [[i, False] for i in not_ascii]  # the answer counts letters, not tokens
    theirs = xllamacpp.Server(params).handle_completions(request)["choices"][0]["logprobs"]["content"]
    ids = torch.tensor([own.encode("the other") + [token["id"] for token in theirs]])
    ours = model(ids)[0, -len(theirs) - 1 : -1].log_softmax(-1)
    differences = [abs(row[t["id"]] - t["logprob"]) for token, row in zip(theirs, ours) for t in token["top_logprobs"]]
    assert len(theirs) == 8 and max(differences) < 0.1 * ours.std()


@pytest.mark.parametrize("family", ["llama grouped", "qwen2"])
def test_compressed_tensors_decodes_the_same_weights(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, run = save_other(tmp_path, family, MXFP4)
    export.main(export.Settings(run, str(tmp_path / "dense")))
    export.main(export.Settings(run, str(tmp_path / "packed"), packed=True))
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (128, 64)
    assert "model.layers.0.mlp.down_proj.weight" not in tensors
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, quantization_config=config
    )
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name]), name
    x = torch.randint(300, (2, 20))
    with torch.no_grad():
        assert torch.allclose(loaded.float()(x).logits, model(x), atol=1e-4)


def test_weights_that_compressed_tensors_cannot_hold(workdir, tmp_path):
    _, run = save_other(tmp_path, "qwen2", PoTConfig(terms=2, group_size=32))
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight is not MXFP4.*leave out --packed"):
        export.main(export.Settings(run, str(tmp_path / "packed"), packed=True))
    with pytest.raises(ValueError, match="packed anyway"):
        export.main(export.Settings(run, str(tmp_path / "model.gguf"), packed=True))
    with pytest.raises(ValueError, match="Llama-type"):
        export.main(export.Settings(str(workdir / "gpt2"), str(tmp_path / "packed"), packed=True))
    assert not (tmp_path / "packed").exists()


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for a full disk. The last bytes of the file do not fit."""
    pytest.importorskip("gguf")
    transformers_model("llama grouped").save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    export.main(export.Settings(str(tmp_path / "llama"), str(tmp_path / "whole.gguf")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole.gguf").stat().st_size - 100, limits[1]))
    try:
        with pytest.raises(OSError):
            export.main(export.Settings(str(tmp_path / "llama"), str(tmp_path / "cut.gguf")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "whole.gguf"]


def test_families_that_nobody_has():
    with pytest.raises(ValueError, match="nothing to export to"):
        export.family(GPTConfig(norm="rms"))


def test_files_that_gguf_cannot_import(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from extras import import_gguf

    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    for file, message in ((tmp_path / "nowhere.gguf", "no file"), (tmp_path / "damaged.gguf", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            import_gguf.main(import_gguf.Settings(str(file), str(tmp_path / "out")))
    with pytest.raises(ValueError, match="exists already"):
        import_gguf.main(import_gguf.Settings(str(file), str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be written to, because .* is no folder"):  # before it reads the file
        import_gguf.main(import_gguf.Settings(str(file), str(file / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_gguf_with_other_tensors(tmp_path, monkeypatch, change):
    """transformers would fill a missing tensor with random numbers, and leave out an unknown one."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from extras import import_gguf

    _, run = save_other(tmp_path, "llama grouped", None)
    add = gguf.GGUFWriter.add_tensor

    def add_other(self, name, tensor, **kinds):
        if name == "blk.0.attn_q.weight":
            name = "blk.0.attn_x.weight"
            if change == "unknown":
                add(self, "blk.0.attn_q.weight", tensor, **kinds)
        add(self, name, tensor, **kinds)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_other)
    export.main(export.Settings(run, str(tmp_path / "model.gguf")))
    with pytest.raises(ValueError, match="tensors are missing|holds .* tensors, and its model has"):
        import_gguf.main(import_gguf.Settings(str(tmp_path / "model.gguf"), str(tmp_path / "back")))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "method, value, message",
    [
        ("add_block_count", 200, "holds 21 tensors, and says that it has 200 layers"),
        ("add_context_length", 0, "block_size=0"),
        ("add_rope_freq_base", math.nan, "rope_theta=nan"),
        ("add_feed_forward_length", 2**20, "weights, and its model has"),
        (
            "add_vocab_size",
            {"llama.rope.scaling.type": "yarn"},
            "rope.scaling.type is 'yarn', and only 'none' is known",
        ),
        ("add_quantization_version", [0] * 2**20, "values in its header"),
        ("add_block_count", 2**32 - 1, "4,294,967,295 layers"),
    ],
)
def test_gguf_header_that_would_take_memory_or_minutes(tmp_path, monkeypatch, method, value, message):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    import transformers

    from extras import import_gguf

    def add(self, *_):
        if isinstance(value, list):
            self.add_array("general.large", value)
        elif isinstance(value, dict):
            original(self, 300)
            for key, text in value.items():
                self.add_string(key, text)
        else:
            original(self, value)

    _, run = save_other(tmp_path, "llama grouped", None)
    original = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, add)
    export.main(export.Settings(run, str(tmp_path / "model.gguf")))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was built")
    )
    with pytest.raises(ValueError, match=message):
        import_gguf.main(import_gguf.Settings(str(tmp_path / "model.gguf"), str(tmp_path / "back")))


@pytest.mark.parametrize("length", [2**31, 2**63])
def test_gguf_header_with_lengths_beyond_the_file(tmp_path, length):
    from extras import import_gguf

    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, length) + bytes(100))
    with pytest.raises(ValueError, match="model.gguf is truncated or damaged: its header cannot be read"):
        import_gguf.check_header(str(path))


@pytest.mark.parametrize("head_size, theta", [(64, 5e5), (128, 5e5), (16, 1e4)])
@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 8192), (4.0, 16), (2.0, 1)])
def test_scaling_of_rotary_positions_in_a_gguf(head_size, theta, factor, original):
    """llama.cpp keeps divisors of the frequencies, and no parameters."""
    from extras import import_gguf

    plain = GPTConfig(position="rotary", n_embd=2 * head_size, n_head=2, rope_theta=theta)
    given = dict(zip(ROPE_SCALING, (factor, 1.0, 4.0, original)))
    scaled = rotary_frequencies(replace(plain, rope_scaling=given))
    divisors = rotary_frequencies(plain) / scaled
    scaling = import_gguf.rope_scaling(divisors, plain)
    assert torch.allclose(rotary_frequencies(replace(plain, rope_scaling=scaling)), scaled, rtol=1e-5)
    assert import_gguf.rope_scaling(torch.ones(head_size // 2), plain) is None
    for bad in (divisors + torch.arange(head_size // 2), divisors[:-1], -divisors, divisors * math.nan):
        with pytest.raises(ValueError, match="rope_freqs.weight"):
            import_gguf.rope_scaling(bad, plain)


def test_models_that_gguf_cannot_hold(workdir, tmp_path, qat_run):
    pytest.importorskip("gguf")
    path = str(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="knows characters"):
        export.main(export.Settings(str(workdir / qat_run), path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export.main(export.Settings(str(workdir / qat_run), str(tmp_path / "kept")))


@pytest.mark.parametrize(
    "config, form, largest",
    [
        (PoTConfig(bits=5), "Q8_0", 0.01),  # levels up to 2^14
        (PoTConfig(terms=2, group_size=16), "Q8_0", 0.01),  # two units in a block
        (PoTConfig(grid="paper", range=3, granularity="tensor", scale="absmax", eps=2.0**-12), "Q5_0", 2**-11),
    ],
    ids=str,
)
def test_weights_that_gguf_cannot_hold(tmp_path, config, form, largest, capsys):
    gguf = pytest.importorskip("gguf")
    model, run = save_other(tmp_path, "qwen2", config)
    path = str(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=f"lose something.*blk.0.attn_q.weight by .* as {form};.*--lossy=True"):
        export.main(export.Settings(run, path))
    assert not (tmp_path / "model.gguf").exists()
    export.main(export.Settings(run, path, lossy=True))
    assert "lose something" in capsys.readouterr().out
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_output.weight")
    w = model.transformer.h[0].attn.c_proj.weight
    lost = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))) - w
    assert tensor.tensor_type.name == form and 0 < lost.norm() <= largest * w.norm()


def test_config_for_mxfp4(workdir, sh, tmp_path):
    pytest.importorskip("gguf")
    few = "--calibrate_tokens=200 --max_iters=1 --batch_size=2 --gradient_accumulation_steps=1 --eval_tokens=200"
    sh(f"train.py config/finetune_gpt2_mxfp4.py --init_from=gpt2 {few}")
    export.main(export.Settings(str(workdir / "out-gpt2-mxfp4"), str(tmp_path / "model.gguf")))
    assert (tmp_path / "model.gguf").stat().st_size > 50257 * 64 * 17 // 32
