"""The PyTorch side of scripts/learning_parity.sh.

`model` writes a small ChatGLM2 with random weights in the hub's format. `compare` starts PyTorch at the same prefix, takes the very batches
that glmddp took, with the same AdamW, clipping and linear schedule, and holds the two loss curves against each other.
"""
import argparse
import json
import os
import shutil
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from chatglm2_ref import Cfg, ChatGLM2

PREFIX = "transformer.prefix_encoder."


def make_model(a):
    cfg = Cfg(num_layers=a.layers, hidden_size=a.hidden, ffn_hidden_size=a.ffn, num_attention_heads=a.heads, kv_channels=64, multi_query_group_num=2)
    torch.manual_seed(0)
    weights = {n: p.detach().clone() for n, p in ChatGLM2(cfg).named_parameters()}
    for name, w in weights.items():
        if w.dim() == 2:
            torch.nn.init.normal_(w, std=a.std)
        elif name.endswith("bias"):
            torch.nn.init.normal_(w, std=0.02)
    os.makedirs(a.out, exist_ok=True)
    save_file(weights, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
    config = dict(
        model_type="chatglm", architectures=["ChatGLMModel"], num_layers=cfg.num_layers, padded_vocab_size=cfg.padded_vocab_size,
        hidden_size=cfg.hidden_size, ffn_hidden_size=cfg.ffn_hidden_size, kv_channels=cfg.kv_channels, num_attention_heads=cfg.num_attention_heads,
        multi_query_attention=True, multi_query_group_num=cfg.multi_query_group_num, seq_length=cfg.seq_length,
        layernorm_epsilon=cfg.layernorm_epsilon, rmsnorm=True, post_layer_norm=True, add_bias_linear=False, add_qkv_bias=True,
        apply_query_key_layer_scaling=True, apply_residual_connection_post_layernorm=False, attention_softmax_in_fp32=True,
        fp32_residual_connection=False, original_rope=True, bias_dropout_fusion=True, attention_dropout=0.0, hidden_dropout=0.0,
        tie_word_embeddings=False, torch_dtype="float32", eos_token_id=2, pad_token_id=0,
    )
    with open(os.path.join(a.out, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)
    shutil.copyfile(a.tokenizer, os.path.join(a.out, "tokenizer.model"))
    print(f"{a.out}: {sum(w.numel() for w in weights.values()):,} parameters")


def read_steps(paths):
    """[step][slot] -> rows of (ids, is_target), in the order of the slots; each rank has a file with its own slots."""
    steps = {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            for line in f:
                b = json.loads(line)
                slots = steps.setdefault(b["step"], {})
                if b["slot"] in slots:
                    sys.exit(f"error: {path}: step {b['step']} has slot {b['slot']} twice")
                slots[b["slot"]] = [(r["ids"], [bool(t) for t in r["is_target"]]) for r in b["rows"]]
    return [[slots[s] for s in sorted(slots)] for _, slots in sorted(steps.items())]


def read_losses(path):
    with open(path, encoding="utf-8") as f:
        return [r["loss"] for r in map(json.loads, f) if "loss" in r]


def summed_loss(model, rows):
    """Sum of the target tokens' losses of a micro-batch. Right padding needs no mask: no row's own token looks at it."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [0] * (width - len(r)) for r, _ in rows])
    wanted = torch.tensor([t[1:] + [False] * (width - len(t)) for _, t in rows])
    head = model.transformer.output_layer.register_forward_pre_hook(lambda _, x: (x[0][:, :-1][wanted],))
    logits, _ = model(ids)
    head.remove()
    return F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum")


def torch_curve(a):
    prefix = {n: t.float() for n, t in load_file(a.prefix).items()}
    cfg = Cfg.load(os.path.join(a.model, "config.json"))
    cfg.pre_seq_len = prefix[PREFIX + "embedding.weight"].shape[0]
    cfg.prefix_projection = any(".trans." in n for n in prefix)
    model = ChatGLM2(cfg, use_sdpa=True)
    weights = {n: w.float() for n, w in load_file(os.path.join(a.model, "model.safetensors")).items()}
    missing, unknown = model.load_state_dict({**weights, **prefix}, strict=False)
    if missing or unknown:
        sys.exit(f"error: tensors missing {missing}, unknown {unknown}")
    model.freeze_base()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=a.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    steps, losses, started = read_steps(a.batches), [], time.time()
    for t, slots in enumerate(steps):
        tokens = sum(sum(is_target[1:]) for rows in slots for _, is_target in rows)
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for rows in slots:
            nll = summed_loss(model, rows)
            (nll / tokens).backward()
            total += float(nll.detach())
        losses.append(total / tokens)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in adamw.param_groups:
            group["lr"] = a.learning_rate * (len(steps) - t) / len(steps)
        adamw.step()
        if (t + 1) % 20 == 0:
            print(f"step {t + 1}/{len(steps)}, loss {losses[-1]:.4f}, {(time.time() - started) / (t + 1):.2f} s a step", file=sys.stderr)
    return losses


def compare(a):
    torch.set_num_threads(a.threads)
    ours, theirs = read_losses(a.log), torch_curve(a)
    if len(ours) != len(theirs) or not ours:
        sys.exit(f"error: {a.log} has {len(ours)} losses and {a.batches[0]} {len(theirs)} steps; train with --logging_steps 1")
    relative = [abs(o - t) / t for o, t in zip(ours, theirs)]
    worst = max(range(len(relative)), key=relative.__getitem__)
    tail = min(10, len(ours))
    end = [sum(c[-tail:]) / tail for c in (ours, theirs)]
    end_relative = abs(end[0] - end[1]) / end[1]
    print(f"steps {len(ours)}: glmddp {ours[0]:.4f} -> {ours[-1]:.4f}, PyTorch {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    print(f"largest difference {100 * relative[worst]:.4f} % at step {worst + 1} (bound 2 %), median {100 * sorted(relative)[len(relative) // 2]:.5f} %")
    print(f"mean of the last {tail}: glmddp {end[0]:.5f}, PyTorch {end[1]:.5f}, difference {100 * end_relative:.4f} % (bound 0.5 %)")
    print(f"largest difference over the fall of the loss: {100 * max(abs(o - t) for o, t in zip(ours, theirs)) / max(theirs[0] - end[1], 1e-9):.3f} %")
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump({"glmddp": ours, "torch": theirs, "largest": relative[worst], "end": end_relative}, f)
            f.write("\n")
    learnt = end[0] < ours[0]
    if not learnt:
        print("the loss did not fall")
    sys.exit(0 if relative[worst] <= 0.02 and end_relative <= 0.005 and learnt else 1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    m = sub.add_parser("model")
    m.add_argument("--out", required=True)
    m.add_argument("--tokenizer", required=True)
    m.add_argument("--layers", type=int, default=4)
    m.add_argument("--hidden", type=int, default=256)
    m.add_argument("--ffn", type=int, default=688)
    m.add_argument("--heads", type=int, default=4)
    m.add_argument("--std", type=float, default=0.02, help="of the matrices; with more of it attention depends more on tokens and positions")
    m.set_defaults(run=make_model)
    c = sub.add_parser("compare")
    for name in ("model", "prefix", "log"):
        c.add_argument(f"--{name}", required=True)
    c.add_argument("--batches", required=True, nargs="+", help="what --dump_batches wrote, the files of all ranks")
    c.add_argument("--learning_rate", type=float, required=True)
    c.add_argument("--threads", type=int, default=os.cpu_count())
    c.add_argument("--json")
    c.set_defaults(run=compare)
    a = p.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
