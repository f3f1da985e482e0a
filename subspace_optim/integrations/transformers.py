"""transformers' Trainer, and the trainers built on it: a factory, its options, and a check before training.

    args = TrainingArguments(…)
    options = {"training_args": args, "model": model, "rank": 128}
    trainer = Trainer(model, args, …, optimizer_cls_and_kwargs=(SubspaceFactory, options))
    check_trainer(trainer)

Needs no import of transformers itself.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import nn

from ..engine import SubspaceOptimizer
from ..optimizers import create

# The optimizer's option and the field of TrainingArguments that a Trainer keeps it in.
_FIELDS = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}
_OF_MODULES = ("embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups")  # in axolotl's arguments


class SubspaceFactory:
    """Makes a Trainer's optimizer from its model, in groups of projected and dense, decayed and undecayed tensors.

    The forms in use are served: `SubspaceFactory()(model, **options)`, as transformers 5 calls it;
    `SubspaceFactory()(model, training_args, **options)`, as axolotl does; and `SubspaceFactory(model, **options)`, as
    transformers 4 does where "model" is among the options.
    """

    def __new__(cls, model: Any = None, **options: Any) -> Any:
        """A factory; of a model, its optimizer."""
        factory = super().__new__(cls)
        if model is None and not options:
            return factory
        if not isinstance(model, nn.Module):
            raise TypeError(
                "SubspaceFactory was handed groups of parameters, as transformers 4 does, and needs the model; add "
                '"model": model to the options of optimizer_cls_and_kwargs'
            )
        return factory(model, **options)

    def __call__(
        self,
        opt_model: nn.Module,
        training_args: Any = None,
        *,
        name: str = "galore",
        optim_args: str | dict[str, Any] | None = None,
        optim_target_modules: str | list[str] | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> SubspaceOptimizer:
        """Make the optimizer.

        Args:
            opt_model: the model.
            training_args: the TrainingArguments, from which come learning_rate, adam_beta1, adam_beta2, adam_epsilon,
                weight_decay, optim_args and optim_target_modules, where they are not given here. A Trainer does not
                hand them to a factory: put them into its options.
            name: what `subspace_optim.create` makes.
            optim_args: more options, as "rank=64, update_proj_gap=100, scale=0.10" or a dict.
            optim_target_modules: what to project: substrings or regular expressions of names, one expression, or
                "all-linear"; see `subspace_optim.param_groups`.
            model: not looked at; among the options of a Trainer it is for transformers 4.
            **options: of `subspace_optim.create`; they come before those of `optim_args`.

        Raises:
            ValueError: an option is misspelt or given as two different values, lr, betas, eps and weight_decay are not
                all known, or the arguments have learning rates of single modules.
        """
        if dropped := [field for field in _OF_MODULES if getattr(training_args, field, None) is not None]:
            raise ValueError(
                f"SubspaceFactory: {', '.join(dropped)} would have been ignored; leave it out, or make the groups, "
                "each with its lr, and the optimizer yourself"
            )
        given = parse_optim_args(optim_args or getattr(training_args, "optim_args", None)) | options
        name = given.pop("name", name)
        target = optim_target_modules or getattr(training_args, "optim_target_modules", None)
        if target is not None:
            given.setdefault("target", "all-linear" if target == "all_linear" else target)
        known = {} if training_args is None else trainer_options(training_args)
        missing = sorted(set(_FIELDS) - set(given) - set(known))
        if missing:
            lost = ", ".join(field for key in missing for field in _FIELDS[key])
            raise ValueError(
                f"SubspaceFactory: {', '.join(missing)} not given, and no training_args: a Trainer passes a factory "
                f"none of its TrainingArguments, so {lost} would have been ignored; "
                'add "training_args": args to the options of optimizer_cls_and_kwargs'
            )
        return create(opt_model, name, **{**known, **given})


def trainer_options(training_args: Any) -> dict[str, Any]:
    """lr, betas, eps and weight_decay of TrainingArguments, for the class form of `optimizer_cls_and_kwargs`.

    Args:
        training_args: with learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay.
    """
    values = {key: tuple(getattr(training_args, field) for field in fields) for key, fields in _FIELDS.items()}
    return {key: value if len(value) > 1 else value[0] for key, value in values.items()}


def parse_optim_args(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """Options out of "rank=64, update_proj_gap=100, scale=0.10": numbers, tuples, True, False and None; else strings.

    Args:
        text: the string, a dict whose strings are read alike, or None.

    Raises:
        ValueError: a part is not `name=value`, or a name is given twice.
    """
    if text is None:
        return {}
    if isinstance(text, dict):
        return {key: _literal(value) if isinstance(value, str) else value for key, value in text.items()}
    options: dict[str, Any] = {}
    for part in re.split(r",(?![^([]*[)\]])", text):  # not at the commas within brackets
        if not part.strip():
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key.isidentifier() and value):
            raise ValueError(f"optim_args={text!r}: '{part.strip()}' must be name=value, as in 'rank=64, scale=0.25'")
        if key in options:
            raise ValueError(f"optim_args={text!r} gives {key} twice")
        options[key] = _literal(value)
    return options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def check_trainer(trainer: Any) -> SubspaceOptimizer:
    """See, before training, that the Trainer made the optimizer that was meant, with the settings of its arguments.

    Some ways of naming an optimizer to a Trainer (`optim="galore_adamw"` for one) ignore adam_beta1, adam_beta2,
    adam_epsilon and weight_decay; some versions fall back to AdamW without a word.

    Args:
        trainer: a transformers Trainer; its optimizer is made now if it has none yet.

    Returns:
        The optimizer.

    Raises:
        TypeError: the optimizer is none of this package.
        ValueError: it does not have the lr, betas, eps or weight_decay of the TrainingArguments.
    """
    optimizer = trainer.create_optimizer()
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, SubspaceOptimizer):
        raise TypeError(f"the Trainer would train with {type(optimizer).__name__}, which is not of subspace_optim")
    lost = []
    groups = [group for group in optimizer.param_groups if group["params"]]
    for key, wanted in trainer_options(trainer.args).items():
        used = {_plain(group.get("initial_lr", group["lr"]) if key == "lr" else group[key]) for group in groups}
        # Vectors are not decayed, whatever the arguments say.
        if used != {wanted} and not (key == "weight_decay" and used == {wanted, 0.0}):
            lost.append(
                f"{' and '.join(_FIELDS[key])}={wanted} (the optimizer has {', '.join(map(str, sorted(used)))})"
            )
    if lost:
        raise ValueError(
            f"these settings of the TrainingArguments would have been ignored: {'; '.join(lost)}; make the optimizer "
            "with SubspaceFactory and training_args, or put trainer_options(args) into the options of the class"
        )
    return optimizer


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else float(value)
