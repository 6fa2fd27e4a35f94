"""
Trains a GPT: from scratch, on from a checkpoint or from GPT-2, in float or, if a pot_ setting asks, with power-of-two
weights (QAT).

    python train.py config/train_pydoc_char.py
    python train.py config/finetune_pydoc_char_pot4.py
    python train.py config/finetune_gpt2_pot4.py
    python train.py config/train_pydoc_char.py --init_from=resume

On several GPUs, or processors with gloo (each process takes batch_size sequences, so n processes take the steps of one
with n times the batch):

    torchrun --standalone --nproc_per_node=4 train.py config/finetune_gpt2_pot4.py

On two machines, the first of which answers at 10.0.0.1:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py ...
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py ...
"""

import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dataset
from configurator import check_minimum, provenance, run
from eval import evaluate, keep_freed_memory, perplexity, pick_device, quantize
from model import GPT, GPTConfig
from pot import PoTConfig, convert


@dataclass
class Settings:
    # where from, where to
    dataset: str = "pydoc_char"  # folder under data/
    init_from: str = "scratch"  # "scratch"; "resume": go on with out_dir; what to fine-tune: a folder, or gpt2, ...
    out_dir: str = "out"  # written: ckpt.pt, log.jsonl, loss.png, and model.safetensors at the end
    # model; None: the checkpoint's, or GPT-2's when from scratch
    block_size: int | None = None  # tokens a sequence; from scratch also the model's context, else at most that
    n_layer: int | None = None  # transformer blocks
    n_head: int | None = None  # attention heads
    n_embd: int | None = None  # width
    bias: bool | None = None  # in linear layers and LayerNorms
    dropout: float | None = None  # 0 is good for pretraining
    # power-of-two weights
    pot: PoTConfig | None = None  # any pot_ key turns QAT on; --pot=None turns it off: the float control
    calibrate_tokens: int = 0  # with pot_ keys: start from GPTQ on so many tokens; 0: from the nearest levels
    distill: float = 0.0  # with pot_ keys: share of the float model's predictions in the loss; the rest is the text's
    # steps
    max_iters: int = 5000  # optimizer steps; 0 only quantizes (PTQ)
    batch_size: int = 12  # sequences a micro-batch, in each process
    gradient_accumulation_steps: int = 1  # micro-batches a step
    learning_rate: float = 1e-3  # highest
    min_lr: float = 0.0  # reached at max_iters, along a cosine
    warmup_iters: int = 0  # steps of linear warm-up
    weight_decay: float = 0.1  # of matrices; biases and LayerNorms have none
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # norm; 0: no clipping
    last_position: bool = False  # learn from the last position of a sequence alone, as the PoT papers' code does
    seed: int = 1337  # of the initial weights, the batches and dropout
    # progress
    eval_interval: int = 500  # steps between validations; each one saves a checkpoint, too
    eval_tokens: int | None = None  # validate on the first so many tokens of the split; None: on all
    log_interval: int = 100  # steps between lines
    wandb_log: bool = False  # log to wandb as well
    wandb_project: str = "nanopot"  # wandb project
    wandb_run_name: str | None = None  # wandb run; None: out_dir
    # machine
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them
    dtype: str = "auto"  # of products: bfloat16, float16, float32; "auto": on CUDA the first that it has, else float32
    compile: bool = True  # torch.compile, on CUDA only


def main(s: Settings):
    with Stop() as stop:
        train(s, stop)


def train(s: Settings, stop: "Stop"):
    check_minimum(s, batch_size=1, gradient_accumulation_steps=1, block_size=1, eval_interval=1, log_interval=1)
    check_minimum(s, eval_tokens=2, max_iters=0, calibrate_tokens=0, seed=0, warmup_iters=0, learning_rate=0, min_lr=0)
    check_minimum(s, weight_decay=0, grad_clip=0, beta1=0, beta2=0)
    for key in ("beta1", "beta2"):
        if getattr(s, key) >= 1:
            raise ValueError(f"{key}={getattr(s, key)} must be below 1")
    if s.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"unknown dtype {s.dtype!r}: choose auto, bfloat16, float16 or float32")
    if s.distill and not 0 <= s.distill <= 1:
        raise ValueError(f"distill={s.distill} must be from 0 to 1")
    if s.distill and s.init_from == "scratch":
        raise ValueError("distill asks for a float model to learn from: pass --init_from=FOLDER, or leave it out")
    origin = provenance()  # now: the code may be another when a long run ends
    rank, world, device = start_processes(s.device)
    cuda = device.startswith("cuda")
    if device == "cpu":
        keep_freed_memory()
    lock = checkpoint.Lock(s.out_dir) if rank == 0 and os.path.isdir(s.out_dir) else None  # before it is read
    data, meta = dataset.load(os.path.join("data", s.dataset), "train")
    val, _ = dataset.load(os.path.join("data", s.dataset), "val")

    # --- model ---
    torch.manual_seed(s.seed)
    model, info, state = build(s, meta, device)
    model.to(device).train()
    block_size = model.config.block_size if s.block_size is None else s.block_size
    for split, ids in (("train", data), ("val", val)):
        if len(ids) <= block_size:
            raise ValueError(
                f"data/{s.dataset}/{split}.bin holds {len(ids)} tokens, a context of {block_size} needs more: lower block_size"
            )
    optimizer = make_optimizer(model, s, device)
    teacher = None
    if s.pot and s.distill:  # a float control stays a control
        if not info["origin"]:
            raise ValueError(
                f"distill={s.distill}: this model comes from no float model to learn from: leave distill out"
            )
        teacher = checkpoint.load_model(info["origin"])[0].to(device)
    dtype = s.dtype
    if dtype == "auto":
        dtype = "float32" if not cuda else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    kind_of_device = torch.device(device).type
    autocast = nullcontext() if dtype == "float32" else torch.autocast(kind_of_device, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(kind_of_device, enabled=dtype == "float16")
    step = info["step"]
    if state is not None:
        load_optimizer(optimizer, scaler, state)
        del state
    if step == s.max_iters and os.path.exists(os.path.join(s.out_dir, checkpoint.MODEL)):
        if rank == 0:
            print(f"{s.out_dir}/ is finished: step {step} of {s.max_iters}")
        return
    kind = f"QAT, {PoTConfig(**info['pot'])}" if info["pot"] else "float"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    where = f"{device} x {world}" if world > 1 else device
    if world > 1:
        dist.barrier()  # no process may still be looking at a folder that the first one writes to
    log = None
    if rank == 0:
        print(
            f"{kind}: {millions:.2f} M parameters on {where}, step {step} to {s.max_iters}, {s.dataset}, to {s.out_dir}/"
        )
        log = Log(s, step, lock)

    training = torch.compile(model) if s.compile and cuda else model
    if world > 1:
        training = DistributedDataParallel(training, [device] if cuda else None)
    tokens_a_step = s.batch_size * s.gradient_accumulation_steps * block_size * world
    resumed_at, start, losses = step, time.time(), []

    def save():
        info["step"] = step
        states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        checkpoint.save_training(s.out_dir, model, info, **states)

    # --- steps ---
    while True:
        if stop.asked(world) and step < s.max_iters:
            check_losses(losses, step, s.out_dir)
            if rank == 0 and step > resumed_at:
                save()
                print(f"stopped at step {step}, which {s.out_dir}/ keeps: --init_from=resume goes on", flush=True)
            if world > 1:
                dist.destroy_process_group()
            sys.exit(128 + stop.signal)
        if rank == 0 and (step == s.max_iters or step % s.eval_interval == 0 and step > resumed_at):
            paused = time.time()
            val_loss = evaluate(model, val[: s.eval_tokens], device, block_size=block_size)["loss"]
            check_finite("validation loss", val_loss, step, s.out_dir)
            log(f"step {step}/{s.max_iters}  validation loss {val_loss:.4f}", step=step, val_loss=val_loss)
            save()
            start += time.time() - paused
        if step >= s.max_iters:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        # Dropout is drawn from (seed, step, process) alone, as the batches are: a resumed run goes on with the same.
        torch.manual_seed(int(np.random.SeedSequence([s.seed, step, rank]).generate_state(1)[0]))
        x, y = batch(data, block_size, s, step, rank, world)
        loss, micro_batches = 0.0, list(zip(x.split(s.batch_size), y.split(s.batch_size)))
        for i, (xi, yi) in enumerate(micro_batches):
            together = world == 1 or i == len(micro_batches) - 1  # gradients are exchanged once a step
            with nullcontext() if together else training.no_sync():
                xi, yi = xi.to(device), yi.to(device)
                with autocast:
                    if teacher is None:
                        micro_loss = training(xi, yi)[1]
                    else:
                        with torch.no_grad():  # both losses in one: a cross entropy is linear in its target
                            soft = teacher(xi, last=s.last_position).flatten(0, 1).float().softmax(-1).mul_(s.distill)
                            true = yi[:, -1] if s.last_position else yi.flatten()
                            soft[torch.arange(len(true), device=device), true] += 1 - s.distill
                        logits = training(xi, last=s.last_position)
                        micro_loss = F.cross_entropy(logits.flatten(0, 1).float(), soft)
                    micro_loss = micro_loss / s.gradient_accumulation_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss)
        step += 1
        if step % s.log_interval == 0 or step == s.max_iters:
            check_losses(losses, step, s.out_dir)
            mean = torch.stack(losses).mean()
            losses.clear()
            if world > 1:
                dist.all_reduce(mean)
            mean = mean.item() / world
            if rank > 0:
                continue
            speed = (step - resumed_at) / (time.time() - start)
            left = f"{(s.max_iters - step) / speed:.0f} s left"
            log(
                f"step {step}/{s.max_iters}  loss {mean:.4f}  {speed * tokens_a_step:,.0f} tokens/s  {left}",
                step=step, loss=mean, lr=learning_rate(step - 1, s), tokens_per_s=round(speed * tokens_a_step),
            )  # fmt: skip

    # --- what is left behind ---
    seconds = time.time() - start
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    peak = peak_memory(device)
    if info["pot"]:
        convert(model)
    # Nothing of where it lies: the same run elsewhere, or one that was cut, leaves the same bytes.
    info["settings"] = {k: v for k, v in info["settings"].items() if k not in ("out_dir", "init_from")}
    info |= {"val_loss": val_loss, "provenance": {k: v for k, v in origin.items() if k != "command"}}
    size = checkpoint.save_model(s.out_dir, model, info)
    rows = {
        "validation loss": f"{val_loss:.4f}",
        "perplexity": f"{perplexity(val_loss):.2f}",
        "steps, tokens": f"{step}, {step * tokens_a_step:,}",
        "training time": f"{seconds:.0f} s, {seconds / max(1, step - resumed_at):.2f} s a step",
        "peak memory": f"{peak / 2**20:,.0f} MiB",
        f"{s.out_dir}/model.safetensors": f"{size:,} bytes, {'packed' if info['pot'] else 'float'}",
        f"{s.out_dir}/ckpt.pt": "the state to resume or fine-tune from",
    }
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")
    log(None, step=step, seconds=round(seconds, 2), steps=step - resumed_at, peak_bytes=peak)
    log.finish(rows)


def start_processes(device):
    """(number of this process, how many there are, its device): torchrun says so in the environment."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(key in os.environ for key in keys):
        return 0, 1, pick_device(device)
    rank, world, local = (int(os.environ[key]) for key in keys)
    device = pick_device(device)
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while the first one validates
    return rank, world, device


class Stop:
    """Notes that SIGINT (Ctrl-C) or SIGTERM asks to stop, for the end of a step. A second one ends the process at once."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # nowhere else may signals be handled
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def asked(self, world):
        if world > 1:  # all processes stop after the same step
            number = torch.tensor(self.signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number)
        return self.signal > 0


def peak_memory(device):
    """Most bytes of the GPU's memory that tensors took, or of the machine's that the process took."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_finite(what, value, step, out_dir):
    if not math.isfinite(value):
        kept = "keeps the last checkpoint" if checkpoint.exists(out_dir) else "holds no checkpoint yet"
        raise ValueError(
            f"the {what} is {value} at step {step}: try a lower learning_rate or more warmup_iters; {out_dir}/ {kept}"
        )


def check_losses(losses, step, out_dir):
    """Raises ValueError for the first of the steps before `step` whose loss is not finite."""
    for i, loss in enumerate(torch.stack(losses).tolist() if losses else []):
        check_finite("loss", loss, step - len(losses) + i + 1, out_dir)


def build(s: Settings, meta, device):
    """(model, info to store with it, training state or None) for init_from scratch, resume or a folder."""
    shape = {k: getattr(s, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    given = {k: v for k, v in shape.items() if v is not None}
    info = {"tokenizer": meta, "pot": None, "origin": None, "step": 0, "settings": asdict(s)}
    if s.init_from != "resume":
        refuse_checkpoint(s.out_dir)
    if s.init_from == "scratch":
        model = GPT(GPTConfig(vocab_size=dataset.vocab_size(meta), **given))
        return quantized(model, s, info | {"method": "float"}, device)

    state = None
    if s.init_from == "resume":
        state = checkpoint.load_training(s.out_dir)
        model, found = checkpoint.model_of(state), state["info"]
    else:
        model, found = checkpoint.load_float(s.init_from)
    folder = s.out_dir if state else s.init_from
    dataset.check_vocabulary(folder, found["tokenizer"], s.dataset, meta)
    for key, value in given.items():
        its = getattr(model.config, key)
        if key == "block_size" and value > its:
            raise ValueError(f"block_size={value} is more than the context of {folder}, {its}: lower it")
        if key not in ("block_size", "dropout") and its != value:
            raise ValueError(f"{key}={value}, but {folder} was trained with {key}={its}: leave {key} out")
    if s.dropout is not None:
        model.set_dropout(s.dropout)
    if state is None:
        # The float model to compare with: this one, or the one that it came from itself.
        info |= {"method": "float control", "origin": found["origin"] if found["pot"] else folder}
        return quantized(model, s, info, device)

    pot = PoTConfig(**found["pot"]) if found["pot"] else None
    if pot != s.pot:
        raise ValueError(
            f"{folder} was trained with {pot or 'float weights'}, the settings ask for {s.pot or 'float weights'}: "
            "resume with the same"
        )
    if found["step"] > s.max_iters:
        raise ValueError(f"{folder} is at step {found['step']} already: max_iters={s.max_iters} must be at least that")
    kept = {key: found[key] for key in ("pot", "origin", "step", "method")}
    if found["method"].startswith("PTQ") and s.max_iters:
        kept["method"] = "QAT"
    return model, info | kept, state


def refuse_checkpoint(folder):
    if checkpoint.exists(folder):
        raise ValueError(
            f"{folder} holds a checkpoint already: --init_from=resume goes on with it; else choose another --out_dir"
        )


def quantized(model, s, info, device):
    """The model as it starts to train, prepared if the settings ask for it."""
    if s.pot:
        ptq = quantize(model.to(device), s.pot, s.calibrate_tokens, s.dataset, info["tokenizer"], s.seed, device)
        info |= {"pot": asdict(s.pot), "method": "QAT" if s.max_iters else ptq}
    return model, info, None


def make_optimizer(model, s, device):
    """AdamW; weight decay for matrices alone."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=device != "mps")


def load_optimizer(optimizer, scaler, state):
    """Takes over moments and step counts of a training state; all else stays as the settings say. Raises ValueError for
    what does not fit: the fused step would write beyond it."""
    now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
        for group, its in zip(optimizer.param_groups, now):
            group.update(its)
        for p, its in optimizer.state.items():
            found = {name: (t.shape, t.dtype, t.is_sparse, t.is_contiguous()) for name, t in its.items()}
            shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if found != {name: (shape, torch.float32, False, True) for name, shape in shapes.items()}:
                raise ValueError(f"moments of other shapes or kinds for a weight of {tuple(p.shape)}")
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as e:
        raise ValueError(f"the optimizer's state in this checkpoint is damaged ({e!r}): start anew") from None


def learning_rate(step, s):
    """Linear warm-up, then a cosine to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    progress = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


def batch(data, block_size, s, step, rank=0, world=1):
    """(x, y) of one step in one of `world` processes: (batch_size * gradient_accumulation_steps, block_size) int64 each.

    Drawn from (seed, step) alone: a resumed run goes on with the batches of one that was not cut, and QAT and its float
    control see the same. A y of -100 is no target.
    """
    count = s.batch_size * s.gradient_accumulation_steps
    places = np.random.default_rng([s.seed, step]).integers(len(data) - block_size, size=count * world)
    places = places[rank * count : (rank + 1) * count]
    rows = torch.from_numpy(np.stack([data[i : i + block_size + 1] for i in places]).astype(np.int64))
    x, y = rows[:, :-1], rows[:, 1:].clone()
    if s.last_position:
        y[:, :-1] = -100
    return x, y


class Log:
    """Prints progress and keeps it in out_dir/log.jsonl, loss.png and wandb."""

    def __init__(self, s, step, lock):
        self.wandb, resumed = start_wandb(s) if s.wandb_log else None, s.init_from == "resume"
        self.lock = lock or checkpoint.Lock(s.out_dir)  # as long as this object lives, and before anything is written
        if not resumed:
            refuse_checkpoint(s.out_dir)  # another run may have been quicker
        self.folder, self.path, self.entries = s.out_dir, os.path.join(s.out_dir, "log.jsonl"), []
        if resumed and os.path.exists(self.path):
            with open(self.path) as f:
                self.entries = [e for e in map(_entry, f) if e and e["step"] <= step]  # what came after happens again
        lines = "".join(json.dumps(e) + "\n" for e in self.entries)
        checkpoint.write(self.path, lambda tmp: Path(tmp).write_text(lines))

    def __call__(self, line, **entry):
        if line:
            print(line, flush=True)
        self.entries.append(entry)
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as e:
            raise OSError(f"cannot write {self.path}: {e}; the checkpoint beside it is untouched") from None
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])

    def finish(self, rows):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o--")):
            points = [(e["step"], e[key]) for e in self.entries if key in e]
            if points:
                ax.plot(*zip(*points), style, label=label, markersize=4)
        ax.set(xlabel="step", ylabel="loss (nats)", title=self.folder)
        ax.legend()
        checkpoint.write(os.path.join(self.folder, "loss.png"), lambda tmp: plt.savefig(tmp, format="png", dpi=120))
        plt.close()
        if self.wandb:
            import wandb

            self.wandb.log({"result": wandb.Table(["", "value"], [list(row) for row in rows.items()])})
            self.wandb.finish()


def start_wandb(s):
    try:
        import wandb

        return wandb.init(project=s.wandb_project, name=s.wandb_run_name or s.out_dir, config=asdict(s))
    except Exception as e:  # ImportError, or one of wandb's own
        raise ValueError(
            f"cannot log to wandb ({type(e).__name__}): `pip install wandb` and `wandb login`, or set WANDB_MODE=offline, "
            "or leave --wandb_log out"
        ) from None


def _entry(line):
    try:
        return json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None


if __name__ == "__main__":
    run(main, Settings)
