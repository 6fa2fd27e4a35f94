"""
The only place that writes and opens a run's folder:

    out/ckpt.pt             training state: model, optimizer, step, settings
    out/model.safetensors   the finished model alone, float or packed, to evaluate, sample and hand on

and that reads GPT-2 from a folder in Hugging Face's format, or by its name from the hub. What a checkpoint is stands in
it. Both are written to a temporary file and renamed, so that an old one is replaced whole
or not at all.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dataset import GPT2, BPETokenizer, vocab_size
from model import GPT, GPTConfig
from pot import PoTConfig, load_packed, packed_state, prepare

TRAINING, MODEL = "ckpt.pt", "model.safetensors"
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def write(path: str, save: Callable[[str], object], stale: str | None = None) -> None:
    """Has save(temporary path) write a file, and puts it in the place of path; just before, stale is removed, a file that
    must not be found beside the new one. Raises OSError; what was there stays."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tmp = path + ".tmp"
    try:
        save(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        if stale and os.path.exists(stale):
            os.remove(stale)
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors report a full disk in their own ways
        raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


class Lock:
    """Holds a folder for one run, as long as this object lives or the process does. Raises ValueError if another has it."""

    def __init__(self, folder: str):
        self.fd = None
        os.makedirs(folder, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self.fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run: wait for it, or choose another --out_dir") from None
        except OSError:  # some network drives know no locks
            pass

    def __del__(self):
        if self.fd is not None:
            os.close(self.fd)


def save_training(folder: str, model: GPT, info: dict, **state: dict) -> None:
    """Writes the training state. A finished model that the folder holds is of an older step now, and is removed."""
    state |= {"info": info | {"model_args": asdict(model.config)}, "model": model.state_dict()}
    write(os.path.join(folder, TRAINING), lambda path: torch.save(state, path), stale=os.path.join(folder, MODEL))


def load_training(folder: str) -> dict:
    """Training state as it was saved, on the CPU."""
    path = os.path.join(folder, TRAINING)
    require_folder(folder)
    if not os.path.exists(path):
        what = (
            f"{MODEL} alone, which cannot be trained on"
            if os.path.exists(os.path.join(folder, MODEL))
            else "no checkpoint"
        )
        raise ValueError(f"{folder} holds {what}: pass the out_dir of a training run, with its {TRAINING}")
    try:
        _check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _checked(state["info"], state["model"])
        state["model"], state["optimizer"], state["scaler"]
        return state
    except OSError:
        raise
    except Exception as e:  # a zip error, EOFError, UnpicklingError, KeyError: torch.load raises whatever it meets
        raise ValueError(f"{path} is truncated, damaged or no nanoPoT checkpoint ({type(e).__name__})") from None


def save_model(folder: str, model: GPT, info: dict) -> int:
    """Writes a float or packed model; returns the file's size in bytes."""
    tensors, metadata = packed_state(model)
    header = json.dumps(info | {"model_args": asdict(model.config), "packed": metadata}, separators=(",", ":"))
    path = os.path.join(folder, MODEL)
    write(path, lambda tmp: save_file({n: t.contiguous() for n, t in tensors.items()}, tmp, {"nanopot": header}))
    return os.path.getsize(path)


def file_size(folder: str | None, model: GPT, info: dict) -> int:
    """Bytes of the finished model's file in folder, or of the one that save_model would write; of GPT-2 from elsewhere,
    whose file may hold more, those of its tensors."""
    if folder and is_foreign(folder):
        return sum(t.nbytes for t in packed_state(model)[0].values())
    if folder and os.path.exists(os.path.join(folder, MODEL)):
        return os.path.getsize(os.path.join(folder, MODEL))
    with tempfile.TemporaryDirectory() as elsewhere:
        return save_model(elsewhere, model, info)


def load_model(folder: str) -> tuple[GPT, dict]:
    """The model in a folder, on the CPU, in eval mode, and its info (tokenizer, method, pot, origin, step, settings).

    The finished model if there is one, else the one in training (fake-quantized if it is QAT). GPT-2 if the folder is in
    Hugging Face's format, or is no folder but one of the names in HUB.

    A finished model's tensors are its mapped file, copied where they are written to: as long as they are in use, replace
    the file, as save_model does, and do not write into it.
    """
    if is_foreign(folder):
        return _load_huggingface(folder if os.path.isdir(folder) else _download(folder), folder)
    path = os.path.join(folder, MODEL)
    if not os.path.exists(path):
        state = load_training(folder)
        return model_of(state), state["info"]
    try:
        with safe_open(path, "pt") as f:
            info = json.loads(f.metadata()["nanopot"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            shape = _checked(info, tensors)
            kinds = {its["dtype"] for its in info["packed"]["layers"].values()}
            kinds |= {str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if "packed." not in name}
            if len(kinds) > 1:
                raise ValueError(f"it mixes weights of {' and '.join(sorted(kinds))}")
            return load_packed(GPT.meta(shape), tensors, info["packed"]).eval(), info
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} is truncated, damaged or not of nanoPoT: {e}") from None


def model_of(state: dict, quantized: bool = True) -> GPT:
    """Model of a training state, in eval mode; quantized=False leaves its float weights unquantized."""
    weights = state["model"]
    try:
        model = GPT.meta(GPTConfig(**state["info"]["model_args"]))
        if state["info"]["pot"] and quantized:
            prepare(model, PoTConfig(**state["info"]["pot"]))
        elif state["info"]["pot"]:
            weights = {name: t for name, t in weights.items() if ".quantizer." not in name}
        expected = model.state_dict()
        for name in expected.keys() ^ weights.keys():
            raise ValueError(f"{name} is {'missing' if name in expected else 'not in such a model'}")
        for name, t in weights.items():
            scale = name.endswith("quantizer.scale")
            dtypes = (torch.float32, torch.float16) if scale else (torch.float32,)
            if t.dtype not in dtypes or t.is_sparse or t.is_meta or t.nbytes > t.untyped_storage().nbytes():
                raise TypeError(f"{name} is {t.dtype}, or more than there is of it")
            if scale and not (t > 0).logical_and(t < torch.inf).all():
                raise ValueError(f"{name} holds a value that is no positive number")
            if t.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(t.shape)}, not {tuple(expected[name].shape)}")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"the checkpoint's weights do not fit its own settings, it is damaged: {e}") from None
    model.tie_weights()
    return model.eval()


def load_float(folder: str) -> tuple[GPT, dict]:
    """As load_model, but with float weights to fine-tune: those that a run in training holds, not their rounded values."""
    if is_foreign(folder):
        return load_model(folder)
    state = load_training(folder)
    return model_of(state, quantized=False), state["info"]


# --- GPT-2 in Hugging Face's format ---


def is_foreign(folder: str) -> bool:
    """Is it GPT-2 of Hugging Face's? A folder that is there goes before the hub's model of that name."""
    return os.path.exists(os.path.join(folder, "config.json")) if os.path.isdir(folder) else folder in HUB


def _download(name, offline=False):
    """Folder in the hub's cache, filled at the first use."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model.safetensors"]
    try:
        folder = snapshot_download(f"openai-community/{name}", allow_patterns=patterns, local_files_only=offline)
        if not all(os.path.exists(os.path.join(folder, file)) for file in patterns):
            raise FileNotFoundError("only a part of it is in the cache")
        return folder
    except Exception as e:  # of requests, httpx or the hub, by version and by what is wrong with the network
        raise ValueError(
            f"cannot download {name} from the Hugging Face hub ({type(e).__name__}): check the network, or pass a folder "
            "that holds its config.json and model.safetensors"
        ) from None


def _load_huggingface(folder, name):
    config = os.path.join(folder, "config.json")
    try:
        with open(config, encoding="utf-8") as f:
            model = GPT.from_huggingface(json.load(f), _tensors(folder))
    except Exception as e:  # whatever its files make json, safetensors and torch raise
        what = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{name} is no GPT-2 that can be read: {what}") from None
    if model.config.vocab_size < BPETokenizer.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {model.config.vocab_size}, GPT-2's byte pairs need {BPETokenizer.vocab_size}: "
            "it was trained with another tokenizer, which is not known here"
        )
    info = {"tokenizer": GPT2, "method": "float", "pot": None, "origin": None, "step": 0}
    return model.eval(), info | {"settings": {"dataset": None, "seed": None}}


def _tensors(folder):
    """Tensors by name: of model.safetensors, of its parts, or of the older pytorch_model.bin."""
    index, old = os.path.join(folder, MODEL + ".index.json"), os.path.join(folder, "pytorch_model.bin")
    names = [MODEL]
    if not os.path.exists(os.path.join(folder, MODEL)):
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                names = sorted({os.path.basename(name) for name in json.load(f)["weight_map"].values()})
        elif os.path.exists(old):
            try:
                _check_zip(old)
                return torch.load(old, map_location="cpu", weights_only=True)
            except Exception as e:  # torch.load raises whatever it meets
                raise ValueError(
                    f"pytorch_model.bin is damaged or holds more than tensors ({type(e).__name__})"
                ) from None
        else:
            raise ValueError("there is a config.json, but neither model.safetensors nor pytorch_model.bin beside it")
    tensors = {}
    for name in names:
        with safe_open(os.path.join(folder, name), "pt") as f:
            tensors |= {key: f.get_tensor(key) for key in f.keys()}
    return tensors


# --- parts ---


def _checked(info, tensors) -> GPTConfig:
    """The shape that info gives. Raises ValueError, KeyError or TypeError if info, which came from a file, lacks or garbles
    what every reader relies on."""
    kinds = {"method": str, "pot": dict | None, "origin": str | None, "step": int, "settings": dict, "model_args": dict}
    kinds_of_settings = {"dataset": str | None, "seed": int | None}
    for where, expected in ((info, kinds), (info["settings"], kinds_of_settings)):
        for key, kind in expected.items():
            if not isinstance(where[key], kind):
                raise TypeError(f"{key} is {where[key]!r}")
    config = GPTConfig(**info["model_args"])
    if info["pot"]:
        PoTConfig(**info["pot"])
    if vocab_size(info["tokenizer"]) > config.vocab_size:
        raise ValueError(f"its tokenizer has more than the {config.vocab_size} tokens of the model")
    if config.n_layer > len(tensors):  # before so many are built
        raise ValueError(f"{config.n_layer} layers cannot be in {len(tensors)} tensors")
    return config


def _check_zip(path):
    """Refuses what would take more memory than the file is large: torch.save compresses nothing, torch.load unpacks all."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            if sum(part.file_size for part in z.infolist()) > os.path.getsize(path):
                raise ValueError("it is compressed")


def exists(folder: str) -> bool:
    """Is there a checkpoint of any kind in the folder?"""
    return any(os.path.exists(os.path.join(folder, name)) for name in (TRAINING, MODEL, "config.json"))


def is_at_hand(folder: str) -> bool:
    """Can it be loaded without a download?"""
    if os.path.isdir(folder) or folder not in HUB:
        return exists(folder)
    try:
        return bool(_download(folder, offline=True))
    except ValueError:
        return False


def require_folder(folder: str) -> None:
    """Raises ValueError if it is neither a folder nor the name of a model on the hub."""
    if folder in HUB:
        return
    if not os.path.isdir(folder):
        raise ValueError(
            f"no folder {folder}: pass the out_dir of a training run, GPT-2 in Hugging Face's format, or {', '.join(HUB)}"
        )
