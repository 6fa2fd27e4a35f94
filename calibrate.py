"""
GPTQ for power-of-two weights: better post-training quantization from a little text. Copy this file beside pot.py.

    prepare(model, PoTConfig(bits=4))
    calibrate(model, batches)        # batches of text, 16k tokens are usual: seconds to minutes, no training
    convert(model)

Rounding to nearest treats each weight alone. GPTQ (Frantar et al., arXiv 2210.17323) rounds the weights of one input
feature after the other, and the features that are not yet rounded make up for the error in the layer's output. It needs
the second moment of the layer's inputs, sum of x x^T. Only the rounding step depends on the grid, so GPTQ works on
powers of two as it does on integers.

Here a layer also makes up for the errors of the layers before it: it sees the inputs of the quantized model and aims at
the outputs of the float model (as in GPTAQ, arXiv 2504.02692), but only as far as that helps on text kept aside.

Sections: calibrate, passes through the model, GPTQ of one layer, training block by block.
"""

import contextlib
import copy
import graphlib
import math
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pot import (
    PoTConfig,
    PoTEmbedding,
    PoTQuantizer,
    PreparedLayer,
    check_parameter,
    check_weight,
    compute_unit,
    is_prepared,
    weight_matrix,
)

__all__ = ["calibrate", "show_progress", "train_blocks"]

# Share of the mean square added to the diagonal of a second moment. This text may hardly use a feature that other text
# uses, and the moment needs an inverse.
DAMPING = 0.01
# The same for a tied table. Its rows are also looked up as they are, where no other feature makes up for an error.
TABLE_DAMPING = 0.3
RECORDED = 4  # batches that show which layers a model calls
CHECKED = 256  # rows kept aside on which the whole model is compared before and after
SWEEPS = 2  # of coordinate descent after GPTQ; more lower the error by less than 1 %


def show_progress(done: int, total: int) -> None:
    """Writes how many sets of layers or blocks are done to standard error, in one line, if that is a terminal."""
    if sys.stderr.isatty():
        line = f"calibrate: {done} of {total} sets of layers or blocks"
        print(line, end="\r" if done < total else "\n", file=sys.stderr, flush=True)


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable, progress: Callable[[int, int], None] | None = show_progress
) -> dict[str, tuple[float, float]]:
    """Chooses the codes of a prepared model by the inputs that its layers see, in place.

    batches: inputs of the model; 16k tokens of text are usual. It is called as model(batch), as model(*batch) for a
    tuple or list, and as model(**batch) for a mapping. Memory holds a copy of the float model, and for each batch what
    a forward pass of the model and of its copy hold in one place.
    progress(done, total) is called after each set of layers; None shows nothing.

    First come embeddings and weights that several layers share (a tied head), then linear layers in the order of
    execution. Weighted least squares gives new units, and GPTQ gives codes to what a linear layer uses.
    Afterwards `weight` holds compensated values that are not rounded yet; the layer's own rounding gives the codes. So
    convert the model, or train on.

    An eighth of the rows that a layer sees is kept aside. A layer that the batches do not reach, or whose error on these
    rows would grow, stays as it was. If the error of the model's output (of its largest tensor) would grow on 256 of
    them, all layers stay as they were, and a warning says so. Another warning says that the text is too short for the
    width of a layer.

    Returns {name: (before, after)}: squared distance of a linear layer's output from the float model's, relative to the
    squared output, on rows kept aside. Raises ValueError if there is nothing to calibrate, if there is no batch, or if
    weights or inputs hold NaN or inf.
    """
    batches = list(batches)
    names = {m: name for name, m in model.named_modules() if is_prepared(m) and m.quantizer.enabled}
    if not names:
        raise ValueError("the model has no prepared layer to calibrate: call prepare first")
    if not batches:
        raise ValueError("there is no batch to calibrate on: pass some text, 16k tokens are usual")
    users: dict[PoTQuantizer, list[PreparedLayer]] = {}
    for layer, name in names.items():
        check_parameter(name or type(layer).__name__, layer)
        check_weight(name or type(layer).__name__, weight_matrix(layer), layer.quantizer.config)
        users.setdefault(layer.quantizer, []).append(layer)
    shared = {q: layers for q, layers in users.items() if len(layers) > 1 or isinstance(layers[0], PoTEmbedding)}
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        reference = copy.deepcopy(model)
        by_name = dict(reference.named_modules())
        twins = {layer: by_name[name] for layer, name in names.items()}  # layer -> the same layer of the float model
        for twin in twins.values():
            twin.quantizer.enabled = False
        sets, calls, importance, last = _record(reference, batches, {t: layer for layer, t in twins.items()}, shared)
        for q, moment in importance.items():
            _check_finite(names[shared[q][0]], moment)
        checked, aims = _aims(reference, batches)
        rounded = _outputs(model, checked)
        for q, moment in importance.items():
            calibrate_shared(weight_matrix(shared[q][0]), q, moment)
        stops, errors, short = {layer for layers in sets for layer in layers} | {last} - {None}, {}, {}
        with (
            _Walk(model, batches, stops) as walk,
            _Walk(reference, batches, {twins[layer] for layer in stops}) as float_walk,
        ):

            def inputs(layers):
                counts = [calls.get((i, layers[0]), 0) for i in range(len(batches))]
                return walk.inputs(layers, counts), float_walk.inputs([twins[layer] for layer in layers], counts)

            for done, layers in enumerate(sets, start=1):
                n = weight_matrix(layers[0]).shape[1]
                xs, ys = inputs(layers)
                fitted, aside, rows = _moments(xs, ys, n)
                if rows:
                    _check_finite(names[layers[0]], fitted, aside)
                    for layer in layers:
                        errors[names[layer]] = calibrate_layer(layer, fitted, aside)
                    if rows < 4 * n:
                        short[names[layers[0]]] = rows, n
                walk.finish(set(layers) - {last})
                float_walk.finish({twins[layer] for layer in layers if layer is not last})
                if progress:
                    progress(done, len(sets))
        if short:
            name, (rows, n) = max(short.items(), key=lambda item: item[1][1] / (item[1][0] + 1))
            warnings.warn(
                f"{rows} tokens are few for the {n} input features of {name}: calibrate on {8 * n} or more",
                stacklevel=3,
            )
        if _distance(_outputs(model, checked), aims) > _distance(rounded, aims):
            warnings.warn(
                "calibration made the error of the model grow, so it stays rounded to the nearest levels: pass more text",
                stacklevel=3,
            )
            for layer, twin in twins.items():
                layer.weight.copy_(twin.weight)
                layer.quantizer.unit = twin.quantizer.unit
            errors = {name: (before, before) for name, (before, _) in errors.items()}
        return errors
    finally:
        for m in training:
            m.training = True


def _check_finite(name, *moments):
    if not all(torch.isfinite(m).all() for m in moments):
        raise ValueError(f"{name}: its inputs hold NaN or inf: calibrate a model that works")


# -----------------------------------------------------------------------------
# Passes through the model


class _Stop(BaseException):
    """Ends a forward pass early. It is no Exception, because models may catch those."""


def _call(model, batch):
    batch = copy.deepcopy(batch)  # a model may change it
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if hasattr(batch, "keys"):
        return model(**batch)
    return model(batch)


def _outputs(model, batches):
    """Runs the model on each of batches, {number: batch}, and returns the rows kept aside of its largest output, (rows, n)
    float32. None stands for a batch without a dense float tensor. Scalars, such as a loss, do not count."""
    outputs = []
    for i, batch in batches.items():
        tensors = [t for t in tree_leaves(_call(model, batch)) if torch.is_tensor(t) and t.is_floating_point()]
        tensors = [t for t in tensors if t.layout == torch.strided and not t.is_nested and t.dim() and t.numel()]
        x = max(tensors, key=torch.numel, default=None)
        if x is not None:
            x = x.float().reshape(-1, x.shape[-1])
            x = x[_aside(len(x), i)].clone()
        outputs.append(x)
    return outputs


def _aims(reference, batches):
    """Chooses the batches on which the whole model is compared. They are spread evenly, and together have CHECKED rows
    kept aside if there is enough text. Returns ({number: batch}, the float model's _outputs)."""
    first = _outputs(reference, {0: batches[0]})
    rows = CHECKED if first[0] is None else max(1, len(first[0]))
    count = min(len(batches), -(-CHECKED // rows))
    checked = {i * len(batches) // count: batches[i * len(batches) // count] for i in range(count)}
    return checked, first + _outputs(reference, {i: batch for i, batch in checked.items() if i})


def _distance(outputs, aims):
    """Squared distance of two results of _outputs. Logits of -inf say that a token is left out."""
    pairs = [(x, y) for x, y in zip(outputs, aims) if x is not None and y is not None and x.shape == y.shape]
    return sum((x - y).nan_to_num(0, 0, 0).square().sum().item() for x, y in pairs)


class _Pass(threading.Thread):
    """A forward pass over one batch, which waits at each layer in `waiting`. So a pass goes on with calibrated layers
    where it stopped, instead of a new pass for each layer.

    Only the model's Python code runs in this thread, and only while go_on waits for it. Tensor functions run in the
    thread that calls go_on: each thread that runs them would start a pool of threads.
    """

    def __init__(self, model, batch, waiting):
        super().__init__(daemon=True)
        self.arguments, self.waiting, self.stopped = (model, batch), waiting, False
        self.requests, self.replies = queue.SimpleQueue(), queue.SimpleQueue()
        self.layer, self.x, self.error = None, None, None  # where it waits, the layer's input, what the model raised
        self.devices = {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}
        self.autocast = self.autocast_state()  # a thread does not inherit it

    def autocast_state(self):
        return [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in self.devices]

    def run(self):
        try:
            with torch.no_grad(), _autocast(self.autocast), _Asking(self):
                _call(*self.arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.arguments = None
        self.requests.put(None)

    def ask(self, request):
        """Hands a request to go_on, and returns its reply."""
        if not self.stopped:
            self.requests.put(request)
            result, error = self.replies.get()
        if self.stopped:
            raise _Stop
        if error is not None:
            raise error
        return result

    def go_on(self):
        """Lets the model run until it waits at a layer, or ends."""
        self.layer = self.x = None
        self.start() if self.ident is None else self.replies.put((None, None))
        while (request := self.requests.get()) is not None:
            if isinstance(request, tuple):
                self.layer, self.x = request
                return
            try:
                self.replies.put((request(), None))
            except Exception as error:  # the model may catch it
                self.replies.put((None, error))
        if self.error is not None:
            raise self.error

    def stop(self):
        self.stopped, self.layer, self.x = True, None, None
        if self.ident is not None:
            self.replies.put((None, None))
            self.join()


@contextlib.contextmanager
def _autocast(state):
    with contextlib.ExitStack() as contexts:
        for device, dtype, enabled in state:
            contexts.enter_context(torch.autocast(device, dtype, enabled))
        yield


class _Asking(TorchFunctionMode):
    """Hands tensor functions of a _Pass to go_on."""

    def __init__(self, forward_pass):
        super().__init__()
        self.forward_pass = forward_pass

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # These run here: reading an attribute, and switching gradients on or off, which counts for one thread only.
        if getattr(function, "__name__", None) in ("__get__", "_set_grad_enabled"):
            return function(*args, **kwargs)
        state = self.forward_pass.autocast_state()

        def compute():
            with _autocast(state):
                return function(*args, **kwargs)

        return self.forward_pass.ask(compute)


class _Walk:
    """Passes over all batches, one each, that wait at the layers that are not finished. A context manager."""

    def __init__(self, model, batches, layers):
        self.model, self.batches, self.waiting = model, batches, set(layers)
        self.passes = [_Pass(model, batch, self.waiting) for batch in batches]

    def __enter__(self):
        self.hooks = [layer.register_forward_pre_hook(self._wait, with_kwargs=True) for layer in self.waiting]
        try:
            for p in self.passes:
                p.go_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for p in self.passes:
            p.stop()
        for hook in self.hooks:
            hook.remove()

    def _wait(self, layer, args, kwargs):
        thread = threading.current_thread()
        if layer in self.waiting and isinstance(thread, _Pass):
            thread.ask((layer, _first(args, kwargs)))

    def inputs(self, layers, counts):
        """Yields for each batch the inputs of its calls of layers[0]: a list of (rows, in) float32.

        layers: a set of layers with the same inputs; counts: how often each batch calls them. If a batch calls them more
        than once, new passes collect the inputs, because the layers are not finished between the calls.
        """
        for batch, p, count in zip(self.batches, self.passes, counts):
            if max(counts) > 1:
                yield _inputs(self.model, batch, layers[0], count or None)
            else:
                yield [_rows(p.layer.quantizer, p.x)] if p.layer in layers else []

    def finish(self, layers):
        """Lets the passes that wait at one of the layers go on."""
        self.waiting.difference_update(layers)
        for p in self.passes:
            if p.layer in layers:
                p.go_on()


def _inputs(model, batch, layer, limit):
    """Inputs of a layer in a pass of its own, of its first `limit` calls (None: all): a list of (rows, in) float32."""
    inputs = []

    def record(_, args, kwargs):
        x = _first(args, kwargs)
        rows = _rows(layer.quantizer, x)
        in_place = rows.data_ptr() == x.data_ptr()
        inputs.append(rows.clone() if in_place else rows)  # the model may change its tensor later
        if len(inputs) == limit:
            raise _Stop

    hook = layer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        _call(model, batch)
    except _Stop:
        pass
    finally:
        hook.remove()
    return inputs


def _record(model, batches, layers, shared):
    """Runs model over the batches, or over RECORDED of them if these call the layers equally often: then all others are
    taken to do so. layers: {module that runs: the layer that it stands for}.

    Returns (sets, calls, importance, last):
    sets: lists of layers with the same inputs, in the order of execution;
    calls: {(batch, layer): how often the batch calls the layer};
    importance: {quantizer of a shared weight: (rows, 1), how often each row is looked up, or (in, in), sum of x x^T};
    last: the last linear layer.
    """
    inputs_of, calls, importance, number, seen, last = {}, {}, {}, 0, None, None
    before, previous = {}, None  # {layer: layers that run just before it}; a batch need not call all layers
    first, counts, same = {}, {}, True  # {layer: calls} of the first batch and of this one; are all equal?

    def record(module, args, kwargs):
        nonlocal number, seen, previous, last
        x, layer = _first(args, kwargs), layers[module]
        q = layer.quantizer
        last = last if isinstance(layer, PoTEmbedding) else layer
        is_new, counts[layer] = layer not in counts, counts.get(layer, 0) + 1
        if q not in shared:
            version = None if x.is_nested else x._version
            number += not (seen is not None and seen[0] is x and seen[1:] == (version, q.config.act_bits))
            seen = x, version, q.config.act_bits
            inputs_of.setdefault(layer, []).append(number)
            if is_new:
                before.setdefault(layer, set()).update([previous] if previous is not None else [])
                previous = layer
        elif not isinstance(layer, PoTEmbedding):
            rows = _rows(q, x)
            importance[q] = importance.get(q, 0) + rows.t() @ rows
        elif all(isinstance(user, PoTEmbedding) for user in shared[q]):
            importance[q] = importance.get(q, 0) + torch.bincount(x.flatten(), minlength=len(layer.weight))[:, None]
        if counts is not first and counts == first:
            raise _Stop  # nothing new follows, and the product of a head takes long

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in layers]
    try:
        for i, batch in enumerate(batches):
            if i >= RECORDED and same:
                calls |= {(i, layer): n for layer, n in first.items()}
                continue
            previous, counts = None, {}
            first = counts if i == 0 else first
            with contextlib.suppress(_Stop):
                _call(model, batch)
            calls |= {(i, layer): n for layer, n in counts.items()}
            same = same and counts == first
    finally:
        for hook in hooks:
            hook.remove()
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError:  # the batches disagree
        order = list(inputs_of)
    sets = {}
    for layer in order:
        sets.setdefault(tuple(inputs_of[layer]), []).append(layer)
    return list(sets.values()), calls, {q: moment.float() for q, moment in importance.items() if moment.any()}, last


def _first(args, kwargs):
    """The input of a layer, which a model may pass by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _rows(quantizer, x):
    """Inputs x of a layer, quantized to 8 bits if the config says so, as (rows, in) float32."""
    x = torch.cat(x.unbind()) if x.is_nested else x
    return quantizer.inputs(x).float().reshape(-1, x.shape[-1])


def _aside(n, turn):
    """Which of n rows are kept aside: an eighth, another one in each turn. If n is below 8, all of them."""
    piece = 7 - turn % 8
    return slice(n * piece // 8, n * (piece + 1) // 8) if n >= 8 else slice(0, n)


def _moments(inputs, targets, n):
    """Sums (in, in) float32 over all inputs x of a layer with n input features and the inputs y of the same layer in the
    float model. inputs and targets: results of _Walk.inputs.

    Returns (fitted, aside, rows). fitted: sums of x x^T and (y - x) x^T; aside: the same and (y - x) (y - x)^T, over
    the rows that are kept aside; rows: how many there are in all. If a call has fewer than 8 rows, they serve as both.
    """
    rows, fitted, aside = 0, None, None
    for i, (xs, ys) in enumerate(zip(inputs, targets)):
        for k, x in enumerate(xs):
            if fitted is None:
                fitted, aside = x.new_zeros(2, n, n), x.new_zeros(3, n, n)
            y = ys[k] if len(xs) == len(ys) and ys[k].shape == x.shape else x
            d = y - x
            # A mixture of experts may send a token another way. Then the two inputs cannot be compared.
            if d.square().sum() >= y.square().sum():
                d = torch.zeros_like(d)
            kept = _aside(len(x), i + k)
            rows += len(x)
            others = (slice(kept.start), slice(kept.stop, None)) if len(x) >= 8 else (kept,)
            for sums, part in ((aside, kept), *((fitted, part) for part in others)):
                sums[0].addmm_(x[part].t(), x[part])
                sums[1].addmm_(d[part].t(), x[part])
            aside[2].addmm_(d[kept].t(), d[kept])
    return fitted, aside, rows


# -----------------------------------------------------------------------------
# GPTQ of one layer


def calibrate_shared(w: torch.Tensor, q: PoTQuantizer, importance: torch.Tensor) -> None:
    """Chooses unit and codes of a weight w (out, in) that an embedding or several layers use, in place.

    importance: (out, 1), or (in, in) for a weight that a linear layer uses too (see _record).
    """
    is_moment = importance.shape[1] > 1
    weights = importance.diagonal() if is_moment else importance  # an input feature counts by its mean square
    if q.config.scale == "mse":
        q.unit = compute_unit(w, q.config, weights + DAMPING * weights.mean())
    if is_moment:
        moment, old, rounded = damped(importance, TABLE_DAMPING), w.clone(), q(w)
        w.copy_(gptq(w, q.unit, q.config, moment))
        before, after = (((d @ moment) * d).sum() for d in ((old - rounded).float(), (old - q(w)).float()))
        if not after < before:
            w.copy_(old)


def calibrate_layer(layer: PreparedLayer, fitted: torch.Tensor, aside: torch.Tensor) -> tuple[float, float]:
    """GPTQ of a layer by its _moments, in place. Returns its relative output error on the rows kept aside (before,
    after)."""
    w, q = weight_matrix(layer), layer.quantizer
    old, kept = w.float().clone(), w.clone()
    xx, dx, dd = aside
    missed = ((old @ dd) * old).sum()  # |(y - x) W^T|^2, what an unrounded layer would leave
    aim = old @ dx
    signal = (missed + ((old @ xx + 2 * aim) * old).sum()).item()

    def error():
        """|y W^T - x Q^T|^2 / |y W^T|^2, where y W^T - x Q^T = (y - x) W^T + x (W - Q)^T."""
        lost = old - q(w).float()
        noise = missed + ((2 * aim + lost @ xx) * lost).sum()
        return max(0.0, noise.item()) / signal if signal > 0 else 0.0

    before = error()
    if before == 0 or not fitted[0].any():  # nothing to win, or nothing to learn from
        return before, before
    target, squares, unit = (old + correction(old, fitted, aside)).to(w.dtype), fitted[0].diagonal(), q.unit
    if q.config.scale == "mse":  # an input feature counts by its mean square
        q.unit = compute_unit(target, q.config, squares + DAMPING * squares.mean())
    w.copy_(gptq(target, q.unit, q.config, fitted[0]))
    after = error()
    if not after < before:
        w.copy_(kept)
        q.unit = unit
    return before, min(before, after)


def correction(w: torch.Tensor, fitted: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
    """What to add to a float weight w (out, in) so that the layer makes up for its inputs' errors y - x.

    It is the least-squares solution times two factors, which come from the rows kept aside: the multiple that is best
    for them, and the share of the error that goes away. With the first factor alone, and little text, SmolLM2 ends
    worse than without a correction.
    """
    xx, dx, dd = aside
    factor = torch.linalg.cholesky(_double(damped(fitted[0], DAMPING)))
    # The weight T = W + W dx (xx + damping)^-1 has the least |y W^T - x T^T|^2 on the fitted rows.
    delta = torch.cholesky_solve(_double(w @ fitted[1]).t(), factor).t().to(w)
    # The error on the rows kept aside is missed - 2 a * common + a^2 * size for a * delta, least for a = common / size.
    missed, common, size = (((u @ m) * v).sum() for u, m, v in ((w, dd, w), (w, dx, delta), (delta, xx, delta)))
    if not common > 0 or not missed > 0:
        return torch.zeros_like(delta)
    a = (common / size).clamp(max=1)
    gain = a * (2 * common - a * size) / missed
    return a * gain.clamp(max=1) * delta


def gptq(w: torch.Tensor, unit: torch.Tensor, config: PoTConfig, moment: torch.Tensor) -> torch.Tensor:
    """w (out, in), with the errors of other features made up for, in w's dtype; not rounded itself.

    moment: (in, in), sum of x x^T. GPTQ goes through the features in the order of their mean squares, largest first:
    rounding those costs most, and most features are left to make up for it. Then SWEEPS of coordinate descent choose
    each code again, given all others, so that early features make up for later ones, too. Units are fixed before
    ("static groups"), so the features of a group need not be neighbours in that order.
    """
    n = w.shape[1]
    order = moment.diagonal().argsort(descending=True)
    hessian = damped(_double(moment[order][:, order]), DAMPING)
    # Upper U with U^T U = hessian^-1: the flipped inverse of the Cholesky factor of the flipped hessian.
    factor = torch.linalg.cholesky(hessian.flip(0, 1))
    eye = torch.eye(n, dtype=factor.dtype, device=factor.device)
    u = torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1).float().to(w.device)
    hessian = hessian.float().to(w.device)
    units = unit.float().t().expand(-1, len(w)).contiguous()  # (groups, out)
    group = (order // (n // len(units))).tolist()
    target = w.float().t()[order]  # (in, out): the weights of a feature lie side by side
    value, rounded = target.clone(), torch.empty_like(target)  # not rounded yet, and rounded
    # Lists of rows, because each index of a tensor takes longer than the arithmetic of a row.
    values, choices, unit_rows = value.unbind(), rounded.unbind(), units.unbind()
    row, scratch = torch.empty_like(target[0]), torch.empty_like(target[0])

    def choose(i):
        if w.dtype != torch.float32:  # the layer stores this dtype
            values[i].copy_(values[i].to(w.dtype))
        own = unit_rows[group[i]]
        torch.mul(config.round_(torch.div(values[i], own, out=scratch)), own, out=choices[i])

    factors, scales = u.unbind(), u.diagonal().tolist()
    for start in range(0, n, 64):  # one large product for features beyond the block is faster than many small ones
        end = min(start + 64, n)
        errors = value.new_empty(end - start, len(w))
        for i, error in enumerate(errors.unbind(), start):
            choose(i)
            torch.sub(values[i], choices[i], out=error).div_(scales[i])
            value[i + 1 : end].addr_(factors[i][i + 1 : end], error, alpha=-1)
        value[end:].addmm_(u[start:end, end:].t(), errors, alpha=-1)
    curvatures, hessians = hessian.diagonal().tolist(), hessian.unbind()
    for _ in range(SWEEPS):
        for start in range(0, n, 64):
            end = min(start + 64, n)
            slope = hessian[start:end] @ (target - rounded)  # of the squared error, halved
            for i, own_slope in enumerate(slope.unbind(), start):
                torch.add(row.copy_(choices[i]), own_slope, alpha=1 / curvatures[i], out=values[i])
                choose(i)
                slope[i + 1 - start :].addr_(hessians[i][i + 1 : end], row.sub_(choices[i]))
    return value[order.argsort()].t().to(w.dtype)


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """moment (in, in) with `share` of its mean diagonal added to the diagonal."""
    moment = moment.clone()
    moment.diagonal().add_(share * moment.diagonal().mean())
    return moment


def _double(x):
    return x.double() if x.device.type != "mps" else x.cpu().double()  # mps has no float64


# -----------------------------------------------------------------------------
# Training block by block

WARMUP = 10  # steps of linear warm-up for each block; a cosine to zero follows


def train_blocks(
    model: nn.Module,
    reference: nn.Module,
    blocks: Iterable[nn.Module],
    batches: Iterable,
    learning_rate: float = 1e-3,
    progress: Callable[[int, int], None] | None = show_progress,
) -> list[tuple[float, float]]:
    """Trains the blocks of a prepared model one after the other, in place, best after `calibrate`. Each learns the outputs
    of the same block in the float model. Its own inputs come from the quantized blocks before it (BRECQ, arXiv
    2102.05426; EfficientQAT, arXiv 2407.11062). A step needs neither the head nor the other blocks.

    reference: a copy of the float model, made before prepare.
    blocks: consecutive blocks of model. Each is called as block(x, ...), x (B, T, width), and its output, of the same
    shape, is the x of the next.
    batches: as in calibrate, at least 2. Each makes a step of AdamW; about 1,024 tokens are good. An eighth of them is
    kept aside. A block whose error there would grow stays as it was. Memory holds the inputs and outputs of a block for
    all batches.
    progress(done, total) is called after each block; None shows nothing.

    Returns for each block (before, after): squared distance from the float model's output, relative to the squared output,
    mean over the tokens kept aside. Raises ValueError if there are fewer than 2 batches, if a block is there twice, and if
    the blocks are not called in this order or give no tensor.
    """
    blocks, batches = list(blocks), list(batches)
    if len(batches) < 2:
        raise ValueError(f"{len(batches)} batches are too few: pass at least 2, because one is kept aside")
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block is there twice, and cannot learn the outputs of two: pass each block once")
    names = {m: name for name, m in model.named_modules()}
    twins = dict(reference.named_modules())
    floats = [twins[names[block]] for block in blocks]
    aside = max(1, len(batches) // 8)
    training = [m for m in (*model.modules(), *reference.modules()) if m.training]
    model.eval(), reference.eval()
    try:
        with torch.no_grad():
            xs, rest = zip(*(_block_inputs(model, blocks, batch) for batch in batches))
            ys, float_rest = zip(*(_block_inputs(reference, floats, batch) for batch in batches))
        xs, ys, errors = list(xs), list(ys), []
        for k, (block, twin) in enumerate(zip(blocks, floats)):
            calls = list(zip(xs, (r[k] for r in rest)))
            with torch.no_grad():
                outputs = [_run(twin, y, r[k]) for y, r in zip(ys, float_rest)]
            errors.append(_train_block(block, calls, outputs, aside, learning_rate))
            with torch.no_grad():
                xs, ys = [_run(block, *call) for call in calls], outputs
            if progress:
                progress(k + 1, len(blocks))
        return errors
    finally:
        for m in training:
            m.training = True


def _run(block, x, rest):
    args, kwargs = rest
    out = block(x, *map(_own, args), **{key: _own(value) for key, value in kwargs.items()})
    if not isinstance(out, torch.Tensor):
        raise ValueError(f"a block gives a {type(out).__name__}, and must give a tensor, the input of the next block")
    return out


def _own(argument):
    """A copy of an argument, because a block may change it: a cache of keys and values grows with each call."""
    return argument if isinstance(argument, torch.Tensor) else copy.deepcopy(argument)


def _train_block(block, calls, aims, aside, learning_rate):
    """Trains a block on all calls (x, other arguments) but the first `aside`. aims: outputs of the float block. Returns
    the mean loss of the calls kept aside, before and after."""

    def loss(i):
        # Relative for each token, because the next block normalizes a token, and a few tokens are a thousand times as
        # large as others (Sun et al., arXiv 2402.17762).
        error = (_run(block, *calls[i]) - aims[i]).float().square().sum(-1)
        return (error / aims[i].float().square().sum(-1).clamp(min=1e-20)).mean()

    @torch.no_grad()
    def loss_aside():
        return torch.stack([loss(i) for i in range(aside)]).mean().item()

    before, weights = loss_aside(), [p for p in block.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in weights]
    optimizer, steps = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0), len(calls) - aside
    after = math.nan
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                decay = (1 + math.cos(math.pi * step / steps)) / 2
                group["lr"] = learning_rate * min(1, (step + 1) / WARMUP) * decay
            with torch.enable_grad():
                loss(aside + step).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = loss_aside()
    finally:
        optimizer.zero_grad()
        if not after < before:  # also NaN, and a training that was interrupted
            with torch.no_grad():
                for p, old in zip(weights, kept):
                    p.copy_(old)
    return (before, after) if after < before else (before, before)


def _block_inputs(model, blocks, batch):
    """(input of the first block, [other arguments of each block]) of a forward pass without the blocks' own work."""
    inputs, rest = [], []

    def record(block):
        def forward(x, *args, **kwargs):
            if block is not blocks[len(rest)] or not isinstance(x, torch.Tensor):
                raise ValueError(
                    "the blocks must be called one after the other, in the given order, with a tensor first"
                )
            inputs.append(x)
            rest.append((args, kwargs))
            if len(rest) == len(blocks):
                raise _Stop
            return x

        return forward

    # A library that wraps blocks, such as accelerate, sets a forward of its own.
    forwards = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = record(block)
    try:
        _call(model, batch)
        raise ValueError("the model did not call all blocks: pass its blocks, in the order of execution")
    except _Stop:
        return inputs[0], rest
    finally:
        for block, forward in zip(blocks, forwards):
            del block.forward
            if forward is not None:
                block.forward = forward
