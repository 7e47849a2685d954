#!/usr/bin/env bash
# Prints, as Markdown, what each kernel of src/kernels/*.cu takes of a multiprocessor: registers, spills, shared memory, and how many of the
# threads that it could hold it then holds (theoretical occupancy), for each architecture that build.rs compiles for. Needs nvcc, no GPU.
#
#   scripts/kernel_table.sh [NAME.cu ...]      fails when a kernel spills, or does not fit on an architecture
#
# Registers, spills and static shared memory are ptxas' words. Threads of a block are those of KERNEL. Bytes of dynamic shared memory are
# chosen at a launch, so a source names the most that is asked for: `// shared: PATTERN BYTES`, where PATTERN is a shell pattern of kernel
# names and BYTES may be arithmetic; the first that fits counts. A kernel that uses shared memory without such a line is an error.
set -euo pipefail
# shellcheck source=scripts/setup_cuda.sh
source "$(dirname "$0")/setup_cuda.sh"

kernels=$root/src/kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
read -ra architectures <<<"$(sed -n 's/^const ARCHITECTURES: .* = \[\(.*\)\];/\1/p' "$root/build.rs" | tr -d ,)"
[ ${#architectures[@]} -gt 0 ] || die "build.rs names no ARCHITECTURES"
sources=("$@")
[ $# -gt 0 ] || sources=("$kernels"/*.cu)

# facts_of PTX LOG: a line a kernel: name, threads, whether it uses dynamic shared memory, registers, spilled bytes (stores, loads), static shared memory.
facts_of() {
    awk '
        FNR == 1 { file++ }
        file == 1 && /\.entry / { name = $0; sub(/.*\.entry /, "", name); sub(/[( ].*/, "", name) }
        file == 1 && /^\.maxntid / { gsub(/,/, " "); threads[name] = $2 * ($3 ? $3 : 1) * ($4 ? $4 : 1) }
        file == 1 && name != "" && /glmddp_shared/ { dynamic[name] = 1 }
        file == 2 && /Compiling entry function/ { split($0, part, "\x27"); name = part[2]; names[++count] = name }
        file == 2 && /bytes spill stores/ { for (i = 1; i < NF; i++) { if ($(i + 2) == "spill" && $(i + 3) ~ /stores/) st[name] = $i; if ($(i + 2) == "spill" && $(i + 3) ~ /loads/) ld[name] = $i } }
        file == 2 && /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) { if ($(i + 1) ~ /^registers/) regs[name] = $i; if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) smem[name] = $i } }
        END { for (i = 1; i <= count; i++) { n = names[i]; print n, threads[n] + 0, dynamic[n] + 0, regs[n] + 0, st[n] + 0, ld[n] + 0, smem[n] + 0 } }
    ' "$1" "$2" | sort
}

# dynamic_bytes SOURCE KERNEL: as the source says.
dynamic_bytes() {
    local pattern bytes
    while read -r pattern bytes; do
        # shellcheck disable=SC2053 # a pattern is meant
        if [[ $2 == $pattern ]]; then
            echo $((bytes))
            return
        fi
    done < <(sed -n 's|^// shared: ||p' "$1")
    die "$2 uses shared memory, and $1 does not say how much" "add a line \`// shared: $2 BYTES\` with the most that a launch asks for"
}

# Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"): warps, blocks, KiB of shared
# memory in all and of one block; everywhere 65,536 registers, dealt to warps by 256, and 1 KiB of shared memory that a block loses.
# occupancy ARCHITECTURE THREADS REGISTERS SHARED_BYTES: percent and blocks, or nothing where it does not fit.
occupancy() {
    awk -v arch="$1" -v threads="$2" -v registers="$3" -v shared="$4" '
        function least(a, b) { return a < b ? a : b }
        BEGIN {
            limits["80"] = "64 32 164 163"; limits["89"] = "48 24 100 99"; limits["90"] = "64 32 228 227"
            if (split(limits[arch], limit, " ") != 4 || threads == 0 || shared > limit[4] * 1024) exit
            warps = int((threads + 31) / 32)
            of_warp = int((registers * 32 + 255) / 256) * 256
            of_block = int((shared + 1024 + 127) / 128) * 128
            blocks = least(limit[2], int(limit[1] / warps))
            blocks = least(blocks, int(int(65536 / of_warp / 4) * 4 / warps))
            blocks = least(blocks, int(limit[3] * 1024 / of_block))
            if (blocks > 0) printf "%.0f %% (%d)", 100 * blocks * warps / limit[1], blocks
        }'
}

bad=()
head="| kernel | threads | shared memory: static, dynamic (bytes) |"
rule="| --- | ---: | ---: |"
for arch in "${architectures[@]}"; do
    head+=" sm_$arch: registers | spilled: stores, loads (bytes) | occupancy (blocks) |"
    rule+=" ---: | ---: | ---: |"
done
printf '%s\n%s\n' "$head" "$rule"
for source in "${sources[@]}"; do
    declare -A cells=() first=()
    names=()
    for arch in "${architectures[@]}"; do
        # The device code alone: what nvcc -fatbin does for this architecture.
        nvcc --options-file "$kernels/nvcc.flags" "-I$kernels" -ptx "-arch=compute_$arch" "$source" -o "$work/kernels.ptx"
        ptxas -v "-arch=sm_$arch" "$work/kernels.ptx" -o "$work/kernels.cubin" 2>"$work/log" || die "ptxas failed: $(cat "$work/log")"
        while read -r name threads uses registers stores loads static; do
            dynamic=0
            [ "$uses" = 0 ] || dynamic=$(dynamic_bytes "$source" "$name")
            share=$(occupancy "$arch" "$threads" "$registers" $((static + dynamic)))
            [ -n "$share" ] || bad+=("$name does not fit on sm_$arch: $threads threads, $registers registers, $((static + dynamic)) bytes of shared memory")
            [ "$stores$loads" = 00 ] || bad+=("$name spills on sm_$arch: $stores bytes stored, $loads loaded")
            [ -n "${first[$name]:-}" ] || names+=("$name")
            first[$name]="| \`$name\` | $threads | $static, $dynamic |"
            cells[$name]+=" $registers | $stores, $loads | ${share:-none} |"
        done < <(facts_of "$work/kernels.ptx" "$work/log")
    done
    for name in "${names[@]}"; do
        printf '%s%s\n' "${first[$name]}" "${cells[$name]}"
    done
done
[ ${#bad[@]} -eq 0 ] || die "$(printf '%s\n' "${bad[@]}")" "fewer values alive at once, or fewer blocks in KERNEL"
