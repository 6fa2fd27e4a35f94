"""
Settings of a script. A dataclass gives the keys, their types and defaults. Config files and the command line override
them:

    python train.py config/x.py --key=value --key value     # later settings win
    python train.py --help

A field whose type is a dataclass, such as `pot: PoTConfig | None`, is set by its parts: --pot_bits=4, or --pot=None.
The comment behind a field, or in the lines above it, is its help text. A static method `inherited` of the dataclass may
give other defaults: inherited({key: value given}) returns {field: value}, nested dataclasses as dicts.
"""

import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

T = TypeVar("T")
# Control characters, which terminals obey, line separators, and bytes that are not UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def run(main: Callable[[T], object], settings: type[T]) -> None:
    """Calls main with the settings of the command line. Bad input, and sizes beyond the memory, end with one line on
    stderr and exit status 2."""
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            main(configure(settings, sys.argv[1:]))
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError, MemoryError, OverflowError, RecursionError, RuntimeError) as e:
            message = str(e)
            if isinstance(e, OSError) and e.filename:
                message = f"{e.strerror}: {e.filename}"
            elif not isinstance(e, (ValueError, OSError)):
                # torch reports a failed allocation as a RuntimeError. Any other one is our mistake.
                if type(e) is RuntimeError and not re.search("alloc|memory|overflow", message, re.IGNORECASE):
                    raise
                message = f"{type(e).__name__}: {message or 'not enough memory'}; are all sizes as you mean them?"
            message = re.sub("[ \t\r\n]+", " ", message.strip())
            message = CONTROL.sub(lambda match: repr(match[0])[1:-1], message)
            message = message if len(message) <= 1000 else f"{message[:1000]} ..."
            print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
            sys.exit(2)


class Output:
    """Standard output or standard error. A script finishes its work even if nobody reads these any more, as after
    `| head -1`."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream  # None: closed before Python started
        self.broken = False  # has the reader left?

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self._try(self.stream.write, text)
        except UnicodeEncodeError as e:  # the terminal takes ASCII only, for example
            self._try(self.stream.write, text.encode(e.encoding, "backslashreplace").decode(e.encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call, *arguments):
        try:
            call(*arguments)
        except OSError:  # also a full disk
            self.broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def configure(settings: type[T], argv: list[str]) -> T:
    """An instance of the dataclass `settings`. Config files and --key=value of argv override its defaults.

    Raises ValueError for an unknown key, with the nearest known key, and for a value of the wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(settings))
        sys.exit(0)
    keys, values, args = _keys(settings), [], list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            values += _read_config_file(arg, keys)
            continue
        key, given, text = arg[2:].partition("=")
        _known(key, keys, "--")
        if not given:
            if not args:
                raise ValueError(f"--{key} needs a value: --{key}=...")
            text = args.pop(0)
        values.append((key, _parse(key, text, keys[key])))
    if hasattr(settings, "inherited"):
        values = _inherited(settings.inherited(dict(values)), keys) + values
    return _build(settings, values)


def check_minimum(settings: object, **least: float) -> None:
    """Raises ValueError for a setting below its least value. A setting of None passes."""
    for key, value in least.items():
        if getattr(settings, key) is not None and not getattr(settings, key) >= value:
            raise ValueError(f"{key}={getattr(settings, key)} must be at least {value}")


def check_names(settings: object, *keys: str) -> None:
    """Raises ValueError for a name with a control character. Results keep the name, and terminals show it."""
    for key in keys:
        if CONTROL.search(getattr(settings, key) or ""):
            raise ValueError(f"{key}={getattr(settings, key)!r} holds a control character: choose another name")


def _keys(cls, prefix=""):
    """{key: (type, may it be None, default)} of every field and every part of a field."""
    keys = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        optional, (kind,) = type(None) in options, [o for o in options if o is not type(None)]
        if dataclasses.is_dataclass(kind):
            keys[prefix + field.name] = (type(None), True, field.default)
            keys |= _keys(kind, f"{prefix}{field.name}_")
        else:
            keys[prefix + field.name] = (kind, optional, field.default)
    return keys


def _inherited(fields, keys):
    """(key, value) of fields and of the parts of nested dataclasses. Keys of another version are left out."""
    parts = {key: value for key, value in fields.items() if not isinstance(value, dict)}
    for name, nested in fields.items():
        parts |= {f"{name}_{key}": value for key, value in nested.items()} if isinstance(nested, dict) else {}
    return [(key, _checked(key, value, keys[key])) for key, value in parts.items() if key in keys]


def _build(settings, values):
    # In the given order: --pot=None undoes an earlier --pot_bits, and the other way round.
    kinds = {
        f.name: [o for o in typing.get_args(f.type) if dataclasses.is_dataclass(o)]
        for f in dataclasses.fields(settings)
    }
    fields = {}
    for key, value in values:
        nested = next((n for n, kind in kinds.items() if kind and key.startswith(n + "_")), None)
        if nested:
            fields[nested] = (fields.get(nested) or {}) | {key.removeprefix(nested + "_"): value}
        else:
            fields[key] = value
    for name, kind in kinds.items():
        if kind and fields.get(name) is not None:
            fields[name] = kind[0](**fields[name])
    return settings(**fields)


# What other projects call a setting, where the spelling leads to another one
NAMES = {
    "learning_rate": ("lr", "max_lr"),
    "max_iters": ("epochs", "num_epochs", "iters", "iterations", "steps", "max_steps", "num_steps"),
    "batch_size": ("bs", "bsz", "batch", "micro_batch_size"),
    "gradient_accumulation_steps": ("grad_accum", "accumulation_steps", "grad_acc"),
    "block_size": ("context", "context_length", "ctx", "n_ctx", "seq_len", "seq_length", "max_length"),
    "warmup_iters": ("warmup", "warmup_steps"),
    "weight_decay": ("wd", "decay"),
    "eval_interval": ("eval_steps", "eval_every", "save_steps"),
    "n_layer": ("layers", "num_layers", "depth"),
    "n_head": ("heads", "num_heads"),
    "n_embd": ("width", "dim", "hidden_size", "d_model"),
    "init_from": ("model", "checkpoint", "resume", "ckpt"),
    "ckpt": ("model", "checkpoint", "init_from"),
    "dataset": ("data", "data_dir"),
    "input": ("data", "file", "text"),
    "out_dir": ("out", "output", "output_dir"),
    "name": ("out", "out_dir", "dataset"),
    "pot_bits": ("bits", "w_bits", "nbits"),
    "pot_group_size": ("group_size", "groupsize"),
    "max_new_tokens": ("length", "num_tokens", "n_tokens", "max_tokens"),
    "wandb_log": ("wandb",),
}


def _known(key, keys, shown=""):
    if key not in keys:
        near = [k for k, names in NAMES.items() if k in keys and key in names]
        near += difflib.get_close_matches(key, keys, n=1, cutoff=0)
        hint = f"did you mean {shown}{near[0]}? --help lists all" if near else "this script takes none"
        raise ValueError(f"unknown key {shown}{key}: {hint}")


def _parse(key, text, known):
    kind, optional, _ = known
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--{key}={text!r} is not UTF-8 text: correct it") from None
    if optional and text in ("None", "none"):
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = kind(text) if kind in (int, float, str) else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError(f"--{key}={text}: expected {_type_name(known)}")
    return _checked(f"--{key}", value, known)


def _type_name(known):
    kind, optional, _ = known
    names = {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list, by a config file",
    }
    name = names.get(kind, "None; set its parts")
    return name + (" or None" if optional and kind is not type(None) else "")


def _read_config_file(path, keys):
    if not os.path.isfile(path):
        raise ValueError(f"no config file {path}: pass an existing .py file, or settings as --key=value")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise ValueError(f"{path} does not run: {e!r}") from None
    values = []
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        _known(key, keys, f"in {path}: ")
        values.append((key, _checked(f"{path}: {key}", value, keys[key])))
    return values


def _checked(name, value, known):
    kind, optional, _ = known
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value} is beyond 64 bits")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind and not (optional and value is None):
        raise ValueError(f"{name}={value!r}: expected {_type_name(known)}")
    return value


def _help(settings):
    parts = [(f"{f.name}_", o) for f in dataclasses.fields(settings) for o in typing.get_args(f.type)]
    comments = _comments(settings)
    for prefix, part in parts:
        if dataclasses.is_dataclass(part):
            comments |= {prefix + name: comment for name, comment in _comments(part).items()}
    lines = [f"usage: python {os.path.basename(sys.argv[0])} [config.py ...] [--key=value ...]", ""]
    for key, (_, _, default) in _keys(settings).items():
        default = repr(default)[1:-1] if isinstance(default, str) else default  # shows a newline as \n
        lines.append(f"  --{key}={default}".ljust(36) + "  " + comments.get(key, ""))
    return "\n".join(lines)


def _comments(cls):
    """{field: its comment}, behind the field or in the lines above it. A line "# --- ..." is a heading, no comment."""
    comments, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        line = line.strip()
        if field := re.match(r"(\w+):[^#]*(?:# *(.*))?$", line):
            comments[field[1]] = field[2] or " ".join(above)
        above = [*above, line.strip("# ")] if line.startswith("#") and not line.startswith("# ---") else []
    return comments
