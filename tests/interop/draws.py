"""Random small configurations of the published families, as transformers' models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers as hf  # noqa: E402

VOCAB = 61


@dataclass(frozen=True)
class Family:
    """How a family's text configuration is drawn, and the model that holds it."""

    text: Callable[[np.random.Generator], Any]
    model: Callable[[Any, np.random.Generator], torch.nn.Module]


def _common(rng: np.random.Generator) -> dict[str, Any]:
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    return dict(
        vocab_size=VOCAB,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(3, 10)),
        hidden_size=heads * int(rng.integers(24 // heads, 48 // heads + 1)),
        intermediate_size=int(rng.integers(20, 70)),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-3])),
        max_position_embeddings=128,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


def _theta(rng: np.random.Generator) -> float:
    return float(rng.choice([100.0, 1e4, 1e6]))


def _activation(rng: np.random.Generator) -> str:
    return str(rng.choice(["gelu_pytorch_tanh", "silu"]))


def _rope(rng: np.random.Generator) -> dict[str, Any]:
    linear = dict(rope_type="linear", factor=float(rng.uniform(1.5, 9)))
    return dict(rope_theta=_theta(rng)) | (linear if _coin(rng) else dict(rope_type="default"))


def _pattern(rng: np.random.Generator, layers: int, period: int) -> list[str]:
    """Every `period`-th layer global; none at all where the period is longer than the model."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def gemma(rng: np.random.Generator):
    """Gemma 1: all layers global."""
    return hf.GemmaConfig(
        **_common(rng), num_hidden_layers=int(rng.integers(1, 4)), hidden_act=_activation(rng),
        tie_word_embeddings=_coin(rng), rope_parameters=_rope(rng),
    )  # fmt: skip


def gemma2(rng: np.random.Generator):
    """Soft caps that bend or none, any period of global layers."""
    layers, period = int(rng.integers(2, 6)), int(rng.integers(1, 5))
    rope = dict(rope_type="default", rope_theta=_theta(rng))
    return hf.Gemma2Config(
        **_common(rng), num_hidden_layers=layers, layer_types=_pattern(rng, layers, period),
        sliding_window=int(rng.integers(2, 8)), query_pre_attn_scalar=int(rng.integers(4, 30)),
        attn_logit_softcapping=float(rng.uniform(0.5, 3)) if _coin(rng) else None,
        final_logit_softcapping=float(rng.uniform(0.5, 3)) if _coin(rng) else None,
        hidden_activation=_activation(rng), tie_word_embeddings=_coin(rng),
        rope_parameters=_rope(rng) if period == 1 else rope,
    )  # fmt: skip


def gemma3(rng: np.random.Generator):
    """Two bases of rotation, global layers scaled as the published ones are, or not."""
    layers, period = int(rng.integers(2, 8)), int(rng.integers(1, 8))
    wide = dict(rope_type="linear", factor=8.0) if _coin(rng) else dict(rope_type="default")
    near = dict(rope_type="default", rope_theta=_theta(rng))
    return hf.Gemma3TextConfig(
        **_common(rng), num_hidden_layers=layers, layer_types=_pattern(rng, layers, period),
        sliding_window=int(rng.integers(2, 8)), query_pre_attn_scalar=int(rng.integers(4, 30)),
        hidden_activation=_activation(rng), tie_word_embeddings=_coin(rng),
        rope_parameters=dict(
            full_attention=wide | dict(rope_theta=_theta(rng)), sliding_attention=near
        ),
    )  # fmt: skip


def _qwen_fields(rng: np.random.Generator) -> dict[str, Any]:
    """Windows of all layers, of none, or asked for and switched off."""
    layers = int(rng.integers(1, 4))
    windows = rng.choice(["none", "all", "off", "beyond"])
    plain = dict(rope_type="default", rope_theta=_theta(rng))
    fields = _common(rng) | dict(
        num_hidden_layers=layers,
        hidden_act=_activation(rng),
        sliding_window=int(rng.integers(2, 8)),
        use_sliding_window=windows in ("all", "beyond"),
        max_window_layers=0 if windows in ("all", "off") else layers,
        rope_parameters=plain if windows == "all" else _rope(rng),
    )
    return fields


def _divided(fields: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Heads that share the width, as all published Qwen2 have them."""
    head_dim = 2 * int(rng.integers(3, 8))
    fields = fields | dict(hidden_size=fields["num_attention_heads"] * head_dim)
    del fields["head_dim"]
    return fields


def qwen2(rng: np.random.Generator):
    """Qwen2 and Qwen2.5, which are one class."""
    fields = _qwen_fields(rng)
    fields = _divided(fields, rng) if _coin(rng) else fields
    return hf.Qwen2Config(**fields, tie_word_embeddings=_coin(rng))


def qwen2_vl(rng: np.random.Generator):
    """The text model of Qwen2-VL: rotation in three axes, equal for text."""
    fields = _divided(_qwen_fields(rng), rng)
    pairs = fields["hidden_size"] // fields["num_attention_heads"] // 2
    fields["rope_parameters"] |= dict(mrope_section=[1, 1, pairs - 2])
    return fields


def vision(rng: np.random.Generator, **fields):
    """A SigLIP tower; the image may be larger than its patches."""
    heads, patch = int(rng.integers(1, 5)), int(rng.integers(3, 8))
    return hf.SiglipVisionConfig(
        hidden_size=heads * int(rng.integers(4, 12)), num_attention_heads=heads,
        intermediate_size=int(rng.integers(20, 60)), num_hidden_layers=int(rng.integers(1, 4)),
        patch_size=patch, image_size=patch * int(rng.integers(3, 6)) + int(rng.integers(patch)),
        layer_norm_eps=float(rng.choice([1e-6, 1e-4])), attn_implementation="eager", **fields,
    )  # fmt: skip


def paligemma(text, tower):
    """A PaliGemma of a Gemma 1 or 2 and a SigLIP."""
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config=tower,
        projection_dim=text.hidden_size, tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def gemma3_multimodal(text, tower):
    """A Gemma 3 that sees."""
    config = hf.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=1,
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def qwen2_vl_model(text, rng: np.random.Generator):
    """A Qwen2-VL."""
    config = hf.Qwen2VLConfig(
        text_config=text, tie_word_embeddings=_coin(rng), attn_implementation="eager",
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=text["hidden_size"]),
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl_model(text, rng: np.random.Generator):
    """A Qwen2.5-VL."""
    config = hf.Qwen2_5_VLConfig(
        text_config=text, tie_word_embeddings=_coin(rng), attn_implementation="eager",
        vision_config=dict(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=16,
            out_hidden_size=text["hidden_size"], fullatt_block_indexes=[0],
        ),
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _seeing(build: Callable) -> Callable:
    """`build` with a drawn tower."""
    return lambda text, rng: build(text, vision(rng, vision_use_head=False))


FAMILIES = {
    "gemma": Family(gemma, lambda text, rng: hf.GemmaForCausalLM(text)),
    "gemma2": Family(gemma2, lambda text, rng: hf.Gemma2ForCausalLM(text)),
    "gemma3": Family(gemma3, lambda text, rng: hf.Gemma3ForCausalLM(text)),
    "qwen2": Family(qwen2, lambda text, rng: hf.Qwen2ForCausalLM(text)),
    "gemma3 multimodal": Family(gemma3, _seeing(gemma3_multimodal)),
    "paligemma": Family(gemma, _seeing(paligemma)),
    "paligemma2": Family(gemma2, _seeing(paligemma)),
    "qwen2-vl": Family(qwen2_vl, qwen2_vl_model),
    "qwen2.5-vl": Family(qwen2_vl, qwen2_5_vl_model),
}
