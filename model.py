"""
A GPT in one file. It has GPT-2's architecture and parameter names, and takes GPT-2's weights. It knows nothing of
quantization: pot.prepare works on it from outside, as on any other model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class GPTConfig:
    block_size: int = 1024  # context: most tokens that the model sees at once
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)!r} must be an integer, at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")


class KVCache:
    """Keys and values of the tokens so far, for each layer: (batch, n_head, capacity, head size) each."""

    def __init__(self, capacity: int):
        self.capacity = capacity  # tokens
        self.length = 0
        self.layers = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Adds keys and values (batch, n_head, T, head size) behind the `length` earlier ones. Returns all of them."""
        if layer not in self.layers:
            batch, heads, _, size = k.shape
            self.layers[layer] = [x.new_empty(batch, heads, self.capacity, size) for x in (k, v)]
        end = self.length + k.shape[2]
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[:, :, self.length : end] = new
        return [kept[:, :, :end] for kept in self.layers[layer]]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        mask = None
        if cache is not None:
            past = cache.length
            k, v = cache.append(self.layer, k, v)
            if past > 0 and T > 1:  # new token i sees the past and the new tokens up to itself
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        # With an empty cache the mask is the causal one. A single token sees everything. bool() because torch.compile
        # may make T a symbol.
        causal = bool(T > 1 and mask is None)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal=causal)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


# Keys of a Hugging Face config.json with the values that this GPT supports. The first value is the default.
GPT2_CONFIG = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class _NoInit(TorchFunctionMode):
    """Skips nn.init. The meta device has nothing to fill, but normal_ would import torch's compiler: 90 MB, seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", None) == nn.init.__name__ else func(*args, **(kwargs or {}))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # as GPT-2: the variance of the residual stream does not grow with depth
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)

    @classmethod
    def meta(cls, config: GPTConfig) -> "GPT":
        """The structure alone, on the meta device. It allocates no weights, because loading brings them."""
        with torch.device("meta"), _NoInit():
            return cls(config)

    @classmethod
    def from_huggingface(cls, config: dict, tensors: dict[str, torch.Tensor]) -> "GPT":
        """GPT-2 from the config.json and the tensors of a Hugging Face folder. The tensors become the Parameters.

        Raises ValueError for another architecture, and for tensors that are missing, unknown or of another shape.
        """
        wanted = GPT2_CONFIG | {"n_inner": (None, 4 * config.get("n_embd", 0)), "quantization_config": (None,)}
        for key, values in wanted.items():
            if config.get(key, None if key == "model_type" else values[0]) not in values:
                raise ValueError(f"{key} is {config.get(key)!r}, and only GPT-2's {values[0]!r} is known here")
        try:
            shape = {k: config[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")}
            shape["block_size"] = config["n_positions"]
        except KeyError as e:
            raise ValueError(f"its config.json has no {e.args[0]}") from None
        shape = GPTConfig(**shape)
        if shape.n_layer > len(tensors):  # refused before any layer is built
            raise ValueError(f"its config.json says {shape.n_layer} layers, it holds {len(tensors)} tensors")
        model = cls.meta(shape)
        state = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the token table again; masks in old files
            if not tensor.is_floating_point() or "transformer." + name in state:
                raise ValueError(f"its tensor {name} is {tensor.dtype} or there twice")
            if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
                tensor = tensor.mT  # transformers keeps these weights as (in, out)
            state["transformer." + name] = tensor.float().contiguous()
        state["lm_head.weight"] = state.get("transformer.wte.weight")
        expected = model.state_dict()
        for name in [*expected, *state]:
            if name not in expected:
                raise ValueError(f"its tensor {name} is unknown")
            if state.get(name) is None:
                raise ValueError(f"its tensor {name} is missing")
            if state[name].shape != expected[name].shape:
                raise ValueError(f"its tensor {name} is of another shape")
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model

    def set_dropout(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must be at least 0 and below 1")
        self.config.dropout = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, CausalSelfAttention):
                module.dropout = p

    def tie_weights(self) -> None:
        """Makes the head's weight the token table again. Loading with assign=True separates them."""
        self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None, last: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """idx (B, T) -> logits (B, T, vocab_size), or (B, 1, vocab_size) of the last position if last.
        With targets (B, T) -> (logits, mean loss in nats).

        With a KVCache, idx continues the tokens of the cache. Raises ValueError beyond block_size.
        """
        past = 0 if cache is None else cache.length
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into the context of {self.config.block_size}: pass fewer")
        pos = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x, cache)
        logits = self.lm_head(self.transformer.ln_f(x[:, -1:] if last else x))
        if cache is not None:
            cache.length += T
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None,
        decode: Callable[[torch.Tensor, KVCache], torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Yields max_new_tokens tokens (B, 1). Each is sampled from the top_k most likely tokens after idx (B, T);
        temperature 0 is greedy.

        Beyond block_size the context slides. All positions shift then, so the cache is useless and each token computes
        the whole window. For a batch of one, decode(token, cache) -> logits (1, vocab_size) may replace forward for one
        token.
        """
        cache = KVCache(min(self.config.block_size, idx.shape[1] + max_new_tokens))
        new = idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:
                logits = self(idx[:, -self.config.block_size :], last=True)[:, -1].float()
            elif decode is not None and cache.length > 0:
                logits = decode(new, cache)
            else:
                logits = self(new, cache=cache, last=True)[:, -1].float()
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its file is damaged, or its training diverged")
            if temperature == 0:
                new = logits.max(-1, keepdim=True).indices
            else:
                likely = logits.topk(logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1]))
                logits = (likely.values - likely.values[:, :1]) / temperature  # at most 0: a small temperature is safe
                new = likely.indices.gather(1, torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator))
            yield new
            idx = torch.cat([idx, new], dim=1)
