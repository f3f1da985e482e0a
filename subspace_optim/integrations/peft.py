"""PEFT: the change of a model as an adapter folder, for `PeftModel.from_pretrained` on the old weights."""

from __future__ import annotations

import json
from pathlib import Path

from ..spectrum import LoRA


def save_adapter(lora: LoRA, folder: str | Path, base_model: str | None = None) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        lora: from `export_lora`.
        folder: made where it does not exist.
        base_model: name or path of the weights before, for whoever loads the adapter without them.

    Returns:
        The folder.

    Raises:
        ValueError: there is nothing to write.
    """
    from safetensors.torch import save_file

    if not lora.factors:
        raise ValueError("save_adapter: no linear layer has changed, so there is no adapter to write")
    rank = next(iter(lora.factors.values()))[0].shape[0]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,  # the factors hold the whole change, so its scale is 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": lora.fan_in_fan_out,
        "target_modules": list(lora.factors),
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.cpu().contiguous()
        for module, pair in lora.factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder
