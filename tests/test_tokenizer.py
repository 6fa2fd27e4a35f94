"""tokenizer.py against transformers."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import CHAT, write_tokenizer

import checkpoint
import machine
import tokenizer
from tokenizer import BPETokenizer, FileTokenizer, tokenizer_of

MESSAGES = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because of the air."},
    {"role": "user", "content": 'the na\u00efve caf\u00e9 \u65e5\u672c <|im_end|> "quoted"'},
]


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, first=True)
    return tmp_path


def test_encoding_equals_transformers(folder):
    transformers = pytest.importorskip("transformers")
    reference, own = transformers.AutoTokenizer.from_pretrained(folder), FileTokenizer(str(folder))
    for text in ("", "the other", MESSAGES[2]["content"], "  a\n\n b "):
        ids = own.encode(text)
        assert ids == reference(text)["input_ids"] and ids[0] == 1
        assert own.decode(ids) == reference.decode(ids) == "".join(own.stream(ids))
    # a letter comes with its last byte, and a row without a token is skipped
    pieces = list(own.stream([*own.encode("\u65e5", special=False), 280, 0]))
    assert [p for p in pieces if p] == ["\u65e5", "<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        "{%- for m in messages -%}\n  {% if m.role == 'user' %}\n[{{ m['content'] | tojson }}]\n  {% continue %}\n  {% endif %}\n"
        "{{ m.content | trim }}{{ eos_token }}\n{%- endfor %}{{ bos_token }}",
        "{% for m in messages %}{% generation %}{% set seen = m.role %}{{ m.content }}{% endgeneration %}{{ seen }}\n"
        "{% endfor %}{{ messages[0] | tojson(ensure_ascii=False) }}{{ messages[0] | tojson(true, indent=1) }}"
        "{% for t in (bos_token, pad_token, unk_token) %}{{ t is defined }}{% endfor %}{{ tools is none }}",
    ],
)
def test_chat_equals_transformers(folder, template):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(template)
    reference, own = transformers.AutoTokenizer.from_pretrained(folder), FileTokenizer(str(folder))
    for messages in (MESSAGES[:1], MESSAGES):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert own.encode_chat(messages) == expected


def test_chat_template_that_fails_or_is_missing(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template of .* fails .TemplateError: roles must alternate"):
        FileTokenizer(str(folder)).encode_chat(MESSAGES)
    (folder / "chat_template.jinja").write_text("{% if false %}x{% endif %}")
    with pytest.raises(ValueError, match="makes no tokens of the conversation"):
        FileTokenizer(str(folder)).encode_chat(MESSAGES)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        FileTokenizer(str(folder)).encode_chat(MESSAGES)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for form in (CHAT, [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT}]):  # older folders
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": form}))
        assert FileTokenizer(str(folder)).template == CHAT


@pytest.mark.parametrize(
    "template",
    [
        "{% if x %}" + "[" * 100_000,
        "{{" + "(" * 5000,
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 10**8 }}",  # its tokens would take 10 GB
        "x" * 2_000_000,
        "{{ '%1000000000d' % 1 }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",  # for ever
        "{{ raise_exception('two\nlines') }}",
        "{{ '\\ud800' }}",
    ],
)
def test_hostile_chat_templates_end_in_one_line(folder, template):
    """A template is a program of a stranger. It may not take the memory, or all time."""
    (folder / "chat_template.jinja").write_text(template)
    named, before = FileTokenizer(str(folder)), machine.process_memory("VmHWM") or 0
    with pytest.raises(ValueError, match="the chat template of .* fails|surrogates not allowed") as e:
        named.encode_chat(MESSAGES)
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)
    assert (machine.process_memory("VmHWM") or 0) - before < 100 << 20


@pytest.mark.parametrize(
    "file, key, values, message",
    [
        ("tokenizer_config.json", "eos_token", (5, [1], {"content": 0.5}), "eos_token is .*must be text"),
        (
            "tokenizer_config.json",
            "chat_template",
            (5, [{"name": "default", "template": 3}]),
            "chat_template must be text",
        ),
        ("generation_config.json", "eos_token_id", ("x", [[1]], 0.5, {"a": 1}), "eos_token_id must be token ids"),
    ],
)
def test_settings_of_other_types(folder, file, key, values, message):
    (folder / "chat_template.jinja").unlink()
    for value in values:
        (folder / file).write_text(json.dumps({key: value}))
        with pytest.raises(ValueError, match=f"{file} is damaged: {message}"):
            FileTokenizer(str(folder))
    for value in (None, [5, {"name": "tools"}]):  # no template of the name "default"
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        (folder / "generation_config.json").write_text("{}")
        assert FileTokenizer(str(folder)).template is None


def test_panic_of_the_package_tokenizers_is_an_error(folder, monkeypatch):
    """Rust panics at some damaged files. PyO3 turns that into an exception that is no Exception."""
    import tokenizers

    class PanicException(BaseException):
        pass

    def from_file(path):
        raise PanicException("range end index 18446744073709551614 out of range")

    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_file=from_file))
    with pytest.raises(ValueError, match="tokenizer.json is damaged: range end index"):
        FileTokenizer(str(folder))


def test_panic_of_tiktoken_is_an_error():
    """Its pattern runs out of stack at a million white-space characters in a row."""

    class PanicException(BaseException):
        pass

    def encode_ordinary_batch(texts):
        raise PanicException("called `Result::unwrap()` on an `Err` value: StackOverflow")

    tokenizer = BPETokenizer.__new__(BPETokenizer)
    tokenizer.bpe = SimpleNamespace(encode_ordinary_batch=encode_ordinary_batch)
    with pytest.raises(ValueError, match="a million white-space characters in a row"):
        tokenizer.encode_documents(["text"])


def replaced(text, times):
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": text}] * times,
    }


SPLIT = {"type": "Split", "pattern": {"Regex": "(a|aa)+!b"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
EXTRA = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def surround(ids, texts=1):
    """A post-processor that puts tokens and repetitions around a text."""
    single = [{"SpecialToken": {"id": "A", "type_id": 0}}, *[{"Sequence": {"id": "A", "type_id": 0}}] * texts]
    special = {"A": {"id": "A", "ids": ids, "tokens": ["A"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("normalizer", replaced("aa", 60), "60 steps|as long"),  # 10^18 letters
        ("normalizer", replaced("a" * 10**6, 1), "1000000 times as long"),
        ("normalizer", replaced("a", 99), "100 steps"),
        (
            "normalizer",
            {"type": "Precompiled", "precompiled_charsmap": "////" * 9},
            "Precompiled",
        ),  # aborts the process
        ("normalizer", {"type": "Prepend", "prepend": ""}, "cannot encode a text"),  # panics
        ("decoder", {"type": "Sequence", "decoders": replaced("aa", 30)["normalizers"]}, "as long"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 30}, "as long"),
        ("pre_tokenizer", SPLIT, "cannot encode a text"),  # tries 2^40 ways, and gives up
        ("post_processor", surround([2**31]), "not in its vocabulary"),
        ("post_processor", surround([1] * 65), "65 tokens around"),
        ("post_processor", surround([1], 17), "17 times"),
        (
            "model",
            {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 10**6, 0], ["a", 0]]},
            "Unigram",
        ),  # kills the process
        (
            "model",  # kills the process
            {"type": "BPE", "vocab": {"x": 0, "a": 1}, "merges": [], "continuing_subword_prefix": "x"},
            "continuing_subword_prefix",
        ),
        ("model", {"type": "WordLevel", "vocab": {"the": 4 * 10**9}, "unk_token": "the"}, "an id of 4000000000"),
        (
            "model",
            {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "x"},
            "cannot encode a text: WordLevel error",
        ),
        ("added_tokens", [{"id": 2**31, "content": "x", **EXTRA}], "an id of"),
    ],
)
def test_steps_of_a_stranger(folder, part, value, message):
    """They are a program, too. The package tokenizers believes them."""
    file = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(file | {part: value}))
    with pytest.raises(ValueError, match=f"tokenizer.json .*({message})") as e:
        FileTokenizer(str(folder)).encode("a" * 40)
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)


def test_settings_for_batches_change_nothing(folder):
    """A tokenizer.json may say that texts are cut, or filled up to a length. A data set would lose its texts."""
    expected = FileTokenizer(str(folder)).encode_documents(["the sky " * 9, "a"])
    file = json.loads((folder / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
    file["padding"] |= {"pad_type_id": 0, "pad_token": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert FileTokenizer(str(folder)).encode_documents(["the sky " * 9, "a"]) == expected


@pytest.mark.parametrize("name", tokenizer.FILES)
def test_pipes_devices_and_huge_files(folder, name):
    """A pipe has no end. 10^12 bytes of a file with holes take no place on a disk, but in memory."""
    if not hasattr(os, "mkfifo") or name == "special_tokens_map.json":  # is copied, and not read
        pytest.skip("no pipes, or nobody reads it")
    path = folder / name
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: open(path, "w").truncate(10**12)):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ValueError, match="is a pipe or a device|is larger than"):
            FileTokenizer(str(folder))
        with pytest.raises(ValueError, match="is a pipe or a device|is larger than"):
            checkpoint.keep_tokenizer(str(folder / "kept"), {"tokenizer": "file"}, str(folder))
    path.unlink()
    path.write_text('{"model": 1, "model": 2}')
    if name.endswith(".json"):
        with pytest.raises(ValueError, match="damaged"):
            FileTokenizer(str(folder))


def test_stop_tokens(folder):
    assert FileTokenizer(str(folder)).stops == {0, 2}  # eos_token, and <|endoftext|>
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert FileTokenizer(str(folder)).stops == {0, 1, 2, 5}
    assert FileTokenizer(str(folder)).end_of_text == 2


def test_meta_names_the_vocabulary(folder, tmp_path_factory):
    own = FileTokenizer(str(folder))
    other = tmp_path_factory.mktemp("other")
    write_tokenizer(other)
    assert FileTokenizer(str(other)).meta == own.meta  # what surrounds a text does not matter
    file = json.loads((other / "tokenizer.json").read_text())
    file["model"]["vocab"]["new"] = 261
    (other / "tokenizer.json").write_text(json.dumps(file))
    assert FileTokenizer(str(other)).meta["digest"] != own.meta["digest"]
    with pytest.raises(ValueError, match="is not that of its model"):
        tokenizer_of(own.meta, str(other))
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        tokenizer_of(own.meta, str(other))
    (other / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        tokenizer_of(own.meta, str(other))
    for damaged in ({"tokenizer": "file"}, own.meta | {"vocab_size": -1}, {"tokenizer": "sentences"}, 0.5):
        with pytest.raises(ValueError, match="unknown tokenizer"):
            tokenizer.vocab_size(damaged)


def test_rows_beyond_the_tokens(folder):
    """A model may have more rows than its tokenizer has tokens. They have no text."""
    chars = tokenizer.CharTokenizer("ab")
    assert chars.decode([0, 7, 1]) == "ab" and "".join(chars.stream([0, 7, 1])) == "ab"
    own = FileTokenizer(str(folder))
    ids = own.encode("the", special=False)
    assert own.decode([*ids, 9999]) == "the" and "".join(own.stream([*ids, 9999])) == "the"


def test_tokenizer_is_kept_beside_a_checkpoint(folder, tmp_path_factory):
    own, kept = FileTokenizer(str(folder)), tmp_path_factory.mktemp("kept")
    checkpoint.keep_tokenizer(str(kept / "best"), own.meta, str(folder))  # makes the folder
    checkpoint.keep_tokenizer(str(kept), own.meta, str(folder))
    checkpoint.keep_tokenizer(str(kept), own.meta, str(kept))  # as a resumed run does
    assert tokenizer_of(own.meta, str(kept)).encode_chat(MESSAGES) == own.encode_chat(MESSAGES)
    characters = tmp_path_factory.mktemp("characters")
    checkpoint.keep_tokenizer(str(characters), {"tokenizer": "char", "chars": "abc"})
    assert not list(characters.iterdir())
    with pytest.raises(ValueError, match="has no tokenizer.json: copy it there"):
        checkpoint.keep_tokenizer(str(kept), own.meta, str(characters))
