"""calibrate.py against a reference of GPTQ in float64, which inverts the Hessian for every weight column."""

import copy
import math
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import calibrate as calibrate_module
import pot
from calibrate import calibrate, train_blocks
from model import GPT, GPTConfig
from pot import PoTConfig, PoTEmbedding, compute_unit, convert, prepare

CONFIGS = [
    PoTConfig(group_size=32),
    PoTConfig(bits=3, granularity="channel"),
    PoTConfig(terms=2, granularity="tensor"),
    PoTConfig(grid="uniform", group_size=16),
    PoTConfig(bits=5, range=7, grid="paper", granularity="tensor", scale="absmax"),
]


def gptq(w, unit, config, moment):
    """Quantizes w (out, in) column by column, given the inputs' second moment (in, in), then each column again, given all
    others. Returns float64 (out, in)."""
    dtype, target = w.dtype, w.double()
    w, hessian = w.double().clone(), moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(len(moment))
    levels = torch.tensor(config.levels(), dtype=torch.float64)
    levels = torch.cat([-levels.flip(0), levels])
    remaining = moment.diagonal().argsort(descending=True).tolist()
    size, order = w.shape[1] // unit.shape[1], remaining

    def nearest(column, j):
        u = unit.double()[:, j // size].expand(len(w))
        column = column.to(dtype).double()  # the layer stores this dtype
        if config.grid == "paper":  # rounds to integers, then in the log domain
            a = (column / u).abs().round()
            return torch.where(a > 0, torch.exp2(a.log2().round()).clamp(max=config.top), 0) * column.sign() * u
        return levels[(column[:, None] / u[:, None] - levels).abs().argmin(1)] * u

    while remaining:
        j, inverse = remaining[0], torch.linalg.inv(hessian[remaining][:, remaining])
        column = w[:, j].to(dtype).double()
        q = nearest(column, j)
        error = (column - q) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0]
        w[:, j] = q
        remaining = remaining[1:]
    for j in order * calibrate_module.SWEEPS:
        others = [k for k in order if k != j]  # the least squared error is where its derivative by column j is zero
        best = target[:, j] + (target - w)[:, others] @ hessian[others, j] / hessian[j, j]
        w[:, j] = nearest(best, j)
    return w


def unit_of(w, config, moment):
    squares = moment.diagonal().float()
    return (
        compute_unit(w, config, squares + 0.01 * squares.mean()) if config.scale == "mse" else compute_unit(w, config)
    )


def split(x, turn=0):
    """Rows that calibrate fits, and rows that it keeps aside."""
    piece, n = 7 - turn % 8, len(x)
    start, end = n * piece // 8, n * (piece + 1) // 8
    return (torch.cat([x[:start], x[end:]]), x[start:end]) if n >= 8 else (x, x)


def correlated_inputs(n, rows=300):
    return torch.randn(rows, n) @ torch.randn(n, n) / n**0.5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("n", [96, 160])  # GPTQ works in blocks of 128: one block, and two
def test_one_layer_against_float64(config, n):
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(n, 24)), correlated_inputs(n, 2000)
    prepare(layer, config)
    w, old_unit = layer[0].weight.detach().clone(), layer[0].quantizer.unit
    ((before, after),) = calibrate(layer, [x]).values()
    fitted, aside = split(x.double())
    unit = unit_of(w, config, fitted.t() @ fitted)
    expected = gptq(w, unit, config, fitted.t() @ fitted)
    actual = layer[0].quantizer(layer[0].weight).detach().double()
    assert (actual - expected).abs().lt(1e-5).float().mean() > 0.995  # ties may round either way
    rounded = pot.fake_quantize(w, old_unit, config)
    errors = [((aside @ (w - q).double().t()) ** 2).sum().item() for q in (rounded, actual)]
    total = ((aside @ w.double().t()) ** 2).sum().item()
    assert before == pytest.approx(errors[0] / total, rel=1e-3) and after == pytest.approx(errors[1] / total, rel=1e-3)
    assert after < before
    assert torch.allclose(layer[0].quantizer.unit, unit)
    # calibrate leaves weights unrounded. The layer's own rounding gives the codes, and packing keeps them.
    assert not torch.equal(layer[0].weight, layer[0].quantizer(layer[0].weight))
    y = layer(x)
    assert torch.equal(convert(layer)(x), y)


@pytest.mark.parametrize("systematic", [True, False])
def test_correction_is_as_large_as_text_kept_aside_supports(systematic):
    torch.manual_seed(0)
    w, change = torch.randn(8, 64), torch.randn(64, 64) / 64
    moments = []
    for rows in (70, 2000):  # fitted on so few that noise looks like something to make up for
        x = torch.randn(rows, 64)
        d = x @ change + (0 if systematic else torch.randn(rows, 64) / 2)
        moments.append(torch.stack([m.t() @ n for m, n in ((x, x), (d, x), (d, d))]))
    fitted, aside = moments
    size = calibrate_module.correction(w, fitted[:2], aside).norm()
    share = size / (w @ change.t()).norm()
    assert share > 0.8 if systematic else share < 0.1


def test_few_tokens_are_worth_a_warning():
    layer = nn.Sequential(nn.Linear(64, 8))
    prepare(layer)
    with pytest.warns(UserWarning, match="99 tokens are few for the 64 input features of 0: calibrate on 512 or more"):
        calibrate(layer, [torch.randn(99, 64)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(layer, [torch.randn(512, 64)])


def test_model_stays_rounded_if_that_is_nearer_to_the_float_model(monkeypatch):
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    before = copy.deepcopy(net)
    # As by chance, each layer does better on its own rows kept aside, while the model gets worse.
    monkeypatch.setattr(
        calibrate_module, "calibrate_layer", lambda layer, *_: layer.weight.neg_() is None or (2.0, 1.0)
    )
    with pytest.warns(UserWarning, match="stays rounded"):
        errors = calibrate(net, [x])
    assert set(errors.values()) == {(2.0, 2.0)}
    assert torch.equal(net(x), before(x))


def test_model_stays_rounded_if_only_its_output_gets_worse():
    """The last layer does better, but the output depends on another one, too."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            y = self.a(x) + 0.01 * self.b(x)
            return {"few": y.sum(-1), "output": F.layer_norm(y, (32,))}

    torch.manual_seed(0)
    net, x = Sum(), torch.randn(4, 128, 32)
    prepare(net, PoTConfig(group_size=16))
    before = copy.deepcopy(net)
    calibrate_layer = calibrate_module.calibrate_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            calibrate_module,
            "calibrate_layer",
            lambda layer, *args: (
                (layer.weight.neg_(), (2.0, 1.0))[1] if layer is net.a else calibrate_layer(layer, *args)
            ),
        )
        with pytest.warns(UserWarning, match="stays rounded"):
            calibrate(net, list(x))
    assert torch.equal(net(x[0])["output"], before(x[0])["output"])


def test_memory_does_not_grow_with_depth():
    torch.manual_seed(0)
    shape = GPTConfig(16, 50, 6, 2, 32, n_inner=64, norm="rms", position="rotary", mlp="swiglu", bias=False)
    model, outputs, alive = GPT(shape).eval(), [], []
    prepare(model, PoTConfig(group_size=16))
    for block in model.transformer.h:
        block.register_forward_hook(lambda m, i, output: outputs.append(weakref.ref(output)))
    calibrate(
        model, list(torch.randint(50, (2, 64, 16))), lambda *_: alive.append(sum(r() is not None for r in outputs))
    )
    # 2 batches, 6 blocks, 6 passes. Two passes wait between layers, each for both batches.
    assert len(outputs) == 2 * 6 * 6 and 0 < max(alive) <= 2 * 2


def test_threads_end(monkeypatch):
    """Each pass has a thread. They end with calibrate, also if the model fails, or the user stops it."""
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    threads = threading.active_count()
    calibrate(net, [x, x])
    assert threading.active_count() == threads

    def interrupt(*_):
        assert threading.active_count() == threads + 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(net, [x, x], interrupt)
    assert threading.active_count() == threads
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == 12:  # neither in the first pass over a batch nor in the second
            raise ZeroDivisionError

    net.twice.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        calibrate(net, [x, x])
    assert threading.active_count() == threads and not any(m._forward_pre_hooks for m in net.blocks)


class Forgiving(nn.Module):
    """Goes on after an error."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.dtypes = nn.Linear(32, 32), nn.Linear(32, 32), []

    def forward(self, x):
        try:
            x = x @ x.new_ones(7, 7)
        except RuntimeError:
            x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = torch.tanh(x.float() @ torch.eye(32))
        y = self.b(x)
        self.dtypes.append((x.dtype, y.dtype))
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_and_autocast_reach_the_model(dtype):
    torch.manual_seed(0)
    net, x = Forgiving().eval(), correlated_inputs(32)
    prepare(net, PoTConfig(group_size=16))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert list(calibrate(nn.Sequential(net, nn.Linear(32, 32)), [x])) == ["0.a", "0.b"]
    assert net.dtypes == [(torch.float32, dtype)] * len(net.dtypes)


def test_compiled_model():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), correlated_inputs(32)
    prepare(net, PoTConfig(group_size=16))
    expected = copy.deepcopy(net)
    calibrate(expected, [x])
    calibrate(torch.compile(net, backend="eager"), [x])
    assert_same_weights(net, expected, ["0", "2"])


class Net(nn.Module):
    """Has layers that share an input, a tied head, a layer called twice, an in-place activation and an unused layer."""

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


def test_layer_in_bfloat16_against_float64():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(96, 200)).bfloat16(), correlated_inputs(96).bfloat16()
    config = PoTConfig(terms=2, group_size=32)
    prepare(layer, config)
    w = layer[0].weight.detach().clone()
    calibrate(layer, [x])
    fitted, _ = split(x.double())
    moment = fitted.t() @ fitted
    expected = gptq(w, unit_of(w, config, moment), config, moment).bfloat16()
    assert (layer[0].quantizer(layer[0].weight) == expected).float().mean() > 0.995


def test_layer_stays_if_gptq_makes_it_worse(monkeypatch):
    layer, x = nn.Sequential(nn.Linear(64, 8)), torch.randn(99, 64)
    prepare(layer)
    w = layer[0].weight.detach().clone()
    monkeypatch.setattr("calibrate.gptq", lambda w, *_: -w)
    ((before, after),) = calibrate(layer, [x]).values()
    assert before == after > 0 and torch.equal(layer[0].weight, w)


@pytest.mark.parametrize("kind", ["none", "empty", "sparse", "nested", "integers", "scalar"])
def test_outputs_that_cannot_be_compared(kind):
    """The layers are calibrated all the same."""
    make = {"none": lambda y: None, "empty": lambda y: y[..., :0], "sparse": lambda y: y[0].to_sparse()}
    make |= {"nested": lambda y: torch.nested.nested_tensor([y[0, 0], y[0, 1, :3]])}
    make |= {"integers": lambda y: y.argmax(-1), "scalar": lambda y: y.sum()}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x):
            return make[kind](self.a(x))

    torch.manual_seed(0)
    net = Net()
    prepare(net, PoTConfig(group_size=16))
    ((before, after),) = calibrate(net, list(correlated_inputs(32, 512).view(2, 4, 64, 32))).values()
    assert after < before


def test_finished_modules_are_not_computed_again(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=5, n_head=2, n_embd=64))
    prepare(model, PoTConfig())
    calls = []
    rows, gelu = pot.PoTQuantizer.rows, F.gelu
    monkeypatch.setattr(pot.PoTQuantizer, "rows", lambda *a: calls.append("embedding") or rows(*a))
    monkeypatch.setattr(F, "gelu", lambda *a, **k: calls.append("gelu") or gelu(*a, **k))
    calibrate(model, [torch.randint(65, (8, 16))] * 6)
    # 2 tables, 5 blocks. RECORDED of 6 batches have a first pass. All have one of the float model, of the rounded one,
    # and of the calibrated one, to compare these, because they have few rows. All have a pass of the float model and of the quantized model, which go on after each set of layers.
    assert calls.count("embedding") == (4 + 6 * 3 + 6 * 2) * 2
    assert calls.count("gelu") == (4 + 6 * 3 + 6 * 2) * 5


def run(net, batch):
    batch = copy.deepcopy(batch)
    return net(*batch) if isinstance(batch, (tuple, list)) else net(batch)


def layer_inputs(net, name, batch):
    layer, recorded = net.get_submodule(name), []

    def record(module, inputs):
        recorded.append(module.quantizer.inputs(inputs[0].detach()).reshape(-1, inputs[0].shape[-1]).double())

    hook = layer.register_forward_pre_hook(record)
    run(net, batch)
    hook.remove()
    return recorded


def calibrate_reference(net, batches, order, float_net=None, actual_net=None):
    """Reference of calibrate: runs the whole net again for each layer and caches nothing.

    The target of a layer is the output of the same layer in the float net, by ridge regression on stacked rows, shrunk
    by rows kept aside. With actual_net, each layer is compared with its layer and takes its weights, so that the next
    layers see the same inputs.
    """
    float_net = copy.deepcopy(float_net or net)
    for m in float_net.modules():
        if isinstance(m, pot.PoTQuantizer):
            m.enabled = False
    for name in order:
        layer = net.get_submodule(name)
        parts = []
        for i, batch in enumerate(batches):
            current, reference = layer_inputs(net, name, batch), layer_inputs(float_net, name, batch)
            for k, x in enumerate(current):
                y = reference[k] if len(current) == len(reference) and reference[k].shape == x.shape else x
                y = y if ((y - x) ** 2).sum() < (y**2).sum() else x
                parts.append((*split(x, i + k), *split(y, i + k)))
        if not parts:  # only the float net reaches it
            continue
        x, x_aside, y, y_aside = map(torch.cat, zip(*parts))
        w, moment = layer.weight.detach().double(), x.t() @ x
        ridge = (0.01 * moment.diagonal().mean()).sqrt() * torch.eye(len(moment)).double()
        rhs = torch.cat([(y - x) @ w.t(), ridge @ w.t() * 0])
        delta = torch.linalg.lstsq(torch.cat([x, ridge]), rhs).solution
        missed, added = (y_aside - x_aside) @ w.t(), x_aside @ delta
        if (missed * added).sum() > 0:
            share = min(1, ((missed * added).sum() / (added**2).sum()).item())
            share *= min(1, (1 - ((missed - share * added) ** 2).sum() / (missed**2).sum()).item())
            w = w + share * delta.t()
        with torch.no_grad():
            config, unit = layer.quantizer.config, unit_of(w.float(), layer.quantizer.config, moment)
            target, rounded = gptq(w.float(), unit, config, moment), layer.quantizer(layer.weight).double()
            w = layer.weight.double()
            errors = [((y_aside @ w.t() - x_aside @ q.t()) ** 2).sum() for q in (target, rounded)]
            if errors[0] < errors[1]:
                layer.quantizer.unit = unit
                layer.weight.copy_(target)
            if actual_net is not None and not 0.99 < errors[0] / errors[1] < 1.01:
                assert_same_weights(actual_net, net, [name])
            if actual_net is not None:
                layer.quantizer.unit = actual_net.get_submodule(name).quantizer.unit
                layer.weight.copy_(actual_net.get_submodule(name).weight)


def assert_same_weights(actual_net, expected_net, names):
    """Most are the same: where two units or codes are almost equally good, float32 and float64 may choose another."""
    for name in names:
        layer, expected = actual_net.get_submodule(name), expected_net.get_submodule(name)
        expected = expected.quantizer(expected.weight)
        assert (layer.quantizer(layer.weight) - expected).abs().lt(1e-4).float().mean() > 0.95, name


def test_model_against_reference(monkeypatch):
    monkeypatch.setattr(calibrate_module, "_distance", lambda *_: 0.0)
    net, x = trained_net()
    config = PoTConfig(group_size=16)
    calibrated, reference = copy.deepcopy(net), copy.deepcopy(net)
    prepare(calibrated, config)
    errors = calibrate(calibrated, x.split(5))
    prepare(reference, config)
    head_inputs = []
    hook = net.head.register_forward_hook(lambda m, i, o: head_inputs.append(i[0].detach().flatten(0, 1)))
    net(x)
    hook.remove()
    moment = torch.cat(head_inputs).double().t() @ torch.cat(head_inputs).double()
    reference.emb.quantizer.unit = unit_of(reference.emb.weight, config, moment)
    moment.diagonal().add_(0.3 * moment.diagonal().mean())
    float_net = copy.deepcopy(reference)
    with torch.no_grad():
        reference.emb.weight.copy_(gptq(reference.emb.weight, reference.emb.quantizer.unit, config, moment))
    counts = torch.full((8, 1), 16.0)
    reference.pos.quantizer.unit = compute_unit(reference.pos.weight, config, counts)
    order = ["blocks.0.a", "blocks.0.b", "blocks.0.c", "twice.0", "blocks.1.a", "blocks.1.b", "blocks.1.c"]
    assert list(errors) == order
    calibrate_reference(reference, x.split(5), order, float_net=float_net)
    assert_same_weights(calibrated, reference, ["emb", *order])
    for layer, expected in ((calibrated.emb, reference.emb), (calibrated.pos, reference.pos)):
        assert torch.allclose(layer.quantizer.unit, expected.quantizer.unit)
    assert torch.equal(calibrated.pos.weight, net.pos.weight)
    assert torch.equal(calibrated.unused.weight, net.unused.weight)
    assert calibrated.head.weight is calibrated.emb.weight and calibrated.head.quantizer is calibrated.emb.quantizer


class ControlFlow(nn.Module):
    """Models whose control flow passes that wait, or a grouping of layers by input, may get wrong."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        for name in "abcdefg":
            setattr(self, name, nn.Linear(32, 32))
        self.outer = nn.Sequential(nn.Sequential(self.a, nn.SELU()), self.b)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.inside = Inside(self.c)

    def forward(self, x):
        return getattr(self, self.case)(x)

    def second_input(self, x):  # b is called twice, and shares the input of a once
        return self.b(x) + self.b(torch.tanh(self.a(x)))

    def skipped(self, x):  # some batches skip a
        return self.c((self.a(x) if x[0, 0] > 0 else 0) + self.b(x))

    def called_again(self, x):  # the second call of a depends on b, which is not finished yet
        return self.c(self.b(torch.tanh(self.a(self.b(torch.tanh(self.a(x)))))))

    def nested(self, x):  # a part of outer is also called alone
        y = self.outer(x)
        y = self.c(self.outer[0](torch.tanh(y)))
        return self.d(self.outer[0](self.e(torch.relu(y))))

    def modifies_output(self, x):
        y = self.inside(x * 1.0)
        z = self.a(x)
        y.mul_(2)
        return self.d(torch.tanh(self.b(y + z)))

    def modifies_shared_input(self, x):  # a and b take the same tensor with different values
        x = x * 1.0
        y = self.a(x)
        return self.c(y + self.b(x.mul_(torch.linspace(-2, 2, 32))))

    def adds_in_place(self, x):
        x = x * 1.0
        self.inside.add_to(x)
        kept = {}
        self.inside(x, kept)
        return self.b(self.a(x) + kept["y"])

    def modifies_batch(self, x):
        x.mul_(2)
        return self.b(torch.tanh(self.a(x)))

    def routed(self, x):
        half = len(self.experts) // 2
        for experts in (self.experts[:half], self.experts[half:]):
            x = x + experts[int(x.abs().sum() * 7) % half](torch.tanh(x))
        return self.g(x)

    def used_again(self, x):  # b takes the output of a, and so does d, later
        y = self.a(x)
        return self.e(self.d(torch.tanh(self.c(self.b(y)))) + y)

    def gradients_on(self, x):
        with torch.enable_grad():
            y = torch.tanh(self.a(x))
        return self.b(y)

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
    "case",
    [
        "second_input", "skipped", "called_again", "nested", "modifies_output", "modifies_shared_input",
        "adds_in_place", "modifies_batch", "routed", "one_dimension", "used_again", "gradients_on",
    ],
)  # fmt: skip
def test_control_flow_against_reference(case, act_bits, monkeypatch):
    monkeypatch.setattr(calibrate_module, "_distance", lambda *_: 0.0)  # 4 rows would decide
    torch.manual_seed(0)
    net, batches = ControlFlow(case).eval(), list(correlated_inputs(32, 96).split(8))
    config = PoTConfig(group_size=16, act_bits=act_bits)
    prepare(net, config)
    reference = copy.deepcopy(net)
    order = list(calibrate(net, batches))
    if case == "routed":
        stages = [int(name.removeprefix("experts.")) // 4 for name in order[:-1]]
        assert stages == sorted(stages) and order[-1] == "g" and len(order) > 6
    calibrate_reference(reference, batches, order, actual_net=net)


@pytest.mark.parametrize("config", [PoTConfig(), PoTConfig(bits=3), PoTConfig(terms=2), PoTConfig(act_bits=8)], ids=str)
def test_calibration_lowers_errors_and_loss_of_a_trained_model(workdir, float_run, config):
    import checkpoint
    import dataset
    from dataset import random_windows
    from metrics import evaluate

    ids, _ = dataset.load(str(workdir / "data" / "tiny"), "train")
    losses, progress = [], []
    for calibrated in (False, True):
        model, _ = checkpoint.load_float(str(workdir / float_run))
        model.train()
        prepare(model, config)
        if calibrated:
            errors = calibrate(model, random_windows(ids, 32, 64, 1).split(16), lambda *a: progress.append(a))
            assert len(errors) == 8 and all(after < before for before, after in errors.values())
            assert progress == [(i, 8) for i in range(1, 9)] and model.training
        losses.append(evaluate(model, ids[:2000])["loss"])
        assert evaluate(convert(model), ids[:2000])["loss"] == losses[-1]
    assert losses[1] < losses[0]


def test_training_continues_after_calibration():
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


class ByName(nn.Module):
    """Passes the inputs of layers by name."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 24), nn.Linear(24, 24), nn.Linear(24, 9, bias=False)
        self.b.weight = self.table.weight

    def forward(self, ids):
        x = self.a(input=self.table(input=ids))
        return self.b(input=self.a(input=x.relu()))


def test_inputs_passed_by_name(monkeypatch):
    monkeypatch.setattr(calibrate_module, "_distance", lambda *_: 0.0)
    torch.manual_seed(0)
    net, ids = ByName(), torch.randint(9, (4, 100))
    prepare(net, PoTConfig(granularity="channel"))
    before = net.a.weight.clone()
    errors = calibrate(net, [ids, ids.flip(1)])
    assert errors.keys() == {"a"} and not torch.equal(net.a.weight, before)
    y = net(ids)
    assert torch.allclose(convert(net)(ids), y, atol=1e-5)


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping", "Conv1D", "bfloat16", "dead channels"])
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
    if kind == "dead channels":  # the Hessian has zeros on the diagonal
        net, batches = nn.Sequential(nn.ReLU(), nn.Linear(32, 32)), [torch.randn(5, 32) * (torch.arange(32) < 9)]
    config = PoTConfig(granularity="channel")
    prepare(net, config)
    errors = calibrate(net, batches)
    assert errors and all(after <= before for before, after in errors.values())
    assert all(torch.isfinite(p).all() for p in net.parameters())
    batch = (x,) if kind == "list" else batches[0]
    y = net(**batch) if kind == "mapping" else run(net, batch)
    z = convert(net)
    assert torch.equal(y, z(**batch) if kind == "mapping" else run(z, batch))


def test_a_terminal_sees_one_line_of_progress(monkeypatch, capsys):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(99, 16)
    prepare(net, PoTConfig(group_size=16))
    calibrate(net, [x])
    assert capsys.readouterr() == ("", "")  # standard error is no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    calibrate(net, [x])
    line = "calibrate: {} of 2 sets of layers or blocks"
    assert capsys.readouterr().err == f"{line.format(1)}\r{line.format(2)}\n"
    calibrate(net, [x], lambda *_: None)
    assert capsys.readouterr() == ("", "")


def test_llama_shares_passes_among_layers_with_one_input(monkeypatch):
    monkeypatch.setattr(calibrate_module, "_distance", lambda *_: 0.0)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    x, progress = torch.randint(50, (8, 16)), []
    prepare(model, PoTConfig(group_size=16))
    reference = copy.deepcopy(model)
    errors = calibrate(model, [{"input_ids": b} for b in x.split(4)], lambda *a: progress.append(a))
    assert len(errors) == 15 and len(progress) == 9  # 2 x (qkv, o, gate and up, down), head
    assert all(after <= before for before, after in errors.values())
    # The reference gives the same last layer.
    before = copy.deepcopy(reference)
    weights = {n: w for n, w in model.state_dict().items() if "lm_head" not in n}
    reference.load_state_dict(weights, strict=False)
    calibrate_reference(reference, x.split(4), ["lm_head"], float_net=before)
    assert_same_weights(model, reference, ["lm_head"])


def test_embedding_rows_are_weighted_by_their_frequency():
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

    def error(unit):
        return (weights * (w - pot.fake_quantize(w, unit, config)) ** 2).sum().item()

    units = [torch.tensor([[u]]) for u in torch.linspace(0.02, 2, 2000) * w.abs().max() / config.top]
    assert error(q.unit) <= min(map(error, units)) * 1.02
    assert isinstance(net[0], PoTEmbedding)


def test_disabled_layers_do_not_change():
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    net.blocks[0]["c"].quantizer.enabled = False
    before = net.blocks[0]["c"].weight.clone()
    assert "blocks.0.c" not in calibrate(net, [x])
    assert torch.equal(net.blocks[0]["c"].weight, before)


def test_layer_without_text_to_learn_from_stays_rounded():
    """All its inputs are zero but those that are kept aside."""
    net = torch.nn.Sequential(nn.Linear(16, 8))
    prepare(net, PoTConfig(group_size=16))
    before, x = net[0].weight.clone(), torch.zeros(64, 16)
    x[56:] = torch.randn(8, 16)
    ((error, same),) = calibrate(net, [x]).values()
    assert error == same > 0 and torch.equal(net[0].weight, before)


def test_hooks_and_replaced_forwards_are_restored():
    net, x = trained_net()
    prepare(net, PoTConfig(group_size=16))
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    original = net.twice.forward
    net.twice.forward = lambda x: original(x) * 2  # some libraries replace forward like this
    replaced = net.twice.forward
    calibrate(net, [x])
    assert hooks == [len(m._forward_pre_hooks) for m in net.modules()]
    assert [m for m in net.modules() if "forward" in vars(m)] == [net.twice] and net.twice.forward is replaced


def test_bad_input():
    net, x = trained_net()
    with pytest.raises(ValueError, match="call prepare first"):
        calibrate(net, [x])
    prepare(net, PoTConfig(group_size=16))
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        calibrate(net, [])
    units = [m.quantizer.unit.clone() for m in (net.emb, net.pos)]
    net.blocks[0]["a"].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="emb: its inputs hold NaN or inf"):
        calibrate(net, [x])
    assert all(torch.equal(m.quantizer.unit, u) for m, u in zip((net.emb, net.pos), units))
    net.pos.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="pos: its weight holds NaN or inf"):
        calibrate(net, [x])
    assert not any("forward" in vars(m) for m in net.modules())


def test_layer_names_of_nanopot_gpt():
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


# --- training block by block ---


def blocks_and_text():
    torch.manual_seed(0)
    reference = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=3, n_head=2, n_embd=64)).eval()
    model = copy.deepcopy(reference)
    prepare(model, PoTConfig(bits=3))
    text = torch.randint(65, (96, 32), generator=torch.Generator().manual_seed(1))
    return model, reference, text


def hidden_states(model, x):
    """Input and output of each block in a forward pass of the whole model."""
    states = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: states.append((args[0], out))) for block in model.transformer.h
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return states


def test_trained_blocks_are_closer_to_the_float_model():
    model, reference, text = blocks_and_text()
    calibrate(model, text[:16].split(8), None)
    rounded, batches, new = copy.deepcopy(model), list(text[:64].split(4)), text[64:]
    model.train()
    errors = train_blocks(model, reference, model.transformer.h, batches, progress=None)
    assert model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        aim = reference(new)
        before, after = ((m.eval()(new) - aim).square().mean().item() for m in (rounded, model))
    assert after < 0.95 * before
    # The errors that it reports, from forward passes of the whole models.
    aside = batches[: len(batches) // 8]
    for k, (_, reported) in enumerate(errors):
        losses = []
        for batch in aside:
            out, aim = (hidden_states(m, batch)[k][1].double() for m in (model, reference))
            losses.append(((out - aim).norm(dim=-1) / aim.norm(dim=-1)).square().mean().item())
        assert reported == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert reported < errors[k][0]


def test_block_that_training_makes_worse_stays_as_it_was():
    model, reference, text = blocks_and_text()
    before = copy.deepcopy(model.state_dict())
    errors = train_blocks(model, reference, model.transformer.h, text.split(8), learning_rate=100.0, progress=None)
    assert all(a == b for a, b in errors)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_train_blocks_in_another_order_or_without_a_call():
    model, reference, text = blocks_and_text()
    with pytest.raises(ValueError, match="must be called one after the other, in the given order"):
        train_blocks(model, reference, list(model.transformer.h)[::-1], [text, text])
    for m in (model, reference):
        m.extra = nn.Identity()
    with pytest.raises(ValueError, match="did not call all blocks"):
        train_blocks(model, reference, [*model.transformer.h, model.extra], [text, text])
    assert model(text[:1]).shape == (1, 32, 65)  # the blocks work again
    with pytest.raises(ValueError, match="1 batches are too few: pass at least 2"):
        train_blocks(model, reference, model.transformer.h, [text])
    with pytest.raises(ValueError, match="a block is there twice"):
        train_blocks(model, reference, [*model.transformer.h, model.transformer.h[0]], [text, text])


def test_train_blocks_interrupted_in_a_block():
    model, reference, text = blocks_and_text()
    before, calls = copy.deepcopy(model.state_dict()), []

    def interrupt(grad):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    next(model.transformer.h[0].parameters()).register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_blocks(model, reference, model.transformer.h, text.split(8), progress=None)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_train_blocks_keeps_a_forward_of_a_block_itself():
    """accelerate puts such a forward on blocks that it moves between devices."""
    model, reference, text = blocks_and_text()
    block, calls = model.transformer.h[0], []
    forward = block.forward
    block.forward = lambda *args: calls.append(1) or forward(*args)
    train_blocks(model, reference, model.transformer.h, text.split(8), progress=None)
    calls.clear()
    model(text[:1])
    assert calls == [1]


def test_train_blocks_that_give_no_tensor():
    class Block(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    reference = nn.Sequential(nn.Embedding(9, 64), Block(64, 64))
    model = copy.deepcopy(reference)
    prepare(model)
    with pytest.raises(ValueError, match="a block gives a tuple, and must give a tensor"):
        train_blocks(model, reference, [model[1]], [torch.arange(9), torch.arange(9)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_train_blocks_of_transformers(kind, attention):
    """A cache of keys and values, the default, makes no difference."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=65)
        config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
    else:
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=65, attn_implementation=attention)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    text, errors = torch.randint(65, (48, 16)), []
    for options in ({"use_cache": False}, {}):
        model = copy.deepcopy(reference)
        prepare(model)
        blocks = model.model.layers if kind == "llama" else model.transformer.h
        batches = [{"input_ids": x} | options for x in text[:40].split(4)]
        with torch.no_grad():
            aim = reference(text[40:]).logits
            before = (model(text[40:]).logits - aim).square().mean()
            errors.append(train_blocks(model, reference, blocks, batches, progress=None))
            assert (model(text[40:]).logits - aim).square().mean() < before
    assert errors[0] == errors[1]
