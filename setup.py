"""Packages flash_mla: Python, and one shared library where nvcc is there. What is built: tools/build_native.py."""

import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_native


class BuildNative(Command):
    """Compiles the CUDA library into the package: in place for editable installs."""

    description = "compile csrc/ into flash_mla/libflash_mla.so"
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        root = build_native.ROOT if self.editable_mode else Path(self.build_lib)
        try:
            build_native.build(root / "flash_mla")
        except build_native.BuildError as error:
            raise CompileError(str(error)) from error


class Build(build):
    sub_commands = (*build.sub_commands, ("build_native", None))

    def run(self):
        # Without this, a module that was removed or renamed since an earlier build would still be packaged.
        shutil.rmtree(Path(self.build_lib) / "flash_mla", ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """The library knows nothing of CPython: one wheel per platform serves every Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not build_native.make_plan().arches

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel})
