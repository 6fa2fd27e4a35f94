"""dataset.py and the scripts data/*/prepare.py."""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import added_memory, write_tokenizer

import checkpoint
import dataset
import tokenizer
from tokenizer import BPETokenizer, tokenizer_of

ROOT = Path(__file__).parent.parent


def test_windows_cover_every_position_once():
    for n, size, batch in ((100, 8, 4), (65, 8, 3), (66, 8, 100), (5, 8, 1), (2, 8, 1), (17, 1, 5)):
        ids = np.random.default_rng(0).integers(0, 999, n).astype(np.uint16)
        pairs = list(dataset.windows(ids, size, batch))
        assert torch.cat([y.flatten() for _, y in pairs]).tolist() == ids[1:].tolist()
        assert torch.cat([x.flatten() for x, _ in pairs]).tolist() == ids[:-1].tolist()
        assert all(x.shape == y.shape and x.shape[1] <= size and len(x) <= batch for x, y in pairs)


def test_write_load_and_decode(tmp_path):
    texts = {"train": "abc\n" * 10, "val": "xyz", "test": "äb"}
    dataset.write_chars(tmp_path, texts)
    for split, text in texts.items():
        ids, meta = dataset.load(tmp_path, split)
        chars = tokenizer_of(meta)
        assert ids.dtype == np.uint16 and chars.decode(ids.tolist()) == text
        assert chars.encode(text) == ids.tolist() and chars.vocab_size == 8
    with pytest.raises(ValueError, match="'q' is not in this model's vocabulary of 8"):
        chars.encode("q")
    with pytest.raises(ValueError, match="unknown split 'all'"):
        dataset.load(tmp_path, "all")


def test_killed_while_it_replaces_a_data_set(tmp_path, monkeypatch):
    """After a death at any call that changes the folder, there is the old data set, the new one, or none: no mixture."""
    old, new = ({"train": a * 9, "val": a[:2], "test": a[1:]} for a in ("abc", "zyx"))
    folder, seen = str(tmp_path / "set"), []

    class Killed(BaseException):
        pass

    def dying(call):
        def run(*arguments, **options):
            if next(left) <= 0:  # later calls die, too
                raise Killed
            return call(*arguments, **options)

        return run

    for calls in range(99):
        dataset.write_chars(folder, old)
        left = iter(range(calls, -99, -1))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("replace", "remove", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name)))
            dataset.write_chars(folder, new)
        try:
            texts = splits_of(folder)
        except ValueError as e:
            assert "no data set" in str(e)
            texts = None
        assert texts in (old, None, new)
        seen.append([old, None, new].index(texts))
        if next(left) > 0:
            break
    assert seen == sorted(seen) and set(seen) == {0, 1, 2}
    assert not list((tmp_path / "set").glob("*.tmp"))


def test_files_of_two_data_sets(tmp_path):
    for name in ("a", "b"):
        dataset.write_chars(str(tmp_path / name), {"train": "abc", "val": name * 2, "test": "abc"})
    (tmp_path / "a" / "val.bin").write_bytes((tmp_path / "b" / "val.bin").read_bytes())
    with pytest.raises(ValueError, match="a/val.bin is not the file that .*a/meta.json was written for: make"):
        dataset.load(str(tmp_path / "a"), "val")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta.pop("digests").keys() == set(dataset.SPLITS)
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta))  # as older data sets have it
    assert dataset.load(str(tmp_path / "a"), "val")[1] == meta


@pytest.mark.parametrize("digest", [1, 2])
def test_data_set_that_is_replaced_while_it_is_read(tmp_path, monkeypatch, digest):
    texts = [dict.fromkeys(dataset.SPLITS, text) for text in ("abc", "xyz")]  # the same ids, in other vocabularies
    dataset.write_chars(str(tmp_path), texts[0] | {"val": "cba"})
    file_digest, calls = hashlib.file_digest, []

    def replace(*arguments):
        calls.append(file_digest(*arguments))
        if len(calls) == digest:
            dataset.write_chars(str(tmp_path), texts[1])
        return calls[-1]

    monkeypatch.setattr(hashlib, "file_digest", replace)
    try:
        train, val, meta = dataset.load(str(tmp_path), "train", "val")
    except ValueError as e:
        assert "val.bin is not the file that" in str(e) and digest == 1
    else:
        assert (train.tolist(), val.tolist(), meta["chars"]) == ([0, 1, 2], [2, 1, 0], "abc") and digest == 2


def test_data_set_that_is_removed_while_it_is_read(tmp_path, monkeypatch):
    dataset.write_chars(str(tmp_path), dict.fromkeys(dataset.SPLITS, "abc"))
    read = tokenizer.read_small
    monkeypatch.setattr(tokenizer, "read_small", lambda path: os.remove(path) or read(path))
    with pytest.raises(ValueError, match="no data set .*: choose one of"):
        dataset.load(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["tokenizer.json", "meta.json"])
def test_full_disk_leaves_the_old_data_set(tmp_path, monkeypatch, name):
    """The ids are the largest, and the first to be written. The tokenizer follows."""
    for folder in ("model", "set"):
        (tmp_path / folder).mkdir()
    write_tokenizer(tmp_path / "model")
    documents = [f"{i} men went to mow" for i in range(40)]
    dataset.write_documents(str(tmp_path / "set"), documents, str(tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    write = checkpoint.write

    def write_until_full(path, save):
        if os.path.basename(path) == name:
            raise OSError(f"cannot write {path}: no space left; what was there before is untouched")
        write(path, save)

    monkeypatch.setattr(checkpoint, "write", write_until_full)
    with pytest.raises(OSError, match="untouched"):
        dataset.write_documents(str(tmp_path / "set"), documents[::-1], str(tmp_path / "model"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_two_processes_write_one_data_set(tmp_path):
    texts = {"train": "abc", "val": "ab", "test": "bc"}
    dataset.write_chars(str(tmp_path), texts)
    with checkpoint.Lock(str(tmp_path)) as lock:
        lock.acquire()
        with pytest.raises(ValueError, match="is in use by another run"):
            dataset.write_chars(str(tmp_path), texts)
    assert splits_of(tmp_path) == texts


def test_tokenizer_of_the_data_set_before_is_removed(tmp_path):
    """Training from scratch would keep it beside a model of other tokens."""
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    texts = [f"document {i}" for i in range(20)]
    dataset.write_documents(str(tmp_path / "set"), texts, str(tmp_path / "model"))
    dataset.write_documents(str(tmp_path / "set"), texts, str(tmp_path / "set"))
    assert (tmp_path / "set" / "tokenizer.json").exists()
    dataset.write_documents(str(tmp_path / "set"), texts)
    assert not (tmp_path / "set" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "[" * 100000, '{"tokenizer": "char", "chars": 3}', '{"digests": 3}']
)
def test_damaged_meta(tmp_path, content):
    dataset.write_chars(str(tmp_path), {"train": "abc", "val": "ab", "test": "bc"})
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        dataset.load(str(tmp_path), "val")


def test_missing_data_names_the_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    message = "no data set data/nowhere: choose one of openwebtext, pydoc_char, shakespeare_char"
    with pytest.raises(ValueError, match=message):
        dataset.load("data/nowhere", "train")


@pytest.fixture
def scripts(tmp_path):
    """Copies the data scripts to a temporary folder, which protects the user's data."""
    scripts = [ROOT / "data" / name / "prepare.py" for name in ("pydoc_char", "shakespeare_char")]
    for path in (*ROOT.glob("*.py"), *ROOT.glob("pot_kernel/*.py"), *scripts):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())

    def run(name, *args):
        command = [sys.executable, f"data/{name}/prepare.py", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run, tmp_path / "data"


def test_shakespeare_char(scripts, tmp_path):
    run, data = scripts
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "plays.txt").write_text(text)
    done = run("shakespeare_char", "--input", str(tmp_path / "plays.txt"))
    assert done.returncode == 0, done.stderr
    parts = []
    for split in dataset.SPLITS:
        ids, meta = dataset.load(data / "shakespeare_char", split)
        parts.append(tokenizer_of(meta).decode_bytes(ids.tolist()).decode())
    assert "".join(parts) == text  # in order, without gap or overlap
    assert [round(len(p) / len(text), 2) for p in parts] == [0.8, 0.1, 0.1]
    for args in (("--input", "nowhere.txt"), ("--inptu", "x")):
        done = run("shakespeare_char", *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_pydoc_char(scripts):
    run, data = scripts
    done = run("pydoc_char")
    assert done.returncode == 0, done.stderr
    texts = {}
    for split in dataset.SPLITS:
        ids, meta = dataset.load(data / "pydoc_char", split)
        texts[split] = tokenizer_of(meta).decode_bytes(ids.tolist()).decode()
    assert len(texts["train"]) > 1_000_000 and min(len(texts["val"]), len(texts["test"])) > 100_000
    assert set("".join(texts.values())) <= {"\n", *map(chr, range(32, 127))}
    # No long paragraph is in two splits.
    paragraphs = {split: {p for p in text.split("\n\n") if len(p) >= 100} for split, text in texts.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not paragraphs[a] & paragraphs[b]


# --- GPT-2's byte pairs ---


def prepare(name, folder, monkeypatch, /, **settings):
    """Runs data/<name>/prepare.py in this process, where stand-ins replace packages. Writes to `folder`."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(script, "here", str(folder))
    script.main(script.Settings(**settings))


def documents(folder):
    """Returns a dict from split to decoded documents."""
    documents_by_split = {}
    for split in dataset.SPLITS:
        ids, meta = dataset.load(str(folder), split)
        text = tokenizer_of(meta).decode_bytes(ids.tolist()).decode()
        documents_by_split[split] = text.split("<|endoftext|>")
    return documents_by_split


def test_openwebtext_from_jsonl(tmp_path, monkeypatch):
    texts = [f"document {i} \N{SNOWMAN} <|endoftext|>\n" for i in range(50)]
    with_duplicates = texts[:30] + texts[5:20] + ["", "  "] + texts[30:]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "other": 1}) for t in with_duplicates) + "\n\n")
    prepare("openwebtext", tmp_path / "d", monkeypatch, input=str(tmp_path / "a.jsonl"))
    ids, _ = dataset.load(str(tmp_path / "d"), "test")
    # Documents 0, 20 and 40. The text <|endoftext|> inside a document does not end it.
    assert list(ids).count(50256) == 3
    text_by_split = {split: "".join(docs) for split, docs in documents(tmp_path / "d").items()}
    for i in range(50):  # each document is in one split
        splits = [split for split in dataset.SPLITS if text_by_split[split].count(f"document {i} ") == 1]
        assert splits == [{0: "test", 10: "val"}.get(i % 20, "train")], i
    assert sum(text.count("document") for text in text_by_split.values()) == 50
    prepare("openwebtext", tmp_path / "same", monkeypatch, input=str(tmp_path / "a.jsonl"), documents=12)
    assert documents(tmp_path / "same") == documents(tmp_path / "d")  # documents=12 limits the hub's stream only


@pytest.mark.parametrize("size", [300, 70000])
def test_data_for_another_tokenizer(tmp_path, monkeypatch, size):
    """Against transformers. Token files are uint32 beyond 65,536 tokens."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model", first=True)
    if size > 300:  # the last tokens get the ids above 65,535
        file = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
        vocabulary = file["model"]["vocab"]
        vocabulary |= {"the": size - 1, **{f"filler {i}": i for i in range(260, size - 1)}}
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(file))
    texts = [f"the document {i} \N{SNOWMAN} <|endoftext|>\n" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    settings = dict(input=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "model"), out="data for it")
    (tmp_path / "here").mkdir()
    prepare("openwebtext", tmp_path / "here", monkeypatch, **settings)
    folder = tmp_path / "data for it"  # beside the folder of prepare.py
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    ids, meta = dataset.load(str(folder), "test")
    assert ids.dtype == (np.uint16 if size == 300 else np.uint32)
    expected = []
    for text in (texts[i] for i in (0, 20, 40)):
        ordinary = reference(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        expected += [1, *ordinary, 2]  # the text <|endoftext|> inside a document does not end it
    assert ids.tolist() == expected and (size == 300 or max(ids) == size - 1)
    assert tokenizer_of(meta, str(folder)).decode(ids[1:4].tolist()) == "the d"
    with pytest.raises(ValueError, match="without slashes"):
        dataset.folder("data/x", "../y")
    with pytest.raises(ValueError, match="no folder nowhere: pass gpt2"):
        dataset.write_documents(str(folder), texts, "nowhere")


def test_held_out_text_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "HELD_OUT", 25)
    dataset.write_documents(str(tmp_path), (f"{i:010}" for i in range(200)))
    counts = {split: len(docs) - 1 for split, docs in documents(tmp_path).items()}
    assert counts == {"train": 194, "val": 3, "test": 3}


def test_text_files_are_cut_into_documents(tmp_path):
    text = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    cut_documents = list(dataset.read_documents(f"{tmp_path}/book.txt,{tmp_path}/book.txt"))
    assert len(cut_documents) > 8 and all(d.startswith("paragraph") for d in cut_documents)
    assert "".join(cut_documents) == text * 2
    assert all(len(d) < 10_100 for d in cut_documents)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"nothing", "line 2 is no .*JSONDecodeError"),
        (b'{"txt": "a"}', "line 2 is no .*KeyError"),
        (b'{"text": 3}', "line 2 is no .*AttributeError"),
        (b'["text"]', "line 2 is no .*TypeError"),
        (b'{"text": "\xff"}', "line 2 is no .*UnicodeDecodeError"),
        (b'{"text": "\\ud800"}', "line 2 is no .*UnicodeEncodeError"),
        (b"[" * 200000, "line 2 is no .*RecursionError"),
    ],
)
def test_bad_lines_are_named_and_no_file_is_left(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=message):
        dataset.write_documents(str(tmp_path / "d"), dataset.read_documents(str(tmp_path / "a.jsonl")))
    assert not list((tmp_path / "d").iterdir())


def test_too_few_documents(tmp_path):
    with pytest.raises(ValueError, match="too little text to split"):
        dataset.write_documents(str(tmp_path), ["one", "two"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def prepare_text(tmp_path, monkeypatch):
    """prepare_text(**settings) runs data/text/prepare.py. The data sets go to tmp_path / "data"."""
    (tmp_path / "data" / "text").mkdir(parents=True)
    return lambda **settings: prepare("text", tmp_path / "data" / "text", monkeypatch, **settings)


def splits_of(folder):
    """{split: its decoded text}"""
    parts = {}
    for split in dataset.SPLITS:
        ids, meta = dataset.load(str(folder), split)
        parts[split] = tokenizer_of(meta, str(folder)).decode(ids.tolist())
    return parts


def test_own_text_is_cut_in_order(tmp_path, prepare_text):
    """Every token of every file is in one split, whatever the size of the file."""
    texts = ["".join(f"line {i} of {n}\n" for i in range(n)) for n in (40, 3000)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
        prepare_text(input=f"{tmp_path}/{i}.txt", name=f"set{i}")
        parts = splits_of(tmp_path / "data" / f"set{i}")
        assert parts["train"] + parts["val"] + parts["test"] == text + "<|endoftext|>"
        sizes = [len(dataset.load(str(tmp_path / "data" / f"set{i}"), split)[0]) for split in dataset.SPLITS]
        assert sizes[1] == sizes[2] == sum(sizes) // 10
    prepare_text(input=f"{tmp_path}/0.txt,{tmp_path}/1.txt", tokenizer="char")
    for split, part in splits_of(tmp_path / "data" / "text").items():  # each file is in each split
        assert "of 40\n" in part and "of 3000\n" in part, split


def test_own_documents_and_held_out_text(tmp_path, prepare_text, monkeypatch):
    monkeypatch.setattr(dataset, "HELD_OUT", 7)
    texts = [f"<|endoftext|> document {i}\n" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*texts, texts[3], " "]))
    prepare_text(input=f"{tmp_path}/a.jsonl", name="mine")
    parts = splits_of(tmp_path / "data" / "mine")
    assert "".join(parts.values()) == "".join(t + "<|endoftext|>" for t in texts)
    assert [len(dataset.load(str(tmp_path / "data" / "mine"), s)[0]) for s in ("val", "test")] == [7, 7]


def test_own_text_for_a_model(tmp_path, prepare_text, workdir, float_run):
    (tmp_path / "a.txt").write_text("the lazy dog sleeps\n" * 30)
    prepare_text(input=f"{tmp_path}/a.txt", name="chars", tokenizer=str(workdir / float_run))
    _, meta = dataset.load(str(tmp_path / "data" / "chars"), "train")
    assert meta == dataset.load(str(workdir / "data" / "tiny"), "train")[1]
    prepare_text(input=f"{tmp_path}/a.txt", name="llama", tokenizer=str(workdir / "llama"))
    assert "".join(splits_of(tmp_path / "data" / "llama").values()) == "the lazy dog sleeps\n" * 30 + "<|endoftext|>"
    assert (tmp_path / "data" / "llama" / "tokenizer.json").exists()
    (tmp_path / "a.txt").write_text("Ä" * 30)
    with pytest.raises(ValueError, match="'Ä' is not in this model's vocabulary"):
        prepare_text(input=f"{tmp_path}/a.txt", name="chars", tokenizer=str(workdir / float_run))


def test_bad_own_text(tmp_path, prepare_text):
    with pytest.raises(ValueError, match="pass --input=FILE"):
        prepare_text()
    for content in ("", "a b c"):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(ValueError, match="a.txt holds . tokens, too few"):
            prepare_text(input=f"{tmp_path}/a.txt", name="small")
    assert not list((tmp_path / "data" / "small").iterdir())
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "prepare.py").touch()
    with pytest.raises(ValueError, match="data/other is made by its own prepare.py: choose another name"):
        prepare_text(input=f"{tmp_path}/a.txt", name="other")
    with pytest.raises(ValueError, match="made by its own prepare.py"):
        dataset.folder(str(tmp_path / "data" / "openwebtext"), "other")


def test_openwebtext_from_the_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        # A stream, which the script must not read to the end.
        return ({"text": f"document {i}"} for i in range(400 if len(calls) == 2 else 10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    prepare("openwebtext", tmp_path, monkeypatch, documents=300)
    assert sum(len(docs) - 1 for docs in documents(tmp_path).values()) == 300
    ((name,), options) = calls[0]
    prepare("openwebtext", tmp_path, monkeypatch, documents=300, all=True)
    assert sum(len(docs) - 1 for docs in documents(tmp_path).values()) == 400
    assert name == "Skylion007/openwebtext" and options["streaming"] and options["revision"] == "refs/convert/parquet"


def test_download_without_network(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("openwebtext", "wikitext2"):
        with pytest.raises(ValueError, match=r"from the Hugging Face hub \(ConnectionError\): .* --input"):
            prepare(name, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


ARTICLE = " \n = Title {} = \n \n Some text . \n = = Section = = \n More of {} . \n"


def test_wikitext2(tmp_path, monkeypatch):
    rows = {s: [f" = {s} = \n", "", f" text of {s} . \n"] for s in ("train", "validation", "test")}
    stand_in = types.SimpleNamespace(load_dataset=lambda *a: {s: {"text": r} for s, r in rows.items()})
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    prepare("wikitext2", tmp_path / "hub", monkeypatch)
    assert documents(tmp_path / "hub")["val"] == [" = validation = \n\n\n\n\n text of validation . \n"]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(ARTICLE.format(split, split))
    names = ",".join(str(tmp_path / f"{s}.txt") for s in ("train", "valid", "test"))
    prepare("wikitext2", tmp_path / "three", monkeypatch, input=names)
    assert documents(tmp_path / "three")["val"] == [ARTICLE.format("valid", "valid")]
    text = "".join(ARTICLE.format(i, i) for i in range(30))
    (tmp_path / "one.txt").write_text(text)
    prepare("wikitext2", tmp_path / "one", monkeypatch, input=str(tmp_path / "one.txt"))
    by_split = documents(tmp_path / "one")
    assert sum(d.count("= Title") for docs in by_split.values() for d in docs) == 30
    assert all(d.count("= Title") == d.count("= Section") <= 1 for docs in by_split.values() for d in docs)
    with pytest.raises(ValueError, match="names 2 files"):
        prepare("wikitext2", tmp_path / "two", monkeypatch, input="a,b")


def test_real_byte_pairs():
    """Runs in a new process without the stand-in, if tiktoken's files are available."""
    code = (
        "import tokenizer; t = tokenizer.BPETokenizer(); ids = t.encode('Hello world<|endoftext|> \N{SNOWMAN}');"
        "print(ids, t.decode_bytes([*ids, 50300]).decode(), t.bpe.n_vocab == t.vocab_size)"
    )
    cache = ROOT.parent / "shared" / "tiktoken_cache"
    cache_env = {"TIKTOKEN_CACHE_DIR": str(cache)} if cache.exists() else {}
    env = os.environ | cache_env | {"PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    if "cannot download GPT-2's byte pairs" in done.stderr:
        pytest.skip("no network and no tiktoken cache")
    assert done.stdout == "[15496, 995, 50256, 34719, 225] Hello world<|endoftext|> \N{SNOWMAN} True\n", done.stderr
    # tiktoken's table in Rust takes most of this. A copy in Python would add 8 MB.
    assert added_memory("import tokenizer, tiktoken", "t = tokenizer.BPETokenizer()", **cache_env) < 19e6


def test_byte_pairs_without_network(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))
    with pytest.raises(ValueError, match="set TIKTOKEN_CACHE_DIR"):
        BPETokenizer()
