#!/usr/bin/env bash
# Trains the same small model on the same batches with glmddp and with PyTorch, and compares the two loss curves: 200 steps on 500 rows of
# AdvertiseGen, every step within 2 %, the mean of the last ten within 0.5 %.
#
#   scripts/learning_parity.sh [--steps 200] [--ranks 1] [--out DIR] [--tokenizer tokenizer.model] [--train_file train.jsonl]
#
# The rows and the tokenizer are not part of the repository: without the two options they are looked for in ../shared.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

steps=200 ranks=1 out=output/learning_parity
tokenizer=../shared/chatglm2/tokenizer.model train_file=../shared/data/advertisegen/train.jsonl
while [ $# -gt 0 ]; do
    case $1 in
        --steps) steps=$2 ;;
        --ranks) ranks=$2 ;;
        --out) out=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --train_file) train_file=$2 ;;
        *) die "unknown argument $1" "scripts/learning_parity.sh [--steps N] [--ranks N] [--out DIR] [--tokenizer FILE] [--train_file FILE]" ;;
    esac
    shift 2
done
for file in "$tokenizer" "$train_file"; do
    if [ ! -f "$file" ]; then
        printf 'NOT RUN: no file %s\n\nhint: give it with --tokenizer or --train_file\n' "$file" >&2
        exit 2
    fi
done

# shellcheck source=scripts/venv.sh
source scripts/venv.sh
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

mkdir -p "$out"
rm -rf "$out/model" "$out/run" "$out"/batches.jsonl*
head -n 500 "$train_file" >"$out/rows.jsonl"
"$python" benches/learning_parity.py model --out "$out/model" --tokenizer "$tokenizer"

say "glmddp: $steps steps on $ranks rank(s)"
launch/mpirun.sh -n "$ranks" "$glmddp" train --model_name_or_path "$out/model" --train_file "$out/rows.jsonl" \
    --prompt_column content --response_column summary --max_source_length 64 --max_target_length 128 \
    --pre_seq_len 128 --prefix_dropout 0 --learning_rate 2e-2 --lr_scheduler_type linear --warmup_steps 0 \
    --per_device_train_batch_size 2 --global_batch_size 4 --max_steps "$steps" --logging_steps 1 --seed 42 \
    --output_dir "$out/run" --dump_initial "$out/initial.safetensors" --dump_batches "$out/batches.jsonl"

say "PyTorch on the same batches, and the comparison"
"$python" benches/learning_parity.py compare --model "$out/model" --prefix "$out/initial.safetensors" \
    --batches "$out"/batches.jsonl* --log "$out/run/trainer_log.jsonl" --learning_rate 2e-2 --json "$out/curves.json"
