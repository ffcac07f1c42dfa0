#!/usr/bin/env bash
# Runs the tests of the native engine on a kernel that was built with the address and undefined-behaviour sanitizers.
# usage: tests/mean/sanitize.sh [PYTEST ARGUMENT...]
# Needs gcc with libasan, hatchling, and the package's test dependencies.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# In a copy, because the kernel of an editable install is next to the sources.
cp -r ckpt_avg tests fixtures hatch_build.py pyproject.toml "$build"
cd "$build"
rm -f ckpt_avg/_kernel*.so
python - <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, ".")
import hatch_build

target = Path(f"ckpt_avg/_kernel{hatch_build._SUFFIX}")
flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
sys.exit(hatch_build._compile(Path(hatch_build._SOURCE), target, flags) or 0)
PYTHON

# Python itself leaks by design, and other handlers of SIGBUS must see their signal.
export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export PYTHONPATH="$build"
python -c 'import ckpt_avg._kernel as kernel; print("sanitized:", kernel.__file__)'
pytest -q -p no:cacheprovider -m "slow or not slow" "${@:-tests/mean/test_native.py}"
