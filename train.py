"""
Makes every checkpoint: trains a GPT from scratch, fine-tunes it in float or with power-of-two weights (QAT), or only
quantizes it (PTQ).

    python train.py config/train_pydoc_char.py                            # float, from scratch
    python train.py config/ptq_pydoc_char_pot4.py                         # PTQ: --max_iters=0
    python train.py config/finetune_pydoc_char_pot4.py                    # QAT
    python train.py config/finetune_pydoc_char_pot4.py --pot=None --out_dir=out-control    # the float control
    python train.py --init_from=resume --out_dir=out-pydoc-char           # go on with a run that was cut

On several GPUs, or on CPU processes with gloo. Each process takes batch_size sequences, so n processes take the steps
of one process with n times the batch:

    torchrun --standalone --nproc_per_node=4 train.py config/finetune_gpt2_pot4.py

On two machines, where the first one is reached at 10.0.0.1:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py ...
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 train.py ...
"""

import copy
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dataset
from calibrate import calibrate, train_blocks
from checkpoint import CheckpointInfo
from configurator import check_minimum, check_names, run
from machine import free_memory, keep_freed_memory, peak_memory, pick_device, provenance
from metrics import LOGITS, WINDOW, evaluate, perplexity
from model import GPT, GPTConfig
from pot import PoTConfig, convert


@dataclass
class Settings:
    # --- source and destination ---
    dataset: str = "pydoc_char"  # folder under data/
    # "scratch"; "resume": go on with the run in out_dir, whose settings hold where none is passed; or the model to
    # start from: a folder, or a name on the hub (gpt2, gpt2-medium, ..., org/name)
    init_from: str = "scratch"
    # written: model.safetensors at the end, and in training ckpt.pt, log.jsonl and loss.png
    out_dir: str = "out"

    # --- model; None: the checkpoint's value, or GPT-2's from scratch ---
    # tokens per sequence; from scratch also the model's context, else at most that (None: at most 1,024)
    block_size: int | None = None
    n_layer: int | None = None  # transformer blocks
    n_head: int | None = None  # attention heads
    n_embd: int | None = None  # width
    bias: bool | None = None  # biases in linear layers and LayerNorms
    dropout: float | None = None  # dropout probability; 0 is good for pretraining

    # --- power-of-two weights ---
    pot: PoTConfig | None = None  # any pot_ key quantizes; --pot=None trains in float
    # with pot_ keys: embeddings and head, the weights that cost most, as table_ keys say; None: as pot_ keys say
    table: PoTConfig | None = None
    # with pot_ keys: tokens of the training split for GPTQ; 0: round to the nearest levels
    calibrate_tokens: int = 0
    # with pot_ keys: tokens of the training split that train block after block towards the float model, after GPTQ
    block_tokens: int = 0
    # with pot_ keys: share of the float model's predictions in the loss; the rest is the text's
    distill: float = 0.0

    # --- steps ---
    max_iters: int = 5000  # optimizer steps; 0 only quantizes (PTQ)
    batch_size: int = 12  # sequences per micro-batch, in each process
    gradient_accumulation_steps: int = 1  # micro-batches per step
    learning_rate: float = 1e-3  # highest learning rate
    min_lr: float = 0.0  # learning rate at max_iters, the end of a cosine
    warmup_iters: int = 0  # steps of linear warm-up
    weight_decay: float = 0.1  # weight decay of matrices; biases and LayerNorms have none
    beta1: float = 0.9  # of AdamW: decay of the mean gradient
    beta2: float = 0.95  # of AdamW: decay of the mean squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    last_position: bool = False  # learn from the last position of a sequence only, as the PoT papers' code does
    seed: int = 1337  # seed of initial weights, batches, calibration text and dropout

    # --- progress ---
    eval_interval: int = 500  # steps between validations; each validation but the first saves a checkpoint
    eval_tokens: int | None = None  # tokens of the validation split that are used; None: all
    keep: str = "last"  # "best": the model of the lowest validation loss, too, in the folder best of out_dir
    log_interval: int = 100  # steps between lines of progress
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "nanopot"  # project of wandb; a run is called like out_dir

    # --- machine ---
    device: str = "auto"  # "auto", or cuda, mps or cpu
    # dtype of products: bfloat16, float16 or float32; "auto": bfloat16 or float16 on CUDA, else float32
    dtype: str = "auto"
    compile: bool = True  # torch.compile, on CUDA only

    @staticmethod
    def inherited(given: dict) -> dict:
        """Settings that the given ones override: those of the run to resume."""
        if given.get("init_from") != "resume":
            return {}
        settings = checkpoint.load_training(given.get("out_dir", Settings.out_dir)).info.settings
        return {key: value for key, value in settings.items() if key not in ("init_from", "out_dir")}


def main(s: Settings):
    check(s)
    checkpoint.check_writable(s.out_dir)
    with checkpoint.Lock(s.out_dir) as lock, peers_named():
        job = set_up(s, lock)
        if job is None:
            return
        if not s.max_iters:
            finish(job)
            return
        with Stop() as stop:
            take_steps(job, stop)
            finish(job)


def check(s: Settings):
    """Raises ValueError for settings that make no sense."""
    check_minimum(s, batch_size=1, gradient_accumulation_steps=1, block_size=1, eval_interval=1, log_interval=1)
    check_minimum(s, eval_tokens=2, max_iters=0, calibrate_tokens=0, block_tokens=0, seed=0)
    check_minimum(s, warmup_iters=0, learning_rate=0, min_lr=0)
    check_minimum(s, weight_decay=0, grad_clip=0, beta1=0, beta2=0)
    check_names(s, "out_dir", "init_from", "dataset")
    for key in ("beta1", "beta2"):
        if getattr(s, key) >= 1:
            raise ValueError(f"{key}={getattr(s, key)} must be below 1")
    if s.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"unknown dtype {s.dtype!r}: choose auto, bfloat16, float16 or float32")
    if s.keep not in ("last", "best"):
        raise ValueError(f"keep={s.keep} must be last or best")
    if 0 < s.block_tokens < 2 * BLOCK_STEP:
        raise ValueError(
            f"block_tokens={s.block_tokens} must be 0, or at least {2 * BLOCK_STEP}: about 100,000 are good"
        )
    if not 0 <= s.distill <= 1:
        raise ValueError(f"distill={s.distill} must be from 0 to 1")
    if s.distill and s.init_from == "scratch":
        raise ValueError("distill needs a float model to learn from: pass --init_from=FOLDER, or leave distill out")
    if not s.max_iters and not s.pot:
        raise ValueError("max_iters=0 only quantizes (PTQ): pass a pot_ setting such as --pot_bits=4, or take a step")
    if s.table and not s.pot:
        raise ValueError("table_ keys need a pot_ key such as --pot_bits=4; to train in float, pass --table=None, too")


# --- set-up ---


@dataclass
class Job:
    """A training run, as one of its processes has it."""

    settings: Settings
    model: GPT
    info: CheckpointInfo
    data: np.ndarray  # token ids of the training split
    val: np.ndarray  # token ids that are validated on
    block_size: int  # tokens a sequence
    device: str
    rank: int  # of this process
    world: int  # processes
    step: int  # optimizer steps done

    # --- for training only ---
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    autocast: object = None  # context of a forward pass
    teacher: GPT | None = None  # the float model to distil from; None: learn from the text
    training: torch.nn.Module | None = None  # the model, compiled and distributed
    log: "Log | None" = None  # of the first process
    val_loss: float = math.nan
    best_loss: float = math.inf  # validation loss of the model in the folder best
    first_step: int = 0  # step at the start or the resume
    start: float = 0.0  # time of the first step, moved on by the duration of validations and saves
    shown: float = 0.0  # time of the last line of progress


def set_up(s: Settings, lock: checkpoint.Lock) -> Job | None:
    """Everything before the first step. None if the run is finished already."""
    machine = provenance()  # first, because the code may change before a long run ends
    rank, world, device = start_processes(s.device)
    if device == "cpu":
        keep_freed_memory()
    if rank == 0 and os.path.isdir(s.out_dir):
        lock.acquire()  # before reading the folder
    data, val, meta, digest = dataset.load_and_digest(os.path.join("data", s.dataset), "train", "val")
    torch.manual_seed(s.seed)
    model, info, state = build(s, meta)
    info.dataset_digest = digest
    if state is not None and state.info.settings["dataset"] == s.dataset:
        if state.info.dataset_digest not in (None, info.dataset_digest):
            raise ValueError(
                f"data/{s.dataset} holds another text than {s.out_dir} was trained on: make it again from the old text, or "
                "make the new text under another name and pass that name as --dataset"
            )
    block_size = min(model.config.block_size, WINDOW) if s.block_size is None else s.block_size
    for split, ids in (("train", data), ("val", val)):
        if len(ids) <= block_size:
            raise ValueError(
                f"data/{s.dataset}/{split}.bin holds {len(ids)} tokens, a context of {block_size} needs more: lower "
                "block_size"
            )
    if s.pot and s.distill and not info.origin:
        raise ValueError(f"distill={s.distill}: this model comes from no float model to learn from: leave distill out")
    if info.step == s.max_iters and os.path.exists(os.path.join(s.out_dir, checkpoint.MODEL)):
        if rank == 0:
            print(f"{s.out_dir}/ is finished: step {info.step} of {s.max_iters}")
        return None
    if rank == 0:
        kind = (
            f"{'QAT' if s.max_iters else 'PTQ'}, {replace(info, pot=s.pot, table=s.table).weights}"
            if s.pot
            else "float"
        )
        place = f"{device} x {world}" if world > 1 else device
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        steps = f"step {info.step} to {s.max_iters}, " if s.max_iters else ""
        print(f"{kind}: {millions:.2f} M parameters on {place}, {steps}{s.dataset}, to {s.out_dir}/", flush=True)
    if s.max_iters:
        check_memory(s, model, block_size, device, rank == 0)
    source = {"scratch": os.path.join("data", s.dataset), "resume": s.out_dir}.get(s.init_from, s.init_from)
    if state is None:  # checks alone: without them, these faults would show only after the long work
        checkpoint.tokenizer_folder(meta, source)
        if s.pot:
            checkpoint.prepare_gpt(GPT.meta(model.config), s.pot, s.table)
    wandb = start_wandb(s) if rank == 0 and s.wandb_log and s.max_iters else None  # may fail, so before long work
    model.to(device)
    job = Job(s, model, info, data, val[: s.eval_tokens], block_size, device, rank, world, info.step)
    if s.max_iters and s.pot and s.distill:  # the float control learns from the text
        job.teacher = checkpoint.load_origin(info, source).to(device)
    compare = rank == 0 and s.pot and s.max_iters and info.origin == s.init_from  # it is still the float model
    float_loss = validate(job) if compare else None
    if s.pot and state is None:
        method = quantize(model, s, data, device, quiet=rank > 0)
        info.pot, info.table, info.method = s.pot, s.table, "QAT" if s.max_iters else method
    info.provenance = {k: v for k, v in machine.items() if k != "command"}
    model.train()
    if s.max_iters:
        prepare_steps(job, state)
    if world > 1:
        dist.barrier()  # no process may still read the folder that the first process writes to
    if rank == 0:
        lock.acquire()
        if state is None:
            refuse_checkpoint(s.out_dir)  # another run may have been faster
            checkpoint.keep_tokenizer(s.out_dir, meta, source)
        elif s.keep == "best" and checkpoint.exists(os.path.join(s.out_dir, "best")):
            best = checkpoint.load_model(os.path.join(s.out_dir, "best"))[1]
            if best.val_loss is not None and best.settings["dataset"] == s.dataset:
                job.best_loss = best.val_loss
        job.log = Log(s, info.step, wandb) if s.max_iters else None
        if compare:
            job.log(f"float model  validation loss {float_loss:.4f}", step=0, float_loss=float_loss)
    return job


def check_memory(s: Settings, model: GPT, block_size: int, device: str, report: bool):
    """Says what the steps need at least, and raises ValueError if that is more than there is."""
    weights = sum(p.nbytes for p in model.parameters())
    logits = s.batch_size * (1 if s.last_position else block_size) * model.config.vocab_size * 4
    parts = {"weights, gradients and moments": 4 * weights, "logits": 2 * logits}  # the logits have a gradient, too
    parts["tokens"] = 24 * s.batch_size * s.gradient_accumulation_steps * block_size  # int64, in rows, x and y
    if s.pot:
        parts["quantized weights"] = weights
    if s.pot and s.distill:
        parts["the float model to learn from, and what it says"] = weights + logits
    total, free = sum(parts.values()), free_memory(device)
    missing = total - (weights if device == "cpu" else 0)  # the weights are there already
    shown = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    if report:
        print(f"memory: at least {total / 2**30:.2f} GiB ({shown}), and activations", flush=True)
    if free is not None and missing > free:
        teacher = ", or leave distill out" if s.pot and s.distill else ""
        raise ValueError(
            f"the steps need at least {total / 2**30:.2f} GiB ({shown}), and {device} has {free / 2**30:.2f} GiB free: "
            f"lower batch_size (gradient_accumulation_steps makes up for it) or block_size{teacher}"
        )


def start_processes(device):
    """(rank of this process, number of processes, device of this process). torchrun sets the environment."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(key in os.environ for key in keys):
        return 0, 1, pick_device(device)
    rank, world, local = (int(os.environ[key]) for key in keys)
    device = pick_device(device)
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    from torch.distributed import nn  # noqa: F401  DDP imports it too: after init_process_group, it keeps the group alive

    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while the first process validates
    return rank, world, device


def end_processes(job: "Job"):
    """Ends the process group and its threads. A thread of gloo that outlives Python aborts the process."""
    if job.world > 1:
        job.training = job.model  # DDP holds the group, too
        dist.destroy_process_group()


@contextmanager
def peers_named():
    """Turns the errors of gloo and NCCL, if another process of the run is gone, into a ValueError that says so."""
    try:
        yield
    except RuntimeError as e:
        if not dist.is_initialized() or not re.search("peer|connect|socket|nccl", str(e), re.IGNORECASE):
            raise
        raise ValueError(
            "another process of this run has ended: its own messages say why; --init_from=resume goes on from the last "
            "checkpoint"
        ) from None


def build(s: Settings, meta: dict) -> tuple[GPT, CheckpointInfo, checkpoint.TrainingState | None]:
    """The model that the run starts from, on the CPU; what it is; and the training state of a resumed run.

    The model is float, but that of a resumed QAT run is prepared.
    """
    shape = {k: getattr(s, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout")}
    given = {k: v for k, v in shape.items() if v is not None}
    if s.init_from != "resume":
        refuse_checkpoint(s.out_dir)
    if s.init_from == "scratch":
        config = GPTConfig(vocab_size=dataset.vocab_size(meta), **given)
        check_size("the weights alone take", sum(p.nbytes for p in GPT.meta(config).parameters()), "n_layer and n_embd")
        model = GPT(config)
        return model, CheckpointInfo(meta, "float", model.config, settings=asdict(s)), None

    state = None
    if s.init_from == "resume":
        folder, state = s.out_dir, checkpoint.load_training(s.out_dir)
        model, source = checkpoint.model_of(state), state.info
    else:
        folder = s.init_from
        model, source = checkpoint.load_float(folder)
    dataset.check_vocabulary(folder, source.tokenizer, s.dataset, meta)
    for key, value in given.items():
        model_value = getattr(model.config, key)
        if key == "block_size" and value > model_value:
            raise ValueError(f"block_size={value} is more than the context of {folder}, {model_value}: lower it")
        if key not in ("block_size", "dropout") and model_value != value:
            raise ValueError(f"{key}={value}, but {folder} was trained with {key}={model_value}: leave {key} out")
    if s.dropout is not None:
        model.set_dropout(s.dropout)
    info = replace(source, tokenizer=meta, model_args=model.config, settings=asdict(s), val_loss=None, provenance=None)
    if state is None:
        # The float model to compare with: the source, or the model that the source itself comes from.
        origin, digest = (source.origin, source.origin_digest) if source.pot else (folder, checkpoint.digest_of(model))
        kept = {"origin": origin, "origin_digest": digest, "step": 0}
        return model, replace(info, method="float control", pot=None, table=None, **kept), None
    asked = replace(source, pot=s.pot, table=s.table).weights
    if source.weights != asked:
        raise ValueError(
            f"{folder} was trained with {source.weights}, the settings ask for {asked}: resume with the same"
        )
    for key in ("calibrate_tokens", "block_tokens"):  # work of the start, which a resumed run does not do again
        info.settings[key] = source.settings.get(key, info.settings[key])
    if source.step > s.max_iters:
        raise ValueError(f"{folder} is at step {source.step} already: max_iters={s.max_iters} must be at least that")
    return model, info, state


def check_size(name: str, size: int, settings: str):
    """Raises ValueError for more bytes than the memory has, before they are taken."""
    if (free := free_memory()) is not None and size > free:
        raise ValueError(f"{name} {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free: lower {settings}")


def refuse_checkpoint(folder):
    if checkpoint.exists(folder):
        can_resume = os.path.exists(os.path.join(folder, checkpoint.TRAINING))
        hint = "--init_from=resume goes on with it; else " if can_resume else ""
        raise ValueError(f"{folder} holds a checkpoint already: {hint}choose another --out_dir, or delete the folder")


BLOCK_STEP = 1024  # tokens of a step that trains a block


def quantize(model: GPT, s: Settings, data: np.ndarray, device: str, quiet: bool = False) -> str:
    """Prepares a float model in place. Then comes GPTQ if calibrate_tokens asks for it, and the training of blocks if
    block_tokens does, on random windows of data (token ids). Returns the name of the method. Raises ValueError as
    prepare, calibrate and train_blocks do."""
    reference, method, start = copy.deepcopy(model) if s.block_tokens else None, ["PTQ"], time.time()
    checkpoint.prepare_gpt(model, s.pot, s.table)

    def windows(key, length, seed):
        tokens = getattr(s, key)
        check_size(f"the tokens of {key} take", 16 * tokens, key)
        length = min(model.config.block_size, length, len(data), tokens)
        return dataset.random_windows(data, length, max(1, tokens // length), seed).to(device)

    def progress(name, done, total):
        seconds = time.time() - start
        if not quiet and done == total:
            print(f"{name}: {done}/{total}, {seconds:.0f} s", file=sys.stderr)
        elif not quiet and sys.stderr.isatty():
            print(f"{name}: {done}/{total}, {seconds * (total - done) / done:.0f} s left  ", end="\r", file=sys.stderr)

    def report(name, errors):
        if not quiet:
            before, after = (statistics.mean(e) for e in zip(*errors))
            print(f"{name} {before:.5f} -> {after:.5f}", flush=True)

    if s.calibrate_tokens:
        x = windows("calibrate_tokens", WINDOW, s.seed)
        batches = x.split(max(1, LOGITS // (x.shape[1] * model.config.vocab_size)))
        name = f"GPTQ on {x.numel():,} tokens"
        errors = calibrate(model, batches, partial(progress, f"{name} of {s.dataset}, sets of layers"))
        report("GPTQ: mean relative output error of the layers", errors.values())
        method.append(name)
    if s.block_tokens:
        x, start = windows("block_tokens", BLOCK_STEP // 2, s.seed + 1), time.time()
        name = f"blocks trained on {x.numel():,} tokens"
        batches = x.split(max(1, BLOCK_STEP // x.shape[1]))
        errors = train_blocks(model, reference, model.transformer.h, batches, progress=partial(progress, name))
        report("mean relative output error of the blocks", errors)
        method.append(name)
    return ", ".join(method)


def prepare_steps(job: Job, state: checkpoint.TrainingState | None):
    """What steps need: optimizer, scaler, precision, and the compiled or distributed model."""
    s, device = job.settings, job.device
    cuda = device.startswith("cuda")
    job.optimizer = make_optimizer(job.model, s, device)
    dtype = s.dtype
    if dtype == "auto":
        dtype = "float32" if not cuda else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    kind = torch.device(device).type
    job.autocast = nullcontext() if dtype == "float32" else torch.autocast(kind, getattr(torch, dtype))
    job.scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")
    if state is not None:
        load_optimizer(job.optimizer, job.scaler, state)
    job.training = torch.compile(job.model) if s.compile and cuda else job.model
    if job.world > 1:
        # Units are the same in all processes. Under autocast to bfloat16, DDP cannot send these float16 numbers each step.
        devices = [device] if cuda else None
        job.training = DistributedDataParallel(job.training, devices, forward_sync_buffers=False)
    job.first_step = job.step


def make_optimizer(model, s, device):
    """AdamW with weight decay for matrices only."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=device != "mps")


def load_optimizer(optimizer, scaler, state: checkpoint.TrainingState):
    """Takes moments and step counts from a training state. Everything else stays as the settings say.

    Raises ValueError for a state that does not fit, because the fused step would write beyond it.
    """
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state.optimizer)
        for group, values in zip(optimizer.param_groups, options):
            group.update(values)
        for p, moments in optimizer.state.items():
            kinds = {name: (t.shape, t.dtype, t.is_sparse, t.is_contiguous()) for name, t in moments.items()}
            shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if kinds != {name: (shape, torch.float32, False, True) for name, shape in shapes.items()}:
                raise ValueError(f"moments of other shapes or kinds for a weight of {tuple(p.shape)}")
        if state.scaler:
            scaler.load_state_dict(state.scaler)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as e:
        raise ValueError(f"the optimizer's state in this checkpoint is damaged ({e!r}): start a new run") from None


# --- steps ---


def take_steps(job: Job, stop: "Stop"):
    """Optimizer steps up to max_iters, with validation, saving and progress in between."""
    s, losses = job.settings, []
    job.start = job.shown = time.time()
    while True:
        if stop.asked(job.world) and job.step < s.max_iters:
            stop_early(job, losses, stop)
        known = job.log is not None and any(e["step"] == job.step and "val_loss" in e for e in job.log.entries)
        if job.step == s.max_iters or job.step % s.eval_interval == 0 and not known:
            check_losses(losses, job.step, s.out_dir)
            if job.rank == 0 and not save_and_validate(job, stop) and (job.world == 1 or job.step == s.max_iters):
                stop_early(job, losses, stop)
        if job.step >= s.max_iters:
            return
        losses.append(take_step(job))
        job.step += 1
        if job.step % s.log_interval == 0 or job.step == s.max_iters:
            check_losses(losses, job.step, s.out_dir)
            mean = torch.stack(losses).mean(0)
            losses.clear()
            if job.world > 1:
                dist.all_reduce(mean)
            if job.rank == 0:
                log_progress(job, *(mean / job.world).tolist())


def take_step(job: Job) -> torch.Tensor:
    """One optimizer step. Returns its mean losses in this process (2): of the step, and of the text."""
    s = job.settings
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(job.step, s)
    # Dropout depends on (seed, step, rank) only, as the batches do, so a resumed run goes on with the same numbers.
    torch.manual_seed(int(np.random.SeedSequence([s.seed, job.step, job.rank]).generate_state(1)[0]))
    x, y = batch(job.data, job.block_size, s, job.step, job.rank, job.world)
    losses, micro_batches = 0.0, list(zip(x.split(s.batch_size), y.split(s.batch_size)))
    for i, (xi, yi) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if job.world == 1 or last else job.training.no_sync():  # exchange gradients once a step
            with job.autocast:
                loss, text_loss = loss_of(job, xi.to(job.device), yi.to(job.device))
                loss = loss / s.gradient_accumulation_steps
            job.scaler.scale(loss).backward()
        losses += torch.stack([loss.detach(), text_loss / s.gradient_accumulation_steps])
        show_progress(job, (i + 1) / len(micro_batches))
    job.scaler.unscale_(job.optimizer)
    if s.grad_clip:
        torch.nn.utils.clip_grad_norm_(job.model.parameters(), s.grad_clip)
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.optimizer.zero_grad()
    return losses


def loss_of(job: Job, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss to minimize, cross entropy with the text, detached), means in nats of x, y (B, T). The share `distill` of the
    loss is the cross entropy with the teacher's predictions, the rest the cross entropy with the text."""
    s = job.settings
    if job.teacher is None:
        loss = job.training(x, y)[1]
        return loss, loss.detach()
    with torch.no_grad():  # a cross entropy is linear in its target, so one target serves both losses
        target = job.teacher(x, last=s.last_position).flatten(0, 1).float().softmax(-1).mul_(s.distill)
        text = y[:, -1] if s.last_position else y.flatten()
        target[torch.arange(len(text), device=x.device), text] += 1 - s.distill
    # one log-softmax serves both losses: with a large vocabulary it takes as long as several layers
    logp = job.training(x, last=s.last_position).flatten(0, 1).float().log_softmax(-1)
    return -(target * logp).sum() / len(logp), F.nll_loss(logp.detach(), text)


def learning_rate(step, s):
    """Linear warm-up, then a cosine to min_lr at max_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    progress = (step - s.warmup_iters) / max(1, s.max_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)


def batch(data, block_size, s, step, rank=0, world=1):
    """(x, y) of a step in one of `world` processes: (batch_size * gradient_accumulation_steps, block_size) int64 each.

    It depends on (seed, step) only: a resumed run goes on with the batches of a run in one piece, and QAT and its float
    control see the same batches. A y of -100 is no target.
    """
    count = s.batch_size * s.gradient_accumulation_steps
    places = np.random.default_rng([s.seed, step]).integers(len(data) - block_size, size=count * world)
    places = places[rank * count : (rank + 1) * count]
    rows = torch.from_numpy(np.stack([data[i : i + block_size + 1] for i in places]).astype(np.int64))
    x, y = rows[:, :-1], rows[:, 1:].clone()
    if s.last_position:
        y[:, :-1] = -100
    return x, y


def save_and_validate(job: Job, stop: "Stop") -> bool:
    """Saves, then validates. False if a signal ended the validation, which may take minutes: a resumed run does it again.
    Before the first step there is nothing to save but the best model so far."""
    s, pause = job.settings, time.time()
    best = os.path.join(s.out_dir, "best")
    if job.step > job.first_step:
        save(job)
    try:
        with stop.at_once():
            job.val_loss = validate(job)
    except Stopped:
        job.model.train()
        return False
    check_finite("validation loss", job.val_loss, job.step, s.out_dir)
    before = "" if job.step else f" before {'QAT' if s.pot else 'training'}"
    line = f"step {job.step}/{s.max_iters}  validation loss {job.val_loss:.4f}{before}"
    if s.keep == "best" and job.val_loss < job.best_loss:
        checkpoint.keep_tokenizer(best, job.info.tokenizer, s.out_dir)  # first: a model is of no use without it
        save_finished(job, best, copy.deepcopy(job.model))
        job.best_loss = job.val_loss
    job.log(line, step=job.step, val_loss=job.val_loss)  # last, because a resumed run validates what the log lacks
    job.shown = time.time()
    job.start += job.shown - pause
    return True


def validate(job: Job) -> float:
    if not job.step:  # this may take minutes, and no line of progress precedes it
        print(f"validation on {len(job.val):,} tokens", flush=True)
    return evaluate(job.model, job.val, job.device, block_size=job.block_size)["loss"]


def save(job: Job):
    """Writes ckpt.pt. Raises ValueError, and keeps the older one, if a weight is not finite."""
    for name, p in job.model.named_parameters():
        if not p.isfinite().all():
            check_finite(f"weight {name}", math.nan, job.step, job.settings.out_dir)
    job.info.step = job.step
    states = job.optimizer.state_dict(), job.scaler.state_dict()
    checkpoint.save_training(job.settings.out_dir, job.model, job.info, *states)


def log_progress(job: Job, loss: float, text_loss: float):
    s, (rate, left) = job.settings, speed(job, job.step)
    of_text = f" (of the text {text_loss:.4f})" if job.teacher else ""
    line = f"step {job.step}/{s.max_iters}  loss {loss:.4f}{of_text}  {rate:,.0f} tokens/s  {left} left"
    entry = {"loss": loss, "text_loss": text_loss, "lr": learning_rate(job.step - 1, s), "tokens_per_s": round(rate)}
    job.log(line, step=job.step, **entry)
    job.shown = time.time()


def show_progress(job: Job, share: float):
    """Shows progress if no line did for 10 seconds (into a file: 60). share: of this step that is done."""
    terminal = sys.stderr.isatty()
    if job.rank or time.time() - job.shown < (10 if terminal else 60):
        return
    rate, left = speed(job, job.step + share)
    line = f"step {job.step + share:.2f}/{job.settings.max_iters}  {rate:,.0f} tokens/s  {left} left"
    print(line, end="\x1b[K\r" if terminal else "\n", file=sys.stderr, flush=True)
    job.shown = time.time()


def speed(job: Job, step: float) -> tuple[float, str]:
    """(tokens per second, time left in words) at a step and its fraction."""
    seconds = max(time.time() - job.start, 1e-9) / (step - job.first_step)  # a clock may stand still
    left = (job.settings.max_iters - step) * seconds
    words = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
    return tokens_a_step(job) / seconds, words


def tokens_a_step(job: Job) -> int:
    s = job.settings
    return s.batch_size * s.gradient_accumulation_steps * job.block_size * job.world


def stop_early(job: Job, losses, stop: "Stop"):
    """Saves the run and ends the process, because a signal asks for it."""
    check_losses(losses, job.step, job.settings.out_dir)
    if job.rank == 0 and job.step > job.first_step:
        save(job)
        folder = job.settings.out_dir
        print(f"stopped at step {job.step}, which {folder}/ keeps: --init_from=resume goes on", flush=True)
    end_processes(job)
    sys.exit(128 + stop.signal)


class Stopped(Exception):
    """A signal came in a part of the run that it may end at once."""


class Stop:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that a run stops at the end of a step. A second signal ends it at once."""

    def __enter__(self):
        self.signal, self.handlers, self.raises = 0, {}, False
        if threading.current_thread() is threading.main_thread():  # only there may signals be handled
            self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and kind is None:  # it came after the last step: now it ends the process, or a sweep
            os.kill(os.getpid(), self.signal)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        if self.raises:
            raise Stopped

    @contextmanager
    def at_once(self):
        """A signal, also one that is noted already, raises Stopped in here."""
        self.raises = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self.raises = False

    def asked(self, world):
        if world > 1:  # all processes stop after the same step
            number = torch.tensor(self.signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number)
        return self.signal > 0


def check_finite(name, value, step, out_dir):
    if not math.isfinite(value):
        kept = "keeps the last checkpoint" if checkpoint.exists(out_dir) else "holds no checkpoint yet"
        hint = "try a lower learning_rate or more warmup_iters" if step else "start from a model that works"
        raise ValueError(f"the {name} is {value} at step {step}: {hint}; {out_dir}/ {kept}")


def check_losses(losses, step, out_dir):
    """Raises ValueError for the first loss that is not finite. The last loss is that of step `step`."""
    for i, (loss, _) in enumerate(torch.stack(losses).tolist() if losses else []):
        check_finite("loss", loss, step - len(losses) + i + 1, out_dir)


# --- finish ---


def finish(job: Job):
    """Validates PTQ, writes the finished model, prints the table, and draws the losses."""
    s, seconds = job.settings, time.time() - job.start
    end_processes(job)
    if job.rank > 0:
        return
    if not s.max_iters:
        job.val_loss = validate(job)
        check_finite("validation loss", job.val_loss, job.step, s.out_dir)
    peak, steps = peak_memory(job.device), job.step - job.first_step
    size = save_finished(job, s.out_dir, job.model)
    rows = {
        "method": job.info.method,
        "validation loss": f"{job.val_loss:.4f}",
        "perplexity": f"{perplexity(job.val_loss):.2f}",
        "peak memory": f"{peak / 2**20:,.0f} MiB",
        f"{s.out_dir}/model.safetensors": f"{size:,} bytes, {'packed' if job.info.pot else 'float'}",
    }
    if s.max_iters:
        first = {key: value for e in job.log.entries if not e["step"] for key, value in e.items()}
        before = f"before {'QAT' if s.pot else 'training'}"
        losses = {"float model": first.get("float_loss"), before: first.get("val_loss")}
        losses |= {"lowest, in best/": job.best_loss} if s.keep == "best" else {}
        rows = {name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None} | rows
        rows["steps, tokens"] = f"{job.step}, {job.step * tokens_a_step(job):,}"
        rows["training time"] = f"{seconds:.0f} s, {seconds / max(1, steps):.2f} s a step"
        rows[f"{s.out_dir}/ckpt.pt"] = "the state to resume or fine-tune from"
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")
    if job.log:
        job.log(None, step=job.step, seconds=round(seconds, 2), steps=steps, peak_bytes=peak)
        job.log.finish(rows)


def save_finished(job: Job, folder: str, model: GPT) -> int:
    """Packs the model in place if it is quantized, and writes it. Returns the bytes of the file."""
    if job.info.pot:
        convert(model)
    # Without these, the same run elsewhere, or a run that was cut, leaves the same bytes.
    settings = {k: v for k, v in job.info.settings.items() if k not in ("out_dir", "init_from", "keep")}
    info = replace(job.info, step=job.step, settings=settings, val_loss=job.val_loss, dataset_digest=None)
    return checkpoint.save_model(folder, model, info)


class Log:
    """Prints progress and keeps it in out_dir/log.jsonl, loss.png and wandb."""

    def __init__(self, s, step, wandb):
        self.wandb, self.folder, self.entries = wandb, s.out_dir, []
        self.path = os.path.join(s.out_dir, checkpoint.LOG)
        if s.init_from == "resume" and os.path.exists(self.path):
            self.entries = [e for e in checkpoint.read_log(s.out_dir) if e["step"] <= step]  # later steps happen again
        lines = "".join(json.dumps(e) + "\n" for e in self.entries)
        checkpoint.write(self.path, lambda tmp: Path(tmp).write_text(lines))

    def __call__(self, line, **entry):
        if line:
            if sys.stderr.isatty():
                print(end="\x1b[K", file=sys.stderr, flush=True)  # erases a line of show_progress
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
        from extras.plot import draw_training  # here, because matplotlib takes a second to import

        draw_training(self.entries, self.folder, os.path.join(self.folder, "loss.png"))
        if self.wandb:
            import wandb

            self.wandb.log({"result": wandb.Table(["", "value"], [list(row) for row in rows.items()])})
            self.wandb.finish()


def start_wandb(s):
    try:
        import wandb

        return wandb.init(project=s.wandb_project, name=s.out_dir, config=asdict(s))
    except Exception as e:  # ImportError, or an error of wandb
        raise ValueError(
            f"cannot log to wandb ({type(e).__name__}): `pip install wandb` and `wandb login`, or set WANDB_MODE=offline, "
            "or leave --wandb_log out"
        ) from None


if __name__ == "__main__":
    run(main, Settings)
