"""A random Qwen3 with two layers, its tokenizer and a random LoRA adapter, on disk, for tests of everything that
loads a model: small enough to make in a tenth of a second, real enough that mlx-lm and transformers load it.

The weights are random, so what it writes is noise; but it is the same noise for the same prompt, it depends on the
whole prompt and on the adapter, and at temperature 0.2 it ends its turn after some thirty tokens. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS = 2
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
VOCABULARY = 512
RANK = 4
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = """\
{%- for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""ChatML as Qwen3's hybrid models have it: thinking switched off is an empty think block in the prompt."""

CORPUS = (
    "The function returns the number of records that were kept and the number that were rejected.",
    "def parse(line: bytes) -> tuple[str, str]:\n    value = json.loads(line)\n    return value['id'], value['text']\n",
    "If the connection is closed before the answer has arrived, the request is sent again after a short wait.",
    "for name, value in sorted(values.items()):\n    if value is None:\n        continue\n    total += value\n",
    "Rewrite text so that another language model can use it at the lowest token cost. Keep names, numbers and units.",
    "const result = items.filter((item) => item.size > 0).map((item) => item.name);\n",
    "In 1969 the crew of three travelled 384,400 km in 76 hours, because the orbit had been computed in advance.",
)


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer of 512 tokens with the ChatML template: ``tokenizer.json`` and its two companions."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(THINK_TOKENS),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return directory


def make_model(directory: Path, seed: int = 0, end_bias: float = 0.6) -> Path:
    """Weights, config and tokenizer; returns ``directory``.

    ``end_bias``, in logits (about), raises the end-of-turn token: at temperature 0.2, with 0.9 a turn has about 8
    tokens, with 0.6 about 30, with 0.0 it hardly ends. A Qwen3 has no bias, so it is built from what it has: the first
    hidden dimension is the same for every token, nothing reads or writes it, and only the end-of-turn token's row of
    the (untied) output matrix is not 0 there.
    """
    make_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)

    embedding = normal(VOCABULARY, HIDDEN, 1.0)
    embedding[:, 0] = 8.0
    head = normal(VOCABULARY, HIDDEN, 0.06)
    head[:, 0] = 0.0
    head[end, 0] = end_bias / 5.0
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": _ones(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows, columns in _linears():
            out = normal(rows, columns, columns**-0.5)
            if rows == HIDDEN:
                out[0] = 0.0  # nothing writes to the first dimension, so the bias stays what it is
            weights[f"{at}.{name}.weight"] = out
        for name, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            weights[f"{at}.{name}.weight"] = _ones(size)
            weights[f"{at}.{name}.weight"][0] = 0.0
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            weights[f"{at}.{name}.weight"] = _ones(HEAD_DIM)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": end,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return directory


def make_adapter(directory: Path, seed: int = 1, scale: float = 4.0) -> Path:
    """A random LoRA adapter for :func:`make_model`'s model, in the form mlx-lm writes and reads."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    keys = [name for name, _, _ in _linears()]
    weights = {}
    for layer in range(LAYERS):
        for name, rows, columns in _linears():
            at = f"model.layers.{layer}.{name}"
            weights[f"{at}.lora_a"] = (rng.standard_normal((columns, RANK)) * columns**-0.5).astype(np.float32)
            weights[f"{at}.lora_b"] = (rng.standard_normal((RANK, rows)) * 0.1).astype(np.float32)
    save_file(weights, directory / "adapters.safetensors")
    parameters = {"rank": RANK, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return directory


def _ones(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(size, np.float32)


def _linears() -> tuple[tuple[str, int, int], ...]:
    """Name, output and input size of each linear layer of a block."""
    return (
        ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
        ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
        ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
        ("mlp.gate_proj", 2 * HIDDEN, HIDDEN),
        ("mlp.up_proj", 2 * HIDDEN, HIDDEN),
        ("mlp.down_proj", HIDDEN, 2 * HIDDEN),
    )
