#!/usr/bin/env python3
"""Compiles what tests of the SM100 kernels need where there is no such GPU, into build/emulation.

    python tools/build_emulation.py                   # all of it
    python tools/build_emulation.py library-eager     # one target

Targets: `instructions-eager` and `-lazy`, a program for an H100; `tutorials-eager` and
`-lazy`, Blackwell kernels of the package nvidia-cutlass, unchanged; `library-eager` and `-lazy`, libflash_mla.so with
the kernels of SM100 in place of SM90's (needs `make build` first). See tests/sm100/README.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cute_adapter

import build_native

ROOT = build_native.ROOT
SM100 = ROOT / "tests" / "sm100"
OUTPUT = ROOT / "build" / "emulation"
SCHEDULES = ("eager", "lazy")
TUTORIALS = ("01_mma_sm100", "02_mma_tma_sm100")

# The emulation needs SM90's barriers and copies.
FLAGS = ["-std=c++20", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-cudart", "static"]
FLAGS += ["-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-O1"]


def run(command: list[str | Path]) -> None:
    if subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode:
        raise build_native.BuildError(f"{command[0]} failed; its words are above")


def nvcc(*arguments: str | Path) -> None:
    cuda = build_native.find_cuda()
    if cuda is None:
        raise build_native.BuildError("there is no nvcc: set CUDA_HOME")
    run([cuda.nvcc, *FLAGS, *arguments])


def schedule_flags(schedule: str) -> list[str]:
    return ["-DFLASH_MLA_EMULATION_LAZY"] if schedule == "lazy" else []


def emulated(schedule: str) -> list[str | Path]:
    """The emulation's headers come before those whose place they take."""
    cutlass, _ = build_native.find_cutlass()
    return [*schedule_flags(schedule), "-I", SM100 / "emulation", "-I", SM100, "-I", ROOT / "csrc", "-isystem", cutlass]


def build_instructions(schedule: str) -> None:
    nvcc("-O2", *emulated(schedule), "-o", OUTPUT / f"instructions-{schedule}", SM100 / "instructions.cu")


def build_tutorials(schedule: str) -> None:
    cutlass, _ = build_native.find_cutlass()
    cute_adapter.write(cutlass, OUTPUT / "cute")
    examples = cutlass.parent / "examples" / "cute" / "tutorial" / "blackwell"
    # The driver's library need not be there where this is built.
    stub = OUTPUT / "libcuda.so"
    run(["g++", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stub, "-x", "c", "/dev/null"])
    enabled = ("CUTE_ARCH_TCGEN05_F16F32_MMA_ENABLED", "CUTE_ARCH_TCGEN05_TMEM_ENABLED", "CUTLASS_ARCH_TCGEN_ENABLED")
    folders = [OUTPUT / "cute", SM100, cutlass, cutlass.parent / "tools" / "util" / "include", examples]
    for name in TUTORIALS:
        arguments: list[str | Path] = ["-O2", *schedule_flags(schedule), "-include", SM100 / "as_blackwell.h"]
        arguments += [f"-I{folder}" for folder in folders] + [f"-D{name}" for name in enabled]
        arguments += ["-diag-suppress", "20011,20014,177", "-o", OUTPUT / f"{name}-{schedule}", examples / f"{name}.cu"]
        arguments += [
            f"-L{OUTPUT}",
            "-Xlinker",
            "--no-as-needed",
            "-lcuda",
            "-Xlinker",
            "--unresolved-symbols=ignore-all",
        ]
        nvcc(*arguments)


def build_library(schedule: str) -> None:
    ninja = ROOT / build_native.BUILD / "build.ninja"
    if not ninja.exists():
        raise build_native.BuildError("`make build` has to come first: most objects are those of the real library")
    text = ninja.read_text()
    host = next(line for line in text.splitlines() if line.startswith("  command = $cxx -std"))
    link = next(line for line in text.splitlines() if line.startswith("  command = $cxx -shared"))
    objects = next(line for line in text.splitlines() if f"/{build_native.LIBRARY}: link " in line)
    parts = objects.split(": link ")[1].split(" | ")[0].split()
    own = [part for part in parts if "/sm100/" not in part and not part.endswith("sm90/kernels.cpp.o")]
    folder = OUTPUT / schedule
    folder.mkdir(exist_ok=True)
    for source in sorted((ROOT / "csrc" / "sm100" / "sparse_attention" / "inst").glob("*.cu")):
        own.append(str(folder / f"{source.name}.o"))
        nvcc("-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden", *emulated(schedule), "-c", "-o", own[-1], source)
    own.append(str(folder / "kernels.cpp.o"))
    command = host.removeprefix("  command = ").replace("$cxx", "g++").replace("$out.d", f"{own[-1]}.d")
    command = command.replace("-Icsrc", f"-I{SM100 / 'emulation'} -Icsrc").replace("$out", own[-1])
    run(["sh", "-c", command.replace("$in", str(SM100 / "emulation" / "kernels.cpp"))])
    command = link.removeprefix("  command = ").replace("$cxx", "g++").replace("$in", " ".join(own))
    run(["sh", "-c", command.replace("$out", str(folder / build_native.LIBRARY))])


def main() -> int:
    assert __doc__
    kinds = {"instructions": build_instructions, "tutorials": build_tutorials, "library": build_library}
    targets = [f"{kind}-{schedule}" for kind in kinds for schedule in SCHEDULES]
    asked = sys.argv[1:] or targets
    if not set(asked) <= set(targets):
        print(__doc__)
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        for target in asked:
            kind, _, schedule = target.partition("-")
            kinds[kind](schedule)
    except build_native.BuildError as error:
        print(f"flash_mla: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
