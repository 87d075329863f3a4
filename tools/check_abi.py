#!/usr/bin/env python3
"""Fails if the library needs a symbol outside torch's stable ABI, a library it should not need, or exports anything.

    python tools/check_abi.py [flash_mla/libflash_mla.so]

What is allowed comes from torch's own headers, read by the preprocessor for the torch version that we target.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from build_native import DEFINES, LIBRARY, ROOT, find_cuda, find_torch

SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
SYSTEM_WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
LIBRARIES = re.compile(
    r"lib(torch|torch_cpu|c10|stdc\+\+|gcc_s|c|m|dl|pthread|rt)\.so(\.\d+)?|ld-linux-[\w-]+\.so\.\d+"
)


def output_of(*command: str | Path, stdin: str = "") -> str:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def stable_symbols() -> set[str]:
    """Names of the C functions that the targeted torch version offers."""
    torch, cuda = find_torch(), find_cuda()
    if torch is None or cuda is None:
        raise SystemExit("needs the headers of torch and CUDA, as the build does")
    includes = [f"-I{torch / 'include'}", f"-I{cuda.folder('include', holds='cuda_runtime_api.h')}"]
    text = "".join(f"#include <{shim}>\n" for shim in SHIMS)
    command = [os.environ.get("CXX", "g++"), "-std=c++20", *DEFINES, *includes, "-E", "-P", "-x", "c++", "-"]
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", output_of(*command, stdin=text)))


def demangled(symbols: list[str]) -> list[str]:
    return output_of("c++filt", stdin="\n".join(symbols)).splitlines() if symbols else []


def problems(library: Path, stable: set[str]) -> list[str]:
    foreign = []
    for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if not (version.lstrip("@").startswith(SYSTEM_VERSIONS) or name in SYSTEM_WEAK or name in stable):
            foreign.append(name)
    exported = [line.split()[-1] for line in output_of("nm", "-D", "--defined-only", library).splitlines()]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", library))
    return [
        *(f"needs {name}, which is not in torch's stable ABI" for name in demangled(foreign)),
        *(f"exports {name}" for name in demangled(exported)),
        *(f"is linked against {name}" for name in needed if not LIBRARIES.fullmatch(name)),
    ]


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "flash_mla" / LIBRARY
    if not library.exists():
        raise SystemExit(f"{library} does not exist: run tools/build_native.py")
    found = problems(library, stable_symbols())
    for problem in found:
        print(f"{library.name} {problem}")
    print(f"{library.name}: {len(found)} problems with its ABI")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
