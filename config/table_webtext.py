# The kinds of weights that matter on a model of GPT-2's byte pairs: PTQ and QAT beside float controls.
# Needs: config/train_webtext.py and what that needs.
# Gives: results/table_webtext.md, .json and .png. On 2 cores about 10 minutes a QAT row and seed, of which there are 12, and 3
# controls. The text measured on, the beginning of the test split, is OpenWebText's.
init_from = "out-webtext"
finetune = "config/finetune_webtext_pot4.py"
tokens = 65_537
seeds = "1"  # of batches and calibration text: the float model is one
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
