"""Published implementations (transformers, eager, float32) and their weights in our layout.

A second statement of what `storm_jax.interop` does for users, kept apart from it so that neither
can hide the other's mistake.
"""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from storm_jax.config import DecoderConfig

torch = pytest.importorskip("torch")  # whoever imports this file is skipped without it
torch.set_num_threads(1)  # these models are too small to share out


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and none neutral: matrices keep sizes, norms and biases show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:
                one = name.endswith("weight") and "norm" in name
                # Gemma stores its norms around zero.
                zero_centred = "Gemma" in type(model).__name__
                p.copy_((1.0 if one and not zero_centred else 0.0) + 0.3 * noise)
            elif "position_embedding" in name:
                p.copy_(0.4 * noise)
            elif "embed_tokens" in name:
                # Small beside the layers' outputs, else tied embeddings only repeat their input.
                p.copy_(0.06 * noise)
            elif "q_proj" in name or "k_proj" in name:
                p.copy_(2 * noise / np.sqrt(p[0].numel()))  # attention that picks
            else:
                p.copy_(noise / np.sqrt(p[0].numel()))
    return model.eval()


def with_params(build: Callable[[], nnx.Module], params: dict) -> nnx.Module:
    """The module that `build` makes, holding `params`: a nested dict of exactly its parameters."""
    graph, state = nnx.split(nnx.eval_shape(build))
    own, given = shapes(nnx.to_pure_dict(state)), shapes(params)
    assert own == given, sorted(set(own.items()) ^ set(given.items()))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def shapes(params: dict) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of a nested dict of arrays."""
    return {path: v.shape for path, v in nnx.traversals.flatten_mapping(params).items()}


def _stacked(state: dict, pattern: str, layers: int, *shape: int) -> np.ndarray:
    """Parameters of all layers; a matrix [out, in] becomes [in, out], then takes `shape`."""
    arrays = [state[pattern.format(i)].numpy() for i in range(layers)]
    arrays = [a.T if a.ndim == 2 else a for a in arrays]
    return np.stack([a.reshape(shape) if shape else a for a in arrays])


def vit_params(model: torch.nn.Module, layers: int, final_norm: bool, grads: bool = False) -> dict:
    """Weights of a `SiglipVisionModel` (or their gradients) in the layout of `Vit`."""
    config = model.config
    D, H = config.hidden_size, config.num_attention_heads
    C = D // H
    state = {n: (p.grad if grads else p).detach() for n, p in model.named_parameters()}

    def stack(name, *shape):
        return _stacked(state, "encoder.layers.{}." + name, layers, *shape)

    def linear(name, inputs=(), outputs=()):
        bias = stack(f"{name}.bias", *outputs)
        return {"weight": stack(f"{name}.weight", *inputs, *outputs), "bias": bias}

    def norm(name):
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    # Conv2d [D, 3, P, P]: our patches are flattened row, column, channel.
    patch = state["embeddings.patch_embedding.weight"].numpy().transpose(2, 3, 1, 0).reshape(-1, D)
    params = {
        "patch": {"weight": patch, "bias": state["embeddings.patch_embedding.bias"].numpy()},
        "positions": state["embeddings.position_embedding.weight"].numpy(),
        "blocks": {
            "layers": {
                "norm1": norm("layer_norm1"),
                "norm2": norm("layer_norm2"),
                "query": linear("self_attn.q_proj", (D,), (H, C)),
                "key": linear("self_attn.k_proj", (D,), (H, C)),
                "value": linear("self_attn.v_proj", (D,), (H, C)),
                "out": {
                    "weight": stack("self_attn.out_proj.weight", H, C, D),
                    "bias": stack("self_attn.out_proj.bias"),
                },
                "up": linear("mlp.fc1"),
                "down": linear("mlp.fc2"),
            }
        },
    }
    if final_norm:
        params["norm"] = {
            "scale": state["post_layernorm.weight"].numpy(),
            "bias": state["post_layernorm.bias"].numpy(),
        }
    return params


def pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 [F, H, W, 3] as SigLIP's image processor delivers it: [F, 3, H, W] in [-1, 1]."""
    scaled = frames.astype(np.float32) / 255.0
    return torch.from_numpy(((scaled - 0.5) / 0.5).transpose(0, 3, 1, 2).copy())


def decoder_config(hf) -> DecoderConfig:
    """Our configuration of a transformers Gemma 2, Gemma 3 or Qwen2 text configuration."""
    gemma = hf.model_type.startswith("gemma")
    full = [kind == "full_attention" for kind in hf.layer_types]
    every = full.index(True) + 1
    assert full == [(i + 1) % every == 0 for i in range(len(full))]
    rope = hf.rope_parameters
    if hf.model_type == "gemma3_text":
        assert rope["sliding_attention"]["rope_type"] == "default"
        wide, near = rope["full_attention"], rope["sliding_attention"]
    else:
        wide = near = rope
    assert wide["rope_type"] in ("default", "linear")
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    activation = hf.hidden_activation if gemma else hf.hidden_act
    scale = hf.query_pre_attn_scalar**-0.5 if gemma else head_dim**-0.5
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        mlp=hf.intermediate_size,
        activation={"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}[activation],
        norm_eps=hf.rms_norm_eps,
        norm_plus_one=gemma,
        post_norms=gemma,
        qkv_bias=not gemma,
        qk_norm=hf.model_type == "gemma3_text",
        query_scale=scale,
        attention_softcap=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(hf, "final_logit_softcapping", None) or 0.0,
        global_every=every,
        window=hf.sliding_window or 0,
        rope_theta=wide["rope_theta"],
        rope_theta_local=near["rope_theta"],
        rope_scaling=wide.get("factor", 1.0),
        tied_embeddings=hf.tie_word_embeddings,
        scale_embeddings=gemma,
    )


def decoder_params(model: torch.nn.Module, config: DecoderConfig) -> dict:
    """Weights of a `*ForCausalLM` in the layout of `Decoder`."""
    D, H, K, C = config.width, config.heads, config.kv_heads, config.head_dim
    state = {n: p.detach() for n, p in model.named_parameters()}

    def stack(name, *shape):
        return _stacked(state, "model.layers.{}." + name, config.layers, *shape)

    def linear(name, inputs, outputs, bias=False):
        out = {"weight": stack(f"{name}.weight", *inputs, *outputs)}
        if bias:
            out["bias"] = stack(f"{name}.bias", *outputs)
        return out

    def norm(name):
        return {"scale": stack(f"{name}.weight")}

    bias = config.qkv_bias
    layers = {
        "attention_norm": norm("input_layernorm"),
        "query": linear("self_attn.q_proj", (D,), (H, C), bias),
        "key": linear("self_attn.k_proj", (D,), (K, C), bias),
        "value": linear("self_attn.v_proj", (D,), (K, C), bias),
        "out": linear("self_attn.o_proj", (H, C), (D,)),
        "gate": linear("mlp.gate_proj", (D,), (config.mlp,)),
        "up": linear("mlp.up_proj", (D,), (config.mlp,)),
        "down": linear("mlp.down_proj", (config.mlp,), (D,)),
    }
    if config.post_norms:
        layers["attention_post_norm"] = norm("post_attention_layernorm")
        layers["mlp_norm"] = norm("pre_feedforward_layernorm")
        layers["mlp_post_norm"] = norm("post_feedforward_layernorm")
    else:
        layers["mlp_norm"] = norm("post_attention_layernorm")
    if config.qk_norm:
        layers["query_norm"] = norm("self_attn.q_norm")
        layers["key_norm"] = norm("self_attn.k_norm")
    params = {
        "embedding": {"table": state["model.embed_tokens.weight"].numpy()},
        "blocks": {"layers": layers},
        "norm": {"scale": state["model.norm.weight"].numpy()},
    }
    if not config.tied_embeddings:
        params["head"] = {"weight": state["lm_head.weight"].numpy().T}
    return params


def flat_square(x: torch.Tensor) -> torch.Tensor:
    """VILA's `flat_square_2x2` (multimodal_projector/base_projector.py), from memory."""
    n, w, h, c = x.shape
    if w % 2:
        x = torch.cat([x, torch.zeros(n, 1, h, c)], dim=1)
        n, w, h, c = x.shape
    if h % 2:
        x = torch.cat([x, torch.zeros(n, w, 1, c)], dim=2)
        n, w, h, c = x.shape
    x = x.view(n, w, h // 2, c * 2).permute(0, 2, 1, 3).contiguous()
    return x.view(n, h // 2, w // 2, c * 4).permute(0, 2, 1, 3).contiguous()


def mamba(x: np.ndarray, p: dict) -> np.ndarray:
    """x + BiMamba(LayerNorm(x)) over one video's tokens, float64 [L, D]; `p`: one layer's."""
    h = x - x.mean(axis=1, keepdims=True)
    h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    h = h + p["norm"]["bias"]
    u, z = h @ p["in_proj"]["weight"][:, 0], h @ p["in_proj"]["weight"][:, 1]
    y = ssm(u, p["forward"])
    if "backward" in p:
        y = y + ssm(u[::-1], p["backward"])[::-1]
    return x + (y * silu(z)) @ p["out_proj"]["weight"]


def ssm(u: np.ndarray, p: dict) -> np.ndarray:
    """Convolution and selective scan of one sequence [L, E] (arXiv 2312.00752, alg. 2)."""
    taps, (L, E) = len(p["conv_weight"]), u.shape
    rank, state = len(p["dt_proj"]["weight"]), p["A_log"].shape[1]
    padded = np.concatenate([np.zeros((taps - 1, E)), u])
    # The last tap meets the current token.
    u = sum(padded[k : k + L] * p["conv_weight"][k] for k in range(taps)) + p["conv_bias"]
    u = silu(u)
    dt, B, C = np.split(u @ p["x_proj"]["weight"], [rank, rank + state], axis=1)
    dt = np.log1p(np.exp(dt @ p["dt_proj"]["weight"] + p["dt_bias"]))
    A = -np.exp(p["A_log"])
    h, ys = np.zeros((E, state)), []
    for t in range(L):
        h = np.exp(dt[t, :, None] * A) * h + dt[t, :, None] * B[t] * u[t, :, None]
        ys.append(h @ C[t] + p["D"] * u[t])
    return np.stack(ys)


def silu(x):
    return x / (1 + np.exp(-x))


def temporal_params(width, config, seed: int = 0) -> dict:
    """All Mamba layers, every parameter away from its neutral value; memory of some tokens."""
    rng = np.random.default_rng(seed)
    inner, state, rank = config.expand * width, config.state, config.dt_rank

    def normal(*shape, scale):
        return (scale * rng.normal(size=(config.layers, *shape))).astype(np.float32)

    def one_direction():
        return {
            "conv_weight": normal(config.conv, inner, scale=0.5),
            "conv_bias": normal(inner, scale=0.3),
            "x_proj": {"weight": normal(inner, rank + 2 * state, scale=1.4 / inner**0.5)},
            "dt_proj": {"weight": normal(rank, inner, scale=1 / rank**0.5)},
            "dt_bias": normal(inner, scale=0.5) - 1,
            "A_log": normal(inner, state, scale=0.7),
            "D": normal(inner, scale=1.0),
        }

    layer = {
        "norm": {"scale": 1 + normal(width, scale=0.3), "bias": normal(width, scale=0.3)},
        "in_proj": {"weight": normal(width, 2, inner, scale=1.2 / width**0.5)},
        "forward": one_direction(),
        "out_proj": {"weight": normal(inner, width, scale=1 / inner**0.5)},
    }
    if config.direction == "bidirectional":
        layer["backward"] = one_direction()
    return {"blocks": {"layers": layer}}


def temporal_encoder(tokens: np.ndarray, params: dict) -> np.ndarray:
    """All Mamba layers over one video's tokens, float64 [L, D]."""
    stacked = params["blocks"]["layers"]
    for i in range(len(stacked["out_proj"]["weight"])):
        layer = jax.tree.map(lambda a, i=i: a[i].astype(np.float64), stacked)
        tokens = mamba(tokens, layer)
    return tokens
