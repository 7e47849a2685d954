#!/usr/bin/env python3
"""Prints a Markdown table of what bench_torch_gpu.py measured. Needs no PyTorch.

python3 benches/torch_table.py steps.jsonl      a file with lines of JSON that bench_torch_gpu.py printed
"""

import json
import sys


def main(path):
    """Prints what the lines of a file say."""
    with open(path, encoding="utf-8") as file:
        results = [json.loads(line) for line in file if line.startswith("{")]
    columns = ("real tokens/s", "step, ms: median (min to max)", "TFLOP/s, real (all)", "of the product, real (all)", "peak, GiB")
    print(f"| steps of PyTorch | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for r in results:
        method = f"LoRA {r['lora']}" if r["lora"] else f"prefix {r['pre']}"
        way = f"{r['pad']}, {r['attn']}, gqa {r['gqa']}, logits {r['logits']}, checkpoint {r['ckpt']}, compile {r['compile']}"
        if not r["steps_timed"]:
            print(f"| {method}: {way} | ended before a step was timed |{' - |' * (len(columns) - 1)}")
            continue
        way += ", ended early" * r["ended_early"]
        shares = "-" if r["mfu"] is None else f"{100 * r['real_mfu']:.1f} % ({100 * r['mfu']:.1f} %)"
        step = f"{r['step_ms_median']:.1f} ({r['step_ms_min']:.1f} to {r['step_ms_max']:.1f})"
        speed = f"{r['real_model_tflops_s']:.1f} ({r['model_tflops_s']:.1f})"
        print(f"| {method}: {way} | {r['real_tokens_s']:,.0f} | {step} | {speed} | {shares} | {r['peak_alloc_gib'] or '-'} |")
    for about in sorted({f"{r['gpu']}, PyTorch {r['torch']}, rows: {r['rows_from']}" for r in results if r['steps_timed']}):
        print(f"\n{about}")


if __name__ == "__main__":
    main(sys.argv[1])
