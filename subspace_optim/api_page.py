"""The API page, from the docstrings: `python -m subspace_optim.api_page` rewrites API.md beside this file."""

from __future__ import annotations

import inspect
from pathlib import Path

import subspace_optim

PAGE = Path(__file__).with_name("API.md")


def render() -> str:
    """Every public name with its signature and docstring, in Markdown."""
    parts = ["# API\n\nWritten by `python -m subspace_optim.api_page`; a test keeps it true.\n"]
    for name in subspace_optim.__all__:
        thing = getattr(subspace_optim, name)
        if callable(thing):
            parts.append(
                f"## `{name}`\n\n```python\n{name}{_signature(thing)}\n```\n\n```text\n{inspect.getdoc(thing)}\n```\n"
            )
        else:
            parts.append(f"## `{name}`\n\n{', '.join(f'`{key}`: {value.__name__}' for key, value in thing.items())}\n")
    return "\n".join(parts)


def _signature(thing: object) -> str:
    assert callable(thing)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.name != "self"
    ]
    return "(" + ", ".join(map(str, parameters)) + ")"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
