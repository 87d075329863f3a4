#!/usr/bin/env python3
"""Fails if a kernel of the last build spills registers, uses a stack, or has its tensor-core instructions serialised.

Kernels that are not ours may spill as much as ALLOWED says, and not a byte more.

    python tools/check_spills.py [--table]

Reads the reports of ptxas that tools/build_native.py keeps beside the objects; --table lists every kernel's registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_native import BUILD, ROOT, Plan, make_plan, sources

# Bytes of stack, of spill stores and of spill loads. CUTLASS's softmax for MLA's 128 + 64 columns holds a few words
# more than the 184 registers that its kernel has for it.
ALLOWED = {
    "csrc/sm100/dense_prefill/inst/bf16_192.cu": (24, 40, 64),
    "csrc/sm100/dense_prefill/inst/fp16_192.cu": (24, 40, 64),
}


@dataclass(frozen=True)
class KernelReport:
    source: Path
    arch: str
    symbol: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def clean(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0

    @property
    def allowed(self) -> bool:
        found = (self.stack, self.spill_stores, self.spill_loads)
        most = ALLOWED.get(self.source.as_posix(), (0, 0, 0))
        return all(bytes_ <= limit for bytes_, limit in zip(found, most, strict=True))


ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'\n"
    r"(?:.*\n)*?"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"(?:.*\n)*?"
    r"ptxas info *: Used (?P<registers>\d+) registers"
)
# C7510 and its kin: wgmma that waits after each instruction. Said as "info", worth half of the speed.
SERIALISED = re.compile(r"^.*(?:\(C75\d\d\)|Potential Performance Loss).*$", re.M)


def read_log(source: Path, text: str) -> tuple[list[KernelReport], list[str]]:
    reports = [
        KernelReport(
            source, m["arch"], m["symbol"], int(m["registers"]), int(m["stack"]), int(m["stores"]), int(m["loads"])
        )
        for m in ENTRY.finditer(text)
    ]
    if len(reports) != text.count("Compiling entry function"):
        raise SystemExit(f"{source}: ptxas's report has a form that this tool does not know")
    return reports, [f"{source}: {line}" for line in SERIALISED.findall(text)]


def read_build(plan: Plan) -> tuple[list[KernelReport], list[str]]:
    reports: list[KernelReport] = []
    warnings: list[str] = []
    for source, _ in sources(plan.arches):
        if source.suffix != ".cu":
            continue
        log = ROOT / BUILD / f"{source.relative_to('csrc')}.o.log"
        if not log.exists():
            raise SystemExit(f"{source} has not been compiled: run tools/build_native.py")
        of_file, warned = read_log(source, log.read_text())
        reports += of_file
        warnings += warned
    return reports, warnings


def demangle(symbols: list[str]) -> list[str]:
    result = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print every kernel, not only the bad ones")
    arguments = parser.parse_args()
    reports, warnings = read_build(make_plan())
    if not reports:
        raise SystemExit("no kernel has been compiled: nothing is checked")
    for report, name in zip(reports, demangle([r.symbol for r in reports]), strict=True):
        if arguments.table or not report.clean:
            numbers = f"{report.registers:4} registers {report.stack:5} stack"
            spilled = f"{report.spill_stores:5}/{report.spill_loads} spilled"
            known = "" if report.clean or not report.allowed else "  (allowed)"
            print(f"{report.arch:7} {numbers} {spilled}  {name}{known}")
    print("\n".join(warnings) if warnings else "no serialised wgmma")
    bad = sum(not report.allowed for report in reports)
    allowed = sum(report.allowed and not report.clean for report in reports)
    spilling = f"{bad} with a stack or spills, {allowed} more within what is allowed"
    print(f"{len(reports)} kernels, {spilling}, {len(warnings)} warnings")
    return 1 if bad or warnings else 0


if __name__ == "__main__":
    sys.exit(main())
