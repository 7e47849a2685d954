#!/usr/bin/env bash
# Checkpoints without glmddp: a few steps on 1 and 2 ranks, the optimizer sharded or not; then Python's zstandard and safetensors read the
# checkpoints by the lines of src/checkpoint/FORMAT.md, and PEFT from PyPI the exports. Checkpoint, export and what PEFT loads have equal
# tensors, and so have the runs. At last transformers loads the models that are exported from a base with code and a tokenizer of its own: by
# AutoConfig, AutoModel and AutoTokenizer, from the exported folder alone. Prints a table; the exit status is 1 where anything differs.
#
#   scripts/checkpoint_python.sh [--out DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

out=output/checkpoint_python
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        *) die "unknown argument $1" "scripts/checkpoint_python.sh [--out DIR]" ;;
    esac
    shift 2
done

GLMDDP_VENV_EXTRA="zstandard peft"
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

mkdir -p "$out"
rm -rf "${out:?}"/*
"$glmddp" init-model --preset tiny --output_dir "$out/model" >/dev/null
"$glmddp" demo-data --output_dir "$out/data" --rows 40 >/dev/null

# train NAME COMMAND.. ARGUMENT..: four steps into $out/NAME
train() {
    local run=$1
    shift
    "$@" --model_name_or_path "$out/model" --train_file "$out/data/train.jsonl" --max_source_length 24 --max_target_length 8 \
        --per_device_train_batch_size 1 --global_batch_size 4 --max_steps 4 --save_steps 2 --seed 3 --threads 1 --quiet --output_dir "$out/$run"
}

compare() {
    local method=$1 runs=("$out/$1, 1 rank" "$out/$1, 2 ranks" "$out/$1, 2 ranks, sharded")
    shift
    say "$method: $*"
    train "$method, 1 rank" "$glmddp" train "$@" >&2
    train "$method, 2 ranks" launch/mpirun.sh -n 2 "$glmddp" train "$@" --shard_optimizer false >&2
    train "$method, 2 ranks, sharded" launch/mpirun.sh -n 2 "$glmddp" train "$@" --shard_optimizer true >&2
    "$python" benches/checkpoint_python.py --model "$out/model" "${runs[@]}"
}

compare lora --finetuning_type lora --lora_rank 16 --lora_target all --lora_dropout 0
compare prefix_tuning --finetuning_type prefix_tuning --pre_seq_len 300 --prefix_projection=false
compare ia3 --finetuning_type ia3

say "models as the hub has them"
"$python" benches/hub_folder.py dress "$out/model"
train full "$glmddp" train --finetuning_type full >&2
train full_bf16 "$glmddp" train --finetuning_type full --torch_dtype bfloat16 >&2
train freeze "$glmddp" train --finetuning_type freeze --freeze_trainable_layers 1 >&2
"$glmddp" export --merge --model_name_or_path "$out/model" --adapter "$out/lora, 1 rank/adapter" --output_dir "$out/merged" >&2
"$glmddp" checkpoint export "$out/full/checkpoint-2" --model_name_or_path "$out/model" --output_dir "$out/full_2" >&2
mv "$out/model" "$out/moved" # nothing is loaded from the base
HF_MODULES_CACHE=$(cd "$out" && pwd)/modules "$python" benches/hub_folder.py load \
    "$out/full/adapter" "$out/full_bf16/adapter" "$out/freeze/adapter" "$out/merged" "$out/full_2"
printf '\nall tensors are equal\n'
