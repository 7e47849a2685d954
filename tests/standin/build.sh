#!/usr/bin/env bash
# Builds the stand-in for a GPU's driver and libraries with clang: put the folder first on LD_LIBRARY_PATH, and a glmddp that was built with the
# feature `cuda` computes on a GPU that is not there. Needs clang and nothing of CUDA. What is up to date is not built again.
#
#   tests/standin/build.sh FOLDER              for whole runs
#   tests/standin/build.sh --checked FOLDER    every access to memory is checked: for small cases
#
# GLMDDP_STANDIN_SOURCES    the folder of the kernels' sources (default src/kernels)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
checked=''
if [ "${1:-}" = --checked ]; then
    checked=1
    shift
fi
to=${1:?name the folder for the libraries}
sources=${GLMDDP_STANDIN_SOURCES:-$root/src/kernels}
here=$root/tests/standin
mkdir -p "$to/objects"
exec 9>"$to/objects/lock"
flock 9

plain=(clang++ -std=c++17 -O2 -fPIC -fvisibility=default -Wall -Wextra -Werror)
kernel=(clang++ -x c++ -c -std=c++17 -fPIC -fno-exceptions -fno-rtti -ffp-contract=off -DGLMDDP_SHIM -Wno-unknown-pragmas)
if [ -n "$checked" ]; then
    plain+=(-DSTANDIN_CHECKED)
    # Without the sanitizer's library: its callbacks are those of blocks.cpp.
    kernel+=(-DSTANDIN_CHECKED -O1 -fsanitize=thread -fno-vectorize -fno-slp-vectorize -mllvm -tsan-instrument-read-before-write
        -mllvm -tsan-instrument-func-entry-exit=0)
else
    kernel+=(-O2)
fi

made_of() { printf '%s\n' "${plain[*]} ${kernel[*]}" | cat - "$@" | sha256sum; }
# make RESULT "SOURCE..." COMMAND...: makes RESULT with COMMAND -o, unless it was made of the same sources by the same flags.
make() {
    local result=$1 from now
    read -ra from <<<"$2"
    now=$(made_of "${from[@]}")
    if [ -f "$result" ] && [ "$(cat "$result.made_of" 2>/dev/null)" = "$now" ]; then return; fi
    "${@:3}" -o "$result.draft"
    mv "$result.draft" "$result"
    printf '%s\n' "$now" >"$result.made_of"
}
shared=("$here"/driver/*.h "$here"/shim/*.h)
headers=("$here"/shim/*.h "$sources"/*.cuh)

object_of() { echo "$to/objects/$(basename "${1%.*}").o"; }
# library SONAME "SOURCE..." FLAG...: and its unversioned name, which some loaders ask for.
library() {
    local from
    read -ra from <<<"$2"
    make "$to/$1" "$2 ${shared[*]}" "${plain[@]}" "-I$here" -shared "-Wl,-soname,$1" "-Wl,-rpath,\$ORIGIN" "${from[@]}" "${@:3}"
    ln -sf "$1" "$to/${1%.so.*}.so"
}

mapfile -t all < <(find "$sources" -maxdepth 1 -name '*.cu' | sort)
objects=()
jobs=()
for source in "${all[@]}"; do
    objects+=("$(object_of "$source")")
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do sleep 0.05; done
    make "${objects[-1]}" "$source ${headers[*]}" "${kernel[@]}" "-I$here/shim" "-I$sources" "$source" &
    jobs+=($!)
done
library libcuda.so.1 "$here/driver/counts.cpp $here/driver/driver.cpp $here/driver/memory.cpp $here/driver/plant.cpp $here/driver/streams.cpp $here/shim/blocks.cpp" \
    -ffp-contract=off -Wl,-z,defs -ldl -lm -lpthread
library libcublas.so.13 "$here/blas.cpp"
library libcublasLt.so.13 "$here/blas_lt.cpp" -O3 -ffp-contract=off "$to/libcuda.so.1"
library libcurand.so.10 "$here/rand.cpp"
for job in "${jobs[@]}"; do wait "$job"; done
make "$to/libglmddp_kernels.so" "${objects[*]}" clang++ -shared "-Wl,-rpath,\$ORIGIN" -Wl,-z,defs "${objects[@]}" "$to/libcuda.so.1" -lm
# NCCL's file alone, which glmddp only looks for today, by the one name that NVIDIA's packages have.
[ -f "$to/libnccl.so.2" ] || cc -shared -Wl,-soname,libnccl.so.2 -o "$to/libnccl.so.2" -x c /dev/null
