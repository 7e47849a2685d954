#!/usr/bin/env bash
# Makes one folder with all that gpu_check.sh and gpu_bench.sh need on a machine with a GPU, without Rust and network: the bundle of
# scripts/bundle.sh, these scripts, PyTorch's benchmarks, a golden case, rows of tokens. Needs nvcc here, no GPU.
#
#   scripts/gpu_pack.sh [--tokens FILE] [FOLDER]     FOLDER: default gpu/ in the clone, which git ignores
#
# --tokens    rows for PyTorch's training steps: JSON, [[ids of the prompt, ids of the answer], ...]. They are not part of the repository: without
#             the option they are looked for in ../shared, and where there are none the steps use random ids in rows of AdvertiseGen's lengths.
#
# There (the bench is worth having where a check failed, too; each line leaves at most 6 files in RESULTS):
#   bash FOLDER/gpu_check.sh --quick --out RESULTS; bash FOLDER/gpu_bench.sh --quick --out RESULTS     # under 300 s
#   bash FOLDER/gpu_check.sh --rest --out RESULTS; bash FOLDER/gpu_bench.sh --rest --out RESULTS       # under 300 s
set -euo pipefail
# shellcheck source=scripts/setup_cuda.sh
source "$(dirname "$0")/setup_cuda.sh"

MAX_MIB=60
tokens=$root/../shared/reference/adgen_tokens.json
to=$root/gpu
while [ $# -gt 0 ]; do
    case $1 in
        --tokens)
            tokens=${2:?--tokens needs a file}
            [ -f "$tokens" ] || die "there is no file $tokens"
            shift
            ;;
        -*) die "unknown argument $1" "scripts/gpu_pack.sh [--tokens FILE] [FOLDER]" ;;
        *) to=$1 ;;
    esac
    shift
done

bundle=$("$root/scripts/bundle.sh" | tail -n 1)
rm -rf "$to"
mkdir -p "$to/golden"
cp -R "$bundle" "$to/bundle"
cp "$root"/scripts/gpu_{parts,check,bench}.sh "$root/scripts/kernels_torch.py" "$root"/benches/{bench_torch_gpu,torch_chatglm2,torch_table}.py "$to/"
# What bench_torch_gpu.py --check reads of a case.
mkdir "$to/golden/case2"
cp -R "$root"/tests/golden/case2/{hf,inputs.safetensors,ptuning.safetensors} "$to/golden/case2/"
if [ -f "$tokens" ]; then cp "$tokens" "$to/tokens.json"; else note "no rows of tokens: PyTorch's steps will use random ids"; fi
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || commit="$commit, with changes"
echo "$commit" >"$to/commit"

mib=$(($(du -sk "$to" | cut -f 1) / 1024))
[ "$mib" -le "$MAX_MIB" ] || die "$to has $mib MiB, and may have $MAX_MIB"
say "$to: $mib MiB"
