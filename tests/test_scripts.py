"""train.py, eval.py and sample.py as a user runs them."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import checkpoint
import configurator
import dataset


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1])


def weights(house, folder):
    return checkpoint.load_training(str(house / folder))["model"]


# --- train.py ---


def test_training_learns_and_leaves_its_files(house, float_run, qat_run):
    for folder, first in ((float_run, math.log(28)), (qat_run, None)):
        names = {p.name for p in (house / folder).iterdir()}
        assert names == {"ckpt.pt", "model.safetensors", "log.jsonl", "loss.png"}
        log = [json.loads(line) for line in (house / folder / "log.jsonl").read_text().splitlines()]
        losses = [e["loss"] for e in log if "loss" in e]
        assert all("val_loss" in e or e["tokens_per_s"] > 0 for e in log)
        if first:
            assert losses[-1] < losses[0] < first + 0.3
    _, info = checkpoint.load_model(str(house / qat_run))
    assert info["method"] == "QAT" and info["pot"]["bits"] == 4 and info["provenance"]["command"].startswith("train.py")


@pytest.mark.parametrize("kind", ["float", "QAT"])
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights(house, sh, float_run, kind):
    start = (
        TINY
        if kind == "float"
        else f"--dataset=tiny --init_from={float_run} --pot_bits=4 --batch_size=4 --eval_interval=10 --log_interval=5"
    )
    command = f"train.py {start} --dropout=0.1 --gradient_accumulation_steps=2 --max_iters=60"
    whole, cut = f"out-whole-{kind}", f"out-cut-{kind}"
    sh(f"{command} --out_dir={whole}")
    args = [sys.executable, *f"{command} --out_dir={cut}".split()]
    process = subprocess.Popen(
        args, cwd=house, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    for line in process.stdout:
        if line.startswith("step 35/"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert not (house / cut / "model.safetensors").exists()
    sh(f"{command} --out_dir={cut} --init_from=resume")
    a, b = weights(house, whole), weights(house, cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[e["step"] for e in map(json.loads, open(house / f / "log.jsonl"))] for f in (whole, cut)]
    assert logs[0] == logs[1]
    packed = [checkpoint.load_model(str(house / f))[0].state_dict() for f in (whole, cut)]
    assert all(torch.equal(packed[0][k], packed[1][k]) for k in packed[0])


def test_one_step_equals_plain_torch(house, sh):
    """Two micro-batches, clipping and AdamW against a loop written out here."""
    sh(f"train.py {TINY} --max_iters=0 --out_dir=out-zero")
    command = f"train.py {TINY} --max_iters=2 --gradient_accumulation_steps=2 --weight_decay=0.3 --learning_rate=0.01 --out_dir=out-two"
    sh(command)
    model, _ = checkpoint.load_model(str(house / "out-zero"))
    data, _ = dataset.load(str(house / "data" / "tiny"), "train")
    model.requires_grad_(True).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=False)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            0.01 * 0.5 * (1 + math.cos(math.pi * step / 2))
        )
        places = np.random.default_rng([1337, step]).integers(len(data) - 32, size=8)
        rows = torch.tensor(np.stack([data[p : p + 33] for p in places]).astype(np.int64))
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, w in weights(house, "out-two").items():
        assert torch.allclose(model.state_dict()[name], w, atol=1e-5), name


def test_control_sees_the_batches_of_qat():
    from train import Settings, batch

    data = np.arange(5000, dtype=np.uint16)
    a, b = Settings(seed=3), Settings(seed=3, out_dir="elsewhere", learning_rate=1.0)
    for step in (0, 7):
        x, y = batch(data, 16, a, step)
        assert torch.equal(x, batch(data, 16, b, step)[0]) and torch.equal(x + 1, y)
    assert not torch.equal(batch(data, 16, a, 0)[0], batch(data, 16, a, 1)[0])
    assert not torch.equal(batch(data, 16, a, 0)[0], batch(data, 16, Settings(seed=4), 0)[0])


def test_zero_steps_are_ptq(house, sh, float_run):
    sh(f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-ptq0 --pot_bits=3 --max_iters=0")
    sh(f"eval.py --ckpt={float_run} --pot_bits=3 --out_dir=out-ptq1")
    a, b = (checkpoint.load_model(str(house / f)) for f in ("out-ptq0", "out-ptq1"))
    assert a[1]["method"] == b[1]["method"] == "PTQ"
    assert all(torch.equal(a[0].state_dict()[k], v) for k, v in b[0].state_dict().items())


def test_wandb_offline(house, sh):
    pytest.importorskip("wandb")
    sh(f"train.py {TINY} --max_iters=5 --out_dir=out-wandb --wandb_log=True", WANDB_MODE="offline")
    assert list((house / "wandb").glob("offline-run-*/*.wandb"))


# --- eval.py ---


def test_eval_of_every_kind(house, sh, float_run, qat_run):
    done = sh(f"eval.py --ckpt={float_run},{qat_run}/")
    rows = last_json(done)["rows"]
    assert [r["method"] for r in rows] == ["float", "QAT"]
    assert [r["steps"] for r in rows] == [30, 20]
    assert json.loads((house / qat_run / "eval.json").read_text())["rows"] == rows
    ids, _ = dataset.load(str(house / "data" / "tiny"), "test")
    for row in rows:
        # Loss in float64, token by token, with nothing but the model's logits.
        model, _ = checkpoint.load_model(str(house / row["ckpt"]))
        total = 0.0
        for i in range(0, len(ids) - 1, 32):
            x = torch.tensor(ids[i : i + 32].astype(np.int64))[: len(ids) - 1 - i]
            y = torch.tensor(ids[i + 1 : i + 33].astype(np.int64))
            total -= model(x[None])[0].double().log_softmax(-1)[torch.arange(len(y)), y].sum().item()
        assert row["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        size = (house / row["ckpt"] / "model.safetensors").stat().st_size
        assert row["bytes"] == size
    assert rows[1]["bytes"] < rows[0]["bytes"] / 4
    assert 0 < rows[1]["kl"] < 1 and 0 < rows[1]["top1_agreement"] <= 1 and "kl" not in rows[0]
    for word in ("bits/weight", "perplexity", f"{rows[1]['bytes']:,}", f"{rows[0]['loss']:.4f}"):
        assert word in done.stdout


def test_kl_against_float64(house, float_run, qat_run):
    from eval import evaluate

    (a, _), (b, _) = (checkpoint.load_model(str(house / f)) for f in (qat_run, float_run))
    ids, _ = dataset.load(str(house / "data" / "tiny"), "val")
    ids = ids[:129]  # four whole windows
    found = evaluate(a, ids, reference=b)
    x = torch.tensor(ids[:128].astype(np.int64)).view(4, 32)
    p, q = (m(x).double().log_softmax(-1) for m in (b, a))
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert found["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert evaluate(b, ids, reference=b)["kl"] == pytest.approx(0, abs=1e-7)


def test_evaluating_disturbs_nothing(house, float_run):
    from eval import evaluate

    model, _ = checkpoint.load_model(str(house / float_run))
    ids, _ = dataset.load(str(house / "data" / "tiny"), "val")
    before = torch.get_rng_state()
    losses = {evaluate(model.train(mode), ids)["loss"] for mode in (True, False, True)}
    assert len(losses) == 1 and model.training and torch.equal(torch.get_rng_state(), before)


def test_qat_in_training_evaluates_like_its_packed_file(house, sh, qat_run):
    half = house / "out-half"
    half.mkdir()
    (half / "ckpt.pt").write_bytes((house / qat_run / "ckpt.pt").read_bytes())
    done = sh(f"eval.py --ckpt=out-half,{qat_run} --sqnr=True")
    a, b = last_json(done)["rows"]
    assert a["loss"] == b["loss"] and abs(a["bytes"] - b["bytes"]) < 1000
    assert done.stdout.count(" dB\n") == 11
    assert "no SQNR" in done.stdout  # the packed file has no float weights to compare with


def test_ptq(house, sh, float_run):
    done = sh(f"eval.py --ckpt={float_run} --pot_bits=2 --pot_granularity=tensor --sqnr=True --json=a/b.json")
    rows = last_json(done)["rows"]
    assert rows[1]["method"] == "PTQ" and rows[1]["loss"] > rows[0]["loss"] and rows[1]["kl"] > 0
    assert rows[1]["bits_per_weight"] < rows[0]["bits_per_weight"] / 4 and (house / "a" / "b.json").exists()
    assert not (house / "(not kept)").exists()


def test_mean_over_seeds():
    from eval import over_seeds

    row = {"method": "QAT", "weights": "PoT", "steps": 5, "dataset": "d", "split": "test"}
    rows = [row | {"seed": 1, "loss": 1.0}, row | {"seed": 2, "loss": 2.0}, row | {"seed": 1, "loss": 9.0, "steps": 6}]
    (found,) = over_seeds(rows)
    assert found["loss_mean"] == 1.5 and found["loss_std"] == pytest.approx(0.5**0.5) and found["seeds"] == [1, 2]


# --- sample.py ---


def test_sampling_from_every_kind(house, sh, float_run, qat_run):
    (house / "prompt.txt").write_text("the lazy ")
    texts = {}
    for folder in (float_run, qat_run, "out-half"):
        command = f"sample.py --ckpt={folder} --max_new_tokens=60 --seed=5"
        done = sh(f"{command} --prompt_file=prompt.txt")
        assert done.stdout.startswith("the lazy ") and len(done.stdout) == len("the lazy ") + 60 + 1
        assert "60 tokens" in done.stderr and "tokens/s" in done.stderr
        assert sh(f"{command} --prompt_file=prompt.txt").stdout == done.stdout
        texts[folder] = done.stdout
    assert texts[qat_run] == texts["out-half"]  # packed and fake-quantized are one model
    greedy = [
        sh(f"sample.py --ckpt={float_run} --temperature=0 --max_new_tokens=20 --prompt=the --seed={s}").stdout
        for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_text_is_streamed(house, float_run):
    args = [sys.executable, "sample.py", f"--ckpt={float_run}", "--max_new_tokens=100000", "--prompt=the"]
    process = subprocess.Popen(args, cwd=house, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    start = time.time()
    assert process.stdout.read(10) and time.time() - start < 60
    process.kill()
    process.wait()


# --- errors: one line, exit status 2, nothing overwritten ---


@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py --max_itres=3", "unknown key --max_itres: did you mean --max_iters"),
        ("train.py --max_iters=many", "expected an integer"),
        ("train.py config/nowhere.py", "no config file config/nowhere.py"),
        ("train.py --dataset=tiny2", "no data set data/tiny2: choose one of"),
        ("train.py --dataset=empty", "make it with `python data/empty/prepare.py`"),
        ("train.py --dataset=tiny --out_dir={float}", "holds a checkpoint already: --init_from=resume"),
        ("train.py --dataset=tiny --init_from=resume --out_dir=out-nowhere", "no folder out-nowhere"),
        ("train.py --dataset=tiny --init_from={float} --n_layer=3 --out_dir=x", "n_layer=3, but out-float was trained with n_layer=2"),
        ("train.py --dataset=tiny --init_from=resume --out_dir={float} --pot_bits=4", "resume with the same"),
        ("train.py --dataset=other --init_from={float} --out_dir=x", "another vocabulary"),
        ("train.py --dataset=tiny --block_size=100000 --out_dir=x", "lower block_size"),
        ("train.py --dataset=tiny --n_embd=65 --out_dir=x", "n_embd=65 must be a multiple"),
        ("train.py --dataset=tiny --n_embd=32 --n_head=2 --n_layer=1 --block_size=8 --pot_bits=4 --out_dir=x", "transformer.wte: group_size 64 does not divide its 32"),
        ("train.py --dataset=tiny --max_iters=-1 --out_dir=x", "max_iters=-1 must be at least 0"),
        ("train.py --dataset=tiny --init_from=resume --out_dir={float} --max_iters=10", "out-float is at step 30 already"),
        ("train.py --dataset=tiny --init_from=packed --out_dir=x", "packed holds model.safetensors alone"),
        ("train.py --dataset=foreign --out_dir=x", "train.bin holds the token 500"),
        ("train.py --dataset=cut --out_dir=x", "train.bin is cut short"),
        ("train.py --dataset=tiny --device=meta --out_dir=x", "not one of cpu, cuda and mps"),
        ("eval.py --ckpt=,", "at least one folder"),
        ("eval.py --ckpt={qat} --reference=typo", "no folder typo"),
        ("sample.py --ckpt={float} --prompt_file=latin.txt", "latin.txt is not UTF-8 text"),
        ("sample.py --ckpt={float} --temperature=nan", "temperature must be at least 0"),
        ("train.py --dataset=tiny --batch_size=0 --out_dir=x", "batch_size=0 must be at least 1"),
        ("train.py --dataset=tiny --device=tpu --out_dir=x", "device=tpu cannot be used"),
        ("eval.py --ckpt=out-nowhere", "no folder out-nowhere"),
        ("eval.py --ckpt=truncated", "truncated/model.safetensors is truncated, damaged"),
        ("eval.py --ckpt=config", "config holds no checkpoint"),
        ("eval.py --ckpt={qat} --pot_bits=4", "is quantized already"),
        ("eval.py --ckpt={float} --pot_bits=4 --out_dir={qat}", "out-qat holds a checkpoint already"),
        ("eval.py --ckpt={float},{qat} --pot_bits=4", "one float checkpoint"),
        ("eval.py --ckpt={float} --out_dir=x", "pass --pot_bits=4, say"),
        ("eval.py --ckpt={float} --dataset=other", "another vocabulary"),
        ("eval.py --ckpt={float} --split=all", "choose one of train, val, test"),
        ("sample.py --ckpt=out-nowhere", "no folder out-nowhere"),
        ("sample.py --ckpt={float} --prompt=Ä", "'Ä' is not in this model's vocabulary"),
        ("sample.py --ckpt={float} --prompt=", "the prompt is empty"),
        ("sample.py --ckpt={float} --prompt_file=nowhere.txt", "nowhere.txt"),
        ("sample.py --ckpt={float} --temperature=-1", "temperature must be at least 0"),
    ],
)  # fmt: skip
def test_errors(house, float_run, qat_run, monkeypatch, capsys, command, message):
    for name in ("empty", "other"):
        (house / "data" / name).mkdir(exist_ok=True)
        (house / "data" / name / "prepare.py").touch()
    if not (house / "data" / "other" / "test.bin").exists():
        dataset.write_chars(house / "data" / "other", dict.fromkeys(dataset.SPLITS, "0123456789" * 20))
        for name in ("foreign", "cut"):
            dataset.write_chars(
                (house / "data" / name).mkdir() or house / "data" / name, dict.fromkeys(dataset.SPLITS, "ab" * 100)
            )
        np.full(100, 500, dtype=np.uint16).tofile(house / "data" / "foreign" / "train.bin")
        (house / "data" / "cut" / "train.bin").write_bytes(b"odd")
        (house / "latin.txt").write_bytes("Käse".encode("latin-1"))
        (house / "packed").mkdir()
        (house / "packed" / "model.safetensors").write_bytes((house / qat_run / "model.safetensors").read_bytes())
        (house / "truncated").mkdir()
        (house / "truncated" / "model.safetensors").write_bytes(
            (house / float_run / "model.safetensors").read_bytes()[:5000]
        )
    before = {p: p.read_bytes() for f in (float_run, qat_run) for p in (house / f).iterdir()}
    monkeypatch.chdir(house)
    monkeypatch.setattr(sys, "argv", command.format(float=float_run, qat=qat_run).split(" "))
    script = importlib.import_module(command.split(".")[0])
    with pytest.raises(SystemExit) as e:
        configurator.run(script.main, script.Settings)
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert len(error.splitlines()) == 1 and "error: " in error and message in error, error
    assert not (house / "x").exists() and {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("log_interval", [5, 1000])
def test_diverged_training_stops_and_keeps_the_checkpoint(house, sh, float_run, log_interval):
    folder = house / f"out-nan-{log_interval}"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(before := (house / float_run / "ckpt.pt").read_bytes())
    command = (
        f"train.py {TINY} --init_from=resume --out_dir={folder.name} --max_iters=200 --learning_rate=1e30 --grad_clip=0"
    )
    done = sh(f"{command} --log_interval={log_interval}", ok=False)
    assert done.returncode == 2 and "lower learning_rate" in done.stderr and "keeps the last checkpoint" in done.stderr
    assert (folder / "ckpt.pt").read_bytes() == before


def test_a_finished_run_stays_as_it_is(house, sh, float_run):
    files = {p: p.read_bytes() for p in (house / float_run).iterdir()}
    done = sh(f"train.py {TINY} --init_from=resume --out_dir={float_run} --max_iters=30")
    assert "is finished: step 30 of 30" in done.stdout and {p: p.read_bytes() for p in files} == files


def test_float_control_and_its_float_model(house, sh, float_run):
    command = f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-control --batch_size=4 --eval_interval=10"
    sh(f"{command} --max_iters=10")
    with open(house / "out-control" / "log.jsonl", "a") as f:
        f.write('{"step": 1')  # a run that was killed while it wrote
    sh(f"{command.replace(f'init_from={float_run}', 'init_from=resume')} --max_iters=20")
    (row,) = last_json(sh("eval.py --ckpt=out-control"))["rows"]
    assert row["method"] == "float control" and row["steps"] == 20 and row["kl"] > 0


def test_settings_of_the_optimizer_hold_after_resume(house, sh, float_run):
    folder = house / "out-decay"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((house / float_run / "ckpt.pt").read_bytes())
    sh(f"train.py {TINY} --init_from=resume --out_dir=out-decay --max_iters=40 --weight_decay=0.7 --beta1=0.5")
    groups = checkpoint.load_training(str(folder))["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and groups[0]["betas"] == (0.5, 0.95)
