#!/usr/bin/env bash
# Trains a small model a few steps by each method that PEFT can put on a PyTorch ChatGLM2, loads the exported adapters with PEFT from PyPI and
# compares the losses; PEFT then saves the adapters again, to the same tensors.
#
#   scripts/peft_parity.sh [--out DIR] [--tokenizer tokenizer.model] [--train_file train.jsonl]
#
# The rows and the tokenizer are not part of the repository: without the two options they are looked for in ../shared.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

out=output/peft_parity
tokenizer=../shared/chatglm2/tokenizer.model train_file=../shared/data/advertisegen/train.jsonl
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --train_file) train_file=$2 ;;
        *) die "unknown argument $1" "scripts/peft_parity.sh [--out DIR] [--tokenizer FILE] [--train_file FILE]" ;;
    esac
    shift 2
done
for file in "$tokenizer" "$train_file"; do
    if [ ! -f "$file" ]; then
        printf 'NOT RUN: no file %s\n\nhint: give it with --tokenizer or --train_file\n' "$file" >&2
        exit 2
    fi
done

GLMDDP_VENV_EXTRA=peft
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

mkdir -p "$out"
rm -rf "${out:?}"/*
"$python" benches/learning_parity.py model --out "$out/model" --tokenizer "$tokenizer"

# name, then the method's arguments; no dropout, which the two programs would draw differently
compare() {
    local run=$out/$1
    shift
    say "$(basename "$run"): $*"
    "$glmddp" train --model_name_or_path "$out/model" --train_file "$train_file" --max_train_samples 100 \
        --prompt_column content --response_column summary --max_source_length 64 --max_target_length 128 "$@" --lr_scheduler_type constant \
        --per_device_train_batch_size 2 --global_batch_size 4 --max_steps 11 --save_steps 10 --logging_steps 1 \
        --output_dir "$run" --dump_batches "$run-batches.jsonl" --quiet
    "$python" benches/peft_parity.py --model "$out/model" --adapter "$run/checkpoint-10" --log "$run/trainer_log.jsonl" \
        --batches "$run"-batches.jsonl* --step 10
}
compare lora_qkv --finetuning_type lora --lora_dropout 0 --learning_rate 5e-3
compare lora_all --finetuning_type lora --lora_dropout 0 --lora_target all --lora_rank 4 --lora_alpha 16 --learning_rate 5e-3
compare rslora --finetuning_type lora --lora_dropout 0 --use_rslora --learning_rate 5e-3
