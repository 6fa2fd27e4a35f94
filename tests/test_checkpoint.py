import json

import pytest
import torch

import checkpoint
from model import GPT, GPTConfig
from pot import PoTConfig, convert, prepare

INFO = {
    "tokenizer": {"tokenizer": "char", "chars": "abc"},
    "method": "float",
    "pot": None,
    "origin": None,
    "step": 7,
    "settings": {"init_from": "scratch", "dataset": "tiny", "seed": 1},
}


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=64)).eval()


X = torch.arange(16)[None]


@pytest.mark.parametrize(
    "pot", [None, PoTConfig(), PoTConfig(bits=5, range=7, grid="paper", granularity="tensor", scale="absmax")], ids=str
)
def test_roundtrip_of_both_files(tmp_path, pot):
    folder, model, info = str(tmp_path), gpt(), dict(INFO)
    if pot:
        from dataclasses import asdict

        prepare(model, pot)
        info |= {"pot": asdict(pot), "method": "QAT"}
    y = model(X)
    checkpoint.save_training(folder, model, info, optimizer={})
    loaded, found = checkpoint.load_model(folder)
    assert torch.equal(loaded(X), y) and found["step"] == 7
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and not loaded.training
    floats = checkpoint.model_of(checkpoint.load_training(folder), quantized=False)
    assert torch.equal(floats(X), gpt()(X))
    size = checkpoint.save_model(folder, convert(model), info)
    assert size == (tmp_path / "model.safetensors").stat().st_size == checkpoint.file_size(folder, model, info)
    loaded, found = checkpoint.load_model(folder)
    assert torch.equal(loaded(X), y) and found["pot"] == info["pot"]
    checkpoint.save_training(folder, gpt(), info, optimizer={})
    assert not (tmp_path / "model.safetensors").exists()  # it would be older than the training state
    assert not list(tmp_path.glob("*.tmp"))


def test_packed_file_is_as_small_as_the_codes(tmp_path):
    model = gpt()
    numbers = sum(p.numel() for p in model.parameters())
    float_size = checkpoint.save_model(str(tmp_path), model, INFO)
    prepare(model, PoTConfig())
    size = checkpoint.save_model(str(tmp_path), convert(model), INFO)
    one_dimensional = sum(p.numel() for p in model.parameters())  # biases and LayerNorms are left
    expected = (numbers - one_dimensional) * (4 + 16 / 64) / 8 + 4 * one_dimensional
    assert expected <= size <= expected + 8000  # the header: names, shapes, settings
    assert float_size >= 4 * numbers


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = str(tmp_path)
    checkpoint.save_training(folder, gpt(), INFO, optimizer={})
    old = (tmp_path / "ckpt.pt").read_bytes()

    def full(state, path):
        with open(path, "wb") as f:
            f.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*ckpt.pt: .*untouched"):
        checkpoint.save_training(folder, gpt(), INFO, optimizer={})
    assert (tmp_path / "ckpt.pt").read_bytes() == old and not list(tmp_path.glob("*.tmp"))


def test_truncated_and_foreign_files(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        checkpoint.load_model(folder + "/nowhere")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.load_model(folder)
    checkpoint.save_training(folder, gpt(), INFO, optimizer={})
    good = (tmp_path / "ckpt.pt").read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    for content in (good[: len(good) // 2], b"", b"hello", good[:-1], foreign.read_bytes()):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(ValueError, match="ckpt.pt is truncated, damaged or no nanoPoT checkpoint"):
            checkpoint.load_model(folder)
    (tmp_path / "ckpt.pt").write_bytes(good)
    checkpoint.save_model(folder, gpt(), INFO)
    good = (tmp_path / "model.safetensors").read_bytes()
    from safetensors.torch import save

    for content in (
        good[: len(good) // 2],
        b"",
        b"hello",
        save({"a": torch.zeros(2)}),
        save({"a": torch.zeros(2)}, {"nanopot": "{}"}),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is truncated, damaged or not of nanoPoT"):
            checkpoint.load_model(folder)


def test_info_that_lacks_something_is_refused(tmp_path):
    for key in INFO:
        info = {k: v for k, v in INFO.items() if k != key}
        checkpoint.save_training(str(tmp_path), gpt(), info, optimizer={})
        with pytest.raises(ValueError, match="no nanoPoT checkpoint"):
            checkpoint.load_model(str(tmp_path))
        checkpoint.save_model(str(tmp_path), gpt(), info)
        with pytest.raises(ValueError, match="not of nanoPoT"):
            checkpoint.load_model(str(tmp_path))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (json.loads, ('["ran"]',))

    torch.save({"info": Evil(), "model": {}, "step": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="UnpicklingError"):
        checkpoint.load_model(str(tmp_path))
