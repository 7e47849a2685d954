#!/usr/bin/env bash
# For a machine with a GPU, without Rust and network: is every kernel right there, and always the same? Started from the folder that
# scripts/gpu_pack.sh makes.
#
#   gpu_check.sh [--quick | --rest] [--small] [--out FOLDER] [--seconds N] [--part-seconds N]
#
# --quick     every kernel and product against the CPU's code, twice each with equal bits: at most 100 s
# --rest      compute-sanitizer (memcheck, racecheck, synccheck) on small cases, and 20 runs of each case: at most 170 s; without either: all
# --small     few cases, to rehearse
# --out       where check-quick.md (check-rest.md, check-all.md), what a person reads, and log.txt go (default: here)
# --seconds, --part-seconds    other limits of all parts together, and of each
#
# Parts come in the order of what they tell; each is a process of its own with a time-out, and the report is written after each. What was not run
# is said; the exit status is 1 where a part failed.
set -euo pipefail
# shellcheck source=scripts/gpu_parts.sh
source "$(dirname "$0")/gpu_parts.sh"
options "$@"
begin check 100 170

mapfile -t files < <("$glmddp" kernels check --list)
every=() repeats=20
if [ ${#small[@]} -gt 0 ]; then every=(--every 25) repeats=3; fi

# A tool that does not work on this machine, or is too slow for its time, found no error. racecheck counts hazards, the others errors; a warning
# of racecheck is a hazard.
judge_sanitizer() {
    local status=$1 output=$2 result=$3 summary
    summary=$(grep -oE '(ERROR SUMMARY: [0-9]+ error|RACECHECK SUMMARY: [0-9]+ hazard).*' "$output" | tail -n 1)
    case $summary in
        *': 0 '*) if [ "$status" = 0 ]; then echo ok; else echo "$result"; fi ;;
        *SUMMARY*) echo "FAILED: $summary" ;;
        *)
            if [ "$status" != 124 ] && [ "$status" != 137 ]; then result=$(tail -n 1 "$output" | cut -c 1-200); fi
            echo "NOT RUN: ${result#FAILED: }"
            ;;
    esac
}

# sanitizer LIMIT CASES ONLY...: each tool on the cases whose names contain one of ONLY.
sanitizer() {
    local limit=$1 cases=$2 tool text only=()
    for text in "${@:3}"; do only+=(--only "$text"); done
    for tool in memcheck racecheck synccheck; do
        if command -v compute-sanitizer >/dev/null; then
            part "sanitizer $tool on $cases" "$limit" compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$glmddp" kernels check --repeat 1 "${only[@]}" "${every[@]}"
        else
            skip "sanitizer $tool on $cases" "compute-sanitizer is not installed"
        fi
    done
}

if is quick; then
    # PyTorch is read from the disk while the kernels are checked: it is used next, and its first import takes a while.
    python3 -c 'import torch, triton' >/dev/null 2>&1 &
    clocks
    for file in "${files[@]}"; do
        part "kernels $file, twice" 25 "$glmddp" kernels check --file "$file" --repeat 2 "${every[@]}"
    done
fi
if is rest; then
    # One row and several blocks of rows; a block's sums and largest value; the norm, which is staged through shared memory.
    sanitizer 25 'small cases' '[1, 64]' '[129, 64]' '[5, 1000]' 'norm of 1500'
    # A prefix over three rows.
    sanitizer 30 'attention' 'rows: [31, 1, 33], prefix: 1,'
    for file in "${files[@]}"; do
        part "repeats of $file, $repeats" 25 "$glmddp" kernels check --file "$file" --repeat "$repeats" "${every[@]}"
    done
fi
finish
