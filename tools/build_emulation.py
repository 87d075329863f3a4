#!/usr/bin/env python3
"""Compiles what tests of the SM100 kernels need where there is no such GPU, into build/emulation.

    python tools/build_emulation.py                   # all of it
    python tools/build_emulation.py library-eager     # one target

Targets: `instructions-eager` and `-lazy`, a program for an H100; `tutorials-eager` and `-lazy`, Blackwell kernels of
the package nvidia-cutlass, unchanged; `library-eager` and `-lazy`, libflash_mla.so with emulated kernels of SM100, for
which a device is a Blackwell where it is asked to be one (needs `make build` first, for sm90 at least); `mutants`, such
libraries with a mistake each, which their tests must find (needs `library-eager`). Kernels are compiled again where
something that they include has changed. See tests/sm100/README.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cute_adapter
import sm100_mutations as mutations

import build_native

ROOT = build_native.ROOT
SM100 = ROOT / "tests" / "sm100"
OUTPUT = ROOT / "build" / "emulation"
SCHEDULES = ("eager", "lazy")
# Folders of csrc/sm100.
EMULATED = ("sparse_attention", "sparse_attention_few_heads", "sparse_attention_paired", "dense_prefill_backward")
# Host files that the emulated library has of its own.
HOST = (
    ROOT / "csrc" / "api" / "library.cpp",
    ROOT / "csrc" / "api" / "device.cpp",
    ROOT / "csrc" / "api" / "tables.cpp",
    ROOT / "csrc" / "sm100" / "kernels.cpp",
    SM100 / "emulation" / "kernels.cpp",
    SM100 / "emulation" / "dense_prefill.cpp",
)
REPLACED = ("/api/library.cpp.o", "/api/device.cpp.o", "/api/tables.cpp.o", "/sm90/kernels.cpp.o")
TUTORIALS = ("01_mma_sm100", "02_mma_tma_sm100")

# What CuTe's wrappers ask for before they are more than a trap.
ENABLED = (
    "CUTE_ARCH_TCGEN05_F16F32_MMA_ENABLED",
    "CUTE_ARCH_TCGEN05_TMEM_ENABLED",
    "CUTLASS_ARCH_TCGEN_ENABLED",
)

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


def emulated(schedule: str, csrc: Path = ROOT / "csrc") -> list[str | Path]:
    """The emulation's headers come before those whose place they take."""
    cutlass, _ = build_native.find_cutlass()
    return [*schedule_flags(schedule), "-I", SM100 / "emulation", "-I", SM100, "-I", csrc, "-isystem", cutlass]


def build_instructions(schedule: str) -> None:
    nvcc("-O2", *emulated(schedule), "-o", OUTPUT / f"instructions-{schedule}", SM100 / "instructions.cu")


def build_tutorials(schedule: str) -> None:
    cutlass, _ = build_native.find_cutlass()
    cute_adapter.write(cutlass, OUTPUT / "cute")
    examples = cutlass.parent / "examples" / "cute" / "tutorial" / "blackwell"
    # The driver's library need not be there where this is built.
    stub = OUTPUT / "libcuda.so"
    run(["g++", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stub, "-x", "c", "/dev/null"])
    folders = [OUTPUT / "cute", SM100, cutlass, cutlass.parent / "tools" / "util" / "include", examples]
    for name in TUTORIALS:
        arguments: list[str | Path] = ["-O2", *schedule_flags(schedule), "-include", SM100 / "as_blackwell.h"]
        arguments += [f"-I{folder}" for folder in folders] + [f"-D{name}" for name in ENABLED]
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
    folder = OUTPUT / schedule
    folder.mkdir(exist_ok=True)
    objects = []
    for source in kernel_sources(ROOT / "csrc"):
        objects.append(object_of(source, folder))
        compile_kernel(source, objects[-1], ROOT / "csrc", schedule)
    for source, output in zip(HOST, host_objects(schedule), strict=True):
        command = ninja_command("cxx -std").replace("$out.d", f"{output}.d").replace("$out", str(output))
        options = "-DFLASH_MLA_WITH_SM90 -DFLASH_MLA_WITH_SM100"
        if source.name == "device.cpp":
            options += f" -include {SM100 / 'as_blackwell.h'}"
        command = re.sub(r"(-DFLASH_MLA_ARCHES=)\S+", r"""\1'"90a,100f"'""", command)  # what it says that it has
        run(["sh", "-c", command.replace("$arch_defines", options).replace("$in", str(source))])
    link_library(folder / build_native.LIBRARY, [*objects, *host_objects(schedule)])


def host_objects(schedule: str) -> list[Path]:
    return [OUTPUT / schedule / f"{source.parts[-2]}-{source.name}.o" for source in HOST]


def build_mutants() -> None:
    """Of one kernel each, the eager schedule."""
    for name, changes in mutations.ALL.items():
        folder = OUTPUT / "mutants" / name
        files = {ROOT / "csrc" / file: file for file, _, _ in changes}
        left_out = partial(names_of, set(files))
        shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True, ignore=left_out)
        for path, file in files.items():
            text = mutations.mutated(path.read_text(), file, changes)
            build_native.write_if_changed(folder / "csrc" / file, text)
        source = folder / "csrc" / mutations.mutated_kernel(name)
        mutant = object_of(source, folder)
        compile_kernel(source, mutant, folder / "csrc", "eager")
        objects = [object_of(kernel, OUTPUT / "eager") for kernel in kernel_sources(ROOT / "csrc")]
        objects = [mutant if path.name == mutant.name else path for path in objects]
        link_library(folder / build_native.LIBRARY, [*objects, *host_objects("eager")])


def names_of(files: set[Path], folder: str, names: list[str]) -> list[str]:
    """Those of the names in a folder that are of these files."""
    return [name for name in names if Path(folder, name) in files]


def kernel_sources(csrc: Path) -> list[Path]:
    return [path for name in EMULATED for path in sorted((csrc / "sm100" / name / "inst").glob("*.cu"))]


def object_of(source: Path, folder: Path) -> Path:
    """Kernels have the names of their formats, in each folder the same."""
    return folder / f"{source.parts[-3]}-{source.name}.o"


def compile_kernel(source: Path, output: Path, csrc: Path, schedule: str) -> None:
    # The tensor memory of each file has its place in the library too: together more than 2 GiB.
    arguments: list[str | Path] = ["-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden,-mcmodel=medium"]
    if "dense_prefill_backward" in source.parts:
        # CUTLASS's example, with the instructions of its wrappers replaced.
        cutlass, _ = build_native.find_cutlass()
        cute_adapter.write(cutlass, OUTPUT / "cute")
        arguments += ["-I", OUTPUT / "cute", "-isystem", build_native.find_fmha(cutlass)]
        arguments += [f"-D{name}" for name in ENABLED] + ["--use_fast_math", "-diag-suppress", "20011,20014,177"]
    arguments += [*emulated(schedule, csrc), "-MMD", "-MF", f"{output}.d", "-c", "-o", output, source]
    if not up_to_date(output, arguments):
        nvcc(*arguments)
        Path(f"{output}.command").write_text(repr(arguments))


def up_to_date(output: Path, arguments: list[str | Path]) -> bool:
    """Whether an object is what these arguments make of the files as they are."""
    read, command = Path(f"{output}.d"), Path(f"{output}.command")
    if not (output.exists() and read.exists() and command.exists()) or command.read_text() != repr(arguments):
        return False
    files = read.read_text().replace("\\\n", " ").split(": ", 1)[1].split()
    made = output.stat().st_mtime
    return all((ROOT / name).exists() and (ROOT / name).stat().st_mtime < made for name in files)


def ninja_line(start: str, within: str) -> str:
    ninja = ROOT / build_native.BUILD / "build.ninja"
    if not ninja.exists():
        raise build_native.BuildError("`make build` has to come first: most objects are those of the real library")
    return next(line for line in ninja.read_text().splitlines() if line.startswith(start) and within in line)


def ninja_command(within: str) -> str:
    return ninja_line("  command = ", within).removeprefix("  command = ").replace("$cxx", "g++")


def link_library(output: Path, objects: list[Path]) -> None:
    """The real library, but for all of SM100, and for what says which kernels there are and what the device is."""
    parts = ninja_line("build ", f"/{build_native.LIBRARY}: link ").split(": link ")[1].split(" | ")[0].split()
    own = [part for part in parts if not part.endswith(REPLACED) and "/sm100/" not in part]
    if not any("/sm90/" in part for part in own):
        raise build_native.BuildError("`make build` has to be for sm90 too: FLASH_MLA_ARCHES")
    command = ninja_command("cxx -shared").replace("$out", str(output))
    run(["sh", "-c", command.replace("$in", " ".join([*own, *map(str, objects)]))])


def main() -> int:
    assert __doc__
    kinds = {"instructions": build_instructions, "tutorials": build_tutorials, "library": build_library}
    targets = [*(f"{kind}-{schedule}" for kind in kinds for schedule in SCHEDULES), "mutants"]
    asked = sys.argv[1:] or targets
    if not set(asked) <= set(targets):
        print(__doc__)
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        for target in asked:
            kind, _, schedule = target.partition("-")
            if kind == "mutants":
                build_mutants()
            else:
                kinds[kind](schedule)
    except build_native.BuildError as error:
        print(f"flash_mla: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
