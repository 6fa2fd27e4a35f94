"""
The only place that writes and opens a run's folder:

    out/ckpt.pt             training state: model, optimizer, step, random state, settings
    out/model.safetensors   the finished model alone, float or packed, to evaluate, sample and hand on

What a checkpoint is stands in it. Both are written to a temporary file and renamed, so that an old one is replaced whole
or not at all.
"""

import json
import os
import tempfile
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import GPT, GPTConfig
from pot import PoTConfig, load_packed, packed_state, prepare

TRAINING, MODEL = "ckpt.pt", "model.safetensors"


def _write(path, save):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tmp = path + ".tmp"
    try:
        save(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors report a full disk in their own ways
        raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def save_training(folder: str, model: GPT, info: dict, **state):
    """Writes the training state. A finished model that the folder holds is of an older step now, and is removed."""
    state |= {"info": info | {"model_args": asdict(model.config)}, "model": model.state_dict()}
    _write(os.path.join(folder, TRAINING), lambda path: torch.save(state, path))
    if os.path.exists(os.path.join(folder, MODEL)):
        os.remove(os.path.join(folder, MODEL))


def load_training(folder: str) -> dict:
    """Training state as it was saved, on the CPU."""
    path = os.path.join(folder, TRAINING)
    if not os.path.isdir(folder):
        raise ValueError(f"no folder {folder}: pass the out_dir of a training run")
    if not os.path.exists(path):
        what = (
            f"{MODEL} alone, which cannot be trained on"
            if os.path.exists(os.path.join(folder, MODEL))
            else "no checkpoint"
        )
        raise ValueError(f"{folder} holds {what}: pass the out_dir of a training run, with its {TRAINING}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        _require(state["info"])
        state["model"], state["optimizer"]
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
    _write(path, lambda tmp: save_file({n: t.contiguous() for n, t in tensors.items()}, tmp, {"nanopot": header}))
    return os.path.getsize(path)


def file_size(folder: str | None, model: GPT, info: dict) -> int:
    """Bytes of the finished model's file in folder, or of the one that save_model would write."""
    if folder and os.path.exists(os.path.join(folder, MODEL)):
        return os.path.getsize(os.path.join(folder, MODEL))
    with tempfile.TemporaryDirectory() as elsewhere:
        return save_model(elsewhere, model, info)


def load_model(folder: str) -> tuple[GPT, dict]:
    """The model in a folder, on the CPU, in eval mode, and its info (tokenizer, method, pot, origin, step, settings).

    The finished model if there is one, else the one in training (fake-quantized if it is QAT).
    """
    path = os.path.join(folder, MODEL)
    if not os.path.exists(path):
        state = load_training(folder)
        return model_of(state), state["info"]
    try:
        with safe_open(path, "pt") as f:
            info = json.loads(f.metadata()["nanopot"])
            _require(info)
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            return load_packed(_meta_gpt(info), tensors, info["packed"]).eval(), info
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is truncated, damaged or not of nanoPoT: {e}") from None


def model_of(state: dict, quantized=True) -> GPT:
    """Model of a training state, in eval mode; quantized=False leaves its float weights unquantized."""
    model = _meta_gpt(state["info"])
    weights = state["model"]
    if state["info"]["pot"] and quantized:
        prepare(model, PoTConfig(**state["info"]["pot"]))
    elif state["info"]["pot"]:
        weights = {name: t for name, t in weights.items() if ".quantizer." not in name}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ValueError(f"the checkpoint's weights do not fit its own settings, it is damaged: {e}") from None
    model.tie_weights()
    return model.eval()


def _require(info):
    """Raises KeyError if info, which came from a file, lacks what every reader relies on."""
    for key in ("model_args", "tokenizer", "method", "pot", "origin", "step", "settings"):
        info[key]
    info["settings"]["dataset"], info["settings"]["seed"]


def _meta_gpt(info):
    # On the meta device nothing is allocated or initialized that loading would overwrite.
    with torch.device("meta"):
        return GPT(GPTConfig(**info["model_args"]))


def exists(folder: str) -> bool:
    """Does the folder hold a checkpoint of either kind?"""
    return any(os.path.exists(os.path.join(folder, name)) for name in (TRAINING, MODEL))
