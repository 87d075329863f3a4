#!/usr/bin/env bash
# Makes the environment VENV that `make` works in. Run again, it only adds what is missing.
#
#   tools/make_env.sh PYTHON VENV TORCH
#
# Where PYTHON already has a torch that is new enough, the environment sees PYTHON's packages and torch is not
# downloaded again; otherwise TORCH (a requirement such as torch==2.13.0) is installed.
set -euo pipefail
python=$1 venv=$2 torch=$3
usable='import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)'

"$python" -c 'import sys; assert sys.version_info >= (3, 10)' || {
  echo "flash_mla needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2
  exit 1
}
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
  if "$python" -c "$usable" 2>/dev/null; then
    # Not --system-site-packages: that shows the packages of the system, not those of an environment that PYTHON is in.
    sites=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' > "$sites/outer.pth"
  fi
fi
pip=("$venv/bin/python" -m pip install --quiet)
"$venv/bin/python" -c "$usable" 2>/dev/null || "${pip[@]}" "$torch"
"${pip[@]}" "setuptools>=77" ninja numpy # numpy: torch warns without it
# CUTLASS's headers alone: the package's dependencies serve its Python tools, which are not used.
if [ -z "${FLASH_MLA_CUTLASS:-}" ] && [ ! -d "$venv/share/cutlass_library" ]; then
  cutlass=$(PYTHONPATH=$(dirname "$0") "$venv/bin/python" -c 'import build_native as b; print(b.CUTLASS_REQUIREMENT)')
  "${pip[@]}" --no-deps --target "$venv/share" "$cutlass"
fi
