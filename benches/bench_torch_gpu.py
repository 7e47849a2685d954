#!/usr/bin/env python3
"""PyTorch baseline on a GPU: P-Tuning v2 or LoRA on a model of ChatGLM2-6B's shape with random bf16 weights. One JSON line on stdout.

THUDM's way (ptuning/main.py)
    python3 benches/bench_torch_gpu.py --ckpt 1 --attn mask --logits all --pad max
PyTorch's best, padded and packed; for packed rows --gqa 0 and 1 are both worth a try
    python3 benches/bench_torch_gpu.py --attn causal_lr --logits labels --pad batch --batch 16 --compile layer
    python3 benches/bench_torch_gpu.py --attn flex --logits labels --pad packed --compile layer
Each also with --lora 8. --seconds 20 ends the timed steps in time. With N GPUs: torchrun --nproc-per-node=N
All variants at a tiny shape have the same losses; loss and gradient are a golden case's. Else exit 1
    python3 benches/bench_torch_gpu.py --selftest --device cpu
    python3 benches/bench_torch_gpu.py --check tests/golden/case2 --device cpu

Needs torch; peft with --peft, safetensors with --check. FLOP are the model's: nothing that is recomputed, attention as the mask leaves it.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import fields, replace

STARTED = time.perf_counter()  # before torch, whose import is a part of the start

import torch
import torch.distributed as dist
from torch_chatglm2 import Batch, Config, Trainer, causal_lower_right, first_fit, make_row, model_flops, pack_rows, pad_rows

HERE = os.path.dirname(os.path.abspath(__file__))
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CHECKPOINTS = ((0, 0), (1, 0), (1, 1))  # --ckpt, --ckpt-reentrant
MIN_STEPS = 3
# --selftest: f32 sums in other orders move a loss of 7 by 1e-6; a wrong mask or wrong positions move it by 1e-2.
SELFTEST_TOLERANCE = 1e-4
BF16_TOLERANCE = 3e-2  # bf16 has steps of 0.8 %
# --check: the golden values are sums of f32 in other orders, seen 1e-6 of their size apart on a CPU; the rest is room for a GPU's orders.
CHECK_TOLERANCE = 1e-5


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default, **f.metadata)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16")
    add("--accum", type=int, default=1, help="micro-batches of a step")
    add("--steps", type=int, default=12, help="timed steps")
    add("--warmup", type=int, default=4, help="steps before them")
    add("--seconds", type=float, default=0, help=f"stop once the timed steps took so long and are {MIN_STEPS} or more; 0: no limit")
    add("--lr", type=float, default=2e-2)
    add("--tokens", default=os.path.join(HERE, "adgen_tokens.json"), help="JSON [[prompt ids, answer ids], ...]; if missing, random rows")
    add("--peft", type=int, default=0, help="1: --lora by the peft package")
    add("--no-peak", action="store_true", help="do not measure the speed of a matrix product")
    add("--profile", type=int, default=0, help="1: profile the first timed step, table on stderr")
    add("--threads", type=int, default=0, help="of the CPU")
    add("--selftest", action="store_true", help="compare all variants at a tiny shape")
    add("--check", default="", help="folder of a golden case")
    add("--only", default="", help="of --selftest and --check: variants with this text in their names")
    args = parser.parse_args()
    try:
        return args, Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    except ValueError as error:
        parser.error(str(error))


def say(text):
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


# Timing


def random_row(generator, vocab, source_lengths, target_lengths):
    lengths = [int(torch.randint(*least_and_end, (), generator=generator)) for least_and_end in (source_lengths, target_lengths)]
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def load_rows(path, c: Config):
    """Rows of the file, or random ones with about the same lengths; and which of both."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            pairs, origin = json.load(file), os.path.basename(path)
    else:
        say(f"{path} is missing: random rows")
        generator = torch.Generator().manual_seed(1)
        pairs, origin = [random_row(generator, c.vocab, (30, 65), (40, 120)) for _ in range(2000)], "random lengths"
    pairs = [[[min(token, c.vocab - 1) for token in ids] for ids in pair] for pair in pairs]
    return [make_row(source, target, c.seq) for source, target in pairs], origin


def batch_of(c: Config, rows) -> Batch:
    if c.packed:
        return pack_rows(rows, c.pack_tokens)
    longest = max(len(ids) for ids, _ in rows)
    return pad_rows(rows, c.seq if c.pad == "max" else -(-longest // 8) * 8)


def make_batches(c: Config, rows, count):
    """`count` micro-batches of this rank."""
    mine = (rows[(RANK + i * WORLD) % len(rows)] for i in itertools.count())
    if c.packed:
        return [batch_of(c, pack) for pack in first_fit(mine, c.pack_tokens, count)]
    return [batch_of(c, list(itertools.islice(mine, c.batch))) for _ in range(count)]


def matmul_peak(device, dtype):
    """TFLOP/s of the fastest of eight runs of four products, 8192 x 8192 on a GPU."""
    side = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = float("inf")
    for run in range(10):
        sync(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        sync(device)
        if run >= 2:
            best = min(best, time.perf_counter() - start)
    return 4 * 2 * side**3 / best / 1e12


def enough(times, seconds):
    """The ranks agree: each takes part in every step's sums."""
    took = torch.tensor([sum(times)])
    if WORLD > 1:
        took = took.to("cuda") if dist.get_backend() == "nccl" else took
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return bool(seconds) and len(times) >= MIN_STEPS and took.item() >= seconds


def profiled(device):
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else []))


class Ended(Exception):
    """The process was told to end (SIGTERM)."""


def end(*_):
    raise Ended


def run_steps(args, trainer, steps, times, losses):
    """Adds to the seconds of the timed steps and to all losses; gives the seconds of the warm-up."""
    device = args.device
    warmup_started = warmup_ended = time.perf_counter()
    for number, batches in enumerate(steps):
        if number == args.warmup:
            warmup_ended = time.perf_counter()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        if WORLD > 1:
            dist.barrier()
        with profiled(device) if args.profile and number == args.warmup else contextlib.nullcontext() as profile:
            sync(device)
            start = time.perf_counter()
            losses.append(trainer.step(batches).item())
            sync(device)
            took = time.perf_counter() - start
        if profile:
            say(profile.key_averages().table(sort_by="self_cuda_time_total" if device == "cuda" else "self_cpu_time_total", row_limit=25))
        timed = number >= args.warmup
        say(f"step {number + 1}/{len(steps)}{'' if timed else ' (warm-up)'}: loss {losses[-1]:.4f}, {1e3 * took:.1f} ms")
        if timed:
            times.append(took)
            if enough(times, args.seconds):
                break
    return warmup_ended - warmup_started


def speeds(c: Config, batches, times, num_trained, peak):
    """Tokens and FLOP a second of the timed micro-batches: of real tokens alone, and of all that were computed with."""
    seconds = sum(times)
    real, computed = sum(sum(batch.rows) for batch in batches), sum(sum(batch.computed) for batch in batches)
    real_flops = flops = 0.0
    for batch in batches:
        targets = len(batch.picked)
        real_flops += model_flops(c, batch.rows, targets, num_trained)
        flops += model_flops(c, batch.computed, targets if c.logits == "labels" else sum(batch.computed), num_trained)
    result = {
        "tokens_s": round(WORLD * computed / seconds, 1),
        "real_tokens_s": round(WORLD * real / seconds, 1),
        "samples_s": round(WORLD * sum(len(batch.rows) for batch in batches) / seconds, 2),
        "real_fraction": round(real / computed, 4),
        "model_tflops_s": round(flops / seconds / 1e12, 4),
        "real_model_tflops_s": round(real_flops / seconds / 1e12, 4),
        "matmul_peak_tflops": None,
        "mfu": None,
        "real_mfu": None,
    }
    if peak:
        shares = {"mfu": round(flops / seconds / 1e12 / peak, 4), "real_mfu": round(real_flops / seconds / 1e12 / peak, 4)}
        result |= {"matmul_peak_tflops": round(peak, 3)} | shares
    return result


def measure(args, c: Config):
    """Prints the line. Told to end, it prints what it has: a part that runs out of its time is not lost. False if no step was timed."""
    signal.signal(signal.SIGTERM, end)
    times, losses, ended_early, start_s, warmup_s, peak = [], [], False, 0.0, 0.0, None
    batches, trainer = [], None
    try:
        dtype = getattr(torch, args.dtype)
        rows, origin = load_rows(args.tokens, c)
        batches = make_batches(c, rows, args.accum * (args.warmup + args.steps))
        steps = [batches[i : i + args.accum] for i in range(0, len(batches), args.accum)]
        peak = None if args.no_peak else matmul_peak(args.device, dtype)
        say(f"matrix product: {'not measured' if args.no_peak else f'{peak:.1f} TFLOP/s'}")
        trainer = Trainer(c, args.device, dtype, args.lr, peft=bool(args.peft))
        sync(args.device)
        start_s = time.perf_counter() - STARTED
        say(f"model made: {start_s:.1f} s since the start")
        warmup_s = run_steps(args, trainer, steps, times, losses)
    except Ended:
        ended_early = True
        warmup_s = time.perf_counter() - STARTED - start_s - sum(times)
        say(f"told to end after {len(losses)} steps, {len(times)} of them timed")

    is_gpu = args.device == "cuda"
    left_out = ("check", "selftest", "only", "tokens", "profile", "no_peak")
    result = {name: value for name, value in vars(args).items() if name not in left_out}
    result |= {f.name: getattr(c, f.name) for f in fields(Config)}  # the defaults that depend on other options, too
    result |= {
        "world": WORLD,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if is_gpu else "cpu",
        "ended_early": ended_early,
        "start_s": round(start_s, 1),
        "warmup_s": round(warmup_s, 1),
        "steps_timed": len(times),
        "losses": [round(loss, 4) for loss in losses],
    }
    if times:
        timed = batches[args.accum * args.warmup :][: args.accum * len(times)]
        num_trained = sum(p.numel() for p in trainer.trained)
        read_peaks = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        peak_gib = [round(read() / 2**30, 2) if is_gpu else None for read in read_peaks]
        result |= {
            "rows_from": origin,
            "params": trainer.num_frozen,
            "trainable": num_trained,
            "step_ms_median": round(1e3 * statistics.median(times), 2),
            "step_ms_min": round(1e3 * min(times), 2),
            "step_ms_max": round(1e3 * max(times), 2),
        }
        result |= speeds(c, timed, times, num_trained, peak)
        result |= {"peak_alloc_gib": peak_gib[0], "peak_reserved_gib": peak_gib[1]}
    if RANK == 0:
        print(json.dumps(result), flush=True)
    return bool(times)


# Tests


def variants(c: Config, device: str):
    """(name, config) of every way to compute the same step; the first is the published one."""
    for attn, pad, logits, (ckpt, reentrant), gqa in itertools.product(
        ("mask", "causal_lr", "packed_mask", "flex"), ("max", "batch", "packed"), ("all", "labels"), CHECKPOINTS, (0, 1)
    ):
        if (attn in ("packed_mask", "flex")) != (pad == "packed"):
            continue
        if attn == "causal_lr" and c.lora:  # without a prefix the same code as mask
            continue
        # Flex is compiled once more for each of these, and a CPU does not train with it: fewer.
        if attn == "flex" and (logits == "all" or reentrant or (ckpt and device == "cpu")):
            continue
        if c.proj and (ckpt or gqa or logits == "all" and attn != "mask"):  # changes the prefix alone
            continue
        method = "lora" if c.lora else "prefix proj" if c.proj else "prefix"
        name = f"{method} {attn} {pad} {logits} ckpt={ckpt}{' reentrant' * reentrant} gqa={gqa}"
        yield name, replace(c, attn=attn, pad=pad, logits=logits, ckpt=ckpt, ckpt_reentrant=reentrant, gqa=gqa)


def cannot_train(c: Config, device: str):
    return c.attn == "flex" and device == "cpu"


def greatest(differences):
    """NaN if one is, so that no comparison with a tolerance holds; max() may pass it over."""
    return torch.tensor(list(differences)).max().item()


def tiny_steps(c: Config, count):
    """Random rows of each step, `batch` of them."""
    generator = torch.Generator().manual_seed(2)
    row = lambda: make_row(*random_row(generator, c.vocab, (4, 20), (6, 30)), c.seq)
    return [[row() for _ in range(c.batch)] for _ in range(count)]


def losses_of(c: Config, device, steps, std):
    """Loss of each step. Where flex cannot train, the same rows train by packed_mask, and flex tells the loss before each update."""
    make = lambda config: Trainer(config, device, torch.float32, lr=1e-2, std=std)
    if not cannot_train(c, device):
        trainer = make(c)
        return [trainer.step([batch_of(c, rows)]).item() for rows in steps]
    trainer, shown, losses = make(replace(c, attn="packed_mask")), make(c), []
    for mine, other in zip(shown.trained, trainer.trained):
        mine.data = other.data  # the same memory: updates are in place
    for rows in steps:
        with torch.no_grad():
            losses.append(shown.loss(batch_of(c, rows)).item())
        trainer.step([batch_of(c, rows)])
    return losses


def flash_difference(device, gqa):
    """Of the kernel behind --attn causal_lr, forward and backward, from a dense mask in f32, as a part of the greatest value."""
    torch.manual_seed(0)
    shapes = ((2, 4, 24, 64), (2, 2 if gqa else 4, 32, 64), (2, 2 if gqa else 4, 32, 64))
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

    def all_values(inputs):
        y = causal_lower_right(*inputs, gqa)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    exact = all_values([t.detach().float().requires_grad_() for t in inputs])
    return greatest(((a.float() - e).abs().max() / e.abs().max()).item() for a, e in zip(all_values(inputs), exact))


def planted(c: Config, batch: Batch):
    """Batches with an error that the comparison has to find."""
    yield "rows that see the rows before them", replace(batch, documents=torch.zeros_like(batch.documents))
    if c.pre:  # without a prefix only distances count, and those are right
        yield "positions that do not restart", replace(batch, positions=torch.arange(len(batch.positions)))


def selftest(args):
    """All variants train the same rows from the same values without dropout."""
    # Weights of 0.2: at 0.02 a model this small hardly attends, and no error of a mask would show.
    std, device = 0.2, args.device
    sizes = dict(layers=2, hidden=64, ffn=96, heads=4, groups=2, kv=16, vocab=256, seq=48, batch=3, pack_tokens=128, dropout=0.0)
    num_failed = num_run = 0
    for gqa in (False, True):
        difference = flash_difference(device, gqa)
        num_failed += not difference <= BF16_TOLERANCE
        verdict = "ok    " if difference <= BF16_TOLERANCE else "FAILED"
        print(f"{verdict} causal_lr in bf16, gqa={int(gqa)}: difference {difference:.1e}", flush=True)
    for method in (dict(pre=8), dict(pre=8, proj=1), dict(lora=4, lora_targets="query_key_value,dense_h_to_4h")):
        c = Config(compile=args.compile, **sizes, **method)
        steps, expected = tiny_steps(c, 4), None
        for name, config in variants(c, device):
            if expected is not None and args.only not in name:
                continue
            losses = losses_of(config, device, steps, std)
            expected = expected or losses
            difference = greatest(abs(a - b) for a, b in zip(losses, expected))
            good = difference <= SELFTEST_TOLERANCE
            num_run += 1
            num_failed += not good
            note = " (forward only: no backward on this device)" if cannot_train(config, device) else ""
            shown = " ".join(f"{loss:.5f}" for loss in losses)
            print(f"{'ok    ' if good else 'FAILED'} {name:<54} losses {shown} difference {difference:.1e}{note}", flush=True)
        for attn in ("packed_mask", "flex"):
            trainer = Trainer(replace(c, attn=attn, pad="packed"), device, torch.float32, lr=1e-2, std=std)
            for what, broken in planted(trainer.c, batch_of(trainer.c, steps[0])):
                with torch.no_grad():
                    difference = abs(trainer.loss(broken).item() - expected[0])
                found = difference > SELFTEST_TOLERANCE
                num_failed += not found
                text = f"planted in {attn}: {what}, which has to be found: difference {difference:.1e}"
                print(f"{'ok    ' if found else 'FAILED'} {text}", flush=True)
    print(f"{num_failed} failed, {num_run} variants run; tolerance {SELFTEST_TOLERANCE}")
    return num_failed == 0 and (num_run > 3 or not args.only)  # 3: the first of each method, which the others are compared with


def load_case(folder):
    """Sizes, weights under this model's names, inputs, and the expected values of P-Tuning v2."""
    from safetensors.torch import load_file

    with open(f"{folder}/hf/config.json") as file:
        raw = json.load(file)
    with open(f"{folder}/hf/model.safetensors.index.json") as file:
        files = set(json.load(file)["weight_map"].values())
    names = dict(layers="num_layers", hidden="hidden_size", ffn="ffn_hidden_size", heads="num_attention_heads")
    names |= dict(groups="multi_query_group_num", kv="kv_channels", vocab="padded_vocab_size")
    sizes = {ours: raw[theirs] for ours, theirs in names.items()}
    renamed = (
        ("transformer.encoder.final_layernorm", "norm"),
        ("transformer.encoder.", ""),
        ("transformer.embedding.word_embeddings", "emb"),
        ("transformer.output_layer", "head"),
    )
    weights = {}
    for name, value in itertools.chain.from_iterable(load_file(f"{folder}/hf/{file}").items() for file in files):
        for theirs, ours in renamed:
            name = name.replace(theirs, ours)
        if "inv_freq" not in name:
            weights[name] = value
    return sizes, weights, load_file(f"{folder}/inputs.safetensors"), load_file(f"{folder}/ptuning.safetensors")


def check(args):
    """Loss and gradient of the prefix against a golden case, f32, for every variant."""
    device, table = args.device, "transformer.prefix_encoder.embedding.weight"
    sizes, weights, inputs, golden = load_case(args.check)
    rows = list(zip(inputs["ids"].tolist(), inputs["labels"].tolist()))
    seq = len(rows[0][0])
    pack_tokens = -(-seq * len(rows) // 128) * 128 + 128  # with a padding document
    c = Config(**sizes, pre=len(golden[table]), dropout=0.0, seq=seq, batch=len(rows), pack_tokens=pack_tokens, compile=args.compile)
    num_failed = num_run = 0
    for name, config in variants(c, device):
        if args.only not in name:
            continue
        trainer = Trainer(config, device, torch.float32, lr=1e-2, weights=weights)
        trainer.prefix.embedding.weight.data.copy_(golden[table])
        with torch.set_grad_enabled(not cannot_train(config, device)):
            loss = trainer.loss(batch_of(config, rows))
        loss_off = abs(loss.item() - golden["plain.loss"].item())
        good = loss_off <= CHECK_TOLERANCE * abs(golden["plain.loss"].item())
        grad_text = "gradient not compared: no backward on this device"
        if not cannot_train(config, device):
            loss.backward()
            expected = golden[f"plain.grad.{table}"]
            grad_off = ((trainer.prefix.embedding.weight.grad.cpu() - expected).abs().max() / expected.abs().max()).item()
            good = good and grad_off <= CHECK_TOLERANCE
            grad_text = f"gradient off by {grad_off:.1e} of its greatest value"
        num_run += 1
        num_failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {name:<54} loss {loss.item():.6f} off by {loss_off:.1e}, {grad_text}", flush=True)
    print(f"{os.path.basename(os.path.normpath(args.check))}: {num_failed} of {num_run} failed; tolerance {CHECK_TOLERANCE} of the value")
    return num_failed == 0 < num_run


def main():
    args, c = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    good = True
    if args.check or args.selftest:
        torch._dynamo.config.recompile_limit = 64  # many variants share one compiled function
        good = check(args) if args.check else selftest(args)
    else:
        good = measure(args, c)
    if WORLD > 1:
        dist.destroy_process_group()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
