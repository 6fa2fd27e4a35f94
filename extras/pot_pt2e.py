"""
Power-of-two weights in PyTorch's export-mode quantization, the flow of arXiv 2506.00315 and 2601.02298, on today's API (the
package torchao: pip install torchao). Every position's logits come out, not the last one's alone.

    exported = torch.export.export(model, (tokens,)).module()
    prepared = prepare_qat_pt2e(exported, PoTQuantizer(PoTConfig(bits=4)))   # of torchao.quantization.pt2e.quantize_pt2e
    ...                                                                      # fine-tune `prepared`, or not at all: PTQ
    converted = convert_pt2e(prepared)                                       # codes, scales and nanopot::dequantize

What comes out are the weights of pot.prepare and pot.convert, to the bit.
"""

import json
import os
import sys
from dataclasses import asdict

import torch
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from pot import PackedWeight, PoTConfig, _check, compute_scale, fake_quantize  # noqa: E402

_ANNOTATION = "quantization_annotation"
_WEIGHT_OF = {  # operator: position of its weight
    torch.ops.aten.linear.default: 1,
    torch.ops.aten.embedding.default: 0,
}


@torch.library.custom_op("nanopot::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor, columns: int, config: str) -> torch.Tensor:
    """Packed codes (out, bytes) uint8 and scale -> weight (out, columns) float32. config: PoTConfig as JSON."""
    return PackedWeight(codes, scale, columns, torch.float32, PoTConfig(**json.loads(config)))()


@dequantize.register_fake
def _(codes, scale, columns, config):
    return codes.new_empty(len(codes), columns, dtype=torch.float32)


class PoTFakeQuantize(FakeQuantizeBase):
    """Fake-quantizes the weight that passes it; its scale is computed from the first one, as pot.prepare does."""

    def __init__(self, config: PoTConfig, **kwargs):  # what else a specification says is about uniform integers
        super().__init__()
        self.config, self.dtype = config, torch.uint8
        self.register_buffer("scale", None)

    def forward(self, w):
        if self.scale is None:
            _check("a weight", w, self.config)
            self.scale = compute_scale(w, self.config)
        return fake_quantize(w, self.scale, self.config)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "scale" in state_dict:  # else there is no buffer yet that could take it
            self.scale = state_dict[prefix + "scale"].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def calculate_qparams(self):
        raise NotImplementedError("power-of-two weights have levels, not a zero point: convert_pt2e calls convert")

    def convert(self, model, node):
        """Puts nanopot::dequantize of packed codes in the place of this module, called by convert_pt2e."""
        source = node.args[0]
        name = source.target if source.op == "get_attr" else None
        w = model
        for part in (name or "").split("."):
            w = getattr(w, part, None)
        if not isinstance(w, torch.Tensor):
            raise ValueError(f"{source}: a weight that is computed has no codes: annotate parameters alone")
        _check(name, w.detach(), self.config)
        if self.scale is None:
            self.forward(w.detach())
        packed = PackedWeight.pack(w.detach(), self.scale, self.config)
        key = name.replace(".", "_")
        model.register_buffer(f"{key}_codes", packed.codes)  # of a tied weight twice, and the same
        model.register_buffer(f"{key}_scale", packed.scale)
        with model.graph.inserting_before(node):
            tensors = [model.graph.get_attr(f"{key}_{part}") for part in ("codes", "scale")]
            args = (*tensors, w.shape[1], json.dumps(asdict(self.config)))
            dequantized = model.graph.call_function(torch.ops.nanopot.dequantize.default, args)
        node.replace_all_uses_with(dequantized)
        model.graph.erase_node(node)
        if not source.users:
            model.graph.erase_node(source)


class PoTQuantizer(Quantizer):
    """Annotates the weights of linear layers and embeddings; inputs and outputs stay in float."""

    def __init__(self, config: PoTConfig):
        if config.act_bits or config.grid == "paper":
            raise ValueError(
                "activations in float and a grid of pot.py's own alone: leave out act_bits and grid='paper'"
            )
        self.config = config

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        constructor = PoTFakeQuantize.with_args(config=self.config)
        for node in model.graph.nodes:
            if node.target not in _WEIGHT_OF:
                continue
            weight = node.args[_WEIGHT_OF[node.target]]
            if weight.op != "get_attr":  # computed, so no parameter
                continue
            spec = QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=constructor)
            node.meta[_ANNOTATION] = QuantizationAnnotation(input_qspec_map={weight: spec}, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass
