# The papers' sweep over ranges on tiny Shakespeare, for sweep.py: their quantizer, our grids and uniform weights, by
# PTQ (nearest level, GPTQ) and by QAT, with a float control.
# Run:   python sweep.py config/sweep_shakespeare_char.py
# Needs: `python data/shakespeare_char/prepare.py` and `python train.py config/train_shakespeare_char.py`.
# Gives: results/sweep_shakespeare_char.md, .json and .png.
# Takes: 31 kinds of weights, 3 to 4 minutes each on 2 cores.
init_from = "out-shakespeare-char"
finetune = "config/finetune_shakespeare_char_pot4.py"
max_iters = 1000
out_dir = "out-sweep-shakespeare-char"
results = "results/sweep_shakespeare_char"

_both = ("tensor", "group")  # the papers' granularity, and groups of 64
# The papers' grid has 2R + 3 levels, so it takes other bits than the papers say. R = 4: their "[-16, 16], 11 levels".
_papers = {3: {"qat": "1.682"}, 4: {"rtn": "1.89"}}  # validation loss; QAT after 22,500 - 15,000 steps
weights = [
    {"grid": "paper", "bits": bits, "range": r, "granularity": "tensor", "scale": "absmax", "eps": 2.0**-12}
    | {"papers": _papers.get(r, {})}
    for r, bits in {3: 4, 4: 4, 5: 4, 7: 5, 15: 6, 20: 6, 30: 6}.items()
]
weights += [
    {"bits": bits, "range": r, "granularity": g}
    for g in _both
    for r, bits in {3: 3, 5: 4, 7: 4, 15: 5, 20: 6, 30: 6}.items()
]
weights += [{"terms": 2, "granularity": g} for g in _both]
weights += [{"grid": "uniform", "bits": bits, "granularity": g} for g in _both for bits in (3, 5, 6, 8)]
weights += [{"grid": "uniform", "granularity": "tensor", "papers": {"qat": "1.593"}}, {"grid": "uniform"}]

left_out = (
    "The papers' column is validation loss, theirs: of another seed, PTQ or 7,500 steps of QAT. Left out: their int8 and "
    "5-bit uniform PTQ of this model, for which they give no figure (close to float)."
)
