#!/usr/bin/env bash
# Adapters between glmddp and the libraries that users have, PEFT and AdapterHub's adapters from PyPI, in both directions and for every method:
# a small model is trained a few steps by glmddp and the library puts what it exports on a PyTorch ChatGLM2, to glmddp's own loss, and saves it
# again, to the same tensors; then the libraries save adapters with random values, and `glmddp evaluate` gives PyTorch's loss with them.
#
#   scripts/peft_parity.sh [--out DIR] [--tokenizer tokenizer.model] [--train_file train.jsonl] [--only NAME,..]
#
# --only takes names of the first direction (`lora_qkv`) and `foreign`, all of the second. All are tried; the exit status is 1 where one failed.
# The rows and the tokenizer are not part of the repository: without the two options they are looked for in ../shared.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

out=output/peft_parity only=
tokenizer=../shared/chatglm2/tokenizer.model train_file=../shared/data/advertisegen/train.jsonl
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --train_file) train_file=$2 ;;
        --only) only=$2 ;;
        *) die "unknown argument $1" "scripts/peft_parity.sh [--out DIR] [--tokenizer FILE] [--train_file FILE] [--only NAME,..]" ;;
    esac
    shift 2
done
for file in "$tokenizer" "$train_file"; do
    if [ ! -f "$file" ]; then
        printf 'NOT RUN: no file %s\n\nhint: give it with --tokenizer or --train_file\n' "$file" >&2
        exit 2
    fi
done

GLMDDP_VENV_EXTRA="peft adapters"
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

mkdir -p "$out"
rm -rf "${out:?}"/*
# --std: with matrices as small as usual attention hardly looks at positions, and a wrong one would not show
"$python" benches/learning_parity.py model --out "$out/model" --tokenizer "$tokenizer" --std 0.1
head -n 8 "$train_file" > "$out/rows.jsonl"

passed=() failed=()
wanted() {
    [ -z "$only" ] || [[ ,$only, == *,$1,* ]]
}

steps=11
train() {
    local run=$out/$1
    shift
    "$glmddp" train --model_name_or_path "$out/model" --train_file "$train_file" --max_train_samples 100 \
        --prompt_column content --response_column summary --max_source_length 64 --max_target_length 128 "$@" --lr_scheduler_type constant \
        --per_device_train_batch_size 2 --global_batch_size 4 --max_steps "$steps" --save_steps 10 --logging_steps 1 \
        --output_dir "$run" --dump_batches "$run-batches.jsonl" --quiet
}

read_by_library() {
    local run=$out/$1
    shift
    "$python" benches/peft_parity.py exported --model "$out/model" --adapter "$run/checkpoint-10" --log "$run/trainer_log.jsonl" \
        --batches "$run"-batches.jsonl* --step 10 "$@"
}

# name, then the method's arguments; no dropout, which the two programs would draw differently
compare() {
    local name=$1
    shift
    wanted "$name" || return 0
    say "$name: $*"
    if train "$name" "$@" && read_by_library "$name" "${fused[@]}"; then passed+=("$name"); else failed+=("$name"); fi
}
fused=()

# A method that trains the base exports a model of its own, at a run's end alone: of a second run, which stops a step earlier
compare_model() {
    local name=$1
    shift
    wanted "$name" || return 0
    say "$name: $*"
    if train "$name" "$@" && steps=10 train "$name-10" "$@" &&
        "$python" benches/peft_parity.py exported --model "$out/model" --adapter "$out/$name-10/adapter" --log "$out/$name/trainer_log.jsonl" \
            --batches "$out/$name"-batches.jsonl* --step 10; then
        passed+=("$name")
    else
        failed+=("$name")
    fi
    rm -rf "$out/$name"/checkpoint-* "$out/$name-10"/checkpoint-* # the state of all weights
}

lora=(--finetuning_type lora --lora_dropout 0 --learning_rate 5e-3)
compare lora_qkv "${lora[@]}"
compare lora_all "${lora[@]}" --lora_target all --lora_rank 4 --lora_alpha 16
compare lora_regex "${lora[@]}" --lora_target '.*layers\.[13]\.(self_attention\.query_key_value|mlp\.dense_4h_to_h)'
compare rslora "${lora[@]}" --use_rslora
compare dora "${lora[@]}" --use_dora
compare dora_rslora_all "${lora[@]}" --use_dora --use_rslora --lora_target all --lora_rank 4
compare prefix_tuning --finetuning_type prefix_tuning --pre_seq_len 8 --learning_rate 1e-2
compare prefix_tuning_plain --finetuning_type prefix_tuning --pre_seq_len 8 --prefix_projection=false --learning_rate 2e-2
compare ptuning_v2 --finetuning_type ptuning_v2 --pre_seq_len 8 --prefix_dropout 0 --learning_rate 2e-2
compare prompt_tuning_random --finetuning_type prompt_tuning --num_virtual_tokens 8 --prompt_init random --learning_rate 2e-2
compare prompt_tuning_vocab --finetuning_type prompt_tuning --num_virtual_tokens 8 --prompt_init vocab --learning_rate 1e-1
p_tuning=(--finetuning_type p_tuning --num_virtual_tokens 8 --learning_rate 1e-2)
compare p_tuning_lstm "${p_tuning[@]}" --encoder_reparameterization_type LSTM --encoder_hidden_size 32
compare p_tuning_mlp "${p_tuning[@]}" --encoder_reparameterization_type MLP --encoder_hidden_size 32
compare ia3 --finetuning_type ia3 --learning_rate 1e-1
adapter=(--finetuning_type adapter --learning_rate 5e-3)
compare adapter_houlsby "${adapter[@]}" --adapter_config houlsby --reduction_factor 16 --adapter_name house
compare adapter_pfeiffer "${adapter[@]}" --adapter_config pfeiffer --reduction_factor 16 --adapter_name ads
if wanted adapter_fusion; then
    say "adapter_fusion: a second adapter to fuse"
    trained=("$out/adapter_pfeiffer/adapter" "$out/adapter_second/adapter")
    [ -d "${trained[0]}" ] || train adapter_pfeiffer "${adapter[@]}" --adapter_config pfeiffer --reduction_factor 16 --adapter_name ads || true
    if train adapter_second "${adapter[@]}" --adapter_config pfeiffer --reduction_factor 8 --adapter_name news --seed 7; then
        fused=(--fused "${trained[@]}")
        compare adapter_fusion --finetuning_type adapter_fusion --fusion_adapters "${trained[0]},${trained[1]}" --learning_rate 1e-3
        fused=()
    else
        failed+=(adapter_fusion)
    fi
fi

compare_model freeze --finetuning_type freeze --freeze_trainable_layers 2 --learning_rate 1e-3
compare_model full --finetuning_type full --learning_rate 1e-3

if wanted foreign; then
    say "adapters that the libraries save, read by glmddp"
    if "$python" benches/peft_parity.py foreign --glmddp "$glmddp" --model "$out/model" --rows "$out/rows.jsonl" --out "$out/foreign"; then
        passed+=(foreign)
    else
        failed+=(foreign)
    fi
fi

[ $((${#passed[@]} + ${#failed[@]})) -gt 0 ] || die "--only $only names nothing that is compared" "the names are those of the calls of compare in $0, and foreign"
printf '%s passed: %s\n' "${#passed[@]}" "${passed[*]}"
if [ ${#failed[@]} -gt 0 ]; then
    printf '%s failed: %s\n' "${#failed[@]}" "${failed[*]}"
    exit 1
fi
