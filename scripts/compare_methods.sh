#!/usr/bin/env bash
# Every tuning method on one small pretrained base: the table and the picture of benches/results/*-methods.md.
#
#   scripts/compare_methods.sh [--out DIR] [--tokenizer tokenizer.model] [--data DIR] [--ranks N]
#
# AdvertiseGen's rows (train.jsonl, dev.jsonl in --data) and the tokenizer are not part of the repository: without the options they are
# looked for in ../shared. A base of 4 layers first learns the adverts of tops and trousers by full tuning, and two adapters learn one garment
# each, for AdapterFusion; then every method tunes that base to skirts, which it has never seen. May be run again: it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

out=output/compare_methods ranks=2
tokenizer=../shared/chatglm2/tokenizer.model data=../shared/data/advertisegen
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --data) data=$2 ;;
        --ranks) ranks=$2 ;;
        *) die "unknown argument $1" "scripts/compare_methods.sh [--out DIR] [--tokenizer FILE] [--data DIR] [--ranks N]" ;;
    esac
    shift 2
done
for file in "$tokenizer" "$data/train.jsonl" "$data/dev.jsonl"; do
    if [ ! -f "$file" ]; then
        printf 'NOT RUN: no file %s\n\nhint: give it with --tokenizer or --data\n' "$file" >&2
        exit 2
    fi
done
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

mkdir -p "$out/rows"
[ -d "$out/model" ] || "$glmddp" init-model --preset small --num_layers 4 --tokenizer "$tokenizer" --output_dir "$out/model"
for part in train dev; do
    grep '类型#裙' "$data/$part.jsonl" >"$out/rows/skirts-$part.jsonl"
    grep -v '类型#裙' "$data/$part.jsonl" >"$out/rows/others-$part.jsonl"
    grep '类型#上衣' "$data/$part.jsonl" >"$out/rows/tops-$part.jsonl"
    grep '类型#裤' "$data/$part.jsonl" >"$out/rows/trousers-$part.jsonl"
done

# run NAME ROWS STEPS ARGUMENT...: trains into $out/NAME unless that is done.
run() {
    local name=$1 rows=$2 steps=$3
    shift 3
    [ ! -d "$out/$name/adapter" ] || return 0
    local resume=()
    if compgen -G "$out/$name/checkpoint-*" >/dev/null; then resume=(--resume_from_checkpoint latest); fi
    say "$name: $steps steps on $rows"
    launch/mpirun.sh -n "$ranks" "$glmddp" train --train_file "$out/rows/$rows-train.jsonl" --validation_file "$out/rows/$rows-dev.jsonl" \
        --max_eval_samples 100 --per_device_train_batch_size 4 --global_batch_size 8 --max_steps "$steps" --logging_steps 50 \
        --save_steps 100 --save_total_limit 1 --output_dir "$out/$name" "${resume[@]}" "$@"
}
run base others 400 --model_name_or_path "$out/model" --finetuning_type full --learning_rate 1e-3 --warmup_steps 20
base=$out/base/adapter
for garment in tops trousers; do
    run "adapter-$garment" "$garment" 60 --model_name_or_path "$base" --finetuning_type adapter --adapter_name "$garment" --learning_rate 1e-3
done

# The methods that are built in, and a fusion of the two adapters.
sed -n '/^\[methods\./,$p' configs/compare.toml >"$out/methods.toml"
{
    cat <<TOML
[model]
model_name_or_path = "$base"

[data]
train_file = "$out/rows/skirts-train.jsonl"
validation_file = "$out/rows/skirts-dev.jsonl"
max_eval_samples = 100

[batch]
per_device_train_batch_size = 4
global_batch_size = 8

[run]
output_dir = "$out/compare"
max_steps = 80
logging_steps = 50
save_steps = 100

TOML
    cat "$out/methods.toml"
    cat <<TOML

[methods.adapter_fusion]
finetuning_type = "adapter_fusion"
fusion_adapters = "$out/adapter-tops/adapter,$out/adapter-trousers/adapter"
learning_rate = 5e-5                # adapter-hub/adapters, docs/training.md, "Train AdapterFusion"
TOML
} >"$out/compare.toml"
launch/mpirun.sh -n "$ranks" "$glmddp" compare "$out/compare.toml"
