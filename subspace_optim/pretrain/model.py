"""The model: transformers' LlamaForCausalLM, its loss, and the device it lives on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim.planner import enable_checkpointing
from subspace_optim.pretrain.config import RunConfig, UserError
from subspace_optim.pretrain.ranks import Ranks
from subspace_optim.sizes import llama_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch {torch.__version__} sees no GPU here; use --device cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs here, counted from cuda:0")
    return torch.device("cuda", index)


def build_model(config: RunConfig, vocab_size: int, end_id: int) -> nn.Module:
    """A LLaMA with fresh weights; the same on every device for the same seed.

    Args:
        config: The run.
        vocab_size: Tokens of the tokenizer.
        end_id: The token that ends a document.

    Raises:
        UserError: The attention that was asked for is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    options = llama_options(config) | {"vocab_size": vocab_size}
    llama = LlamaConfig(**options, bos_token_id=None, eos_token_id=end_id)
    llama._attn_implementation = config.attention
    try:
        model = LlamaForCausalLM(llama)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--attention {config.attention}: {reason}; use --attention sdpa") from error
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return model.train()


def compiled(model: nn.Module, config: RunConfig) -> Callable[..., Any]:
    """The forward pass to call: the model, or its compiled form if ``--compile`` was given."""
    return torch.compile(model) if config.compile else model


def summed_loss(forward: Callable[..., Any], windows: Tensor) -> Tensor:
    """Negative log likelihood, in nats, summed over the tokens that the windows predict.

    Args:
        forward: The model.
        windows: Token ids; the last of each row is only predicted, the first only read.
    """
    logits = forward(input_ids=windows[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(
    forward: Callable[..., Any], batches: list[Tensor], device: torch.device, ranks: Ranks
) -> tuple[float, int]:
    """Sum the loss over held-out windows, in double precision.

    Args:
        forward: The model, in evaluation mode.
        batches: Windows.
        device: Of the model.
        ranks: Among which each batch is dealt out.

    Returns:
        The summed negative log likelihood and the tokens it is over; perplexity is exp(nll / tokens).
    """
    nll, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for windows in batches:
        part = ranks.part(windows).to(device)
        # What could not be dealt out is seen by all, and counts once.
        nll += summed_loss(forward, part).double() * (len(windows) / (len(part) * ranks.size))
        tokens += windows[:, 1:].numel()
    return ranks.sum(nll).item(), tokens
