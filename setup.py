"""Compiles the native CPU kernels into one shared library inside the package; without a compiler the package is installed without it."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/finebits/kernels/native")
FLAGS = "-O3 -std=c11 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
AVX2 = "-DISA=1 -mavx2 -mfma"
AVX512 = "-DISA=2 -mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512bf16 -mgfni"
UNITS = [("runtime.c", ""), ("body.c", "-DISA=0"), ("search.c", "-DISA=0"), ("successive.c", "-DISA=0")]
if platform.machine().lower() in ("x86_64", "amd64"):
    UNITS += [(name, isa) for name in ("body.c", "product32.c", "search.c", "successive.c") for isa in (AVX2, AVX512)]
    UNITS += [("few.c", AVX2), ("fused.c", AVX512), ("product.c", AVX512), ("transposed.c", AVX512)]


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
        objects = [str(work / f"unit{i}.o") for i in range(len(UNITS))]
        for (source, flags), out in zip(UNITS, objects):
            subprocess.run([*compiler, *FLAGS.split(), *flags.split(), "-c", str(NATIVE / source), "-o", out], check=True)
        subprocess.run([*compiler, "-shared", *objects, "-o", str(target), "-lpthread", "-ldl", "-lm"], check=True)

    def run(self) -> None:
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"finebits: the CPU kernels were not built, the plain torch bodies will run instead: {error}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


SOURCES = ("runtime.c", "body.c", "search.c", "successive.c", "few.c", "fused.c", "product.c", "transposed.c", "product32.c")
sources = [str(NATIVE / name) for name in SOURCES]
headers = [str(NATIVE / name) for name in ("finebits.h", "simd.h", "decode.h", "decode_bf16.h", "encode.h", "product.h")]
setup(ext_modules=[Extension("finebits.kernels._cpu", sources, depends=headers, optional=True)], cmdclass={"build_ext": Native})
