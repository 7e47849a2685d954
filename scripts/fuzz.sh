#!/usr/bin/env bash
# Reads hostile files for as long as wanted: the targets of tests/fuzz with a seed of their own, and with arithmetic that ends at an
# overflow instead of wrapping. Prints a line a target: executions, what was accepted, memory, the slowest input.
#
#   scripts/fuzz.sh                        a minute a target
#   scripts/fuzz.sh --seconds 600 pickle   ten minutes on the targets with `pickle` in their tests' names
#   scripts/fuzz.sh --seed 7               other inputs (default: the day's date)
#
# An input that breaks a promise is kept below the build folder's tmp/fuzz-longer, and the line names it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

seconds=60
seed=$(date +%Y%m%d)
filters=()
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=${2:?--seconds needs a number} && shift 2 ;;
        --seed) seed=${2:?--seed needs a number} && shift 2 ;;
        -*) die "unknown option $1" "see the first lines of scripts/fuzz.sh" ;;
        *) filters+=("$1") && shift ;;
    esac
done

say "seed $seed, $seconds s a target"
# Of this package alone: the dependencies stay as they are compiled.
GLMDDP_FUZZ_SECONDS=$seconds GLMDDP_FUZZ_SEED=$seed RUST_BACKTRACE=${RUST_BACKTRACE:-0} cargo test --release --locked --test fuzz \
    --config 'profile.release.package.glmddp.overflow-checks=true' \
    --config 'profile.release.package.glmddp.debug-assertions=true' \
    -- --test-threads=1 --nocapture "${filters[@]}" 2>&1 | grep --invert-match --extended-regexp '^(test |running |ok$|$)'
