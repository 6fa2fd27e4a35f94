# The papers' sweep over ranges, on tiny Shakespeare by characters: their own grid, ours, and uniform weights, by PTQ (nearest
# level, GPTQ) and QAT. Needs: `python data/shakespeare_char/prepare.py` and `python train.py config/train_shakespeare_char.py`.
# Gives results/sweep_shakespeare_char.md, .json and .png. 29 kinds of weights, about 2 minutes each on 2 cores.
init_from = "out-shakespeare-char"
finetune = "config/finetune_shakespeare_char_pot4.py"
max_iters = 1000
out_dir = "out-sweep-shakespeare-char"
results = "results/sweep_shakespeare_char"

_ranges = {3: 3, 5: 4, 7: 4, 15: 5, 20: 6, 30: 6}  # of the papers, and the bits that 2R + 1 levels need
_paper_bits = {3: 4, 5: 4, 7: 5, 15: 6, 20: 6, 30: 6}  # their code makes 2R + 3
_papers = {  # their losses, validation split, 7,500 steps of QAT; 15 levels are PTQ's [-2^7, 2^7]
    3: {"qat": "1.682 (9 levels)"},
    5: {"rtn": "1.89 (11 levels)"},
}
weights = [
    {"grid": "paper", "bits": _paper_bits[r], "range": r, "granularity": "tensor", "scale": "absmax", "eps": 2.0**-12,
     "papers": _papers.get(r, {})}
    for r in _ranges
]  # fmt: skip
weights += [{"bits": b, "range": r, "granularity": g} for g in ("tensor", "group") for r, b in _ranges.items()]
weights += [{"terms": 2, "granularity": g} for g in ("tensor", "group")]
weights += [{"grid": "uniform", "bits": b, "granularity": g} for g in ("tensor", "group") for b in (3, 4, 5, 6, 8)]
weights[-10]["papers"] = {}
for _w in weights:
    if _w.get("grid") == "uniform" and _w["bits"] == 4 and _w["granularity"] == "tensor":
        _w["papers"] = {"qat": "1.593"}

left_out = (
    'The papers\' PTQ of this model with 8 bits and with 5 bits uniform has no figure but "close to float". Their range '
    "[-2^R, 2^R] of R = 3 is quoted with 9 levels in QAT; PTQ's [-16, 16] is said to have 11."
)
