#!/usr/bin/env bash
# For a machine with a GPU, without Rust and network: how fast are the kernels there, beside PyTorch's, and how fast does PyTorch train? Started
# from the folder that scripts/gpu_pack.sh makes. What PyTorch does is "not run" where it is not installed.
#
#   gpu_bench.sh [--quick | --rest] [--small] [--out FOLDER] [--seconds N] [--part-seconds N]
#
# --quick     glmddp's kernels and products at the shapes of ChatGLM2-6B; PyTorch's; PyTorch's training steps with P-Tuning v2, as THUDM trains,
#             padded at its best, packed: at most 195 s
# --rest      the same steps with LoRA, and what they need with recompute: at most 125 s; without either: all
# --small     small shapes, PyTorch on the CPU, to rehearse: the times say nothing
# --out       where bench-quick.md (bench-rest.md, bench-all.md), log.txt, kernels.jsonl, torch.json and steps.jsonl go (default: here)
# --seconds, --part-seconds    other limits of all parts together, and of each
#
# Parts come in the order of what they tell; each is a process of its own with a time-out, and the report is written after each. What was not run
# is said; the exit status is 1 where a part failed.
set -euo pipefail
# shellcheck source=scripts/gpu_parts.sh
source "$(dirname "$0")/gpu_parts.sh"
options "$@"

# tables: prints what was measured so far.
tables() {
    if [ -s "$out/kernels.jsonl" ] && is quick; then
        local torch=()
        [ ! -s "$out/torch.json" ] || torch=(--torch "$out/torch.json")
        printf '\n## Kernels\n'
        # PyTorch's file may have been cut off.
        "$glmddp" kernels report "$out/kernels.jsonl" "${torch[@]}" || "$glmddp" kernels report "$out/kernels.jsonl" || echo "Unreadable."
    fi
    if [ -s "$out/steps.jsonl" ]; then
        printf "\n## PyTorch's training steps\n"
        python3 "$here/torch_table.py" "$out/steps.jsonl" || cat "$out/steps.jsonl"
    fi
}

begin bench 195 125
# torch.compile asks for a name of the user, which a container need not have.
export USER=${USER:-nobody} PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
has_torch=''
# Not by importing it, which takes seconds.
if python3 -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then has_torch=1; fi

kernels_torch=() shape=() check=() flex=flex compile=layer
if [ ${#small[@]} -gt 0 ]; then
    kernels_torch=(--device cpu --shape small) check=(--device cpu)
    shape=(--device cpu --dtype float32 --layers 2 --hidden 64 --ffn 136 --heads 4 --groups 2 --kv 16 --vocab 512 --pre 8
        --seq 48 --batch 4 --pack-tokens 128 --steps 3 --warmup 1 --no-peak)
    # On a CPU flex_attention has no backward pass, and compiling takes longer than all the rest.
    flex=packed_mask compile=none
fi

# torch_part: as part, where PyTorch is.
torch_part() {
    if [ -n "$has_torch" ]; then part "$@"; else skip "$1" "PyTorch is not installed"; fi
}

# steps PART LIMIT OPTION...: the timed steps take a quarter of the time, the rest is for weights, compilation and warm-up.
steps() {
    torch_part "$1" "$2" --json "$out/steps.jsonl" \
        python3 "$here/bench_torch_gpu.py" --tokens "$here/tokens.json" --seconds "$(($2 / 4))" "${@:3}" "${shape[@]}"
}

thudm=(--ckpt 1 --attn mask --logits all --pad max --batch 24)
padded=(--attn causal_lr --logits labels --pad batch --compile "$compile" --batch 16)
packed=(--attn "$flex" --logits labels --pad packed --compile "$compile")

if is quick; then
    rm -f "$out"/{kernels.jsonl,torch.json,steps.jsonl}
    part "kernels of glmddp" 40 --json "$out/kernels.jsonl" "$glmddp" kernels bench --json "${small[@]}"
    clocks
    torch_part "kernels of PyTorch" 60 --json "$out/torch.json" python3 "$here/kernels_torch.py" "${kernels_torch[@]}"
    # Keys that are repeated for each head give flex_attention's backward pass more to do at once; stored once they take less memory.
    steps "steps of PyTorch, P-Tuning v2, packed" 90 "${packed[@]}" --gqa 0
    steps "steps of PyTorch, P-Tuning v2, as THUDM trains" 40 "${thudm[@]}"
    steps "steps of PyTorch, P-Tuning v2, padded" 60 "${padded[@]}"
fi
if is rest; then
    steps "steps of PyTorch, LoRA, packed" 60 --lora 8 "${packed[@]}"
    steps "steps of PyTorch, LoRA, as THUDM trains" 40 --lora 8 "${thudm[@]}"
    steps "steps of PyTorch, P-Tuning v2, packed, keys stored once" 60 "${packed[@]}" --gqa 1
    steps "steps of PyTorch, P-Tuning v2, packed, recomputed" 60 "${packed[@]}" --gqa 0 --ckpt 1
    # What is measured above also has to be right.
    torch_part "golden case of PyTorch" 60 python3 "$here/bench_torch_gpu.py" --check "$here/golden/case2" --only packed "${check[@]}"
fi
finish
