# The papers' sweep over ranges on GPT-2 (124M) and OpenWebText, for sweep.py: their quantizer, our grids and uniform
# weights, by PTQ (nearest level, GPTQ) and by QAT, with a float control.
# Run:   python sweep.py config/sweep_gpt2.py
# Also:  the papers' own QAT: --finetune=config/paper_gpt2_pot4.py --out_dir=out-sweep-gpt2-papers
#        --results=results/sweep_gpt2_papers
# Needs: `python data/openwebtext/prepare.py`, GPT-2 from the Hugging Face hub or --init_from=FOLDER, and a GPU: it
#        trains 31 runs of 500 steps, the float control included.
# Gives: results/sweep_gpt2.md, .json and .png.
# Not run: we have no access to GPT-2's weights.
init_from = "gpt2"
finetune = "config/finetune_gpt2_pot4.py"
protocol = "paper"
out_dir = "out-sweep-gpt2"
results = "results/sweep_gpt2"

_both = ("tensor", "group")
_papers = {  # losses from 2506.00315 (PTQ at 5 and 6 bits) and 2601.02298 (all others); the float model has 3.167
    3: {"rtn": "9.01", "qat": "7.42"},
    5: {"rtn": "8.76", "qat": "4.71"},
    7: {"rtn": "4.5", "qat": "3.417"},
    15: {"rtn": "4.3"},
    20: {"rtn": "4.23"},
    30: {"rtn": "4.08"},
}
weights = [
    {"grid": "paper", "bits": bits, "range": r, "granularity": "tensor", "scale": "absmax", "papers": _papers[r]}
    for r, bits in {3: 4, 5: 4, 7: 5, 15: 6, 20: 6, 30: 6}.items()
]
weights += [
    {"bits": bits, "range": r, "granularity": g}
    for g in _both
    for r, bits in {3: 3, 5: 4, 7: 4, 15: 5, 20: 6, 30: 6}.items()
]
weights += [{"terms": 2, "granularity": g} for g in _both]
_uniform = {6: {"rtn": "7.7"}, 8: {"rtn": "3.329"}}  # from 2506.00315, ranges 2^5 and 2^7
weights += [
    {"grid": "uniform", "bits": bits, "granularity": g} | ({"papers": _uniform.get(bits, {})} if g == "tensor" else {})
    for g in _both
    for bits in (3, 4, 5, 6, 8)
]

left_out = (
    "Left out: the papers' uniform weights of 16 and 32 bits (3.1888, 3.1883, 3.187), which are float in all but name, "
    "and their other PTQ of range 2^5 (9.563, 2506.00315)."
)
