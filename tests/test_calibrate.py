"""calibrate.py against GPTQ written out in float64, one weight column and one Hessian inverse at a time."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pot
from calibrate import calibrate
from model import GPT, GPTConfig
from pot import PoTConfig, PoTEmbedding, compute_scale, convert, prepare

CONFIGS = [
    PoTConfig(group_size=32),
    PoTConfig(bits=3, granularity="channel"),
    PoTConfig(terms=2, granularity="tensor"),
    PoTConfig(grid="uniform", group_size=16),
    PoTConfig(bits=5, range=7, grid="paper", granularity="tensor", scale="absmax"),
]


def gptq(w, scale, config, moment):
    """Optimal brain surgeon, feature by feature; w (out, in), moment (in, in) -> quantized weights, float64."""
    dtype = w.dtype
    w, hessian = w.double().clone(), moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment))
    levels = torch.tensor(config.levels(), dtype=torch.float64)
    levels = torch.cat([-levels.flip(0), levels])
    left = moment.diagonal().argsort(descending=True).tolist()
    size = w.shape[1] // scale.shape[1]
    while left:
        j, inverse = left[0], torch.linalg.inv(hessian[left][:, left])
        unit = (scale.double() / config.top)[:, j // size].expand(len(w))
        column = w[:, j].to(dtype).double()  # as the layer will hold it
        if config.grid == "paper":  # rounds in the log domain, after rounding to integers
            a = (column / unit).abs().round()
            q = torch.where(a > 0, torch.exp2(a.log2().round()).clamp(max=config.top), 0) * column.sign() * unit
        else:
            q = levels[(column[:, None] / unit[:, None] - levels).abs().argmin(1)] * unit
        error = (column - q) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        w[:, j] = q
        left = left[1:]
    return w


def inputs_like(n, rows=300):
    return torch.randn(rows, n) @ torch.randn(n, n) / n**0.5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("n", [96, 160])  # within and across the blocks of 128
def test_one_layer_against_float64(config, n):
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(n, 24)), inputs_like(n)
    prepare(layer, config)
    w, scale = layer[0].weight.detach().clone(), layer[0].quantizer.scale
    ((before, after),) = calibrate(layer, [x]).values()
    expected = gptq(w, scale, config, x.double().t() @ x.double())
    found = layer[0].quantizer(layer[0].weight).detach().double()
    assert (found - expected).abs().lt(1e-5).float().mean() > 0.995  # a tie may fall the other way
    errors = [
        ((x.double() @ (w - q).double().t()) ** 2).sum().item() for q in (pot.fake_quantize(w, scale, config), found)
    ]
    total = ((x @ w.t()).double() ** 2).sum().item()
    assert before == pytest.approx(errors[0] / total, rel=1e-3) and after == pytest.approx(errors[1] / total, rel=1e-3)
    assert after < before
    assert torch.equal(layer[0].quantizer.scale, scale)
    # Unrounded in the middle: the layer's own rounding gives the codes, and packing keeps them.
    assert not torch.equal(layer[0].weight, layer[0].quantizer(layer[0].weight))
    y = layer(x)
    assert torch.equal(convert(layer)(x), y)


class Net(nn.Module):
    """Branches with one input, a tied head, a layer called twice, an in-place activation, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(40, 32), nn.Embedding(8, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(32, 32) for k in "abc"}) for _ in range(2))
        self.twice, self.unused = nn.Sequential(nn.Linear(32, 32), nn.SELU(inplace=True)), nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x, shift=0.0):
        x = self.emb(x) + self.pos(torch.arange(x.shape[1]))
        for block in self.blocks:
            a, b = block["a"](x), block["b"](x)
            x = x + block["c"](torch.tanh(a) * b)
            x = self.twice(x + shift)
        return self.head(x)


def trained_net():
    torch.manual_seed(0)
    net, x = Net(), torch.randint(40, (16, 8))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net, x


def test_a_layer_in_bfloat16_against_float64():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(96, 200)).bfloat16(), inputs_like(96).bfloat16()
    config = PoTConfig(terms=2, group_size=32)
    prepare(layer, config)
    w, scale = layer[0].weight.detach().clone(), layer[0].quantizer.scale
    calibrate(layer, [x])
    expected = gptq(w, scale, config, x.double().t() @ x.double()).bfloat16()
    assert (layer[0].quantizer(layer[0].weight) == expected).float().mean() > 0.995


def test_a_layer_that_would_lose_stays(monkeypatch):
    layer, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(99, 64)
    prepare(layer)
    w = layer[0].weight.detach().clone()
    monkeypatch.setattr("calibrate.gptq", lambda w, *_: -w)
    ((before, after),) = calibrate(layer, [x]).values()
    assert before == after > 0 and torch.equal(layer[0].weight, w)


def test_what_is_finished_is_not_computed_again(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=5, n_head=2, n_embd=64))
    prepare(model, PoTConfig())
    seen = []
    rows, gelu = pot.PoTQuantizer.rows, F.gelu
    monkeypatch.setattr(pot.PoTQuantizer, "rows", lambda *a: seen.append("embedding") or rows(*a))
    monkeypatch.setattr(F, "gelu", lambda *a, **k: seen.append("gelu") or gelu(*a, **k))
    calibrate(model, [torch.randint(65, (8, 16))] * 3)
    assert seen.count("embedding") == 3 * 2 * 3  # batches, tables, the first pass and one more of each model
    # The first pass; for c_proj and with the block, in the float model and in this one; but none follows the last.
    assert seen.count("gelu") == 3 * 5 * (1 + 2 * 2) - 2 * 3


def run(net, batch):
    batch = copy.deepcopy(batch)
    return net(*batch) if isinstance(batch, (tuple, list)) else net(batch)


def inputs_of(net, name, batch):
    layer, seen = net.get_submodule(name), []

    def see(module, inputs):
        seen.append(module.quantizer.inputs(inputs[0].detach()).reshape(-1, inputs[0].shape[-1]).double())

    hook = layer.register_forward_pre_hook(see)
    run(net, batch)
    hook.remove()
    return torch.cat(seen) if seen else torch.zeros(0, layer.weight.shape[1]).double()


def calibrate_plainly(net, batches, order, float_net=None):
    """Prepared net, calibrated by whole passes through it as it then is, nothing remembered, a layer at a time: towards
    what the float net's layer gives, by ridge regression on stacked rows."""
    float_net = copy.deepcopy(float_net or net)
    for m in float_net.modules():
        if isinstance(m, pot.PoTQuantizer):
            m.enabled = False
    for name in order:
        layer = net.get_submodule(name)
        x, y = [], []
        for batch in batches:
            now, then = inputs_of(net, name, batch), inputs_of(float_net, name, batch)
            same = now.shape == then.shape and ((then - now) ** 2).sum() < (then**2).sum()
            x, y = [*x, now], [*y, then if same else now]
        x, y = torch.cat(x), torch.cat(y)
        w, moment = layer.weight.detach().double(), x.t() @ x
        ridge = (0.01 * moment.diagonal().mean()).sqrt() * torch.eye(len(moment)).double()
        wanted = torch.cat([y @ w.t(), ridge @ w.t()])
        target = torch.linalg.lstsq(torch.cat([x, ridge]), wanted).solution.t().float()
        with torch.no_grad():
            layer.weight.copy_(gptq(target, layer.quantizer.scale, layer.quantizer.config, moment))


def assert_alike(ours, plain, names):
    for name in names:
        found, expected = ours.get_submodule(name), plain.get_submodule(name).weight
        assert (found.quantizer(found.weight) - expected).abs().lt(1e-4).float().mean() > 0.99, name


def test_a_whole_model_against_plain_passes():
    net, x = trained_net()
    config = PoTConfig(group_size=16)
    ours, plain = copy.deepcopy(net), copy.deepcopy(net)
    prepare(ours, config)
    errors = calibrate(ours, x.split(5))
    prepare(plain, config)
    head = []
    hook = net.head.register_forward_hook(lambda m, i, o: head.append(i[0].detach().flatten(0, 1)))
    net(x)
    hook.remove()
    moment = torch.cat(head).double().t() @ torch.cat(head).double()
    square = moment.diagonal().float()
    plain.emb.quantizer.scale = compute_scale(plain.emb.weight, config, square + 0.01 * square.mean())
    moment.diagonal().add_(0.1 * moment.diagonal().mean())
    before = copy.deepcopy(plain)
    with torch.no_grad():
        plain.emb.weight.copy_(gptq(plain.emb.weight, plain.emb.quantizer.scale, config, moment))
    counts = torch.full((8, 1), 16.0)
    plain.pos.quantizer.scale = compute_scale(plain.pos.weight, config, counts)
    order = ["blocks.0.a", "blocks.0.b", "blocks.0.c", "twice.0", "blocks.1.a", "blocks.1.b", "blocks.1.c"]
    assert list(errors) == order
    calibrate_plainly(plain, [x], order, float_net=before)
    assert_alike(ours, plain, ["emb", *order])
    for name in ("emb", "pos"):
        assert torch.allclose(ours.get_submodule(name).quantizer.scale, plain.get_submodule(name).quantizer.scale)
    assert torch.equal(ours.pos.weight, net.pos.weight)
    assert torch.equal(ours.unused.weight, net.unused.weight)
    assert ours.head.weight is ours.emb.weight and ours.head.quantizer is ours.emb.quantizer


class Odd(nn.Module):
    """Ways through a model that a memory of finished modules, or a set of layers with one input, might get wrong."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        for name in "abcdefg":
            setattr(self, name, nn.Linear(32, 32))
        self.outer = nn.Sequential(nn.Sequential(self.a, nn.SELU()), self.b)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.inside = Inside(self.c)

    def forward(self, x):
        return getattr(self, self.way)(x)

    def second_input(self, x):  # b shares a's input once, not always
        return self.b(x) + self.b(torch.tanh(self.a(x)))

    def skipped(self, x):  # a is not always called where b is
        return self.c((self.a(x) if x[0, 0] > 0 else 0) + self.b(x))

    def again(self, x):  # what a returns the second time depends on b, which is not finished yet
        return self.c(self.b(torch.tanh(self.a(self.b(torch.tanh(self.a(x)))))))

    def nested(self, x):  # a part of outer is called by itself, too
        y = self.outer(x)
        y = self.c(self.outer[0](torch.tanh(y)))
        return self.d(self.outer[0](self.e(torch.relu(y))))

    def in_place(self, x):
        y = self.inside(x * 1.0)
        z = self.a(x)
        y.mul_(2)
        return self.d(torch.tanh(self.b(y + z)))

    def changed_between(self, x):  # one tensor, but not one input
        x = x * 1.0
        y = self.a(x)
        return self.c(y + self.b(x.mul_(torch.linspace(-2, 2, 32))))

    def writes(self, x):
        x = x * 1.0
        self.inside.add_to(x)
        kept = {}
        self.inside(x, kept)
        return self.b(self.a(x) + kept["y"])

    def changes_its_input(self, x):
        x.mul_(2)
        return self.b(torch.tanh(self.a(x)))

    def routed(self, x):
        half = len(self.experts) // 2
        for experts in (self.experts[:half], self.experts[half:]):
            x = x + experts[int(x.abs().sum() * 7) % half](torch.tanh(x))
        return self.g(x)

    def one_dimension(self, x):
        return torch.stack([self.b(torch.tanh(self.a(row))) for row in x])


class Inside(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, kept=None):
        y = self.linear(x)
        if kept is not None:
            kept["y"] = y
        return y

    def add_to(self, x):
        x += torch.tanh(self.linear(x))


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize(
    "way",
    [
        "second_input",
        "skipped",
        "again",
        "nested",
        "in_place",
        "changed_between",
        "writes",
        "changes_its_input",
        "routed",
        "one_dimension",
    ],
)
def test_odd_ways_against_plain_passes(way, act_bits):
    torch.manual_seed(0)
    net, batches = Odd(way).eval(), list(inputs_like(32, 96).split(8))
    config = PoTConfig(group_size=16, act_bits=act_bits)
    prepare(net, config)
    plain = copy.deepcopy(net)
    order = list(calibrate(net, batches))
    if way == "routed":
        stages = [int(name.removeprefix("experts.")) // 4 for name in order[:-1]]
        assert stages == sorted(stages) and order[-1] == "g" and len(order) > 6
    calibrate_plainly(plain, batches, order)
    assert_alike(net, plain, order)


@pytest.mark.parametrize("config", [PoTConfig(), PoTConfig(bits=3), PoTConfig(terms=2), PoTConfig(act_bits=8)], ids=str)
def test_errors_and_loss_of_a_trained_model_fall(house, float_run, config):
    import checkpoint
    import dataset
    from dataset import random_windows
    from metrics import evaluate

    ids, _ = dataset.load(str(house / "data" / "tiny"), "train")
    losses, done = [], []
    for calibrated in (False, True):
        model, _ = checkpoint.load_float(str(house / float_run))
        model.train()
        prepare(model, config)
        if calibrated:
            errors = calibrate(model, random_windows(ids, 32, 64, 1).split(16), lambda *a: done.append(a))
            assert len(errors) == 8 and all(after < before for before, after in errors.values())
            assert done == [(i, 8) for i in range(1, 9)] and model.training
        losses.append(evaluate(model, ids[:2000])["loss"])
        assert evaluate(convert(model), ids[:2000])["loss"] == losses[-1]
    assert losses[1] < losses[0]


def test_training_goes_on_from_the_codes():
    net, x = trained_net()
    prepare(net, PoTConfig(bits=3, group_size=16))
    calibrate(net, [x])
    losses = []
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(30):
        loss = F.cross_entropy(net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping", "Conv1D", "bfloat16", "channels of nothing"])
def test_other_models_and_batches(kind):
    net, x = trained_net()
    batches = [x]
    if kind == "tuple":
        batches = [(x, 0.1)]
    if kind == "list":
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    if kind == "mapping":
        batches = [{"x": x, "shift": 0.1}]
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        net, batches = nn.Sequential(Conv1D(24, 32), nn.ReLU(inplace=True), Conv1D(32, 24)), [torch.randn(50, 32)]
        config = PoTConfig(granularity="channel")
    if kind == "bfloat16":
        net.bfloat16()
    if kind == "channels of nothing":  # dead inputs, so a Hessian with zeros
        net, batches = nn.Sequential(nn.ReLU(), nn.Linear(32, 32)), [torch.randn(5, 32) * (torch.arange(32) < 9)]
    config = PoTConfig(granularity="channel")
    prepare(net, config)
    errors = calibrate(net, batches)
    assert errors and all(after < before for before, after in errors.values())
    assert all(torch.isfinite(p).all() for p in net.parameters())
    batch = (x,) if kind == "list" else batches[0]
    y = net(**batch) if kind == "mapping" else run(net, batch)
    z = convert(net)
    assert torch.equal(y, z(**batch) if kind == "mapping" else run(z, batch))


def test_a_llama_shares_passes_among_layers_with_one_input():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    x, done = torch.randint(50, (8, 16)), []
    prepare(model, PoTConfig(group_size=16))
    plain = copy.deepcopy(model)
    errors = calibrate(model, [{"input_ids": b} for b in x.split(4)], lambda *a: done.append(a))
    assert len(errors) == 15 and len(done) == 9  # 2 x (qkv, o, gate and up, down), head
    assert all(after < before for before, after in errors.values())
    # The last layer is what whole passes give as well.
    before = copy.deepcopy(plain)
    weights = {n: w for n, w in model.state_dict().items() if "lm_head" not in n}
    plain.load_state_dict(weights, strict=False)
    calibrate_plainly(plain, [x], ["lm_head"], float_net=before)
    assert_alike(model, plain, ["lm_head"])


def test_embedding_rows_count_as_often_as_they_are_read():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 16))
    config = PoTConfig(granularity="tensor")
    prepare(net, config)
    x = torch.tensor([[1, 1, 1, 1, 1, 1, 2]])
    net[0].weight.data[1] *= 3
    calibrate(net, [x])
    q, w = net[0].quantizer, net[0].weight.detach()
    count = torch.bincount(x.flatten(), minlength=10).float()
    weights = (count + 0.01 * count.mean()).unsqueeze(1)

    def error(scale):
        return (weights * (w - pot.fake_quantize(w, scale, config)) ** 2).sum().item()

    scales = [torch.tensor([[s]]) for s in torch.linspace(0.02, 2, 2000) * w.abs().max()]
    assert error(q.scale) <= min(map(error, scales)) * 1.02
    assert isinstance(net[0], PoTEmbedding)


def test_layers_switched_off_stay_as_they_are():
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    net.blocks[0]["c"].quantizer.enabled = False
    before = net.blocks[0]["c"].weight.clone()
    assert "blocks.0.c" not in calibrate(net, [x])
    assert torch.equal(net.blocks[0]["c"].weight, before)


def test_nothing_is_left_behind():
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    own, net.twice.forward = net.twice.forward, lambda x: own(x) * 2  # as libraries do that hook into a module
    theirs = net.twice.forward
    calibrate(net, [x])
    assert hooks == [len(m._forward_pre_hooks) for m in net.modules()]
    assert [m for m in net.modules() if "forward" in vars(m)] == [net.twice] and net.twice.forward is theirs


def test_bad_input():
    net, x = trained_net()
    with pytest.raises(ValueError, match="call prepare first"):
        calibrate(net, [x])
    prepare(net, PoTConfig(group_size=16))
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        calibrate(net, [])
    scales = [m.quantizer.scale.clone() for m in (net.emb, net.pos)]
    net.blocks[0]["a"].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="emb: its inputs hold NaN or inf"):
        calibrate(net, [x])
    assert all(torch.equal(m.quantizer.scale, s) for m, s in zip((net.emb, net.pos), scales))
    net.pos.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="pos: its weight holds NaN or inf"):
        calibrate(net, [x])
    assert not any("forward" in vars(m) for m in net.modules())


def test_gpt_of_our_own():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=64))
    prepare(model, PoTConfig())
    errors = calibrate(model, [torch.randint(65, (8, 16))])
    assert [n.removeprefix("transformer.h.") for n in errors][:4] == [
        "0.attn.c_attn",
        "0.attn.c_proj",
        "0.mlp.c_fc",
        "0.mlp.c_proj",
    ]
