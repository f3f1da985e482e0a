"""The command line itself: light to start, clear without the extras, one line for each mistake."""

import os
import subprocess
import sys
from functools import partial

import pytest
from pretraining import ROOT, environment, refused

import subspace_optim as so
from subspace_optim import cli

_EXTRAS = ("numpy", "transformers", "tokenizers", "rich", "matplotlib", "datasets", "pandas", "scipy")

# A machine without the extras: the modules are there but must not be found.
_BARE = f"""
import importlib.abc, importlib.util, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {_EXTRAS!r} else find_spec(name, package)
from subspace_optim.cli import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments):
    # Without numpy torch itself warns; everything else that appears is ours.
    quiet = {**environment(), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _BARE, *arguments]
    return subprocess.run(command, env=quiet, capture_output=True, text=True, cwd=ROOT)


def test_help_and_backends_need_torch_alone():
    for arguments, word in (
        (["--help"], "pretrain"),
        (["pretrain", "--help"], "--update-proj-gap"),
        (["backends"], "available"),
        (["--version"], f"subspace-optim {so.__version__}\n"),
    ):
        done = bare(*arguments)
        assert done.returncode == 0 and word in done.stdout, done.stderr


@pytest.mark.parametrize("command", [["pretrain"], ["compare", "adamw"]])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(command):
    done = bare(*command)
    assert done.returncode == 2
    assert done.stderr == (
        "subspace-optim: error: this command needs numpy, transformers, tokenizers, rich, matplotlib; "
        "pip install 'subspace-optim[cli]'\n"
    )


def test_parsing_imports_nothing_heavy():
    script = "import sys, subspace_optim.cli; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert not {"transformers", "tokenizers", "datasets", "matplotlib", "rich"} & set(done.stdout.split())


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "subspace_optim", "backends"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0
    for name, status in so.backends().items():
        assert name in done.stdout and status in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("required", "COMMAND")),
        (["pretrian"], ("pretrian", "pretrain")),
        (["pretrain", "--stepz", "3"], ("--stepz", "did you mean --steps?")),
        (["pretrain", "--step", "3"], ("--step", "did you mean --steps?")),
        (["pretrain", "--xyzzy"], ("--xyzzy", "--help")),
        (["pretrain", "--steps"], ("--steps", "expected one argument")),
        (["compare"], ("NAME",)),
    ],
    ids=str,
)
def test_a_mistyped_command_line_is_one_line(capsys, arguments, words):
    refused(capsys, arguments, *words)


def test_help_ends_well(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["compare", "--help"])
    assert done.value.code == 0
    assert "exit codes" in capsys.readouterr().out


def test_ctrl_c_before_there_is_anything_to_save(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(so, "backends", interrupted)
    assert cli.main(["backends"]) == 130
    assert capsys.readouterr().err == "subspace-optim: error: interrupted before there was anything to save\n"


@pytest.mark.parametrize("closed", [False, True], ids=["ascii", "closed"])
def test_any_stream_will_do(closed):
    """The rule of a table is none of ASCII's characters."""
    done = subprocess.run(
        [sys.executable, "-m", "subspace_optim", "backends"],
        env=environment() | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
        preexec_fn=partial(os.close, 1) if closed else None,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert ("???" in done.stdout) != closed


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "subspace_optim", "backends"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()
