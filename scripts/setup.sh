#!/usr/bin/env bash
# Makes sure that what a build needs is there: a C compiler, libclang and clang (bindgen), Open MPI, cargo.
# Installs only what is missing, with apt-get (as root or through sudo) and rustup, and says so; does nothing when all is there.
#
#   scripts/setup.sh              run by itself: checks and installs
#   source scripts/setup.sh       the same, and leaves cargo on PATH and what cargo builds with set for what follows
#
# GLMDDP_CACHE_DIR    what a second clone can use again: downloads, and compiled dependencies when CARGO_TARGET_DIR is not set (default:
#                     $XDG_CACHE_HOME/glmddp or ~/.cache/glmddp); where it cannot be written, builds go to ./target and the rest to ./.cache
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
    printf '\nerror: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# apt_install PACKAGE...: installs Debian packages, or says what a person has to do.
apt_install() {
    local sudo=()
    have apt-get || die "these are missing and there is no apt-get to install them: $*" \
        "install a C compiler, clang with libclang, and Open MPI with its headers (mpicc, mpirun) by your system's means"
    if [ "$(id -u)" != 0 ]; then
        have sudo || die "these packages are missing, and this is neither root nor is there sudo: $*" \
            "ask someone who may: apt-get install --no-install-recommends $*"
        sudo=(sudo)
    fi
    say "installing $*"
    "${sudo[@]}" apt-get update -q >&2
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=600 "$@" >&2
}

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null ||
        compgen -G '/usr/lib*/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*-linux-gnu/libclang*.so*' >/dev/null
}

install_system_packages() {
    local missing=()
    have cc || missing+=(gcc libc6-dev)
    have clang || missing+=(clang)
    have_libclang || missing+=(libclang-dev)
    have mpicc || [ -n "${MPICC:-}" ] || missing+=(libopenmpi-dev)
    have mpirun || missing+=(openmpi-bin)
    if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
}

# at_least WANTED FOUND: compares dotted versions.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

install_cargo() {
    if ! have cargo && [ -r "$HOME/.cargo/env" ]; then
        # shellcheck source=/dev/null
        . "$HOME/.cargo/env"
    fi
    if ! have cargo; then
        have curl || apt_install curl ca-certificates
        say "installing Rust with rustup (into ${CARGO_HOME:-$HOME/.cargo})"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal >&2 ||
            die "rustup could not be installed" "install Rust by hand (https://rustup.rs) and run this again"
        # shellcheck source=/dev/null
        . "${CARGO_HOME:-$HOME/.cargo}/env"
    fi
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    found=$(cargo --version | awk '{print $2}')
    at_least "$wanted" "$found" || die "cargo is $found, and glmddp needs $wanted or newer" "rustup update stable"
}

install_system_packages
install_cargo
# shellcheck source=scripts/folders.sh
source "$root/scripts/folders.sh"
say "tool chain: $(cargo --version), $(mpirun --version 2>/dev/null | head -n 1); builds go to $CARGO_TARGET_DIR"
