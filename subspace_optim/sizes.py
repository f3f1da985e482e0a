"""The LLaMA family that the papers of this field pretrain: dimensions and budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Size:
    """A model of the LLaMA family and the budget it is pretrained with."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    rank: int
    batch_size: int = 32
    accumulate: int = 16
    steps: int = 10_000
    vocab_size: int = 32_000
    seq_len: int = 256
    every: int = 1000
    eval_tokens: int = 1 << 20


# 60m to 7b: dimensions, ranks, 512 sequences of 256 tokens per update and steps of the GaLore paper (arXiv 2403.03507,
# table 5). 9m and 20m are the two smaller members that its successors use. tiny is the body of 20m under a vocabulary
# of 4096, with a budget of a few minutes on two CPU cores.
SIZES: dict[str, Size] = {
    "tiny": Size(
        256, 688, 4, 4, rank=64, batch_size=8, accumulate=1, steps=320, vocab_size=4096, seq_len=128, every=50,
        eval_tokens=16_384,
    ),
    "9m": Size(128, 352, 4, 4, rank=32, batch_size=64, accumulate=2, steps=5_000),
    "20m": Size(256, 688, 4, 4, rank=64, batch_size=64, accumulate=2, steps=5_000),
    "60m": Size(512, 1376, 8, 8, rank=128, batch_size=64, accumulate=8, steps=10_000),
    "130m": Size(768, 2048, 12, 12, rank=256, batch_size=32, accumulate=16, steps=20_000),
    "350m": Size(1024, 2736, 16, 24, rank=256, batch_size=16, accumulate=32, steps=60_000),
    "1b": Size(2048, 5461, 32, 24, rank=512, batch_size=16, accumulate=32, steps=100_000),
    "7b": Size(4096, 11008, 32, 32, rank=1024, batch_size=8, accumulate=64, steps=150_000),
}  # fmt: skip


def llama_options(size: Any) -> dict[str, Any]:
    """Keyword arguments of transformers' LlamaConfig.

    Args:
        size: a Size, or whatever else has its dimensions.
    """
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "max_position_embeddings": max(1024, size.seq_len),
        "use_cache": False,
        "tie_word_embeddings": False,
    }
