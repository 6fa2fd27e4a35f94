"""
BERTScore of what models write: continuations of a text, scored against the true continuations.

    python extras/bertscore.py --ckpt=gpt2,out-gpt2-pot4 --dataset=openwebtext --encoder=roberta-base --texts=200

The setup is that of arXiv 2601.02298: 64 tokens after a prompt of 64, drawn from the 200 most likely tokens. All models
get the same prompts and random numbers. The differences are small, so a mean has a 95 % bootstrap interval over the
texts.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
import dataset  # noqa: E402
import machine  # noqa: E402
from configurator import check_minimum, run  # noqa: E402
from model import GPT  # noqa: E402
from pot import convert  # noqa: E402
from tokenizer import Tokenizer, tokenizer_of  # noqa: E402

PROMPT, NEW = 64, 64  # tokens
TOP_K = 200
TEMPERATURE = 0.8  # the papers: 0.5 to 0.8
BATCH = 10  # texts at a time, because each has a KV cache


@dataclass
class Settings:
    ckpt: str = "out"  # folders of checkpoints, or gpt2, gpt2-medium, ...; separated by commas
    encoder: str = "roberta-base"  # a name on the Hugging Face hub or a folder; the papers: roberta-base
    texts: int = 10  # continuations per model; the papers: 10
    dataset: str | None = None  # folder under data/; None: the one trained on
    split: str = "test"  # train, val or test
    text: str | None = None  # a text file, instead of the split of a data set
    tokens: int | None = None  # draw prompts from only this many tokens, from the start; None: from all
    seed: int = 1337  # of prompts, continuations and the bootstrap
    json: str | None = None  # file of the result; None: bertscore.json in the last folder
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    device = machine.pick_device(s.device)
    if device == "cpu":
        machine.keep_freed_memory()
    check_minimum(s, texts=2, tokens=PROMPT + NEW, seed=0)
    folders = [f for f in s.ckpt.split(",") if f]
    if not folders:
        raise ValueError("pass at least one folder to --ckpt")
    for folder in folders:
        checkpoint.require_folder(folder)
    path = s.json or os.path.join("." if checkpoint.is_foreign(folders[-1]) else folders[-1], "bertscore.json")
    checkpoint.check_json(path)
    scorer = load_scorer(s.encoder, device)  # before any model, so that a bad encoder fails at once
    for folder in folders[1:]:  # a check alone: the work on the folders before them may take long
        load(s, folder)
    rows, texts = [], []
    for folder in folders:
        model, info, name, ids = load(s, folder)
        tokenizer = tokenizer_of(info.tokenizer, folder)
        texts.append(continuations(convert(model).to(device), tokenizer, ids, s.texts, s.seed, device))
        rows.append(
            {
                "ckpt": folder,
                "method": info.method,
                "weights": info.weights,
                "dataset": name,
                "split": None if s.text else s.split,
            }
        )
    add_bertscore(rows, texts, scorer, s.encoder, s.seed)
    print_table(rows)
    result = {"rows": rows, "seed": s.seed, "temperature": TEMPERATURE, **machine.provenance()}
    checkpoint.write_json(path, result)
    print(f"written to {path}")


def load(s, folder):
    """(model, info, name of the text, token ids to draw prompts from) of a folder."""
    model, info = checkpoint.load_model(folder)
    name = s.text or s.dataset or info.settings["dataset"]
    return model, info, name, dataset.tokens_for(folder, info.tokenizer, name, s.split, s.text, s.tokens)


def load_scorer(encoder: str, device: str):
    """bert_score.BERTScorer, rescaled if bert-score has a baseline for the encoder.

    A folder with the name of an encoder that bert-score knows is taken for that encoder. Raises ValueError if the
    encoder cannot be loaded.
    """
    import bert_score
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = os.path.basename(os.path.normpath(encoder)) if os.path.isdir(encoder) else encoder
    baseline = os.path.join(os.path.dirname(bert_score.__file__), "rescale_baseline", "en", f"{name}.tsv")
    try:
        # The layer that bert-score recommends, or the last layer of an encoder that it does not know.
        layers = bert_score.utils.model2layers.get(name) or AutoConfig.from_pretrained(encoder).num_hidden_layers
        rescale = {"rescale_with_baseline": os.path.isfile(baseline), "baseline_path": baseline}
        scorer = bert_score.BERTScorer(encoder, layers, device=device, lang="en", **rescale)
        scorer.score(["a text"], ["a text"])  # its tokenizer may fail at the first text
        return scorer
    except Exception as e:  # from transformers or the hub; the type depends on version, name and network
        raise ValueError(
            f"cannot load the encoder {encoder} ({type(e).__name__}): pass a name on the Hugging Face hub, with a "
            "network, or a folder that holds an encoder and its tokenizer, whose tokenizer_config.json has a model_max_length"
        ) from None


def continuations(
    model: GPT, tokenizer: Tokenizer, ids: np.ndarray, count: int, seed: int, device: str
) -> tuple[list[str], list[str]]:
    """(texts written by the model, true texts) after `count` prompts from random places of ids, chosen by seed."""
    windows = dataset.random_windows(ids, PROMPT + NEW, count, seed).to(device)
    written = []
    for i, x in enumerate(windows.split(BATCH)):
        generator = torch.Generator(device).manual_seed(seed + i)
        new = model.generate(x[:, :PROMPT], NEW, TEMPERATURE, TOP_K, generator)
        written += torch.cat(list(new), dim=1).tolist()

    def decoded(rows):
        texts = [tokenizer.decode(row) for row in rows]
        return [t if t.strip() else "." for t in texts]  # bert-score cannot score an empty text

    return decoded(written), decoded(windows[:, PROMPT:].tolist())


def add_bertscore(rows: list[dict], texts: list[tuple[list[str], list[str]]], scorer, encoder: str, seed: int) -> None:
    """Adds the key "bertscore" to each row, from its (written, true) texts: means, and [mean, lower, upper] of F1 with
    a 95 % bootstrap interval. f1_difference is paired: F1 minus that of the first row."""
    count = len(texts[0][0])
    draws = np.random.default_rng(seed).integers(count, size=(10_000, count))

    def interval(scores):
        means = scores[draws].mean(1)
        return [round(float(v), 5) for v in (scores.mean(), *np.quantile(means, (0.025, 0.975)))]

    first = None
    for row, (written, true) in zip(rows, texts):
        precision, recall, f1 = (t.double().numpy() for t in scorer.score(written, true))
        first = f1 if first is None else first
        row["bertscore"] = {
            "encoder": encoder,
            "layer": scorer.num_layers,
            "rescaled": scorer.rescale_with_baseline,
            "texts": count,
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": interval(f1),
            "f1_difference": interval(f1 - first),
        }


def print_table(rows):
    table = [["checkpoint", "precision", "recall", "F1", "95 %", "F1 - first", "95 %"]]
    for i, row in enumerate(rows):
        score = row["bertscore"]
        cells = [row["ckpt"], f"{score['precision']:.4f}", f"{score['recall']:.4f}"]
        for mean, lower, upper in (score["f1"], score["f1_difference"]):
            cells += [f"{mean:.4f}", f"{lower:.4f} to {upper:.4f}"]
        table.append(cells if i else cells[:-2] + ["", ""])
    how = "rescaled with bert-score's baseline" if score["rescaled"] else "not rescaled"
    where = f"{score['texts']} texts of {NEW} tokens after {PROMPT}"
    print(f"BERTScore by {score['encoder']}, layer {score['layer']}, {how}; {where}")
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    run(main, Settings)
