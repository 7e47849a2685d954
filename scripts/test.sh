#!/usr/bin/env bash
# The gate: installs what is missing, then formatting, lints, tests, documentation, licences. Continuous integration calls this and
# nothing else. Needs no GPU and nothing beside the clone. The tests first run as if ../shared (rows, a tokenizer and golden values that may not be
# shipped) were not there. If it is there, the tests to which it adds something then run again. Kernels for GPUs are compiled, with the nvcc of
# scripts/setup_cuda.sh. What did not run is counted at the end, with the reason.
#
#   scripts/test.sh               everything; may be run again
#
# GLMDDP_REQUIRE    what may not be skipped, separated by commas: `torch` (PyTorch's benchmarks; installs it where it is missing, 5 GB), `root`
#                   (the rehearsal of the GPU scripts, for which bwrap has to be allowed to make an empty root), and what tests need: `mpi`, `mount`,
#                   `fma`, `clear_refs`, `shared`
#
# All steps use the release profile, so that dependencies are compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

NEXTEST=0.9.143
DENY=0.20.2
is_required() { [[ ,${GLMDDP_REQUIRE:-}, == *,$1,* ]]; }
not_run=()
skip() {
    not_run+=("$1")
    printf '\nNOT RUN: %s\n' "$1" >&2
}

# install_tool COMMAND CRATE@VERSION FLAG...: unoptimised, for a tool that is run once a day (a tenth of the time to build).
install_tool() {
    have "$1" && return
    say "installing $2 into ${CARGO_HOME:-$HOME/.cargo} (some minutes, once)"
    local tools=$CARGO_TARGET_DIR/tools
    env -u RUSTC_WORKSPACE_WRAPPER CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$tools" CARGO_BUILD_BUILD_DIR="$tools" \
        cargo install --locked --debug "${@:2}"
    rm -rf "$tools"
}

# A clone leaves a gigabyte in the cache. What was built from one is deleted after a week, and its folder when the clone is gone.
clean_cache() {
    local own
    for own in "$cache"/clone_*/; do
        [ ! -f "$own/root" ] || [ -d "$(cat "$own/root")" ] || rm -rf "$own"
    done
    [ ! -d "$cache/build" ] || find "$cache/build" -path '*/deps/*' -mtime +7 \
        \( -name 'glmddp-*' -o -name 'libglmddp-*' -o -name 'it-*' -o -name 'fuzz-*' -o -name 'standin-*' \) -delete
}
clean_cache

step() {
    say "$*"
    local started=$SECONDS
    "$@"
    note "($((SECONDS - started)) s)"
}

PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
if have rustup; then
    for part in rustfmt clippy; do
        cargo "${part/rustfmt/fmt}" --version >/dev/null 2>&1 || rustup component add "$part"
    done
fi
install_tool cargo-nextest "cargo-nextest@$NEXTEST" --no-default-features --features default-no-update
install_tool cargo-deny "cargo-deny@$DENY"
have shellcheck || apt_install shellcheck

step cargo fmt --check
step shellcheck --severity=style scripts/*.sh launch/*.sh .ci/run tests/standin/build.sh tests/standin/compute-sanitizer
step cargo clippy --release --locked --all-targets -- -D warnings --cfg "$clone"
step cargo clippy --release --locked --all-targets --no-default-features -- -D warnings --cfg "$clone"
step scripts/lean_cuda.sh clippy --release --all-targets -- -D warnings --cfg "$clone"
step scripts/kernel_table.sh
step env RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --document-private-items

skipped=$(mktemp)
trap 'rm -f "$skipped"' EXIT
tests() { GLMDDP_NOT_RUN=$skipped cargo nextest run --release --locked "$@"; }
# tests_without WORD: the tests that lacked what WORD stands for (tests/it/not_run.rs), each once.
tests_without() { awk -F '\t' -v word="$1" '$1 == word { print $2 }' "$skipped" | sort -u; }
# The first run is a newcomer's, who has nothing beside the clone.
required=,${GLMDDP_REQUIRE:-},
GLMDDP_REQUIRE=${required/,shared,/,} GLMDDP_SHARED='' step tests
mapfile -t without_shared < <(tests_without shared)
if [ -d ../shared ] && [ ${#without_shared[@]} -gt 0 ]; then
    sed -i '/^shared\t/d' "$skipped"
    step tests -E "$(printf 'test(=%s) + ' "${without_shared[@]}")none()"
elif is_required shared && [ ${#without_shared[@]} -gt 0 ]; then
    die "${#without_shared[@]} tests need ../shared, which is not there"
fi
# A line a reason: how many tests did not run, or in part.
while read -r count reason; do not_run+=("$count tests, or parts of them: $reason"); done < <(sort -u "$skipped" | cut -f 3 | sort | uniq -c)
step cargo test --release --locked --doc

# The same profile as the bundle's, so that what it depends on is compiled once.
step scripts/lean_cuda.sh test --profile bundle --lib cuda
step scripts/lean_cuda.sh test --profile bundle --test standin
rehearse() {
    say "scripts/gpu_rehearsal.sh $*"
    local status=0
    scripts/gpu_rehearsal.sh "$@" || status=$?
    case $status in
        0) ;;
        77) if is_required root; then die "bwrap may not make an empty root here"; else skip "scripts/gpu_rehearsal.sh $* (bwrap may not make an empty root)"; fi ;;
        *) die "scripts/gpu_rehearsal.sh $* failed" ;;
    esac
}
rehearse
if is_required torch || [ -x "$cache/venv-torch-2.11.0/bin/python" ]; then
    rehearse --torch
else
    skip "PyTorch's benchmarks (no PyTorch; GLMDDP_REQUIRE=torch installs it)"
fi

step cargo deny --locked check bans licenses sources
if timeout 120 cargo deny fetch db >/dev/null 2>&1 || compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/*/.git" >/dev/null; then
    step cargo deny --locked --offline check advisories
else
    skip "cargo deny check advisories (the advisory database could not be fetched)"
fi

say "passed in $SECONDS s"
for what in "${not_run[@]}"; do printf 'NOT RUN: %s\n' "$what" >&2; done
