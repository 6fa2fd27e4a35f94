"""
Power-of-two weights as a quantization method of transformers (5 or newer). Importing this file registers it:

    from pot_transformers import PoTQuantizationConfig

    config = PoTQuantizationConfig(bits=4, terms=2, calibrate=texts)  # texts: a list of strings, or leave it out
    model = AutoModelForCausalLM.from_pretrained("smollm2", quantization_config=config)
    model.save_pretrained("smollm2-pot")                              # packed: 4.25 bits a weight, and a model card
    model = AutoModelForCausalLM.from_pretrained("smollm2-pot")       # the same logits, to the bit

With prepared=True the model is fake-quantized instead: train it with Trainer or PEFT, then call pot.convert(model). A
model that pot.prepare or pot.convert made in memory needs attach_quantizer(model) before it is saved.

Copy this file beside pot.py and calibrate.py. Whoever loads such a folder must import this file, too.
"""

import functools
import os
import sys
from collections import Counter
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from calibrate import calibrate  # noqa: E402
from pot import (  # noqa: E402
    PackedPoTEmbedding,
    PackedPoTLinear,
    PackedWeight,
    PoTConfig,
    PoTConv1D,
    convert,
    is_prepared,
    packed_state,
    prepare,
)

__all__ = ["PoTQuantizationConfig", "attach_quantizer", "model_card"]

WINDOW = 512  # tokens of text that the model sees at once in calibrate, or fewer if there is little text


@register_quantization_config("pot")
class PoTQuantizationConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes a model. config.json keeps it as `quantization_config`.

    bits and the other fields of PoTConfig (grid, terms, granularity, group_size, ...): see there.
    calibrate: texts for GPTQ; None rounds to the nearest level. An eighth of them is kept aside to measure the loss.
    modules_to_not_convert: names of modules to leave in float, such as ["lm_head"]. The default quantizes all linear
    layers and embeddings.
    layers: fields of PoTConfig that differ in single layers: {"lm_head": {"terms": 2}}.
    prepared: True keeps float weights that are fake-quantized, to train; False packs them.
    base_model, losses: what the model card shows. from_pretrained fills them in.
    Raises ValueError for a combination that PoTConfig refuses, and for calibrate that is a string or empty.
    """

    def __init__(
        self, bits: int = 4, *, calibrate: list[str] | None = None, modules_to_not_convert: list[str] | None = None,
        layers: dict[str, dict] | None = None, prepared: bool = False, base_model: str | None = None,
        losses: dict | None = None, quant_method: str = "pot", **fields,
    ):  # fmt: skip
        if isinstance(calibrate, str) or calibrate is not None and not len(calibrate):
            raise ValueError(f"calibrate={calibrate!r} must be a list of texts, or None to round to the nearest level")
        self.quant_method = quant_method
        vars(self).update(asdict(PoTConfig(bits=bits, **fields)))
        self.calibrate, self.modules_to_not_convert, self.layers = calibrate, modules_to_not_convert, layers or {}
        self.prepared, self.base_model, self.losses = prepared, base_model, losses

    def to_dict(self) -> dict:
        return {key: value for key, value in super().to_dict().items() if key != "calibrate"}

    @property
    def pot(self) -> PoTConfig:
        """The config of all layers that `layers` does not name."""
        return PoTConfig(**{field: getattr(self, field) for field in asdict(PoTConfig())})

    def choose(self, module: nn.Module, name: str) -> bool | PoTConfig:
        """filter_fn of pot.prepare."""
        skip = not should_convert_module(name, self.modules_to_not_convert)
        return False if skip else replace(self.pot, **self.layers.get(name, {}))


@register_quantizer("pot")
class PoTHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model."""

    quantization_config: PoTQuantizationConfig

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:  # the model is on meta, so this takes no memory
            for target, source in model.all_tied_weights_keys.items():  # transformers ties only after loading
                layer, _, leaf = target.rpartition(".")
                setattr(model.get_submodule(layer), leaf, model.get_parameter(source))
            prepare(model, self.quantization_config.pot, self.quantization_config.choose)
            if not self.quantization_config.prepared:
                convert(model)
                _untie(model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            _quantize(model, self.quantization_config)
        for module in model.modules():
            if isinstance(module, PackedWeight):
                module.to(module.codes.device)  # computes what follows from codes and units
        _add_methods(model)

    def get_new_dtype(self, converter, param, dtype):
        # Units keep their dtype: float16, or float32 where float16 cannot hold one.
        is_unit = converter.target_patterns[0].endswith((".packed.unit", ".quantizer.unit"))
        return None if is_unit else super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model):
        self.quantization_config = model.config.quantization_config = _describe(model, self.quantization_config)
        if self.quantization_config.prepared:
            return None, {}
        _untie(model)  # convert may have packed it since
        return packed_state(model)[0], {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return self.quantization_config.prepared

    @property
    def is_qat_trainable(self):
        return self.quantization_config.prepared


def attach_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Lets save_pretrained write a model that pot.prepare or pot.convert made. Returns model.

    Raises ValueError if no layer is prepared or packed, or some are prepared and others packed.
    """
    config = _describe(model, PoTQuantizationConfig(base_model=_base_model(model)))
    model.hf_quantizer = PoTHfQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    if not config.prepared:
        _untie(model)
    _add_methods(model)
    return model


def model_card(model: PreTrainedModel) -> ModelCard:
    """The README.md of a packed model. save_pretrained writes it if there is none."""
    config = model.config.quantization_config
    relation = {"base_model": config.base_model, "base_model_relation": "quantized"} if config.base_model else {}
    data = ModelCardData(library_name="transformers", tags=["nanopot", "power-of-two"], **relation)
    lines = [
        "---", data.to_yaml(), "---", "", f"# {config.base_model or 'A model'} in powers of two", "",
        f"The weights are {config.pot}. Left in float: "
        f"{', '.join([*(config.modules_to_not_convert or []), 'norms and biases'])}.", "",
    ]  # fmt: skip
    if config.losses:
        lines += [
            f"Loss on {config.losses['tokens']:,} tokens that were kept aside, in nats per token: "
            f"{config.losses['float']:.4f} in float, {config.losses['quantized']:.4f} quantized.", "",
        ]  # fmt: skip
    lines += [
        "To load it, put `pot.py`, `calibrate.py`, `pot_transformers.py` and `pot_kernel/` of nanoPoT beside your script:",
        "", "```python", "import pot_transformers", f"from transformers import {type(model).__name__}", "",
        f'model = {type(model).__name__}.from_pretrained("path of this folder")', "```", "",
    ]  # fmt: skip
    return ModelCard("\n".join(lines))


# -----------------------------------------------------------------------------
# Quantize


def _quantize(model, config):
    """Float weights -> what config says, in place."""
    config.base_model = config.base_model or _base_model(model)
    windows = _windows(model, config.calibrate) if config.calibrate else None
    aside = -(-len(windows) // 8) if windows is not None else 0
    losses = {"float": _loss(model, windows[-aside:])} if aside else None
    prepare(model, config.pot, config.choose)
    if losses:
        calibrate(model, [{"input_ids": ids, "use_cache": False} for ids in windows[:-aside].split(8)])
        losses["quantized"] = _loss(model, windows[-aside:])
        config.losses = losses | {"tokens": windows[-aside:, 1:].numel()}
    if not config.prepared:
        convert(model)
        _untie(model)


def _windows(model, texts):
    """(windows, tokens): the texts one after the other, by the tokenizer of the model's folder."""
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    size = min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW), len(ids) // 16)
    if size < 4:
        raise ValueError(f"calibrate holds {len(ids)} tokens: pass more text, 16,000 tokens are usual")
    return torch.tensor(ids[: len(ids) // size * size], device=model.device).view(-1, size)


@torch.no_grad()
def _loss(model, windows):
    """Mean cross-entropy of windows, in nats per token."""
    losses = [F.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:], reduction="sum") for w in windows]
    return float(sum(losses)) / windows[:, 1:].numel()


def _base_model(model):
    """Name on the hub, or of a folder without the path to it. None for a model that was not loaded."""
    name = model.config.name_or_path
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name or None


# -----------------------------------------------------------------------------
# Describe


def _config_of(module):
    return (module.quantizer if is_prepared(module) else module.packed).config


def _describe(model, config):
    """config, or a new one if config does not say what the layers of model are."""
    quantized, skipped, prepared = {}, [], set()
    for name, module in model.named_modules():
        if is_prepared(module) or isinstance(module, (PackedPoTLinear, PackedPoTEmbedding)):
            quantized[name] = _config_of(module)
            prepared.add(is_prepared(module))
        elif type(module) in (nn.Linear, nn.Embedding, Conv1D):
            skipped.append(name)
    if len(prepared) != 1:
        kinds = "both prepared and packed layers: convert all" if prepared else "no prepared layer: call prepare first"
        raise ValueError(f"the model has {kinds}")
    modules = dict(model.named_modules())
    registered = set(modules.values())
    for name in quantized:
        if getattr(modules[name], "packed", None) not in registered | {None}:
            raise ValueError(
                f"{name} shares its packed weight with a layer that has left the model: replace layers of the float model, "
                "and quantize it then"
            )
    for target, source in (type(model)._tied_weights_keys or {}).items():
        pair = [getattr(modules.get(key.rpartition(".")[0]), "packed", None) for key in (target, source)]
        if None not in pair and pair[0] is not pair[1] and getattr(model.config, "tie_word_embeddings", False):
            raise ValueError(
                f"{target} and {source} are packed apart, and the model's config ties them: set "
                "model.config.tie_word_embeddings = False"
            )

    def fits(candidate):
        chosen = {n: candidate.choose(modules[n], n) for n in (*quantized, *skipped)}
        floats = {n: c for n, c in chosen.items() if n in skipped and c and c.grid != "paper"}
        return not floats and all(chosen[n] == c for n, c in quantized.items())

    same = {"prepared": prepared.pop(), "base_model": config.base_model, "losses": config.losses}
    ours = PoTQuantizationConfig(
        **asdict(config.pot), modules_to_not_convert=config.modules_to_not_convert, layers=config.layers, **same
    )
    if not fits(ours):
        main = asdict(Counter(quantized.values()).most_common(1)[0][0])
        layers = {n: {k: v for k, v in asdict(c).items() if v != main[k]} for n, c in quantized.items()}
        layers = {n: fields for n, fields in layers.items() if fields}
        ours = PoTQuantizationConfig(**main, modules_to_not_convert=skipped or None, layers=layers, **same)
        if not fits(ours):
            raise ValueError(
                f"the names of the layers in float, {skipped}, also match others, because transformers compares the ends of "
                "names: rename a module"
            )
    return ours


def _untie(model):
    """transformers ties Parameters. Packed layers share their codes already."""
    keys = model.all_tied_weights_keys
    kept = {k: v for k, v in keys.items() if {k, v} <= {n for n, _ in model.named_parameters(remove_duplicate=False)}}
    if kept != keys:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module._tied_weights_keys = module.all_tied_weights_keys = {}
        model._tied_weights_keys, model.all_tied_weights_keys = kept, dict(kept)


# -----------------------------------------------------------------------------
# Methods and classes that transformers offers no other way to change


class _PoTConv1D(PoTConv1D, Conv1D):
    """A prepared layer of a GPT-2. PEFT puts LoRA beside instances of transformers' Conv1D, which this is, too."""


def _add_methods(model):
    for module in model.modules():
        if type(module) is PoTConv1D:
            module.__class__ = _PoTConv1D
    model.save_pretrained = functools.partial(_save_pretrained, model)
    model.num_parameters = functools.partial(_num_parameters, model)
    model.resize_token_embeddings = functools.partial(_resize_token_embeddings, model)


def _save_pretrained(model, save_directory, *args, **kwargs):
    """PreTrainedModel.save_pretrained, and a model card."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    path = os.path.join(save_directory, "README.md")
    if not model.config.quantization_config.prepared and not os.path.exists(path):
        model_card(model).save(path)


def _resize_token_embeddings(model, new_num_tokens=None, *args, **kwargs):
    """PreTrainedModel.resize_token_embeddings would put new layers in place of the quantized ones."""
    table = model.get_input_embeddings()
    rows = table.packed.out_features if isinstance(table, PackedPoTEmbedding) else table.num_embeddings
    if new_num_tokens not in (None, rows):
        raise ValueError(
            f"the token table has {rows} rows, and the model is quantized: resize the float model to {new_num_tokens} rows, "
            "and quantize it then"
        )
    return table


def _num_parameters(model, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """PreTrainedModel.num_parameters, and the packed weights. A shared weight counts once."""
    count = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    packed = {m for m in model.modules() if isinstance(m, PackedWeight)}
    if exclude_embeddings:
        packed -= {m.packed for m in model.modules() if isinstance(m, PackedPoTEmbedding)}
    return count + (0 if only_trainable else sum(p.out_features * p.in_features for p in packed))
