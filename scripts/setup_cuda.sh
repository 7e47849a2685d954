#!/usr/bin/env bash
# Makes sure that there is an nvcc to compile src/kernels/*.cu with: the one of CUDA_HOME, of PATH or of /usr/local/cuda, or else NVIDIA's
# wheels of CUDA 13.0 from PyPI, unpacked into the cache folder (100 MB to load, 271 MB there, once). Needs no GPU and no driver.
#
#   scripts/setup_cuda.sh              run by itself: checks and installs
#   source scripts/setup_cuda.sh       the same, and leaves CUDA_HOME, PATH and CUDA_COMPUTE_CAP set (after scripts/setup.sh, which it sources)
#
# The wheels are enough to compile, not to link what links CUDA's libraries: build with scripts/lean_cuda.sh, which loads them at run time.
#
# GLMDDP_CACHE_DIR    as for scripts/setup.sh
# CUDA_COMPUTE_CAP    what candle's own kernels are compiled for (default 80: the driver compiles them further for newer GPUs)
set -euo pipefail
# shellcheck source=scripts/setup.sh
[ -n "${cache:-}" ] || source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

NVCC=13.0.88
OLDEST=12.0 # __grid_constant__, C++17 and sm_90

# install_nvcc FOLDER: complete or not there.
install_nvcc() {
    local draft=$1.partial.$$
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip
    say "installing nvcc $NVCC from wheels into $1 (once)"
    [ "$(uname -m)" = x86_64 ] || die "the pinned wheels are for x86_64, and this is $(uname -m)" "install NVIDIA's CUDA toolkit and set CUDA_HOME"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --no-deps --only-binary :all: --require-hashes --target "$draft" --requirement /dev/stdin >&2 <<WHEELS ||
nvidia-cuda-nvcc==$NVCC --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
WHEELS
        die "NVIDIA's wheels could not be installed" "install NVIDIA's CUDA toolkit and set CUDA_HOME"
    rm -rf "$1"
    mv -T "$draft" "$1"
}

find_nvcc() {
    local wheels=$cache/cuda-$NVCC
    if [ -x "${CUDA_HOME:-}/bin/nvcc" ]; then
        :
    elif have nvcc; then
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    elif [ -x /usr/local/cuda/bin/nvcc ]; then
        CUDA_HOME=/usr/local/cuda
    else
        CUDA_HOME=$wheels/nvidia/cu13
        [ -x "$CUDA_HOME/bin/nvcc" ] || install_nvcc "$wheels"
    fi
    have g++ || apt_install g++
    export CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
    local found
    found=$(nvcc --version | sed -n 's/.*, release \([0-9.]*\),.*/\1/p')
    at_least "$OLDEST" "$found" || die "$CUDA_HOME/bin/nvcc is $found, and glmddp needs $OLDEST or newer" "unset CUDA_HOME, or set it to a newer toolkit"
    say "nvcc $found in $CUDA_HOME"
}

find_nvcc
