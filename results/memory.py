"""
Peak resident memory of sample.py above that of `import torch`, for a packed GPT-2: a prompt of 32 tokens, then 128, or as
many as the second argument says.

    python results/memory.py out-gpt2-pot4
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch  # noqa: F401 - whose memory is taken off


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PROMPT = "The meaning of life is" + " a question that people have asked" * 4 + " since then."  # 32 tokens


def main(folder, new_tokens=128):
    before = peak()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import sample

    sample.main(sample.Settings(ckpt=folder, prompt=PROMPT, max_new_tokens=int(new_tokens)))
    above = peak() - before

    from configurator import provenance

    file = os.path.getsize(os.path.join(folder, "model.safetensors"))
    print(f"{above / 1e6:.1f} MB above the {before / 1e6:.1f} MB of torch; the file has {file / 1e6:.1f} MB")
    path = Path(__file__).parent / f"memory_{new_tokens}.json"
    path.write_text(
        json.dumps({"torch_bytes": before, "above_bytes": above, "file_bytes": file, **provenance()}, indent=1)
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
