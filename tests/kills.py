"""
Kills a training run (kill -9) at random moments while it starts, trains and ends, and resumes it each time. After every
kill, the run must resume, and model.safetensors and the checkpoint must be of the same step. At the end, the weights
must equal those of an uninterrupted run to the bit.

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
    rng = random.Random(s.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/data/tiny")
        text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40
        dataset.write_chars(f"{folder}/data/tiny", {"train": text, "val": text[:300], "test": text[:300]})
        command = [sys.executable, str(ROOT / "train.py"), "--dataset=tiny", "--eval_interval=2", "--dropout=0.1"]
        command += "--n_layer=1 --n_head=1 --n_embd=64 --block_size=16 --batch_size=2 --log_interval=100".split()
        command += ["--learning_rate=1e-3", "--min_lr=1e-3"]  # a constant learning rate is independent of max_iters
        killed = os.path.join(folder, "cut")
        kills = step = 0
        while kills < s.kills:
            start = ["--init_from=resume"] if os.path.exists(os.path.join(killed, checkpoint.TRAINING)) else []
            phase = rng.choice(("start", "training", "training", "end", "end"))
            # In the phase "end", the kill hits the last save or the write of the finished model.
            steps = f"--max_iters={step + rng.randrange(1, 5) if phase == 'end' else 10**6}"
            process = subprocess.Popen(
                [*command, steps, f"--out_dir={killed}", *start],
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
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


if __name__ == "__main__":
    run(main, Settings)
