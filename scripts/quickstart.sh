#!/usr/bin/env bash
# From a fresh clone to a tuned model: installs what is missing, builds, trains a small ChatGLM2 of its own to write adverts (all weights),
# tunes it by P-Tuning v2 to answer as a shop does, each on two MPI ranks, and shows held-out loss and a sample before and after. Needs a
# Debian or Ubuntu with root or sudo, and the package registries; neither a GPU nor a downloaded model. Where NVIDIA's driver is, it builds for
# the GPU and tunes there, in one process; cuBLAS and cuRAND must be there too (`glmddp doctor`).
#
#   scripts/quickstart.sh         may be run again: it makes the folder demo anew
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

glmddp=$CARGO_TARGET_DIR/release/glmddp
if have nvidia-smi || [ -e /proc/driver/nvidia/version ]; then
    say "building glmddp for the GPU of this machine (the first build takes some minutes)"
    scripts/lean_cuda.sh build --release --locked
    run=("$glmddp")
else
    say "building glmddp (the first build takes some minutes)"
    cargo build --release --locked
    run=(launch/mpirun.sh -n 2 "$glmddp")
fi

if [ -e demo ] && [ ! -e demo/.made-by-quickstart ]; then
    die "the folder demo was not made by this script" "move it away"
fi
rm -rf demo
mkdir demo
touch demo/.made-by-quickstart
base=demo/base/adapter
adapter=demo/output/adapter
train=("${run[@]}" train --config configs/demo.toml)

# held_out KIND MODEL [ADAPTER]: the loss on the held-out rows of that kind.
held_out() {
    "${run[@]}" evaluate --model_name_or_path "$2" ${3:+--adapter "$3"} --validation_file "demo/$1/dev.jsonl" \
        --max_source_length 64 --max_target_length 64 --json | sed -n 's/.*"eval_loss": *\([-+0-9.eE]*\).*/\1/p'
}

# answer [ADAPTER]: what the base says to a held-out row.
answer() {
    "$glmddp" generate --model_name_or_path "$base" ${1:+--adapter "$1"} --prompt "$prompt" --max_new_tokens 64
}

say "making a small ChatGLM2 with random weights, and rows of two kinds about the same garments: adverts, and answers when each is worn"
"$glmddp" init-model --preset small --num_layers 4 --output_dir demo/model
"$glmddp" demo-data --kind advert --output_dir demo/adverts
"$glmddp" demo-data --kind answer --output_dir demo/answers
row=$(grep -m 1 '季节.*场合' demo/answers/dev.jsonl)
prompt=$(sed -n 's/.*"content": *"\([^"]*\)".*/\1/p' <<<"$row")
expected=$(sed -n 's/.*"summary": *"\([^"]*\)".*/\1/p' <<<"$row")

say "1. a base: all weights learn to write adverts: ${run[*]} train --config configs/demo_base.toml"
random=$(held_out adverts demo/model)
started=$SECONDS
"${run[@]}" train --config configs/demo_base.toml
base_took=$((SECONDS - started))
adverts=$(held_out adverts "$base")

say "2. P-Tuning v2: a prefix teaches the frozen base to answer: ${train[*]}"
before=$(held_out answers "$base")
sample_before=$(answer)
started=$SECONDS
"${train[@]}"
took=$((SECONDS - started))
after=$(held_out answers "$base" "$adapter")

say "loss on held-out rows (nats a token), before and after"
LC_ALL=C printf '    adverts   %7.4f -> %7.4f   %s s, all weights of a random model\n' "$random" "$adverts" "$base_took" >&2
LC_ALL=C printf '    answers   %7.4f -> %7.4f   %s s, P-Tuning v2 on that base\n' "$before" "$after" "$took" >&2
say "a held-out row"
note "asked:          $prompt"
note "the base says:  $sample_before"
note "tuned, it says: $(answer "$adapter")"
note "expected:       $expected"
awk -v a="$random" -v b="$adverts" 'BEGIN { exit !(b > 0 && b < a) }' || die "the loss of the base did not fall"
awk -v a="$before" -v b="$after" 'BEGIN { exit !(b > 0 && b < a) }' || die "the held-out loss did not fall by tuning"

say "the adapter: adapter_* is PEFT's, pytorch_model.bin with config.json is THUDM's"
find "$adapter" -type f -printf '    %p (%s bytes)\n' | sort >&2
say "to ask it, and to go on from the last checkpoint:"
note "$glmddp generate --model_name_or_path $base --adapter $adapter --prompt '类型#鞋*颜色#黑色*季节#冬季'"
note "${train[*]} --resume_from_checkpoint latest --max_steps 400"
note "with the real model: README.md"
