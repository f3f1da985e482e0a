"""Builds the optional native kernels, subspace_optim._C; all metadata is in pyproject.toml.

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

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MODE = os.environ.get("SSO_BUILD", "auto")
TORCH_2_10 = "0x020a000000000000"  # the first with a stable parallel_for; newer ones load the same library
PORTABLE = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_2_10}"]
# √ and / vectorise without errno and traps; without contraction every instruction set gives the same bits.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def _torch_dir() -> Path | None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    roots = [Path(sys.prefix, "lib", python, "site-packages"), *map(Path, sys.path)]
    named = os.environ.get("SSO_TORCH_DIR")
    candidates = [Path(named)] if named else [root / "torch" for root in roots]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


def _extensions() -> list[Extension]:
    if MODE not in ("auto", "native", "off"):
        raise SystemExit(f"SSO_BUILD={MODE!r} must be one of auto, native, off")
    if MODE == "off":
        return []
    torch = _torch_dir()
    if torch is None:
        _give_up("no torch headers in this environment; install torch first, or name its folder in SSO_TORCH_DIR")
        return []
    return [
        Extension(
            "subspace_optim._C",
            sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            depends=[str(path) for pattern in ("*.h", "cpu/*.h", "cpu/*.inc") for path in Path("csrc").glob(pattern)],
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["c10", "torch_cpu"],
            language="c++",
            py_limited_api=True,
            extra_compile_args=[*PORTABLE, *ARITHMETIC],
            extra_link_args=["-s"],
        )
    ]


def _give_up(why: str) -> None:
    if MODE == "native":
        raise SystemExit(f"SSO_BUILD=native: {why}")
    warnings.warn(f"subspace_optim: native kernels are not built: {why}", stacklevel=2)


class BuildNative(build_ext):
    """Falls back to pure Python unless SSO_BUILD=native."""

    def run(self) -> None:  # noqa: D102
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            _give_up(str(error))
            self.extensions = []


setup(
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
