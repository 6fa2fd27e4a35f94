"""extras/pot_pt2e.py: PyTorch's export flow (PT2E) gives the same weights as pot.prepare and pot.convert."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import pot
from model import GPT, GPTConfig
from pot import PoTConfig

pytest.importorskip("torchao")
SHAPE = GPTConfig(block_size=16, vocab_size=28, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture(scope="module")
def pt2e():
    """PoTQuantizer of extras/pot_pt2e.py, and torchao's prepare_qat_pt2e and convert_pt2e."""
    from extras import pot_pt2e

    return pot_pt2e


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "config", [PoTConfig(), PoTConfig(bits=3, granularity="tensor"), PoTConfig(terms=2, granularity="channel")], ids=str
)
def test_export_prepare_train_convert(pt2e, config, steps):
    torch.manual_seed(0)
    model, x = GPT(SHAPE), torch.randint(28, (3, 16))
    eager = copy.deepcopy(model)
    exported = pt2e.prepare_qat_pt2e(torch.export.export(model, (x,)).module(), pt2e.PoTQuantizer(config))
    pot.prepare(eager, config)
    assert torch.equal(exported(x), eager(x)) and exported(x).shape == (3, 16, 28)  # every position
    for trained in (eager, exported):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(steps):
            F.cross_entropy(trained(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    exported = pt2e.convert_pt2e(exported)
    expected = pot.convert(eager)(x)
    assert torch.equal(exported(x), expected)
    state = exported.state_dict()
    for name, module in eager.named_modules():
        if isinstance(module, pot.PackedPoTLinear | pot.PackedPoTEmbedding) and name != "transformer.wte":
            key = name.replace(".", "_") + "_weight"
            assert torch.equal(state[f"{key}_codes"], module.packed.codes), name
            assert torch.equal(state[f"{key}_unit"], module.packed.unit), name
    assert not [name for name, t in state.items() if t.ndim == 2 and t.is_floating_point() and "_unit" not in name]
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "nanopot.dequantize.default" in targets and not any("quantize_per" in t for t in targets)


def test_odd_widths_and_computed_weights(pt2e):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.factor = nn.Linear(33, 5, bias=False), nn.Parameter(torch.randn(7, 5))

        def forward(self, x):
            return F.linear(self.odd(x), self.factor * 2)

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 33)
    config = PoTConfig(granularity="channel")
    prepared = pt2e.prepare_qat_pt2e(torch.export.export(net, (x,)).module(), pt2e.PoTQuantizer(config))
    converted = pt2e.convert_pt2e(prepared)
    w = pot.fake_quantize(net.odd.weight, pot.compute_unit(net.odd.weight, config), config)
    assert torch.allclose(converted(x), F.linear(F.linear(x, w), net.factor * 2), atol=1e-6)


def test_operator(pt2e):
    w = torch.randn(6, 128)
    config = PoTConfig()
    packed = pot.PackedWeight.pack(w, pot.compute_unit(w, config), config)
    torch.library.opcheck(
        torch.ops.nanopot.dequantize, (packed.codes, packed.unit, *packed.shape, json.dumps(asdict(config)))
    )


CONFIG = PoTConfig()


def export_and_prepare(pt2e, model, x, config=CONFIG):
    return pt2e.prepare_qat_pt2e(torch.export.export(model, (x,)).module(), pt2e.PoTQuantizer(config))


def test_training_continues_from_a_state_dict(pt2e):
    torch.manual_seed(0)
    model, x = GPT(SHAPE), torch.randint(28, (3, 16))
    trained = export_and_prepare(pt2e, model, x)
    before = trained(x)
    restored = export_and_prepare(pt2e, GPT(SHAPE), x)
    restored.load_state_dict(trained.state_dict())
    assert torch.equal(restored(x), before)


def test_weights_that_cannot_be_quantized(pt2e):
    layer, x = nn.Linear(48, 5), torch.randn(4, 48)
    with pytest.raises(ValueError, match="group_size 64 does not divide its 48"):
        export_and_prepare(pt2e, layer, x)(x)
    model = export_and_prepare(pt2e, layer, x, PoTConfig(granularity="channel"))
    model(x)
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        pt2e.convert_pt2e(model)


def test_unsupported_configs(pt2e):
    for config in (
        PoTConfig(act_bits=8),
        PoTConfig(grid="paper", granularity="tensor", scale="absmax", bits=4, range=3),
    ):
        with pytest.raises(ValueError, match="leave out act_bits"):
            pt2e.PoTQuantizer(config)


def test_example_of_the_documentation(pt2e, capsys):
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "papers.md").read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([2, 64, 256])\n"


def test_without_torchao():
    code = "import sys; sys.modules['torchao'] = None; import extras.pot_pt2e"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install torchao" in done.stderr
