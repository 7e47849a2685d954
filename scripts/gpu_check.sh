#!/usr/bin/env bash
# For a machine with a GPU, without Rust and network: is every kernel right there, and always the same? Started from the folder that
# scripts/gpu_pack.sh makes.
#
#   gpu_check.sh [--quick | --rest] [--small] [--out FOLDER] [--seconds N] [--part-seconds N]
#
# --quick     every kernel and product against the CPU's code, twice each with equal bits: at most 100 s
# --rest      compute-sanitizer (memcheck, racecheck, synccheck) on small cases, and 20 runs of each case: at most 160 s; without either: all
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
begin check 100 160

mapfile -t files < <("$glmddp" kernels check --list)
every=() repeats=20
if [ ${#small[@]} -gt 0 ]; then every=(--every 25) repeats=3; fi

# A tool that does not work on this machine, or is too slow for its time, found no error.
judge_sanitizer() {
    local status=$1 output=$2 result=$3
    if grep -q 'ERROR SUMMARY: 0 errors' "$output" && [ "$status" = 0 ]; then
        echo ok
    elif grep -q 'ERROR SUMMARY: [1-9]' "$output"; then
        echo "FAILED: $(grep -o 'ERROR SUMMARY: .*' "$output" | tail -n 1)"
    elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "NOT RUN: ${result#FAILED: }"
    elif grep -q 'ERROR SUMMARY' "$output"; then
        echo "$result"
    else
        echo "NOT RUN: $(tail -n 1 "$output" | cut -c 1-200)"
    fi
}

if is quick; then
    if command -v nvidia-smi >/dev/null; then
        part "clocks" 10 nvidia-smi --format=csv \
            --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit
    fi
    for file in "${files[@]}"; do
        part "kernels $file, twice" 25 "$glmddp" kernels check --file "$file" --repeat 2 "${every[@]}"
    done
fi
if is rest; then
    for tool in memcheck racecheck synccheck; do
        # The memory-bound kernels' smallest cases, and attention with a prefix over three rows.
        for only in '[1, 64]' 'rows: [31, 1, 33], prefix: 1,'; do
            if command -v compute-sanitizer >/dev/null; then
                part "sanitizer $tool on \`$only\`" 20 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                    "$glmddp" kernels check --repeat 1 --only "$only" "${every[@]}"
            else
                skip "sanitizer $tool on \`$only\`" "compute-sanitizer is not installed"
            fi
        done
    done
    for file in "${files[@]}"; do
        part "repeats of $file, $repeats" 20 "$glmddp" kernels check --file "$file" --repeat "$repeats" "${every[@]}"
    done
fi
finish
