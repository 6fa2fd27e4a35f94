"""Fixtures of all tests: a folder with small data sets and models, and `sh`, which runs a script in it."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # must precede the import of torch; test processes share the cores
import torch

ROOT = Path(__file__).parent.parent
STAND_IN = str(ROOT / "tests" / "stand_in")
sys.path[:0] = [STAND_IN, str(ROOT)]
torch.set_num_threads(2)
os.environ["NANOPOT_KERNEL"] = "off"  # the kernel sums in another order; only test_kernel.py uses it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must precede the import of triton, for test_triton.py
os.environ["HF_HUB_OFFLINE"] = "1"  # must precede the import of huggingface_hub; no test waits for a network


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.* tokens are few")  # tests calibrate on little text


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder to run scripts in. It has copies of the scripts, a small character data set `tiny`, a small OpenWebText,
    a small GPT-2 in Hugging Face's format in `gpt2`, which takes precedence over the hub's model, a small Llama in `llama`,
    and its data set `openwebtext-llama`."""
    import dataset

    folder = tmp_path_factory.mktemp("workdir")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("config", "extras", "pot_kernel"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "tiny").mkdir(parents=True)
    (folder / "data" / "tiny" / "prepare.py").touch()
    gpt2(vocab_size=50257, n_positions=96).save_pretrained(folder / "gpt2")
    transformers_model("llama grouped").save_pretrained(folder / "llama")
    write_tokenizer(folder / "llama")
    documents = [f"{i} men went to mow, went to mow a meadow, {i} men and their dog.\n" * 4 for i in range(40)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (folder / "data" / "openwebtext").mkdir()
    dataset.write_documents(folder / "data" / "openwebtext", documents)
    (folder / "data" / "openwebtext-llama").mkdir()
    dataset.write_documents(folder / "data" / "openwebtext-llama", documents, str(folder / "llama"))
    text = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40
    dataset.write_chars(folder / "data" / "tiny", {"train": text, "val": text[:700], "test": text[100:1100]})
    return folder


def gpt2(**config):
    """Returns a small GPT-2 of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = dict(n_layer=2, n_head=2, n_embd=64, bos_token_id=0, eos_token_id=0) | config
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {  # model_type and settings of a small model of transformers
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 96}),
    "gpt2 untied": ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_inner": 96, "tie_word_embeddings": False}),
    "llama": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama grouped": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 50000.0}),
    "llama 3": ("llama", {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


def transformers_model(family, **settings):
    """Returns a small model of FAMILIES with random weights, in eval mode."""
    import transformers

    torch.manual_seed(0)
    kind, own = FAMILIES[family]
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    shape |= {"max_position_embeddings": 96, "pad_token_id": None}
    config = ({} if kind == "gpt2" else shape) | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0} | own
    config = transformers.AutoConfig.for_model(kind, **config | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.dim() > 1 else p.data.add_(0.05 * torch.randn_like(p))
    return model


CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def write_tokenizer(folder, first=False):
    """Writes a tokenizer.json of bytes, two merges and the special tokens 0 to 2, and a chat template. first: a text
    begins with <|im_start|>, as Llama's texts begin with a token of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT)


def added_memory(setup, code, **env):
    """Runs `setup` and `code` in a new process. Returns the bytes of memory that `code` adds, without mapped files."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux, which counts mapped files separately")
    read = "machine.process_memory('RssAnon')"
    script = "\n".join(["import machine", setup, f"before = {read}", code, f"print({read} - before)"])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | env
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    return int(done.stdout)


TINY = "--dataset=tiny --n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=4"
TINY += " --eval_interval=10 --log_interval=5"


@pytest.fixture(scope="session")
def sh(workdir):
    """sh("train.py --key=value", ok=True) runs a script in `workdir` and returns returncode, stdout and stderr.

    The script runs in this process, because importing torch takes longer than most scripts. It runs in a new process
    if process=True or if environment variables are given.
    """

    def run(command, ok=True, process=False, **env):
        if process or env:
            env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": STAND_IN} | env
            args = [sys.executable, *command.split()]
            done = subprocess.run(args, cwd=workdir, capture_output=True, text=True, timeout=600, env=env)
        else:
            done = run_in_this_process(command.split(), workdir)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    return run


def run_in_this_process(argv, folder):
    import configurator

    script = importlib.import_module(argv[0].removesuffix(".py").replace("/", "."))
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", argv)
        try:
            configurator.run(script.main, script.Settings)
        except SystemExit as e:
            code = e.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def float_run(sh):
    """Folder of a float model after 30 steps."""
    sh(f"train.py {TINY} --max_iters=30 --out_dir=out-float")
    return "out-float"


@pytest.fixture(scope="session")
def qat_run(sh, float_run):
    """Folder of a 4-bit model, fine-tuned from float_run for 20 steps."""
    options = "--pot_bits=4 --max_iters=20 --batch_size=4 --eval_interval=10"
    sh(f"train.py --dataset=tiny --init_from={float_run} --out_dir=out-qat {options}")
    return "out-qat"
