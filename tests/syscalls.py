"""
Makes every system call fail that a script makes on the files that it writes: each rename, write, fsync, unlink, open,
mkdir and so on returns EIO and ENOSPC, and kills the script, in turn, once each. strace does it.

    python tests/syscalls.py                       # all writers
    python tests/syscalls.py --writer=train        # one of them

A trace without faults gives the calls and all versions of all files. It also tells whether a file is on the disk (fsync)
before it takes its name, and its folder at the end. After each fault
- every file of the outputs is one of these versions, and together they load as one state, the old or the new;
- a failed call ends with one line of error and a status that is not 0, without temporary files, or changes nothing;
- the same command again, or a resumed run, succeeds, and leaves the bytes of a run without faults.

The scripts run in forks of this process, because importing torch takes longer than they do. strace attaches to a fork
and counts the calls of its main thread.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import checkpoint  # noqa: E402
import configurator  # noqa: E402
import dataset  # noqa: E402
import tokenizer  # noqa: E402

FAULTS = ("EIO", "ENOSPC", "KILL")
LIMIT = 900  # seconds for a script; then it hangs
CALLS = "open,openat,creat,write,writev,pwrite64,pwritev,fsync,fdatasync,sync_file_range,ftruncate,truncate,fallocate"
CALLS += ",rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,chmod,fchmod,fchmodat,link,linkat,symlink"
CALLS += ",symlinkat,flock,sendfile,copy_file_range,msync"


@dataclass
class Settings:
    writer: str | None = None  # train, resume, ptq, eval, ..., or several with commas between them; None: all
    faults: int | None = None  # at most this many faults for each writer, evenly among all; None: all


@dataclass
class Writer:
    """A script that writes files."""

    name: str
    argv: list[str]  # of the script
    outputs: list[str]  # files and folders that it writes, in its working folder
    script: Callable[[], object]  # the module, or another object with main and Settings
    check: Callable[[Path], object]  # raises ValueError unless the outputs load, together, or are not there
    again: Callable[[Path], list[str] | None] | None = None  # argv after a fault; None: there is nothing to do
    same: list[str] | None = None  # files that the second command leaves as a run without faults does; None: all
    lines: tuple[str, ...] = ()  # names of files that only grow
    old: Callable[[Path], object] = lambda folder: None  # writes what is there before
    environment: dict[str, str] = field(default_factory=dict)
    compiler: bool = False  # fail the compiler's calls, not its own
    models: bool = True  # needs models as inputs
    durable: bool = True  # must outlive a loss of power


@dataclass
class Call:
    """A system call of a trace."""

    name: str
    number: int  # the first of this name is 1
    paths: list[str]
    line: str


# --- run a script under strace ---


def start(writer: Writer, argv: list[str], folder: Path, loaded: int, go: int, log: str | None) -> None:
    """Runs the script in this process, which is a fork, and ends the process. loaded, go: pipes; the script is loaded, and
    waits to go. log: file for the versions of files."""
    os.chdir(folder)
    with open(os.devnull) as null, open(f"{folder}.out", "w") as out:
        os.dup2(null.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = argv
    os.environ.update({key: value.format(folder=folder) for key, value in writer.environment.items()})
    time.time = lambda: 1.7e9  # a run takes no time, so that two runs write the same bytes
    if log:
        replace, rename = os.replace, os.rename

        def logged(act):
            def call(source, target, **options):
                versions = read_versions(Path(source), Path(target))
                act(source, target, **options)
                with open(log, "a") as f:
                    f.write("".join(f"{json.dumps([os.path.abspath(p), d])}\n" for p, d in versions))

            return call

        os.replace, os.rename = logged(replace), logged(rename)
    status = 0
    try:
        script = writer.script()
        for module in (script, sys.modules.get("train")):
            if hasattr(module, "peak_memory"):
                module.peak_memory = lambda device: 0
        for name in ("draw_training", "draw_sweep"):  # a picture takes more time than everything else
            setattr(sys.modules.get("extras.plot", script), name, write_picture)
        os.write(loaded, b"x")
        os.read(go, 1)  # until strace is attached, so that it counts none of the calls above
        signal.alarm(LIMIT)
        configurator.run(script.main, script.Settings)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def write_picture(*arguments) -> None:
    checkpoint.write(arguments[-1], lambda temporary: Path(temporary).write_bytes(b"a picture"))


def read_versions(source: Path, target: Path) -> list[tuple[str, str]]:
    """(path below target, digest) of the files that a rename of source to target brings."""
    if source.is_dir():
        return [(str(target / p.relative_to(source)), digest(p)) for p in source.rglob("*") if p.is_file()]
    return [(str(target), digest(source))]


def run(writer: Writer, argv: list[str], folder: Path, fault: list[str] | None = None, log: str | None = None):
    """Runs the script in a fork. fault: options of strace; None: without strace. Returns (status, output, calls)."""
    (wait_loaded, loaded), (wait_go, go), file = os.pipe(), os.pipe(), Path(f"{folder}.trace")
    options = ["-y", "-s", "0", "-o", str(file), "-e", f"trace={CALLS}", *(fault or [])]
    file.write_text("")
    if writer.compiler:
        strace = "" if fault is None else f"strace -f -P $out {' '.join(options)}"
        find = 'for a; do [ "$last" = -o ] && out=$a; last=$a; done; [ "$out" ] || exec g++ "$@"'
        (folder / "c++").write_text(f'#!/bin/sh\n{find}\nexec {strace} g++ "$@"\n')
        (folder / "c++").chmod(0o700)
    pid = os.fork()
    if not pid:
        os.close(wait_loaded)
        os.close(go)
        try:
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: any process may attach
            start(writer, argv, folder, loaded, wait_go, log)
        finally:
            os._exit(99)
    os.close(loaded)
    os.close(wait_go)
    os.read(wait_loaded, 1)
    os.close(wait_loaded)
    strace = None
    if fault is not None and not writer.compiler:
        strace = subprocess.Popen(["strace", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        line = strace.stderr.readline()
        if "attached" not in line:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise ValueError(f"strace cannot attach to a process: {line}")
    os.write(go, b"x")
    os.close(go)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if strace:
        strace.communicate()
    return status, Path(f"{folder}.out").read_text(errors="replace"), calls_of(file.read_text(), str(folder))


def calls_of(text: str, cwd: str) -> list[Call]:
    """The system calls of a trace. Each process, if there are several, counts its own."""
    counts, calls = Counter(), []
    for line in text.splitlines():
        process, name, arguments = re.match(r"(\d* *)(\w*)(.*)", line).groups()
        if not arguments.startswith("("):
            continue
        counts[process, name] += 1
        at, paths = cwd, []
        for directory, path in re.findall(r'(?:\d+|AT_FDCWD)<([^>]*)>|"((?:[^"\\]|\\.)*)"', arguments.split(") = ")[0]):
            if path:
                paths.append(os.path.normpath(os.path.join(at, path)))
            at = directory or at
            if directory and not name.endswith(("at", "at2")):
                paths.append(directory)
        calls.append(Call(name, counts[process, name], paths, line.strip()))
    return calls


def concerns(call: Call, roots: list[str]) -> bool:
    return any(p == r or p.startswith(r + "/") for p in call.paths for r in roots)


# --- what must hold ---


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def files_of(writer: Writer, folder: Path) -> dict[str, Path]:
    """The files of the outputs, by their names in the working folder."""
    paths = [p for o in writer.outputs for p in [folder / o, *sorted((folder / o).rglob("*"))] if p.is_file()]
    return {str(p.relative_to(folder)): p for p in paths}


def not_durable(calls: list[Call], roots: list[str], lines: tuple[str, ...]) -> list[str]:
    """What a loss of power may take from a finished run: files that took their names, or were closed, before they were on
    the disk, and folders that are not on the disk at the end."""
    dirty, folders, problems = set(), set(), []
    for call in calls:
        if not concerns(call, roots) or re.search(r"\) += -", call.line):
            continue
        name, paths = call.name, call.paths
        created = name in ("openat", "open", "creat") and "O_CREAT" in call.line
        if created or name.startswith(("write", "pwrite", "ftruncate", "sendfile", "copy_file_range")):
            dirty.add(paths[0])
        if name in ("fsync", "fdatasync"):
            dirty.discard(paths[0])
            folders.discard(paths[0])
        if created or name.startswith(("mkdir", "unlink", "rename")):
            folders |= {os.path.dirname(p) for p in paths}
        if name.startswith("unlink"):
            dirty.discard(paths[0])
        if name.startswith(("rmdir", "unlink")):
            folders.discard(paths[0])
        if name.startswith("rename"):
            source, target = paths
            if source in dirty and target.endswith(".tmp"):  # not its name yet
                dirty = dirty - {source} | {target}
            if unsaved := [p for p in dirty | folders if p == source or p.startswith(source + "/")]:
                problems.append(f"renamed before fsync: {', '.join(unsaved)} to {target}")
            dirty = {p for p in dirty if p not in unsaved}
            folders = {p for p in folders if p not in unsaved}
    problems += [f"no fsync after the last write: {p}" for p in dirty if not p.endswith(lines or "/")]
    gone = [
        f"no fsync of the folder after the last change: {p}"
        for p in folders
        if any(p == r or p.startswith(r + "/") for r in roots)
    ]
    return problems + gone


def end(writer: Writer, folder: Path, argv: list[str] | None, after: dict[str, str]) -> list[str]:
    """Runs the second command. Returns what is wrong after it. after: digests of the files of a run without faults."""
    problems = []
    if argv:
        status, text, _ = run(writer, argv, folder)
        if status:
            problems.append(f"the second command fails with status {status}: {text[-300:]!r}")
    try:
        writer.check(folder)
    except Exception as e:
        problems.append(f"the second command leaves what is not whole: {type(e).__name__}: {e}")
    present = files_of(writer, folder)
    wrong = [n for n in writer.same or after if n not in present or digest(present[n]) != after[n]]
    return problems + [f"{name} differs after the second command" for name in wrong]


def test(writer: Writer, base: Path, most: int | None) -> tuple[Counter, list[str]]:
    """All faults of a writer. Returns counts and findings."""
    counts, findings = Counter(), []
    template, folder, log = base / "template", base / "work", f"{base}/versions.jsonl"
    shutil.copytree(inputs, template)
    alone(lambda: writer.old(template))
    roots = [str(folder / o) for o in writer.outputs]
    shutil.copytree(template, folder)
    versions = {name: {digest(path)} for name, path in files_of(writer, folder).items()}
    status, text, _ = run(writer, writer.argv, folder, log=log)
    if status:
        raise ValueError(f"{writer.name} fails without a fault: {text}")
    writer.check(folder)
    files = files_of(writer, folder)
    after = {name: digest(path) for name, path in files.items()}
    for line in open(log) if os.path.exists(log) else ():
        path, version = json.loads(line)
        versions.setdefault(os.path.relpath(path, folder), set()).add(version)
    for name, version in after.items():
        versions.setdefault(name, set()).add(version)
    shutil.rmtree(folder)
    shutil.copytree(template, folder)
    calls = run(writer, writer.argv, folder, [])[2]
    findings += not_durable(calls, roots, writer.lines) if writer.durable else []

    known = set()
    plan = [(call, fault) for call in calls if concerns(call, roots) for fault in FAULTS]
    counts["calls"] = len({(c.name, c.number) for c, _ in plan})
    counts["kinds"] = " ".join(f"{n} {k}" for k, n in sorted(Counter(c.name for c, f in plan if f == "KILL").items()))
    if most is not None and most < len(plan):
        plan = [plan[i * len(plan) // most] for i in range(most)]
    for i, (call, fault) in enumerate(plan):
        if i % 50 == 0:
            print(f"{writer.name}: {i} of {len(plan)} faults, {len(findings)} findings", file=sys.stderr, flush=True)
        action = "signal=KILL" if fault == "KILL" else f"error={fault}"
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        options = ["-e", f"inject={call.name}:{action}:when={call.number}"]
        status, text, hit = run(writer, writer.argv, folder, options)
        counts[fault] += 1
        problems = []
        hit = [c for c in hit if (c.name, c.number) == (call.name, call.number)]
        if not any(concerns(c, roots) for c in hit) and not (writer.compiler and hit):
            problems.append(f"the fault hit another call: {hit[-1:]}")
        present = files_of(writer, folder)
        for name, path in present.items():
            grows = name.endswith(writer.lines or "/")
            torn = [line for line in path.read_text().splitlines()[:-1] if not line.startswith("{")] if grows else []
            if torn:
                problems.append(f"{name} has broken lines before the last: {torn}")
            temporary = name not in versions
            if not grows and not temporary and digest(path) not in versions[name]:
                problems.append(f"{name} is neither an old nor a new version")
            if temporary and fault != "KILL" and not call.name.startswith(("unlink", "rmdir")):
                problems.append(f"{name} is left behind")
        try:
            writer.check(folder)
        except Exception as e:
            problems.append(f"the outputs are not whole: {type(e).__name__}: {e}")
        whole = {n: digest(p) for n, p in present.items()}
        if fault != "KILL":
            error = [line for line in text.splitlines() if ": error: " in line]
            if "Traceback" in text:
                problems.append(f"a traceback: {text.strip().splitlines()[-1]}")
            elif status == 0 and any(
                whole.get(n) != d for n, d in after.items() if not n.endswith(writer.lines or "/")
            ):
                problems.append(f"status 0, but the outputs are not complete: {sorted(set(after) - set(whole))}")
            elif status and (status != 2 or len(error) != 1):
                problems.append(f"status {status}, and the output is {text[-300:]!r}")
            counts["ended with an error" if status else "ended well"] += 1
        elif status == 0 and not writer.compiler:
            problems.append("the kill did not end it")
        argv = writer.again(folder) if writer.again else writer.argv
        state = json.dumps([argv, sorted((str(p), digest(p)) for p in files_of(writer, folder).values())])
        if problems or state not in known:  # the same files have the same end
            findings += [f"{fault} {call.line}: {p}" for p in problems + end(writer, folder, argv, after)]
            known.add(state)
            counts["stray files in the end"] += bool(set(files_of(writer, folder)) - set(after))
    return counts, findings


# --- writers ---


inputs = Path()  # folder with a Llama, its tokenizer and data set, and a packed and a training model of it


def alone(work: Callable[[], object]) -> None:
    """Calls work in a fork, without its output. Raises ValueError if it fails."""
    pid = os.fork()
    if not pid:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise ValueError("the inputs of a script cannot be made")


def write_texts(folder: Path) -> None:
    documents = [f"{i} men went to mow, went to mow a meadow, {i} men and their dog.\n" * 2 for i in range(40)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 20
    (folder / "text.txt").write_text(text)
    (folder / "articles.txt").write_text("".join(f" = Title {i} = \n\n{text[:99]} {i}\n" for i in range(40)))


def warm_up() -> None:
    """Imports what takes seconds. Starts no thread, because a fork would lack it, and wait for it."""
    import torch._dynamo  # noqa: F401  # an optimizer needs it

    import sweep  # noqa: F401
    from extras import export, plot  # noqa: F401

    if len(os.listdir("/proc/self/task")) > 1:
        raise ValueError("this process has several threads, which its forks would lack")


def write_models(folder: Path) -> None:
    from conftest import transformers_model, write_tokenizer

    import train

    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 288}
    transformers_model("llama", **small).save_pretrained(folder / "llama")
    write_tokenizer(folder / "llama")
    for name in ("chat_template.jinja", "generation_config.json"):
        os.remove(folder / "llama" / name)
    (folder / "data" / "web").mkdir(parents=True)
    (folder / "config.py").write_text(CONFIG)
    os.chdir(folder)
    dataset.write_documents("data/web", dataset.read_documents("documents.jsonl"), "llama")
    for options in ("--max_iters=0 --out_dir=ptq", "--max_iters=1 --out_dir=qat"):
        configurator_argv = [*TRAIN, *options.split()]
        train.main(configurator.configure(train.Settings, configurator_argv[1:]))
    os.remove("qat/model.safetensors")  # so it is a model in training


CONFIG = """
dataset, block_size, batch_size, max_iters, eval_interval, log_interval, eval_tokens = "web", 8, 2, 1, 1, 1, 20
learning_rate = 1e-2
"""
TRAIN = "train.py --dataset=web --init_from=llama --pot_bits=4 --block_size=8 --batch_size=2 --eval_tokens=20".split()
TRAIN += ["--eval_interval=1", "--log_interval=1", "--learning_rate=1e-2"]


def script(name: str) -> Callable:
    """Imports a script of the repository."""
    return lambda: importlib.import_module(name.removesuffix(".py").replace("/", "."))


def check_run(name: str) -> Callable[[Path], None]:
    """The checkpoint of a run loads, with its tokenizer. ckpt.pt and model.safetensors are of the same step."""

    def check(folder):
        for out in (folder / name, folder / name / "best"):
            out = str(out)
            if checkpoint.exists(out):
                model, info = checkpoint.load_model(out)
                tokenizer.tokenizer_of(info.tokenizer, out).encode("the dog")
                if os.path.exists(os.path.join(out, checkpoint.TRAINING)):
                    step = checkpoint.load_training(out).info.step
                    if step != info.step:
                        raise ValueError(f"ckpt.pt is of step {step}, model.safetensors of {info.step}")

    return check


def resume(name: str, argv: list[str]) -> Callable[[Path], list[str] | None]:
    def again(folder):
        if (folder / name / checkpoint.TRAINING).exists():
            return ["train.py", "--init_from=resume", *[a for a in argv[1:] if "init_from" not in a]]
        return None if (folder / name / checkpoint.MODEL).exists() else argv

    return again


def check_json(name: str) -> Callable[[Path], object]:
    return lambda folder: json.loads((folder / name).read_text()) if (folder / name).exists() else None


def check_export(folder: Path) -> None:
    if (folder / "out" / "exported").exists():
        model, info = checkpoint.load_model(str(folder / "out" / "exported"))
        tokenizer.tokenizer_of(info.tokenizer, str(folder / "out" / "exported")).encode("the dog")


def check_gguf(folder: Path) -> None:
    if (folder / "out" / "model.gguf").exists():
        import gguf

        for t in gguf.GGUFReader(folder / "out" / "model.gguf").tensors:
            gguf.dequantize(t.data, t.tensor_type)


def check_data(name: str) -> Callable[[Path], None]:
    """A data set loads, or there is no meta.json, so that it is refused."""

    def check(folder):
        path = folder / "data" / name
        if not (path / "meta.json").exists():
            try:
                dataset.load(str(path), "train")
            except ValueError as e:
                if "data set" not in str(e):
                    raise
                return
            raise ValueError("a data set without meta.json loads")
        for split in dataset.SPLITS:
            _, meta = dataset.load(str(path), split)
        if meta["tokenizer"] == "file":
            tokenizer.tokenizer_of(meta, str(path)).encode("the dog")

    return check


def prepare(name: str, argv: str, patch: Callable = lambda module: None) -> Writer:
    """The writer data/NAME/prepare.py, over another data set."""

    def load():
        spec = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.here = os.path.join(os.getcwd(), "data", name)
        patch(module)
        return module

    def old(folder):
        os.makedirs(folder / "data" / name)
        (folder / "data" / name / "prepare.py").touch()
        dataset.write_chars(str(folder / "data" / name), dict.fromkeys(dataset.SPLITS, "what was there before"))

    argv = [f"data/{name}/prepare.py", *argv.split()]
    models = any("llama" in a for a in argv)
    return Writer(f"data/{name}", argv, [f"data/{name}"], load, check_data(name), old=old, models=models)


class Kernel:
    """pot_kernel.build as a script. The source is a short one."""

    Settings = dataclass(type("Settings", (), {}))

    @staticmethod
    def main(s):
        import pot_kernel

        if ctypes.CDLL(pot_kernel.build("kernel/decode.cpp")).answer() != 42:
            raise ValueError("the library is wrong")


def old_kernel(folder: Path) -> None:
    (folder / "kernel").mkdir()
    (folder / "kernel" / "decode.cpp").write_text('#include "pot.cpp"\n')
    (folder / "kernel" / "pot.cpp").write_text('extern "C" int answer() { return 42; }\n')


def check_kernel(folder: Path) -> None:
    """Every library has the digest that its name says, so build takes none that is cut short."""
    for path in (folder / "cache").rglob("*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.rpartition("-")[2]:
            raise ValueError(f"{path.name} is not the file of its name")


def short_stdlib(module):
    topics = list(module.topics())[:60]
    module.topics, module.docstrings = lambda: topics, lambda: []


def writers() -> list[Writer]:
    train = [*TRAIN, "--max_iters=1", "--keep=best", "--out_dir=out"]
    ptq = [*TRAIN, "--max_iters=0", "--calibrate_tokens=16", "--out_dir=out"]
    model = ["out/model.safetensors", "out/best/model.safetensors", "out/tokenizer.json", "out/best/tokenizer.json"]
    first = [*TRAIN, "--max_iters=1", "--out_dir=out"]

    def finished(folder):
        import train

        os.chdir(folder)
        train.main(configurator.configure(train.Settings, first[1:]))

    def older_json(folder):
        (folder / "tmp").mkdir()
        (folder / "out").mkdir()
        (folder / "out" / "eval.json").write_text('{"old": 1}')

    table = ["out/rows.jsonl", "out/table.json", "out/table.md", "out/table.png"]
    sweep = ["sweep.py", "sweep_config.py"]

    def sweep_config(folder):
        (folder / "sweep_config.py").write_text(
            'init_from, finetune, weights = "llama", "config.py", [{"bits": 4}]\n'
            'methods, seeds, max_iters, tokens = "rtn", "1", 1, 20\n'
            'out_dir, results, split = "out", "out/table", "val"\n'
        )

    def check_sweep(folder):
        for path in (folder / "out").glob("*"):
            check_run(f"out/{path.name}")(folder)
        check_json("out/table.json")(folder)

    def unless(name, argv):
        return lambda folder: None if (folder / name).exists() else argv

    export, gguf = (["extras/export.py", "--ckpt=ptq", f"--out=out/{o}"] for o in ("exported", "model.gguf"))
    evaluate = ["eval.py", "--ckpt=qat", "--json=out/eval.json", "--split=val", "--tokens=20"]
    tmp = {"TMPDIR": "{folder}/tmp"}
    log, web = (checkpoint.LOG,), "--input=documents.jsonl --tokenizer=llama"
    return [
        Writer("train", train, ["out"], script("train"), check_run("out"), resume("out", train), model, log),
        Writer(
            "resume", ["train.py", "--init_from=resume", "--max_iters=2", "--out_dir=out"], ["out"], script("train"),
            check_run("out"), lambda folder: ["train.py", "--init_from=resume", "--max_iters=2", "--out_dir=out"],
            model[:1], log, finished,
        ),
        Writer("ptq", ptq, ["out"], script("train"), check_run("out"), resume("out", ptq)),
        Writer(
            "eval", evaluate, ["out", "tmp"], script("eval"), check_json("out/eval.json"), same=["out/eval.json"],
            old=older_json, environment=tmp,
        ),
        Writer(
            "sweep", sweep, table, script("sweep"), check_sweep, same=table[1:], lines=("rows.jsonl", checkpoint.LOG),
            old=sweep_config,
        ),
        Writer("export", export, ["out"], script("extras/export"), check_export, unless("out/exported", export)),
        Writer("gguf", gguf, ["out"], script("extras/export"), check_gguf, unless("out/model.gguf", gguf)),
        prepare("text", "--input=text.txt --tokenizer=char"),
        prepare("openwebtext", web),
        prepare("webtext", web),
        prepare("wikitext2", "--input=articles.txt --tokenizer=llama"),
        prepare("shakespeare_char", "--input=text.txt"),
        prepare("pydoc_char", "", short_stdlib),
        Writer(
            "kernel", ["kernel"], ["cache"], lambda: Kernel, check_kernel, old=old_kernel,
            environment={"XDG_CACHE_HOME": "{folder}/cache"}, models=False, durable=False,
        ),
        Writer(
            "compiler", ["kernel"], ["cache"], lambda: Kernel, check_kernel, old=old_kernel,
            environment={"XDG_CACHE_HOME": "{folder}/cache", "CXX": "{folder}/c++"}, compiler=True, models=False, durable=False,
        ),
    ]  # fmt: skip


def main(s: Settings):
    global inputs
    if shutil.which("strace") is None:
        raise ValueError("there is no strace: apt install strace")
    known = {w.name: w for w in writers()}
    names = s.writer.split(",") if s.writer else list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no writer {unknown[0]!r}: choose among {', '.join(known)}")
    chosen = [known[name] for name in names]
    total, findings = Counter(), []
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "NANOPOT_KERNEL": "off", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)  # a fork has one thread
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as base:
        inputs = Path(base, "inputs")
        inputs.mkdir()
        write_texts(inputs)
        if any(w.models for w in chosen):
            warm_up()
            alone(lambda: write_models(inputs))
        for writer in chosen:
            start_time = time.monotonic()
            counts, problems = test(writer, Path(base, writer.name.replace("/", "-")), s.faults)
            faults = sum(counts[f] for f in FAULTS)
            shown = ", ".join(f"{n} {key}" for key, n in counts.items() if key not in ("calls", "kinds"))
            print(f"{writer.name}: {counts['calls']} calls ({counts['kinds']}), {faults} faults: {shown}; "
                  f"{len(problems)} findings; {time.monotonic() - start_time:.0f} s", flush=True)  # fmt: skip
            for problem in problems:
                print(f"  {problem.replace(base, '')}", flush=True)
            total += Counter({"calls": counts["calls"], "faults": faults, "findings": len(problems)})
            findings += problems
            os.chdir(base)
    print(f"{len(chosen)} writers: {total['calls']} calls, {total['faults']} faults, {total['findings']} findings")
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(main, Settings)
