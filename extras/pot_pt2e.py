"""
Power-of-two weights in PyTorch's export-mode quantization (PT2E), the flow of arXiv 2506.00315 and 2601.02298, on its
current API in torchao (pip install torchao). The model returns the logits of every position, not only of the last.

    from extras.pot_pt2e import PoTQuantizer, convert_pt2e, prepare_qat_pt2e  # the last two are torchao's

    exported = torch.export.export(model, (tokens,)).module()
    prepared = prepare_qat_pt2e(exported, PoTQuantizer(PoTConfig(bits=4)))
    ...                                                                     # fine-tune `prepared`; without it: PTQ
    converted = convert_pt2e(prepared)                                      # codes, units and nanopot::dequantize

The weights are those of pot.prepare and pot.convert, to the bit. docs/papers.md has a whole example.
"""

import json
import os
import sys
from dataclasses import asdict

import torch

try:
    from torchao.quantization.pt2e import FakeQuantizeBase
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
except ImportError as e:
    sys.exit(f"extras/pot_pt2e.py needs the package torchao ({e}): pip install torchao")

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from pot import PackedWeight, PoTConfig, check_weight, compute_unit, fake_quantize  # noqa: E402

__all__ = ["PoTFakeQuantize", "PoTQuantizer", "convert_pt2e", "prepare_qat_pt2e"]
_ANNOTATION = "quantization_annotation"
_WEIGHT_OF = {  # operator: position of the weight among its arguments
    torch.ops.aten.linear.default: 1,
    torch.ops.aten.embedding.default: 0,
}


@torch.library.custom_op("nanopot::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, unit: torch.Tensor, rows: int, columns: int, config: str) -> torch.Tensor:
    """Codes and unit of a PackedWeight -> weight (rows, columns) float32. config: PoTConfig as JSON."""
    return PackedWeight(codes, unit, (rows, columns), torch.float32, PoTConfig(**json.loads(config)))()


@dequantize.register_fake
def _(codes, unit, rows, columns, config):
    return codes.new_empty(rows, columns, dtype=torch.float32)


class PoTFakeQuantize(FakeQuantizeBase):
    """Fake-quantizes a weight. The first forward pass computes the unit, as pot.prepare does."""

    def __init__(self, config: PoTConfig, **kwargs):  # the other arguments of torchao describe uniform integers
        super().__init__()
        self.config, self.dtype = config, torch.uint8
        self.register_buffer("unit", None)

    def forward(self, w):
        if self.unit is None:
            check_weight("a weight", w, self.config)
            self.unit = compute_unit(w, self.config)
        return fake_quantize(w, self.unit, self.config)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "unit" in state_dict:  # before the first forward pass, the buffer is None and takes no tensor
            self.unit = state_dict[prefix + "unit"].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def calculate_qparams(self):
        raise NotImplementedError("power-of-two weights have levels, not a zero point: convert_pt2e calls convert")

    def convert(self, model, node):
        """Replaces this module in the graph by nanopot::dequantize of packed codes. convert_pt2e calls it."""
        source = node.args[0]
        name = source.target if source.op == "get_attr" else None
        w = model
        for part in (name or "").split("."):
            w = getattr(w, part, None)
        if not isinstance(w, torch.Tensor):
            raise ValueError(f"{source}: a computed weight has no codes: annotate parameters only")
        check_weight(name, w.detach(), self.config)
        if self.unit is None:
            self.forward(w.detach())
        packed = PackedWeight.pack(w.detach(), self.unit, self.config)
        key = name.replace(".", "_")
        model.register_buffer(f"{key}_codes", packed.codes)  # a tied weight comes here twice, with the same codes
        model.register_buffer(f"{key}_unit", packed.unit)
        with model.graph.inserting_before(node):
            tensors = [model.graph.get_attr(f"{key}_{part}") for part in ("codes", "unit")]
            args = (*tensors, *w.shape, json.dumps(asdict(self.config)))
            dequantized = model.graph.call_function(torch.ops.nanopot.dequantize.default, args)
        node.replace_all_uses_with(dequantized)
        model.graph.erase_node(node)
        if not source.users:
            model.graph.erase_node(source)


class PoTQuantizer(Quantizer):
    """Annotates the weights of linear layers and embeddings. Inputs and outputs stay in float."""

    def __init__(self, config: PoTConfig):
        if config.act_bits or config.grid == "paper":
            raise ValueError(
                "8-bit activations and grid='paper' are not possible here: leave out act_bits and grid='paper'"
            )
        self.config = config

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        constructor = PoTFakeQuantize.with_args(config=self.config)
        for node in model.graph.nodes:
            if node.target not in _WEIGHT_OF:
                continue
            weight = node.args[_WEIGHT_OF[node.target]]
            if weight.op != "get_attr":  # computed, so it is not a parameter
                continue
            spec = QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=constructor)
            node.meta[_ANNOTATION] = QuantizationAnnotation(input_qspec_map={weight: spec}, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass
