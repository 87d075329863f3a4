"""Copies of CuTe's wrappers of tcgen05 instructions that call the emulation in place of each `asm`.

Kernels of the nvidia-cutlass package are compiled with the copies in front of the include path, and are themselves
unchanged. A wrapper whose instruction the emulation does not know keeps its `asm`, which no other GPU compiles.
"""

from __future__ import annotations

import re
from pathlib import Path

import build_native

HEADERS = (
    "cute/arch/copy_sm100.hpp",
    "cute/arch/mma_sm100_umma.hpp",
    "cute/arch/tmem_allocator_sm100.hpp",
    "cutlass/arch/barrier.h",
)

STATEMENT = re.compile(
    r"(?P<elect>if\s*\(\s*cute::elect_one_sync\(\)\s*\)(?=\s*\{(?:\s*uint32_t mask[^;]*;)?\s*asm))"
    r"|asm\s+volatile\s*\((?P<body>(?:[^()\"]|\"(?:\\.|[^\"\\])*\"|\((?:[^()]|\([^()]*\))*\))*)\)\s*;"
)


def operands(section: str) -> list[str]:
    """The expressions of one section of an asm's operands: those in parentheses behind each constraint."""
    found = []
    for match in re.finditer(r'"[=+]?\w+"\s*\(', section):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(section[end], 0)
            end += 1
        found.append(section[match.end() : end - 1])
    return found


def call(text: str, arguments: list[str]) -> str | None:
    """The emulation's call for an instruction, or None if it has none."""
    if match := re.search(r"tcgen05\.(ld|st)\.sync\.aligned\.(\d+x\d+)b(x2)?\.x(\d+)\.b32", text):
        if match[3] and not re.search(rf"\] *, *{match[4]}\b", text):
            return None  # halves that do not lie next to each other
        shape = f"::flash_mla::emulation::Shape::k{match[2]}{match[3] or ''}"
        if match[1] == "ld":
            return f"::flash_mla::emulation::load<{shape}>({arguments[-1]}, {', '.join(arguments[:-1])})"
        return f"::flash_mla::emulation::store<{shape}>({', '.join(arguments)})"
    if match := re.search(r"tcgen05\.mma\.cta_group::(\d)\.kind::f16 \[%0\], (\[?)%1\]?, %2, %3, \{[^}]*\}, p;", text):
        d, a, b, instruction, accumulate = arguments[:5]
        in_tmem = "true" if match[2] else "false"
        operation = f"{{{a}, {b}, {d}, {instruction}, {in_tmem}, {accumulate} != 0, {match[1]}}}"
        return f"::flash_mla::emulation::multiply({operation})"
    if "tcgen05.commit" in text:
        ctas = [f"static_cast<uint32_t>({mask})" for mask in arguments[1:]]
        return f"::flash_mla::emulation::commit({', '.join([arguments[0], *ctas])})"
    if match := re.search(r"tcgen05\.alloc\.cta_group::(\d)", text):
        return f"::flash_mla::emulation::allocate<{match[1]}>({', '.join(arguments)})"
    if match := re.search(r"tcgen05\.dealloc\.cta_group::(\d)", text):
        return f"::flash_mla::emulation::free<{match[1]}>({', '.join(arguments)})"
    if "tcgen05.relinquish_alloc_permit" in text:
        return "::flash_mla::emulation::relinquish()"
    if "tcgen05.wait::ld" in text:
        return "__syncwarp()"
    if "tcgen05.wait::st" in text:
        return "::flash_mla::emulation::wait_store()"
    return None


def adapted(header: str) -> str:
    """A header with its instructions replaced. The whole warp does what one elected thread would issue."""
    elected: list[re.Match[str]] = []
    pieces, done = [], 0
    for match in STATEMENT.finditer(header):
        if match["elect"]:
            elected.append(match)
            continue
        text, *sections = re.split(r":(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", match["body"], maxsplit=3)
        arguments = [argument for section in sections[:2] for argument in operands(section)]
        text = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', text))
        replacement = call(text, arguments)
        if replacement is not None:
            if elected and match.start() - elected[-1].end() < 120:
                pieces += [header[done : elected[-1].start()], header[elected[-1].end() : match.start()]]
            else:
                pieces.append(header[done : match.start()])
            pieces.append(f"\n#ifdef __CUDA_ARCH__\n{replacement};\n#endif\n")
            done = match.end()
    return "".join([*pieces, header[done:]])


def write(cutlass: Path, folder: Path) -> None:
    """Writes the copies of the headers in CUTLASS's include folder to `folder`."""
    for name in HEADERS:
        text = adapted((cutlass / name).read_text())
        text = text.replace("#pragma once", '#pragma once\n#include "emulation/emulation.cuh"', 1)
        build_native.write_if_changed(folder / name, text)
