#!/usr/bin/env bash
# Builds the stand-in for a GPU's driver and libraries with clang: put the folder first on LD_LIBRARY_PATH, and a glmddp that was built with the
# feature `cuda` computes on a GPU that is not there. Needs clang and nothing of CUDA.
#
#   tests/standin/build.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
to=${1:?name the folder for the libraries}
mkdir -p "$to"
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

plain=(clang++ -std=c++17 -O2 -fPIC -fvisibility=default -Wall -Wextra -Werror "-I$root/tests/kernels/shim")
kernel=(clang++ -x c++ -c -std=c++17 -O2 -fPIC -fno-exceptions -fno-rtti -ffp-contract=off -DGLMDDP_SHIM -DSHIM_PLAIN -Wno-unknown-pragmas
    "-I$root/tests/kernels/shim" "-I$root/src/kernels")

# kernels NAME...: an object each.
kernels() {
    local source
    for source in "$@"; do
        "${kernel[@]}" "$source" -o "$objects/$(basename "${source%.*}").o"
    done
}

# The attention kernels take as long as all others together.
kernels "$root/src/kernels/attention.cu" &
attention=$!
mapfile -t others < <(find "$root/src/kernels" -name '*.cu' ! -name attention.cu | sort)
kernels "${others[@]}" "$root/tests/kernels/shim/runtime.cpp"
wait "$attention"

# library SONAME SOURCE FLAG...: and its unversioned name, which some loaders ask for.
library() {
    "${plain[@]}" -shared "-Wl,-soname,$1" -o "$to/$1" "${@:2}"
    ln -sf "$1" "$to/${1%.so.*}.so"
}
library libcuda.so.1 "$root/tests/standin/cuda.cpp" "$objects"/*.o -Wl,-z,defs -ldl -lm -lpthread
library libcublas.so.13 "$root/tests/standin/blas.cpp"
library libcublasLt.so.13 "$root/tests/standin/blas_lt.cpp" -O3 -ffp-contract=off
library libcurand.so.10 "$root/tests/standin/rand.cpp"
# NCCL's file alone, which glmddp only looks for today, by the one name that NVIDIA's packages have.
cc -shared -Wl,-soname,libnccl.so.2 -o "$to/libnccl.so.2" -x c /dev/null
