# A small sweep on the demo's model, for sweep.py: bits, granularities and grids, by PTQ (nearest level, GPTQ) and by
# QAT, with a float control.
# Run:   python sweep.py config/sweep_pydoc_char.py
# Needs: the float model of `make demo`. Gives: out-sweep-pydoc-char/sweep.md, .json and .png.
# Takes: about 20 minutes on 2 cores.
init_from = "out-pydoc-char"
finetune = "config/finetune_pydoc_char_pot4.py"
out_dir = "out-sweep-pydoc-char"
results = "out-sweep-pydoc-char/sweep"

weights = [{"bits": 3}, {"bits": 4}, {"terms": 2}, {"grid": "uniform"}, {"granularity": "tensor"}]
