"""Times PyTorch's counterparts of glmddp's kernels at the shapes of ChatGLM2-6B: the same names as `glmddp kernels bench --json` uses.

python3 scripts/kernels_torch.py > torch.json                 needs a GPU and PyTorch 2.5 or newer; medians of 20 after 5 warm-up runs
python3 scripts/kernels_torch.py --only attention,adamw       some of the groups
python3 scripts/kernels_torch.py --device cpu --shape small   a rehearsal: every line of this file runs, and its times say nothing

What a name stands for is the fastest way that PyTorch offers by itself: SDPA with its flash backend, functional.rms_norm, compiled SwiGLU,
rotary and cross-entropy, fused AdamW. What cannot run on this version is listed with its error instead of a time.

Before each timed run a filler keeps the GPU busy for about 300 us, so that the host has queued start event, run and end event before the
first of them begins. Where the host was late all the same, the filler grows, and what remains is listed as `host_late`. It moves more than L2
holds, so that operands come from memory, and ends with reading, so that nothing is left to be written back beside what is timed.
"""

import argparse
import importlib.metadata
import json
import signal
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch

WARM_UP, RUNS = 5, 20
DOUBLINGS = 3  # of the filler, at most
SPIN_S = 0.3  # of filler before the first time: until then clocks rise


@dataclass(frozen=True)
class Shape:
    tokens: int = 4096
    row: int = 128
    long_row: int = 2048
    prefix: int = 128
    hidden: int = 4096
    ffn: int = 13696
    vocabulary: int = 65024
    chunk: int = 1024
    heads: int = 32
    groups: int = 2
    head_dim: int = 128
    parameters: int = 1 << 26
    # Of the machine's own speed, and of the filler.
    side: int = 8192
    copy_bytes: int = 1 << 30
    filler_bytes: int = 128 << 20
    filler_copies: int = 3  # 270 us at 3 TB/s

    @property
    def qkv_width(self):
        return (self.heads + 2 * self.groups) * self.head_dim


SHAPES = {
    "6b": Shape(),
    "small": Shape(96, 48, 96, 16, 64, 136, 512, 3, 2, 1, 64, 1000, side=64, copy_bytes=1 << 16, filler_bytes=1 << 12, filler_copies=1),
}


class Bench:
    """A device, the sizes, and the clock."""

    def __init__(self, device, shape):
        self.device, self.shape = device, shape
        self.filler = torch.randint(255, (2, shape.filler_bytes), dtype=torch.uint8, device=device)
        self.host_was_late = False  # in most runs of the last median
        if device == "cuda":
            self.spin()

    def tensor(self, *shape, grad=False):
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16, requires_grad=grad)

    def ids(self, most, count):
        return torch.randint(most, (count,), device=self.device)

    def compile(self, op):
        """A CPU only rehearses the graph: its code would take a compiler a minute."""
        return torch.compile(op, dynamic=False, backend="inductor" if self.device == "cuda" else "aot_eager")

    def fill(self, times=1):
        for _ in range(times * self.shape.filler_copies):
            self.filler[0].copy_(self.filler[1])
        self.filler[0].view(torch.int32).amax()

    def spin(self):
        end = time.perf_counter() + SPIN_S
        while time.perf_counter() < end:
            self.fill(100)
            torch.cuda.synchronize()

    def once(self, run):
        """Milliseconds, and whether the GPU came to the start before the host had queued the end."""
        if self.device == "cpu":
            begun = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begun), False
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        late = start.query()
        end.synchronize()
        return start.elapsed_time(end), late

    def median_ms(self, run, restore=lambda: None):
        """Of `run`, each time after `restore` and the filler."""
        for doubling in range(DOUBLINGS + 1):
            results = []
            for number in range(WARM_UP + RUNS):
                restore()
                self.fill(1 << doubling)
                result = self.once(run)
                if number >= WARM_UP:
                    results.append(result)
            self.host_was_late = sum(late for _, late in results) > RUNS // 2
            if not self.host_was_late:
                break
        return statistics.median(ms for ms, _ in results)

    def backward_ms(self, output, inputs):
        """Of the backward pass alone; the graph is kept."""
        upstream = torch.randn_like(output)
        return self.median_ms(lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True))


def machine(b):
    x = torch.randint(255, (b.shape.copy_bytes,), dtype=torch.uint8, device=b.device)
    y = torch.empty_like(x)
    yield "copy of 1 GiB", b.median_ms(lambda: y.copy_(x))
    left, right = b.tensor(b.shape.side, b.shape.side), b.tensor(b.shape.side, b.shape.side)
    yield "matmul of 8192", b.median_ms(lambda: left @ right)


def products(b):
    s = b.shape
    # Forward x [M, from] w [to, from]^T, and backward dy [M, to] w.
    for name, rows, before, after in (
        ("qkv + bias", s.tokens, s.hidden, s.qkv_width),
        ("dense + residual", s.tokens, s.heads * s.head_dim, s.hidden),
        ("gate_up", s.tokens, s.hidden, 2 * s.ffn),
        ("down + residual", s.tokens, s.ffn, s.hidden),
        ("output layer", s.chunk, s.hidden, s.vocabulary),
    ):
        x, w, dy = b.tensor(rows, before), b.tensor(after, before), b.tensor(rows, after)
        if name.endswith("+ bias"):
            bias = b.tensor(after)
            yield name, b.median_ms(lambda: F.linear(x, w, bias))
        elif name.endswith("+ residual"):
            yield name, b.median_ms(lambda: torch.addmm(dy, x, w.t()))  # dy is as good as any residual
        else:
            yield name, b.median_ms(lambda: F.linear(x, w))
        yield f"{name.split(' + ')[0]}, backward", b.median_ms(lambda: dy @ w)


def embedding(b):
    s = b.shape
    table, ids = b.tensor(s.vocabulary, s.hidden), b.ids(s.vocabulary, s.tokens)
    yield "embedding", b.median_ms(lambda: F.embedding(ids, table))


def rms_norm(b):
    s = b.shape
    x, w = b.tensor(s.tokens, s.hidden, grad=True), b.tensor(s.hidden)
    y = F.rms_norm(x, (s.hidden,), w, 1e-5)
    with torch.no_grad():
        yield "rms_norm_fwd", b.median_ms(lambda: F.rms_norm(x, (s.hidden,), w, 1e-5))
    yield "rms_norm_bwd", b.backward_ms(y, [x])


def rotary(b):
    """In place, in the first half of each head of queries and keys."""
    s = b.shape
    qkv = b.tensor(s.tokens, s.heads + 2 * s.groups, s.head_dim)
    kept = qkv.clone()
    angles = torch.rand(s.tokens, 1, s.head_dim // 4, device=b.device)
    cos, sin = angles.cos(), angles.sin()

    def op(qkv):
        pairs = qkv[:, : s.heads + s.groups, : s.head_dim // 2].unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0].float(), pairs[..., 1].float()
        pairs.copy_(torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1))

    compiled = b.compile(op)
    yield "rotary", b.median_ms(lambda: compiled(qkv), restore=lambda: qkv.copy_(kept))


def attention(b):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    s = b.shape
    for row, of_rows in ((s.row, ""), (s.long_row, ", long rows")):
        for prefix in (0, s.prefix):
            rows = s.tokens // row
            q = b.tensor(rows, s.heads, row, s.head_dim, grad=True)
            # Keys of a group are read by all its heads; expanded, as the flash backend wants them.
            k, v = (
                b.tensor(rows, s.groups, prefix + row, s.head_dim).repeat_interleave(s.heads // s.groups, dim=1).requires_grad_()
                for _ in range(2)
            )
            bias = causal_lower_right(row, prefix + row)

            def forward():
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

            out = forward()
            with torch.no_grad():
                yield f"attention_fwd prefix {prefix}{of_rows}", b.median_ms(forward)
            yield f"attention_bwd prefix {prefix}{of_rows}", b.backward_ms(out, [q, k, v])


def swiglu(b):
    def op(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    compiled = b.compile(op)
    x = b.tensor(b.shape.tokens, 2 * b.shape.ffn, grad=True)
    y = compiled(x)
    with torch.no_grad():
        yield "swiglu_fwd", b.median_ms(lambda: compiled(x))
    yield "swiglu_bwd", b.backward_ms(y, [x])


def cross_entropy(b):
    def op(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    compiled = b.compile(op)
    logits, targets = b.tensor(b.shape.chunk, b.shape.vocabulary, grad=True), b.ids(b.shape.vocabulary, b.shape.chunk)

    def both():
        loss = compiled(logits, targets)
        torch.autograd.grad(loss, [logits])

    yield "cross_entropy", b.median_ms(both)


def adamw(b):
    parameter = torch.nn.Parameter(torch.randn(b.shape.parameters, device=b.device))
    parameter.grad = torch.randn_like(parameter)
    yield "global_norm", b.median_ms(lambda: torch.linalg.vector_norm(parameter.grad))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    state = optimizer.state[parameter]
    changed = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]
    kept = [tensor.clone() for tensor in changed]
    yield "adamw", b.median_ms(optimizer.step, restore=lambda: [tensor.copy_(old) for tensor, old in zip(changed, kept)])


GROUPS = (machine, products, embedding, rms_norm, rotary, attention, swiglu, cross_entropy, adamw)


def say(text):
    print(text, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="6b", choices=SHAPES)
    parser.add_argument("--only", default="", help=f"of {', '.join(group.__name__ for group in GROUPS)}; separated by commas")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU")
    only = set(filter(None, args.only.split(",")))
    if unknown := only - {group.__name__ for group in GROUPS}:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    try:
        cublas = importlib.metadata.version("nvidia-cublas")
    except importlib.metadata.PackageNotFoundError:
        cublas = "not a wheel"
    about = {"torch": torch.__version__, "cublas": cublas, "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none, a CPU", "runs": RUNS}
    if args.device == "cpu" or args.shape != "6b":
        about["rehearsal"] = f"--device {args.device} --shape {args.shape}: the times say nothing"
    functorch.donated_buffer = False  # backward passes run more than once on what their forward pass kept
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to stop; what was measured so far is printed"))
    times, failed, late = {}, {}, []
    try:
        bench = Bench(args.device, SHAPES[args.shape])
        for group in GROUPS:
            if only and group.__name__ not in only:
                continue
            try:
                for name, ms in group(bench):
                    times[name] = ms
                    if bench.host_was_late:
                        late.append(name)
                    say(f"{name}: {ms:.4f} ms{' (host late)' * bench.host_was_late}")
            except Exception as error:  # a backend that this version lacks, or too little memory; told below, never taken for a time
                failed[group.__name__] = f"{type(error).__name__}: {error}"
                say(f"FAILED {group.__name__}: {failed[group.__name__]}")
            if args.device == "cuda":
                torch.cuda.empty_cache()
    finally:
        print(json.dumps({"about": about, "median_ms": times, "host_late": late, "failed": failed}, indent=1), flush=True)


if __name__ == "__main__":
    main()
