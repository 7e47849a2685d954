#!/usr/bin/env bash
# Training steps a second on a CPU: PyTorch as THUDM trains, PyTorch at its best, and glmddp, in alternation on the same rows and shape.
#
#   scripts/bench_cpu.sh [--lora RANK | --method full] [--rounds 5] [--json OUT] [--check] [--tokenizer tokenizer.model] [--train_file train.jsonl]
#
# --check makes the exit status 1 where a bound on the ratios is missed. The rows (AdvertiseGen) and the tokenizer are not part of
# the repository: without the two options they are looked for in ../shared.
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
# shellcheck source=scripts/venv.sh
source scripts/venv.sh

cargo build --release --locked
cd "$started_in"
exec "$python" "$root/benches/bench_cpu.py" --glmddp "$CARGO_TARGET_DIR/release/glmddp" "$@"
