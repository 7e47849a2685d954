#!/usr/bin/env bash
# Plants errors into the kernels one at a time and prints, as Markdown, what finds each of them on the host: the checked
# stand-in of tests/standin, or a case. Fails when one is found by nothing and not explained. All of them take some minutes; those of device.cuh are a part of the tests.
#
#   scripts/mutate_kernels.sh [NAME]       the errors of src/kernels/NAME.cu, or of all files
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

output=$(scripts/lean_cuda.sh test --profile bundle --test standin -- --include-ignored --nocapture "${1:+mutations::$1}_planted_errors_are_found" 2>&1) || {
    printf '%s\n' "$output" >&2
    die "not every planted error is found, or the tests could not be built"
}
printf '| file | was | became | found by |\n| --- | --- | --- | --- |\n'
grep '^| ' <<<"$output" | sort
printf '\n%s errors, %s of them found by nothing\n' "$(grep -c '^| ' <<<"$output")" "$(grep -c '| survives: ' <<<"$output" || true)"
