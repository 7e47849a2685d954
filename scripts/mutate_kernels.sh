#!/usr/bin/env bash
# Plants errors into the kernels one at a time and prints, as Markdown, what finds each of them on the host: the shim or a case. The same
# errors are a part of the tests, which fail when one is found by nothing and not explained.
#
#   scripts/mutate_kernels.sh [NAME]       the errors of src/kernels/NAME.cu, or of all files
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

output=$(cargo test --release --locked --test kernels -- "${1:-}" --nocapture planted 2>&1) || {
    printf '%s\n' "$output" >&2
    die "not every planted error is found, or the tests could not be built"
}
printf '| file | was | became | found by |\n| --- | --- | --- | --- |\n'
grep '^| ' <<<"$output" | sort
printf '\n%s errors, %s of them found by nothing\n' "$(grep -c '^| ' <<<"$output")" "$(grep -c '| survives: ' <<<"$output" || true)"
