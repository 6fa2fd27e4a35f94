"""
Peak memory of sample.py for a packed model, on top of that of `import torch`: a prompt of 32 tokens, then 128 new
tokens, or as many as the second argument says.

    python results/memory.py out-gpt2-random-pot4
    python results/memory.py out-smollm2-two-16384 128 results/memory_smollm2.json
"""

import json
import os
import sys
from pathlib import Path

import torch  # noqa: F401 - its own memory does not count

sys.path.insert(0, str(Path(__file__).parent.parent))

import machine

PROMPT = "The meaning of life is" + " a question that people have asked" * 4 + " since then."  # 32 tokens


def main(folder, new_tokens=128, path=None):
    before = machine.peak_memory()
    import sample

    sample.main(sample.Settings(ckpt=folder, prompt=PROMPT, max_new_tokens=int(new_tokens)))
    above = machine.peak_memory() - before
    file = os.path.getsize(os.path.join(folder, "model.safetensors"))
    print(f"{above / 1e6:.1f} MB above the {before / 1e6:.1f} MB of torch; the file has {file / 1e6:.1f} MB")
    path = Path(path or Path(__file__).parent / f"memory_{new_tokens}.json")
    report = {"torch_bytes": before, "above_bytes": above, "file_bytes": file}
    path.write_text(json.dumps(report | machine.provenance(), indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
