"""
Tokenizers: characters, GPT-2's byte pairs (tiktoken downloads them), and what other models bring along, a tokenizer.json.
A data set's meta.json and a checkpoint name their tokenizer by a small dict, the meta:

    {"tokenizer": "char", "chars": "..."}
    {"tokenizer": "gpt2"}
    {"tokenizer": "file", "vocab_size": 49152, "digest": "..."}    # of the vocabulary; the file lies beside the checkpoint

Models of the Hugging Face hub are downloaded here, too, because they may be needed for their tokenizer alone.
"""

import codecs
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short names; others are org/name
GPT2 = {"tokenizer": "gpt2"}
GPT2_DIGEST = "853190d1ed1b5a46c112ce5b3dc8ae79"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
FILES += ("generation_config.json",)  # it lists the tokens that end an answer


class _Bytes:
    """A tokenizer whose tokens are bytes."""

    stops, template = frozenset(), None

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each token as it comes. A token may be a part of a letter."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield utf8.decode(self.decode_bytes([i]))
        yield utf8.decode(b"", final=True)


class CharTokenizer(_Bytes):
    """One token per character."""

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def meta(self) -> dict:
        return {"tokenizer": "char", "chars": self.chars}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(
                f"the character {e.args[0]!r} is not in this model's vocabulary of {len(self.chars)} characters"
            ) from None

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """There is no end-of-text token."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        # A model may have more rows than tokens, so that the vocabulary is a multiple of 64 or 128.
        return "".join(self.chars[i] for i in ids if i < self.vocab_size).encode()


class BPETokenizer(_Bytes):
    """GPT-2's byte pairs. tiktoken downloads them at the first use."""

    vocab_size = 50257
    end_of_text = 50256
    stops = frozenset([50256])
    meta = GPT2

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise ValueError(
                f"cannot download GPT-2's byte pairs ({type(e).__name__}): connect once, or copy a cache of tiktoken's "
                "from a machine that has it and set TIKTOKEN_CACHE_DIR to it"
            ) from None
        # tiktoken keeps its table in Rust. The Python table that it was made from only takes 8 MB.
        self.bpe._mergeable_ranks = None
        gc.collect()

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special="all")

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """An end-of-text token follows each. <|endoftext|> inside of one is plain text."""
        try:
            encoded = self.bpe.encode_ordinary_batch(texts)
        except BaseException as e:
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(
                "GPT-2's byte pairs cannot encode a document with a million white-space characters in a row: remove them"
            ) from None
        return [ids + [self.end_of_text] for ids in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        # A model may have more rows than tokens, so that the vocabulary is a multiple of 64 or 128.
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])


class FileTokenizer:
    """The tokenizer.json of a folder. Raises ValueError if it is missing or damaged."""

    def __init__(self, folder: str):
        from tokenizers import Tokenizer

        self.folder, path = folder, os.path.join(folder, "tokenizer.json")
        if not os.path.exists(path):
            raise ValueError(f"{folder} has no tokenizer.json: copy it there from the model that it comes from")
        file = _read_json(folder, "tokenizer.json")
        with self._checked("is damaged"):
            _check_steps(file)
            self.tokenizer = Tokenizer.from_file(path)
            _check_ids(file, self.tokenizer)
        del file
        config = _read_json(folder, "tokenizer_config.json")
        kinds = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
        self.special = {kind: _content(config[kind]) for kind in kinds if config.get(kind) is not None}
        for key, token in self.special.items():
            if not isinstance(token, str):
                raise ValueError(f"{folder}/tokenizer_config.json is damaged: {key} is {token!r:.50}, and must be text")
        known, end = self.tokenizer.token_to_id, self.special.get("eos_token", "")
        ends = ("<|endoftext|>", "<|end_of_text|>", end)  # an instruct model's eos ends an answer
        self.end_of_text = next((known(t) for t in ends if known(t) is not None), None)
        stops = _read_json(folder, "generation_config.json").get("eos_token_id")
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        if not all(type(token) is int for token in stops):
            raise ValueError(f"{folder}/generation_config.json is damaged: eos_token_id must be token ids")
        self.stops = frozenset([*stops, known(end), self.end_of_text]) - {None}
        self.template = config.get("chat_template")
        if isinstance(self.template, list):  # several by name
            named = [t for t in self.template if isinstance(t, dict) and t.get("name") == "default"]
            self.template = named[0].get("template") if named else None
        path = os.path.join(folder, "chat_template.jinja")
        if os.path.exists(path):
            self.template = read_small(path).decode("utf-8", "replace")
        if not isinstance(self.template, str | None):
            raise ValueError(f"{folder}/tokenizer_config.json is damaged: chat_template must be text")
        self._vocabulary = None

    @contextmanager
    def _checked(self, what):
        """The package tokenizers raises plain Exceptions, and panics of Rust, which are BaseExceptions. Both become
        ValueError."""
        try:
            yield
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            reason = " ".join(str(e)[:300].split())
            raise ValueError(f"{os.path.join(self.folder, 'tokenizer.json')} {what}: {reason}") from None

    @property
    def meta(self) -> dict:
        if self._vocabulary is None:
            vocabulary = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
            digest = hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=16).hexdigest()
            size = 1 + max((i for _, i in vocabulary), default=-1)
            self._vocabulary = {"tokenizer": "file", "vocab_size": size, "digest": digest}
        return GPT2 if self._vocabulary["digest"] == GPT2_DIGEST else self._vocabulary

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.meta)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """special: with what the model expects around a text, such as Llama's first token. Raises ValueError for half a
        surrogate pair, which is no character."""
        text.encode()
        with self._checked("cannot encode a text"):
            return self.tokenizer.encode(text, add_special_tokens=special).ids

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """An end-of-text token follows each. Special tokens inside of one are plain text."""
        self.tokenizer.encode_special_tokens = True
        with self._checked("cannot encode a text"):
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=True)
        self.tokenizer.encode_special_tokens = False
        end = [] if self.end_of_text is None else [self.end_of_text]
        return [e.ids + (end if e.ids[-1:] != end else []) for e in encoded]

    def special_ids(self) -> dict[str, int | None]:
        """{"bos_token_id", "eos_token_id"}, as a config.json has them."""
        names = ("bos_token", "eos_token")
        return {f"{name}_id": self.tokenizer.token_to_id(self.special.get(name, "")) for name in names}

    def byte_pairs(self) -> tuple[list[str], list[str], set[int], str]:
        """(tokens by id, merges, ids of special tokens, llama.cpp's name of the way to cut text into words).

        Raises ValueError for a tokenizer that does not merge bytes, or cuts text in a way that is not known here.
        """
        file = json.loads(self.tokenizer.to_str())
        cut = json.dumps(file["pre_tokenizer"])
        patterns = {"{1,3}": "llama-bpe", "\\\\p{N}": "qwen2", "individual_digits": "smollm", "": "gpt-2"}
        pre = next(name for pattern, name in patterns.items() if pattern in cut)
        if file["model"]["type"] != "BPE" or file["model"].get("byte_fallback") or "ByteLevel" not in cut:
            raise ValueError(f"the tokenizer of {self.folder} does not merge bytes, as a .gguf file of ours has it")
        by_id = {i: t for t, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        tokens = [by_id.get(i, f"[PAD{i}]") for i in range(self.vocab_size)]
        merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
        return tokens, merges, {t["id"] for t in file["added_tokens"] if t["special"]}, pre

    def decode(self, ids: Iterable[int]) -> str:
        with self._checked("cannot decode tokens"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each token as it comes. A token may be a part of a letter."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for i in ids:
            with self._checked("cannot decode tokens"):
                piece = stream.step(self.tokenizer, i) or ""
            yield piece

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation and of the beginning of the answer. messages: {"role", "content"} each.

        Raises ValueError without a chat template, and if the template refuses the conversation or leaves nothing of it.
        """
        if self.template is None:
            raise ValueError(f"{self.folder} has no chat template, so it is no instruct model: leave chat out")
        try:
            text = _render(
                self.template,
                dict(messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.special),
            )
        except ValueError as e:
            raise ValueError(f"the chat template of {self.folder} fails ({e})") from None
        ids = self.encode(text, special=False)
        if not ids:
            raise ValueError(f"the chat template of {self.folder} makes no tokens of the conversation: leave chat out")
        return ids


# --- chat templates ---

TEMPLATE_SECONDS, TEMPLATE_BYTES = 5, 1 << 29  # of processor time and of memory


def _render(template: str, values: dict) -> str:
    """The text of a chat template. A template is the program of a stranger: jinja's sandbox keeps it from files, and a
    process of its own bounds its time and memory. Raises ValueError if it fails."""
    command = [sys.executable, os.path.abspath(__file__)]
    work, limit = json.dumps([template, values]).encode(), 6 * TEMPLATE_SECONDS  # others may use the processor, too
    try:
        done = subprocess.run(command, input=work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit)
        text, error = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # it was killed, or ended without an answer
        text, error = "", f"it takes more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES >> 20} MiB"
    if error is not None:
        raise ValueError(error)
    return text


def _render_from_stdin():
    """The process of `_render`. Reads [template, values], and writes [text, error or None]."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no limits, and the limit may be lower already
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (TEMPLATE_BYTES, TEMPLATE_BYTES))
    text, error, work = "", None, sys.stdin.buffer.read()
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import Scope
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what a model learns to say. It changes no text."""

            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                return Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

        def refuse(message):
            raise TemplateError(message)

        def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        # The environment that transformers gives to a template.
        jinja = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        jinja.filters["tojson"] = to_json
        jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        template, values = json.loads(work)
        text = jinja.from_string(template).render(**values)
        size = len(json.dumps(values["messages"]))
        if len(text) > 2**20 + size:  # its tokens would take a hundred times the memory
            text, error = "", f"it makes {len(text):,} characters of a conversation of {size:,}"
    except Exception as e:  # a program may fail in any way
        error = " ".join(f"{type(e).__name__}: {str(e)[:500]}".split())
    print(json.dumps([text, error]))


# --- files of a tokenizer ---


def _check_steps(file):
    """Raises ValueError for steps of a tokenizer.json that could take all memory or end the process. They are a
    stranger's program: 60 steps that double a text make 10^18 letters of one."""
    if (kind := file.get("model", {}).get("type")) == "Unigram":  # overflows the stack at a long token
        raise ValueError(f"its model is {kind}; known are those of GPT-2, Llama and Qwen2, which merge pairs")
    if file.get("model", {}).get("continuing_subword_prefix"):  # of one byte, it aborts the process
        raise ValueError("its model has a continuing_subword_prefix, which byte-level tokenizers leave empty")
    for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        growth, steps, repeats, waiting = 1, 0, 0, [file.get(key)]
        while waiting:
            step = waiting.pop()
            if isinstance(step, list):
                waiting += step
            if not isinstance(step, dict):
                continue
            kind, texts = step.get("type"), [step.get(name) for name in ("content", "prepend", "replacement")]
            if kind == "Precompiled":  # trusts sizes in the file, and can abort the process
                raise ValueError(f"its {key} has a step {kind}, which is of Unigram models")
            steps += kind is not None
            repeats += "Sequence" in step  # in the template of a post-processor
            for factor in [2 if kind == "ByteLevel" else 1, *(len(t) for t in texts if isinstance(t, str) and t)]:
                growth *= factor
            waiting += step.values()
        if growth > 64 or steps > 64 or repeats > 16:
            longer = max(growth, repeats)
            raise ValueError(
                f"its {key} has {steps} steps and can make a text {longer} times as long, which is too much"
            )


def _check_ids(file, tokenizer):
    """Raises ValueError for token ids that have no token, or are far beyond the number of tokens, as lists have a place
    for each id."""
    ids = [*file["model"]["vocab"].values(), *(token["id"] for token in file.get("added_tokens") or ())]
    if max(ids, default=0) > 2 * len(ids) + 2**16:
        raise ValueError(f"it has {len(ids)} tokens, but an id of {max(ids)}")
    if (count := tokenizer.num_special_tokens_to_add(False)) > 64:
        raise ValueError(f"it puts {count} tokens around each text")
    tokenizer.no_padding()  # these serve training on batches; transformers turns them off, too
    tokenizer.no_truncation()
    for i in tokenizer.encode("").ids:
        if tokenizer.id_to_token(i) is None:
            raise ValueError(f"it puts the token {i} around each text, which is not in its vocabulary")


def read_small(path: str) -> bytes:
    """The content of a file that describes a model or a data set. Raises ValueError for a pipe or a device, and for
    more than 256 MiB."""
    require_file(path)
    if os.path.getsize(path) > 2**28:
        raise ValueError(f"{path} is larger than 256 MiB, the limit of such files")
    with open(path, "rb") as f:
        return f.read()


def require_file(path: str) -> None:
    """Raises ValueError for a folder, and for a pipe or a device, which may have no end. A path that does not exist is no
    error here."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'a pipe or a device'}, and must be a file")


def _read_json(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        content = json.loads(read_small(path).decode(), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return content


def _unique(pairs):
    """A dict. A key that is there twice is an error, because readers differ in the value that they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise json.JSONDecodeError("a key is there twice", "", 0)
    return content


def _content(token):
    """Text of a special token, which may be written as a dict."""
    return token.get("content") if isinstance(token, dict) else token


Tokenizer = CharTokenizer | BPETokenizer | FileTokenizer


def tokenizer_of(meta: dict, folder: str | None = None) -> Tokenizer:
    """The tokenizer that meta.json or a checkpoint describes. folder: the checkpoint, or a name on the hub, which keeps
    its tokenizer.json."""
    kind = meta.get("tokenizer") if isinstance(meta, dict) else None
    if kind == "file" or meta == GPT2 and folder is not None:
        folder = local_folder(folder, FILES)
        if kind == "file" or os.path.exists(os.path.join(folder, "tokenizer.json")):
            tokenizer = FileTokenizer(folder)
            if kind == "file" and tokenizer.meta != meta:
                raise ValueError(f"the tokenizer.json of {folder} is not that of its model: copy the right one there")
            return tokenizer
    if meta == GPT2:
        return BPETokenizer()
    if kind != "char" or not isinstance(meta.get("chars"), str):
        raise ValueError("unknown tokenizer: expected one of characters, of GPT-2's byte pairs, or a tokenizer.json")
    return CharTokenizer(meta["chars"])


def named(name: str) -> BPETokenizer | FileTokenizer:
    """The tokenizer of a setting --tokenizer: "gpt2", a folder with a tokenizer.json, or a name on the hub. "gpt2" is never
    a folder, because it is the default."""
    if name == "gpt2":
        return BPETokenizer()
    if not os.path.isdir(name) and not is_hub_name(name):
        raise ValueError(
            f"no folder {name}: pass gpt2, a folder with a tokenizer.json, or a name on the hub (org/name)"
        )
    return FileTokenizer(local_folder(name, FILES))


def vocab_size(meta: dict) -> int:
    """Number of tokens. Downloads nothing."""
    if isinstance(meta, dict) and meta.get("tokenizer") == "file":
        if type(meta.get("vocab_size")) is not int or meta["vocab_size"] < 1 or not isinstance(meta.get("digest"), str):
            raise ValueError(f"unknown tokenizer: {meta}")
        return meta["vocab_size"]
    return BPETokenizer.vocab_size if meta == GPT2 else tokenizer_of(meta).vocab_size


def gpt2_files(context: int = 1024) -> dict[str, str]:
    """{name: content} of tokenizer_config.json and tokenizer.json of GPT-2's byte pairs, made from tiktoken's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = gpt2_vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[-1], special=True, normalized=False)])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokens[-1])
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, **special}
    return {"tokenizer_config.json": json.dumps(config, indent=1), "tokenizer.json": tokenizer.to_str(pretty=True)}


def gpt2_vocabulary() -> tuple[list[str], list[str]]:
    """GPT-2's (tokens by id, merges by rank), in the letters of its files: a printable byte is its own letter, the
    other bytes are the letters from 256 on."""
    bpe = BPETokenizer()
    end = bpe.end_of_text
    tokens = [bpe.decode_bytes([i]) for i in range(end)]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    rank, merges = {t: i for i, t in enumerate(tokens)}, []

    def spelled(token):
        return "".join(letters[b] for b in token)

    for token in tokens:
        parts = [bytes([b]) for b in token]
        # A token is the merge of two halves. Merging all lower ranks leaves these two.
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], end))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spelled, parts)))
    return [*map(spelled, tokens), "<|endoftext|>"], merges


# --- the hub ---


def is_hub_name(name: str) -> bool:
    """Is it gpt2, gpt2-medium, ..., or org/name? An existing folder of that name takes precedence."""
    return not os.path.isdir(name) and (name in HUB or bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)))


def local_folder(name: str, files: Iterable[str], required: Iterable[str] = (), offline: bool = False) -> str:
    """The folder itself, or that of the hub's cache, filled at the first use with `files` (patterns).

    Raises ValueError if it cannot be downloaded, or if none of the patterns `required` is there.
    """
    if not is_hub_name(name):
        return name
    from huggingface_hub import snapshot_download

    repository = f"openai-community/{name}" if name in HUB else name
    try:
        folder = snapshot_download(repository, allow_patterns=list(files), local_files_only=offline)
        for choices in required:
            if not any(os.path.exists(os.path.join(folder, file)) for file in choices):
                raise FileNotFoundError(f"there is no {' or '.join(choices)}")
        return folder
    except Exception as e:  # of requests, httpx or the hub, by version and by the state of the network
        place = "" if name in HUB else f"there is no folder {name}, and "
        raise ValueError(
            f"{place}cannot download {name} from the Hugging Face hub ({type(e).__name__}): check the name and the "
            "network, or pass a folder that holds its config.json and model.safetensors"
        ) from None


if __name__ == "__main__":
    _render_from_stdin()
