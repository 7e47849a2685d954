#!/usr/bin/env bash
# One command for a machine with a GPU and no compiler, in under nine minutes: is every kernel right there, always the same, and how fast?
#
#   scripts/gpu_check.sh BUNDLE [OUT]     BUNDLE: a folder that scripts/bundle.sh made. OUT (default: benches/results) gets
#                                         DATE-GPU.md, what a person reads, and DATE-GPU/ with what it was made of
#
# 1. glmddp doctor: what the machine has.
# 2. glmddp kernels check: every kernel against the CPU's code at odd sizes and all dtypes, finite differences, products with their epilogues;
#    20 runs of each, equal bits.
# 3. compute-sanitizer (memcheck, racecheck, synccheck) on the small cases, where it is installed.
# 4. glmddp kernels bench: time and share of the machine's own copy and product, at the shapes of ChatGLM2-6B; beside PyTorch's own, if it is there.
# What was not run is said at the end and in the file. Fails when 2 or 3 fail.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bundle=${1:?name the folder that scripts/bundle.sh made}
glmddp=$bundle/bin/glmddp
[ -x "$glmddp" ] || { echo "error: $glmddp is not there; scripts/bundle.sh makes it" >&2 && exit 2; }
date=$(date -u +%Y-%m-%d)
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || { echo "error: nvidia-smi finds no GPU" >&2 && exit 2; }
name=$date-$(tr 'A-Z ' 'a-z-' <<<"$gpu" | tr -cd 'a-z0-9-')
out=${2:-$root/benches/results}
parts=$out/$name
mkdir -p "$parts"
not_run=() failed=()
started=$SECONDS
say() { printf '\n==> %s (%s s so far)\n' "$*" "$((SECONDS - started))" >&2; }

# cuBLAS and its like, where only PyTorch's wheels have them.
if wheels=$(python3 -c 'import nvidia, pathlib; print(pathlib.Path(list(nvidia.__path__)[0]) / "cu13" / "lib")' 2>/dev/null) && [ -d "$wheels" ]; then
    export LD_LIBRARY_PATH=$wheels${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

say "doctor"
"$glmddp" doctor | tee "$parts/doctor.txt" || failed+=("glmddp doctor")

say "every kernel against the CPU's code"
timeout 240 "$glmddp" kernels check --repeat 20 | tee "$parts/check.txt" || failed+=("glmddp kernels check")

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        say "compute-sanitizer $tool"
        : >"$parts/$tool.txt"
        # The memory-bound kernels' smallest cases, and attention with a prefix over three rows.
        for only in '[1, 64]' 'rows: [31, 1, 33], prefix: 1,'; do
            timeout 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$glmddp" kernels check --repeat 1 --only "$only" >>"$parts/$tool.txt" 2>&1 ||
                failed+=("compute-sanitizer $tool on cases with \`$only\`")
        done
        grep -h 'ERROR SUMMARY' "$parts/$tool.txt" || true
    done
else
    not_run+=("compute-sanitizer: it is not installed")
fi

say "times"
timeout 120 "$glmddp" kernels bench --json >"$parts/bench.json" || failed+=("glmddp kernels bench")
torch=()
if python3 -c 'import torch' 2>/dev/null; then
    say "PyTorch's times"
    if timeout 180 python3 "$root/scripts/kernels_torch.py" >"$parts/torch.json"; then torch=(--torch "$parts/torch.json"); else not_run+=("PyTorch's times: the script failed"); fi
else
    not_run+=("PyTorch's times: it is not installed")
fi

{
    printf '# %s: kernels on %s\n\n    scripts/gpu_check.sh %s\n\n' "$date" "$gpu" "$(basename "$bundle")"
    printf 'Commit %s; %s s.\n\n' "$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)" "$((SECONDS - started))"
    for what in "${failed[@]}"; do printf -- '- FAILED: %s\n' "$what"; done
    for what in "${not_run[@]}"; do printf -- '- NOT RUN: %s\n' "$what"; done
    printf '\n## Results\n```text\n'
    cat "$parts/check.txt"
    printf '```\n\n## Times\n'
    "$glmddp" kernels report "$parts/bench.json" "${torch[@]}"
    printf '\n## Machine\n```text\n'
    cat "$parts/doctor.txt"
    printf '```\n'
} >"$out/$name.md"
say "$out/$name.md"
for what in "${not_run[@]}"; do printf 'NOT RUN: %s\n' "$what" >&2; done
[ ${#failed[@]} = 0 ] || { printf 'FAILED: %s\n' "${failed[@]}" >&2 && exit 1; }
