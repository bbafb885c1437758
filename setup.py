from glob import glob

import nanobind
from setuptools import Extension, setup

CPU = "ifr_fast/kernels/cpu"
NANOBIND = nanobind.source_dir()
native = Extension(
    "ifr_fast.kernels.cpu._native",
    sources=sorted(glob(f"{CPU}/*.cpp")),
    depends=glob(f"{CPU}/*.h"),
    include_dirs=[nanobind.include_dir(), NANOBIND, f"{NANOBIND}/../ext/robin_map/include"],
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-strict-aliasing", "-pthread"),
        *("-DNDEBUG", "-DNB_COMPACT_ASSERTIONS"),
    ],
    extra_link_args=["-pthread"],
    optional=True,  # without a compiler the package installs, and impl="auto" uses eager
)

setup(ext_modules=[native])
