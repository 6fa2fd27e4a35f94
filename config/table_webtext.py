# The most important kinds of weights on the small web-text model, for sweep.py: PTQ and QAT with float controls.
# Run:   python sweep.py config/table_webtext.py
# Needs: `python train.py config/train_webtext.py`.
# Gives: results/table_webtext.md, .json and .png. The test text, the beginning of the test split, is OpenWebText's.
# Takes: about 10 minutes on 2 cores for each of 15 training runs: 12 of QAT, 3 of float controls.
init_from = "out-webtext"
finetune = "config/finetune_webtext_pot4.py"
tokens = 65_537
seeds = "1"  # of batches and calibration text; there is one float model
out_dir = "out-table-webtext"
results = "results/table_webtext"

_three = {"seeds": "1,2,3"}
weights = [
    _three,
    {"terms": 2} | _three,
    {"bits": 3} | _three,
    {"granularity": "tensor"},
    {"grid": "uniform"},
    {"act_bits": 8},
]
