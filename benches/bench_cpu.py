"""Runs glmddp's and PyTorch's CPU training steps in alternation and prints medians, ranges and ratios.

Three contenders take the same rows of AdvertiseGen through the same shape (8 layers, hidden 512, vocabulary 65,024, 4 rows a step), tuning a
prefix of 128 or what --lora or --method say: PyTorch as THUDM trains (rows padded to the maximum, logits of all positions), PyTorch at its
best (padded to the batch's longest, logits where a label is, fused attention), and glmddp. Both PyTorch runs get glibc's allocator tuned for
them, which is a quarter of their time.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, "../../shared")
TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
# contender -> bound on glmddp's real tokens/s over its own; but for full fine-tuning the best one's peak memory must not be reached either
BOUNDS = {"torch_thudm": 1.9, "torch_best": 1.2}
BOUNDS_FULL = {"torch_thudm": 1.0, "torch_best": 1.0}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--glmddp", required=True, help="the binary")
    p.add_argument("--tokenizer", default=os.path.join(SHARED, "chatglm2/tokenizer.model"))
    p.add_argument("--train_file", default=os.path.join(SHARED, "data/advertisegen/train.jsonl"))
    method = p.add_mutually_exclusive_group()
    method.add_argument("--lora", type=int, default=0, metavar="RANK", help="LoRA on query_key_value in place of the prefix")
    method.add_argument("--method", choices=["full"], help="all weights in place of the prefix; PyTorch's best then updates them by its fused AdamW")
    p.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", help="write all runs and the summary here")
    p.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    a = p.parse_args()
    if a.rounds < 1 or a.steps < 1:
        p.error("--rounds and --steps must be at least 1")
    for name in ("glmddp", "tokenizer", "train_file"):
        if not os.path.isfile(getattr(a, name)):
            print(f"NOT RUN: no file {getattr(a, name)}\n\nhint: give it with --{name}", file=sys.stderr)
            sys.exit(2)
    return a


def commands(a):
    """contender -> (argument vector, additions to the environment)"""
    counts = ["--steps", str(a.steps), "--warmup", str(a.warmup), "--threads", str(a.threads)]
    torch = [sys.executable, os.path.join(HERE, "bench_torch_cpu.py"), "--tokenizer", a.tokenizer, "--data", a.train_file, *counts]
    shape = "--layers 8 --hidden 512 --ffn 1368 --heads 8 --groups 2 --kv 64 --vocab 65024 --pre_seq_len 128 --rows 4".split()
    method = ["--method", a.method] if a.method else ["--lora", str(a.lora)] if a.lora else []
    update = ["--adamw", "fused"] if a.method else []  # of a prefix or LoRA the update is too small to matter
    torch += method
    glmddp = [a.glmddp, "bench", "step", *shape, *counts, *method, "--tokenizer", a.tokenizer, "--train_file", a.train_file, "--json"]
    return {
        "torch_thudm": ([*torch, "--smart", "0", "--pad", "max"], TUNED_ALLOCATOR),
        "torch_best": ([*torch, "--smart", "1", "--pad", "batch", "--sdpa", "1", *update], TUNED_ALLOCATOR),
        "glmddp": (glmddp, {}),
    }


def run(argv, additions):
    done = subprocess.run(argv, env={**os.environ, **additions}, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"error: exit status {done.returncode} of: {' '.join(argv)}")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"error: no line of JSON from: {' '.join(argv)}")


def spread(values, digits=1):
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits)}


def cell(s, digits=0):
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} .. {s['max']:.{digits}f})"


def main():
    a = arguments()
    todo = commands(a)
    runs = {name: [] for name in todo}
    for i in range(a.rounds):
        order = list(todo)
        order = order[i % len(order):] + order[:i % len(order)]  # nobody always runs first
        for name in order:
            runs[name].append(run(*todo[name]))
            r = runs[name][-1]
            print(f"round {i + 1}/{a.rounds}  {name:<12} {r['ms_step_median']:8.1f} ms a step, {r['real_tokens_s']:7.1f} real tokens/s", file=sys.stderr)
    counted = {name: {r["real_tokens"] for r in rs if "real_tokens" in r} for name, rs in runs.items()}
    if len(set().union(*counted.values())) > 1:
        sys.exit(f"error: the contenders did not see the same rows: real tokens {counted}")

    summary = {name: {key: spread([r[key] for r in rs]) for key in ("ms_step_median", "real_tokens_s", "peak_rss_mib")} for name, rs in runs.items()}
    print(f"\n{'':<12} {'ms a step':>26} {'real tokens/s':>24} {'peak RSS MiB':>24}   median (min .. max) of {a.rounds} runs")
    for name, s in summary.items():
        print(f"{name:<12} {cell(s['ms_step_median']):>26} {cell(s['real_tokens_s']):>24} {cell(s['peak_rss_mib']):>24}")
    ratios, missed = {}, []
    print()
    for name, bound in (BOUNDS_FULL if a.method else BOUNDS).items():
        ratios[name] = spread([g["real_tokens_s"] / t["real_tokens_s"] for g, t in zip(runs["glmddp"], runs[name])], 3)
        print(f"glmddp / {name}: {cell(ratios[name], 2)} in real tokens/s, by rounds (bound {bound})")
        if ratios[name]["median"] < bound:
            missed.append(f"{name}: {ratios[name]['median']} < {bound}")
    rss = {name: summary[name]["peak_rss_mib"]["median"] for name in ("glmddp", "torch_best")}
    print(f"peak RSS: glmddp {rss['glmddp']:.0f} MiB, torch_best {rss['torch_best']:.0f} MiB")
    if not a.method and rss["glmddp"] >= rss["torch_best"]:
        missed.append("peak RSS is not below PyTorch's best")
    print("bounds missed: " + "; ".join(missed) if missed else "all bounds kept")
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump({"summary": summary, "ratios": ratios, "missed": missed, "runs": runs}, f, indent=1)
            f.write("\n")
    sys.exit(1 if a.check and missed else 0)


if __name__ == "__main__":
    main()
