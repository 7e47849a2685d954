#!/usr/bin/env bash
# What saving beside the steps costs: runs of one plan without saving and with a save at every tenth step, in alternation, on one process and
# all cores. Prints each run's median and mean step (of trainer_log.jsonl, without the first step) and the medians over the rounds.
#
#   scripts/bench_stall.sh [--method ptuning_v2|lora|full] [--rounds 5] [--steps 60] [--preset small]
#
# Measures only on a quiet machine: the load is printed first.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

method=full rounds=5 steps=60 preset=small
while [ $# -gt 0 ]; do
    case $1 in
        --method) method=$2 ;;
        --rounds) rounds=$2 ;;
        --steps) steps=$2 ;;
        --preset) preset=$2 ;;
        *) die "unknown option $1" "see the head of $0" ;;
    esac
    shift 2
done

cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$glmddp" init-model --preset "$preset" --output_dir "$work/model" >/dev/null
"$glmddp" demo-data --output_dir "$work/data" --rows 400 --dev_rows 4 >/dev/null

# steps_ms FILE: the steps' times, sorted.
steps_ms() { sed -n 's/.*"step_ms":\([0-9.e+-]*\).*/\1/p' "$1" | tail -n +2 | sort -g; }
median() { awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
mean() { awk '{ s += $1 } END { print s / NR }'; }

# train NAME ARG...: appends median and mean to NAME.txt and prints them.
train() {
    local name=$1 out=$work/out
    shift
    rm -rf "$out"
    "$glmddp" train --model_name_or_path "$work/model" --train_file "$work/data/train.jsonl" --output_dir "$out" --finetuning_type "$method" \
        --per_device_train_batch_size 4 --max_source_length 64 --max_target_length 64 --max_steps "$steps" --learning_rate 1e-4 --quiet "$@" \
        >/dev/null 2>"$work/log" || { cat "$work/log" >&2 && return 1; }
    local of_median of_mean
    of_median=$(steps_ms "$out/trainer_log.jsonl" | median)
    of_mean=$(steps_ms "$out/trainer_log.jsonl" | mean)
    printf '%s %s\n' "$of_median" "$of_mean" >>"$work/$name.txt"
    printf '%-14s median %8.2f ms   mean %8.2f ms\n' "$name" "$of_median" "$of_mean"
    [ "$name" = without ] || du -sh "$out/checkpoint-$steps" | sed 's/\t.*//; s/^/    a checkpoint of /'
}

printf '%s, preset %s, %s steps; load %s\n' "$method" "$preset" "$steps" "$(cut -d' ' -f1-3 /proc/loadavg)"
for round in $(seq "$rounds"); do
    # Each goes first as often as the other.
    if [ $((round % 2)) = 1 ]; then
        train without --save_steps 1000000 && train with_saving --save_steps 10
    else
        train with_saving --save_steps 10 && train without --save_steps 1000000
    fi
done
for name in without with_saving; do
    printf '%s: median of medians %.2f ms, of means %.2f ms\n' "$name" "$(cut -d' ' -f1 "$work/$name.txt" | sort -g | median)" \
        "$(cut -d' ' -f2 "$work/$name.txt" | sort -g | median)"
done
