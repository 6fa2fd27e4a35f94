"""
Kills a training run (kill -9) at random moments while it starts, trains and ends, and resumes it each time. After every
kill, the run must resume, and model.safetensors and the checkpoint must be of the same step. At the end, the weights
must equal those of an uninterrupted run to the bit.

    python tests/kills.py --kills=100
    python tests/kills.py --kills=30 --processes=2    # torchrun: kills a process while it trains, validates or saves

With several processes, those that are left must end within two minutes, too.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import checkpoint
import dataset
from configurator import run

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    kills: int = 100
    processes: int = 1
    seed: int = 0


def main(s: Settings):
    rng = random.Random(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/data/tiny")
        text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40
        dataset.write_chars(f"{folder}/data/tiny", {"train": text, "val": text[:300], "test": text[:300]})
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node={s.processes}".split()
        command = [sys.executable, *launcher] if s.processes > 1 else [sys.executable]
        command += [str(ROOT / "train.py"), "--dataset=tiny", "--eval_interval=2", "--dropout=0.1"]
        command += "--n_layer=1 --n_head=1 --block_size=16 --batch_size=2 --log_interval=100".split()
        command += ["--learning_rate=1e-3", "--min_lr=1e-3"]  # a constant learning rate is independent of max_iters
        command += ["--n_embd=64" if s.processes == 1 else "--n_embd=256"]  # a save of some milliseconds can be hit
        killed = os.path.join(folder, "cut")
        kills, step, counts, slowest = 0, 0, {}, 0.0
        while kills < s.kills:
            start = ["--init_from=resume"] if os.path.exists(os.path.join(killed, checkpoint.TRAINING)) else []
            phase = rng.choice(("start", "training", "training", "end", "end"))
            if s.processes > 1:
                phase = rng.choice(("training", "saving", "saving", "validation"))
            # In the phase "end", the kill hits the last save or the write of the finished model.
            steps = f"--max_iters={step + rng.randrange(1, 5) if phase == 'end' else 10**6}"
            process = subprocess.Popen(
                [*command, steps, f"--out_dir={killed}", *start],
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            if s.processes > 1:
                status, (phase, seconds) = 1, kill_one(process, killed, phase, rng)
                counts[phase], slowest = counts.get(phase, 0) + 1, max(slowest, seconds)
            else:
                first_line = "" if phase == "start" else process.stdout.readline()
                time.sleep(rng.uniform(0, 5 if phase == "start" else 0.5))
                process.send_signal(signal.SIGKILL)
                other_lines, status = process.stdout.read(), process.wait()
                if status != -signal.SIGKILL and (phase != "end" or status):
                    raise ValueError(f"kill {kills + 1}: the run stopped without a kill: {first_line}{other_lines}")
            kills += status != 0
            if checkpoint.exists(killed):
                step, finished = checkpoint.load_training(killed).info.step, checkpoint.load_model(killed)[1].step
                if step != finished:
                    raise ValueError(
                        f"kill {kills}: the finished model is of step {finished}, the checkpoint of {step}"
                    )
            print(f"kill {kills} of {s.kills}: {phase}, step {step}" + ", ended before" * (status == 0), flush=True)
        if counts:
            print(f"{counts}; the other processes ended within {slowest:.0f} s")
        last_steps = [f"--max_iters={step + 3}"]
        whole = os.path.join(folder, "whole")
        for out, start in ((killed, ["--init_from=resume"] if step else []), (whole, [])):
            args = [*command, *last_steps, f"--out_dir={out}", *start]
            subprocess.run(args, cwd=folder, stdout=subprocess.PIPE, check=True)
        actual, expected = (checkpoint.load_training(out).model for out in (killed, whole))
        different = [name for name in actual if not torch.equal(actual[name], expected[name])]
        if different:
            raise ValueError(f"{s.kills} kills, {step} steps: the weights differ in {', '.join(different)}")
        print(f"{s.kills} kills, {step} steps: the weights equal those of an uninterrupted run")


def kill_one(process, out, phase, rng):
    """Kills one process of a torchrun in a phase, and waits for the end of the others. Returns what it hit, "process 0,
    saving" or the like, and the seconds until that end."""
    path, pids, lines = os.path.join(out, checkpoint.TRAINING), {}, ""
    while "M parameters on " not in lines:
        if not (line := process.stdout.readline()):
            raise ValueError(f"the run stopped without a kill: {lines}")
        lines += line
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            keys = Path(f"/proc/{pid}/environ").read_text().split("\0")
            pids |= {key.removeprefix("RANK="): int(pid) for key in keys if key.startswith("RANK=")}
    rank = rng.choice(sorted(pids))
    written = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
    end = time.time() + 60
    if phase == "saving":
        while not os.path.exists(f"{path}.tmp") and time.time() < end:
            pass
    else:
        while (not os.path.exists(path) or os.stat(path).st_mtime_ns == written) and time.time() < end:
            time.sleep(0.0005)
    time.sleep(rng.uniform(0, {"saving": 0.02, "validation": 0.02, "training": 0.5}[phase]))
    os.kill(pids[rank], signal.SIGKILL)
    start = time.time()
    try:
        lines += process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        for pid in (*pids.values(), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise ValueError(f"process {rank} was killed, and the others did not end: {lines}") from None
    if (
        not process.returncode
        or "]: Traceback" in lines
        or any(os.path.exists(f"/proc/{pid}") for pid in pids.values())
    ):
        raise ValueError(f"process {rank} was killed, and the others end with {process.returncode}: {lines}")
    # What is on the disk tells what the kill hit: the moment above is not exact.
    hit = "training"
    if os.path.exists(f"{path}.tmp"):
        hit = "saving"
    elif os.path.exists(path):
        step = checkpoint.load_training(out).info.step
        if not any(e["step"] == step and "val_loss" in e for e in checkpoint.read_log(out)):
            hit = "validation"
    return f"process {rank}, {hit}", time.time() - start


if __name__ == "__main__":
    run(main, Settings)
