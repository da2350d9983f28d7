"""Compiles the native CPU kernels into one shared library inside the package; without a compiler the package is installed without it."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/finebits/kernels/native")
FLAGS = f"-O3 -std=c11 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -I{NATIVE}"
SCALAR = "-DISA=0"
AVX2 = "-DISA=1 -mavx2 -mfma"
AVX512 = "-DISA=2 -mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512bf16 -mgfni"
X86 = platform.machine().lower() in ("x86_64", "amd64")
UNITS = {  # which files are compiled for which instruction sets
    "dispatch.c": [""],
    "runtime/*.c": [""],
    "decode/*.c": [SCALAR, AVX2, AVX512],
    "quantize/*.c": [SCALAR, AVX2, AVX512],
    "adapters/*.c": [SCALAR, AVX2, AVX512],
    "attention/*.c": [SCALAR, AVX2, AVX512],
    "step/*.c": [SCALAR, AVX2, AVX512],
    "product/plain.c": [SCALAR, AVX2, AVX512],
    "product/float32/*.c": [AVX2, AVX512],
    "product/packed/avx2*.c": [AVX2],
    "product/packed/avx512*.c": [AVX512],
    "product/wide.c": [AVX512],
    "product/bf16/*.c": [AVX512],
}


def units() -> list[tuple[str, str]]:
    """(source, flags) of every object file."""
    return [
        (str(source), flags)
        for pattern, sets in UNITS.items()
        for source in sorted(NATIVE.glob(pattern))
        for flags in sets
        if X86 or flags in ("", SCALAR)
    ]


class Native(build_ext):
    """A plain shared library, loaded by ctypes: it uses neither Python's nor PyTorch's headers."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CC", "")) or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
        if not compiler:
            raise OSError("the CPU kernels of finebits need a C compiler (gcc or clang)")
        target, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (target.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source, flags in units():
            objects.append(str(work / f"unit{len(objects)}.o"))
            subprocess.run([*compiler, *FLAGS.split(), *flags.split(), "-c", source, "-o", objects[-1]], check=True)
        subprocess.run([*compiler, "-shared", *objects, "-o", str(target), "-lpthread", "-ldl", "-lm"], check=True)

    def run(self) -> None:
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"finebits: the CPU kernels were not built, the plain torch bodies will run instead: {error}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class Wheel(bdist_wheel):
    """One wheel for every Python of a platform: the library has no Python in it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted({source for source, _ in units()})
headers = sorted(map(str, NATIVE.glob("**/*.h")))
setup(
    ext_modules=[Extension("finebits.kernels._cpu", sources, depends=headers, optional=True)],
    cmdclass={"build_ext": Native, "bdist_wheel": Wheel},
)
