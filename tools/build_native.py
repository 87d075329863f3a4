#!/usr/bin/env python3
"""Compiles csrc/ into the one shared library flash_mla/libflash_mla.so, incrementally and in parallel.

    python tools/build_native.py              # in place: flash_mla/libflash_mla.so
    FLASH_MLA_ARCHES=sm90 python tools/build_native.py

setup.py calls the same code. Needs only the standard library, ninja, nvcc, and the headers of torch and CUTLASS.

Environment:
    FLASH_MLA_ARCHES   folders of csrc to build, such as "sm90" or "sm90,sm100"; "none" builds no kernels.
                       Default: everything that this nvcc can compile.
    FLASH_MLA_WERROR   1: every warning is an error.
    FLASH_MLA_JOBS     compilers that run at once. Default: the number of cores, less where memory is short.
    FLASH_MLA_TORCH    folder of the torch package whose headers to use. Default: the torch of this environment.
    FLASH_MLA_CUTLASS  CUTLASS's include folder, for sm100 with its examples beside it. Default: the one of the package
                       nvidia-cutlass.
    CUDA_HOME, CXX     CUDA toolkit and host compiler. Default: nvcc and g++ on the PATH.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build/native")  # relative to ROOT, where ninja runs: moving the tree keeps the objects valid
LIBRARY = "libflash_mla.so"

# Folder of csrc -> the architecture that its kernels are compiled for.
ARCHES = {"sm90": "90a", "sm100": "100f"}
MIN_CUDA = {"sm90": (12, 3), "sm100": (12, 9)}
MIN_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: the library loads there and in every later torch
CUTLASS_REQUIREMENT = "nvidia-cutlass==4.2.0.0"
GIB_PER_JOB = 5.0  # a file of sm100 takes 4.4

# CUTLASS's Blackwell FMHA is a library in the form of an example: kernels in folders of this name are made from it,
# with the options of its own build.
FMHA_EXAMPLE = "77_blackwell_fmha"
FMHA_FOLDERS = "csrc/sm100/dense_prefill"
FMHA_OPTIONS = ["-DNDEBUG", "--use_fast_math"]

DEFINES = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
WARNINGS = ["-Wall", "-Wextra"]


class BuildError(RuntimeError):
    """Something that the build was asked for cannot be done here; the text says what to do about it."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    nvcc: Path
    version: tuple[int, int]
    root: Path

    def folder(self, *names: str, holds: str) -> Path:
        """The first of the toolkit's folders `names` that has the file `holds`."""
        machine = os.uname().machine
        target = {"x86_64": "x86_64-linux", "aarch64": "sbsa-linux"}.get(machine, f"{machine}-linux")
        for base in (self.root, self.root / "targets" / target):
            for name in names:
                if (base / name / holds).exists():
                    return base / name
        raise BuildError(f"the CUDA toolkit in {self.root} has no {holds}")


@dataclass
class Plan:
    """What will be built, and why the rest will not be."""

    cuda: Cuda | None
    arches: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        if self.arches and self.cuda:
            kernels = ", ".join(f"{arch} ({ARCHES[arch]})" for arch in self.arches)
            lines = [f"CUDA kernels for {kernels}, with CUDA {'.'.join(map(str, self.cuda.version))}"]
        else:
            lines = ["no CUDA kernels: the package works with its other backends (`python -m flash_mla` lists them)"]
        lines += [f"left out {what}: {why}" for what, why in self.left_out.items()]
        return "\n".join(f"flash_mla: {line}" for line in lines)


def package_version() -> str:
    text = (ROOT / "flash_mla" / "_version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.M)
    if not match:
        raise BuildError('flash_mla/_version.py has no line __version__ = "..."')
    return match[1]


def find_cuda() -> Cuda | None:
    """The toolkit in CUDA_HOME, on the PATH, or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((path for path in candidates if path.exists()), None)
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    # nvcc may be a wrapper script elsewhere: ask it for its own root.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    if not release or not top:
        raise BuildError(f"{nvcc} does not answer as nvcc does: {text or dry.stderr}")
    return Cuda(nvcc, (int(release[1]), int(release[2])), Path(top[1]).resolve())


def make_plan() -> Plan:
    """Reads FLASH_MLA_ARCHES and the toolkit, and decides what to build."""
    asked = os.environ.get("FLASH_MLA_ARCHES", "").replace(",", " ").split()
    present = [arch for arch in ARCHES if any((ROOT / "csrc" / arch).rglob("*.cu"))]
    if asked == ["none"]:
        return Plan(None, [], dict.fromkeys(present, "FLASH_MLA_ARCHES=none"))
    unknown = [arch for arch in asked if arch not in present]
    if unknown:
        raise BuildError(f"FLASH_MLA_ARCHES names {', '.join(unknown)}; csrc has kernels for {', '.join(present)}")
    cuda = find_cuda()
    if cuda is None:
        if asked:
            raise BuildError("FLASH_MLA_ARCHES asks for CUDA kernels, but there is no nvcc: set CUDA_HOME")
        return Plan(None, [], dict.fromkeys(present, "no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"))
    plan = Plan(cuda)
    for arch in present:
        if asked and arch not in asked:
            plan.left_out[arch] = "not in FLASH_MLA_ARCHES"
        elif cuda.version < MIN_CUDA[arch]:
            why = f"needs CUDA {'.'.join(map(str, MIN_CUDA[arch]))}, nvcc is {'.'.join(map(str, cuda.version))}"
            if asked:
                raise BuildError(f"{arch} {why}")
            plan.left_out[arch] = why
        else:
            plan.arches.append(arch)
    return plan


def package_folders(package: str) -> list[Path]:
    """Where `package` is, without importing it: here, or in the environment outside of an isolated build."""
    ask = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).submodule_search_locations[0])"
    spec = importlib.util.find_spec(package)
    found = list(spec.submodule_search_locations or ()) if spec else []
    virtual_env = os.environ.get("VIRTUAL_ENV")
    pythons = [sys.executable] + ([f"{virtual_env}/bin/python"] if virtual_env else [])
    # pip isolates a build by means of PYTHONPATH; without it the same interpreter sees its own packages again.
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for python in pythons if not found else ():
        command = [python, "-c", ask, package]
        answer = subprocess.run(command, env=outside, cwd="/", capture_output=True, text=True, check=False)
        found += answer.stdout.splitlines()[:1]
    return [Path(folder) for folder in found if folder]


def find_torch() -> Path | None:
    """The folder of a torch package that is new enough; its headers are all that is used."""
    named = os.environ.get("FLASH_MLA_TORCH")
    folders = [Path(named)] if named else package_folders("torch")
    stable = "include/torch/csrc/stable/library.h"
    return next((f for f in folders if (f / stable).exists() and torch_version(f)[0] >= MIN_TORCH), None)


def torch_version(folder: Path) -> tuple[tuple[int, int], str]:
    text = (folder / "version.py").read_text()
    match = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.M)
    if not match:
        raise BuildError(f"{folder}/version.py has no __version__")
    return (int(match[2]), int(match[3])), match[1]


def cutlass_include() -> Path | None:
    named = os.environ.get("FLASH_MLA_CUTLASS")
    # tools/make_env.sh puts the headers in share, without the packages that CUTLASS's Python tools need.
    packages = [*package_folders("cutlass_library"), Path(sys.prefix, "share", "cutlass_library")]
    folders = [Path(named)] if named else [package / "source" / "include" for package in packages]
    return next((folder for folder in folders if (folder / "cutlass" / "version.h").exists()), None)


def find_cutlass() -> tuple[Path, str]:
    """CUTLASS's include folder and its version."""
    include = cutlass_include()
    if include is None:
        raise BuildError(
            f"no CUTLASS headers: `pip install --no-deps {CUTLASS_REQUIREMENT}`, or set FLASH_MLA_CUTLASS to an "
            "include folder (FLASH_MLA_ARCHES=none installs without CUDA kernels)"
        )
    text = (include / "cutlass" / "version.h").read_text()
    parts = [re.search(rf"#define CUTLASS_{name} (\d+)", text) for name in ("MAJOR", "MINOR", "PATCH")]
    return include, ".".join(part[1] for part in parts if part)


def find_fmha(cutlass: Path) -> Path:
    """The folder of the FMHA example that belongs to CUTLASS's include folder."""
    folder = cutlass.parent / "examples" / FMHA_EXAMPLE
    if not folder.is_dir():
        raise BuildError(
            f"kernels for sm100 are made from CUTLASS's example {FMHA_EXAMPLE}, which {cutlass} comes without: unset "
            "FLASH_MLA_CUTLASS, or build without them (FLASH_MLA_ARCHES=sm90)"
        )
    return folder


def find_ninja() -> str:
    """The one of the package ninja if it is there: another version of ninja would compile everything anew."""
    packaged = [folder.parents[3] / "bin" / "ninja" for folder in package_folders("ninja")]
    found = next((str(path) for path in packaged if path.exists()), None) or shutil.which("ninja")
    if not found:
        raise BuildError("no ninja: `pip install ninja`")
    return found


def job_count() -> int:
    if jobs := os.environ.get("FLASH_MLA_JOBS") or os.environ.get("MAX_JOBS"):
        return int(jobs)
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    by_memory = int(int(free[1]) / 2**20 / GIB_PER_JOB) if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def link_headers(name: str, target: Path) -> str:
    """A fixed path to headers whose real one differs from build to build (isolated builds use a fresh folder each)."""
    link = ROOT / BUILD / "include" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or link.readlink() != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return str(BUILD / "include" / name)


def sources(arches: list[str]) -> list[tuple[Path, list[str]]]:
    """Every file to compile, with the folders whose architectures it is compiled for (none: host code)."""
    found = []
    for path in sorted((ROOT / "csrc").rglob("*.c[pu]*")):
        path = path.relative_to(ROOT)
        if path.suffix not in (".cpp", ".cu"):
            continue
        layer = path.parts[1]
        if layer in ARCHES and layer not in arches:
            continue
        device = [layer] if layer in ARCHES else arches
        found.append((path, device if path.suffix == ".cu" else []))
    return found


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_ninja(plan: Plan, cuda: Cuda, torch: Path, werror: bool) -> dict[str, str]:
    """Writes build.ninja; returns the versions of what the library is built from."""
    cutlass, cutlass_version = find_cutlass()
    cuda_version = ".".join(map(str, cuda.version))
    versions = {"cuda": cuda_version, "torch_headers": torch_version(torch)[1], "cutlass": cutlass_version}
    codes = ",".join(ARCHES[arch] for arch in plan.arches)
    cuda_include = cuda.folder("include", holds="cuda_runtime_api.h")
    system = [link_headers("torch", torch / "include"), link_headers("cutlass", cutlass)]
    cuda_system = [str(cuda_include)] + [str(cuda_include / "cccl")] * (cuda_include / "cccl").is_dir()
    common = ["-std=c++20", "-O3", *DEFINES, "$arch_defines", "-Icsrc"]
    host = [*common, "-fPIC", "-fvisibility=hidden", *WARNINGS, *(["-Werror"] if werror else [])]
    host += [f"-isystem {path}" for path in system + cuda_system]
    host += [f"-DFLASH_MLA_{key}='\"{value}\"'" for key, value in library_defines(cuda_version, codes).items()]
    device_host = ["-fPIC", "-fvisibility=hidden", *WARNINGS, *(["-Werror"] if werror else [])]
    device = [*common, *(f"-isystem {path}" for path in system), "-Xcompiler " + ",".join(device_host)]
    device += ["--expt-relaxed-constexpr", "--expt-extended-lambda", "-lineinfo", "-Xptxas -v"]
    device += ["-Werror all-warnings"] if werror else []
    device += [f"-ccbin {os.environ['CXX']}"] if os.environ.get("CXX") else []
    link = ["-shared", "-Wl,--as-needed", "-Wl,-z,defs", f"-Wl,--version-script={BUILD}/exports.map"]
    # libstdc++ before torch, whose libraries carry weak copies of some of its symbols.
    libraries = ["-lstdc++", f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    libraries += [f"-L{cuda.folder('lib64', 'lib', holds='libcudart_static.a')}", "-lcudart_static"]
    libraries += ["-ldl", "-lpthread", "-lrt"]

    # Nothing is exported: torch finds the ops through the library's static initialisers.
    write_if_changed(ROOT / BUILD / "exports.map", "{ local: *; };\n")
    # Headers of others are not followed file by file: a change of version compiles everything anew.
    write_if_changed(ROOT / BUILD / "toolchain.json", json.dumps(versions, indent=2) + "\n")

    lines = [
        f"builddir = {BUILD}",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"nvcc = {cuda.nvcc}",
        "rule host",
        f"  command = $cxx {' '.join(host)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = host $in",
        "rule device",
        # ptxas's report on registers and spills goes to a log that tools/check_spills.py reads; the rest is shown.
        f"  command = $nvcc {' '.join(device)} $options -MMD -MF $out.d -c $in -o $out > $out.log 2>&1; "
        "s=$$?; grep -vE '^ptxas info +: [^(]|^ +[0-9]+ bytes (stack|cumulative)' $out.log; exit $$s",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = $cxx {' '.join(link)} -o $out $in {' '.join(libraries)}",
        "  description = link $out",
    ]
    fmha = [f"-isystem {link_headers('fmha', find_fmha(cutlass))}", *FMHA_OPTIONS] if "sm100" in plan.arches else []
    objects = []
    for source, arches in sources(plan.arches):
        objects.append(f"{BUILD}/{source.relative_to('csrc')}.o")
        kind = "device" if source.suffix == ".cu" else "host"
        lines.append(f"build {objects[-1]}: {kind} {source} | {BUILD}/toolchain.json")
        # An object knows of the architectures that it has code for: it stays valid when others join the build.
        defined = arches if kind == "device" else plan.arches
        lines.append(f"  arch_defines = {' '.join(f'-DFLASH_MLA_WITH_{arch.upper()}' for arch in defined)}")
        if kind == "device":
            options = [f"-gencode arch=compute_{ARCHES[arch]},code=sm_{ARCHES[arch]}" for arch in arches]
            options += fmha if str(source).startswith(FMHA_FOLDERS) else []
            lines.append(f"  options = {' '.join(options)}")
    lines += [f"build {BUILD}/{LIBRARY}: link {' '.join(objects)} | {BUILD}/exports.map {BUILD}/toolchain.json"]
    write_if_changed(ROOT / BUILD / "build.ninja", "\n".join(lines) + "\n")
    return versions


def library_defines(cuda_version: str, codes: str) -> dict[str, str]:
    """What the op flash_mla::build_info tells."""
    return {"VERSION": package_version(), "CUDA_VERSION": cuda_version, "ARCHES": codes}


def build(output: Path) -> Plan:
    """Builds the library into the folder `output` (of the package) and writes _build_info.json beside it."""
    plan = make_plan()
    info: dict[str, object] = {"version": package_version(), "arches": {a: ARCHES[a] for a in plan.arches}}
    info["left_out"] = plan.left_out
    output.mkdir(parents=True, exist_ok=True)
    if plan.cuda and plan.arches:
        torch = find_torch()
        if torch is None:
            raise BuildError(
                f"no torch >= {'.'.join(map(str, MIN_TORCH))}: `pip install torch`, then build with "
                "`--no-build-isolation` (FLASH_MLA_ARCHES=none installs without CUDA kernels)"
            )
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        with (ROOT / BUILD / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            info |= write_ninja(plan, plan.cuda, torch, os.environ.get("FLASH_MLA_WERROR") == "1")
            run_ninja()
            # A new file, not new content in the old one: a process that has the old library mapped keeps running.
            staged = output / (LIBRARY + ".new")
            shutil.copy2(ROOT / BUILD / LIBRARY, staged)
            staged.replace(output / LIBRARY)
    else:
        (output / LIBRARY).unlink(missing_ok=True)
    (output / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    print(plan.summary(), file=sys.stderr, flush=True)
    return plan


def run_ninja() -> None:
    command = [find_ninja(), "-f", str(BUILD / "build.ninja"), "-j", str(job_count())]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise BuildError("compiling failed; the compiler's words are above")


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "flash_mla", help="folder for the library")
    try:
        build(parser.parse_args().output)
    except BuildError as error:
        print(f"flash_mla: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
