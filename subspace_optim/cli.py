"""The command line. Only argument parsing happens here; each command imports what it needs when it is called."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from subspace_optim import __version__
from subspace_optim.optimizers import key_of
from subspace_optim.pretrain.config import CHOICES, Failure, UserError
from subspace_optim.pretrain.display import begin_output, complain, end_output, table, write
from subspace_optim.sizes import SIZES

_SOURCE = Path(__file__).resolve().parents[1]  # a checkout, unless a wheel was installed
_BENCHMARKS = ("run", "backward", "plan", "gpu", "tune")
_EXTRA = ("numpy", "transformers", "tokenizers", "rich", "matplotlib")
EXIT_CODES = (
    "exit codes: 0 done; 1 training broke down; 2 a mistake in the options or a full disk; 129, 130 or 143 stopped by "
)
EXIT_CODES += "a terminal that closed, Ctrl-C or SIGTERM, with all work saved"


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments:"):
            words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            near = [close for word in words for close in difflib.get_close_matches(word, self._options(), 1)]
            hint = f"; did you mean {', '.join(near)}?" if near else "; --help after the command lists its options"
        raise UserError(message + hint)

    def _options(self) -> list[str]:
        found = {option for action in self._actions for option in action.option_strings}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(option for parser in action.choices.values() for option in parser._options())
        return sorted(found)


def _rank(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


_rank.__name__ = "rank"  # argparse names the type in its message


def _contender(text: str) -> tuple[str, dict[str, Any]]:
    """What `compare` calls a run, and the options that are the run's own: galore,lr=0.01,betas=0.9:0.95."""
    name, *pairs = text.split(",")
    parser = _Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    _add_update_options(parser)
    _add_seed(parser)
    words = []
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (key and sign and value):
            raise UserError(f"compare {text}: {pair!r} is no option=value, such as lr=0.001")
        words += [f"--{key.replace('_', '-')}", *value.split(":")]
    try:
        own = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(
            f"compare {text}: {error}; options of a run's own are those of its optimizer, and seed"
        ) from None
    return ",".join([key_of(name), *pairs]), {"optimizer": key_of(name), **own}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="subspace-optim",
        description="Train large models with little memory: gradient-projection optimizers for PyTorch.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"subspace-optim {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    one = commands.add_parser(
        "pretrain",
        help="pretrain a LLaMA on real text and report what it took",
        description="Pretrain a LLaMA on real text. With no options: a model of 5 M parameters learns the source of "
        "Python's standard library under GaLore, in a few minutes on two CPU cores. On several GPUs or machines: "
        "torchrun --nproc-per-node N -m subspace_optim pretrain …, the same run and the same checkpoints.",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    one.add_argument(
        "--optimizer",
        type=key_of,
        metavar="NAME",
        help="galore (default), flora, osd, gradnormlorp, grams, apollo, adamw, or a cell of the grid such as "
        "svd+lion or random+adam+cautious",
    )
    _add_run_options(one)
    one.add_argument(
        "--parallel",
        choices=CHOICES["parallel"],
        help="under torchrun: a copy of the model on every rank (ddp), shards of it (fsdp), or shards where a copy "
        "does not fit its GPU (auto, the default)",
    )
    one.add_argument(
        "--fit",
        metavar="SIZE",
        help="make the run fit into so much memory (24GB): checkpointing, micro-batch, layerwise, bits, rank, "
        "precision, the cheapest first; options that are given stay (on a CPU: beside what Python and torch take)",
    )
    where = one.add_argument_group("results")
    where.add_argument("--out", metavar="DIR", help="where checkpoints and reports go (default: a new folder in runs/)")
    where.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on with the run in DIR, or from one checkpoint; without DIR: the run in --out, or the latest in runs/",
    )
    where.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    where.set_defaults(function=_pretrain)

    many = commands.add_parser(
        "compare",
        help="pretrain under several optimizers and set them side by side",
        description="Pretrain the same model on the same data from the same start under each optimizer, and end with "
        "one table and one picture. Called again after an interruption, it keeps what is finished. A name may bring "
        "options of its own: compare adamw,lr=0.0003 galore,scale=0.03 galore,scale=0.1 --dense-lr 0.01",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    many.add_argument(
        "optimizers",
        nargs="+",
        type=_contender,
        metavar="NAME[,OPTION=VALUE...]",
        help="adamw galore flora osd gradnormlorp grams apollo, or grid cells; with options of the optimizer, or seed, "
        "that are the run's own",
    )
    _add_run_options(many)
    where = many.add_argument_group("results")
    where.add_argument(
        "--out", metavar="DIR", help="where the runs and the comparison go (default: runs/compare-MODEL)"
    )
    where.add_argument("--overwrite", action="store_true", help="start again where --out holds other runs")
    where.set_defaults(function=_compare)

    change = commands.add_parser(
        "spectrum",
        help="how training changed a model's weights, and the change as a LoRA adapter",
        description="Compare two folders of save_pretrained() matrix by matrix: how many directions the change takes, "
        "and how many leading directions are new (intruder dimensions).",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    change.add_argument("--before", metavar="DIR", required=True, help="the model before training")
    change.add_argument("--after", metavar="DIR", required=True, help="the model after it")
    change.add_argument("--target", nargs="+", metavar="NAME", help="names to look at (default: every matrix)")
    change.add_argument("--k", type=int, metavar="N", help="leading directions to look at (default: 10)")
    change.add_argument("--eps", type=float, metavar="X", help="cosine below which one is new (default: 0.5)")
    change.add_argument("--json", metavar="FILE", help="write the report there as well")
    change.add_argument("--export-lora", metavar="DIR", help="write the change as a PEFT adapter")
    change.add_argument("--rank", type=int, metavar="R", help="of the adapter")
    change.set_defaults(function=_spectrum)

    memory = commands.add_parser(
        "plan",
        help="how much memory a run would take, by category and layer, and what makes it fit",
        description="Predict the peak memory of a run from shapes alone: nothing is trained and no weight is "
        "allocated. The exit code is 1 where it does not fit into --gpu.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    memory.add_argument("--gpu", metavar="SIZE", help="what it is to fit into, such as 24GB (24·10⁹ bytes) or 22GiB")
    memory.add_argument(
        "--budget", metavar="SIZE", help="for the optimizer state: choose rank and bits of every matrix"
    )
    memory.add_argument("--json", metavar="FILE", help="write the plan there as well")
    memory.add_argument("--optimizer", type=key_of, metavar="NAME", help="as of pretrain (default: galore)")
    _add_model_options(memory)
    memory.add_argument("--device", choices=("cpu", "cuda"), help="where it would run (default: cuda with --gpu)")
    memory.add_argument("--vocab-size", type=int, metavar="N", help="(default: 4096 for tiny, otherwise 32000)")
    memory.add_argument("--seq", "--seq-len", dest="seq_len", type=int, metavar="N", help="tokens per sequence")
    memory.add_argument("--batch", "--batch-size", dest="batch_size", type=int, metavar="N", help="of a micro-batch")
    memory.add_argument("--accumulate", type=int, metavar="N", help="micro-batches in an update")
    _add_projection_options(memory)
    memory.set_defaults(function=_plan)

    race = commands.add_parser(
        "bench",
        help="a step on this machine beside torch's AdamW and the peers",
        description="Run a benchmark of a checkout's bench/ with the options that follow its name; NAME --help lists "
        "them. run: a step on a CPU beside fused AdamW and the peers that are installed; backward: whole training "
        "steps; plan: planned beside measured peaks; gpu: a step on a GPU; tune: block shapes of the Triton kernels.",
        allow_abbrev=False,
    )
    race.add_argument("benchmark", nargs="?", choices=_BENCHMARKS, default="run", metavar="NAME")
    race.add_argument("options", nargs=argparse.REMAINDER, metavar="...")
    race.set_defaults(function=_bench)

    here = commands.add_parser("backends", help="which kernels are available here, and why others are not")
    here.set_defaults(function=_backends)
    return parser


def _add_model_options(model: argparse._ActionsContainer) -> None:
    model.add_argument(
        "--model", metavar="SIZE", help=f"{', '.join(SIZES)}, or a .json file (default: tiny; grows on a GPU)"
    )
    for name in ("hidden", "intermediate", "heads", "layers"):
        model.add_argument(f"--{name}", type=int, metavar="N", help="in place of that of the size")
    model.add_argument("--dtype", choices=CHOICES["dtype"], help="of weights and gradients (default: float32)")
    model.add_argument("--attention", choices=CHOICES["attention"], help="(default: sdpa)")
    model.add_argument(
        "--gradient-checkpointing",
        "--checkpointing",
        dest="gradient_checkpointing",
        action="store_true",
        help="recompute activations to save memory",
    )


def _add_projection_options(update: argparse._ActionsContainer) -> None:
    update.add_argument(
        "--rank", type=_rank, metavar="R", help="of the projection; below 1: a fraction of the dimension"
    )
    update.add_argument(
        "--embedding-rank",
        type=_rank,
        metavar="R",
        help="project embeddings and head too (default: dense)",
    )
    for what in ("state", "basis"):
        name = {"state": "moments", "basis": "bases"}[what]
        update.add_argument(
            f"--{what}-bits", type=int, choices=CHOICES[f"{what}_bits"], help=f"of the {name} (default: 32)"
        )
    update.add_argument(
        "--layerwise",
        choices=CHOICES["layerwise"],
        help="keep no whole gradient: project each one as backward makes it (hooks), or let the backward of linear "
        "layers make the projected one (linear); a new projection is of the first micro-batch then (default: off)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    _add_model_options(model)
    model.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    model.add_argument(
        "--device",
        metavar="NAME",
        help="auto (default), cpu, cuda or cuda:N; each rank of torchrun takes a GPU of its own",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files, folders or .jsonl files, or hf:DATASET[:CONFIG[:SPLIT]] (default: Python's standard library)",
    )
    data.add_argument("--text-key", metavar="KEY", help="where jsonl lines keep their text (default: text)")
    data.add_argument(
        "--tokenizer", metavar="NAME", help="bpe (default), a tokenizer.json, a folder, or a name on the hub"
    )
    data.add_argument(
        "--vocab-size", type=int, metavar="N", help="of the bpe (default: 4096 for tiny, otherwise 32000)"
    )
    data.add_argument("--seq-len", type=int, metavar="N", help="tokens per sequence")

    _add_update_options(parser.add_argument_group("optimization (defaults by optimizer and size, from the papers)"))

    budget = parser.add_argument_group("budget")
    budget.add_argument("--batch-size", type=int, metavar="N", help="sequences in a micro-batch, of all ranks")
    budget.add_argument("--accumulate", type=int, metavar="N", help="micro-batches in an update")
    budget.add_argument("--steps", type=int, metavar="N", help="updates")
    budget.add_argument("--tokens", type=int, metavar="N", help="training tokens, in place of --steps")
    budget.add_argument("--eval-every", type=int, metavar="N", help="steps between measurements of the perplexity")
    budget.add_argument("--eval-tokens", type=int, metavar="N", help="held-out tokens it is measured on")
    budget.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    budget.add_argument("--keep", type=int, metavar="N", help="checkpoints to keep (default: 2)")
    budget.add_argument(
        "--watch", type=int, metavar="N", help="steps between looks at what each layer's subspace captures; 0: none"
    )
    _add_seed(budget)

    show = parser.add_argument_group("display")
    show.add_argument("--quiet", action="store_true", help="only the results and what went wrong")
    show.add_argument("--plain", action="store_true", help="lines instead of the live display")


def _add_update_options(update: argparse._ActionsContainer) -> None:
    _add_projection_options(update)
    update.add_argument("--update-proj-gap", type=int, metavar="N", help="steps between refreshes of the projection")
    update.add_argument("--scale", type=float, metavar="X", help="of the projected update")
    update.add_argument("--lr", type=float, metavar="X", help="highest learning rate")
    update.add_argument(
        "--dense-lr", type=float, metavar="X", help="of embeddings, head, vectors (default: that of --lr, if given)"
    )
    update.add_argument("--weight-decay", type=float, metavar="X", help="(default: 0)")
    update.add_argument("--betas", type=float, nargs=2, metavar="B", action=_Pair, help="decay of the moments")
    update.add_argument("--rounding", choices=CHOICES["rounding"], help="of bfloat16 weights (default: stochastic)")
    update.add_argument("--clip", type=float, metavar="X", help="largest gradient norm; 0 for none (default: 1)")
    update.add_argument("--warmup", type=int, metavar="N", help="steps to the highest learning rate (default: a tenth)")
    update.add_argument("--min-lr-ratio", type=float, metavar="X", help="where the cosine ends (default: 0.1)")


def _add_seed(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the weights, the data order and the optimizer (default: 0)"
    )


class _Pair(argparse.Action):
    """Keeps two values as a tuple, as configurations hold them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(f"this command needs {', '.join(missing)}; pip install 'subspace-optim[cli]'")


def _wait_without_spinning() -> None:
    """Begin again with threads that sleep while they wait, unless the person has chosen how they wait.

    Spinning makes a step four times slower as soon as the cores are shared with another process, and OpenMP reads its
    settings only when PyTorch loads it, which it has by now.
    """
    if sys.platform == "linux" and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _pretrain(given: dict[str, Any]) -> int:
    _require_extra()
    from subspace_optim.pretrain.command import pretrain

    return pretrain(given)


def _compare(given: dict[str, Any]) -> int:
    _require_extra()
    from subspace_optim.pretrain.compare import compare

    return compare(given)


def _spectrum(given: dict[str, Any]) -> int:
    _require_extra()
    from subspace_optim.pretrain.spectrum import spectrum

    return spectrum(given)


def _plan(given: dict[str, Any]) -> int:
    _require_extra()
    from subspace_optim.pretrain.planning import plan

    return plan(given)


def _bench(given: dict[str, Any]) -> int:
    if not (_SOURCE / "bench").is_dir():
        raise UserError(
            "bench: the benchmarks are not part of an installed package; clone the source, pip install -e '.[cli]' "
            "there, and call this again"
        )
    _require_extra()
    sys.path.insert(0, str(_SOURCE))
    return int(import_module(f"bench.{given['benchmark']}").main(given["options"]) or 0)


def _backends(given: dict[str, Any]) -> int:
    import subspace_optim as so

    write(table(("backend", "status"), list(so.backends().items())))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line after the program's name; that of the process if None.

    Returns:
        The exit code.
    """
    begin_output()
    try:
        given = vars(_parser().parse_args(arguments))
        del given["command"]
        function: Callable[[dict[str, Any]], int] = given.pop("function")
        if arguments is None and function not in (_backends, _bench):
            _wait_without_spinning()
        return function(given)
    except Failure as error:
        complain("error", str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("error", "interrupted before there was anything to save")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # what the system refuses where nothing more is known of it: no permission, a broken disk
        if error.filename is None:
            raise
        complain("error", f"{error.filename}: {error.strerror}")
        return UserError.exit_code
    finally:
        end_output()
