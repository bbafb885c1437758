"""The native kernel. IFR_FAST_NATIVE=0 leaves it out: the wheel is then one for every platform."""

import os
import sys
import sysconfig
from glob import glob

import nanobind
from setuptools import Extension, setup

CPU = "ifr_fast/kernels/cpu"
NANOBIND = nanobind.source_dir()
# From 3.12 on, one binary serves every Python that comes after (nanobind's stable ABI).
STABLE = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
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
    define_macros=[("Py_LIMITED_API", "0x030C0000")] if STABLE else [],
    py_limited_api=STABLE,
    optional=True,  # without a compiler the package installs, and impl="auto" uses eager
)

setup(
    ext_modules=[] if os.environ.get("IFR_FAST_NATIVE") == "0" else [native],
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE else {},
)
