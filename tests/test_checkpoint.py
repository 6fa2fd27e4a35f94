"""checkpoint.py: files of runs, damaged and foreign files, and GPT-2 in Hugging Face's format."""

import copy
import io
import json
import math
import os
import stat
import struct
import tarfile
import threading
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import added_memory, gpt2, transformers_model, write_tokenizer
from fuzz import deflate
from safetensors.torch import load_file, save, save_file

import checkpoint
import dataset
from model import GPT, GPTConfig
from pot import PoTConfig, convert, prepare, quantize_
from tokenizer import GPT2, FileTokenizer, tokenizer_of

SHAPE = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=64)
SETTINGS = {"init_from": "scratch", "dataset": "tiny", "seed": 1}
INFO = checkpoint.CheckpointInfo({"tokenizer": "char", "chars": "abc"}, "float", SHAPE, step=7, settings=SETTINGS)


def gpt():
    torch.manual_seed(0)
    return GPT(SHAPE).eval()


X = torch.arange(16)[None]


@pytest.mark.parametrize(
    "pot", [None, PoTConfig(), PoTConfig(bits=5, range=7, grid="paper", granularity="tensor", scale="absmax")], ids=str
)
def test_round_trip_of_both_files(tmp_path, pot):
    folder, model, info = str(tmp_path), gpt(), INFO
    if pot:
        prepare(model, pot)
        info = replace(info, pot=pot, method="QAT")
    y = model(X)
    checkpoint.save_training(folder, model, info, optimizer={}, scaler={})
    loaded, loaded_info = checkpoint.load_model(folder)
    assert torch.equal(loaded(X), y) and loaded_info == info
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and not loaded.training
    floats = checkpoint.model_of(checkpoint.load_training(folder), quantized=False)
    assert torch.equal(floats(X), gpt()(X))
    size = checkpoint.save_model(folder, convert(model), info)
    assert size == (tmp_path / "model.safetensors").stat().st_size == checkpoint.file_size(folder, model, info)
    loaded, loaded_info = checkpoint.load_model(folder)
    assert torch.equal(loaded(X), y) and loaded_info == info
    checkpoint.save_training(folder, gpt(), info, optimizer={}, scaler={})
    assert not (tmp_path / "model.safetensors").exists()  # a stale model is deleted
    assert not list(tmp_path.glob("*.tmp"))


def test_packed_file_is_as_small_as_the_codes(tmp_path):
    model = gpt()
    total = sum(p.numel() for p in model.parameters())
    float_size = checkpoint.save_model(str(tmp_path), model, INFO)
    prepare(model, PoTConfig())
    size = checkpoint.save_model(str(tmp_path), convert(model), INFO)
    one_dimensional = sum(p.numel() for p in model.parameters())  # biases and LayerNorms stay float
    expected = (total - one_dimensional) * (4 + 16 / 64) / 8 + 4 * one_dimensional
    assert expected <= size <= expected + 8000  # the header: names, shapes, settings
    assert float_size >= 4 * total


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = str(tmp_path)
    checkpoint.save_training(folder, gpt(), INFO, optimizer={}, scaler={})
    old = (tmp_path / "ckpt.pt").read_bytes()

    def full(state, f):
        f.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed: no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*ckpt.pt: .*untouched"):
        checkpoint.save_training(folder, gpt(), INFO, optimizer={}, scaler={})
    assert (tmp_path / "ckpt.pt").read_bytes() == old and not list(tmp_path.glob("*.tmp"))


def test_truncated_and_foreign_files(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        checkpoint.load_model(folder + "/nowhere")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.load_model(folder)
    checkpoint.save_training(folder, gpt(), INFO, optimizer={}, scaler={})
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
    foreign = [save({"a": torch.zeros(2)}), save({"a": torch.zeros(2)}, {"nanopot": "{}"})]
    for content in (good[: len(good) // 2], b"", b"hello", *foreign):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is truncated, damaged or not of nanoPoT"):
            checkpoint.load_model(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Content of a packed file, and the logits of the model."""
    folder, model = tmp_path_factory.mktemp("packed"), quantize_(gpt())
    checkpoint.save_model(str(folder), model, replace(INFO, pot=PoTConfig()))
    return (folder / "model.safetensors").read_bytes(), model(X)


@pytest.mark.parametrize(
    "old, new",
    [
        (None, lambda c: c[:-1]),
        (None, lambda c: c + b"x"),
        (None, lambda c: c[:100]),
        (None, lambda c: (2**40).to_bytes(8, "little") + c[8:]),
        (None, lambda c: c[:-4096]),  # the last page is missing
        (b'"data_offsets":[0,', b'"data_offsets":[4,'),
        (b'"shape":[192]', b'"shape":[193]'),
        (b'c_attn.bias":{"dtype":"F32"', b'c_attn.bias":{"dtype":"I32"'),
        (b'ln_f.weight":{"dtype":"F32"', b'ln_f.weight":{"dtype":"I32"'),
        (b'.codes":{"dtype":"U8"', b'.codes":{"dtype":"I8"'),
        (b'\\"shape\\":[192,64]', b'\\"shape\\":[192,64.]'),
        (b'\\"dtype\\":\\"float32\\"', b'\\"dtype\\":\\"float64\\"'),
        (b'n_layer\\":2', b'n_layer\\":3'),
        (b'lm_head.packed.codes\\"', b'lm_heat.packed.codes\\"'),
        (b'lm_head.packed.unit\\"', b'lm_heat.packed.unit\\"'),
    ],
)
def test_damaged_packed_files(tmp_path, packed, old, new):
    content, _ = packed
    assert old is None or old in content
    (tmp_path / "model.safetensors").write_bytes(content.replace(old, new, 1) if old else new(content))
    with pytest.raises(ValueError, match="model.safetensors is truncated, damaged or not of nanoPoT"):
        checkpoint.load_model(str(tmp_path))


def test_packed_file_that_is_replaced_while_it_is_read(tmp_path, packed, monkeypatch):
    content, _ = packed
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "new").write_bytes(content)
    read_aligned = checkpoint._read_aligned

    def replace_first(*arguments):
        os.replace(tmp_path / "new", tmp_path / "model.safetensors")
        return read_aligned(*arguments)

    monkeypatch.setattr(checkpoint, "_read_aligned", replace_first)
    with pytest.raises(ValueError, match="model.safetensors was replaced while it was read: try again"):
        checkpoint.load_model(str(tmp_path))


def test_flipped_code_changes_one_weight(tmp_path, packed):
    content, _ = packed
    (tmp_path / "model.safetensors").write_bytes(content)
    good, _ = checkpoint.load_model(str(tmp_path))
    codes = good.transformer.h[1].mlp.c_fc.packed.codes.numpy().tobytes()
    at = content.index(codes) + 1000
    damaged = content[:at] + bytes([content[at] ^ 0x08]) + content[at + 1 :]  # flips the sign of the byte's first code
    (tmp_path / "bad").mkdir()  # a separate folder, because the good model maps the first file
    (tmp_path / "bad" / "model.safetensors").write_bytes(damaged)
    bad, _ = checkpoint.load_model(str(tmp_path / "bad"))
    good_weight, bad_weight = (m.transformer.h[1].mlp.c_fc.weight for m in (good, bad))
    assert (good_weight != bad_weight).sum() <= 1 and torch.equal(good_weight.abs(), bad_weight.abs())
    state = bad.state_dict()
    different = [name for name, t in good.state_dict().items() if not torch.equal(t, state[name])]
    assert different == ["transformer.h.1.mlp.c_fc.packed.codes"]


@pytest.mark.parametrize("packed, copies", [(False, 0), (True, 1)])
def test_memory_of_loading(tmp_path, packed, copies):
    """A float file is mapped, a packed one is read once. Importing torch's compiler would take 70 MB."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50000, n_layer=1, n_head=2, n_embd=512))
    info = replace(INFO, model_args=model.config)
    model = quantize_(model, PoTConfig(scale="absmax")) if packed else model
    size = checkpoint.save_model(str(tmp_path), model, info)
    assert size > 15e6
    load = f"m, _ = checkpoint.load_model({str(tmp_path)!r})"
    assert copies * size - 5e6 < added_memory("import checkpoint", load) < copies * size + 5e6


def test_loaded_weights_are_writable(tmp_path, packed):
    content, y = packed
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = checkpoint.load_model(str(tmp_path))
    copied, half = copy.deepcopy(model), copy.deepcopy(model).half()
    checkpoint.save_model(str(tmp_path), model, info)  # replaces the mapped file
    assert path.read_bytes() == content and torch.equal(model(X), y)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert not model(X).any() and path.read_bytes() == content
    assert torch.equal(copied(X), y) and (half(X) - y).abs().max() < 0.05 * y.abs().max()
    reloaded, _ = checkpoint.load_model(str(tmp_path))
    reloaded.load_state_dict(model.state_dict())
    assert not reloaded(X).any() and torch.equal(checkpoint.load_model(str(tmp_path))[0](X), y)


def test_incomplete_or_wrong_info_is_rejected(tmp_path, monkeypatch):
    complete = INFO.to_dict()
    assert set(complete) == {"tokenizer", "method", "model_args", "pot", "origin", "step", "settings"}
    for key in complete:
        broken = [{k: v for k, v in complete.items() if k != key}, complete | {key: 0.5}]
        wrong = [{"settings": {}}, {"model_args": {"n_layer": "two"}}, {"pot": {"bits": 9}}]
        broken += [complete | part for part in wrong]
        for info in broken:
            monkeypatch.setattr(checkpoint.CheckpointInfo, "to_dict", lambda self, info=info: info)
            checkpoint.save_training(str(tmp_path), gpt(), INFO, optimizer={}, scaler={})
            with pytest.raises(ValueError, match="no nanoPoT checkpoint"):
                checkpoint.load_model(str(tmp_path))
            checkpoint.save_model(str(tmp_path), gpt(), INFO)
            with pytest.raises(ValueError, match="not of nanoPoT"):
                checkpoint.load_model(str(tmp_path))


def test_pickle_with_code_is_rejected(tmp_path):
    class Evil:
        def __reduce__(self):
            return (json.loads, ('["ran"]',))

    torch.save({"info": Evil(), "model": {}, "step": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="more than tensors: 'json loads'"):
        checkpoint.load_model(str(tmp_path))


def test_small_file_cannot_hold_a_large_model(tmp_path):
    """A small file cannot become a large model by compressed records, or by tensors that repeat a number."""
    model = gpt()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    path = tmp_path / "ckpt.pt"
    checkpoint.save_training(str(tmp_path), model, INFO, optimizer={}, scaler={})
    path.write_bytes(deflate(good := path.read_bytes()))
    assert path.stat().st_size < len(good) / 4
    with pytest.raises(ValueError, match="ckpt.pt is truncated, damaged"):
        checkpoint.load_model(str(tmp_path))
    state = torch.load(io.BytesIO(good), weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state["model"][name] = torch.zeros(1).expand(state["model"][name].shape)
    torch.save(state, path)
    with pytest.raises(ValueError, match="more elements than its storage"):
        checkpoint.load_model(str(tmp_path))


GPT2_CONFIG = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}


def test_small_file_of_another_project_cannot_take_much_memory(tmp_path, monkeypatch):
    """The weights of its model are neither copied nor built."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG))
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=2, n_head=2, n_embd=64))
    state = {name: torch.zeros(1).expand(t.shape) for name, t in model.state_dict().items()}
    empty = {name: t.to("meta") for name, t in model.state_dict().items()}
    sparse = state | {"transformer.wte.weight": torch.zeros(50257, 64).to_sparse()}
    monkeypatch.setattr(GPT, "from_huggingface", None)
    for content, message in (
        (state, "more elements than their storage"),
        (empty, "more than tensors"),
        (sparse, "more than tensors"),
        ([state], "AttributeError|more elements|no model of 2 layers"),
        ({str(i): torch.zeros(1) for i in range(99)}, "99 tensors are no model of 2 layers"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            checkpoint.load_model(str(tmp_path))


@pytest.mark.parametrize("n_layer, count", [(100, 599), (2, 73)])
def test_layers_that_the_tensors_cannot_hold(tmp_path, monkeypatch, n_layer, count):
    """They are refused before a layer is built."""
    message = f"{count} tensors are no model of {n_layer} layers"
    tensors = {f"transformer.h.{i}": torch.zeros(0) for i in range(count)}
    info = replace(INFO, model_args=replace(SHAPE, n_layer=n_layer))
    header = json.dumps(info.to_dict() | {"packed": {"configs": [], "layers": {}, "aliases": {}}})
    (tmp_path / "own").mkdir()
    save_file(tensors, tmp_path / "own" / "model.safetensors", {"nanopot": header})
    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG | {"n_layer": n_layer}))
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(GPT, "meta", None)
    for folder in (tmp_path, tmp_path / "own"):
        with pytest.raises(ValueError, match=message):
            checkpoint.load_model(str(folder))


def test_optimizer_state_cannot_take_much_memory(tmp_path):
    moments = {0: {"exp_avg": torch.zeros(1).expand(10**9)}}
    checkpoint.save_training(str(tmp_path), gpt(), INFO, optimizer={"state": moments}, scaler={})
    with pytest.raises(ValueError, match="ckpt.pt is truncated, damaged"):
        checkpoint.load_training(str(tmp_path))


def pickle_of(value: str) -> bytes:
    """A pickle of {1: value}, from lines of opcodes."""
    return b"\x80\x02}K\x01" + value.encode("latin1") + b"s."


REPEATED = "ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x01tQK\x00(J\x00\x00\x00\x40t(K\x00tI00\n}tR"
PICKLES = {
    "bytes": "c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "set": f"c__builtin__\nset\n{REPEATED}\x85R",
    "set without its name": f"c__builtin__\nset\n{REPEATED}R",
    "size": f"ctorch\nSize\n{REPEATED}\x85R",
    "counter": f"ccollections\nCounter\n{REPEATED}\x85R",
    "dict": f"ccollections\nOrderedDict\n{REPEATED}\x85R",
    "arguments": f"ctorch._utils\n_rebuild_tensor_v2\n{REPEATED}R",
    "attributes": f"ccollections\nOrderedDict\n)R{REPEATED}b",
    "text": "c_codecs\nencode\n(V00\nVhex\ntR",
    "memo": "c__builtin__\nset\nq\x05h\x05" + REPEATED + "\x85R",
    "opcodes": "N0" * 300_000 + "N",
    "key": "}K\x00" + "".join("q\x01h\x01\x86" for _ in range(60)) + "K\x01s",
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_takes_memory_or_time(tmp_path, monkeypatch, zipped, name):
    """A file of a few bytes would take any memory, and a key of 2^60 parts any time."""
    content = pickle_of(PICKLES[name])
    if zipped:
        torch.save({}, tmp_path / "empty.pt")
        with zipfile.ZipFile(tmp_path / "empty.pt") as old, zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as new:
            for part in old.namelist():
                new.writestr(part, content if part.endswith("data.pkl") else old.read(part))
    else:
        (tmp_path / "ckpt.pt").write_bytes(b"N." * 3 + content + b"N.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(
        ValueError,
        match="ckpt.pt is truncated.*(more than tensors|hold each other too many times|more than 500,000 opcodes)",
    ):
        checkpoint.load_training(str(tmp_path))


def test_files_that_two_readers_read_in_two_ways(tmp_path, monkeypatch):
    """What torch loads is not in the zip file that Python sees: it is in front of it, or in another directory of the same
    file, or in a tar file."""
    bad = pickle_of(PICKLES["bytes"])

    def zip_of(content):
        """Its files, and the directory behind them."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as new:
            for name, part in (("a/data.pkl", content), ("a/byteorder", b"little"), ("a/version", b"3\n")):
                new.writestr(name, part)
        return data.getvalue()[: new.start_dir], data.getvalue()[new.start_dir : -22], data.getvalue()[-22:]

    files, directory, end = zip_of(b"}.".ljust(len(bad)))
    bad_files, bad_directory, _ = zip_of(bad)
    end_of_two = end[:16] + struct.pack("<IH", len(bad_files), 0)  # zipfile takes the last directory, torch this place
    two = bad_files + bad_directory + files + directory + end_of_two
    with zipfile.ZipFile(io.BytesIO(two)) as z:
        assert z.read("a/data.pkl").startswith(b"}.")
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("N." * 5))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    in_front = b"N." * 3 + bad + b"N." + files + directory + end
    for content in (in_front, two, (tmp_path / "tar.pt").read_bytes()):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(ValueError, match="more than tensors|tar file"):
            checkpoint._unpickle(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_that_checkpoints_hold_is_read(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tensors": [torch.ones(3, dtype=kind) for kind in kinds] + [torch.zeros(0), torch.tensor(2.0)],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "values": [None, True, 1.5, 10**20, -1, "text", (1, 2, 3, 4), ()],
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    back = checkpoint._unpickle(tmp_path / "file.pt")
    assert torch.equal(back["model"]["0.weight"], model[0].weight) and back["values"] == content["values"]
    assert [t.dtype for t in back["tensors"][:8]] == list(kinds)
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"dataset": None, "seed": 1, "x": torch.zeros(2)}},
        {"provenance": torch.zeros(1)},
        {"val_loss": "1"},
        {"val_loss": math.nan},
        {"val_loss": 10**400},
        {"step": 10**400},
        {"step": -1},
    ],
)
def test_info_that_no_finished_model_could_hold(change):
    assert checkpoint.CheckpointInfo.from_dict(INFO.to_dict()).step == INFO.step
    with pytest.raises((TypeError, ValueError), match="JSON serializable|no finite number|negative"):
        checkpoint.CheckpointInfo.from_dict(INFO.to_dict() | change)


def test_negated_views_are_refused(tmp_path):
    """An optimizer cannot step on them."""
    state = {name: torch._neg_view(t) for name, t in gpt().state_dict().items()}
    content = {"info": INFO.to_dict(), "model": state, "optimizer": {}, "scaler": {}}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is truncated, damaged"):
        checkpoint.load_training(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_in_place_of_files(tmp_path, reference_gpt2):
    """Nobody writes to the pipe, so a reader would wait for ever."""
    index = checkpoint.MODEL + ".index.json"
    for name in (checkpoint.TRAINING, checkpoint.MODEL, "pytorch_model.bin", index, "part.safetensors", "config.json"):
        folder = tmp_path / name
        reference_gpt2.save_pretrained(folder)
        if name in (checkpoint.TRAINING, checkpoint.MODEL):
            (folder / "config.json").unlink()
        (folder / checkpoint.MODEL).unlink()
        if name == "part.safetensors":
            (folder / index).write_text(json.dumps({"weight_map": {"a": name}}))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert checkpoint.finished_tokenizer(str(folder)) is None
        with pytest.raises(ValueError, match=f"{name} is a pipe or a device"):
            checkpoint.load_model(str(folder))
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "train.bin")
    (tmp_path / "data" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="train.bin is a pipe or a device"):
        dataset.load(str(tmp_path / "data"), "train")
    os.mkfifo(tmp_path / "data" / checkpoint.LOG)
    with pytest.raises(ValueError, match="is a pipe or a device"):
        checkpoint.read_log(str(tmp_path / "data"))


def test_kind_of_the_layers(tmp_path):
    """What people read is what the layers are."""
    for said, table, true in (
        (PoTConfig(bits=3), None, False),
        (PoTConfig(), PoTConfig(bits=3), True),
        (None, None, True),
    ):
        checkpoint.save_model(str(tmp_path), quantize_(gpt()), replace(INFO, pot=said, table=table))
        if true:
            assert checkpoint.load_model(str(tmp_path))[1].pot == PoTConfig()
        else:
            with pytest.raises(ValueError, match="it says PoT 3 bits, .* and holds layers of PoT 4 bits"):
                checkpoint.load_model(str(tmp_path))


def test_strange_text_and_dtypes(tmp_path):
    for key, value in (("method", "\x1b[31mred"), ("method", "two\nlines"), ("origin", "\x1b]0;a")):
        checkpoint.save_model(str(tmp_path), gpt(), replace(INFO, **{key: value}))
        with pytest.raises(ValueError, match=f"{key} is '"):
            checkpoint.load_model(str(tmp_path))
    for name in ("日本\u3000語", "no-break\u00a0space", "\U0001f468\u200d\U0001f469", "soft\u00adhyphen"):
        info = replace(INFO, origin=name, settings=INFO.settings | {"dataset": name})
        checkpoint.save_model(str(tmp_path), gpt(), info)
        assert checkpoint.load_model(str(tmp_path))[1].origin == name
    checkpoint.save_model(str(tmp_path), gpt().to(torch.float8_e4m3fn), INFO)
    with pytest.raises(ValueError, match="weights of float8_e4m3fn"):
        checkpoint.load_model(str(tmp_path))


def test_files_are_on_the_disk_and_for_everyone(tmp_path, monkeypatch):
    """Each write waits for the file before it is renamed, and for its name after that."""
    (tmp_path / "plain").touch()
    events, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or rename(*paths))
    checkpoint.save_model(str(tmp_path), gpt(), INFO)
    assert events == [False, "rename", True]
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tokenizer_and_exports_are_on_the_disk(tmp_path, monkeypatch):
    """Whatever gets its name was on the disk before, and so is the name."""
    (tmp_path / "source").mkdir()
    write_tokenizer(tmp_path / "source")
    meta = FileTokenizer(str(tmp_path / "source")).meta
    saved, sync, replace_, rename = set(), os.fsync, os.replace, os.rename

    def check(source, target, act):
        parts = [os.path.join(d, n) for d, folders, files in os.walk(source) for n in folders + files]
        assert {os.stat(p).st_ino for p in [source, *parts]} <= saved
        act(source, target)
        saved.discard(os.stat(os.path.dirname(target)).st_ino)

    monkeypatch.setattr(os, "fsync", lambda fd: saved.add(os.fstat(fd).st_ino) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda source, target: check(source, target, replace_))
    monkeypatch.setattr(os, "rename", lambda source, target: check(source, target, rename))
    checkpoint.keep_tokenizer(str(tmp_path / "kept" / "new"), meta, str(tmp_path / "source"))
    checkpoint.publish(str(tmp_path / "source"), str(tmp_path / "kept" / "published"))
    for path in (tmp_path / "kept" / "new", tmp_path / "kept"):
        assert path.stat().st_ino in saved


def test_tokenizer_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A write that fails leaves the old file, and a later one makes GPT-2's tokenizer complete."""
    files = {"tokenizer_config.json": "{}", "tokenizer.json": "whole"}
    monkeypatch.setattr(checkpoint.tokenizer, "gpt2_files", lambda: files)
    write_bytes, folder = Path.write_bytes, str(tmp_path)

    def half(path, content):
        write_bytes(path, content[: len(content) // 2])
        if content == b"whole":
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="cannot write .*tokenizer.json: disk full"):
            checkpoint.keep_tokenizer(folder, GPT2)
    assert not (tmp_path / "tokenizer.json").exists()
    checkpoint.keep_tokenizer(folder, GPT2)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "new" / "newer"):
        checkpoint.check_writable(str(folder))
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match=f"{folder} cannot be written to, because .*file is no folder"):
            checkpoint.check_writable(str(folder))
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root writes anywhere
    with pytest.raises(ValueError, match="new cannot be written to: choose another folder"):
        checkpoint.check_writable(str(tmp_path / "new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_odd_lines_of_a_log(tmp_path):
    good = [{"step": 0, "val_loss": 2.5}, {"step": 1, "loss": 2}]
    odd = [
        "123",
        "null",
        "{}",
        "[" * 100000,
        '{"step": "1"}',
        '{"step": 1, "loss": "x"}',
        '{"step": null}',
        f'{{"step": -{10**400}, "loss": 1}}',
        '{"step": 1, "loss": NaN}',
        "\udcff",
        '{"st',
    ]
    lines = [json.dumps(good[0]), *odd, json.dumps(good[1])]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert checkpoint.read_log(str(tmp_path)) == good


def test_two_writers_of_a_result(tmp_path):
    """The file is always of one of them."""
    path, done = str(tmp_path / "eval.json"), []

    def work(letter):
        for size in range(1, 60):
            checkpoint.write_json(path, {"value": letter * 5000 * (size % 7)})
            done.append(set(json.loads((tmp_path / "eval.json").read_text())["value"]))

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 118 and all(len(letters) <= 1 for letters in done)
    assert os.listdir(tmp_path) == ["eval.json"]


# --- GPT-2 in Hugging Face's format ---


@pytest.fixture(scope="module")
def reference_gpt2():
    return gpt2(vocab_size=50257, n_positions=32)


def old_names(model):
    """State with the names of OpenAI's file on the hub: no prefix, no head, and the masks of old versions."""
    state = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    return state | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


@pytest.mark.parametrize("form", ["safetensors", "shards", "bfloat16", "bin", "old bin", "old safetensors", "no head"])
def test_gpt2_of_transformers(tmp_path, reference_gpt2, form):
    folder, reference = str(tmp_path), reference_gpt2
    if form == "bfloat16":
        reference = gpt2(vocab_size=50257, n_positions=32).bfloat16()
    if form == "no head":
        reference_gpt2.transformer.save_pretrained(folder)
    else:
        reference.save_pretrained(folder, max_shard_size="4MB" if form == "shards" else "5GB")
    if form == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    if form == "old safetensors":
        save_file({k: v.contiguous() for k, v in old_names(reference_gpt2).items()}, tmp_path / "model.safetensors")
    elif "bin" in form:
        (tmp_path / "model.safetensors").unlink()
        state = old_names(reference_gpt2) if form == "old bin" else reference_gpt2.state_dict()
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    model, info = checkpoint.load_model(folder)
    x = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = model(x), reference.float()(x).logits
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert info.tokenizer == {"tokenizer": "gpt2"} and not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    size = checkpoint.file_size(folder, model, info)
    assert size == 4 * sum(p.numel() for p in model.parameters())
    assert torch.equal(checkpoint.load_float(folder)[0](x), model(x)) and checkpoint.exists(folder)


# --- models of other families ---


@pytest.mark.parametrize("family", ["llama", "llama grouped", "llama 3", "qwen2"])
def test_folders_of_other_families(tmp_path, family):
    reference = transformers_model(family)
    reference.save_pretrained(tmp_path, max_shard_size="40KB" if family == "llama grouped" else "5GB")
    assert (tmp_path / "model.safetensors").exists() == (family != "llama grouped")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        checkpoint.load_model(str(tmp_path))
    write_tokenizer(tmp_path)
    model, info = checkpoint.load_model(str(tmp_path))
    x = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(x).logits
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert info.tokenizer["tokenizer"] == "file" and info.tokenizer["vocab_size"] == 261
    assert checkpoint.make_decoder(model) is None
    # as a run's folder, in float and packed
    (tmp_path / "run").mkdir()
    for weights in (model, quantize_(copy.deepcopy(model), PoTConfig(group_size=32))):
        y = weights(x)
        checkpoint.save_model(str(tmp_path / "run"), weights, info)
        loaded, loaded_info = checkpoint.load_model(str(tmp_path / "run"))
        assert torch.equal(loaded(x), y) and replace(loaded_info, pot=None) == info


def test_org_and_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / "models--some-org--A_model.v1"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    transformers_model("llama grouped").save_pretrained(cached / "snapshots" / "abc")
    write_tokenizer(cached / "snapshots" / "abc")
    assert checkpoint.is_foreign("some-org/A_model.v1") and checkpoint.is_at_hand("some-org/A_model.v1")
    model, info = checkpoint.load_model("some-org/A_model.v1")
    assert model.config.n_kv_head == 2
    assert tokenizer_of(info.tokenizer, "some-org/A_model.v1").decode([0]) == "<|im_end|>"


def test_a_tokenizer_larger_than_the_model(tmp_path):
    transformers_model("llama", vocab_size=100).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of 100, its tokenizer.json needs 261"):
        checkpoint.load_model(str(tmp_path))


# --- damaged folders ---


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def drop(folder, name, replacement=None):
    state = load_file(folder / "model.safetensors")
    state.pop(name)
    save_file(state | (replacement or {}), folder / "model.safetensors")


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def save_pickle_with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")


def replace_file_by_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit_config(f, model_type="mamba"), "model_type is 'mamba', and only gpt2, llama, qwen2 are known"),
        (lambda f: edit_config(f, model_type="llama"), "has no max_position_embeddings"),
        (lambda f: edit_config(f, model_type="gone"), "model_type is None"),
        (lambda f: edit_config(f, activation_function="relu"), "activation_function is 'relu'"),
        (lambda f: edit_config(f, n_inner=100), "c_fc.weight is of another shape"),
        (lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (lambda f: edit_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
        (lambda f: edit_config(f, n_layer=3), "h.2.*is missing"),
        (lambda f: edit_config(f, n_layer=1), "h.1.*is unknown"),
        (lambda f: edit_config(f, n_positions="gone"), "has no n_positions"),
        (lambda f: edit_config(f, n_embd="many"), "is no model that can be read"),
        (lambda f: drop(f, WTE), "wte.weight is missing"),
        (lambda f: drop(f, WTE, {WTE: torch.zeros(50257, 63)}), "wte.weight is of another shape"),
        (lambda f: edit_config(f, quantization_config={"bits": 8}), "quantization_config is"),
        (lambda f: edit_config(f, n_embd=10**12), "is no model that can be read"),
        (lambda f: drop(f, WTE, {WTE: torch.zeros(50257, 64, dtype=torch.int32)}), "wte.weight is torch.int32"),
        (lambda f: drop(f, WTE, {WTE: torch.zeros(50257, 64), "wte.weight": torch.zeros(1)}), "or there twice"),
        (
            lambda f: drop(f, WTE, {WTE: torch.zeros(50257, 64), "lm_head.weight": torch.ones(50257, 64)}),
            "lm_head.weight is not the token table",
        ),
        (replace_file_by_folder, "is no model that can be read"),
        (lambda f: (f / "config.json").write_text("[" * 99999), "is no model that can be read"),
        (lambda f: (f / "config.json").write_text("{"), "is no model that can be read"),
        (lambda f: (f / "config.json").write_text("[]"), "is no model that can be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "is no model that can be read"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (save_pickle_with_code, "pytorch_model.bin is damaged or holds more than tensors"),
    ],
)
def test_unsupported_gpt2_folders_are_rejected(tmp_path, reference_gpt2, capsys, damage, message):
    reference_gpt2.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as e:
        checkpoint.load_model(str(tmp_path))
    assert str(tmp_path) in str(e.value) and "code was run" not in capsys.readouterr().out


def test_errors_of_hostile_folders_are_short_and_give_no_bad_advice(tmp_path, reference_gpt2):
    reference_gpt2.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "[" * 99999}}))
    with pytest.raises(ValueError, match="is no model that can be read") as e:
        checkpoint.load_model(str(tmp_path))
    assert len(str(e.value)) < 1000
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").touch()
    save_pickle_with_code(tmp_path)
    with pytest.raises(ValueError, match="holds more than tensors .it makes more than tensors") as e:
        checkpoint.load_model(str(tmp_path))
    assert "weights_only" not in str(e.value) and "\n" not in str(e.value)


def test_another_vocabulary_is_rejected(tmp_path):
    gpt2(vocab_size=300, n_positions=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of 300, GPT-2's byte pairs need 50257"):
        checkpoint.load_model(str(tmp_path))


def test_names_of_the_hub(tmp_path, reference_gpt2, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="cannot download gpt2-xl from the Hugging Face hub .*: check the name and the network"
    ):
        checkpoint.load_model("gpt2-xl")
    with pytest.raises(ValueError, match="no folder gpt3: pass .*org/name.* or gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        checkpoint.load_model("gpt3")
    with pytest.raises(ValueError, match="there is no folder out/nowhere, and cannot download out/nowhere"):
        checkpoint.load_model("out/nowhere")
    assert not checkpoint.is_at_hand("gpt2-xl")
    cached = tmp_path / "hub" / "models--openai-community--gpt2-xl"  # layout of a download
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "vocab.json").write_text("{}")  # another program downloads the tokenizer alone
    with pytest.raises(ValueError, match="cannot download gpt2-xl"):
        checkpoint.load_model("gpt2-xl")
    reference_gpt2.save_pretrained(cached / "snapshots" / "abc")
    model, _ = checkpoint.load_model("gpt2-xl")
    assert torch.equal(model.transformer.wte.weight, reference_gpt2.transformer.wte.weight)
    assert checkpoint.is_at_hand("gpt2-xl")
    gpt2(vocab_size=50257, n_positions=64).save_pretrained("gpt2-xl")  # a folder takes precedence over the hub
    assert checkpoint.load_model("gpt2-xl")[0].config.block_size == 64
