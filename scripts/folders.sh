#!/usr/bin/env bash
# Where downloads and builds go. Sourced by scripts/setup.sh, with $root set; sets $cache, $clone, and what cargo builds with.
#
# Clones share the dependencies that cargo compiled, not what is built from themselves. To cargo the packages of two clones are one and the same:
# in one folder it takes the program of the one for the other's if that is newer than the other's sources. So each clone has a folder for what it
# is made into (CARGO_TARGET_DIR), and a wrapper of the compiler, which does nothing: its path is a part of the names of what it compiles (The Cargo
# Book, "RUSTC_WORKSPACE_WRAPPER"). Before cargo 1.91, which does not know CARGO_BUILD_BUILD_DIR, nothing is shared.
# Clippy puts itself in the place of the wrapper: tell it the clone, `cargo clippy -- --cfg "$clone"`.
set -euo pipefail

: "${root:?source scripts/setup.sh}"
cache=${GLMDDP_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/glmddp}
clone=clone_$(printf '%s' "$root" | cksum | cut -d ' ' -f 1)
own=$cache/$clone
if mkdir -p "$own" 2>/dev/null && [ -w "$own" ]; then
    if [ -z "${CARGO_TARGET_DIR:-}" ]; then export CARGO_BUILD_BUILD_DIR=$cache/build CARGO_TARGET_DIR=$own/target; fi
else
    cache=$root/.cache
    own=$cache/$clone
    mkdir -p "$own"
fi
printf '%s\n' "$root" >"$own/root"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target} RUSTC_WORKSPACE_WRAPPER=$own/rustc
if [ ! -x "$RUSTC_WORKSPACE_WRAPPER" ]; then
    # Whole or not there: another script may start at the same time.
    printf '#!/bin/sh\nexec "$@"\n' >"$own/rustc.$$"
    chmod +x "$own/rustc.$$"
    mv "$own/rustc.$$" "$RUSTC_WORKSPACE_WRAPPER"
fi
