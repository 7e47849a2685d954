#!/usr/bin/env bash
# The crash matrix as a table: runs the test that `scripts/test.sh` runs too (tests/it/crash_matrix.rs), and prints what it has written down.
#
#   scripts/crash_matrix.sh [FILE]      Markdown, to FILE (default: the standard output)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

table=$(mktemp)
trap 'rm -f "$table"' EXIT
GLMDDP_CRASH_MATRIX=$table cargo test --release --locked --test it crash_matrix::crash_matrix_has_no_silent_loss >&2
{
    cat <<'END'
# Crash matrix

    scripts/crash_matrix.sh

A run of two steps on two ranks saves after each and keeps the newest. Something happens to a disk; then a run resumes with `--resume_from_checkpoint latest`, on two ranks or one, or, where
nothing was saved yet, is told so and starts anew. In every case:

- what was made durable before is not lost: the run goes on from the newest checkpoint that is whole, and names those that it passes over;
- it ends with the bits of the adapter that a run has to which nothing happened, and with its last checkpoint whole;
- nothing half-done is left in the folder;
- all ranks give the same error, which names the rank that it is about;
- a checkpoint that a resume goes on from is, byte for byte, one of the undisturbed run.

**Calls** are those of the layer through which all saving goes: mkdir, create, write, fsync, rename, unlink, rmdir, fsync of a folder. They are counted in a run without faults, so that
new ones are covered by themselves. **Lost power** is the calls of that run replayed, up to each of them, on a model of POSIX's rules and no kinder: syncing a file keeps its
content and not its name, syncing a folder keeps the names in it and not its own, a rename is atomic, and what was not synced may be kept or lost each by itself (as in ALICE, Pillai et al. 2014).
A resume is really run once for every different content of the output folder, as it is after the start has cleaned up; the other cases with that content follow from it.
*fine* is a run that goes on to its end: a deletion of an older checkpoint that fails is warned about, loses nothing, and is tried again by the next save or start.
FILE, N and … stand for what differs from case to case.

END
    cat "$table"
} > "${1:-/dev/stdout}"
