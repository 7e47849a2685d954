#!/usr/bin/env bash
# From a fresh clone to a tuned adapter: installs what is missing, builds, makes a small ChatGLM2 and demo rows, and trains on two MPI
# ranks. Needs a Debian or Ubuntu with root or sudo, and the package registries; neither a GPU nor a downloaded model.
#
#   scripts/quickstart.sh         may be run again: it makes the folder demo anew
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

say "building glmddp (the first build takes some minutes)"
cargo build --release --locked
glmddp=$CARGO_TARGET_DIR/release/glmddp

if [ -e demo ] && [ ! -e demo/.made-by-quickstart ]; then
    die "the folder demo was not made by this script" "move it away"
fi
rm -rf demo
mkdir demo
touch demo/.made-by-quickstart

say "making a small ChatGLM2 with random weights in demo/model, and made-up rows in demo/data"
"$glmddp" init-model --preset small --output_dir demo/model
"$glmddp" demo-data --output_dir demo/data

train=(launch/mpirun.sh -n 2 "$glmddp" train --config configs/demo.toml)
say "training with P-Tuning v2 on two ranks: ${train[*]}"
started=$SECONDS
"${train[@]}"
took=$((SECONDS - started))

run=demo/output
losses=$(sed -n 's/.*"loss": *\([-+0-9.eE]*\).*/\1/p' "$run/trainer_log.jsonl")
first=$(head -n 1 <<<"$losses")
last=$(tail -n 1 <<<"$losses")
say "$(LC_ALL=C printf 'trained in %s s: loss %.4f at the first step, %.4f at the last' "$took" "$first" "$last")"
awk -v a="$first" -v b="$last" 'BEGIN { exit !(a > 0 && b < a) }' || die "the loss did not fall"
say "the adapter: adapter_* is PEFT's, pytorch_model.bin with config.json is THUDM's"
find "$run/adapter" -type f -printf '    %p (%s bytes)\n' | sort >&2
say "to go on from the last checkpoint:"
note "${train[*]} --resume_from_checkpoint latest --max_steps 200"
note "with the real model: README.md"
