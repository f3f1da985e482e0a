"""What a run is: the model sizes, the defaults of each optimizer, and the options of one run, resolved and checked."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from subspace_optim.optimizers import key_of
from subspace_optim.sizes import SIZES, Size
from subspace_optim.types import BITS, ROUNDINGS

GIB = 1 << 30


class Failure(Exception):
    """An end that was foreseen: shown as one line, without a traceback."""

    exit_code = 1


class UserError(Failure):
    """Something the person at the keyboard can mend, such as a bad option or a full disk."""

    exit_code = 2


class Diverged(Failure):
    """The loss or the gradient was not finite for too many steps in a row."""


@dataclass(frozen=True, slots=True)
class OptimizerDefaults:
    """Hyperparameters used where the command line names none; None leaves the choice to the optimizer."""

    lr: float
    source: str
    scale: float | None = None
    update_proj_gap: int | None = None
    projected: bool = True
    dense_lr: float | None = None  # of embeddings, head and vectors, unless the command line names a rate for all


OPTIMIZER_DEFAULTS: dict[str, OptimizerDefaults] = {
    "adamw": OptimizerDefaults(1e-3, "GaLore paper's sweep for the full-rank baseline", projected=False),
    "galore": OptimizerDefaults(1e-2, "GaLore paper, 60M to 1B", scale=0.25, update_proj_gap=200),
    "flora": OptimizerDefaults(1e-2, "as at tiny; the paper has no LLaMA run", scale=0.1, update_proj_gap=200),
    "osd": OptimizerDefaults(1e-2, "Online Subspace Descent's script, 60M", scale=0.25, update_proj_gap=200),
    "gradnormlorp": OptimizerDefaults(1e-2, "GradNormLoRP's script", scale=0.25, update_proj_gap=250),
    "grams": OptimizerDefaults(1e-3, "Grams' default", projected=False),
    "apollo": OptimizerDefaults(1e-2, "APOLLO paper", scale=1.0, update_proj_gap=200),
}

# Of a basis made from gradients, which ages fastest early in training: in a short run it is renewed this many times,
# with this gap at least. The published gaps are those of long ones.
RENEWALS, LEAST_GAP = 32, 10

_TRIED = "best of those tried at tiny"
TINY_DEFAULTS: dict[str, OptimizerDefaults] = {
    "adamw": OptimizerDefaults(3e-4, _TRIED, projected=False, dense_lr=1e-2),
    "galore": OptimizerDefaults(1e-2, _TRIED, scale=0.1, update_proj_gap=200),
    "flora": OptimizerDefaults(1e-2, _TRIED, scale=0.1, update_proj_gap=200),
    "osd": OptimizerDefaults(1e-2, _TRIED, scale=0.1, update_proj_gap=200),
    "gradnormlorp": OptimizerDefaults(1e-2, _TRIED, scale=0.1, update_proj_gap=200),
    "grams": OptimizerDefaults(1e-3, _TRIED, projected=False, dense_lr=5e-2),
    "apollo": OptimizerDefaults(1e-2, _TRIED, scale=0.03, update_proj_gap=200),
}

# Grid cells: the learning rate belongs to the rule, and what is projected takes GaLore's gap and scale.
RULE_LR = {"adam": (1e-3, 1e-2), "adafactor": (1e-2, 1e-2), "lion": (3e-4, 1e-3), "momentum": (1e-1, 1e-1)}


def optimizer_defaults(name: str, model: str, steps: int) -> OptimizerDefaults:
    """Defaults of an optimizer or grid cell for a model size.

    Args:
        name: Of `create`: an optimizer, ``adamw``, or ``projector+rule[+transform]``.
        model: Name of the size; 7b has its own learning rate and gap in the GaLore paper, and tiny a table of its own.
        steps: Of the run.

    Returns:
        The row of the table, or for a cell of the grid one made from its rule; an unknown name gets GaLore's, and is
        refused when the optimizer is made.
    """
    name = key_of(name)
    table = TINY_DEFAULTS if model == "tiny" else OPTIMIZER_DEFAULTS
    if name in table:
        row = table[name]
    else:
        projector, _, rest = name.partition("+")
        dense_lr, projected_lr = RULE_LR.get(rest.partition("+")[0], RULE_LR["adam"])
        if projector == "none":
            return OptimizerDefaults(dense_lr, "ours, by rule", projected=False)
        row = OptimizerDefaults(projected_lr, "ours, by rule", scale=table["galore"].scale, update_proj_gap=200)
    if model == "7b" and row.projected:
        row = OptimizerDefaults(0.005, "GaLore paper, 7B", row.scale, 500)
    if row.update_proj_gap and (name in ("galore", "gradnormlorp") or name.startswith("svd+")):
        row = replace(row, update_proj_gap=min(row.update_proj_gap, max(LEAST_GAP, steps // RENEWALS)))
    return row


BEFORE = {"embedding_rank": None, "dense_lr": None}  # what runs go by that were begun before an option existed


@dataclass(frozen=True)
class RunConfig:
    """Every option of one run, with nothing left to a default."""

    model: str
    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocab_size: int
    seq_len: int
    dtype: str
    gradient_checkpointing: bool
    compile: bool
    attention: str
    device: str
    data: tuple[str, ...]
    text_key: str
    tokenizer: str
    optimizer: str
    rank: int | float | None
    embedding_rank: int | float | None
    update_proj_gap: int | None
    scale: float | None
    lr: float
    dense_lr: float | None
    weight_decay: float
    betas: tuple[float, float] | None
    state_bits: int
    basis_bits: int
    rounding: str
    batch_size: int
    accumulate: int
    steps: int
    warmup: int
    min_lr_ratio: float
    clip: float
    layerwise: str
    parallel: str
    seed: int
    eval_every: int
    eval_tokens: int
    save_every: int
    keep: int
    watch: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update is made from."""
        return self.batch_size * self.accumulate * self.seq_len

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments for ``subspace_optim.create``; what is None is left to the optimizer."""
        keys = ("betas", "dense_lr", "embedding_rank", "update_proj_gap", "scale")
        optional = {key: getattr(self, key) for key in keys}
        return {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "rank": self.rank,
            "seed": self.seed,
            "state_bits": self.state_bits,
            "basis_bits": self.basis_bits,
            "rounding": self.rounding,
            **{key: value for key, value in optional.items() if value is not None},
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values that JSON and ``torch.load(weights_only=True)`` accept."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """The inverse of ``to_dict``, also of an earlier version's.

        Args:
            values: What was read from JSON.

        Raises:
            UserError: It is no configuration: another version wrote it, or it was changed or damaged.
        """
        if not isinstance(values, Mapping):
            raise UserError("holds no options of a run")
        values = {**BEFORE, **values}
        kinds = get_type_hints(cls)
        if kinds.keys() != values.keys():
            odd = ", ".join(sorted(kinds.keys() ^ values.keys()))
            raise UserError(f"the options of the run do not fit this version of subspace_optim ({odd})")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for key, kind in kinds.items():
            if not _fits(plain[key], kind):
                raise UserError(f"{flag(key)} {values[key]!r}: is not of the type of this option")
        check_values(plain)
        return cls(**plain)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that JSON gave is of a type that `RunConfig` names; JSON writes 1.0 as 1 where it likes."""
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        inner = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if inner:
        return any(_fits(value, one) for one in inner)
    return type(value) in ((int, float) if kind is float else (kind,))


# Options that may change when a run is resumed: none of them decides what the weights will be, except the number of
# steps, which a person sets on purpose to train for longer. The text may lie elsewhere; that it is the same is checked.
FREE_ON_RESUME = frozenset(
    {
        "steps", "device", "compile", "layerwise", "parallel", "eval_every", "save_every", "keep", "watch", "data",
        "tokenizer",
    }
)  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "attention": ("sdpa", "eager", "flash_attention_2"),
    "layerwise": ("off", "hooks", "linear"),
    "parallel": ("auto", "ddp", "fsdp"),
    "rounding": ROUNDINGS,
    "state_bits": BITS,
    "basis_bits": BITS,
}


def flag(name: str) -> str:
    """The spelling of an option on the command line."""
    return "--" + name.replace("_", "-")


def resolve(given: Mapping[str, Any]) -> RunConfig:
    """Fill in what the person did not say and check all of it.

    Args:
        given: The options that were named; the device is the CPU unless it is among them.

    Raises:
        UserError: An option has a value that cannot be used.
    """
    values: dict[str, Any] = dict(given)
    tokens = values.pop("tokens", None)
    values.setdefault("model", "tiny")
    size, dimensions = _size(values["model"])
    for key, value in (asdict(size) | dimensions).items():
        if key in RunConfig.__dataclass_fields__ and key != "rank":
            values.setdefault(key, value)
    check_values({**values, "tokens": tokens})
    if tokens is not None:
        values["steps"] = steps_of(given, values["batch_size"] * values["accumulate"] * values["seq_len"])

    values["optimizer"] = key_of(values.get("optimizer", "galore"))
    defaults = optimizer_defaults(values["optimizer"], values["model"], values["steps"])
    if defaults.projected or (values["optimizer"] == "grams" and "rank" in given):
        narrow = min(values["hidden"], values["intermediate"])
        values.setdefault("rank", size.rank if narrow == size.hidden else max(1, narrow // 4))
        if values["rank"] >= narrow:
            raise UserError(
                f"--rank {values['rank']}: is not below the model's smallest dimension, {narrow}, so nothing would be "
                "projected; choose a lower rank, or --optimizer adamw"
            )
        narrow = min(values["hidden"], values.get("vocab_size", values["hidden"]))
        if (values.get("embedding_rank") or 0) >= narrow:
            raise UserError(
                f"--embedding-rank {values['embedding_rank']}: is not below {narrow}, the smaller dimension of the "
                "embedding, so it would not be projected; choose a lower rank, or leave it out"
            )
    else:
        for key in ("rank", "embedding_rank", "update_proj_gap", "scale"):
            if key in given:
                raise UserError(
                    f"{flag(key)} {given[key]}: {values['optimizer']} projects nothing; "
                    f"leave {flag(key)} out, or choose an optimizer that projects"
                )
        values["rank"] = None
    if "lr" not in values:
        values.setdefault("dense_lr", defaults.dense_lr)
    for key in ("update_proj_gap", "scale", "lr"):
        values.setdefault(key, getattr(defaults, key))
    fixed: dict[str, Any] = {
        "embedding_rank": None, "dense_lr": None, "weight_decay": 0.0, "betas": None, "state_bits": 32,
        "basis_bits": 32, "rounding": "stochastic", "dtype": "float32", "gradient_checkpointing": False,
        "compile": False, "attention": "sdpa", "device": "cpu", "data": (), "text_key": "text", "tokenizer": "bpe",
        "warmup": max(1, values["steps"] // 10), "min_lr_ratio": 0.1, "clip": 1.0, "layerwise": "off",
        "parallel": "auto", "seed": 0, "eval_every": size.every, "save_every": size.every, "keep": 2, "watch": 0,
    }  # fmt: skip
    if values.get("warmup", 0) > values["steps"]:
        raise UserError(f"--warmup {values['warmup']}: is longer than the run of {values['steps']} steps")
    named = {key: value for key, value in values.items() if key in RunConfig.__dataclass_fields__}
    return RunConfig(**(fixed | named))


def steps_of(given: Mapping[str, Any], tokens_per_step: int) -> int:
    """The updates that ``--tokens`` takes.

    Args:
        given: The options that were named, it among them.
        tokens_per_step: Tokens that one update is made from.

    Raises:
        UserError: They name ``--steps`` too.
    """
    if "steps" in given:
        raise UserError(
            f"--tokens {given['tokens']}: --steps {given['steps']} says how long to train already; give one"
        )
    return -(-int(given["tokens"]) // tokens_per_step)


_AT_LEAST_ONE = (
    "tokens", "steps", "batch_size", "accumulate", "seq_len", "hidden", "intermediate", "heads", "layers",
    "update_proj_gap", "eval_every", "eval_tokens", "save_every", "keep",
)  # fmt: skip
_OF_TENSORS = ("batch_size", "seq_len", "hidden", "intermediate", "vocab_size")  # their bytes stay below 2⁶³
_LARGEST = 1e12  # products of two or three stay within float32
_NOT_NEGATIVE = ("weight_decay", "clip", "warmup", "seed", "watch")


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values that no run can use.

    Args:
        values: Options by name; those that are missing, or None, are not looked at.

    Raises:
        UserError: A number is out of range, or a word is none of those to choose from.
    """
    values = {key: value for key, value in values.items() if value is not None}
    for key, choices in CHOICES.items():
        if key in values and values[key] not in choices:
            raise UserError(f"{flag(key)} {values[key]}: must be one of {', '.join(map(str, choices))}")
    for key in _AT_LEAST_ONE:
        if key in values and values[key] < 1:
            raise UserError(f"{flag(key)} {values[key]}: must be at least 1")
    for key in _NOT_NEGATIVE:
        if key in values and not 0 <= values[key] < math.inf:
            raise UserError(f"{flag(key)} {values[key]}: must be 0 or more")
    for key in ("lr", "dense_lr", "scale"):
        if key in values and not 0 < values[key] < math.inf:
            raise UserError(f"{flag(key)} {values[key]}: must be a number above 0")
    for key, value in values.items():
        if isinstance(value, float) and value > _LARGEST:
            raise UserError(f"{flag(key)} {value}: must be at most {_LARGEST:g}")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{flag(key)} {value}: must be below 2**63")
    for key in _OF_TENSORS:
        if key in values and values[key] > 2**20:
            raise UserError(f"{flag(key)} {values[key]}: must be at most {2**20}")
    if "vocab_size" in values and values["vocab_size"] < 257:
        raise UserError(f"--vocab-size {values['vocab_size']}: must be at least 257 (256 bytes and the end of text)")
    if "min_lr_ratio" in values and not 0 <= values["min_lr_ratio"] <= 1:
        raise UserError(f"--min-lr-ratio {values['min_lr_ratio']}: must lie between 0 and 1")
    for beta in values.get("betas", ()):
        if not 0 <= beta < 1:
            raise UserError(f"--betas {beta}: each must be at least 0 and below 1, such as 0.9 0.999")
    if {"hidden", "heads"} <= values.keys():
        width, odd = divmod(values["hidden"], values["heads"])
        if odd:
            raise UserError(f"--heads {values['heads']}: does not divide --hidden {values['hidden']}")
        if width % 2:
            raise UserError(
                f"--heads {values['heads']}: leaves {width} dimensions a head; rotary embeddings need an even number"
            )
    for key in ("rank", "embedding_rank"):
        rank = values.get(key, 1)
        if rank >= 1 if isinstance(rank, int) else 0 < rank < 1:
            continue
        raise UserError(f"{flag(key)} {rank}: must be a whole number from 1 up, or a fraction between 0 and 1")


def _size(model: str) -> tuple[Size, dict[str, int]]:
    """The named size, or that of tiny with the dimensions that a JSON file gives."""
    if model in SIZES:
        return SIZES[model], {}
    if not model.endswith(".json"):
        near = difflib.get_close_matches(model, SIZES, 1)
        hint = f"did you mean {near[0]}?" if near else "it must be one of them or a .json file with the dimensions"
        raise UserError(f"--model {model}: unknown; the sizes are {', '.join(SIZES)}; {hint}")
    try:
        found = json.loads(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--model {model}: cannot be read as JSON ({error})") from error
    published = {
        "hidden_size": "hidden",
        "intermediate_size": "intermediate",
        "num_attention_heads": "heads",
        "num_hidden_layers": "layers",
    }
    if not isinstance(found, dict):
        raise UserError(f"--model {model}: must hold an object with {', '.join(published)}")
    dimensions: dict[str, Any] = {ours: found.get(theirs, found.get(ours)) for theirs, ours in published.items()}
    wrong = [theirs for theirs, ours in published.items() if not isinstance(dimensions[ours], int)]
    if wrong:
        raise UserError(f"--model {model}: needs a whole number for {', '.join(wrong)}")
    ours = {
        "model_type": "llama", "num_key_value_heads": dimensions["heads"], "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    other = [f"{key} {found[key]}" for key, value in ours.items() if found.get(key, value) not in (value, None)]
    if other:
        raise UserError(
            f"--model {model}: has {', '.join(other)}, and what is trained here is a LLaMA with as many key as query "
            "heads, a head of its own and no biases; leave that out of the file, or plan the model as it is with "
            "subspace_optim.plan(transformers.AutoConfig.from_pretrained(DIR))"
        )
    if isinstance(found.get("vocab_size"), int):
        dimensions["vocab_size"] = found["vocab_size"]
    return SIZES["tiny"], dimensions


def parameter_count(size: Size) -> int:
    """Parameters of the LlamaForCausalLM of this size, embedding and head not tied."""
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate + 2 * size.hidden
    return 2 * size.vocab_size * size.hidden + size.layers * layer + size.hidden


def training_bytes(size: Size, batch_size: int) -> int:
    """A cautious estimate of the memory that AdamW in float32 takes to train this size.

    Args:
        size: The model.
        batch_size: Sequences in a micro-batch.
    """
    per_token = size.layers * (16 * size.hidden + 6 * size.intermediate) + 4 * size.vocab_size
    return 16 * parameter_count(size) + 4 * batch_size * size.seq_len * per_token


def grow_to_fit(free_bytes: int) -> dict[str, Any]:
    """The default run on a GPU: the largest model and batch that fit in two thirds of its free memory.

    Args:
        free_bytes: Free memory of the device.

    Returns:
        The model, batch size, accumulation, steps and evaluation budget, sized for a run of minutes.
    """
    budget = free_bytes * 2 // 3
    for name in ("350m", "130m", "60m", "20m"):
        for batch_size in (64, 32, 16):
            if training_bytes(SIZES[name], batch_size) <= budget:
                pace = {"eval_every": 100, "save_every": 100, "eval_tokens": 1 << 17}
                return {"model": name, "batch_size": batch_size, "accumulate": 64 // batch_size, "steps": 500, **pace}
    return {"model": "tiny"}


def cache_root() -> Path:
    """Where tokenizers and token streams are kept: ``$SUBSPACE_OPTIM_CACHE`` or ``~/.cache/subspace_optim``."""
    return path_of("SUBSPACE_OPTIM_CACHE", os.environ.get("SUBSPACE_OPTIM_CACHE") or "~/.cache/subspace_optim")


def path_of(option: str, name: str) -> Path:
    """A path as a person writes it, ~ being a home.

    Args:
        option: What names it.
        name: The path.

    Raises:
        UserError: It is empty, as an unset variable of the shell is, or there is no such home.
    """
    if not name:
        raise UserError(f"{option}: is empty; name a path, or leave {option} out")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{option} {name}: there is no such home directory here; write the path out") from error
