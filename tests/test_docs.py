"""The pages tell the truth: examples run, links lead somewhere, the API page is what the docstrings say."""

import inspect
import re
import subprocess
from pathlib import Path

import pytest

import subspace_optim as so
from subspace_optim import api_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_the_readmes_example_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert "right, rank 128" in capsys.readouterr().out


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "subspace_optim").glob("*.md"), *(ROOT / ".github").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_api_page_is_current():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.render(), "run python -m subspace_optim.api_page"


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` cuts the command out of the README; an edit that moves it would leave CI with nothing to run."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    cut = subprocess.run(
        ["bash", "-c", f'{extract}; printf "%s" "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "pytest" in cut
    assert "torch==2.13.0" in cut
    assert f"<!-- tests -->\n```bash\n{cut}\n```" in README


@pytest.mark.parametrize("name", [n for n in so.__all__ if inspect.isclass(getattr(so, n)) or callable(getattr(so, n))])
def test_public_names_explain_their_arguments(name):
    thing = getattr(so, name)
    doc = inspect.getdoc(thing) or ""
    assert doc.splitlines()[0].endswith((".", ":"))
    documented = set(re.findall(r"^\s+\**(\w+): ", doc.partition("Args:")[2], flags=re.MULTILINE))
    inherited = (
        {f.name for base in thing.__mro__[1:] for f in getattr(base, "__dataclass_fields__", {}).values()}
        if (inspect.isclass(thing))
        else set()
    )
    missing = set(inspect.signature(thing).parameters) - documented - inherited - {"self"}
    assert not missing, f"{name} does not explain {sorted(missing)}"
