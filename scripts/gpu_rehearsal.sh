#!/usr/bin/env bash
# Rehearses gpu_check.sh and gpu_bench.sh without a GPU: from the packed folder, in an empty root that has Python and the system's /usr alone, on
# the stand-in driver of tests/standin. Ends with status 77 where the machine allows no such root.
#
#   scripts/gpu_rehearsal.sh             all cases on the stand-in; runs that are killed, a kernel that faults, one that hangs
#   scripts/gpu_rehearsal.sh --torch     PyTorch's parts, on the CPU at small shapes: all ways to compute a step agree, and every line of the
#                                        scripts runs. With the PyTorch of the machines that it is for, which scripts/venv.sh brings (5 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

with_torch=''
case ${1:-} in '') ;; --torch) with_torch=1 ;; *) die "unknown argument $1" "scripts/gpu_rehearsal.sh [--torch]" ;; esac

have bwrap || apt_install bubblewrap
empty_root=(bwrap --unshare-all --die-with-parent --clearenv --ro-bind /usr /usr --proc /proc --dev /dev --tmpfs /tmp)
for folder in bin lib lib64 sbin; do
    if [ -L "/$folder" ]; then
        empty_root+=(--symlink "usr/$folder" "/$folder")
    elif [ -e "/$folder" ]; then
        empty_root+=(--ro-bind "/$folder" "/$folder")
    fi
done
if ! "${empty_root[@]}" /usr/bin/true 2>/dev/null; then
    echo "NOT RUN: the rehearsal of the GPU scripts (bwrap may not make an empty root here)" >&2
    exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack=$work/gpu
scripts/gpu_pack.sh "$pack"
say "the stand-in driver"
tests/standin/build.sh "$work/standin"
mkdir "$work/bin"
cp tests/standin/compute-sanitizer "$work/bin/"

path=/standin-bin:/usr/bin:/bin
binds=(--ro-bind "$pack" /gpu --ro-bind "$work/standin" /standin --ro-bind "$work/bin" /standin-bin)
if [ -n "$with_torch" ]; then
    export GLMDDP_TORCH=2.11.0
    # shellcheck source=scripts/venv.sh
    source scripts/venv.sh
    say "all of PyTorch's ways to compute a step, at a tiny shape"
    "$python" benches/bench_torch_gpu.py --selftest --device cpu --threads 2 | grep -v '^ok ' || die "PyTorch's variants differ"
    # The environment's interpreter may lie elsewhere; both at the places that they know.
    base=$("$python" -c 'import sys; print(sys.base_prefix)')
    binds+=(--ro-bind "$venv" "$venv")
    case $base in /usr) ;; *) binds+=(--ro-bind "$base" "$base") ;; esac
    path=$venv/bin:$path
fi

# gpu RESULTS [NAME=VALUE...] SCRIPT ARGUMENT...: as on a machine with a GPU.
gpu() {
    local results=$1 variables=()
    shift
    mkdir -p "$results"
    while [[ $1 == *=* ]]; do
        variables+=(--setenv "${1%%=*}" "${1#*=}")
        shift
    done
    "${empty_root[@]}" "${binds[@]}" --bind "$results" /results --chdir /results --setenv PATH "$path" --setenv LD_LIBRARY_PATH /standin \
        --setenv HOME /tmp "${variables[@]}" bash "/gpu/$1" --out /results "${@:2}"
}

# parts REPORT RESULT: the number of its parts with that result.
parts() { grep -c "^| .* | $2.* | [0-9]* |\$" "$1" || true; }

is_complete() {
    grep -q '^| part ' "$1" || die "$1 has no table of parts: $(cat "$1")"
    ! grep -q INCOMPLETE "$1" || die "$1 says that it is not complete: $(cat "$1")"
}

# run RESULTS NAME MODE ARGUMENT...: a whole run in which no part fails.
run() {
    local results=$1 name=$2 mode=$3
    shift 3
    say "gpu_$name.sh --$mode $*"
    gpu "$results" "gpu_$name.sh" "--$mode" "$@" || die "gpu_$name.sh --$mode failed: $(cat "$results/$name-$mode.md")"
    is_complete "$results/$name-$mode.md"
    [ "$(parts "$results/$name-$mode.md" FAILED)" = 0 ] || die "$results/$name-$mode.md: a part failed"
}

whole=$work/whole
if [ -n "$with_torch" ]; then
    for mode in quick rest; do
        run "$whole" bench "$mode" --small
        [ "$(parts "$whole/bench-$mode.md" 'NOT RUN')" = 0 ] || die "a part of gpu_bench.sh was not run: $(cat "$whole/bench-$mode.md")"
    done
    say "passed in $SECONDS s"
    exit
fi

began=$SECONDS
say "libraries"
# doctor FOLDER: in the empty root, with FOLDER on the loader's path.
doctor() {
    "${empty_root[@]}" "${binds[@]}" --setenv LD_LIBRARY_PATH "$1" /gpu/bundle/bin/glmddp doctor
}
doctor /standin | grep -q '^NCCL  *ok .*/libnccl.so$' || die "the bundle does not find a libnccl.so.2: $(doctor /standin)"
doctor / | grep -q '^NCCL  *poor .*libnccl.so.2: cannot open' || die "the bundle does not say that libnccl.so.2 is missing: $(doctor /)"

run "$whole" check quick
[ "$(parts "$whole/check-quick.md" ok)" -ge 12 ] || die "gpu_check.sh --quick has too few parts: $(cat "$whole/check-quick.md")"
run "$whole" check rest --small
[ "$(parts "$whole/check-rest.md" 'NOT RUN')" = 0 ] || die "a part of gpu_check.sh was not run: $(cat "$whole/check-rest.md")"
run "$whole" bench quick --small
run "$whole" bench rest --small
[ "$(find "$whole" -type f | wc -l)" -le 8 ] || die "more than 8 files of results: $(ls "$whole")"

# killed NAME N: killed once N parts are there, the report holds them.
killed() {
    local results=$work/killed-$1-$2 lines=0 report
    report=$results/$1-quick.md
    mkdir -p "$results"
    mkfifo "$results.fifo"
    gpu "$results" "gpu_$1.sh" --quick --small >"$results.fifo" 2>&1 &
    local job=$!
    exec 3<"$results.fifo"
    while [ "$lines" -lt "$2" ] && read -r _ <&3; do lines=$((lines + 1)); done
    # bwrap is the first process of the root: with it all others end.
    pkill -KILL -P "$job" || true
    kill -KILL "$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
    exec 3<&-
    local found
    found=$(($(parts "$report" ok) + $(parts "$report" FAILED) + $(parts "$report" 'NOT RUN')))
    [ "$found" -ge "$2" ] || die "gpu_$1.sh was killed behind part $2, and its report has $found: $(cat "$report")"
}
say "killed behind each part in turn"
for name in check bench; do
    num_parts=$(grep -c '^| .* | [0-9]* |$' "$whole/$name-quick.md")
    for ((n = 1; n <= num_parts; n++)); do killed "$name" "$n"; done
done

say "a kernel that faults"
faulty=$work/faulty
if gpu "$faulty" GLMDDP_STANDIN_FAULT=swiglu_fwd gpu_check.sh --quick --small >/dev/null; then
    die "gpu_check.sh passed with a kernel that faults"
fi
report=$faulty/check-quick.md
is_complete "$report"
grep -q '^| kernels swiglu, twice | FAILED' "$report" || die "the part of the faulty kernel did not fail: $(cat "$report")"
grep -q 'CUDA_ERROR_ILLEGAL_ADDRESS' "$report" || die "the report does not say what the fault was: $(cat "$report")"
[ "$(parts "$report" FAILED)" = 1 ] || die "a kernel that faults failed other parts than its own: $(cat "$report")"

say "a kernel that races"
racing=$work/racing
if gpu "$racing" GLMDDP_STANDIN_FINDS=racecheck gpu_check.sh --rest --small >/dev/null; then die "gpu_check.sh passed with a race"; fi
report=$racing/check-rest.md
is_complete "$report"
grep -q '^| sanitizer racecheck on attention | FAILED: RACECHECK SUMMARY: 1 hazard' "$report" || die "the race was not found: $(cat "$report")"
[ "$(parts "$report" FAILED)" = 2 ] || die "a race failed other parts than racecheck's two: $(cat "$report")"

say "a kernel that hangs"
hanging=$work/hanging
if gpu "$hanging" GLMDDP_STANDIN_HANG=rotary gpu_check.sh --quick --small --part-seconds 6 >/dev/null; then
    die "gpu_check.sh passed with a kernel that hangs"
fi
report=$hanging/check-quick.md
is_complete "$report"
grep -q '^| kernels rotary, twice | FAILED: not done after 6 s' "$report" || die "the part of the kernel that hangs did not run out: $(cat "$report")"
grep -q '^rotary Forward .* \.\.\. *$' "$report" || die "the report does not name the case that hangs: $(cat "$report")"
[ "$(parts "$report" FAILED)" = 1 ] || die "a kernel that hangs failed other parts than its own: $(cat "$report")"

say "passed in $SECONDS s, $((SECONDS - began)) s of it on the stand-in"
