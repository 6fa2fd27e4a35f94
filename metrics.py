"""
Loss, perplexity and distance to a reference model, over token ids.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
from model import GPT

LOGITS = 2**26  # logits at a time: 256 MiB of float32
WINDOW = 1024  # longest window that nobody asks for, because a context of 131,072 tokens takes much memory


@torch.no_grad()
def evaluate(
    model: GPT, ids: np.ndarray, device: str = "cpu", reference: GPT | None = None, block_size: int | None = None
) -> dict[str, float]:
    """{"loss": mean loss in nats, "perplexity"} over ids, in fixed windows without overlap of block_size tokens (None:
    the model's context, at most WINDOW). Every position but the first counts.

    ids: (n), n at least 2. A reference model adds {"kl": mean KL divergence from it in nats, "top1_agreement": share of
    positions where both have the same most likely token}. Uses no random numbers and keeps the mode of the model.
    Raises ValueError for too few ids, and for a block_size beyond the model's context.
    """
    block_size = min(model.config.block_size, WINDOW) if block_size is None else block_size
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens cannot be evaluated: pass at least 2")
    if not 1 <= block_size <= model.config.block_size:
        raise ValueError(f"block_size={block_size} must be at least 1 and fit the model's {model.config.block_size}")
    if reference is not None and block_size > reference.config.block_size:
        raise ValueError(
            f"block_size={block_size} must fit the reference's context, {reference.config.block_size}, too"
        )
    training = model.training
    model.eval()
    loss = kl = same = 0.0
    batch_size = max(1, min(64, LOGITS // (block_size * model.config.vocab_size)))
    batches = -(-len(ids) // (batch_size * block_size))
    windows = dataset.windows(ids, block_size, batch_size)
    for x, y in tqdm(windows, total=batches, delay=5, leave=False, disable=None):
        x, y = x.to(device), y.to(device)
        log_p, top = _log_probabilities(model, x)
        loss += F.nll_loss(log_p, y.flatten(), reduction="sum").item()
        if reference is not None:
            log_q, reference_top = _log_probabilities(reference, x)
            kl += F.kl_div(log_p, log_q, reduction="sum", log_target=True).item()
            same += (top == reference_top).sum().item()
    model.train(training)
    n = len(ids) - 1
    result = {"loss": loss / n, "perplexity": perplexity(loss / n)}
    return result if reference is None else result | {"kl": kl / n, "top1_agreement": same / n}


def _log_probabilities(model, x):
    """Log-probabilities in nats (B * T, vocab_size) and the most likely token (B * T) of every position."""
    logits = model(x).float().flatten(0, 1)
    return logits.log_softmax(-1), logits.argmax(-1)


@torch.no_grad()
def evaluate_last_position(model: GPT, ids: np.ndarray, seed: int, device: str) -> dict[str, float]:
    """{"loss", "perplexity", "loss_se": standard error} at the last position of 100 x 12 random windows of 64 tokens,
    the protocol of arXiv 2601.02298. All models see the same windows. Raises ValueError for a context below 64, and for
    fewer than 65 ids."""
    if model.config.block_size < 64:
        raise ValueError(f"protocol=paper takes a context of 64, this model has {model.config.block_size}")
    rows = dataset.random_windows(ids, 65, 1200, seed).to(device)
    losses = [
        F.cross_entropy(model(x[:, :-1], last=True)[:, 0].float(), x[:, -1], reduction="none") for x in rows.split(12)
    ]
    losses = torch.cat(losses)
    loss = losses.mean().item()
    return {"loss": loss, "perplexity": perplexity(loss), "loss_se": losses.std().item() / len(losses) ** 0.5}


def perplexity(loss: float) -> float:
    """exp(loss in nats); infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
