import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A copy of the scripts beside a small character data set, `tiny`, to run commands in."""
    import dataset

    folder = tmp_path_factory.mktemp("house")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "config", folder / "config", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "tiny").mkdir(parents=True)
    (folder / "data" / "tiny" / "prepare.py").touch()
    text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40
    dataset.write_chars(folder / "data" / "tiny", {"train": text, "val": text[:700], "test": text[100:1100]})
    return folder


TINY = "--dataset=tiny --n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=4 --eval_interval=10 --log_interval=5"


@pytest.fixture(scope="session")
def sh(house):
    """sh("train.py --key=value", ok=True) -> the finished process."""

    def run(command, ok=True, cwd=house, **env):
        args = [sys.executable, *command.split()]
        done = subprocess.run(
            args, cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "2"} | env
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def float_run(sh):
    """Folder of a float model trained for 30 steps."""
    sh(f"train.py {TINY} --max_iters=30 --out_dir=out-float")
    return "out-float"


@pytest.fixture(scope="session")
def qat_run(sh, float_run):
    """Folder of a model fine-tuned from float_run at 4 bits."""
    sh(
        f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-qat --pot_bits=4 --max_iters=20 --batch_size=4 --eval_interval=10"
    )
    return "out-qat"
