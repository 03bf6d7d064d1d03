#!/usr/bin/env bash
# Creates or updates the virtual environment that `make` works in, and builds trifuse into it.
#
#   scripts/setup_venv.sh VENV [extra...]      extras of pyproject.toml: test, report; and rivals
#
# PYTHON names the interpreter to start from. If it has a torch 2.10 or newer, that torch is used and
# nothing replaces it; otherwise the one in constraints.txt is installed.
set -euo pipefail

cd "$(dirname "$0")/.."
readonly venv=$1
shift
readonly python=${PYTHON:-python3}
readonly pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
readonly new_enough="import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10))"

if [[ ! -x $venv/bin/python ]]; then
  if "$python" -c "$new_enough" 2>/dev/null; then
    echo "keeping the torch of $python"
    "$python" -m venv --system-site-packages "$venv"
    # If $python is a virtual environment itself, its packages are not the system's: name their folder.
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
      >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/keep_torch.pth"
  else
    "$python" -m venv "$venv"
  fi
fi
if ! "$venv/bin/python" -c "$new_enough" 2>/dev/null; then
  echo "installing torch ($(grep '^torch' constraints.txt))"
  "${pip[@]}" install --constraint constraints.txt torch
fi
"$venv/bin/python" -c "import triton" 2>/dev/null || "${pip[@]}" install "triton==3.9.0" ||
  echo "triton could not be installed: its kernels will say so"
"${pip[@]}" install "setuptools>=77" wheel "pybind11>=2.12" ninja numpy safetensors
command -v cmake >/dev/null || "${pip[@]}" install cmake

for extra in "$@"; do
  case $extra in
    # transformers and peft need a torch and take the one that is there; without them their tests are skipped.
    test)
      "${pip[@]}" install pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis ruff clang-format
      torch=$("$venv/bin/python" -c "import torch; print(torch.__version__)")
      "${pip[@]}" install --constraint <(echo "torch==$torch") "transformers>=5.23" peft ||
        echo "transformers and peft could not be installed: the tests of their models will say so"
      "${pip[@]}" install --no-deps gaussian-adaptive-attention ||
        echo "gaussian-adaptive-attention could not be installed: the tests beside it will say so"
      "${pip[@]}" install --no-deps loralib || echo "loralib could not be installed: its state dicts will not be tested"
      "${pip[@]}" install scikit-learn || echo "scikit-learn could not be installed: an example will not be tested"
      ;;
    report) "${pip[@]}" install matplotlib jinja2 rich pytest pytest-benchmark ;;
    # What the report compares with. None may bring a torch of its own, and none is needed.
    rivals)
      for rival in mambapy gaussian-adaptive-attention loralib; do
        "${pip[@]}" install --no-deps "$rival" || echo "$rival could not be installed: left out of the report"
      done
      torch=$("$venv/bin/python" -c "import torch; print(torch.__version__)")
      "${pip[@]}" install --constraint <(echo "torch==$torch") transformers peft ||
        echo "transformers and peft could not be installed: left out of the report"
      ;;
    *)
      echo "setup_venv.sh: there is no extra '$extra'" >&2
      exit 2
      ;;
  esac
done

PATH=$PWD/$venv/bin:$PATH "${pip[@]}" install --no-build-isolation --no-deps --editable .
"$venv/bin/python" -m trifuse info
