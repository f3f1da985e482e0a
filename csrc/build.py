"""Builds the optional native kernels, subspace_optim._C; pyproject.toml lists their sources and names this class.

SSO_BUILD=auto    build them if there are a C++ compiler and torch's headers, otherwise install pure Python (default)
SSO_BUILD=native  fail where they cannot be built
SSO_BUILD=off     do not build them
SSO_BUILD_CUDA=1  build subspace_optim._cuda as well, with nvcc, or fail; off by default
SSO_TORCH_DIR     torch's package folder, for builds isolated in another environment (python -m build, uv)

torch is looked for but never imported: pip's isolated builds see its files, and the stable ABI needs no more. The CUDA
library needs nothing of torch: any version and any Python loads it. `subspace_optim.backends()` says what was built.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MODE = os.environ.get("SSO_BUILD", "auto")
CUDA = os.environ.get("SSO_BUILD_CUDA", "0")

# Two virtual architectures, because they differ in how float32 is multiplied (csrc/cuda/product.cuh); machine code for
# six GPU generations, and the first's PTX for those to come. Sums and products are rounded as on the CPU: no -fmad.
ARCHITECTURES = {"80": ("sm_80", "sm_90", "sm_100", "compute_80"), "86": ("sm_86", "sm_89", "sm_120")}
NVCC_FLAGS = ("-O3", "-std=c++20", "-fmad=false", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=-s")


def _torch_dir() -> Path | None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    roots = [Path(sys.prefix, "lib", python, "site-packages"), *map(Path, sys.path)]
    named = os.environ.get("SSO_TORCH_DIR")
    candidates = [Path(named)] if named else [root / "torch" for root in roots]
    return next((c for c in candidates if (c / "include/torch/csrc/stable/library.h").exists()), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))


class BuildNative(build_ext):
    """Adds what only the machine knows, and falls back to pure Python unless SSO_BUILD=native."""

    def finalize_options(self) -> None:  # noqa: D102
        super().finalize_options()
        if MODE not in ("auto", "native", "off"):
            raise SystemExit(f"SSO_BUILD={MODE!r} must be one of auto, native, off")
        if CUDA not in ("0", "1"):
            raise SystemExit(f"SSO_BUILD_CUDA={CUDA!r} must be 0 or 1")
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
        if CUDA == "1":
            self._build_cuda()

    def _build_cuda(self) -> None:
        nvcc = _nvcc()
        if nvcc is None:
            raise SystemExit("SSO_BUILD_CUDA=1: no nvcc in PATH, nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
        package = Path("subspace_optim") if self.inplace else Path(self.build_lib, "subspace_optim")
        package.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{v},code=[{','.join(real)}]" for v, real in ARCHITECTURES.items()]
        command = [nvcc, *NVCC_FLAGS, *codes, "csrc/cuda/library.cu", "-o", str(package / "_cuda.so")]
        try:
            self.spawn(command)
        except BaseError as error:
            raise SystemExit(f"SSO_BUILD_CUDA=1: {error}") from None

    def _give_up(self, why: str) -> None:
        if MODE == "native":
            raise SystemExit(f"SSO_BUILD=native: {why}")
        warnings.warn(f"subspace_optim: native kernels are not built: {why}", stacklevel=2)
        self.extensions = []
