"""The emulation of SM100's instructions, and what it is checked against: see tests/sm100/README.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cute_adapter
import pytest
import sm100_mutations
import torch
from test_dense_decode import bits

import build_native

ROOT = Path(__file__).resolve().parent.parent
SM100 = ROOT / "tests" / "sm100"
BUILT = ROOT / "build" / "emulation"

needs_headers = pytest.mark.skipif(
    build_native.find_cuda() is None or build_native.cutlass_include() is None, reason="no CUDA or no CUTLASS headers"
)


def on_hopper(program: Path) -> Path:
    """`program`, or skips: it has to be built, and to have a GPU that it is built for."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    if not program.exists():
        pytest.skip(f"{program.relative_to(ROOT)} is not built: python tools/build_emulation.py")
    return program


def outcome(*command: str | Path) -> tuple[int, str]:
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return answer.returncode, answer.stdout + answer.stderr


# ---- Layouts, on the host.


def compiled_layouts(tmp_path: Path, mutation: tuple[str, str] | None = None) -> tuple[int, str]:
    """What tests/sm100/layouts.cpp says, after one change to the text of the headers that it checks."""
    headers = {name: SM100 / name for name in ("layouts.cpp", "emulation/layouts.h")}
    headers |= {name: ROOT / "csrc" / name for name in ("device/sm100/umma.h", "device/slices.h")}
    texts = {name: path.read_text() for name, path in headers.items()}
    if mutation:
        before, after = mutation
        assert sum(text.count(before) for text in texts.values()) == 1
        texts = {name: text.replace(before, after) for name, text in texts.items()}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    cuda, cutlass = build_native.find_cuda(), build_native.cutlass_include()
    assert cuda is not None
    assert cutlass is not None
    include = cuda.folder("include", holds="cuda_runtime_api.h")
    command = ["g++", "-std=c++20", "-O0", "-I", tmp_path]
    command += [part for folder in (cutlass, include, include / "cccl") for part in ("-isystem", folder)]
    subprocess.run([*command, "-o", tmp_path / "layouts", tmp_path / "layouts.cpp"], check=True)
    return outcome(tmp_path / "layouts")


@needs_headers
def test_layouts_are_those_of_cute(tmp_path: Path) -> None:
    code, text = compiled_layouts(tmp_path)
    assert code == 0, text


@needs_headers
@pytest.mark.parametrize(
    "mutation",
    [
        ("address >> 7 &", "address >> 8 &"),  # a bit of the swizzle
        ("outer / 8 * matrix.stride + outer % 8 * row_bytes;", "outer / 8 * matrix.leading + outer % 8 * row_bytes;"),
        ("m % 64 + n / half * 64", "m % 64 + n % half / 32 * 64"),  # which half of the lanes
    ],
    ids=["swizzle", "offsets", "halves"],
)
def test_mistakes_in_layouts_are_found(tmp_path: Path, mutation: tuple[str, str]) -> None:
    code, _ = compiled_layouts(tmp_path, mutation)
    assert code == 1


# ---- Instructions.

RIGHT = ("product", "outer_b", "upper_lanes", "tmem_a", "store_load", "gather", "pair", "pair_outer_b", "pair_tmem_a")
FOUND = {
    "swizzle_bit": "values are wrong",
    "swapped_offsets": "",  # wrong values, or an address that is not there
    "no_wait_for_store": "store has not been waited for",
    "never_written": "never written",
    "accumulates_on_nothing": "never written",
    "not_allocated": "has not allocated",
    "other_quarter": "own quarter",
    "no_commit": "no commit covers",
    "leak": "4 slices of columns were not freed",
    "allocation_twice": "nobody frees",
    "after_relinquish": "permit was given up",
    "gather_misaligned": "aligned to 128 bytes",
    "gather_swapped": "values are wrong",
    "gather_beyond": "values are wrong",
    "pair_half_of_a": "never written",
    "pair_of_one": "another number of CTAs",
    "pair_odd_issuer": "even rank",
    "pair_no_commit": "no commit covers",
    "pair_leak": "8 slices of columns were not freed",
}
# What the eager schedule cannot see.
FOUND_BY_LAZY = {
    "no_wait_for_result": "never written",
    "pair_no_wait_for_result": "never written",
    "gather_not_waited": "32 gathers were not waited for",
    "gather_too_soon": "values are wrong",
}


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "lazy"])
@pytest.mark.parametrize("case", RIGHT)
def test_instructions(case: str, schedule: str) -> None:
    code, text = outcome(on_hopper(BUILT / f"instructions-{schedule}"), case)
    assert code == 0, text


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "lazy"])
@pytest.mark.parametrize("case", FOUND)
def test_mistakes_are_found(case: str, schedule: str) -> None:
    code, text = outcome(on_hopper(BUILT / f"instructions-{schedule}"), case)
    assert code in (1, 2), text
    assert FOUND[case] in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", FOUND_BY_LAZY)
def test_what_is_used_too_soon_is_found_by_the_lazy_schedule(case: str) -> None:
    code, text = outcome(on_hopper(BUILT / "instructions-lazy"), case)
    assert code in (1, 2), text
    assert FOUND_BY_LAZY[case] in text


# ---- Kernels that we did not write.


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "lazy"])
@pytest.mark.parametrize("name", ["01_mma_sm100", "02_mma_tma_sm100"])
def test_tutorials_of_cute(name: str, schedule: str) -> None:
    code, text = outcome(on_hopper(BUILT / f"{name}-{schedule}"), "256", "512", "128")
    assert code == 0
    assert "Relative error: 0.0" in text
    assert "Execution is successful" in text


def test_the_adapter_replaces_what_it_knows() -> None:
    header = (
        "if (cute::elect_one_sync()) {\n uint32_t mask[4] = {0, 0, 0, 0};\n asm volatile(\n"
        '"{\\n\\t" ".reg .pred p;\\n\\t" "setp.ne.b32 p, %4, 0;\\n\\t"\n'
        '"tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, {%5, %6, %7, %8}, p; \\n\\t" "}\\n"\n'
        ': : "r"(tmem_c), "l"(desc_a), "l"(desc_b), "r"(uint32_t(idescE>>32)), "r"(scaleC), "r"(mask[0]));\n}\n'
        'asm volatile("tcgen05.shift.cta_group::1.down [%0];" :: "r"(a));\n'
    )
    text = cute_adapter.adapted(header)
    assert "multiply({desc_a, desc_b, tmem_c, uint32_t(idescE>>32), false, scaleC != 0, 1});" in text
    assert "elect_one_sync" not in text
    assert "tcgen05.shift" in text


@pytest.mark.parametrize("distance", [1, 2])
def test_the_adapter_knows_halves_that_lie_next_to_each_other(distance: int) -> None:
    wrapper = 'asm volatile ("tcgen05.ld.sync.aligned.16x32bx2.x1.b32" "{%0}, [%1], DISTANCE;\\n"\n'
    wrapper += ': "=r"(dst0) : "r"(src_addr));'
    text = cute_adapter.adapted(wrapper.replace("DISTANCE", str(distance)))
    assert ("load<::flash_mla::emulation::Shape::k16x32x2>(src_addr, dst0);" in text) == (distance == 1)
    assert ("tcgen05.ld" in text) == (distance == 2)


# ---- Our kernels. All other tests of the op run on them too: tests/sm100/README.md says how.


def results_of(
    library: Path, file: Path, script: str = "results.py", *arguments: str, seconds: float = 60
) -> tuple[int, str]:
    """Runs a script of tests/sm100 on a library; a kernel that never ends fails too."""
    environment = {**os.environ, "FLASH_MLA_LIBRARY": str(on_hopper(library)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, SM100 / script, file, *arguments]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 1, "does not end"
    return answer.returncode, answer.stdout + answer.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["results.py", "gradients.py"])
def test_both_schedules_give_the_same_bits(script: str, tmp_path: Path) -> None:
    results = []
    for schedule in ("eager", "lazy"):
        code, text = results_of(BUILT / schedule / build_native.LIBRARY, tmp_path / schedule, script, seconds=180)
        assert code == 0, text
        results.append(torch.load(tmp_path / schedule))
    for tensors in zip(*results, strict=True):
        for one, other in zip(*tensors, strict=True):
            assert torch.equal(bits(one), bits(other))


def results_of_mutant(name: str, file: Path) -> tuple[int, str]:
    """Of the calls that the mutated kernel serves."""
    source = Path(sm100_mutations.mutated_kernel(name))
    kernel = f"{source.parts[-3]}/{source.stem}"
    return results_of(BUILT / "mutants" / name / build_native.LIBRARY, file, "results.py", kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sm100_mutations.MISTAKES)
def test_mistakes_in_the_kernel_are_found(name: str, tmp_path: Path) -> None:
    code, _ = results_of_mutant(name, tmp_path / name)
    assert code != 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", sm100_mutations.HARMLESS)
def test_harmless_changes_of_the_kernel_pass(name: str, tmp_path: Path) -> None:
    code, text = results_of_mutant(name, tmp_path / name)
    assert code == 0, text


@pytest.mark.parametrize("name", sm100_mutations.ALL)
def test_the_text_of_mutations_is_there(name: str) -> None:
    changes = sm100_mutations.ALL[name]
    for file, _, _ in changes:
        text = (ROOT / "csrc" / file).read_text()
        assert sm100_mutations.mutated(text, file, changes) != text


@pytest.mark.gpu
@pytest.mark.parametrize("name", sm100_mutations.GRADIENT_MISTAKES)
def test_mistakes_in_gradients_are_found(name: str, tmp_path: Path) -> None:
    code, _ = results_of(BUILT / "mutants" / name / build_native.LIBRARY, tmp_path / name, "gradients.py")
    assert code != 0
