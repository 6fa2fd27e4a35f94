# The most important kinds of weights on tiny Shakespeare, for sweep.py: PTQ and QAT with float controls, over five
# seeds.
# Run:   python sweep.py config/table_shakespeare_char.py
# Needs: `python data/shakespeare_char/prepare.py` and one float model per seed:
#        python train.py config/train_shakespeare_char.py --seed=1 --out_dir=out-shakespeare-s1
#        and the same with 2, 3, 4 and 5.
# Gives: results/table_shakespeare_char.md, .json and .png. Takes: about 5 minutes per row and seed on 2 cores.
init_from = "out-shakespeare-s{seed}"
finetune = "config/finetune_shakespeare_char_pot4.py"
seeds = "1,2,3,4,5"
out_dir = "out-table-shakespeare-char"
results = "results/table_shakespeare_char"

weights = [{}, {"granularity": "tensor"}, {"bits": 3}, {"terms": 2}, {"grid": "uniform"}]
