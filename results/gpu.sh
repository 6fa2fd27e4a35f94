#!/bin/sh
# What needs a GPU: the tests, training in bfloat16 and float16 with resume, two processes by nccl, speed, and QAT of
# SmolLM2 with distillation in two runs of 10 minutes. None of it was ever run: we had no GPU. Finished parts are skipped.
# Needs `pip install -r requirements.txt triton` with PyTorch's CUDA build, the data set of `make demo`, the model in
# smollm2/ and data/openwebtext-smollm2 (results/smollm2.sh makes both).
#     sh results/gpu.sh [tests|train|nccl|speed|smollm2]...          all, if none is named
set -eu
cd "$(dirname "$0")/.."

tests() { # test_triton.py compiles the kernels here; compute-sanitizer, of the CUDA toolkit, looks for reads out of bounds
    python -m pytest -q tests/test_triton.py
    python -m pytest -q tests/test_pot.py tests/test_model.py tests/test_scripts.py
    ! command -v compute-sanitizer > /dev/null || \
        compute-sanitizer --error-exitcode=1 python -m pytest -q tests/test_triton.py -k "products or every_code"
}

train() { # 200 steps, cut after 100 and resumed: float16 has GradScaler's state in ckpt.pt
    for dtype in bfloat16 float16; do
        out=out-gpu-$dtype
        python train.py config/train_pydoc_char.py --device=cuda --dtype=$dtype --max_iters=100 --out_dir="$out"
        python train.py --init_from=resume --device=cuda --dtype=$dtype --max_iters=200 --out_dir="$out"
        python train.py config/finetune_pydoc_char_pot4.py --init_from="$out" --device=cuda --dtype=$dtype \
            --max_iters=100 --out_dir="$out-pot4"
        NANOPOT_KERNEL=off python eval.py --ckpt="$out,$out-pot4" --device=cuda --json="$out-off.json"
        NANOPOT_KERNEL=triton python eval.py --ckpt="$out,$out-pot4" --device=cuda --json="$out-triton.json"
        NANOPOT_KERNEL=triton python sample.py --ckpt="$out-pot4" --device=cuda --prompt="Return "
    done
    python -c "import torch; print(torch.load('out-gpu-float16/ckpt.pt', weights_only=True)['scaler'])"
}

nccl() {
    torchrun --standalone --nproc_per_node=2 train.py config/train_pydoc_char.py --max_iters=100 --out_dir=out-gpu-nccl
}

speed() {
    NANOPOT_KERNEL=triton python results/gpu.py
}

smollm2() { # SIGINT makes train.py save its state; timeout then returns 124. The second run goes on where the first was
    # cut, and must reach MAX_ITERS, because the last step writes the packed model: choose it by the first run's tokens/s
    [ -e out-gpu-smollm2/ckpt.pt ] || timeout -s INT 600 python train.py config/finetune_smollm2_pot4.py --device=cuda \
        --block_size=1024 --batch_size=8 --max_iters="${MAX_ITERS:-2000}" --out_dir=out-gpu-smollm2 || [ $? = 124 ]
    timeout -s INT 600 python train.py --init_from=resume --out_dir=out-gpu-smollm2
    python eval.py --ckpt=smollm2,out-gpu-smollm2 --reference=smollm2 --dataset=openwebtext-smollm2 --device=cuda \
        --tokens=32768 --block_size=1024 --json=out-gpu-smollm2/eval.json
}

[ $# -gt 0 ] || set -- tests train nccl speed smollm2
for part in "$@"; do $part; done
