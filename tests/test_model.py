"""model.py against GPT-2, Llama and Qwen2 of transformers, and cached against uncached results."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import FAMILIES, transformers_model

from model import GPT, ROPE_SCALING, GPTConfig, KVCache, huggingface_config, rotary_frequencies

LLAMA = dict(norm="rms", position="rotary", mlp="swiglu", bias=False, n_head=4, n_kv_head=2, tie=False)


def gpt(**kw):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=16, vocab_size=65, n_layer=3, n_head=2, n_embd=32) | kw)).eval()


def test_logits_equal_transformers():
    transformers = pytest.importorskip("transformers")
    model = gpt()
    shape = dict(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=65)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    reference = transformers.GPT2LMHeadModel(config).eval()
    state = {k: v.t() if "c_" in k and k.endswith("weight") else v for k, v in model.state_dict().items()}
    reference.load_state_dict(state)
    x = torch.randint(0, 65, (2, 16))
    actual, expected = model(x), reference(x).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.allclose(model(x, x)[1], F.cross_entropy(expected.flatten(0, 1), x.flatten()))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers(family):
    """For a prompt, and token by token with the cache."""
    reference = transformers_model(family)
    model = GPT.from_huggingface(reference.config.to_dict(), reference.state_dict()).eval()
    x = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, cache = reference(x).logits, KVCache(40)
        stepwise = torch.cat([model(part, cache=cache) for part in x.split([9] + [1] * 31, dim=1)], dim=1)
        for logits in (model(x), stepwise):
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (model.lm_head.weight is model.transformer.wte.weight) == reference.config.tie_word_embeddings
    heads = getattr(reference.config, "num_key_value_heads", model.config.n_head)
    assert cache.layers[0][0].shape == (2, heads, 40, model.config.head_size)


@pytest.mark.parametrize("theta, scaled", [(10000.0, False), (500000.0, True)])
def test_rotary_frequencies_equal_transformers(theta, scaled):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    numbers = dict(zip(ROPE_SCALING, (32.0, 1.0, 4.0, 8192)))
    rope = {"rope_type": "llama3", **numbers} if scaled else {"rope_type": "default"}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters=rope | {"rope_theta": theta},
    )  # fmt: skip
    expected = LlamaRotaryEmbedding(config).inv_freq
    config = GPTConfig(
        n_embd=256, n_head=4, position="rotary", rope_theta=theta, rope_scaling=numbers if scaled else None
    )
    assert torch.allclose(rotary_frequencies(config), expected, rtol=1e-5, atol=0)


def test_causal():
    model, x = gpt(), torch.randint(0, 65, (1, 16))
    y = x.clone()
    y[0, 9:] = 0
    assert torch.allclose(model(x)[0, :9], model(y)[0, :9], atol=1e-6)


@pytest.mark.parametrize("shape", [{}, LLAMA])
@pytest.mark.parametrize("pieces", [[1] * 16, [16], [5, 1, 1, 9], [7, 9]])
def test_cached_logits_equal_uncached(pieces, shape):
    model, x = gpt(**shape), torch.randint(0, 65, (2, 16))
    cache = KVCache(model.config.block_size)
    parts = [model(part, cache=cache) for part in x.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(x), atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 10, 16, 30])
@pytest.mark.parametrize("shape", [{}, LLAMA])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0.8, top_k=20), dict(temperature=1.3)])
def test_cached_tokens_equal_uncached(prompt, options, shape):
    """generate against a loop that computes the whole window for each token."""
    model, x = gpt(**shape), torch.randint(0, 65, (2, prompt))
    tokens = torch.cat(list(model.generate(x, 25, generator=torch.Generator().manual_seed(1), **options)), 1)
    generator, expected = torch.Generator().manual_seed(1), x
    for _ in range(25):
        logits, index = model(expected[:, -16:])[:, -1].topk(options.get("top_k", 65))
        if options["temperature"] == 0:
            new = index[:, :1]
        else:
            p = (logits / options["temperature"]).softmax(-1)
            new = index.gather(1, torch.multinomial(p, 1, generator=generator))
        expected = torch.cat([expected, new], 1)
    assert torch.equal(tokens, expected[:, prompt:])


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_full_graph_compiles_once_for_all_lengths(shape):
    model, x = gpt(**shape), torch.randint(0, 65, (1, 16))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()  # runs the traced graph; needs no C++ compiler
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for n in (4, 7, 9):
            cache = KVCache(16)
            parts = [compiled(part, cache=cache) for part in x.split([n] + [1] * (16 - n), dim=1)]
            assert torch.allclose(torch.cat(parts, dim=1), model(x), atol=1e-5)
    assert counter.frame_count == 3  # graphs of a prompt, a token, and a prompt of another length


def test_top_k_one_is_greedy():
    model, x = gpt(), torch.randint(0, 65, (1, 4))
    top_1, greedy = (torch.cat(list(model.generate(x, 8, **o)), 1) for o in (dict(top_k=1), dict(temperature=0)))
    assert torch.equal(top_1, greedy)


def test_full_cache_takes_no_token():
    """Not even a single one, which would fit into an empty slice by broadcasting."""
    model, idx, cache = gpt(), torch.arange(6), KVCache(4)
    model(idx[None, :4], cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into the context or cache of 4"):
        model(idx[None, 4:5], cache=cache)
    cache.capacity = 16  # but its tensors are of 4
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        model(idx[None, 4:5], cache=cache)
    assert cache.length == 4


@pytest.mark.parametrize("cached", [False, True])
def test_logits_of_the_last_position(cached):
    model, x = gpt(), torch.randint(0, 65, (2, 16))
    lengths, caches = [], [KVCache(16), KVCache(16)] if cached else [None, None]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    for part in x.split([9, 1, 6], dim=1):
        full, last = model(part, cache=caches[0]), model(part, cache=caches[1], last=True)
        assert torch.allclose(last, full[:, -1:], atol=1e-6)
    assert lengths == [9, 1, 1, 1, 6, 1]
    lengths.clear()
    list(model.generate(x[:, : 8 if cached else 16], 3))  # a prompt of 16 fills the context: later tokens use no cache
    assert lengths == [1, 1, 1]


def test_tied_head_and_parameter_count():
    model = gpt()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in GPT.meta(GPTConfig()).parameters()) == 124_439_808


@pytest.mark.parametrize("shape", [{}, LLAMA])
def test_meta_model_has_the_same_structure(shape):
    model, state = gpt(**shape), torch.get_rng_state()
    meta = GPT.meta(model.config)
    assert torch.equal(torch.get_rng_state(), state)
    assert (meta.lm_head.weight is meta.transformer.wte.weight) == model.config.tie
    actual, expected = meta.state_dict(), model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in actual.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(t.is_meta for t in actual.values())


BAD = [
    dict(n_embd=33), dict(n_layer=0), dict(n_layer=1001), dict(dropout=1.0), dict(n_kv_head=5), dict(n_head=0), dict(norm="batch"),
    dict(norm_eps=0.0), dict(norm_eps=10**39), dict(rope_theta=10**39), dict(n_inner=0), dict(n_inner=2**40), dict(position="rotary", head_size=15),
    dict(rope_scaling=dict.fromkeys(ROPE_SCALING, 1.0)), dict(position="rotary", rope_scaling={"factor": 8.0}),
    dict(position="rotary", rope_scaling=dict(zip(ROPE_SCALING, (8.0, True, 4.0, 16)))),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_invalid_config(bad):
    with pytest.raises(ValueError, match="must be"):
        GPTConfig(**bad)


def test_input_longer_than_the_context():
    with pytest.raises(ValueError, match="17 tokens do not fit into the context or cache of 16"):
        gpt()(torch.zeros(1, 17, dtype=torch.long))


def test_rope_scaling_wins_over_rope_parameters():
    """transformers 5 obeys the old key, too, if a file has both."""
    import transformers

    config = transformers_model("llama").config.to_dict()
    assert config["rope_parameters"]["rope_type"] == "default"
    assert huggingface_config(config).rope_scaling is None
    with pytest.raises(ValueError, match="rotary scaling is 'linear'"):
        huggingface_config(config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    both = transformers.LlamaConfig.from_dict(config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    assert both.rope_parameters["rope_type"] == "linear"
