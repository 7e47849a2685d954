#!/usr/bin/env bash
# Kills training runs at random and goes on with them: each run on two ranks is killed (SIGKILL to one rank or to all) at a random time of its
# steps and saves, then resumed on one, two or three ranks. Whatever happens, the adapter must have the bytes of a run that nobody disturbed.
#
#   scripts/kill_runs.sh [--runs 100] [--seed 1] [--output FILE]
#
# --output    where the table goes as Markdown (default: standard output)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

runs=100 seed=1 output=/dev/stdout
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "$1 needs a value"
    case $1 in
    --runs) runs=$2 ;;
    --seed) seed=$2 ;;
    --output) output=$2 ;;
    *) die "unknown option $1" "--runs, --seed or --output" ;;
    esac
    shift 2
done
case $output in /*) ;; *) output=$PWD/$output ;; esac

say "building glmddp"
nice cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp
launch=$PWD/launch/mpirun.sh
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$glmddp" init-model --preset tiny --output_dir model >/dev/null
"$glmddp" demo-data --output_dir data --rows 120 --dev_rows 8 >/dev/null

# train OUTPUT_DIR RANKS ARGUMENT...: the run, in the background; its parent's process id is $launched.
train() {
    local out=$1 ranks=$2
    shift 2
    "$launch" -n "$ranks" "$glmddp" train --model_name_or_path model --train_file data/train.jsonl --output_dir "$out" \
        --max_steps 300 --save_steps 10 --save_total_limit 3 --pre_seq_len 8 --per_device_train_batch_size 2 --global_batch_size 12 \
        --threads 1 "$@" >"$out.log" 2>&1 &
    launched=$!
}

adapter_sum() { (cd "$1/adapter" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1); }
# The process ids of the ranks that train into OUTPUT_DIR.
ranks_of() { pgrep -f -- "^$glmddp train .*--output_dir $1 " || true; }
milliseconds() { echo $(($(date +%s%N) / 1000000)); }

started=$(milliseconds)
train undisturbed 2
wait "$launched" || die "the undisturbed run failed" "$(tail -n 3 undisturbed.log)"
took=$(($(milliseconds) - started))
expected=$(adapter_sum undisturbed)
note "an undisturbed run takes $took ms; its adapter's sum is $expected"

RANDOM=$seed
in_save=0 before_first=0 after_end=0 one_rank=0 different=0
declare -A resumed_on=([1]=0 [2]=0 [3]=0)
for run in $(seq "$runs"); do
    out=run-$run
    delay=$((300 + (RANDOM * 32768 + RANDOM) % (took > 500 ? took - 400 : 100)))
    train "$out" 2
    sleep "$((delay / 1000)).$(printf '%03d' $((delay % 1000)))"
    mapfile -t ranks < <(ranks_of "$out")
    if [ $((RANDOM % 2)) = 0 ] && [ ${#ranks[@]} -gt 0 ]; then
        ranks=("${ranks[RANDOM % ${#ranks[@]}]}")
        one_rank=$((one_rank + 1))
    fi
    # A save is under way while its temporary folder stands.
    if compgen -G "$out/.*-checkpoint-*" >/dev/null; then in_save=$((in_save + 1)); fi
    if [ ${#ranks[@]} -gt 0 ]; then kill -KILL "${ranks[@]}" 2>/dev/null || true; else after_end=$((after_end + 1)); fi
    wait "$launched" 2>/dev/null || true
    while [ -n "$(ranks_of "$out")" ]; do sleep 0.05; done

    num_ranks=$((1 + RANDOM % 3))
    resumed_on[$num_ranks]=$((resumed_on[$num_ranks] + 1))
    if [ ! -e "$out/adapter" ]; then
        if compgen -G "$out/checkpoint-*" >/dev/null; then
            train "$out" "$num_ranks" --resume_from_checkpoint latest
        else
            before_first=$((before_first + 1))
            train "$out" "$num_ranks" --overwrite_output_dir true
        fi
        if ! wait "$launched" && ! grep -q 'is at its last step' "$out.log"; then
            die "run $run, killed after $delay ms, does not go on on $num_ranks ranks: $(grep -m 3 -A2 '^error' "$out.log")"
        fi
    fi
    found=$(adapter_sum "$out")
    if [ "$found" != "$expected" ]; then
        different=$((different + 1))
        note "run $run, killed after $delay ms and resumed on $num_ranks ranks, has the adapter $found"
    fi
    rm -rf "$out" "$out.log"
    if [ $((run % 10)) = 0 ]; then note "$run of $runs runs, $different different"; fi
done

{
    printf 'scripts/kill_runs.sh --runs %s --seed %s, commit %s\n\n' "$runs" "$seed" "$commit"
    printf '| what | runs |\n| --- | --- |\n'
    printf '| killed and resumed | %s |\n' "$runs"
    printf '| ... of these one rank was killed (the others: both) | %s |\n' "$one_rank"
    printf '| ... killed while a save was under way | %s |\n' "$in_save"
    printf '| ... killed before the first checkpoint, so begun anew | %s |\n' "$before_first"
    printf '| ... had ended before they were killed | %s |\n' "$after_end"
    printf '| resumed on 1, 2, 3 ranks | %s, %s, %s |\n' "${resumed_on[1]}" "${resumed_on[2]}" "${resumed_on[3]}"
    printf '| **adapter differs from the undisturbed run** | **%s** |\n' "$different"
} >"$output"
[ "$different" = 0 ] || die "$different of $runs runs ended in another adapter"
