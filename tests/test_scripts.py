"""train.py, eval.py and sample.py as a user runs them."""

import copy
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import checkpoint
import configurator
import dataset
import eval
import pot
import sample
import tokenizer
import train


def rows_of(workdir, done):
    """Reads the rows of the JSON file that the last line of eval.py names."""
    path = done.stdout.splitlines()[-1].removeprefix("written to ")
    return json.loads((workdir / path).read_text())["rows"]


def log_of(workdir, folder):
    return [json.loads(line) for line in (workdir / folder / "log.jsonl").read_text().splitlines()]


def weights(workdir, folder):
    return checkpoint.load_training(str(workdir / folder)).model


# --- train.py ---


def test_training_lowers_the_loss_and_writes_files(workdir, float_run, qat_run):
    for folder, initial_loss in ((float_run, math.log(28)), (qat_run, None)):
        names = {p.name for p in (workdir / folder).iterdir()}
        assert names == {"ckpt.pt", "model.safetensors", "log.jsonl", "loss.png"}
        log = log_of(workdir, folder)
        losses = [e["loss"] for e in log if "loss" in e]
        assert all(e["tokens_per_s"] > 0 for e in log if "loss" in e)
        assert log[-1]["seconds"] > 0 and log[-1]["peak_bytes"] > 2**26
        if initial_loss:
            assert losses[-1] < losses[0] < initial_loss + 0.3
    _, info = checkpoint.load_model(str(workdir / qat_run))
    assert info.method == "QAT" and info.pot.bits == 4 and info.provenance["torch"] == torch.__version__


def test_validation_before_the_first_step(workdir, sh, float_run):
    """It comes beside the float model's, and changes no weight."""
    command = f"train.py --dataset=tiny --init_from={float_run} --batch_size=4 --max_iters=3 --dropout=0.1 --pot_bits=3"
    done = sh(f"{command} --out_dir=out-before")
    model, _ = checkpoint.load_float(str(workdir / float_run))
    ids = dataset.load(str(workdir / "data" / "tiny"), "val")[0].astype(np.int64)
    losses = [brute_loss(model, ids, 32), brute_loss(pot.quantize_(model, pot.PoTConfig(bits=3)), ids, 32)]
    log = log_of(workdir, "out-before")
    assert [e["step"] for e in log[:3]] == [0, 0, 3]
    assert [log[0]["float_loss"], log[1]["val_loss"]] == pytest.approx(losses, abs=1e-4)
    for line in (
        f"float model  validation loss {losses[0]:.4f}",
        f"step 0/3  validation loss {losses[1]:.4f} before QAT",
    ):
        assert f"{line}\n" in done.stdout
    starts = [line.split("  ")[0] for line in done.stdout.splitlines()]
    first, second = (i for i, start in enumerate(starts) if start == f"validation on {len(ids)} tokens")
    assert first < starts.index("float model") < second < starts.index("step 0/3")  # no silence while it validates
    rows = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines()[-10:])
    assert {k.strip(): v for k, v in rows.items()}["before QAT"] == f"{losses[1]:.4f}"
    with pytest.MonkeyPatch.context() as patch:
        import train

        patch.setattr(train, "validate", lambda job: 1.0)
        sh(f"{command} --out_dir=out-unvalidated")
    a, b = weights(workdir, "out-before"), weights(workdir, "out-unvalidated")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_best_model_is_kept_beside_the_last(workdir, sh, float_run, monkeypatch):
    import train

    command = (
        f"train.py --dataset=tiny --init_from={float_run} --batch_size=4 --min_lr=1e-3 --pot_bits=4 --eval_interval=4"
    )
    sh(f"{command} --max_iters=4 --out_dir=out-four")
    expected = checkpoint.load_model(str(workdir / "out-four"))[0].state_dict()
    losses = iter([3.0, 3.0, 1.0, 2.0, 1.5, 9.0])  # float, before QAT, steps 4, 8, 12 and 16
    monkeypatch.setattr(train, "validate", lambda job: next(losses))
    done = sh(f"{command} --max_iters=8 --out_dir=out-keep --keep=best")
    assert re.search(r"^lowest, in best/ +1.0000$", done.stdout, re.MULTILINE)
    sh("train.py --init_from=resume --out_dir=out-keep --max_iters=12")  # keeps on keeping
    model, info = checkpoint.load_model(str(workdir / "out-keep" / "best"))
    assert (info.step, info.val_loss, info.method) == (4, 1.0, "QAT")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())
    last, info = checkpoint.load_model(str(workdir / "out-keep"))
    assert (info.step, info.val_loss) == (12, 1.5) and checkpoint.load_training(
        str(workdir / "out-keep")
    ).info.step == 12
    assert not all(torch.equal(last.state_dict()[k], v) for k, v in expected.items())
    best = str(workdir / "out-keep" / "best")
    checkpoint.save_model(best, model, replace(checkpoint.load_model(best)[1], val_loss=None))  # of another program
    sh("train.py --init_from=resume --out_dir=out-keep --max_iters=16")
    assert checkpoint.load_model(best)[1].val_loss == 9.0
    monkeypatch.undo()
    assert sh("sample.py --ckpt=out-keep/best --prompt=the --max_new_tokens=3").stdout
    assert "keep=first must be last or best" in sh(f"{command} --keep=first --out_dir=x", ok=False).stderr


def test_best_model_has_its_tokenizer_from_the_start(workdir, sh, monkeypatch):
    """A run that dies in the folder best leaves no model without the tokenizer."""

    def die(folder, model, info):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_model", die)
    options = (
        "--dataset=openwebtext-llama --init_from=llama --pot_bits=4 --batch_size=2 --block_size=8 --eval_tokens=20"
    )
    done = sh(f"train.py {options} --keep=best --max_iters=1 --out_dir=out-dies", ok=False)
    assert "disk full" in done.stderr
    assert {p.name for p in (workdir / "out-dies" / "best").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_resume_takes_the_settings_of_the_run(workdir, sh, float_run):
    common = f"train.py --dataset=tiny --init_from={float_run} --batch_size=4 --pot_bits=3 --pot_granularity=channel"
    common += " --distill=0.5 --seed=3 --eval_interval=7 --log_interval=3"
    sh(f"{common} --max_iters=14 --out_dir=out-own")
    done = sh("train.py --init_from=resume --out_dir=out-own --max_iters=20 --learning_rate=5e-4 --log_interval=100")
    assert "PoT 3 bits, per channel: 0.10 M parameters on cpu, step 14 to 20, tiny" in done.stdout
    settings = checkpoint.load_training(str(workdir / "out-own")).info.settings
    expected = {"batch_size": 4, "distill": 0.5, "seed": 3, "eval_interval": 7, "init_from": "resume"}
    expected |= {"max_iters": 20, "learning_rate": 5e-4, "log_interval": 100}  # passed, the last one is the default
    assert expected.items() <= settings.items() and settings["pot"]["granularity"] == "channel"
    # Per-channel weights use neither a group size nor eps, so these may differ. Bits may not.
    resume = "train.py --init_from=resume --out_dir=out-own --max_iters=21"
    sh(f"{resume} --pot_group_size=16 --pot_eps=0.5")
    assert "settings ask for PoT 4 bits, per channel: resume" in sh(f"{resume} --pot_bits=4", ok=False).stderr
    assert "no folder out:" in sh("train.py --init_from=resume", ok=False).stderr


def test_progress_within_a_step(monkeypatch, capsys):
    import train

    now = [1000.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    s = train.Settings(max_iters=500, batch_size=12, gradient_accumulation_steps=32)
    job = train.Job(s, None, None, None, None, 64, "cpu", 0, 1, 0, start=1000.0, shown=1000.0)
    lines = []
    for i in range(1, 33):  # a step of 204 seconds
        now[0] += 204 / 32
        train.show_progress(job, i / 32)
        lines.append(capsys.readouterr().err)
    assert [i for i, line in enumerate(lines, 1) if line] == [10, 20, 30]
    assert lines[9] == "step 0.31/500  120 tokens/s  28.3 h left\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now[0] += 10
    train.show_progress(job, 1.0)
    assert capsys.readouterr().err.startswith("step 1.00/500")


def test_curves_of_a_run(monkeypatch):
    """Training and validation curve are losses of the text, and the float model is a line."""
    from extras import plot

    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    entries = [{"step": 0, "float_loss": 1.5}, {"step": 0, "val_loss": 1.8}, {"step": 1, "loss": 0.2, "text_loss": 1.9}]
    plot.draw_training([*entries, {"step": 2, "loss": 1.7}, {"step": 2, "val_loss": 1.6}], "run", "x.png")
    lines = {line.get_label().split()[0]: line.get_ydata() for line in figures[0].axes[0].lines[:2]}
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [0.5, 1.5]
    assert list(lines["training"]) == [1.9, 1.7] and list(lines["validation"]) == [1.8, 1.6]
    assert list(figures[0].axes[0].lines[2].get_ydata()) == [1.5, 1.5]


@pytest.mark.parametrize("kind", ["float", "QAT"])
def test_killed_and_resumed_run_ends_with_the_same_weights(workdir, sh, float_run, kind):
    qat = f"--dataset=tiny --init_from={float_run} --pot_bits=4 --batch_size=4 --eval_interval=10 --log_interval=5"
    start = TINY if kind == "float" else qat
    command = f"train.py {start} --dropout=0.1 --gradient_accumulation_steps=2 --max_iters=60"
    whole, cut = f"out-whole-{kind}", f"out-cut-{kind}"
    sh(f"{command} --out_dir={whole}")
    args = [sys.executable, *f"{command} --out_dir={cut}".split()]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    process = subprocess.Popen(args, cwd=workdir, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 35/"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert not (workdir / cut / "model.safetensors").exists()
    sh(f"{command} --out_dir={cut} --init_from=resume")
    expected, actual = weights(workdir, whole), weights(workdir, cut)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[k], actual[k]) for k in expected)
    logs = [[e["step"] for e in map(json.loads, open(workdir / f / "log.jsonl"))] for f in (whole, cut)]
    assert logs[0] == logs[1]
    files = [(workdir / f / "model.safetensors").read_bytes() for f in (whole, cut)]
    assert files[0] == files[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_run_that_then_resumes(workdir, sh, signum):
    command, whole, cut = f"train.py {TINY} --max_iters=40", f"out-unasked-{signum}", f"out-asked-{signum}"
    args = [sys.executable, *f"{command} --out_dir={cut} --eval_interval=1000".split()]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    process = subprocess.Popen(args, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 15/"):
            process.send_signal(signum)
    assert process.wait() == 128 + signum
    assert lines[-1].startswith("stopped at step ") and "Traceback" not in "".join(lines)
    assert 15 <= checkpoint.load_training(str(workdir / cut)).info.step < 40
    sh(f"{command} --out_dir={cut} --init_from=resume --eval_interval=1000")
    sh(f"{command} --out_dir={whole} --eval_interval=1000")
    a, b = weights(workdir, whole), weights(workdir, cut)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_signal_ends_a_validation(workdir, sh, monkeypatch):
    """The checkpoint is written before. A resumed run validates again, and ends as a run in one piece."""
    import train

    validate, calls = train.validate, []

    def interrupted(job):
        calls.append(job.step)
        if job.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return validate(job)

    command = f"train.py {TINY} --max_iters=20 --dropout=0.1 --keep=best"
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupted)
        done = sh(f"{command} --out_dir=out-validation", ok=False)
        assert (
            done.returncode == 128 + signal.SIGTERM and "stopped at step 10, which out-validation/ keeps" in done.stdout
        )
        done = sh("train.py --init_from=resume --out_dir=out-validation", ok=False)  # the same validation again
        assert done.returncode == 128 + signal.SIGTERM and calls == [0, 10, 10]
    sh("train.py --init_from=resume --out_dir=out-validation")
    sh(f"{command} --out_dir=out-in-one-piece")
    for name in (".", "best"):
        a, b = ((workdir / out / name / "model.safetensors") for out in ("out-validation", "out-in-one-piece"))
        assert a.read_bytes() == b.read_bytes()
    steps = [e["step"] for e in checkpoint.read_log(str(workdir / "out-validation")) if "val_loss" in e]
    assert steps == [0, 10, 20]


def test_lock_of_a_run_folder(workdir, sh, float_run):
    lock = checkpoint.Lock(str(workdir / "out-held"))
    lock.acquire()
    done = sh(f"train.py {TINY} --max_iters=1 --out_dir=out-held", ok=False)
    assert "out-held is in use by another run" in done.stderr and not list((workdir / "out-held").iterdir())
    done = sh(
        f"train.py --dataset=tiny --init_from={float_run} --pot_bits=4 --max_iters=0 --out_dir=out-held", ok=False
    )
    assert "out-held is in use by another run" in done.stderr  # PTQ, too
    lock.__exit__()
    sh(f"train.py {TINY} --max_iters=1 --out_dir=out-held")


@pytest.mark.parametrize("room", ["none", "log", "half the checkpoint"])
def test_full_disk(workdir, sh, float_run, room):
    """A limit on the size of files stands in for a full disk, so a real write fails."""
    folder = workdir / f"out-full-{room.split()[0]}"
    folder.mkdir()
    for name in ("ckpt.pt", "log.jsonl"):
        shutil.copy(workdir / float_run / name, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    sizes = {"none": 0, "log": len(before["log.jsonl"]), "half the checkpoint": len(before["ckpt.pt"]) // 2}
    command = f"train.py {TINY} --init_from=resume --max_iters=40 --out_dir={folder.name}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[room], limits[1]))
    try:
        done = sh(command, ok=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    name = "ckpt.pt" if room.startswith("half") else "log.jsonl"
    assert f"cannot write {folder.name}/{name}: [Errno 27] File too large" in done.stderr
    assert "is untouched" in done.stderr
    assert (folder / "ckpt.pt").read_bytes() == before["ckpt.pt"]
    assert before.keys() == {p.name for p in folder.iterdir()}
    sh(command)  # the disk has room again


def test_read_only_folder(workdir, sh, float_run):
    folder = workdir / "out-read-only"
    shutil.copytree(workdir / float_run, folder)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root writes anywhere")
    done = sh(f"train.py {TINY} --init_from=resume --max_iters=40 --out_dir={folder.name}", ok=False)
    folder.chmod(0o700)
    assert f"{folder.name} cannot be written to" in done.stderr and {p: p.read_bytes() for p in before} == before


def test_one_step_equals_plain_torch(workdir, sh):
    """Two micro-batches, clipping and AdamW against a plain loop."""
    sh(f"train.py {TINY} --max_iters=1 --learning_rate=0 --out_dir=out-zero")  # saves the initial weights
    options = "--max_iters=2 --gradient_accumulation_steps=2 --weight_decay=0.3 --learning_rate=0.01"
    sh(f"train.py {TINY} {options} --out_dir=out-two")
    model, _ = checkpoint.load_model(str(workdir / "out-zero"))
    data, _ = dataset.load(str(workdir / "data" / "tiny"), "train")
    model.requires_grad_(True).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=False)
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 2))
        starts = np.random.default_rng([1337, step]).integers(len(data) - 32, size=8)
        rows = torch.tensor(np.stack([data[p : p + 33] for p in starts]).astype(np.int64))
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, w in weights(workdir, "out-two").items():
        assert torch.allclose(model.state_dict()[name], w, atol=1e-5), name


@pytest.mark.parametrize("last_position", [False, True])
def test_distillation_against_plain_torch(workdir, sh, float_run, last_position):
    """One step against a plain loop: half text loss, half cross entropy with the float model's predictions."""
    out = f"out-distilled-{last_position}"
    start = f"train.py --dataset=tiny --init_from={float_run} --batch_size=4 --weight_decay=0 --learning_rate=0.01"
    sh(f"{start} --pot_bits=4 --distill=0.5 --last_position={last_position} --max_iters=1 --out_dir={out}")
    teacher, _ = checkpoint.load_float(str(workdir / float_run))
    student, _ = checkpoint.load_float(str(workdir / float_run))
    student.requires_grad_(True).train()
    pot.prepare(student, pot.PoTConfig())
    data, _ = dataset.load(str(workdir / "data" / "tiny"), "train")
    starts = np.random.default_rng([1337, 0]).integers(len(data) - 32, size=4)
    rows = torch.tensor(np.stack([data[p : p + 33] for p in starts]).astype(np.int64))
    keep = slice(-1, None) if last_position else slice(None)
    logits, teacher_logits = student(rows[:, :-1])[:, keep], teacher(rows[:, :-1])[:, keep].detach()
    hard = F.nll_loss(logits.log_softmax(-1).flatten(0, 1), rows[:, 1:][:, keep].flatten())
    loss = 0.5 * hard - 0.5 * (teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    (logged,) = (e for e in log_of(workdir, out) if "loss" in e)
    assert [logged["loss"], logged["text_loss"]] == pytest.approx([loss.item(), hard.item()], abs=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    torch.optim.AdamW(student.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0).step()
    trained = weights(workdir, out)
    for name, w in student.state_dict().items():
        if "quantizer" not in name:
            # Adam's first step is the sign of the gradient. Tiny gradients may have either sign.
            assert (trained[name] - w).abs().lt(1e-4).float().mean() > 0.99, name
    control = sh(f"{start} --max_iters=1 --out_dir={out}-control --distill=0.5")  # no pot_ keys: a float control
    assert control.stdout.startswith("float")
    assert "pass --init_from" in sh(f"train.py {TINY} --distill=0.5 --out_dir=out-none", ok=False).stderr
    assert "from 0 to 1" in sh(f"{start} --pot_bits=4 --distill=2 --out_dir=out-none", ok=False).stderr


def test_distillation_without_a_float_model(workdir, sh):
    command = "train.py --dataset=tiny --batch_size=4 --pot_bits=4"
    sh(f"{command} --n_layer=1 --n_head=1 --n_embd=64 --block_size=16 --max_iters=1 --out_dir=out-scratch-qat")
    done = sh(f"{command} --init_from=out-scratch-qat --distill=0.5 --out_dir=x", ok=False)
    assert "comes from no float model to learn from: leave distill out" in done.stderr and not (workdir / "x").exists()


def test_batches_depend_on_seed_and_step_alone():
    from train import Settings, batch

    data = np.arange(5000, dtype=np.uint16)
    a, b = Settings(seed=3), Settings(seed=3, out_dir="elsewhere", learning_rate=1.0)
    for step in (0, 7):
        x, y = batch(data, 16, a, step)
        assert torch.equal(x, batch(data, 16, b, step)[0]) and torch.equal(x + 1, y)
    assert not torch.equal(batch(data, 16, a, 0)[0], batch(data, 16, a, 1)[0])
    assert not torch.equal(batch(data, 16, a, 0)[0], batch(data, 16, Settings(seed=4), 0)[0])


def test_zero_steps_give_ptq(workdir, sh, float_run):
    done = sh(f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-ptq0 --pot_bits=3 --max_iters=0")
    assert done.stdout.startswith("PTQ, PoT 3 bits, groups of 64: ") and "validation loss" in done.stdout
    assert [p.name for p in (workdir / "out-ptq0").iterdir()] == ["model.safetensors"]
    model, info = checkpoint.load_model(str(workdir / "out-ptq0"))
    assert (info.method, info.step, info.origin, info.pot.bits) == ("PTQ", 0, float_run, 3)
    expected, _ = checkpoint.load_float(str(workdir / float_run))
    pot.quantize_(expected, pot.PoTConfig(bits=3))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.state_dict().items())
    ids = dataset.load(str(workdir / "data" / "tiny"), "val")[0].astype(np.int64)
    assert info.val_loss == pytest.approx(brute_loss(model, ids, 32), abs=1e-5)


def test_ptq_of_a_broken_model(workdir, sh, float_run):
    model, info = checkpoint.load_model(str(workdir / float_run))
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)
    checkpoint.save_model(str(workdir / "out-nan-float"), model, info)
    command = "train.py --dataset=tiny --init_from=out-nan-float --pot_bits=4 --max_iters=0 --out_dir=out-nan-ptq"
    assert "the validation loss is nan" in sh(command, ok=False).stderr
    assert not (workdir / "out-nan-ptq" / "model.safetensors").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ptq_ends_at_a_signal(workdir, float_run, signum):
    """GPTQ takes minutes on a large model. A signal ends it at once and leaves nothing."""
    out = f"out-ptq-signal-{signum}"
    command = f"train.py --dataset=tiny --init_from={float_run} --out_dir={out} --pot_bits=4 --max_iters=0"
    args = [sys.executable, *f"{command} --calibrate_tokens=2000000".split()]
    process = subprocess.Popen(args, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().startswith("PTQ, ")
    time.sleep(1)
    process.send_signal(signum)
    assert process.wait(60) == (130 if signum == signal.SIGINT else -signal.SIGTERM)
    assert not (workdir / out).exists()


def test_signal_after_the_last_step_is_not_lost(workdir, sh, monkeypatch):
    """The run finishes first. Then the signal ends the process, and with it a sweep that called train.py."""
    import train

    finish = train.finish
    monkeypatch.setattr(train, "finish", lambda job: os.kill(os.getpid(), signal.SIGINT) or finish(job))
    done = sh(f"train.py {TINY} --max_iters=1 --out_dir=out-late-signal", ok=False)
    assert done.returncode == 130 and (workdir / "out-late-signal" / "model.safetensors").exists()


def test_training_from_a_finished_model(workdir, sh, float_run):
    """PTQ and fine-tuning need no more than a float model.safetensors. A packed file is not enough."""
    for name, run in (("out-alone", float_run), ("out-alone-packed", "out-ptq-alone")):
        (workdir / name).mkdir()
        (workdir / name / "model.safetensors").write_bytes((workdir / run / "model.safetensors").read_bytes())
        if name == "out-alone":
            sh("train.py --dataset=tiny --init_from=out-alone --out_dir=out-ptq-alone --pot_bits=3 --max_iters=0")
            command = "train.py --dataset=tiny --init_from=out-alone --batch_size=4 --max_iters=1 --learning_rate=0"
            sh(f"{command} --out_dir=out-tuned-alone")
    tuned, expected = (checkpoint.load_float(str(workdir / f))[0].state_dict() for f in ("out-tuned-alone", float_run))
    assert all(torch.equal(tuned[k], expected[k]) for k in expected)
    done = sh("train.py --dataset=tiny --init_from=out-alone-packed --pot_bits=3 --max_iters=0 --out_dir=x", ok=False)
    assert "out-alone-packed holds packed weights only: pass the float model" in done.stderr


def test_wandb_offline(workdir, sh):
    pytest.importorskip("wandb")
    command = f"train.py {TINY} --max_iters=10 --out_dir=out-wandb --wandb_log=True --pot_terms=2"
    done = sh(command, WANDB_MODE="offline")
    (run,) = (workdir / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    content = file.read_bytes()
    for setting in (b"learning_rate", b"group_size", b"out-wandb"):
        assert setting in content
    log = log_of(workdir, "out-wandb")
    logged = [str(e[key]).encode() for e in log for key in ("loss", "val_loss") if key in e]
    assert len(logged) == 4 and all(value in content for value in logged)
    (table,) = (run / "files" / "media" / "table").iterdir()
    table = dict(json.loads(table.read_text())["data"])
    assert "validation loss" in table and all(value in done.stdout for value in table.values())


def test_wandb_that_cannot_start(workdir, sh, float_run, monkeypatch):
    """It says so before GPTQ, which takes minutes on a large model."""
    import train

    def init(**kwargs):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for name in ("quantize", "evaluate"):
        monkeypatch.setattr(train, name, lambda *_, **__: pytest.fail("long work comes first"))
    command = f"train.py --dataset=tiny --init_from={float_run} --pot_bits=4 --calibrate_tokens=500 --wandb_log=True"
    done = sh(f"{command} --max_iters=1 --out_dir=out-no-wandb", ok=False)
    assert "cannot log to wandb (RuntimeError)" in done.stderr and not (workdir / "out-no-wandb").exists()


def test_two_processes_equal_one_with_twice_the_batch(workdir, sh, float_run):
    common = f"train.py --dataset=tiny --init_from={float_run} --pot_bits=4 --gradient_accumulation_steps=2"
    common += " --max_iters=6 --eval_interval=3 --log_interval=2 --learning_rate=1e-3"
    sh(f"{common} --batch_size=4 --out_dir=out-process")
    # gloo's threads end before Python does: later, a thread that frees a tensor aborts the process.
    script = "import os, runpy\nrunpy.run_path('train.py', run_name='__main__')\n"
    script += "tasks = '/proc/self/task'\nfor thread in os.listdir(tasks) if os.path.exists(tasks) else []:\n"
    script += "    assert 'gloo' not in open(f'{tasks}/{thread}/comm').read()\n"
    (workdir / "train_and_look.py").write_text(script)
    command = common.replace("train.py", "train_and_look.py") + " --batch_size=2 --out_dir=out-processes"
    done = sh(f"-m torch.distributed.run --standalone --nproc_per_node=2 {command}", OMP_NUM_THREADS="1")
    a, b = (weights(workdir, f) for f in ("out-process", "out-processes"))
    start = weights(workdir, float_run)
    largest_change = max((a[k] - start[k]).abs().max() for k in start)
    assert largest_change > 1e-3 and all(torch.allclose(a[k], b[k], atol=1e-2 * largest_change) for k in a)
    logs = [[json.loads(line) for line in open(workdir / f / "log.jsonl")] for f in ("out-process", "out-processes")]
    assert [e["step"] for e in logs[0]] == [e["step"] for e in logs[1]]
    for key in ("loss", "val_loss"):
        expected, actual = ([e[key] for e in log if key in e] for log in logs)
        assert expected == pytest.approx(actual, abs=1e-4) and expected
    files = {p.name for p in (workdir / "out-processes").iterdir()}
    assert files == {"ckpt.pt", "model.safetensors", "log.jsonl", "loss.png"}
    # One process prints: the float model, three validations and the final table.
    assert done.stdout.count("validation loss") == 5 and "cpu x 2" in done.stdout
    # A run may resume with another number of processes.
    sh(f"{common} --batch_size=4 --out_dir=out-processes --init_from=resume".replace("max_iters=6", "max_iters=8"))


def test_one_seed_gives_the_same_file(workdir, sh, float_run):
    command = f"train.py --dataset=tiny --init_from={float_run} --pot_bits=4 --calibrate_tokens=500 --max_iters=6"
    contents = []
    for out in ("out-same", "out-same-too"):
        sh(f"{command} --batch_size=4 --out_dir={out}")
        contents.append((workdir / out / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc to find the workers")
def test_job_ends_when_a_worker_dies(workdir, sh):
    command = f"train.py {TINY} --max_iters=100000 --out_dir=out-dying --pot_bits=4 --dtype=bfloat16"
    args = [sys.executable, *f"-m torch.distributed.run --standalone --nproc_per_node=2 {command}".split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(args, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    for line in job.stdout:
        if line.startswith("step 15/"):
            break
    processes = [p for p in os.listdir("/proc") if p.isdigit() and os.path.exists(f"/proc/{p}/stat")]
    parents = {p: open(f"/proc/{p}/stat").read().rpartition(")")[2].split()[1] for p in processes}
    workers = sorted((p for p in parents if parents[p] == str(job.pid)), key=int)
    os.kill(int(workers[-1]), signal.SIGKILL)
    start = time.time()
    messages = job.communicate(timeout=60)[0]
    assert job.returncode and time.time() - start < 60 and "]: Traceback" not in messages
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    step = checkpoint.load_training(str(workdir / "out-dying")).info.step
    assert step >= 10
    sh(f"{command} --init_from=resume".replace("100000", str(step + 5)))


@pytest.mark.parametrize("message", ["Connection closed by peer", "connection reset", "NCCL error", "shape"])
@pytest.mark.parametrize("running", [False, True])
def test_end_of_another_process_is_one_line(monkeypatch, running, message):
    """The rest of the processes then fail in gloo or NCCL."""
    import train

    monkeypatch.setattr(train.dist, "is_initialized", lambda: running)
    is_ours = running and message != "shape"
    with pytest.raises(ValueError if is_ours else RuntimeError, match="another process" if is_ours else message):
        with train.peers_named():
            raise RuntimeError(message)


def test_loss_of_the_last_position_alone():
    from model import GPT, GPTConfig
    from train import Settings, batch

    data = np.arange(5000, dtype=np.uint16)
    (x, y), (_, last) = (batch(data, 16, Settings(last_position=p), 0) for p in (False, True))
    assert torch.equal(last[:, -1], y[:, -1]) and (last[:, :-1] == -100).all()
    model = GPT(GPTConfig(vocab_size=5000, n_layer=1, n_head=1, n_embd=8, block_size=16))
    assert torch.allclose(model(x, last)[1], F.cross_entropy(model(x)[:, -1], y[:, -1]))


def test_calibrated_training_starts_from_gptq(workdir, sh, float_run):
    tokens = "--pot_bits=3 --calibrate_tokens=1000 --block_tokens=16000"
    done = sh(f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-gptq0 {tokens} --max_iters=0")
    assert "mean relative output error of the layers" in done.stdout
    # With a learning rate of 0, QAT ends with the weights that it starts from.
    start = f"train.py --dataset=tiny --init_from={float_run} --batch_size=4 --max_iters=1 --learning_rate=0"
    sh(f"{start} --out_dir=out-gptq1 {tokens}")
    sh(
        f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-rtn {tokens} --calibrate_tokens=0 --block_tokens=0 --max_iters=0"
    )
    rows = rows_of(workdir, sh(f"eval.py --ckpt={float_run},out-rtn,out-gptq0"))
    method = "PTQ, GPTQ on 992 tokens, blocks trained on 16,000 tokens"
    assert [r["method"] for r in rows] == ["float", "PTQ", method]
    assert rows[0]["loss"] < rows[2]["loss"] < rows[1]["loss"]
    ptq, qat = (checkpoint.load_model(str(workdir / f"out-gptq{i}"))[0].state_dict() for i in (0, 1))
    assert all(torch.equal(ptq[k], v) for k, v in qat.items())


# --- eval.py ---


def test_eval_of_float_and_qat(workdir, sh, float_run, qat_run):
    done = sh(f"eval.py --ckpt={float_run},{qat_run}/")
    rows = rows_of(workdir, done)
    assert [r["method"] for r in rows] == ["float", "QAT"]
    assert [r["steps"] for r in rows] == [30, 20]
    assert json.loads((workdir / qat_run / "eval.json").read_text())["rows"] == rows
    ids, _ = dataset.load(str(workdir / "data" / "tiny"), "test")
    for row in rows:
        # The reference sums the loss in float64, token by token.
        model, _ = checkpoint.load_model(str(workdir / row["ckpt"]))
        total = 0.0
        for i in range(0, len(ids) - 1, 32):
            x = torch.tensor(ids[i : i + 32].astype(np.int64))[: len(ids) - 1 - i]
            y = torch.tensor(ids[i + 1 : i + 33].astype(np.int64))
            total -= model(x[None])[0].double().log_softmax(-1)[torch.arange(len(y)), y].sum().item()
        assert row["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        size = (workdir / row["ckpt"] / "model.safetensors").stat().st_size
        assert row["bytes"] == size
    assert rows[1]["bytes"] < rows[0]["bytes"] / 4
    assert 0 < rows[1]["kl"] < 1 and 0 < rows[1]["top1_agreement"] <= 1 and "kl" not in rows[0]
    for word in ("bits/weight", "perplexity", f"{rows[1]['bytes']:,}", f"{rows[0]['loss']:.4f}"):
        assert word in done.stdout


def test_kl_against_float64(workdir, float_run, qat_run):
    from metrics import evaluate

    (quantized, _), (float_model, _) = (checkpoint.load_model(str(workdir / f)) for f in (qat_run, float_run))
    ids, _ = dataset.load(str(workdir / "data" / "tiny"), "val")
    ids = ids[:129]  # four whole windows
    result = evaluate(quantized, ids, reference=float_model)
    x = torch.tensor(ids[:128].astype(np.int64)).view(4, 32)
    p, q = (model(x).double().log_softmax(-1) for model in (float_model, quantized))
    assert result["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert evaluate(float_model, ids, reference=float_model)["kl"] == pytest.approx(0, abs=1e-7)


def test_evaluate_keeps_mode_and_random_state(workdir, float_run):
    from metrics import evaluate

    model, _ = checkpoint.load_model(str(workdir / float_run))
    ids, _ = dataset.load(str(workdir / "data" / "tiny"), "val")
    before = torch.get_rng_state()
    losses = {evaluate(model.train(mode), ids)["loss"] for mode in (True, False, True)}
    assert len(losses) == 1 and model.training and torch.equal(torch.get_rng_state(), before)


def test_qat_checkpoint_evaluates_like_the_packed_file(workdir, sh, qat_run):
    folder = workdir / "out-half"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((workdir / qat_run / "ckpt.pt").read_bytes())
    done = sh(f"eval.py --ckpt=out-half,{qat_run} --sqnr=True")
    training_row, packed_row = rows_of(workdir, done)
    assert training_row["loss"] == packed_row["loss"] and abs(training_row["bytes"] - packed_row["bytes"]) < 1000
    assert done.stdout.count(" dB\n") == 11
    assert "no SQNR" in done.stdout  # the packed file of a QAT run has no float weights


def test_table_of_another_kind(workdir, sh, float_run):
    """table_ keys set the weights of the embeddings and the head, in PTQ, QAT and files."""
    keys = f"--dataset=tiny --init_from={float_run} --pot_bits=3 --table_bits=8 --table_grid=uniform"
    done = sh(f"train.py {keys} --max_iters=0 --out_dir=out-table")
    assert "PTQ, PoT 3 bits, groups of 64; tables uniform 8 bits, groups of 64" in done.stdout
    sh(f"train.py {keys} --max_iters=2 --eval_interval=1 --distill=1 --out_dir=out-table-qat")
    sh("sample.py --ckpt=out-table-qat --prompt=a --max_new_tokens=3")
    sh("eval.py --ckpt=out-table,out-table-qat")
    for folder in ("out-table", "out-table-qat"):
        model, info = checkpoint.load_model(str(workdir / folder))
        assert (info.pot.bits, info.table.bits, info.table.grid) == (3, 8, "uniform")
        for name, module in model.named_modules():
            if isinstance(module, (pot.PackedPoTLinear, pot.PackedPoTEmbedding)):
                assert module.packed.config == (info.pot if ".h." in name else info.table), name
    state = checkpoint.load_training(str(workdir / "out-table-qat"))
    assert checkpoint.model_of(state).lm_head.quantizer.config == info.table
    resume = "train.py --dataset=tiny --init_from=resume --table=None --out_dir=out-table-qat --max_iters=3"
    assert "tables uniform 8 bits" in sh(resume, ok=False).stderr
    done = sh(f"train.py --dataset=tiny --init_from={float_run} --table_bits=4 --out_dir=out-x", ok=False)
    assert "table_ keys need a pot_ key" in done.stderr


def test_eval_of_ptq(workdir, sh, float_run):
    pot_keys = "--pot_bits=2 --pot_granularity=tensor --max_iters=0"
    sh(f"train.py --dataset=tiny --init_from={float_run} {pot_keys} --out_dir=out-ptq2")
    done = sh(f"eval.py --ckpt={float_run},out-ptq2 --sqnr=True --json=a/b.json")
    assert done.stdout.endswith("written to a/b.json\n") and "{" not in done.stdout
    rows = rows_of(workdir, done)
    assert rows[1]["method"] == "PTQ" and rows[1]["loss"] > rows[0]["loss"] and rows[1]["kl"] > 0
    assert rows[1]["bits_per_weight"] < rows[0]["bits_per_weight"] / 4
    assert not (workdir / "out-ptq2" / "eval.json").exists()
    # The SQNR of a PTQ model compares its weights with those of the float model.
    floats, packed = (checkpoint.load_model(str(workdir / f))[0] for f in (float_run, "out-ptq2"))
    w, q = floats.transformer.wpe.weight.detach().double(), packed.transformer.wpe.weight.double()
    ratio = 10 * math.log10((w**2).sum() / ((w - q) ** 2).sum())
    assert f"{'transformer.wpe':<40} {ratio:6.2f} dB\n" in done.stdout


def test_mean_over_seeds():
    from eval import over_seeds

    row = {"method": "QAT", "weights": "PoT", "steps": 5, "dataset": "d", "split": "test"}
    rows = [row | {"seed": 1, "loss": 1.0}, row | {"seed": 2, "loss": 2.0}, row | {"seed": 1, "loss": 9.0, "steps": 6}]
    (summary,) = over_seeds(rows)
    assert summary["loss_mean"] == 1.5 and summary["loss_std"] == pytest.approx(0.5**0.5) and summary["seeds"] == [1, 2]


def brute_loss(model, ids, window):
    """Mean loss, summed in float64 token by token."""
    total = 0.0
    for i in range(0, len(ids) - 1, window):
        x = torch.tensor(ids[i : i + window])[: len(ids) - 1 - i]
        y = torch.tensor(ids[i + 1 : i + window + 1])
        total -= model(x[None])[0].double().log_softmax(-1)[torch.arange(len(y)), y].sum().item()
    return total / (len(ids) - 1)


@torch.no_grad()
def test_perplexity_of_a_text_file(workdir, sh):
    """Windows do not overlap and have the model's context or --block_size. A text file needs no data set."""
    text = "It was a dark and stormy night; \N{SNOWMAN} the rain fell in torrents.\n" * 5
    (workdir / "night.txt").write_text(text, encoding="utf-8")
    model, _ = checkpoint.load_model(str(workdir / "gpt2"))
    ids = list(text.encode())  # the stand-in tokenizer maps each byte to a token
    rows = [rows_of(workdir, sh(f"eval.py --ckpt=gpt2 --text=night.txt{more}"))[0] for more in ("", " --block_size=40")]
    for row, window in zip(rows, (96, 40)):
        assert row["block_size"] == window and row["tokens"] == len(ids) - 1
        assert row["loss"] == pytest.approx(brute_loss(model, ids, window), rel=1e-5)


@torch.no_grad()
def test_papers_protocol(workdir):
    from metrics import evaluate_last_position
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=80, vocab_size=30, n_layer=2, n_head=2, n_embd=16)).eval()
    ids, _ = dataset.load(str(workdir / "data" / "tiny"), "train")
    result = evaluate_last_position(model, ids, 7, "cpu")
    assert result == evaluate_last_position(model, ids, 7, "cpu")
    assert result["loss"] != evaluate_last_position(model, ids, 8, "cpu")["loss"]
    x = dataset.random_windows(ids, 65, 1200, 7)
    losses = [F.cross_entropy(model(row[None, :64])[0, -1:].double(), row[64:]).item() for row in x]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["loss_se"] == pytest.approx(np.std(losses, ddof=1) / 1200**0.5, rel=1e-4)


# --- GPT-2 ---


def test_configs_of_gpt2(workdir, sh):
    """Trains, evaluates and samples by the configs for GPT-2. A small GPT-2 in the folder `gpt2` replaces the hub's."""
    steps = "--max_iters=4 --eval_interval=2 --log_interval=2 --eval_tokens=300"
    few = f"{steps} --gradient_accumulation_steps=1 --batch_size=2"
    sh(f"train.py config/finetune_gpt2_pot4.py {few} --calibrate_tokens=200")
    sh(f"train.py config/paper_gpt2_pot4.py {few}")
    done = sh("eval.py config/eval_gpt2.py --ckpt=gpt2,out-gpt2-pot4,out-gpt2-paper --tokens=300")
    rows = rows_of(workdir, done)
    assert [r["method"] for r in rows] == ["float", "QAT", "QAT"] and [r["block_size"] for r in rows] == [96] * 3
    weights = ["float32", "PoT 4 bits, groups of 64", "paper PoT 5 bits, per tensor, range 2^7"]
    assert [r["weights"] for r in rows] == weights
    assert rows[1]["kl"] > 0 and rows[1]["bytes"] < 0.15 * rows[0]["bytes"]
    assert (workdir / "eval.json").exists() or (workdir / "out-gpt2-paper" / "eval.json").exists()
    sh("train.py config/ptq_gpt2_pot4.py --eval_tokens=300 --calibrate_tokens=200")
    done = sh("eval.py --ckpt=out-gpt2-paper,out-gpt2-ptq4 --dataset=openwebtext --protocol=paper --split=train")
    rows = rows_of(workdir, done)
    assert rows[1]["method"] == "PTQ, GPTQ on 192 tokens"
    assert all(r["loss_se"] > 0 and r["block_size"] == 64 for r in rows)
    for folder in ("gpt2", "out-gpt2-ptq4"):
        done = sh(f"sample.py --ckpt={folder} --prompt=Hello --max_new_tokens=5 --top_k=256")
        assert done.stdout.startswith("Hello")
    model, info = checkpoint.load_model(str(workdir / "out-gpt2-pot4"))
    assert model.config.block_size == 96 and info.origin == "gpt2"  # windows of 64 keep the context of 96


def test_config_of_own_text(workdir, sh):
    few = "--max_iters=2 --eval_interval=2 --gradient_accumulation_steps=1 --batch_size=2 --block_size=64"
    common = f"train.py config/finetune_text_pot4.py --dataset=openwebtext {few} --eval_tokens=300"
    done = sh(f"{common} --calibrate_tokens=200")
    assert "of the text" not in done.stdout  # no teacher: it learns the text
    assert checkpoint.load_model(str(workdir / "out-text-pot4" / "best"))[1].pot.bits == 4
    assert (workdir / "out-text-pot4" / "best" / "tokenizer.json").exists()


def test_multi_byte_letters_are_streamed_whole(workdir, monkeypatch, capsys):
    import sample
    from model import GPT

    monkeypatch.chdir(workdir)
    ids = [
        *"ä\N{SNOWMAN}".encode(),
        50300,
        0xC3,
        50256,
        65,
    ]  # 0xC3 starts a letter that never ends; 50256 ends the text
    monkeypatch.setattr(GPT, "generate", lambda *args, **kwargs: (torch.tensor([[i]]) for i in ids))
    sample.main(sample.Settings(ckpt="gpt2", prompt="a", max_new_tokens=len(ids)))
    output = capsys.readouterr()
    assert output.out == "aä\N{SNOWMAN}\N{REPLACEMENT CHARACTER}\n" and "--- 8 tokens" in output.err


# --- sample.py ---


def test_sampling_from_float_and_qat(workdir, sh, float_run, qat_run):
    (workdir / "prompt.txt").write_text("the lazy ")
    texts = {}
    for folder in (float_run, qat_run, "out-half"):
        command = f"sample.py --ckpt={folder} --max_new_tokens=60 --seed=5"
        done = sh(f"{command} --prompt_file=prompt.txt")
        assert done.stdout.startswith("the lazy ") and len(done.stdout) == len("the lazy ") + 60 + 1
        assert "60 tokens" in done.stderr and "tokens/s" in done.stderr
        assert sh(f"{command} --prompt_file=prompt.txt").stdout == done.stdout
        texts[folder] = done.stdout
    assert texts[qat_run] == texts["out-half"]  # the packed and the fake-quantized model give the same text
    command = f"sample.py --ckpt={float_run} --temperature=0 --max_new_tokens=20 --prompt=the"
    greedy = [sh(f"{command} --seed={s}").stdout for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_text_is_streamed(workdir, float_run):
    args = [sys.executable, "sample.py", f"--ckpt={float_run}", "--max_new_tokens=100000", "--prompt=the"]
    process = subprocess.Popen(args, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    start = time.time()
    assert process.stdout.read(10) and time.time() - start < 60
    process.kill()
    process.wait()


# --- a Llama-type model through every script ---


def test_llama_through_every_script(workdir, sh, tmp_path):
    """QAT with distillation, its float control, PTQ, eval, sampling and the exported folder, each with its tokenizer."""
    common = "--dataset=openwebtext-llama --init_from=llama --block_size=32 --batch_size=2 --eval_interval=2"
    pot = "--pot_bits=4 --pot_group_size=32 --calibrate_tokens=200"
    done = sh(f"train.py {common} {pot} --distill=1 --max_iters=2 --out_dir=out-llama-qat")
    assert "memory: at least" in done.stdout and "the float model to learn from" in done.stdout
    sh(f"train.py {common} --max_iters=2 --out_dir=out-llama-control")
    sh(f"train.py {common} {pot} --max_iters=0 --out_dir=out-llama-ptq")
    for run in ("out-llama-qat", "out-llama-control", "out-llama-ptq"):
        assert (workdir / run / "tokenizer.json").read_bytes() == (workdir / "llama" / "tokenizer.json").read_bytes()
        assert sh(f"sample.py --ckpt={run} --prompt=mow --max_new_tokens=5").stdout.startswith("mow")
        assert sh(f"sample.py --ckpt={run} --chat=True --prompt=mow --max_new_tokens=5").stdout
    sh(f"train.py {common} {pot} --max_iters=4 --distill=1 --init_from=resume --out_dir=out-llama-qat")
    done = sh("eval.py --ckpt=llama,out-llama-qat,out-llama-ptq --dataset=openwebtext-llama --json=llama.json")
    rows = json.loads((workdir / "llama.json").read_text())["rows"]
    assert [r["block_size"] for r in rows] == [96] * 3 and all(r["kl"] >= 0 for r in rows[1:])
    assert 4 < rows[1]["bits_per_weight"] < 8 < rows[0]["bits_per_weight"]
    (workdir / "a.txt").write_text("the men went to mow")
    sh("eval.py --ckpt=out-llama-ptq --text=a.txt --json=llama.json")
    assert json.loads((workdir / "llama.json").read_text())["rows"][0]["tokens"] == 17 - 1  # "the" is one token


def test_configs_of_smollm2(workdir, sh):
    """By a small Llama in the folder `smollm2`."""
    shutil.copytree(workdir / "llama", workdir / "smollm2")
    shutil.copytree(workdir / "data" / "openwebtext-llama", workdir / "data" / "openwebtext-smollm2")
    few = "--calibrate_tokens=200 --eval_tokens=200"
    sh(f"train.py config/ptq_smollm2_pot4.py {few}")
    done = sh(f"train.py config/finetune_smollm2_pot4.py {few} --max_iters=2 --batch_size=2 --block_size=96")
    assert "QAT, PoT 4 bits, groups of 64" in done.stdout
    done = sh("eval.py --ckpt=smollm2,out-smollm2-ptq4,out-smollm2-pot4 --dataset=openwebtext-smollm2 --tokens=300")
    rows = rows_of(workdir, done)
    assert [r["method"] for r in rows] == ["float", "PTQ, GPTQ on 192 tokens", "QAT"]


def test_a_model_trained_from_scratch_keeps_the_tokenizer_of_its_data(workdir, sh):
    shape = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --max_iters=1"
    sh(f"train.py --dataset=openwebtext-llama {shape} --out_dir=out-scratch-llama")
    assert sh("sample.py --ckpt=out-scratch-llama --prompt=the --max_new_tokens=3").stdout.startswith("the")


def test_gpt2_keeps_its_tokenizer_beside_it(workdir, sh, monkeypatch):
    sh(
        "train.py --dataset=openwebtext --init_from=gpt2 --max_iters=0 --pot_bits=4 --eval_tokens=200 --out_dir=out-gpt2-kept"
    )
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # sampling needs it no more
    assert sh("sample.py --ckpt=out-gpt2-kept --prompt=Hello --max_new_tokens=3").stdout.startswith("Hello")


def test_conversation_on_a_terminal(workdir, monkeypatch, capsys):
    import builtins

    import sample
    from model import GPT
    from tokenizer import FileTokenizer

    monkeypatch.chdir(workdir)
    named, asked, lines = FileTokenizer("llama"), [], iter(["and why?"])

    def generate(model, ids, *args, **kwargs):
        asked.append(named.decode(ids[0].tolist()))
        yield from (torch.tensor([[i]]) for i in [*named.encode("so"), 0, 5])  # 0 is <|im_end|>

    def type_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(GPT, "generate", generate)
    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    sample.main(sample.Settings(ckpt="llama", chat=True, prompt="why?"))
    first = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [first, first + "so<|im_end|>\n<|im_start|>user\nand why?<|im_end|>\n<|im_start|>assistant\n"]
    assert capsys.readouterr().out == "so\nso\n\n"


def test_models_that_do_not_fit_are_refused_before_the_first_step(workdir, sh, monkeypatch):
    import train

    monkeypatch.setattr(train, "free_memory", lambda device: 2_000_000)
    common = "--dataset=openwebtext-llama --init_from=llama --block_size=96 --batch_size=2 --out_dir=out-too-large"
    done = sh(f"train.py {common} --pot_bits=4 --pot_group_size=32 --distill=1 --max_iters=2", ok=False)
    assert "GiB free: lower batch_size" in done.stderr and "or leave distill out" in done.stderr
    assert not (workdir / "out-too-large").exists()


# --- errors: each prints one line, exits with status 2 and overwrites nothing ---


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
        ("train.py --dataset=tiny --init_from={float} --n_layer=3 --out_dir=x",
         "n_layer=3, but out-float was trained with n_layer=2"),
        ("train.py --dataset=tiny --init_from=resume --out_dir={float} --pot_bits=4", "resume with the same"),
        ("train.py --dataset=other --init_from={float} --out_dir=x", "another vocabulary"),
        ("eval.py --ckpt=llama --dataset=openwebtext",
         "prepare that text for it by `python data/DATASET/prepare.py --tokenizer=llama --out=openwebtext`"),
        ("eval.py --ckpt=gpt2 --dataset=openwebtext-llama", "--tokenizer=gpt2 --out=openwebtext-llama`"),
        ("sample.py --ckpt={float} --chat=True --prompt=a", "has no chat template, so it is no instruct model"),
        ("sample.py --ckpt=llama --chat=True", "the prompt is empty"),
        ("sample.py --ckpt=llama --chat=True --prompt=a --num_samples=2", "num_samples must be 1"),
        ("train.py --dataset=tiny --block_size=100000 --out_dir=x", "lower block_size"),
        ("train.py --dataset=tiny --n_embd=65 --out_dir=x", "n_embd=65 must be a multiple"),
        ("train.py --dataset=tiny --n_embd=32 --n_head=2 --n_layer=1 --block_size=8 --pot_bits=4 --out_dir=x",
         "transformer.wte: group_size 64 does not divide its 32"),
        ("train.py --dataset=tiny --max_iters=-1 --out_dir=x", "max_iters=-1 must be at least 0"),
        ("train.py --dataset=tiny --init_from=resume --out_dir={float} --max_iters=10",
         "out-float is at step 30 already"),
        ("train.py --dataset=tiny --init_from=packed --out_dir=x",
         "packed holds packed weights only: pass the float model that they come from (out-float)"),
        ("train.py --dataset=tiny --init_from=resume --out_dir=packed", "packed holds model.safetensors only"),
        ("train.py --dataset=tiny --init_from={float} --max_iters=0 --out_dir=x",
         "max_iters=0 only quantizes (PTQ): pass a pot_ setting"),
        ("train.py --dataset=tiny --init_from={float} --max_iters=0 --pot_bits=4 --out_dir={qat}",
         "out-qat holds a checkpoint already"),
        ("train.py --dataset=tiny --init_from={float} --pot_bits=4 --calibrate_tokens=-5 --out_dir=x",
         "calibrate_tokens=-5 must be at least 0"),
        ("train.py --dataset=tiny --init_from={float} --pot_bits=4 --block_tokens=2047 --out_dir=x",
         "block_tokens=2047 must be 0, or at least 2048"),
        ("train.py --dataset=tiny --init_from={float} --pot_bits=4 --out_dir=x\x1b", "holds a control character"),
        ("train.py --dataset=tiny\x9b --out_dir=x", "holds a control character: choose another name"),
        ("eval.py --ckpt={float} --pot_bits=4", "unknown key --pot_bits"),
        ("train.py --dataset=foreign --out_dir=x", "train.bin holds the token 500"),
        ("train.py --dataset=cut --out_dir=x", "train.bin is cut short"),
        ("train.py --dataset=short --block_size=32 --out_dir=x",
         "data/short/val.bin holds 20 tokens, a context of 32 needs more"),
        ("train.py --dataset=void --block_size=8 --out_dir=x",
         "data/void/train.bin holds 0 tokens, a context of 8 needs more"),
        ("train.py --dataset=tiny --device=meta --out_dir=x", "not one of cpu, cuda and mps"),
        ("eval.py --ckpt=,", "at least one folder"),
        ("eval.py --ckpt={qat} --reference=typo", "no folder typo"),
        ("sample.py --ckpt={float} --prompt_file=latin.txt", "latin.txt is not UTF-8 text"),
        ("sample.py --ckpt={float} --prompt=the\udcff", "is not UTF-8 text"),
        ("sample.py --ckpt={float} --temperature=1e-320", "temperature must be at least 0 (and 1e-6 if not 0)"),
        ("train.py --dataset=tiny --n_layer=100000000 --out_dir=x", "n_layer=100000000 must be an integer from 1 to 256"),
        ("train.py --dataset=tiny --n_embd=12000000 --out_dir=x", "the weights alone take"),
        ("train.py --dataset=tiny --block_size=200000000 --n_embd=1000008 --out_dir=x", "the weights alone take"),
        ("train.py --dataset=tiny --init_from={float} --batch_size=1000000000000 --out_dir=x", "the steps need at least"),
        ("train.py --dataset=tiny --init_from={float} --gradient_accumulation_steps=1000000000000 --out_dir=x",
         "the steps need at least"),
        ("train.py --dataset=tiny --init_from={float} --pot_bits=4 --calibrate_tokens=1000000000000 --out_dir=x",
         "the tokens of calibrate_tokens take"),
        ("train.py --dataset=tiny --out_dir=latin.txt/x", "latin.txt/x cannot be written to"),
        ("eval.py --ckpt={float} --json={float}/model.safetensors", "must be the name of a .json file"),
        ("eval.py --ckpt={float} --json=latin.txt/x.json", "cannot be written to"),
        ("eval.py --ckpt={float} --json=folder.json", "folder.json is a folder, and must be"),
        ("eval.py --ckpt={float} --json=" + 246 * "x" + ".json", "its name is too long: choose another"),
        ("train.py --dataset=tiny --out_dir=" + 256 * "x", "its name is too long: choose another"),
        ("eval.py --ckpt=folder.json", "folder.json/model.safetensors is a folder, and must be a file"),
        ("sample.py --ckpt={float} --temperature=nan", "temperature must be at least 0"),
        ("train.py --dataset=tiny --batch_size=0 --out_dir=x", "batch_size=0 must be at least 1"),
        ("train.py --dataset=tiny --device=tpu --out_dir=x", "device=tpu cannot be used"),
        ("eval.py --ckpt=out-nowhere", "no folder out-nowhere"),
        ("eval.py --ckpt=truncated", "truncated/model.safetensors is truncated, damaged"),
        ("eval.py --ckpt=config", "config holds no checkpoint"),
        ("eval.py --ckpt={float} --dataset=other", "another vocabulary"),
        ("eval.py --ckpt={float} --split=all", "choose one of train, val, test"),
        ("sample.py --ckpt=out-nowhere", "no folder out-nowhere"),
        ("sample.py --ckpt={float} --prompt=Ä", "'Ä' is not in this model's vocabulary"),
        ("sample.py --ckpt={float} --prompt=", "the prompt is empty"),
        ("sample.py --ckpt={float} --prompt_file=nowhere.txt", "nowhere.txt"),
        ("sample.py --ckpt={float} --temperature=-1", "temperature must be at least 0"),
        ("train.py --dataset=openwebtext --init_from=gpt2 --block_size=97 --out_dir=x",
         "block_size=97 is more than the context of gpt2, 96"),
        ("train.py --dataset=tiny --init_from=gpt2 --out_dir=x", "another vocabulary"),
        ("train.py --dataset=openwebtext --init_from=gpt2 --n_layer=3 --out_dir=x",
         "n_layer=3, but gpt2 was trained with n_layer=2"),
        ("train.py --dataset=openwebtext --init_from=gpt5 --out_dir=x", "no folder gpt5"),
        ("eval.py --ckpt=gpt2", "pass --dataset=openwebtext or --text FILE"),
        ("eval.py --ckpt=gpt2 --text=nowhere.txt", "nowhere.txt"),
        ("eval.py --ckpt=gpt2 --text=latin.txt", "latin.txt is not UTF-8 text"),
        ("eval.py --ckpt=gpt2 --dataset=openwebtext --block_size=97", "fit the model's 96"),
        ("eval.py --ckpt=gpt2 --dataset=tiny", "another vocabulary"),
        ("eval.py --ckpt={float} --protocol=papers", "unknown protocol 'papers'"),
        ("eval.py --ckpt={float} --protocol=paper", "protocol=paper takes a context of 64, this model has 32"),
        ("eval.py --ckpt={float} --tokens=1", "tokens=1 must be at least 2"),
        ("eval.py --ckpt={float} --block_size=0", "block_size=0 must be at least 1"),
        ("eval.py --ckpt={float},out-nowhere", "no folder out-nowhere"),
        ("eval.py --ckpt=gpt2 --dataset=openwebtext --protocol=paper --block_size=32", "leave block_size out"),
        ("train.py --dataset=tiny --block_size=0 --out_dir=x", "block_size=0 must be at least 1"),
        ("train.py --dataset=tiny --seed=-1 --out_dir=x", "seed=-1 must be at least 0"),
        ("train.py --dataset=tiny --learning_rate=-1 --out_dir=x", "learning_rate=-1.0 must be at least 0"),
        ("train.py --dataset=tiny --beta2=1 --out_dir=x", "beta2=1.0 must be below 1"),
        ("train.py --dataset=tiny --dropout=1.5 --out_dir=x", "dropout=1.5 must be at least 0 and below 1"),
        ("train.py --dataset=tiny --init_from={float} --dropout=1.5 --out_dir=x",
         "dropout=1.5 must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_errors(workdir, float_run, qat_run, monkeypatch, capsys, command, message):
    for name in ("empty", "other"):
        (workdir / "data" / name).mkdir(exist_ok=True)
        (workdir / "data" / name / "prepare.py").touch()
    if not (workdir / "data" / "other" / "test.bin").exists():
        dataset.write_chars(workdir / "data" / "other", dict.fromkeys(dataset.SPLITS, "0123456789" * 20))
        for name in ("foreign", "cut", "short", "void"):
            (workdir / "data" / name).mkdir()
            dataset.write_chars(workdir / "data" / name, dict.fromkeys(dataset.SPLITS, "ab" * 100))
            meta = dataset.load(str(workdir / "data" / name), "train")[1]
            (workdir / "data" / name / "meta.json").write_text(json.dumps(meta))  # without digests
        np.full(100, 500, dtype=np.uint16).tofile(workdir / "data" / "foreign" / "train.bin")
        (workdir / "data" / "cut" / "train.bin").write_bytes(b"odd")
        (workdir / "data" / "short" / "val.bin").write_bytes(bytes(40))
        (workdir / "data" / "void" / "train.bin").write_bytes(b"")
        (workdir / "latin.txt").write_bytes("Käse".encode("latin-1"))
        (workdir / "folder.json" / "model.safetensors").mkdir(parents=True)
        (workdir / "packed").mkdir()
        (workdir / "packed" / "model.safetensors").write_bytes((workdir / qat_run / "model.safetensors").read_bytes())
        (workdir / "truncated").mkdir()
        content = (workdir / float_run / "model.safetensors").read_bytes()
        (workdir / "truncated" / "model.safetensors").write_bytes(content[:5000])
    before = {p: p.read_bytes() for f in (float_run, qat_run) for p in (workdir / f).iterdir()}
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(sys, "argv", command.format(float=float_run, qat=qat_run).split(" "))
    script = importlib.import_module(command.split(".")[0])
    with pytest.raises(SystemExit) as e:
        configurator.run(script.main, script.Settings)
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert len(error.splitlines()) == 1 and "error: " in error and message in error, error
    assert not (workdir / "x").exists() and {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("log_interval", [5, 1000])
def test_diverged_run_stops_and_keeps_the_checkpoint(workdir, sh, float_run, log_interval):
    folder = workdir / f"out-nan-{log_interval}"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(before := (workdir / float_run / "ckpt.pt").read_bytes())
    options = "--init_from=resume --max_iters=200 --learning_rate=1e30 --grad_clip=0"
    done = sh(f"train.py {TINY} {options} --out_dir={folder.name} --log_interval={log_interval}", ok=False)
    assert done.returncode == 2 and "lower learning_rate" in done.stderr and "keeps the last checkpoint" in done.stderr
    assert (folder / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update(exp_avg=torch.zeros(3)),
        lambda state: state.update(exp_avg=torch.zeros(1).expand(state["exp_avg"].shape)),
        lambda state: state.update(step=torch.ones(2)),
        lambda state: state.pop("exp_avg"),
        lambda state: state.update(exp_avg="x"),
    ],
)
def test_damaged_optimizer_state(workdir, sh, float_run, damage):
    """Without a check, the fused step writes out of bounds."""
    folder = workdir / "out-moments"
    folder.mkdir(exist_ok=True)
    state = torch.load(workdir / float_run / "ckpt.pt", weights_only=True)
    damage(state["optimizer"]["state"][0])
    torch.save(state, folder / "ckpt.pt")
    done = sh(f"train.py {TINY} --init_from=resume --out_dir=out-moments --max_iters=32", ok=False)
    assert "the optimizer's state in this checkpoint is damaged" in done.stderr


def test_signal_to_a_diverged_run(workdir, sh, float_run, monkeypatch):
    """A run saves no weights after a loss that is not finite, even if a signal stops it. The error names the step."""
    import train

    folder = workdir / "out-nan-stop"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(before := (workdir / float_run / "ckpt.pt").read_bytes())
    monkeypatch.setattr(train.Stop, "asked", lambda self, world: setattr(self, "signal", 15) or asked())
    steps = iter(range(100))

    def asked():
        return next(steps) == 40

    options = "--init_from=resume --max_iters=200 --learning_rate=1e30 --grad_clip=0"
    intervals = "--eval_interval=1000 --log_interval=1000"
    done = sh(f"train.py {TINY} {options} {intervals} --out_dir=out-nan-stop", ok=False)
    assert "the loss is" in done.stderr and (folder / "ckpt.pt").read_bytes() == before
    step = int(done.stderr.partition("at step ")[2].partition(":")[0])
    assert 30 < step < 40


def test_sampling_from_a_model_with_nan(workdir, sh, float_run, monkeypatch):
    model, info = checkpoint.load_model(str(workdir / float_run))
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)
    checkpoint.save_model(str(workdir / "out-nan-model"), model, info)
    done = sh("sample.py --ckpt=out-nan-model --prompt=the --max_new_tokens=2", ok=False)
    assert "the model's logits are not finite" in done.stderr
    done = sh("eval.py --ckpt=out-nan-model", ok=False)
    assert "the loss of out-nan-model is nan" in done.stderr and not (workdir / "out-nan-model" / "eval.json").exists()


def test_resuming_a_finished_run_changes_nothing(workdir, sh, float_run):
    files = {p: p.read_bytes() for p in (workdir / float_run).iterdir()}
    done = sh(f"train.py {TINY} --init_from=resume --out_dir={float_run} --max_iters=30")
    assert "is finished: step 30 of 30" in done.stdout and {p: p.read_bytes() for p in files} == files


def test_float_control(workdir, sh, float_run):
    command = f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-control --batch_size=4 --eval_interval=10"
    sh(f"{command} --max_iters=10")
    with open(workdir / "out-control" / "log.jsonl", "a") as f:
        f.write('{"step": 1')  # a killed run leaves half a line
    sh(f"{command.replace(f'init_from={float_run}', 'init_from=resume')} --max_iters=20")
    (row,) = rows_of(workdir, sh("eval.py --ckpt=out-control"))
    assert row["method"] == "float control" and row["steps"] == 20 and row["kl"] > 0


def test_resume_applies_optimizer_settings(workdir, sh, float_run):
    folder = workdir / "out-decay"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((workdir / float_run / "ckpt.pt").read_bytes())
    sh(f"train.py {TINY} --init_from=resume --out_dir=out-decay --max_iters=40 --weight_decay=0.7 --beta1=0.5")
    groups = checkpoint.load_training(str(folder)).optimizer["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and groups[0]["betas"] == (0.5, 0.95)


def test_prompt_without_tokens(workdir, float_run, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(tokenizer.CharTokenizer, "encode", lambda *_: [])  # as a tokenizer that strips white space
    with pytest.raises(ValueError, match=r"the prompt '\\n' has no tokens in the vocabulary of out-float"):
        sample.main(sample.Settings(ckpt=str(float_run)))


def test_reference_with_another_padding_of_the_vocabulary(workdir, float_run, qat_run, monkeypatch):
    monkeypatch.chdir(workdir)
    info = checkpoint.load_model(str(qat_run))[1]
    info = replace(info, model_args=replace(info.model_args, vocab_size=96))
    with pytest.raises(ValueError, match="out-float has another vocabulary than padded"):
        eval.load_reference(eval.Settings(reference=str(float_run)), info, "padded", "cpu")


def test_a_float_model_that_was_replaced_is_no_reference(workdir, float_run, qat_run, monkeypatch):
    monkeypatch.chdir(workdir)
    model, info = checkpoint.load_float(str(float_run))
    changed = copy.deepcopy(model)
    changed.transformer.h[-1].mlp.c_proj.weight.data *= 1.01
    assert checkpoint.load_model(str(qat_run))[1].origin_digest == checkpoint.digest_of(model)
    assert checkpoint.digest_of(changed) != checkpoint.digest_of(model)
    info = replace(info, origin=str(float_run), origin_digest=checkpoint.digest_of(changed))
    with pytest.raises(ValueError, match="its weights have changed. Put that model there again, or pass --reference"):
        eval.load_reference(eval.Settings(), info, "x", "cpu")
    assert eval.load_reference(eval.Settings(reference=str(float_run)), info, "x", "cpu")
    assert eval.load_reference(eval.Settings(), replace(info, origin_digest=None), "x", "cpu")  # of an older version


def test_faults_are_noticed_before_the_long_work(workdir, sh, float_run, qat_run, monkeypatch):
    """No model is validated, quantized or measured before. The float model to learn from is gone or another one."""

    def long_work(*_, **__):
        raise AssertionError("long work")

    sh(
        "train.py --dataset=openwebtext-llama --init_from=llama --block_size=8 --batch_size=1 --max_iters=1 --out_dir=bare"
    )
    (workdir / "bare" / "tokenizer.json").unlink()
    (workdir / "empty").mkdir()
    for module, name in ((train, "validate"), (train, "quantize"), (eval, "measure")):
        monkeypatch.setattr(module, name, long_work)
    start = "train.py --pot_bits=4 --max_iters=1 --out_dir=x"
    tiny = f"{start} --dataset=tiny"
    for command, message in (
        (f"{tiny} --init_from={float_run} --pot_group_size=48", "group_size 48 does not divide"),
        (f"{start} --dataset=openwebtext-llama --init_from=bare --pot_group_size=32", "bare has no tokenizer.json"),
        (f"eval.py --ckpt={float_run},empty", "empty"),
        (f"eval.py --ckpt={float_run},gpt2 --dataset=tiny", "another vocabulary"),
    ):
        assert message in sh(command, ok=False).stderr
    load_training, load_float = checkpoint.load_training, checkpoint.load_float
    for change, message in (
        ({"origin": "gone"}, "no folder gone"),
        ({"origin": "gpt2"}, "gpt2 has another vocabulary than out-qat"),
        ({"origin_digest": "of another"}, "out-float is not the float model that out-qat comes from"),
    ):

        def moved(info, change=change):
            return replace(info, **change)

        def training_of_moved(folder):
            state = load_training(folder)
            return replace(state, info=moved(state.info))

        monkeypatch.setattr(checkpoint, "load_training", training_of_moved)
        monkeypatch.setattr(
            checkpoint, "load_float", lambda folder: (load_float(folder)[0], moved(load_float(folder)[1]))
        )
        assert message in sh(f"{tiny} --init_from={qat_run} --distill=1", ok=False).stderr
        resume = f"train.py --init_from=resume --out_dir={qat_run} --distill=1 --max_iters=99"
        assert message in sh(resume, ok=False).stderr
    assert not (workdir / "x").exists()


def test_run_does_not_go_on_with_another_text(workdir, sh):
    def write(name, line):
        (workdir / "data" / name).mkdir(exist_ok=True)
        texts = {"train": line * 60, "val": line * 9, "test": line * 9}
        dataset.write_chars(str(workdir / "data" / name), texts)

    write("story", "a cat and a dog sat on the mat.\n")
    small = "--n_layer=1 --n_head=1 --n_embd=32 --block_size=16 --batch_size=2 --eval_tokens=50 --keep=best"
    sh(f"train.py --dataset=story {small} --max_iters=2 --out_dir=out-story")
    resume = "train.py --init_from=resume --out_dir=out-story --max_iters=3"
    write("story", "a dog and a cat sat on the mat.\n")
    write("other", "a mat sat on the dog and a cat.\n")
    done = sh(resume, ok=False)
    assert "data/story holds another text than out-story was trained on" in done.stderr
    # Another name says that the text changes. Its validation losses are not compared with those before.
    best = str(workdir / "out-story" / "best")
    model, info = checkpoint.load_model(best)
    checkpoint.save_model(best, model, replace(info, val_loss=0.0))
    sh(f"{resume} --dataset=other")
    assert checkpoint.load_model(best)[1].val_loss > 0
    write("story", "a cat and a dog sat on the mat.\n")
    assert "dataset_digest" not in checkpoint.load_model(str(workdir / "out-story"))[1].to_dict()


def test_text_that_is_replaced_while_models_are_measured(sh, float_run, qat_run, monkeypatch):
    tokens = iter([None, None, 300, 290])  # of the check, and of each model
    monkeypatch.setattr(eval, "tokens_for", lambda *args: dataset.tokens_for(*args)[: next(tokens)])
    done = sh(f"eval.py --ckpt={float_run},{qat_run} --json=replaced.json", ok=False)
    assert "data/tiny was replaced while models were measured on it: start again" in done.stderr


def test_folder_whose_name_looks_like_a_formula(workdir, float_run, monkeypatch):
    from extras.plot import draw_training

    entries = checkpoint.read_log(str(workdir / float_run))
    draw_training(entries, r"out-$\frac{$", str(workdir / "formula.png"))
    assert (workdir / "formula.png").stat().st_size > 1000


def test_resumed_run_says_how_it_was_calibrated(workdir, sh, float_run):
    """GPTQ is work of the start. A resumed run does not do it again, whatever its settings say."""
    import checkpoint

    common = f"train.py --dataset=tiny --init_from={float_run} --pot_bits=4 --batch_size=4 --out_dir=out-calibrated"
    sh(f"{common} --calibrate_tokens=500 --max_iters=2")
    resume = common.replace(f"init_from={float_run}", "init_from=resume")
    sh(f"{resume} --calibrate_tokens=1000 --max_iters=3")
    settings = checkpoint.load_model(str(workdir / "out-calibrated"))[1].settings
    assert settings["calibrate_tokens"] == 500 and settings["max_iters"] == 3
