"""sweep.py as a user runs it. The rows equal those of train.py and eval.py."""

import hashlib
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import configurator
import dataset
import sweep
from extras import plot
from pot import PoTConfig

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
def sweep_run(workdir, sh, float_run):
    (workdir / "finetune.py").write_text('dataset = "tiny"\nbatch_size = 4\nlearning_rate = 1e-3\neval_interval = 4\n')
    (workdir / "sweep_tiny.py").write_text(CONFIG)
    done = sh("sweep.py sweep_tiny.py")
    return done, json.loads((workdir / "kept" / "sweep.json").read_text())


def test_rows_equal_those_of_train_and_eval(workdir, sh, sweep_run):
    rows = {r["name"]: r for r in sweep_run[1]["rows"]}
    # The float model and RTN have one seed.
    assert len(rows) == 1 + 3 + (1 + 1) + 2 * (3 + 1)
    ptq = "train.py finetune.py --init_from=out-float --seed=2 --pot_bits=4 --pot_group_size=32 --max_iters=0"
    for kind, tokens in (("rtn", 0), ("gptq", 512)):
        sh(f"{ptq} --calibrate_tokens={tokens} --out_dir=out-alone-{kind}")
        sh(f"eval.py --ckpt=out-alone-{kind} --json=one.json")
        expected = json.loads((workdir / "one.json").read_text())["rows"][-1]
        row = rows[f"pot-4-bits-groups-of-32-{kind}-s{1 if kind == 'rtn' else 2}"]
        for key in ("loss", "kl", "bytes", "method"):
            assert row[key] == expected[key], key
    for name, pot_options in (("qat", "--pot_bits=4 --pot_group_size=32 --calibrate_tokens=512"), ("control", "")):
        out = f"out-alone-{name}"
        sh(f"train.py finetune.py --init_from=out-float --max_iters=6 --seed=2 --out_dir={out} {pot_options}")
        sh(f"eval.py --ckpt={out} --json=one.json")
        expected = json.loads((workdir / "one.json").read_text())["rows"][0]
        row = rows["pot-4-bits-groups-of-32-qat6-s2" if name == "qat" else "float-control6-s2"]
        assert (row["loss"], row["steps"]) == (expected["loss"], 6)
        assert not (workdir / row["ckpt"] / "ckpt.pt").exists()


def test_table_pairs_seeds(workdir, sweep_run):
    done, result = sweep_run
    losses_by_row = {(r["kind"], r["weights"], r["seed"]): r["loss"] for r in result["rows"]}
    table = {(row["kind"], row["weights"]): row for row in result["table"]}
    for kind, baseline in (("gptq", "float"), ("qat", "control")):
        baseline_seeds = (1, 1, 1) if baseline == "float" else (1, 2, 3)
        losses = [losses_by_row[kind, "PoT 4 bits, groups of 32", s] for s in (1, 2, 3)]
        above = [loss - losses_by_row[baseline, "float32", s] for loss, s in zip(losses, baseline_seeds)]
        row, key = table[kind, "PoT 4 bits, groups of 32"], "above_control" if baseline == "control" else "above"
        assert row[key] == pytest.approx(statistics.mean(above), abs=1e-12)
        # The 97.5 % quantile of Student's t with 2 degrees of freedom solves p = 1/2 + t / (2 sqrt(2 + t^2)).
        quantile = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
        assert row[f"{key}_interval"] == pytest.approx(quantile * statistics.stdev(above) / math.sqrt(3), rel=1e-3)
    assert table["rtn", "uniform 3 bits, per channel"]["above_interval"] is None
    above_float = [
        losses_by_row["qat", "PoT 4 bits, groups of 32", s] - losses_by_row["float", "float32", 1] for s in (1, 2, 3)
    ]
    assert table["qat", "PoT 4 bits, groups of 32"]["above"] == pytest.approx(statistics.mean(above_float), abs=1e-12)
    text = (workdir / "kept" / "sweep.md").read_text()
    assert text in done.stdout and text.endswith("\nRows of 32 bits.\n")
    (line,) = [line for line in text.splitlines() if line.startswith("| PoT 4 bits, groups of 32 | qat | 1,280 |")]
    assert line.endswith("| 1.5 |")
    assert (workdir / "kept" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_sweep_resumes(workdir, sh, sweep_run):
    path = workdir / "out-sweep" / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # a killed sweep leaves part of a row
    done = sh("sweep.py sweep_tiny.py")
    assert done.stdout.count("\n---") + done.stdout.startswith("---") == 1
    assert [r["loss"] for r in sweep.read(path).values()] == [json.loads(line)["loss"] for line in lines]


def test_kinds_of_weights_have_distinct_labels_and_names(sweep_run, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    kinds = [
        {},
        {"act_bits": 8},
        {"scale": "absmax"},
        {"scale_format": "e8m0"},
        {"range": 5},
        {"granularity": "tensor"},
    ]
    paper = dict(grid="paper", granularity="tensor", scale="absmax")
    kinds += [paper, paper | {"eps": 2.0**-12}]
    (row,) = [t for t in sweep_run[1]["table"] if t["kind"] == "qat" and t["config"]["bits"] == 4]
    table = [sweep_run[1]["table"][0]] + [row | {"config": vars(PoTConfig(**k))} for k in kinds]
    figures = []
    monkeypatch.setattr(plt, "close", lambda fig: figures.append(fig))
    plot.draw_sweep(table, str(tmp_path / "x.png"))
    labels = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
    assert len(labels) == len(set(labels)) == len(kinds)
    assert labels[:2] == ["PoT 4 bits, groups of 64, range $2^{5}$", "PoT 4 bits, groups of 64"]  # by range
    names = [sweep.name_of(sweep.Settings(), "rtn", PoTConfig(**k), 1) for k in kinds]
    assert len(names) == len(set(names))


def test_intervals_follow_students_t():
    """The intervals agree with quantiles of simulated t statistics."""
    for n in range(2, 12):
        t = torch.randn(400_000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        t = t.mean(1) / (t.std(1) / n**0.5)
        expected = t.abs().quantile(0.95) if n < 11 else 2.262
        common = dict.fromkeys(("steps", "tokens_seen", "bits_per_weight", "bytes", "papers", "seconds"), 1)
        losses = [float(x) for x in range(n)]
        rows = [common | dict(kind="float", weights="float", seed=0, config=None, loss=0.0)]
        for i, x in enumerate(losses):
            rows.append(common | dict(kind="gptq", weights="w", seed=i, config={"bits": 4}, loss=x))
        interval = sweep.summary(rows)[1]["above_interval"]
        assert interval == pytest.approx(float(expected) * statistics.stdev(losses) / n**0.5, rel=0.01)


def test_time_left():
    rows = [{"kind": "float", "seconds": 1}, {"kind": "control", "seconds": 60}, {"kind": "control", "seconds": 120}]
    assert sweep.time_left(["float", "qat"], []) == ""
    assert sweep.time_left(["control", "rtn"], rows) == ", at least 2 min for all that is left"
    rows += [{"kind": "rtn", "seconds": 4.0}]
    assert sweep.time_left(["rtn", *["qat"] * 100], rows) == ", about 2 h 31 min for all that is left"
    assert sweep.time_left(["qat"], [*rows, {"kind": "qat", "seconds": 240}]) == ", about 4 min for all that is left"


def test_calibrate_tokens(monkeypatch, tmp_path):
    """None leaves QAT the tokens of its config; a number is for QAT, too."""
    made = []

    def stop(settings):
        made.append(settings.calibrate_tokens)
        raise InterruptedError

    monkeypatch.setattr(sweep.train, "main", stop)
    for tokens in (None, 300):
        s = sweep.Settings(
            finetune=str(ROOT / "config/paper_gpt2_pot4.py"),
            max_iters=5,
            calibrate_tokens=tokens,
            out_dir=str(tmp_path),
        )
        for method in ("gptq", "qat"):
            with pytest.raises(InterruptedError):
                sweep.make_row(s, method, PoTConfig(), 1, "row", "digest")
    assert made == [16384, 0, 300, 300]


def test_odd_rows_and_large_losses(sweep_run, tmp_path):
    rows = json.loads(json.dumps(sweep_run[1]["rows"]))
    missing = {key: value for key, value in rows[0].items() if key != "bytes"}
    odd = [
        "123",
        "null",
        "{}",
        '{"name": "x"}',
        json.dumps(rows[0] | {"name": []}),
        json.dumps(rows[0] | {"loss": "x"}),
    ]
    wrong = {
        "config": 5,
        "tokens_seen": "many",
        "weights": [],
        "kl": "x",
        "shared": 1,
        "loss": math.nan,
        "bytes": 10**400,
    }
    wrong |= {"kind": "float"}  # rows[-1] has a config
    wrong |= {"papers": "\x1b[2J", "weights": "\x1b", "loss": -1e308, "kl": math.nan}
    odd += [json.dumps(rows[-1] | {key: value}) for key, value in wrong.items()]
    odd += [json.dumps(rows[-1] | {"config": config}) for config in ({"bits": 99}, {"x": 1}, None)]
    odd.append(json.dumps({key: value for key, value in rows[-1].items() if key != "top1_agreement"} | {"kl": 1}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*odd, json.dumps(missing | {"name": "y"}), json.dumps(rows[1]), '{"na']))
    assert sweep.read(path) == {rows[1]["name"]: rows[1]}
    path.write_text(json.dumps(rows[1] | {"ckpt": "日本\u3000語"}))
    assert len(sweep.read(path)) == 1
    for row in rows:
        row["loss"] = 1e9
    sweep.write(sweep.Settings(results=str(tmp_path / "sweep")), rows)
    assert "| 1000000000.0000 | inf |" in (tmp_path / "sweep.md").read_text()


def test_tokens_of_a_model_of_others():
    """Its settings may be anything."""
    info = SimpleNamespace(settings={"batch_size": 2}, pot=None, step=3, model_args=SimpleNamespace(block_size=8))
    assert sweep.tokens_seen(info) is None
    info.settings |= {"gradient_accumulation_steps": 4, "block_size": "x"}
    assert sweep.tokens_seen(info) is None
    info.settings |= {"block_size": None}
    assert sweep.tokens_seen(info) == 3 * 2 * 4 * 8


def test_float_model_per_seed():
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
        ("--max_iters=0", "QAT takes at least 1 step"),
        ("--protocol=papers", "unknown protocol 'papers'"),
        ("--seeds=1,2,1", "a seed is there twice"),
        ("--results=sweep_tiny.py/sweep", "cannot be written to"),
    ],
)
def test_bad_settings(sh, sweep_run, change, message):
    assert message in sh(f"sweep.py sweep_tiny.py {change}", ok=False).stderr


def test_same_weights_twice():
    s = sweep.Settings(weights=[{"bits": 4}, {"bits": 3}, {"bits": 4, "eps": 0.5}], seeds="1", max_iters=2)
    with pytest.raises(ValueError, match="PoTConfig.*bits=4.* with seed 1 is there twice"):
        sweep.plan_of(s, ["rtn", "qat"])


def test_rows_of_another_finetuning_config_are_not_mixed(workdir, sh, sweep_run):
    path = workdir / "finetune.py"
    before = path.read_text()
    path.write_text(before + "distill = 1.0\n")
    try:
        error = sh("sweep.py sweep_tiny.py", ok=False).stderr
    finally:
        path.write_text(before)
    assert "measured with {'finetune.distill': 0.0}, the settings say {'finetune.distill': 1.0}" in error


def test_rows_of_a_float_model_that_was_replaced_are_not_mixed(sh, sweep_run, monkeypatch):
    monkeypatch.setattr("checkpoint.digest_of", lambda model: "another")
    assert (
        "out-sweep holds rows of another model than out-float holds now"
        in sh("sweep.py sweep_tiny.py", ok=False).stderr
    )


def test_rows_of_another_text_are_not_mixed(workdir, sh, sweep_run):
    text = (workdir / "data" / "tiny" / "meta.json").read_text()
    meta, ids = json.loads(text), (workdir / "data" / "tiny" / "test.bin").read_bytes()
    meta["digests"]["test"] = hashlib.blake2b(ids[:-2], digest_size=16).hexdigest()
    try:
        (workdir / "data" / "tiny" / "meta.json").write_text(json.dumps(meta))
        (workdir / "data" / "tiny" / "test.bin").write_bytes(ids[:-2])
        done = sh("sweep.py sweep_tiny.py", ok=False)
    finally:
        (workdir / "data" / "tiny" / "meta.json").write_text(text)
        (workdir / "data" / "tiny" / "test.bin").write_bytes(ids)
    assert "out-sweep holds rows of another text than data/tiny holds now: choose another --out_dir" in done.stderr
    assert "float-s1" not in done.stdout


@pytest.mark.parametrize("replaced", ["data/tiny", "out-float"])
def test_text_or_model_that_is_replaced_during_a_sweep(workdir, sh, sweep_run, monkeypatch, replaced):
    digests = {"data/tiny": "a", "out-float": "a"}
    load, measure = dataset.load_and_digest, sweep.measure

    def measure_and_replace(*args):
        digests[replaced] = "b"
        return measure(*args)

    monkeypatch.setattr(dataset, "load_and_digest", lambda *args: (*load(*args)[:-1], digests["data/tiny"]))
    monkeypatch.setattr("checkpoint.digest_of", lambda model: digests["out-float"])
    monkeypatch.setattr(sweep, "measure", measure_and_replace)
    out = replaced.replace("/", "-")
    done = sh(f"sweep.py sweep_tiny.py --out_dir=out-of-{out} --results=kept/{out} --methods=rtn", ok=False)
    assert f"{replaced} was replaced while a row was measured" in done.stderr
    rows = (workdir / f"out-of-{out}" / "rows.jsonl").exists()
    assert rows == (replaced == "out-float")  # its float row is of the old model


def test_results_that_cannot_be_written_are_noticed_first(workdir, sh, sweep_run):
    (workdir / "kept" / "folder.png").mkdir()
    for name, message in (("kept/folder", "folder.png is a folder"), ("kept/" + "n" * 248, "name is too long")):
        done = sh(f"sweep.py sweep_tiny.py --results={name}", ok=False)
        assert message in done.stderr and "written" not in done.stdout


def test_bad_weights(workdir, sh, float_run):
    for weights, message in (
        ('[{"bit": 4}]', "'bit'"),
        ('[{"bits": 9}]', "bits=9"),
        ("[]", "nothing to do"),
        ("[4]", "weights: 4 is no dict"),
        ('[{"bits": 4}, {"group_size": 48}]', "group_size 48 does not divide"),
        ('[{"papers": "1.5"}]', "is no dict"),
        ('[{"papers": {"rtn": "a\\nb"}}]', "must hold numbers or short texts"),
        ('[{"papers": {"rtn": {1}}}]', "must hold numbers or short texts"),
        ('[{"seeds": "9007199254740993"}]', "must be from 0 to"),
    ):
        (workdir / "bad.py").write_text(f'init_from = "out-float"\nweights = {weights}\n')
        done = sh("sweep.py bad.py", ok=False)
        assert message in done.stderr and "--- 1 of" not in done.stdout


CONFIGS = sorted(p.name for pattern in ("sweep", "table") for p in ROOT.glob(f"config/{pattern}_*.py"))


@pytest.mark.parametrize("path", CONFIGS)
def test_configs_give_each_row_a_unique_name(path):
    s = configurator.configure(sweep.Settings, [str(ROOT / "config" / path)])
    plan = sweep.plan_of(s, list(sweep.METHODS))
    names = [sweep.name_of(s, method, config, seed) for method, config, _, seed in plan]
    assert len(names) == len(set(names)) > 15
    assert (ROOT / s.finetune).exists() and s.results.startswith(("results/", s.out_dir))
