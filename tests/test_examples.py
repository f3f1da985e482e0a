"""The examples of the documentation run as they are."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "subspace_optim" / "docs" / "examples").glob("*.py"))


@pytest.mark.filterwarnings("ignore")  # what frameworks say of their own defaults
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert "rank 8" in capsys.readouterr().out
