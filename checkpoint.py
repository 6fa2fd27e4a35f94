"""
Reads and writes the checkpoints of a run:

    out/ckpt.pt             training state: model, optimizer, step
    out/model.safetensors   the finished model alone, float or packed, to evaluate, sample and share

Both hold a CheckpointInfo. Both are written to a temporary file and renamed, so an old file is replaced whole or not at
all. GPT-2 is also read from a folder in Hugging Face's format, or from the hub by name.
"""

import errno
import hashlib
import io
import json
import os
import pickletools
import stat
import struct
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import machine
import tokenizer
from configurator import CONTROL
from model import GPT, GPTConfig, huggingface_config, rotary_frequencies
from pot import PackedPoTEmbedding, PackedPoTLinear, PoTConfig, load_packed, packed_state, prepare
from pot_kernel import KernelError
from pot_kernel.decode import Decoder, DecoderShape
from tokenizer import GPT2, is_hub_name, vocab_size

TRAINING, MODEL, LOG = "ckpt.pt", "model.safetensors", "log.jsonl"


@dataclass
class CheckpointInfo:
    """What a checkpoint is. Read from a file by from_dict, which validates it."""

    tokenizer: dict  # meta.json of the data set, see tokenizer.py
    method: str  # "float", "float control", "QAT", "PTQ" or "PTQ, GPTQ on 16,384 tokens"
    model_args: GPTConfig
    pot: PoTConfig | None = None  # None: float weights
    table: PoTConfig | None = None  # of embeddings and head; None: as pot
    origin: str | None = None  # folder of the float model that it comes from
    origin_digest: str | None = None  # see digest_of; tells whether the folder still holds that model
    step: int = 0  # optimizer steps
    # settings of train.py; "dataset" and "seed" are always there
    settings: dict = field(default_factory=lambda: {"dataset": None, "seed": None})
    val_loss: float | None = None  # in nats, at the end of training
    provenance: dict | None = None  # see machine.provenance
    dataset_digest: str | None = None  # see dataset.load_and_digest; in ckpt.pt only, for a run that resumes

    def to_dict(self) -> dict:
        """For json and torch.save."""
        optional = ("table", "origin_digest", "val_loss", "provenance", "dataset_digest")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in optional}

    @classmethod
    def from_dict(cls, d: dict) -> "CheckpointInfo":
        """Raises KeyError, TypeError or ValueError if d, which came from a file, lacks or garbles a value."""
        json.dumps(d)  # raises TypeError for what a finished model could not hold
        kinds = {"method": str, "pot": dict | None, "origin": str | None, "step": int}
        kinds |= {"settings": dict, "model_args": dict}
        for values, expected in ((d, kinds), (d["settings"], {"dataset": str | None, "seed": int | None})):
            for key, kind in expected.items():
                # A stranger's text is shown on terminals, which obey escape sequences.
                if not isinstance(values[key], kind) or CONTROL.search(str(values[key])):
                    raise TypeError(f"{key} is {values[key]!r}")
        for key in ("step", "val_loss"):
            if d.get(key) is not None and not _is_number(d[key]):
                raise ValueError(f"{key} is no finite number")
        if d["step"] < 0:
            raise ValueError("its step is negative")
        info = cls(
            d["tokenizer"], d["method"], GPTConfig(**d["model_args"]),
            *(PoTConfig(**d[key]) if d.get(key) else None for key in ("pot", "table")), d["origin"],
            d.get("origin_digest"), d["step"], d["settings"], d.get("val_loss"), d.get("provenance"),
            d.get("dataset_digest"),
        )  # fmt: skip
        if vocab_size(info.tokenizer) > info.model_args.vocab_size:
            raise ValueError(f"its tokenizer has more than the {info.model_args.vocab_size} tokens of the model")
        return info

    @property
    def weights(self) -> str:
        """The kind of weights, in words."""
        return f"{self.pot or 'float32'}{f'; tables {self.table}' if self.table else ''}"


@dataclass
class TrainingState:
    """The content of ckpt.pt."""

    info: CheckpointInfo
    model: dict[str, torch.Tensor]  # state_dict; with scales if info.pot
    optimizer: dict
    scaler: dict  # of GradScaler; empty without float16


# --- writing ---


def write(path: str, save: Callable[[str], object], stale: str | None = None) -> None:
    """Writes `path` atomically through a temporary file, and deletes `stale` first. save(path) writes a file. Both the
    file and its name outlive a loss of power after that.

    Raises OSError; then the old file is untouched.
    """
    folder = os.path.dirname(path) or "."
    # A run is alone in its folder. So its temporary files have a fixed name, and the next write replaces those that a kill
    # left. Other files may have two writers at once.
    alone = os.path.basename(path) in (MODEL, TRAINING)
    tmp = f"{path}.tmp" if alone else f"{path}.{threading.get_native_id()}.tmp"
    os.makedirs(folder, exist_ok=True)
    try:
        with open(tmp, "wb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        save(tmp)
        os.chmod(tmp, mode)  # safetensors lets nobody but the owner read a file
        sync(tmp)
        if stale and os.path.exists(stale):
            os.remove(stale)
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have errors of their own
        raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    sync_folder(folder)


def write_json(path: str, value: object) -> None:
    """Writes value as json, atomically. NaN and infinity, which json has not, become null. Raises OSError."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write(path, lambda tmp: Path(tmp).write_text(json.dumps(finite, indent=1)))


def check_json(path: str) -> None:
    """Raises ValueError unless path is the name of a .json file, so that no model is overwritten, and can be written."""
    if not path.endswith(".json"):
        raise ValueError(f"json={path} must be the name of a .json file, which is replaced if it exists")
    check_file(path)


def check_file(path: str) -> None:
    """Raises ValueError if `write` cannot write a file of this name."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, and must be the name of a file")
    check_writable(os.path.dirname(path))
    check_writable(f"{path}.{threading.get_native_id()}.tmp")  # its name may be too long


def sync(path: str) -> None:
    """Waits until the file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder):
    with suppress(OSError):  # Windows and some network drives cannot do this
        sync(folder)


def check_writable(folder: str) -> None:
    """Raises ValueError if no file can be written to the folder, or if the folder cannot be made. Makes nothing."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        try:
            os.lstat(place)
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                raise ValueError(
                    f"{folder} cannot be written to, because its name is too long: choose another"
                ) from None
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ValueError(f"{folder} cannot be written to, because {place} is no folder: choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written to: choose another folder, or change the permissions of {place}")


class Lock:
    """Reserves a folder for one process: `with Lock(folder) as lock: ... lock.acquire()`. The end of the process releases
    it."""

    def __init__(self, folder: str):
        self.folder, self.fd = folder, None

    def acquire(self) -> None:
        """Makes the folder and reserves it, if that is not done yet. Raises ValueError if another process has it."""
        os.makedirs(self.folder, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        if self.fd is not None:
            return
        self.fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder} is in use by another run: wait for it, or choose another folder") from None
        except OSError:  # some network drives have no locks
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def save_training(folder: str, model: GPT, info: CheckpointInfo, optimizer: dict, scaler: dict) -> None:
    """Writes the training state. Deletes a finished model in the folder, because it belongs to an older step.

    Raises OSError if it cannot be written.
    """
    state = {"info": info.to_dict(), "model": model.state_dict(), "optimizer": optimizer, "scaler": scaler}

    def save(path):
        with open(path, "wb") as f:  # a name alone would hide why a write fails
            try:
                torch.save(state, f)
            except RuntimeError as e:
                raise e.__context__ if isinstance(e.__context__, OSError) else e from None

    write(os.path.join(folder, TRAINING), save, stale=os.path.join(folder, MODEL))


def save_model(folder: str, model: GPT, info: CheckpointInfo) -> int:
    """Writes a float or packed model. Returns the size of the file in bytes.

    Raises OSError if it cannot be written, and ValueError for a prepared model.
    """
    tensors, metadata = packed_state(model)
    header = json.dumps(info.to_dict() | {"packed": metadata}, separators=(",", ":"))
    path = os.path.join(folder, MODEL)
    write(path, lambda tmp: save_file({n: t.contiguous() for n, t in tensors.items()}, tmp, {"nanopot": header}))
    return os.path.getsize(path)


def tokenizer_folder(meta: dict, source: str | None) -> str | None:
    """The folder with the tokenizer.json that meta describes, from `source`: a folder or a name on the hub. None if it
    needs none, or if GPT-2's comes from tiktoken. Raises ValueError if the source has none."""
    if meta.get("tokenizer") == "char":
        return None
    folder = None if source is None else tokenizer.local_folder(source, tokenizer.FILES)
    if folder is not None and os.path.exists(os.path.join(folder, "tokenizer.json")):
        return folder
    if meta != GPT2:
        raise ValueError(f"{source} has no tokenizer.json: copy it there, from the model that it comes from")
    return None


def keep_tokenizer(folder: str, meta: dict, source: str | None = None) -> None:
    """Puts the tokenizer that meta describes beside a checkpoint or a data set, from `source`: a folder or a name on the
    hub. GPT-2's comes from tiktoken if the source has none, and is left out if there is no network.

    Raises OSError if it cannot be written, and ValueError if the source has none.
    """
    if meta.get("tokenizer") == "char":
        return
    source = tokenizer_folder(meta, source)
    if source is not None:
        if os.path.isdir(folder) and os.path.samefile(source, folder):
            return
        files = {name: os.path.join(source, name) for name in tokenizer.FILES}
        files = {name: tokenizer.read_small(path) for name, path in files.items() if os.path.exists(path)}
    elif os.path.exists(os.path.join(folder, "tokenizer.json")):
        return
    else:
        try:
            files = {name: text.encode() for name, text in tokenizer.gpt2_files().items()}
        except ValueError:  # no network
            return
    for name, content in files.items():
        write(os.path.join(folder, name), lambda tmp, content=content: Path(tmp).write_bytes(content))


def publish(source: str, target: str) -> None:
    """Gives a finished file or folder its name. Both outlive a loss of power after that. Raises OSError."""
    for path in [source, *(os.path.join(d, name) for d, folders, files in os.walk(source) for name in folders + files)]:
        if os.path.isdir(path):
            sync_folder(path)
        else:
            sync(path)
    os.rename(source, target)
    sync_folder(os.path.dirname(target) or ".")


# --- reading ---


def load_training(folder: str) -> TrainingState:
    """Training state of a run, on the CPU. Raises ValueError if it is missing or damaged."""
    path = os.path.join(folder, TRAINING)
    require_folder(folder)
    if not os.path.exists(path):
        has_model = os.path.exists(os.path.join(folder, MODEL))
        content = f"{MODEL} only, without the {TRAINING} of a training run" if has_model else "no checkpoint"
        raise ValueError(f"{folder} holds {content}: pass the out_dir of a training run")
    tokenizer.require_file(path)
    try:
        state = _unpickle(path)
        info = CheckpointInfo.from_dict(state["info"])
        _check_count(info.model_args, len(state["model"]))
        return TrainingState(info, state["model"], state["optimizer"], state["scaler"])
    except OSError:
        raise
    except Exception as e:  # torch.load raises a zip error, EOFError, UnpicklingError, KeyError and others
        reason = str(e)[:200] if type(e) is ValueError and not CONTROL.search(str(e)) else type(e).__name__
        raise ValueError(f"{path} is truncated, damaged or no nanoPoT checkpoint ({reason})") from None


def load_model(folder: str) -> tuple[GPT, CheckpointInfo]:
    """The model of a folder, on the CPU, in eval mode: the finished model, else the model in training (fake-quantized
    if it is QAT). folder may be in Hugging Face's format, or a name on the hub.

    The tensors of a packed model are read into memory. Those of a finished float model are its mapped file, copied where
    they are written to: while they are in use, replace the file, as save_model does, instead of writing into it. Raises
    ValueError for a checkpoint that is missing, damaged, replaced at that moment, or cannot be downloaded.
    """
    if is_foreign(folder):
        return _load_huggingface(_download(folder), folder)
    path = os.path.join(folder, MODEL)
    if not os.path.exists(path):
        state = load_training(folder)
        return model_of(state), state.info
    tokenizer.require_file(path)
    try:
        with open(path, "rb") as file, safe_open(path, "pt") as f:
            header = json.loads(f.metadata()["nanopot"])
            info, packed = CheckpointInfo.from_dict(header), header["packed"]
            _check_count(info.model_args, len(f.keys()))
            info = _with_kind(info, packed)
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            dtypes = {layer["dtype"] for layer in packed["layers"].values()}
            dtypes |= {str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if "packed." not in name}
            if len(dtypes) > 1 or not dtypes <= {"float32", "float16", "bfloat16"}:
                raise ValueError(f"it holds or mixes weights of {' and '.join(sorted(dtypes))}")
            if packed["layers"]:
                tensors = _read_aligned(file, tensors)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # two openings may see two files
                raise ReplacedError(f"{path} was replaced while it was read: try again")
            return load_packed(GPT.meta(info.model_args), tensors, packed).eval(), info
    except (OSError, KernelError, ReplacedError):
        raise
    except Exception as e:  # safetensors, json and torch raise many kinds for damaged files
        raise ValueError(f"{path} is truncated, damaged or not of nanoPoT: {str(e)[:1000]}") from None


def finished_tokenizer(folder: str) -> dict | None:
    """CheckpointInfo.tokenizer of a finished model, whose weights are not read. None if there is none that can be read."""
    path = os.path.join(folder, MODEL)
    try:
        tokenizer.require_file(path)
        with safe_open(path, "pt") as f:
            return CheckpointInfo.from_dict(json.loads(f.metadata()["nanopot"])).tokenizer
    except Exception:  # also a model in Hugging Face's format. load_model says what is wrong
        return None


class ReplacedError(ValueError):
    """A file was replaced while it was read."""


def _read_aligned(f, tensors):
    """The tensors of a safetensors file f, read into large pages, each from the start of a cache line on. The kernel reads
    them faster than a mapped file, which has pages of 4 KiB."""
    starts, size = {}, 0
    for name, t in tensors.items():
        starts[name], size = size, size + t.nbytes + -t.nbytes % 64
    memory, aligned = machine.large_pages(size), {}
    (length,) = struct.unpack("<Q", f.read(8))
    header = json.loads(f.read(length))
    for name, t in tensors.items():
        f.seek(8 + length + header[name]["data_offsets"][0])
        part = memory[starts[name] : starts[name] + t.nbytes]
        if f.readinto(part.numpy()) != t.nbytes:
            raise ValueError(f"it ends within {name}")
        aligned[name] = part.view(t.dtype).view(t.shape)
    return aligned


def load_float(folder: str) -> tuple[GPT, CheckpointInfo]:
    """A model with float weights to quantize or fine-tune. Of a QAT run these are its float weights, not the rounded
    ones.

    Raises ValueError as load_model does, and if the folder holds packed weights only.
    """
    if not is_foreign(folder) and os.path.exists(os.path.join(folder, TRAINING)):
        state = load_training(folder)
        return model_of(state, quantized=False), state.info
    model, info = load_model(folder)
    if info.pot:
        raise ValueError(
            f"{folder} holds packed weights only: pass the float model that they come from ({info.origin}), or a folder "
            f"with {TRAINING}"
        )
    return model.float(), info


def model_of(state: TrainingState, quantized: bool = True) -> GPT:
    """Model of a training state, in eval mode; quantized=False leaves its float weights as they are."""
    weights, info = state.model, state.info
    try:
        model = GPT.meta(info.model_args)
        if info.pot and quantized:
            prepare_gpt(model, info.pot, info.table)
        elif info.pot:
            weights = {name: t for name, t in weights.items() if ".quantizer." not in name}
        expected = model.state_dict()
        # Older checkpoints hold the unit of a tied weight twice.
        weights = {n: t for n, t in weights.items() if n in expected or n != "lm_head.quantizer.unit"}
        for name in expected.keys() ^ weights.keys():
            raise ValueError(f"{name} is {'missing' if name in expected else 'not in such a model'}")
        for name, t in weights.items():
            is_unit = name.endswith("quantizer.unit")
            dtypes = (torch.float32, torch.float16) if is_unit else (torch.float32,)
            if t.dtype not in dtypes or t.is_sparse or t.is_meta or t.nbytes > t.untyped_storage().nbytes():
                raise TypeError(f"{name} is {t.dtype}, or has more elements than its storage")
            if is_unit and not (t > 0).logical_and(t < torch.inf).all():
                raise ValueError(f"{name} holds a value that is no positive number")
            if t.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(t.shape)}, not {tuple(expected[name].shape)}")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"the checkpoint is damaged: its weights do not fit its settings: {e}") from None
    model.tie_weights()
    return model.eval()


def prepare_gpt(model: GPT, pot: PoTConfig, table: PoTConfig | None) -> None:
    """pot.prepare with another config for the embeddings and the head, if table is given. Raises ValueError as it does."""
    tables = ("transformer.wte", "transformer.wpe", "lm_head")
    prepare(model, pot, lambda module, name: table if table and name in tables else True)


def digest_of(model: GPT) -> str:
    """A digest of a float model's weights. It reads at most 2,000 values of each tensor, because all of them take seconds."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        values = p.detach().flatten()
        values = values[:: max(1, len(values) // 1000)]
        digest.update(f"{name} {tuple(p.shape)}".encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_origin(info: CheckpointInfo, folder: str) -> GPT:
    """The float model that the model of a folder, which info describes, comes from. Raises ValueError as load_reference
    does, and if its folder holds another model by now."""
    model = load_reference(info.origin, info, folder)
    if info.origin_digest not in (None, digest_of(model)):
        raise ValueError(
            f"{info.origin} is not the float model that {folder} comes from: its weights have changed. Put that model there "
            "again, or pass --reference to eval.py"
        )
    return model


def load_reference(name: str, info: CheckpointInfo, folder: str) -> GPT:
    """The float model `name`, to compare with the model of a folder, which info describes. Raises ValueError as load_model
    does, and for another vocabulary."""
    model, reference = load_model(name)
    same_size = reference.model_args.vocab_size == info.model_args.vocab_size  # a vocabulary may have padding
    if reference.tokenizer != info.tokenizer or not same_size:
        raise ValueError(
            f"{name} has another vocabulary than {folder}, so {folder} does not come from it: put its float model there "
            "again, or pass another --reference to eval.py"
        )
    return model


def make_decoder(model: GPT) -> Decoder | None:
    """Runs the model in one call of the kernel. None if a part of the model is not packed in float32 on the CPU, or if the
    kernel is not available. Call allow_int8_activations before: the decoder keeps what it says."""
    c = model.config
    named = list(model.named_modules())
    packed = {n: m.packed for n, m in named if isinstance(m, (PackedPoTLinear, PackedPoTEmbedding))}
    unpacked = any(isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) for _, m in named)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if unpacked or not all(p.on_kernel and p.dtype == torch.float32 for p in packed.values()):
        return None
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values()):
        return None
    shape = DecoderShape(
        c.n_layer, c.n_head, c.n_kv_head, c.head_size, c.n_embd, c.n_inner, c.block_size, c.vocab_size,
        rms=c.norm == "rms", gated=c.mlp == "swiglu", norm_eps=c.norm_eps,
    )  # fmt: skip
    weights = {name: p.kernel_weight() for name, p in packed.items()}
    return Decoder(shape, weights, tensors, rotary_frequencies(c) if c.position == "rotary" else None)


def file_size(folder: str, model: GPT, info: CheckpointInfo) -> int:
    """Bytes of the finished model's file, or of the file that save_model would write. Of a model in Hugging Face's
    format, whose file may hold more, the bytes of the tensors."""
    if is_foreign(folder):
        return sum(t.nbytes for t in packed_state(model)[0].values())
    if os.path.exists(os.path.join(folder, MODEL)):
        return os.path.getsize(os.path.join(folder, MODEL))
    with tempfile.TemporaryDirectory() as temporary:
        return save_model(temporary, model, info)


def read_log(folder: str) -> list[dict]:
    """Entries of log.jsonl, each with a step and losses, which are numbers. Other lines are skipped.

    Raises ValueError if there is no log.
    """
    path = os.path.join(folder, LOG)
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}: pass the out_dir of a training run")
    tokenizer.require_file(path)
    return [
        entry for entry in read_lines(path) if type(entry.get("step")) is int and all(map(_is_number, entry.values()))
    ]


def read_lines(path: str) -> Iterator[dict]:
    """The objects in the lines of a .jsonl file. A line that is none, such as the half that a killed process leaves, is
    skipped."""
    with open(path, errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


# --- models in Hugging Face's format ---


def is_foreign(folder: str) -> bool:
    """Is it a model in Hugging Face's format? An existing folder takes precedence over the hub's model of that name."""
    return os.path.exists(os.path.join(folder, "config.json")) if os.path.isdir(folder) else is_hub_name(folder)


def _download(name, offline=False):
    """The folder itself, or that of the hub's cache, filled at the first use."""
    index = MODEL + ".index.json"
    files = ["config.json", "model*.safetensors", index, *tokenizer.FILES]
    return tokenizer.local_folder(name, files, [["config.json"], [MODEL, index]], offline)


def _load_huggingface(folder, name):
    try:
        config = json.loads(tokenizer.read_small(os.path.join(folder, "config.json")))
        model = GPT.from_huggingface(config, _tensors(folder, huggingface_config(config)))
    except Exception as e:  # json, safetensors and torch raise many kinds for damaged files
        reason = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{name} is no model that can be read: {str(reason)[:500]}") from None
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        meta = tokenizer.FileTokenizer(folder).meta
    elif config["model_type"] == "gpt2":  # old folders have GPT-2's own files instead, or none
        meta = GPT2
    else:
        raise ValueError(
            f"{name} has no tokenizer.json: make one with transformers, by AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )
    if model.config.vocab_size < vocab_size(meta):
        kind = "GPT-2's byte pairs need" if meta == GPT2 else "its tokenizer.json needs"
        raise ValueError(
            f"{name} has a vocabulary of {model.config.vocab_size}, {kind} {vocab_size(meta)}: it was trained with "
            "another tokenizer: pass a folder that has its tokenizer.json"
        )
    return model.eval(), CheckpointInfo(meta, "float", model.config)


def _tensors(folder, config):
    """Tensors by name: of model.safetensors, of its parts, or of the older pytorch_model.bin. config: their GPTConfig."""
    index, old = os.path.join(folder, MODEL + ".index.json"), os.path.join(folder, "pytorch_model.bin")
    names = [MODEL]
    if not os.path.exists(os.path.join(folder, MODEL)):
        if os.path.exists(index):
            weight_map = json.loads(tokenizer.read_small(index))["weight_map"]
            names = sorted({os.path.basename(name) for name in weight_map.values()})
        elif os.path.exists(old):
            tokenizer.require_file(old)
            try:
                tensors = _unpickle(old)
                _check_count(config, len(tensors))
                return tensors
            except Exception as e:  # torch.load raises many kinds, with advice that a stranger's file does not deserve
                reason = e if type(e) is ValueError else type(e).__name__
                raise ValueError(f"pytorch_model.bin is damaged or holds more than tensors ({reason})") from None
        else:
            raise ValueError("there is a config.json, but neither model.safetensors nor pytorch_model.bin beside it")
    for name in names:
        tokenizer.require_file(os.path.join(folder, name))
    with ExitStack() as stack:
        paths = [os.path.join(folder, name) for name in names]
        for path in paths:
            stack.enter_context(open(path, "rb"))  # safetensors calls a file that may not be read missing
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        _check_count(config, sum(len(f.keys()) for f in files))
        return {key: f.get_tensor(key) for f in files for key in f.keys()}


# --- checks ---


def _is_number(value):
    """Whether value is a finite number that a float can hold."""
    return isinstance(value, int | float) and abs(value) < 2**63


def _check_count(config, count):
    """Refuses layers that `count` tensors cannot hold, and tensors that the layers cannot use, before any is read or
    built. A layer has two norms and four matrices, which may be in parts and have biases."""
    if not 6 * config.n_layer <= count <= 24 * config.n_layer + 24:
        raise ValueError(f"{count} tensors are no model of {config.n_layer} layers")


def _with_kind(info, packed):
    """info, with the kind of the packed layers if it names none. Refuses an info, which people read, that contradicts
    them."""
    configs = [PoTConfig(**{key: value for key, value in c.items() if key != "layout"}) for c in packed["configs"]]
    if configs and info.pot is None:
        info = replace(info, pot=configs[0], table=configs[1] if len(configs) > 1 else None)
    for config in configs:
        if config not in (info.pot, info.table):
            raise ValueError(f"it says {info.weights}, and holds layers of {config}")
    return info


# Pickles of tensors in dicts, lists and tuples: the names in them, most opcodes, and opcodes that make other things.
_REBUILDS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
_NUMBERS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = (*_REBUILDS, "collections OrderedDict", *(f"torch {kind}Storage" for kind in _NUMBERS))
_OPCODES = 500_000  # most of a pickle; a tensor takes about 30
_FOREIGN = (
    "STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID EMPTY_SET ADDITEMS FROZENSET BYTEARRAY8".split()
)


def _unpickle(path):
    """The content of a file of torch.save. Raises ValueError if it makes more than tensors in dicts, lists and tuples, or
    takes more memory than the file has bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if f.read(4) == b"PK\x03\x04":
            reader = torch._C.PyTorchFileReader(str(path))  # zipfile may read a hostile file in another way
            names = reader.get_all_records()
            if sum(map(reader.get_record_size, names)) > size:  # torch.save compresses nothing
                raise ValueError("it is compressed")
            for name in names:
                if name.lower().endswith(".pkl"):
                    _check_pickle(io.BytesIO(reader.get_record(name)), size)
        else:  # the format before PyTorch 1.6: five pickles, then the values
            f.seek(0)
            if tarfile.is_tarfile(f):
                raise ValueError("it is a tar file")
            f.seek(0)
            for _ in range(5):
                _check_pickle(f, size)
    content, total = torch.load(path, map_location="cpu", weights_only=True), 0
    for t in _tensors_in(content):
        if t.layout != torch.strided or t.is_meta or t.is_neg() or t.is_conj():
            raise ValueError("it holds a tensor without values of its own")
        total += t.nbytes
    if total > 2 * size:  # a head and the token table may share their values
        raise ValueError("its tensors have more elements than their storage")
    return content


def _check_pickle(file, size):
    """Reads a pickle to its end and makes nothing of it. Raises ValueError if it makes more than tensors, dicts, lists and
    tuples, or if a value holds more than 10 * size others. torch allows set(x), too, which takes 200 bytes for each
    element of x, and x may be a tensor that repeats a single number."""
    stack, outer, memo = [], [], {}  # values: (name, number of values in it). outer: the stacks below marks
    for i, (op, arg, _) in enumerate(pickletools.genops(file)):
        if i > _OPCODES:
            raise ValueError(f"its pickle has more than {_OPCODES:,} opcodes, which no model needs")
        if op.name == "MARK":
            outer.append(stack)
            stack = []
            continue
        count, last = len(op.stack_before), []
        if pickletools.markobject in op.stack_before:
            count, last, stack = op.stack_before.index(pickletools.markobject), stack, outer.pop()
        if count > len(stack):
            raise ValueError("its pickle is damaged")
        values = stack[len(stack) - count :] + last
        del stack[len(stack) - count :]
        names = [name for name, _ in values[:2]]
        rebuilds = op.name == "REDUCE" and names[0] in _REBUILDS
        allowed = {
            "GLOBAL": arg in _NAMES,
            "REDUCE": names[1] in ("TUPLE", "TUPLE3")
            if rebuilds
            else names == ["collections OrderedDict", "EMPTY_TUPLE"],
            "BUILD": names == ["EMPTY_DICT", "EMPTY_DICT"],
        }
        if not allowed.get(op.name, op.name not in _FOREIGN):
            raise ValueError(f"it makes more than tensors: {arg or ', '.join(names) or op.name!r}"[:100])
        name = op.name
        if name == "GLOBAL":
            name = arg
        elif name == "REDUCE" and not rebuilds:
            name = "EMPTY_DICT"
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "MEMOIZE"):
            name = names[0]
        value = name, 1 + sum(n for _, n in values)
        if value[1] > 10 * size:
            raise ValueError("its values hold each other too many times")
        if "GET" in op.name:
            value = memo[arg]
        stack += [value] * len(op.stack_after)
        if "PUT" in op.name or op.name == "MEMOIZE":
            memo[len(memo) if arg is None else arg] = stack[-1]


def _tensors_in(content) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts and lists. A container that is there twice counts once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def exists(folder: str) -> bool:
    """Does the folder hold a checkpoint of any kind?"""
    return any(os.path.exists(os.path.join(folder, name)) for name in (TRAINING, MODEL, "config.json"))


def is_at_hand(folder: str) -> bool:
    """Can it be loaded without a download?"""
    if not is_hub_name(folder):
        return exists(folder)
    try:
        return bool(_download(folder, offline=True))
    except ValueError:
        return False


def require_folder(folder: str) -> None:
    """Raises ValueError if it is neither a folder nor the name of a model on the hub."""
    if not os.path.isdir(folder) and not is_hub_name(folder):
        raise ValueError(
            f"no folder {folder}: pass the out_dir of a training run, a model in Hugging Face's format, its name on the hub "
            f"(org/name), or {', '.join(tokenizer.HUB)}"
        )
