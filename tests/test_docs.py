"""The pages tell the truth: examples run, links lead somewhere, the API page is what the docstrings say."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_optim as so
from subspace_optim import api_page, cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "subspace_optim"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def included(text: str) -> str:
    """A page of the site with the files that it includes whole."""
    return re.sub(r'--8<-- "([^":]+)"', lambda found: (PACKAGE / found[1]).read_text(encoding="utf-8"), text)


PAGES = {
    str(path.relative_to(PACKAGE / "docs")): included(path.read_text(encoding="utf-8"))
    for path in sorted((PACKAGE / "docs").rglob("*.md"))
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_the_readmes_example_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert "right, rank 128" in capsys.readouterr().out


def runs(page: str) -> bool:
    """The API page and the one of the mathematics hold signatures and fragments."""
    return page not in ("api.md", "mathematics.md", "changes.md") and "```python" in PAGES[page]


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_a_pages_python_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    """All blocks of a page in one namespace; a block of text right after one of Python is what that prints."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code, printed in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGES[page], flags=re.DOTALL):
        exec(compile(code, page, "exec"), namespace)
        shown = capsys.readouterr().out
        assert not printed or [line.rstrip() for line in shown.splitlines()] == printed.splitlines()


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in PAGES[page]])
def test_a_pages_commands_exist(page):
    for block in blocks(PAGES[page], "bash"):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program == "subspace-optim":
                cli._parser().parse_args(arguments)


def test_the_site_builds_without_a_warning(tmp_path):
    """Every page is in the navigation, every link and anchor leads somewhere, every include exists."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(PACKAGE / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "optimizers" / "galore.html").read_text(encoding="utf-8")
    assert "Rayleigh–Ritz" in page and "<mo>max</mo>" in page and "--8&lt;--" not in page
    formulas = (tmp_path / "mathematics.html").read_text(encoding="utf-8")
    assert formulas.count("<math") > 100 and "arithmatex" not in formulas
    assert 'id="galore"' in (tmp_path / "api.html").read_text(encoding="utf-8")


def test_every_optimizer_has_a_page():
    pages = "".join(text for page, text in PAGES.items() if page.startswith("optimizers/"))
    assert not [cls.__name__ for cls in so.OPTIMIZERS.values() if f"so.{cls.__name__}(" not in pages]


def test_the_measured_figures_are_those_of_the_bench():
    page = PAGES["performance.md"]
    files = re.findall(r"bench/results/\S+json", page)
    wide, half, whole = (json.loads((ROOT / name).read_text())["arms"] for name in files)
    for arm, ours in wide.items():
        ratio = f"{half[arm]['ratio']:.2f}" if arm in half else "–"
        limit = f"{ours['of_limit']:.2f}" if "of_limit" in ours else "–"
        assert f"| {arm} | {ours['ratio']:.2f} | {limit} | {ratio} | {ours['state_bytes'] / 2**20:.1f} |" in page
    for arm, ours in whole.items():
        assert f"| {arm} | {ours['ratio']:.3f} | {ours['peak_bytes'] / 2**20:.0f} |" in page


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
