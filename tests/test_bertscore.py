"""extras/bertscore.py against a direct computation of BERTScore."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dataset
from tokenizer import tokenizer_of

pytest.importorskip("bert_score")


@pytest.fixture(scope="module")
def encoder(workdir):
    """Folder with a small BERT of random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder = workdir / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words + ["##" + w for w in words[5:]]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=400, **shape)).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_bertscore_against_direct_computation(workdir, sh, monkeypatch, encoder, float_run, qat_run):
    from transformers import AutoModel, AutoTokenizer

    from extras import bertscore

    texts = []
    continuations = bertscore.continuations

    def record(*args):
        texts.append(continuations(*args))
        return texts[-1]

    monkeypatch.setattr(bertscore, "continuations", record)
    copied = workdir / "out-float-again"
    copied.mkdir()
    shutil.copy(workdir / float_run / "model.safetensors", copied)
    folders = f"{float_run},{qat_run},{copied.name}"
    done = sh(f"extras/bertscore.py --ckpt={folders} --encoder=bert --texts=6 --split=train")
    assert "BERTScore by bert, layer 2, not rescaled; 6 texts" in done.stdout
    assert done.stdout.splitlines()[-1] == "written to out-float-again/bertscore.json"
    results = json.loads((copied / "bertscore.json").read_text())
    rows = results["rows"]
    assert [r["ckpt"] for r in rows] == folders.split(",") and results["torch"] == torch.__version__
    assert [r["weights"] for r in rows] == ["float32", "PoT 4 bits, groups of 64", "float32"]
    assert all(r["method"] and r["dataset"] == "tiny" and r["split"] == "train" for r in rows)
    # True continuations come from the text. All models get the same prompts and random numbers.
    ids, meta = dataset.load(str(workdir / "data" / "tiny"), "train")
    text = tokenizer_of(meta).decode_bytes(ids.tolist()).decode()
    (written, true), (written_by_qat, true_again), third = texts
    assert all(len(t) == 64 and t in text for t in true) and true == true_again
    assert third == (written, true) and written != written_by_qat
    # BERTScore: greedy matching by cosine similarity. Special tokens may match but are not counted.
    tokenizer, bert = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def embed(t):
        return F.normalize(bert(**tokenizer(t.strip(), return_tensors="pt")).last_hidden_state[0], dim=-1)

    f1s = []
    for row, (candidates, references) in zip(rows, texts[:2]):
        scores = []
        for candidate, reference in zip(candidates, references):
            match = embed(candidate) @ embed(reference).t()
            p, r = match.amax(1)[1:-1].mean(), match.amax(0)[1:-1].mean()
            scores.append((p, r, 2 * p * r / (p + r)))
        p, r, f1 = (np.array(v) for v in zip(*scores))
        f1s.append(f1)
        score = row["bertscore"]
        assert score["precision"] == pytest.approx(p.mean(), abs=1e-4)
        assert score["recall"] == pytest.approx(r.mean(), abs=1e-4)
        assert score["f1"][0] == pytest.approx(f1.mean(), abs=1e-4) and score["encoder"] == "bert"
        assert min(f1) - 1e-4 <= score["f1"][1] <= score["f1"][0] <= score["f1"][2] <= max(f1) + 1e-4
    assert rows[1]["bertscore"]["f1_difference"][0] == pytest.approx((f1s[1] - f1s[0]).mean(), abs=1e-4)
    assert rows[2]["bertscore"]["f1_difference"] == [0, 0, 0] and "written" not in rows[0]


def test_gpt2_and_a_run_in_training(workdir, sh, encoder, qat_run):
    """The script converts a run in training first. It writes the result of `gpt2` to the current folder."""
    folder = workdir / "out-bertscore-training"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((workdir / qat_run / "ckpt.pt").read_bytes())
    folders = f"{qat_run},{folder.name}"
    sh(f"extras/bertscore.py --ckpt={folders} --encoder=bert --texts=2 --split=train --json=scores/training.json")
    rows = json.loads((workdir / "scores" / "training.json").read_text())["rows"]
    assert rows[1]["bertscore"]["f1_difference"] == [0, 0, 0]
    sh("extras/bertscore.py --ckpt=gpt2 --dataset=openwebtext --split=train --encoder=bert --texts=2")
    (row,) = json.loads((workdir / "bertscore.json").read_text())["rows"]
    assert row["ckpt"] == "gpt2" and row["dataset"] == "openwebtext"
    assert not (workdir / "gpt2" / "bertscore.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--ckpt={float} --encoder=nowhere/bert", "cannot load the encoder nowhere/bert"),
        ("--ckpt={float} --json={float}/model.safetensors", "must be the name of a .json file"),
        ("--ckpt={float} --encoder=nope", "cannot load the encoder nope"),
        ("--ckpt={float} --encoder=bert --texts=1", "texts=1 must be at least 2"),
        ("--ckpt={float},out-nowhere --encoder=bert", "no folder out-nowhere"),
        ("--ckpt=, --encoder=bert", "at least one folder"),
        ("--ckpt=gpt2 --encoder=bert", "pass --dataset=openwebtext or --text FILE"),
    ],
)
def test_errors(sh, encoder, float_run, options, message):
    done = sh(f"extras/bertscore.py {options.format(float=float_run)}", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "error: " in done.stderr and message in done.stderr


def test_bad_encoder_fails_before_a_model_is_loaded(workdir, sh, monkeypatch, encoder, float_run):
    import checkpoint

    shutil.copytree(encoder, workdir / "endless")
    path = workdir / "endless" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    monkeypatch.setattr(checkpoint, "load_model", lambda folder: pytest.fail("a model was loaded"))
    for name in ("nowhere/bert", "endless"):
        assert (
            f"the encoder {name} (" in sh(f"extras/bertscore.py --ckpt={float_run} --encoder={name}", ok=False).stderr
        )
