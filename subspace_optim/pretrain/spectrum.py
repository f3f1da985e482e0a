"""The `spectrum` command: how a model's weights differ from those before training, and the change as an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import subspace_optim as so
from subspace_optim.integrations.peft import save_adapter
from subspace_optim.pretrain.config import UserError, flag, path_of
from subspace_optim.pretrain.display import table, write
from subspace_optim.pretrain.files import storage_errors
from subspace_optim.pretrain.report import write_json


def spectrum(given: Mapping[str, Any]) -> int:
    """Print the spectral report of two model folders, and export the change where that is asked for.

    Args:
        given: The options that were named, and nothing else.

    Raises:
        UserError: An option cannot be used.
    """
    options = dict(given)
    folders = {option: path_of(f"--{option}", options.pop(option)) for option in ("before", "after")}
    export, out = (
        path_of(flag(option), options.pop(option)) if option in options else None for option in ("export_lora", "json")
    )
    rank = options.pop("rank", None)
    if (export is None) != (rank is None):
        raise UserError("--export-lora DIR: goes with --rank R, the rank of the adapter, and the other way round")
    before, after = (_load(f"--{option}", folder) for option, folder in folders.items())
    try:
        rows = so.spectral_report(after, before, **options)
        lora = so.export_lora(after, before, rank, target=options.get("target")) if rank is not None else None
    except ValueError as error:
        raise UserError(f"--after {folders['after']}: {error}") from error
    write(render(rows))
    if out:
        write_json(out, {"layers": [asdict(row) for row in rows]}, "--json", "choose a file that can be written")
        write(f"see {out}")
    if export and lora:
        if not lora.factors:
            raise UserError(
                f"--export-lora {export}: no linear layer that was looked at has changed, so nothing is written"
            )
        with storage_errors("--export-lora", export, "choose a folder that can be written"):
            save_adapter(lora, export, str(folders["before"].absolute()))
        worst = min(lora.kept, key=lambda name: lora.kept[name])
        write(f"wrote {export}: {len(lora.kept)} layers at rank {rank}; least kept in {worst}: {lora.kept[worst]:.1%}")
        if lora.left_out:
            write(f"changed, but without a place in a LoRA: {', '.join(lora.left_out)}")
    return 0


def render(rows: Sequence[so.LayerSpectrum]) -> str:
    """The report as a table, a line a matrix.

    Args:
        rows: What ``spectral_report`` gave.
    """
    header = ("matrix", "shape", "change", "r90", "eff. rank", "stable rank", "intruders", "their share", "noise floor")
    return table(
        header,
        [
            (
                *(row.name, "×".join(map(str, row.shape)), f"{row.change:.2%}", str(row.r90)),
                *(f"{row.effective_rank:.1f}", f"{row.stable_rank:.1f}", str(row.intruders)),
                *(f"{row.intruder_share:.1%}", f"{row.noise_floor:.2f}"),
            )
            for row in rows
        ],
    )


def _load(option: str, folder: Path) -> nn.Module:
    """A model as `save_pretrained` left it, in the class that its configuration names."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    found: nn.Module
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        found, loading = getattr(transformers, names[0]).from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors raises a bare one, transformers and a broken config.json any
        raise UserError(
            f"{option} {folder}: is not a folder of model.save_pretrained() that can be read ({error})"
        ) from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with fresh random numbers
        raise UserError(f"{option} {folder}: lacks the weights of {', '.join(missing)}; write it anew")
    return found
