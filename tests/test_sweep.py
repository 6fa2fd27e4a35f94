"""sweep.py as a user runs it, its rows against eval.py and train.py."""

import json
import math
import statistics

import pytest
from conftest import ROOT

import configurator
import sweep

CONFIG = """
init_from = "out-float"
finetune = "finetune.py"
max_iters = 6
out_dir = "out-sweep"
results = "kept/sweep"
calibrate_tokens = 512
methods = "rtn,gptq,qat"
seeds = "1,2,3"
left_out = "Rows of 32 bits."
weights = [
    {"bits": 4, "group_size": 32, "papers": {"qat": "1.5"}},
    {"bits": 3, "grid": "uniform", "granularity": "channel", "seeds": "1"},
]
"""


@pytest.fixture(scope="module")
def swept(house, sh, float_run):
    (house / "finetune.py").write_text('dataset = "tiny"\nbatch_size = 4\nlearning_rate = 1e-3\neval_interval = 4\n')
    (house / "sweep_tiny.py").write_text(CONFIG)
    done = sh("sweep.py sweep_tiny.py")
    return done, json.loads((house / "kept" / "sweep.json").read_text())


def test_rows_are_those_of_eval_and_train(house, sh, swept):
    found = {r["name"]: r for r in swept[1]["rows"]}
    # nothing of a float model and of rounding it to nearest depends on the seed
    assert len(found) == 1 + 3 + (1 + 1) + 2 * (3 + 1)
    one = "--ckpt=out-float --split=test --seed=2 --pot_bits=4 --pot_group_size=32"
    for kind, more in (("rtn", ""), ("gptq", "--calibrate_tokens=512")):
        sh(f"eval.py {one} {more} --json=one.json")
        theirs = json.loads((house / "one.json").read_text())["rows"][-1]
        row = found[f"pot-4-bits-groups-of-32-{kind}-s{1 if kind == 'rtn' else 2}"]
        assert {k: row[k] for k in ("loss", "kl", "bytes", "method")} == {
            k: theirs[k] for k in ("loss", "kl", "bytes", "method")
        }
    for name, pot in (("qat", "--pot_bits=4 --pot_group_size=32"), ("control", "")):
        out = f"out-alone-{name}"
        sh(f"train.py finetune.py --init_from=out-float --max_iters=6 --seed=2 --out_dir={out} {pot}")
        sh(f"eval.py --ckpt={out} --json=one.json")
        theirs = json.loads((house / "one.json").read_text())["rows"][0]
        row = found["pot-4-bits-groups-of-32-qat6-s2" if name == "qat" else "float-control6-s2"]
        assert (row["loss"], row["steps"]) == (theirs["loss"], 6)
        assert not (house / row["ckpt"] / "ckpt.pt").exists()


def test_the_table_pairs_seeds(house, swept):
    done, result = swept
    found = {(r["kind"], r["weights"], r["seed"]): r["loss"] for r in result["rows"]}
    table = {(t["kind"], t["weights"]): t for t in result["table"]}
    for kind, other in (("gptq", "float"), ("qat", "control")):
        its = (1, 1, 1) if other == "float" else (1, 2, 3)
        above = [
            found[kind, "PoT 4 bits, groups of 32", s] - found[other, "float32", o] for s, o in zip((1, 2, 3), its)
        ]
        t = table[kind, "PoT 4 bits, groups of 32"]
        assert t["above"] == pytest.approx(statistics.mean(above), abs=1e-12)
        # 97.5 % quantile of Student's t with two degrees of freedom: p = 1/2 + t / (2 sqrt(2 + t^2)), solved for t
        quantile = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
        assert t["interval"] == pytest.approx(quantile * statistics.stdev(above) / math.sqrt(3), rel=1e-3)
    assert table["rtn", "uniform 3 bits, per channel"]["interval"] is None
    text = (house / "kept" / "sweep.md").read_text()
    assert text in done.stdout and text.endswith("\nRows of 32 bits.\n")
    (line,) = [line for line in text.splitlines() if line.startswith("| PoT 4 bits, groups of 32 | qat | 768 |")]
    assert line.endswith("| 1.5 |")
    assert (house / "kept" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_that_was_cut_goes_on(house, sh, swept):
    path = house / "out-sweep" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote a row
    done = sh("sweep.py sweep_tiny.py")
    assert done.stdout.count("\n---") + done.stdout.startswith("---") == 1
    assert [r["loss"] for r in sweep.read(path).values()] == [json.loads(line)["loss"] for line in lines]


def test_a_float_model_a_seed():
    s = sweep.Settings(init_from="out-s{seed}", seeds="1,2", weights=[{}])
    kinds = [(method, seed) for method, *_, seed in sweep.plan_of(s, ["rtn", "qat"])]
    assert kinds == [(kind, seed) for kind in ("float", "control", "rtn", "qat") for seed in (1, 2)]


@pytest.mark.parametrize(
    "change, message",
    [
        ("--methods=rtn,magic", "there is no magic, choose among rtn, gptq, qat"),
        ("--seeds=one", "seeds=one: expected integers"),
        ("--init_from=nowhere", "nowhere"),
        ("--split=val", "out-sweep holds rows that were measured with"),
        ("--weights=4", "expected a list, by a config file or None"),
    ],
)
def test_bad_settings(sh, swept, change, message):
    assert message in sh(f"sweep.py sweep_tiny.py {change}", ok=False).stderr


def test_bad_weights(house, sh, float_run):
    for weights, message in (('[{"bit": 4}]', "'bit'"), ('[{"bits": 9}]', "bits=9"), ("[]", "nothing to do")):
        (house / "bad.py").write_text(f'init_from = "out-float"\nweights = {weights}\n')
        assert message in sh("sweep.py bad.py", ok=False).stderr


@pytest.mark.parametrize(
    "path", sorted(p.name for pattern in ("sweep", "table") for p in ROOT.glob(f"config/{pattern}_*.py"))
)
def test_configs_name_each_row_once(path):
    s = configurator.configure(sweep.Settings, [str(ROOT / "config" / path)])
    plan = sweep.plan_of(s, list(sweep.METHODS))
    names = [sweep.name_of(s, method, config, seed) for method, config, _, seed in plan]
    assert len(names) == len(set(names)) > 15
    assert (ROOT / s.finetune).exists() and s.results.startswith(("results/", s.out_dir))
