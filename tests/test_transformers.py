"""extras/pot_transformers.py, and what a user of transformers does with prepared and packed models."""

import copy
import json
import math
import os
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import pot
from pot import PoTConfig, convert, prepare, quantize_

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402

from extras.pot_transformers import PoTQuantizationConfig, attach_quantizer, model_card  # noqa: E402

IDS = torch.arange(1, 25).view(2, 12)
TEXTS = ["the cat sat on the mat and the dog ran to the cat . " * 30, "a dog and a cat sat . the mat ran . " * 30]


def llama(tied, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, n_positions=32, vocab_size=80, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of float models, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in TEXTS for word in text.split()})
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]", eos_token="."
    )
    root = tmp_path_factory.mktemp("float")
    models = {"tied": llama(True), "untied": llama(False), "bfloat16": llama(True, torch.bfloat16), "gpt2": gpt2()}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), **kwargs)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", ["tied", "untied", "bfloat16", "gpt2"])
def test_quantize_while_loading_save_and_load(folders, tmp_path, name):
    model = load(folders / name, quantization_config=PoTQuantizationConfig(terms=2, group_size=32))
    float_model = load(folders / name)
    expected = quantize_(copy.deepcopy(float_model), PoTConfig(terms=2, group_size=32))
    assert torch.equal(logits(model), logits(expected)) and model.dtype == float_model.dtype
    assert model.num_parameters() == float_model.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == float_model.num_parameters(exclude_embeddings=True)
    model.save_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert names == set(pot.packed_state(expected)[0])
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["bits"], saved["terms"]) == ("pot", 4, 2) and "calibrate" not in saved
    loaded = load(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model)) and loaded.num_parameters() == model.num_parameters()
    assert not any(isinstance(m, (nn.Linear, nn.Embedding)) for m in loaded.modules())
    loaded.tie_weights()
    if name != "untied":
        head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert head.packed is table.packed
    prompt = IDS[:1, :4]
    text = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    clone = copy.deepcopy(loaded)
    clone.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert torch.equal(load(tmp_path / "again").generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False), text)  # fmt: skip


def test_loading_a_packed_model_makes_no_float_copy(folders, tmp_path, monkeypatch):
    load(folders / "tied", quantization_config=PoTQuantizationConfig()).save_pretrained(tmp_path)

    class Largest(TorchDispatchMode):
        floats = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
                self.floats = max(self.floats, out.numel())
            return out

    with Largest() as largest:
        load(tmp_path)
    assert 0 < largest.floats < 64 * 64  # the smallest matrix


def test_units_that_float16_cannot_hold_stay_float32(folders, tmp_path):
    model = load(folders / "untied")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
    for stage in (prepare, convert):
        stage(model)
        attach_quantizer(model).save_pretrained(tmp_path / stage.__name__)
        loaded = load(tmp_path / stage.__name__)
        layer = loaded.model.layers[0].mlp.up_proj
        assert (layer.quantizer if stage is prepare else layer.packed).unit.dtype == torch.float32
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_modules_to_not_convert(folders, tmp_path, name):
    config = PoTQuantizationConfig(modules_to_not_convert=["lm_head", "mlp.down_proj"], layers={"model.layers.0.mlp.up_proj": {"bits": 3}})  # fmt: skip
    model = load(folders / name, quantization_config=config)
    assert type(model.lm_head) is nn.Linear and type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.packed.config.bits == 3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["modules_to_not_convert"] == ["lm_head", "mlp.down_proj"]


def test_calibrate_lowers_the_loss_and_the_card_reports_it(folders, tmp_path):
    config = PoTQuantizationConfig(bits=3, calibrate=TEXTS)
    model = load(folders / "tied", quantization_config=config)
    losses = model.config.quantization_config.losses
    assert losses["tokens"] > 50 and 0 < losses["float"] < 100 and losses["quantized"] != losses["float"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folders / "tied"))
    ids = torch.tensor([i for text in TEXTS for i in tokenizer(text)["input_ids"]])
    size = min(64, len(ids) // 16)
    windows = ids[: len(ids) // size * size].view(-1, size)[-math.ceil(len(ids) // size / 8) :]
    with torch.no_grad():
        expected = load(folders / "tied")(windows, labels=windows).loss.item()
        packed = model(windows, labels=windows).loss.item()
    assert losses["float"] == pytest.approx(expected, rel=1e-4) and losses["quantized"] == pytest.approx(
        packed, rel=1e-3
    )
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("base_model: tied", "base_model_relation: quantized", "library_name: transformers"):
        assert line in card
    assert f"{losses['quantized']:.4f} quantized" in card and str(folders) not in card
    (tmp_path / "README.md").write_text("mine")
    load(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert f"{losses['float']:.4f} in float" in model_card(load(tmp_path)).content
    with pytest.raises(ValueError, match="pass more text"):
        load(folders / "tied", quantization_config=PoTQuantizationConfig(calibrate=["the cat"]))
    for texts in ("the cat", []):
        with pytest.raises(ValueError, match="must be a list of texts"):
            PoTQuantizationConfig(calibrate=texts)


def test_push_to_hub_uploads_the_packed_folder(folders, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    uploaded = {}

    def upload(self, folder, repo_id, **kwargs):
        uploaded[repo_id] = sorted(os.listdir(folder))

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    load(folders / "tied", quantization_config=PoTQuantizationConfig()).push_to_hub("me/tied-pot")
    assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded["me/tied-pot"])


def test_models_made_in_memory(folders, tmp_path):
    model = load(folders / "tied")
    with pytest.raises(ValueError, match="call prepare first"):
        attach_quantizer(model)
    prepare(
        model, PoTConfig(), lambda m, name: PoTConfig(terms=2) if "layers.1" in name else "layers.0.mlp" not in name
    )
    convert(model)
    attach_quantizer(model).save_pretrained(tmp_path / "mixed")
    model.tie_weights()
    loaded = load(tmp_path / "mixed")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.layers[1].mlp.up_proj.packed.config.terms == 2
    apart = load(folders / "tied")
    prepare(apart)
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight * 2)
    with pytest.raises(ValueError, match="tie_word_embeddings = False"):
        attach_quantizer(convert(apart))
    apart.config.tie_word_embeddings = False
    attach_quantizer(apart).save_pretrained(tmp_path / "apart")
    assert torch.equal(logits(load(tmp_path / "apart")), logits(apart))


def test_packed_model_whose_table_was_replaced_is_not_saved(tmp_path):
    model = llama(True)
    pot.quantize_(model)
    attach_quantizer(model)
    model.set_input_embeddings(torch.nn.Embedding(80, 64))  # the weight of the head was registered in the old one
    with pytest.raises(ValueError, match="lm_head shares its packed weight with a layer that has left the model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("change", [lambda model: model, convert])
def test_quantized_model_is_not_resized(change):
    model = llama(False)
    prepare(model)
    attach_quantizer(change(model))
    assert model.resize_token_embeddings(80) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="has 80 rows, and the model is quantized: resize the float model to 96 rows"):
        model.resize_token_embeddings(96)


def test_bad_config_is_refused(folders):
    with pytest.raises(ValueError, match="choose one of"):
        PoTQuantizationConfig(bits=9)
    with pytest.raises(ValueError, match="group_size 48 does not divide"):
        load(folders / "tied", quantization_config=PoTQuantizationConfig(group_size=48))


def test_lm_eval_measures_a_packed_folder(folders, tmp_path):
    """By the command of docs/pot.md. The labels are the answers that the packed model itself prefers."""
    pytest.importorskip("lm_eval")
    model = load(folders / "tied", quantization_config=PoTQuantizationConfig(terms=2))
    model.save_pretrained(tmp_path / "packed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folders / "tied"))
    tokenizer.save_pretrained(tmp_path / "packed")
    words, questions = sorted(set(TEXTS[0].split())), []
    for i in range(12):
        rows = torch.randint(len(words), (7,), generator=torch.Generator().manual_seed(i)).tolist()
        q, choices = (
            " ".join(words[j] for j in rows[:5]),
            [words[rows[5]], words[(rows[5] + 1 + rows[6] % 4) % len(words)]],
        )
        with torch.no_grad():
            last = model(torch.tensor([tokenizer(q)["input_ids"]])).logits[0, -1]
        questions.append({"q": q, "choices": choices, "label": last[[tokenizer(c)["input_ids"][0] for c in choices]].argmax().item()})  # fmt: skip
    assert 2 < sum(q["label"] for q in questions) < 10
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "task.yaml").write_text(
        f"{{task: words, dataset_path: json, dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}, test_split: test, "
        "output_type: multiple_choice, doc_to_text: q, doc_to_choice: choices, doc_to_target: label, "
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]}"
    )
    root = os.path.dirname(pot.__file__)
    with open(os.path.join(root, "docs", "pot.md")) as f:
        (command,) = (line for line in f if "lm_eval.__main__" in line)
    words = shlex.split(command.replace("smollm2-pot", "packed").replace("TASK", "task.yaml")) + [
        "--output_path",
        "out",
    ]
    env = os.environ | {"PYTHONPATH": os.path.join(root, "extras"), "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["words"]["acc,none"] == 1.0


# --- prepared models: Trainer, PEFT ---


def units(model):
    return {n: b for n, b in model.named_buffers() if n.endswith("quantizer.unit")}


def trainer(model, folder, **kwargs):
    data = [{"input_ids": torch.randint(80, (12,), generator=torch.Generator().manual_seed(i))} for i in range(32)]
    data = [d | {"labels": d["input_ids"]} for d in data]
    settings = dict(
        max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, save_total_limit=3, report_to=[], use_cpu=True, seed=1, disable_tqdm=True,
    )  # fmt: skip
    settings = transformers.TrainingArguments(output_dir=str(folder), **settings | kwargs)
    return transformers.Trainer(model, settings, train_dataset=data, eval_dataset=data[:8])


@pytest.mark.parametrize("attached", [True, False])
def test_trainer_trains_saves_resumes_and_loads_the_best(folders, tmp_path, attached):
    pytest.importorskip("accelerate")

    def build():
        if attached:
            config = PoTQuantizationConfig(terms=2, prepared=True)
            return load(folders / "tied", quantization_config=config)
        model = load(folders / "tied")
        prepare(model, PoTConfig(terms=2))
        return model

    model = build()
    before, start = units(model), copy.deepcopy(model.state_dict())
    assert model.num_parameters() == load(folders / "tied").num_parameters()
    run = trainer(model, tmp_path / "run")
    run.train()
    assert "checkpoint" in run.state.best_model_checkpoint
    trained = model.state_dict()
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])
    assert all(torch.equal(b, units(model)[n]) for n, b in before.items())
    resumed = build()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(t, trained[n]) for n, t in resumed.state_dict().items())
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    run.save_model(str(tmp_path / "prepared"))
    if attached:
        loaded = load(tmp_path / "prepared")
        assert all(torch.equal(b, units(loaded)[n]) for n, b in before.items())
        fresh = pot.compute_unit(loaded.lm_head.weight, PoTConfig(terms=2))
        assert not torch.equal(fresh, loaded.lm_head.quantizer.unit)  # training moved the weight, not its unit
        assert torch.equal(logits(loaded), logits(model)) and not (tmp_path / "prepared" / "README.md").exists()
        convert(loaded).save_pretrained(tmp_path / "packed")
        packed = load(tmp_path / "packed")
        assert torch.equal(logits(packed), logits(loaded)) and packed.num_parameters() == model.num_parameters()
        with pytest.raises(ValueError, match="fine-tuning on purely quantized"):
            trainer(packed, tmp_path / "no")


@pytest.mark.parametrize("name, layers", [("tied", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_peft_trains_lora_on_a_prepared_model(folders, tmp_path, name, layers):
    peft = pytest.importorskip("peft")
    model = load(folders / name, quantization_config=PoTQuantizationConfig(prepared=True))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = logits(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers))
    assert sum(pot.is_prepared(m.base_layer) for m in lora.modules() if hasattr(m, "base_layer")) >= 2
    assert torch.equal(logits(lora), before)  # B starts at zero
    trainer(lora, tmp_path / "run", load_best_model_at_end=False).train()
    after = logits(lora.eval())
    assert not torch.equal(after, before)
    lora.save_pretrained(tmp_path / "adapter")
    assert os.path.getsize(tmp_path / "adapter" / "adapter_model.safetensors") < 20_000
    again = load(folders / name, quantization_config=PoTQuantizationConfig(prepared=True))
    again = peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    assert torch.equal(logits(again), after)
    base = again.unload()
    assert all(torch.equal(p, weights[n]) for n, p in base.named_parameters())


# --- pot.py without the plug-in ---


def test_load_packed_fills_the_buffers_of_a_meta_llama():
    model = quantize_(llama(True))
    with torch.device("meta"):
        empty = llama(True)
    loaded = pot.load_packed(empty, *pot.packed_state(model))
    assert torch.equal(logits(loaded.eval()), logits(model))
    with torch.device("meta"):
        empty = llama(True)
    empty.register_buffer("table", torch.ones(3, device="meta"), persistent=False)  # transformers cannot compute it
    with pytest.raises(ValueError, match="table is no part of a state_dict"):
        pot.load_packed(empty, *pot.packed_state(model))


# --- FSDP ---

STEP = """
import sys, torch, torch.nn as nn
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import pot

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 50, bias=False))
model[3].weight = model[0].weight
pot.prepare(model, pot.PoTConfig(group_size=32))
ids = torch.randint(50, (8, 6))
if rank >= 0:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = ids[4 * rank : 4 * rank + 4]
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(2):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
if rank <= 0:
    torch.save(state, f"{folder}/{'alone' if rank else 'sharded'}.pt")
if rank >= 0:
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_processes_of_fsdp_take_the_steps_of_one(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    env = os.environ | {"PYTHONPATH": os.path.dirname(pot.__file__)}
    args = [[sys.executable, "-c", STEP, str(rank), str(tmp_path)] for rank in (-1, 0, 1)]
    processes = [subprocess.Popen(a, env=env, stderr=subprocess.PIPE, text=True) for a in args]
    messages = [p.communicate(timeout=600)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], messages
    alone, sharded = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "sharded"))
    assert alone.keys() == sharded.keys() and "3.quantizer.unit" not in alone
    assert all(torch.allclose(t, sharded[n], atol=1e-6) for n, t in alone.items())
