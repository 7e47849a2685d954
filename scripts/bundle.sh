#!/usr/bin/env bash
# Makes one folder, and an archive of it, that runs glmddp on a machine with nothing but NVIDIA's driver and cuBLAS (from the system, from
# wheels, or put into lib/): the binary with kernels for all architectures, licences, a README. Without MPI. Needs nvcc here, no GPU.
#
#   scripts/bundle.sh [FOLDER]     FOLDER/glmddp-VERSION-cudaX.Y-ARCH and the same with .tar.gz (default: bundle/ in the folder of builds);
#                                  prints the folder's path as the last line of stdout
#
# It then starts the binary in an empty root that has the C library alone, and fails where that does not work or the archive is too large.
set -euo pipefail
# shellcheck source=scripts/setup_cuda.sh
source "$(dirname "$0")/setup_cuda.sh"

MAX_MB=20
profile=bundle
say "building the binary"
"$root/scripts/lean_cuda.sh" build --profile "$profile"
binary=$CARGO_TARGET_DIR/$profile/glmddp

# Of all that is loaded at the start only the C library may be there.
mapfile -t needed < <(objdump -p "$binary" | awk '$1 == "NEEDED" { print $2 }')
for library in "${needed[@]}"; do
    case $library in libc.so.* | libm.so.* | libgcc_s.so.* | libdl.so.* | libpthread.so.* | librt.so.* | ld-linux*) ;; *) die "$binary needs $library to start" ;; esac
done
glibc=$(objdump -T "$binary" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1 | cut -d _ -f 2)

version=$("$binary" --version | awk '{ print $2 }')
cuda=$(nvcc --version | sed -n 's/.*, release \([0-9.]*\),.*/\1/p')
name=glmddp-$version-cuda$cuda-$(uname -m)
out=${1:-$CARGO_TARGET_DIR/$profile}
folder=$out/$name
rm -rf "$folder" "$folder.tar.gz"
mkdir -p "$folder/bin" "$folder/lib"
cp "$binary" "$folder/bin/"
cp -R "$root/LICENSE" "$root/configs" "$folder/"

# NCCL's file is called libnccl.so.2, and cudarc's loader asks for libnccl.so. A link would need to know where it is; a library without content
# that needs libnccl.so.2 sends the loader to wherever that is found. `nothing` is there to link against.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nothing=$work/libnccl.so.2
cc -shared -Wl,-soname,libnccl.so.2 -o "$nothing" -x c /dev/null
cc -shared -s -Wl,--no-as-needed -o "$folder/lib/libnccl.so" -x c /dev/null -x none "$nothing"
# A line a crate; the folders of this machine are left out.
"$root/scripts/lean_cuda.sh" tree --edges normal --prefix none --format '{p} | {l} | {r}' |
    sed -e 's| (/[^)]*)||' -e 's| (\*)||' -e 's| (proc-macro)||' | grep -v '^glmddp ' | sort -u >"$folder/THIRD_PARTY.txt"
cat >"$folder/README.md" <<README
# glmddp $version, CUDA $cuda, $(uname -m)

Fine-tunes ChatGLM2-6B on one device; this build is without MPI. Start it where it lies:

    bin/glmddp doctor        # what this machine has, what is missing, how to get it
    bin/glmddp train --help

It needs Linux with glibc $glibc or newer and, for a GPU, NVIDIA's driver for CUDA $cuda or newer and a GPU of compute capability 8.0 or higher. cuBLAS,
cuBLASLt, cuRAND and (for more than one GPU) NCCL are looked for in \`lib/\`, on LD_LIBRARY_PATH and where the system has them; PyTorch's wheels have them in \`nvidia/cu13/lib\` and \`nvidia/nccl/lib\`.

Licence: Apache-2.0 (LICENSE). What is linked in has the licences that THIRD_PARTY.txt names.
README
tar -C "$out" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}" \
    -c "$name" | gzip -n -9 >"$folder.tar.gz"

say "starting it in an empty root: the archive, the C library, nothing else"
bare=$work/root
mkdir "$bare"
tar -C "$bare" -xzf "$folder.tar.gz"
ldd "$binary" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$bare$(dirname "$library")"
    cp -L "$library" "$bare$library"
done
enter=("$(PATH=$PATH:/usr/sbin:/sbin command -v chroot)")
[ "$(id -u)" = 0 ] || enter=("$(command -v unshare)" --map-root-user "${enter[@]}")
env -i "${enter[@]}" "$bare" "/$name/bin/glmddp" doctor >"$bare/doctor" || die "the bundle does not start in an empty root"
grep -q '^CUDA build  *ok ' "$bare/doctor" || die "the bundle's doctor does not say that it was built with CUDA: $(cat "$bare/doctor")"
cat "$bare/doctor" >&2

megabytes=$(($(stat -c %s "$folder.tar.gz") / 1000000))
[ "$megabytes" -lt "$MAX_MB" ] || die "the archive has $megabytes MB, and is to have less than $MAX_MB"
say "$folder.tar.gz: $(stat -c %s "$folder.tar.gz") bytes; the binary: $(stat -c %s "$folder/bin/glmddp"); glibc $glibc or newer"
echo "$folder"
