"""Builds the optional native kernels, subspace_optim._C; pyproject.toml lists their sources and names this class.

SSO_BUILD=auto    build them if there are a C++ compiler and torch's headers, otherwise install pure Python (default)
SSO_BUILD=native  fail where they cannot be built
SSO_BUILD=off     do not build them
SSO_TORCH_DIR     torch's package folder, for builds isolated in another environment (python -m build, uv)

torch is looked for but never imported: pip's isolated builds see its files, and the stable ABI needs no more.
"""

import os
import sys
import warnings
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MODE = os.environ.get("SSO_BUILD", "auto")


def _torch_dir() -> Path | None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    roots = [Path(sys.prefix, "lib", python, "site-packages"), *map(Path, sys.path)]
    named = os.environ.get("SSO_TORCH_DIR")
    candidates = [Path(named)] if named else [root / "torch" for root in roots]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


class BuildNative(build_ext):
    """Adds what only the machine knows, and falls back to pure Python unless SSO_BUILD=native."""

    def finalize_options(self) -> None:  # noqa: D102
        super().finalize_options()
        if MODE not in ("auto", "native", "off"):
            raise SystemExit(f"SSO_BUILD={MODE!r} must be one of auto, native, off")
        torch = _torch_dir()
        if MODE == "off":
            self.extensions = []
        elif torch is None:
            self._give_up("no torch headers here; install torch first, or name its folder in SSO_TORCH_DIR")
        for extension in self.extensions:
            extension.include_dirs.append(str(torch / "include"))
            extension.library_dirs.append(str(torch / "lib"))

    def run(self) -> None:  # noqa: D102
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        if MODE == "native":
            raise SystemExit(f"SSO_BUILD=native: {why}")
        warnings.warn(f"subspace_optim: native kernels are not built: {why}", stacklevel=2)
        self.extensions = []
