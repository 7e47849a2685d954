#!/usr/bin/env bash
# Gives the comparisons with PyTorch their Python: a virtual environment outside the clone, with packages from PyPI. Sourced after
# scripts/setup.sh; sets $python. Training itself never needs Python.
#
# GLMDDP_VENV         an environment to use or to make (default: venv in the cache folder)
# GLMDDP_TORCH        a version of PyTorch, in an environment of its own (default: the newest there is)
# GLMDDP_VENV_EXTRA   further packages that the sourcing script needs
set -euo pipefail

: "${root:?source scripts/setup.sh first}"
venv=${GLMDDP_VENV:-$cache/venv${GLMDDP_TORCH:+-torch-$GLMDDP_TORCH}}
case $venv in "$root"/*) venv=${TMPDIR:-/tmp}/glmddp-venv ;; esac
python=$venv/bin/python
if ! "$python" -c 'import torch, numpy, safetensors, sentencepiece' 2>/dev/null; then
    python3 -c 'import venv, ensurepip' 2>/dev/null || apt_install python3-venv
    say "making a Python environment with PyTorch in $venv (once; about 5 GB)"
    [ -x "$python" ] || python3 -m venv "$venv"
    "$python" -m pip install --quiet "torch${GLMDDP_TORCH:+==$GLMDDP_TORCH}" numpy safetensors sentencepiece >&2
fi
for package in ${GLMDDP_VENV_EXTRA:-}; do
    "$python" -c "import $package" 2>/dev/null || "$python" -m pip install --quiet "$package" >&2
done
say "PyTorch $("$python" -c 'import torch; print(torch.__version__)') in $venv"
