# The kinds of weights that matter, on tiny Shakespeare by characters, over five seeds: PTQ and QAT beside float controls.
# Needs: `python data/shakespeare_char/prepare.py` and a float model a seed:
#     python train.py config/train_shakespeare_char.py --seed=1 --out_dir=out-shakespeare-s1    # and 2, 3, 4, 5
# Gives: results/table_shakespeare_char.md, .json and .png. On 2 cores about 5 minutes a row and seed.
init_from = "out-shakespeare-s{seed}"
finetune = "config/finetune_shakespeare_char_pot4.py"
seeds = "1,2,3,4,5"
out_dir = "out-table-shakespeare-char"
results = "results/table_shakespeare_char"

weights = [{}, {"granularity": "tensor"}, {"bits": 3}, {"terms": 2}, {"grid": "uniform"}]
