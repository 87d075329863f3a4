"""The house rules of the repository, the build's decisions, and the documents that must agree with the code."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import check_abi
import check_spills
import pytest
import support_matrix

import build_native

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
LIBRARY = ROOT / "flash_mla" / build_native.LIBRARY

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built")


def files_of_repository() -> list[Path]:
    """Files that git has or would take; without git (a source package) all but what a build makes."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return [ROOT / name for name in answer.stdout.splitlines() if (ROOT / name).is_file()]
    made = re.compile(r"(\.(?!ci/).*|build|dist|.*\.egg-info|.*__pycache__)/|.*\.so$|flash_mla/_build_info.json$")
    return [f for f in ROOT.rglob("*") if f.is_file() and not made.match(f.relative_to(ROOT).as_posix())]


def text_files() -> list[Path]:
    return [f for f in files_of_repository() if f.suffix not in (".png", ".so")]


def native_files() -> list[Path]:
    return sorted(f for f in CSRC.rglob("*") if f.suffix in (".h", ".cpp", ".cuh", ".cu"))


def without_comments(text: str) -> str:
    """C++ with comments and strings blanked, line numbers kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.S)


def located(path: Path, text: str, position: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"


# ---- csrc


def may_include(including: tuple[str, ...], included: tuple[str, ...]) -> bool:
    """`api -> sm* -> device -> core`, `any -> device -> core`; a folder named after an architecture serves that one."""
    own, other = including[0], included[0]
    below = {"core": set(), "device": {"core"}, "any": {"device", "core"}, "api": {"device", "core", "any"}}
    allowed = below.get(own, {"device", "core"}) | {own}
    if own == "api":
        allowed |= set(build_native.ARCHES)
    if other not in allowed:
        return False
    if other == "device" and included[1] in build_native.ARCHES:
        return included[1] in (own, including[1])
    return True


@pytest.mark.parametrize(
    ("including", "included", "allowed"),
    [
        ("api/a.cpp", "sm90/kernels.h", True),
        ("api/a.cpp", "any/kernels.h", True),
        ("sm90/x/kernel.cuh", "device/sm90/tma.cuh", True),
        ("device/sm90/tma.cuh", "device/numeric.cuh", True),
        ("any/a.cu", "core/schedule.h", True),
        ("sm90/x/kernel.cuh", "sm100/x/kernel.cuh", False),
        ("sm90/x/kernel.cuh", "any/kernels.h", False),
        ("sm90/x/kernel.cuh", "device/sm100/umma.cuh", False),
        ("any/a.cu", "device/sm90/tma.cuh", False),
        ("device/numeric.cuh", "device/sm90/tma.cuh", False),
        ("device/numeric.cuh", "sm90/kernels.h", False),
        ("core/schedule.h", "device/numeric.cuh", False),
    ],
)
def test_include_rule_itself(including: str, included: str, allowed: bool) -> None:
    assert may_include(tuple(including.split("/")), tuple(included.split("/"))) == allowed


def test_includes() -> None:
    wrong = []
    for path in native_files():
        text = path.read_text()
        for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*(<[^>]+>|"[^"]+")', text, re.M):
            name, quoted = match[1][1:-1], match[1][0] == '"'
            where = f"{located(path, text, match.start())} includes {match[1]}"
            if not quoted:
                if name.startswith("torch/") and path.relative_to(CSRC).parts[0] != "api":
                    wrong.append(f"{where}: torch is for csrc/api alone")
            elif ".." in Path(name).parts or not (CSRC / name).is_file():
                wrong.append(f"{where}: not a path from csrc")
            elif not may_include(path.relative_to(CSRC).parts, Path(name).parts):
                wrong.append(f"{where}: against the include rule")
    assert not wrong, "\n".join(wrong)


def namespace_level_usings(text: str) -> Iterator[int]:
    """Positions of `using namespace` that are in no function."""
    code = without_comments(text)
    scopes: list[bool] = []  # of each open brace: is it a namespace?
    since = 0
    for match in re.finditer(r"[{};]|\busing\s+namespace\b", code):
        token = match[0]
        if token == "{":
            scopes.append(bool(re.search(r"\bnamespace\b[\w\s:]*$", code[since : match.start()])))
        elif token == "}" and scopes:
            scopes.pop()
        elif token.startswith("using") and all(scopes):
            yield match.start()
        if token in "{};":
            since = match.end()


def test_using_namespace_is_found() -> None:
    text = "namespace a::b {\nusing namespace c;\nvoid f() {\n  using namespace cute;\n}\n}\nusing namespace d;\n"
    assert [text.count("\n", 0, position) + 1 for position in namespace_level_usings(text)] == [2, 7]


def test_no_using_namespace_outside_functions() -> None:
    texts = {path: path.read_text() for path in native_files()}
    wrong = [located(path, text, at) for path, text in texts.items() for at in namespace_level_usings(text)]
    assert not wrong, "\n".join(wrong)


def test_headers_guard_themselves_and_stay_in_the_namespace() -> None:
    wrong = []
    for path in native_files():
        text = path.read_text()
        if path.suffix in (".h", ".cuh") and "#pragma once" not in text:
            wrong.append(f"{path.relative_to(ROOT)} has no #pragma once")
        if not re.search(r"\bflash_mla\b", without_comments(text)) and path.suffix != ".cpp":
            wrong.append(f"{path.relative_to(ROOT)} has nothing in namespace flash_mla")
    assert not wrong, "\n".join(wrong)


def test_architecture_guard_is_in_the_kernel_wrapper_alone() -> None:
    wrong = []
    for path in native_files():
        guards = re.findall(r"__CUDA_ARCH\w*", without_comments(path.read_text()))
        if len(guards) > (path.name == "kernel.cuh"):
            wrong.append(f"{path.relative_to(ROOT)} looks at {', '.join(guards)}")
    assert not wrong, "\n".join(wrong)


def kernel_folders() -> list[Path]:
    return sorted({path.parent for path in CSRC.glob("sm*/*/kernel.cuh")})


def test_every_kernel_folder_has_its_design() -> None:
    missing = [str(f.relative_to(ROOT)) for f in kernel_folders() if not (f / "design.md").is_file()]
    assert not missing, f"no design.md in {', '.join(missing)}"


def test_csrc_has_the_folders_that_the_build_knows() -> None:
    folders = {f.name for f in CSRC.iterdir() if f.is_dir()}
    assert {"api", "core", "device", "any", "sm90"} <= folders <= {"api", "core", "device", "any", *build_native.ARCHES}


# ---- the build


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small csrc with two architectures, in place of ours."""
    for name in ("api/library.cpp", "any/combine.cu", "sm90/kernels.cpp", "sm90/x/inst/a.cu", "sm100/x/inst/a.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    monkeypatch.setattr(build_native, "ROOT", tmp_path)
    monkeypatch.delenv("FLASH_MLA_ARCHES", raising=False)
    return tmp_path


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None) -> None:
    cuda = build_native.Cuda(Path("nvcc"), version, Path()) if version else None
    monkeypatch.setattr(build_native, "find_cuda", lambda: cuda)


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("cuda", "asked", "arches", "left_out"),
    [
        ((13, 0), "", ["sm90", "sm100"], {}),
        ((12, 8), "", ["sm90"], {"sm100": "needs CUDA 12.9, nvcc is 12.8"}),
        ((13, 0), "sm90", ["sm90"], {"sm100": "not in FLASH_MLA_ARCHES"}),
        ((13, 0), "sm90,sm100", ["sm90", "sm100"], {}),
        ((13, 0), "none", [], {"sm90": "FLASH_MLA_ARCHES=none", "sm100": "FLASH_MLA_ARCHES=none"}),
        (None, "", [], dict.fromkeys(("sm90", "sm100"), "no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda")),
    ],
)
def test_plan(
    monkeypatch: pytest.MonkeyPatch,
    cuda: tuple[int, int] | None,
    asked: str,
    arches: list[str],
    left_out: dict[str, str],
) -> None:
    pretend_cuda(monkeypatch, cuda)
    monkeypatch.setenv("FLASH_MLA_ARCHES", asked)
    plan = build_native.make_plan()
    assert (plan.arches, plan.left_out) == (arches, left_out)
    for name, why in left_out.items():
        assert f"left out {name}: {why}" in plan.summary()


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("cuda", "asked", "text"),
    [
        (None, "sm90", "there is no nvcc"),
        ((12, 8), "sm100", "sm100 needs CUDA 12.9"),
        ((13, 0), "sm89", "FLASH_MLA_ARCHES names sm89"),
    ],
)
def test_plan_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, cuda: tuple[int, int] | None, asked: str, text: str
) -> None:
    pretend_cuda(monkeypatch, cuda)
    monkeypatch.setenv("FLASH_MLA_ARCHES", asked)
    with pytest.raises(build_native.BuildError, match=text):
        build_native.make_plan()


@pytest.mark.usefixtures("tree")
def test_each_folder_is_compiled_for_its_architecture_only() -> None:
    def compiled(arches: list[str]) -> dict[str, list[str]]:
        return {str(path): device for path, device in build_native.sources(arches)}

    assert compiled(["sm90"]) == {
        "csrc/any/combine.cu": ["sm90"],
        "csrc/api/library.cpp": [],
        "csrc/sm90/kernels.cpp": [],
        "csrc/sm90/x/inst/a.cu": ["sm90"],
    }
    both = compiled(["sm90", "sm100"])
    assert both["csrc/any/combine.cu"] == ["sm90", "sm100"]
    assert both["csrc/sm90/x/inst/a.cu"] == ["sm90"]
    assert both["csrc/sm100/x/inst/a.cu"] == ["sm100"]


def test_an_object_depends_on_the_architectures_that_it_has_code_for(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("csrc/sm100/dense_prefill/inst/a.cu", "flash_mla/_version.py", "torch/version.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text('__version__ = "2.10.0"\n'.replace('"', "'" if "torch" in name else '"'))
    cutlass = tree / "cutlass" / "include"
    (cutlass.parent / "examples" / build_native.FMHA_EXAMPLE).mkdir(parents=True)
    monkeypatch.setattr(build_native, "find_cutlass", lambda: (cutlass, "4.2.0"))
    monkeypatch.setattr(build_native.Cuda, "folder", lambda self, *_names, holds: self.root)
    cuda = build_native.Cuda(Path("nvcc"), (13, 0), tree)

    def statements(arches: list[str]) -> dict[str, str]:
        build_native.write_ninja(build_native.Plan(cuda, arches), cuda, tree / "torch", werror=False)
        text = (tree / build_native.BUILD / "build.ninja").read_text()
        return {m[1]: m[0] for m in re.finditer(r"^build \S+: \w+ (csrc/\S+) .*\n(?:  .*\n)*", text, re.M)}

    one, both = statements(["sm90"]), statements(["sm90", "sm100"])
    assert one["csrc/sm90/x/inst/a.cu"] == both["csrc/sm90/x/inst/a.cu"]
    assert one["csrc/any/combine.cu"] != both["csrc/any/combine.cu"]
    fmha, other = both["csrc/sm100/dense_prefill/inst/a.cu"], both["csrc/sm100/x/inst/a.cu"]
    assert "arch=compute_100f,code=sm_100f" in fmha
    assert "--use_fast_math" in fmha
    assert "--use_fast_math" not in other


def test_sm100_needs_the_example_of_cutlass(tmp_path: Path) -> None:
    with pytest.raises(build_native.BuildError, match=build_native.FMHA_EXAMPLE):
        build_native.find_fmha(tmp_path / "include")


def test_build_without_nvcc_removes_a_library_of_an_earlier_build(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tree / "flash_mla"
    package.mkdir()
    (package / "_version.py").write_text('__version__ = "1.2.3"\n')
    (package / build_native.LIBRARY).touch()
    pretend_cuda(monkeypatch, None)
    build_native.build(package)
    assert not (package / build_native.LIBRARY).exists()
    assert '"version": "1.2.3"' in (package / "_build_info.json").read_text()


PTXAS_LOG = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 17.158 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def test_spills_are_found() -> None:
    reports, warnings = check_spills.read_log(Path("a.cu"), PTXAS_LOG)
    clean, spilling = reports
    assert (clean.symbol, clean.registers, clean.clean) == ("_Z5cleanPf", 168, True)
    assert (spilling.symbol, spilling.registers, spilling.clean) == ("_Z5spillPf", 255, False)
    assert (spilling.stack, spilling.spill_stores, spilling.spill_loads) == (16, 12, 8)
    assert warnings == []


def test_spills_are_allowed_by_file_and_size() -> None:
    source, most = next(iter(check_spills.ALLOWED.items()))
    assert set(check_spills.ALLOWED) <= {path.relative_to(ROOT).as_posix() for path in native_files()}
    spilling = check_spills.KernelReport(Path(source), "sm_100f", "kernel", 128, *most)
    more = check_spills.KernelReport(Path(source), "sm_100f", "kernel", 128, most[0], most[1], most[2] + 4)
    elsewhere = check_spills.KernelReport(Path("a.cu"), "sm_100f", "kernel", 128, *most)
    assert (spilling.clean, spilling.allowed, more.allowed, elsewhere.allowed) == (False, True, False, False)


def test_serialised_wgmma_is_found() -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x"
    _, warnings = check_spills.read_log(Path("a.cu"), PTXAS_LOG + line + "\n")
    assert warnings == [f"a.cu: {line}"]


@pytest.fixture(scope="module")
def stable_symbols() -> set[str]:
    if build_native.find_cuda() is None or not shutil.which("g++"):
        pytest.skip("no CUDA headers or no g++")
    return check_abi.stable_symbols()


def test_stable_symbols_are_those_of_the_targeted_torch(stable_symbols: set[str]) -> None:
    assert {"aoti_torch_get_data_ptr", "torch_call_dispatcher"} <= stable_symbols
    assert "torch_from_blob" not in stable_symbols  # came with torch 2.11


def test_unstable_symbols_are_found(stable_symbols: set[str]) -> None:
    import torch

    found = check_abi.problems(Path(torch.__file__).parent / "lib" / "libtorch_python.so", stable_symbols)
    assert any("c10::" in problem for problem in found)


@needs_library
def test_library_keeps_to_the_stable_abi(stable_symbols: set[str]) -> None:
    found = check_abi.problems(LIBRARY, stable_symbols)
    assert not found, "\n".join(found)


# ---- Python


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(nodes: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions and classes among `nodes`, and the public methods of the latter."""
    for node in nodes:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def test_public_names_have_docstrings() -> None:
    missing = []
    for path in python_files("flash_mla"):
        module = ast.parse(path.read_text())
        if not ast.get_docstring(module):
            missing.append(f"{path.relative_to(ROOT)}")
        if path.name == "__init__.py" or not path.name.startswith("_"):
            for name, node in public_definitions(module.body):
                if not ast.get_docstring(node):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not missing, "\n".join(missing)


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton reads the annotations of its kernels: only its own may stand there."""
    return any("constexpr" in ast.unparse(a.annotation) for a in function.args.args if a.annotation)


def test_every_function_of_the_package_is_typed() -> None:
    assert (ROOT / "flash_mla" / "py.typed").is_file()
    untyped = []
    for path in python_files("flash_mla"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_triton_kernel(node):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    untyped.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {' '.join(bare)}")
    assert not untyped, "\n".join(untyped)


# ---- documents


def test_version_has_one_source() -> None:
    import flash_mla

    version = build_native.package_version()
    assert flash_mla.__version__ == version
    elsewhere = [
        str(path.relative_to(ROOT))
        for path in text_files()
        if path.suffix in (".py", ".toml", ".h", ".cpp", ".cuh", ".cu") and f'"{version}"' in path.read_text()
    ]
    assert elsewhere == ["flash_mla/_version.py"]


@needs_library
def test_library_was_built_from_this_version() -> None:
    import flash_mla

    assert flash_mla.build_info()["version"] == flash_mla.__version__


@needs_library
def test_every_kernel_of_the_library_takes_something() -> None:
    import flash_mla

    table = flash_mla.kernels()
    useful = {k.kernel for k in table if not k.reason and k.dtypes and k.d_qk and k.page_block_sizes and k.h_kv}
    assert table
    assert {k.kernel for k in table} == useful


@needs_library
def test_readme_has_the_kernels_of_the_library() -> None:
    import flash_mla

    present = {build_native.ARCHES[arch] for arch in build_native.ARCHES if any((CSRC / arch).rglob("*.cu"))}
    built = set(flash_mla.build_info()["archs"].split(","))
    if built != present:
        pytest.skip(f"the library is built for {', '.join(sorted(built))} only")
    in_readme = support_matrix.between_markers((ROOT / "README.md").read_text())
    assert in_readme == support_matrix.render(), "run `make docs`"


def test_the_matrix_has_every_operation() -> None:
    from flash_mla.backends import capability

    assert set(support_matrix.REFERENCE) == set(capability.OPERATIONS)


def test_readme_starts_with_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:25]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in ("demo", "test"):
        assert any(line.startswith(f"make {target} ") for line in first_screen)
        assert target in targets


def test_links_lead_somewhere() -> None:
    broken = []
    for path in text_files():
        if path.suffix == ".md":
            for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
                if not (path.parent / link).exists():
                    broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def test_environment_variables_are_documented() -> None:
    read = {
        name
        for folder in ("flash_mla", "tools", "benchmarks")
        for path in python_files(folder)
        for name in re.findall(r"""environ[^\n]{0,8}["'](FLASH_MLA_\w+)["']""", path.read_text())
    }
    documents = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    assert {"FLASH_MLA_ARCHES", "FLASH_MLA_BACKEND"} <= read
    assert not {name for name in read if name not in documents}


def test_linters_are_pinned_to_the_same_versions_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    hooks = re.findall(r'additional_dependencies: \["([^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert all(f'"{pin}"' in project for pin in hooks)


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError|not implemented", re.I)
# Paths of one machine, and addresses of package registries: neither helps a reader elsewhere.
FOREIGN = re.compile(r"(?<![\w.])/(work|root|home|mnt)/|/tmp/\w|pypi\.org|pythonhosted|/simple\b")


@pytest.mark.parametrize("pattern", [UNFINISHED, FOREIGN], ids=["unfinished", "foreign"])
def test_words_that_do_not_belong(pattern: re.Pattern[str]) -> None:
    found = []
    for path in text_files():
        text = "" if path == Path(__file__) else path.read_text()
        found += [f"{located(path, text, match.start())}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)
