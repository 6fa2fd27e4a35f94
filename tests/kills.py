"""
Kills a training run (kill -9) again and again at random moments, while it starts, trains and ends, and resumes it. Every
folder can go on, and its finished model belongs to the step of its checkpoint. At the end the weights equal, to the bit, those
of a run that was never killed.

    python tests/kills.py --kills=100
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
    seed: int = 0


def main(s: Settings):
    r = random.Random(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/data/tiny")
        text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40
        dataset.write_chars(f"{folder}/data/tiny", {"train": text, "val": text[:300], "test": text[:300]})
        command = [sys.executable, str(ROOT / "train.py"), "--dataset=tiny", "--eval_interval=2", "--dropout=0.1"]
        command += "--n_layer=1 --n_head=1 --n_embd=64 --block_size=16 --batch_size=2 --log_interval=100".split()
        command += ["--learning_rate=1e-3", "--min_lr=1e-3"]  # a constant rate does not depend on max_iters
        cut = os.path.join(folder, "cut")
        n = step = 0
        while n < s.kills:
            start = ["--init_from=resume"] if os.path.exists(os.path.join(cut, checkpoint.TRAINING)) else []
            phase = r.choice(("start", "training", "training", "end", "end"))
            # A run that may end is interrupted in its last save or while it writes the finished model.
            steps = f"--max_iters={step + r.randrange(1, 5) if phase == 'end' else 10**6}"
            process = subprocess.Popen(
                [*command, steps, f"--out_dir={cut}", *start],
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            first = "" if phase == "start" else process.stdout.readline()
            time.sleep(r.uniform(0, 5 if phase == "start" else 0.5))
            process.send_signal(signal.SIGKILL)
            rest, status = process.stdout.read(), process.wait()
            if status != -signal.SIGKILL and (phase != "end" or status):
                raise ValueError(f"kill {n + 1}: the run ended by itself: {first}{rest}")
            n += status != 0
            if checkpoint.exists(cut):
                step, finished = (f(cut) for f in (checkpoint.load_training, checkpoint.load_model))
                step, finished = step.info.step, finished[1].step
                if step != finished:
                    raise ValueError(f"kill {n}: the finished model is of step {finished}, the checkpoint of {step}")
            print(f"kill {n} of {s.kills}: {phase}, step {step}" + ", ended before" * (status == 0), flush=True)
        left = [f"--max_iters={step + 3}"]
        whole = os.path.join(folder, "whole")
        for out, start in ((cut, ["--init_from=resume"] if step else []), (whole, [])):
            subprocess.run(
                [*command, *left, f"--out_dir={out}", *start], cwd=folder, stdout=subprocess.PIPE, check=True
            )
        a, b = (checkpoint.load_training(out).model for out in (cut, whole))
        different = [name for name in a if not torch.equal(a[name], b[name])]
        print(
            f"{s.kills} kills, {step} steps: the weights are {'NOT ' if different else ''}those of a run in one piece"
        )
        if different:
            raise ValueError(f"they differ in {', '.join(different)}")


if __name__ == "__main__":
    run(main, Settings)
