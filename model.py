"""
A GPT in one file: GPT-2, and models of Llama's kind (Llama 3, SmolLM2, TinyLlama, Qwen2), by fields of GPTConfig. The
names inside are GPT-2's for all of them. It knows nothing of quantization: pot.prepare works on it from outside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, pi

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class GPTConfig:
    block_size: int = 1024  # context: most tokens that the model sees at once
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2

    # --- what differs between families; the defaults are GPT-2 ---
    qkv_bias: bool | None = None  # biases of query, key and value; None: as `bias`
    n_kv_head: int | None = None  # heads of keys and values, each serves n_head / n_kv_head queries; None: n_head
    head_size: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-5
    position: str = "learned"  # or "rotary"
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # Llama 3's, with the numbers ROPE_SCALING
    mlp: str = "gelu"  # or "swiglu"
    tie: bool = True  # the head's weight is the token table

    def __post_init__(self):
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        if self.head_size is None and type(self.n_head) is type(self.n_embd) is int and self.n_head > 0:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
            self.head_size = self.n_embd // self.n_head
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_size", "n_inner"):
            most = 256 if key == "n_layer" else 2**28  # the deepest known models have fewer; each layer takes memory
            if type(getattr(self, key)) is not int or not 1 <= getattr(self, key) <= most:
                raise ValueError(f"{key}={getattr(self, key)!r} must be an integer from 1 to {most}")
        for key, known in ("norm", ("layer", "rms")), ("position", ("learned", "rotary")), ("mlp", ("gelu", "swiglu")):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {known[0]!r} or {known[1]!r}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not (0 < self.norm_eps < 1e30 and 0 < self.rope_theta < 1e30):  # a float32 can hold them
            raise ValueError(f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be in 0 ... 1e30")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even, because rotary positions turn pairs")
        if self.rope_scaling is not None:
            if self.position != "rotary" or set(self.rope_scaling) != set(ROPE_SCALING):
                raise ValueError(
                    f"rope_scaling={self.rope_scaling} must be a dict of {ROPE_SCALING}, with rotary positions"
                )
            factor, low, high, original = numbers = [self.rope_scaling[key] for key in ROPE_SCALING]
            if bool in map(type, numbers) or not (factor > 0 and 0 < low < high and original > 0):
                raise ValueError(f"rope_scaling={self.rope_scaling} must be positive, the low factor below the high")


class KVCache:
    """Keys and values of each layer so far: (batch, n_kv_head, capacity, head size), in dtype or in the model's."""

    def __init__(self, capacity: int, dtype: torch.dtype | None = None):
        self.capacity, self.dtype = capacity, dtype  # capacity in tokens
        self.length = 0
        self.layers = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Adds keys and values (batch, n_kv_head, T, head size) behind the `length` earlier ones. Returns all of them."""
        if layer not in self.layers:
            batch, heads, _, size = k.shape
            self.layers[layer] = [x.new_empty(batch, heads, self.capacity, size, dtype=self.dtype) for x in (k, v)]
        end = self.length + k.shape[2]
        for kept, new in zip(self.layers[layer], (k, v)):
            kept.narrow(2, self.length, k.shape[2]).copy_(new)  # an error beyond the end, where a slice is empty
        exact = self.length == 0 and self.dtype in (None, k.dtype)  # k and v are all there is, and kept as they are
        return [k, v] if exact else [kept[:, :, :end].to(k.dtype) for kept in self.layers[layer]]


def rotary_frequencies(config: GPTConfig, device: torch.device | str | None = None) -> torch.Tensor:
    """(head_size / 2) float32: the angle in radians by which each pair of features turns from a position to the next.
    Llama 3's scaling slows the pairs that turn less than once in the original context."""
    exponents = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequencies = 1 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = (config.rope_scaling[key] for key in ROPE_SCALING)
    turns = original * frequencies / (2 * pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns x (B, heads, T, head size) by angles (T, head size / 2). Pairs are feature i and i + head size / 2, as in
    transformers."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def make_norm(config):
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head  # of queries, keys and values
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.head_size, self.dropout, self.layer = config.head_size, config.dropout, layer

    def forward(self, x, cache=None, rotary=None):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2).split(self.heads, dim=1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask = None
        if cache is not None:
            past = cache.length
            k, v = cache.append(self.layer, k, v)
            if past > 0 and T > 1:  # new token i sees the past and the new tokens up to itself
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        # With an empty cache the mask is the causal one. A single token sees everything. bool() because torch.compile
        # may make T a symbol.
        causal = bool(T > 1 and mask is None)
        dropout, grouped = self.dropout if self.training else 0.0, self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"  # c_fc holds the gate first, then what it lets through
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1) if self.gated else (None, self.c_fc(x))
        return self.dropout(self.c_proj(F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, rotary=None):
        x = x + self.attn(self.ln_1(x), cache, rotary)
        return x + self.mlp(self.ln_2(x))


# What a Hugging Face config.json may say, for each model_type: values that this GPT supports, the default first.
HUGGINGFACE = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu",)},
    "qwen2": {"hidden_act": ("silu",), "use_sliding_window": (False,)},
}  # fmt: skip
# Our modules, and Llama's that make them up, their rows below each other.
LLAMA_NAMES = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "transformer.wte": ("model.embed_tokens",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}


def huggingface_names(model_type: str, name: str) -> list[str]:
    """The tensors of a Hugging Face file that make up our tensor `name`."""
    if model_type == "gpt2":
        return [name]
    (module, _, kind), prefix = name.rpartition("."), ""
    if ".h." in name:
        _, _, layer, module = module.split(".", 3)
        prefix = f"model.layers.{layer}."
    return [f"{prefix}{part}.{kind}" for part in LLAMA_NAMES[module]]


def huggingface_config(config: dict) -> GPTConfig:
    """What a config.json describes. Raises ValueError for a model that this GPT is not."""
    kind = config.get("model_type")
    if kind not in HUGGINGFACE:
        raise ValueError(f"model_type is {kind!r}, and only {', '.join(HUGGINGFACE)} are known here")
    for key, values in (HUGGINGFACE[kind] | {"quantization_config": (None,)}).items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {config[key]!r}, and only {values[0]!r} is known here")
    try:
        if kind == "gpt2":
            shape = {key: config[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
            return GPTConfig(
                config["n_positions"], **shape, n_inner=config.get("n_inner"), tie=config.get("tie_word_embeddings", True),
                norm_eps=config.get("layer_norm_epsilon", 1e-5),
            )  # fmt: skip
        bias = config.get("attention_bias", False)
        if kind == "llama" and bias != config.get("mlp_bias", False):
            raise ValueError("attention_bias and mlp_bias differ, and only both or none is known here")
        rope = config.get("rope_scaling") or (config.get("rope_parameters") or {})  # before transformers 5, or since
        rope_type, scaling = rope.get("rope_type", rope.get("type", "default")), None
        if rope_type == "llama3":
            scaling = {key: rope[key] for key in ROPE_SCALING}
        elif rope_type != "default":
            raise ValueError(f"its rotary scaling is {rope_type!r}, and only 'llama3' is known here")
        return GPTConfig(
            block_size=config["max_position_embeddings"], vocab_size=config["vocab_size"],
            n_layer=config["num_hidden_layers"], n_head=config["num_attention_heads"], n_embd=config["hidden_size"],
            bias=bias and kind == "llama", qkv_bias=bias or kind == "qwen2", n_kv_head=config.get("num_key_value_heads"),
            head_size=config.get("head_dim"), n_inner=config["intermediate_size"], norm="rms",
            norm_eps=config.get("rms_norm_eps", 1e-6), position="rotary", mlp="swiglu", rope_scaling=scaling,
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            tie=config.get("tie_word_embeddings", False),
        )  # fmt: skip
    except KeyError as e:
        raise ValueError(f"its config.json has no {e.args[0]}") from None


class _NoInit(TorchFunctionMode):
    """Skips nn.init. The meta device has nothing to fill, but normal_ would import torch's compiler: 90 MB, seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", None) == nn.init.__name__ else func(*args, **(kwargs or {}))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
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
        """The model of the config.json and the tensors of a Hugging Face folder.

        Raises ValueError for another architecture, and for tensors that are missing, unknown or of another shape.
        """
        kind, shape = config.get("model_type"), huggingface_config(config)
        if shape.n_layer > len(tensors):  # refused before any layer is built
            raise ValueError(f"its config.json says {shape.n_layer} layers, it holds {len(tensors)} tensors")
        model, root = cls.meta(shape), "transformer." if kind == "gpt2" else "model."
        given = {}
        for name, tensor in tensors.items():
            if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
                continue  # constants in old files
            name = name if name.startswith((root, "lm_head.")) else root + name
            if not tensor.is_floating_point() or name in given:
                raise ValueError(f"its tensor {name} is {tensor.dtype} or there twice")
            if kind == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
                tensor = tensor.mT  # transformers keeps these weights as (in, out)
            given[name] = tensor
        state, kv = {}, shape.n_kv_head * shape.head_size
        for name, expected in model.state_dict().items():
            if name == "lm_head.weight" and shape.tie:
                continue
            sources = huggingface_names(kind, name)
            for source in sources:
                if source not in given:
                    raise ValueError(f"its tensor {source} is missing")
            parts, rows = [given.pop(source) for source in sources], len(expected)
            heights = {1: [rows], 2: [rows // 2] * 2, 3: [rows - 2 * kv, kv, kv]}[len(parts)]
            for source, part, height in zip(sources, parts, heights):
                if part.shape != (height, *expected.shape[1:]):
                    raise ValueError(f"its tensor {source} is of another shape")
            state[name] = (torch.cat(parts) if len(parts) > 1 else parts[0]).float().contiguous()
        head = given.pop("lm_head.weight", None) if shape.tie else None
        if head is not None and not torch.equal(head.float(), state["transformer.wte.weight"]):
            raise ValueError("its lm_head.weight is not the token table: set tie_word_embeddings to false")
        if given:
            raise ValueError(f"its tensor {next(iter(given))} is unknown")
        model.load_state_dict(state, strict=False, assign=True)
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
        """Makes a tied head's weight the token table again. Loading with assign=True separates them."""
        if self.config.tie:
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

        With a KVCache, idx continues the tokens of the cache. Raises ValueError beyond block_size or the cache.
        """
        past, room = (0, self.config.block_size) if cache is None else (cache.length, cache.capacity)
        T, room = idx.shape[1], min(room, self.config.block_size)
        if past + T > room:
            raise ValueError(f"{past + T} tokens do not fit into the context or cache of {room}: pass fewer")
        pos = torch.arange(past, past + T, device=idx.device)
        x, rotary = self.transformer.wte(idx), None
        if self.config.position == "learned":
            x = x + self.transformer.wpe(pos)
        else:
            angles = pos[:, None] * rotary_frequencies(self.config, idx.device)  # float32, as positions need
            rotary = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache, rotary)
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
        the whole window. For a batch of one, decode(tokens (1, T), cache) -> logits (1, vocab_size) of the last one may
        replace forward, with a cache of float16.
        """
        cache = KVCache(min(self.config.block_size, idx.shape[1] + max_new_tokens), torch.float16 if decode else None)
        new = idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:
                logits = self(idx[:, -self.config.block_size :], last=True)[:, -1].float()
            elif decode is not None:
                logits = decode(new, cache)
            else:
                logits = self(new, cache=cache, last=True)[:, -1].float()
            if not all(map(isfinite, torch.aminmax(logits))):
                raise ValueError("the model's logits are not finite: its file is damaged, or its training diverged")
            if temperature == 0:
                new = logits.max(-1, keepdim=True).indices
            else:
                likely = logits.topk(logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1]))
                logits = (likely.values - likely.values[:, :1]) / temperature  # at most 0: a small temperature is safe
                new = likely.indices.gather(1, torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator))
            yield new
            idx = torch.cat([idx, new], dim=1)
