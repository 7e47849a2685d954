#!/usr/bin/env bash
# Runs cargo on glmddp with the feature `cuda` so that nothing of CUDA is linked: the binary needs libc alone to start, loads the driver and
# cuBLAS when it uses them, and builds where only nvcc is (scripts/setup_cuda.sh). For checks without a toolkit, and for scripts/bundle.sh.
# With a toolkit, plain `cargo build --features cuda` does the same with CUDA's libraries linked.
#
#   scripts/lean_cuda.sh clippy --release -- -D warnings        # cargo's subcommand and its arguments; without MPI
#
# Two crates are changed, in copies in the cache folder: candle-core asks cudarc for `dynamic-loading` in the place of `dynamic-linking`, and
# candle-kernels builds its PTX without 15 files of quantized and mixture-of-experts kernels, which are never used here, need cudart, and are
# two thirds of the time to build. Cargo writes a patched crate into Cargo.lock; so cargo runs in a folder that has the repository's entries as
# links, and a Cargo.lock of its own: the repository's, without source and checksum of the two. `--locked` then still holds all versions.
set -euo pipefail
# shellcheck source=scripts/setup_cuda.sh
source "$(dirname "$0")/setup_cuda.sh"

patched=(candle-core candle-kernels)

# source_of CRATE: where cargo has unpacked it.
source_of() {
    local manifest
    manifest=$(grep -o "\"manifest_path\":\"[^\"]*/$1-[0-9][^/\"]*/Cargo.toml\"" <<<"$metadata" | head -n 1 | cut -d '"' -f 4)
    [ -n "$manifest" ] || die "cargo metadata does not name the sources of $1"
    dirname "$manifest"
}

# edit FILE TEXT SED: TEXT must be in FILE, so that an edit that no longer fits is noticed.
edit() {
    grep -qF -- "$2" "$1" || die "$1 does not have \`$2\`" "its version has changed: look at what scripts/lean_cuda.sh edits"
    sed -i "$3" "$1"
}

# copy_crates FOLDER: complete or not there.
copy_crates() {
    local draft=$1.partial.$$ crate
    mkdir -p "$draft"
    for crate in "${patched[@]}"; do
        cp -R "$(source_of "$crate")" "$draft/$crate"
    done
    edit "$draft/candle-core/Cargo.toml" '"dynamic-linking"' 's/"dynamic-linking"/"dynamic-loading"/'
    local last='    bindings.write(&ptx_path)?;'
    edit "$draft/candle-kernels/build.rs" "$last" "/^$last\$/q"
    printf '    Ok(())\n}\n' >>"$draft/candle-kernels/build.rs"
    mv -T "$draft" "$1" 2>/dev/null || rm -rf "$draft"
}

# link_tree FOLDER: the repository, with its own Cargo.lock.
link_tree() {
    local entry
    mkdir -p "$1"
    find "$1" -maxdepth 1 -xtype l -delete
    for entry in "$root"/* "$root/.cargo"; do
        case ${entry##*/} in Cargo.lock | target) ;; *) [ -e "$1/${entry##*/}" ] || ln -s "$entry" "$1/" ;; esac
    done
    awk -v names="${patched[*]}" '
        BEGIN { split(names, list, " "); for (i in list) patched["name = \"" list[i] "\""] = 1 }
        /^name = / { skip = $0 in patched }
        skip && /^(source|checksum) = / { next }
        { print }
    ' "$root/Cargo.lock" >"$1/Cargo.lock.draft"
    mv "$1/Cargo.lock.draft" "$1/Cargo.lock"
}

[ $# -gt 0 ] || die "no subcommand of cargo was given" "scripts/lean_cuda.sh build --release"
subcommand=$1
shift

metadata=$(cargo metadata --quiet --locked --format-version 1 --features cuda --manifest-path "$root/Cargo.toml")
version=$(source_of candle-core)
crates=$cache/lean-crates-${version##*/candle-core-}-$(cksum <"$root/scripts/lean_cuda.sh" | cut -d ' ' -f 1)
[ -d "$crates" ] || copy_crates "$crates"
tree=$cache/lean-tree-$(printf '%s' "$root" | cksum | cut -d ' ' -f 1)
link_tree "$tree"
patches=()
for crate in "${patched[@]}"; do
    patches+=(--config "patch.crates-io.$crate.path=\"$crates/$crate\"")
done
# What tests look for beside the repository is not beside its links.
export GLMDDP_SHARED=${GLMDDP_SHARED-$root/../shared}
cd "$tree"
exec cargo "$subcommand" "${patches[@]}" --locked --no-default-features --features cuda "$@"
