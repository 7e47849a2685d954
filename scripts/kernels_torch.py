"""Times PyTorch's counterparts of glmddp's kernels at the shapes of ChatGLM2-6B: the same names as `glmddp kernels bench --json` uses.

python3 scripts/kernels_torch.py > torch.json      needs a GPU and PyTorch 2.5 or newer; medians of 20 after 5 warm-up runs

What a name stands for is the fastest way that PyTorch offers by itself: SDPA with its flash backend, functional.rms_norm, compiled SwiGLU and
cross-entropy, fused AdamW. What cannot run on this version is listed with its error instead of a time.
"""

import json
import statistics
import sys

import torch
import torch.nn.functional as F

TOKENS, HIDDEN, FFN, VOCAB, HEADS, GROUPS, HEAD_DIM = 4096, 4096, 13696, 65024, 32, 2, 128
ROW, CHUNK, PREFIX, PARAMETERS = 128, 1024, 128, 1 << 26
WARM_UP, RUNS = 5, 20


def median_ms(run):
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tensor(*shape, grad=False):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def backward_ms(output, inputs):
    """Of the backward pass alone; the graph is kept."""
    upstream = torch.randn_like(output)
    return median_ms(lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True))


def rms_norm():
    x, w = tensor(TOKENS, HIDDEN, grad=True), tensor(HIDDEN)
    y = F.rms_norm(x, (HIDDEN,), w, 1e-5)
    with torch.no_grad():
        yield "rms_norm_fwd", median_ms(lambda: F.rms_norm(x, (HIDDEN,), w, 1e-5))
    yield "rms_norm_bwd", backward_ms(y, [x])


def swiglu():
    def op(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    compiled = torch.compile(op)
    x = tensor(TOKENS, 2 * FFN, grad=True)
    y = compiled(x)
    with torch.no_grad():
        yield "swiglu_fwd", median_ms(lambda: compiled(x))
    yield "swiglu_bwd", backward_ms(y, [x])


def attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    rows = TOKENS // ROW
    for prefix in (0, PREFIX):
        q = tensor(rows, HEADS, ROW, HEAD_DIM, grad=True)
        # Keys of a group are read by all its heads; expanded, as the flash backend wants them.
        k, v = (
            tensor(rows, GROUPS, prefix + ROW, HEAD_DIM).repeat_interleave(HEADS // GROUPS, dim=1).requires_grad_() for _ in range(2)
        )
        bias = causal_lower_right(ROW, prefix + ROW)

        def forward():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        out = forward()
        with torch.no_grad():
            yield f"attention_fwd prefix {prefix}", median_ms(forward)
        yield f"attention_bwd prefix {prefix}", backward_ms(out, [q, k, v])


def cross_entropy():
    def op(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    compiled = torch.compile(op)
    logits, targets = tensor(CHUNK, VOCAB, grad=True), torch.randint(VOCAB, (CHUNK,), device="cuda")

    def both():
        loss = compiled(logits, targets)
        torch.autograd.grad(loss, [logits])

    yield "cross_entropy", median_ms(both)


def embedding():
    table, ids = tensor(VOCAB, HIDDEN), torch.randint(VOCAB, (TOKENS,), device="cuda")
    yield "embedding", median_ms(lambda: F.embedding(ids, table))


def adamw():
    parameter = torch.nn.Parameter(torch.randn(PARAMETERS, device="cuda"))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    yield "adamw", median_ms(optimizer.step)


def machine():
    x = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    yield "copy of 1 GiB", median_ms(lambda: y.copy_(x))
    a, b = tensor(8192, 8192), tensor(8192, 8192)
    yield "matmul of 8192", median_ms(lambda: a @ b)


def main():
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU")
    times, failed = {}, {}
    for group in (machine, rms_norm, swiglu, attention, cross_entropy, embedding, adamw):
        try:
            times.update(group())
        except Exception as error:  # a backend that this version lacks; told below, never taken for a time
            failed[group.__name__] = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
    about = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "runs": RUNS}
    print(json.dumps({"about": about, "median_ms": times, "failed": failed}, indent=1))


if __name__ == "__main__":
    main()
