"""CPU baseline: P-Tuning v2, LoRA or full fine-tuning on a ChatGLM2-shaped random model, real AdvertiseGen rows, THUDM padding."""
import argparse, json, os, resource, sys, time
import torch
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from chatglm2_ref import Cfg, ChatGLM2
import torch.nn.functional as F
a = argparse.ArgumentParser()
a.add_argument("--tokenizer", default=os.path.join(HERE, "../../shared/chatglm2/tokenizer.model")); a.add_argument("--data", default=os.path.join(HERE, "../../shared/data/advertisegen/train.jsonl"))
a.add_argument("--layers", type=int, default=8); a.add_argument("--hidden", type=int, default=512); a.add_argument("--ffn", type=int, default=1368)
a.add_argument("--heads", type=int, default=8); a.add_argument("--groups", type=int, default=2); a.add_argument("--kv", type=int, default=64); a.add_argument("--vocab", type=int, default=65024)
a.add_argument("--pre", type=int, default=128); a.add_argument("--batch", type=int, default=4); a.add_argument("--seq", type=int, default=192)
a.add_argument("--steps", type=int, default=8); a.add_argument("--warmup", type=int, default=2); a.add_argument("--threads", type=int, default=2)
a.add_argument("--sdpa", type=int, default=1); a.add_argument("--smart", type=int, default=0, help="0 = THUDM way (logits of all positions); 1 = logits only where a label is")
a.add_argument("--pad", default="max", choices=["max", "batch"]); a.add_argument("--lora", type=int, default=0)
a.add_argument("--method", choices=["full"], help="all weights in place of the prefix")
a.add_argument("--adamw", choices=["default", "foreach", "fused"], default="default", help="torch's implementations of the update")
a = a.parse_args()
full = a.method == "full"
if full and a.lora: sys.exit("error: --method full and --lora are two methods")
torch.set_num_threads(a.threads); torch.manual_seed(0)
import sentencepiece
sp = sentencepiece.SentencePieceProcessor(model_file=a.tokenizer)


def sample(r, ms=64, mt=None):
    mt = mt or a.seq - 64 - 1
    p = ([64790, 64792] + sp.encode(f"[Round 1]\n\n问：{r['content']}\n\n答："))[:ms]
    b = sp.encode(r["summary"])[:mt]
    ids = p + b + [2]; lab = [-100] * len(p) + b + [2]
    return ids, lab


rows = [json.loads(l) for _, l in zip(range(a.batch * (a.steps + a.warmup)), open(a.data, encoding="utf-8"))]
data = [sample(r) for r in rows]
c = Cfg(num_layers=a.layers, padded_vocab_size=a.vocab, hidden_size=a.hidden, ffn_hidden_size=a.ffn, kv_channels=a.kv, num_attention_heads=a.heads, multi_query_group_num=a.groups, pre_seq_len=None if a.lora or full else a.pre)
m = ChatGLM2(c, use_sdpa=bool(a.sdpa))
for n, p in m.named_parameters():
    if p.dim() == 2 and "prefix" not in n: torch.nn.init.normal_(p, std=0.02)
if a.lora:
    from chatglm2_ref import add_lora
    mods = add_lora(m, a.lora, 16)
    for x in mods.values(): torch.nn.init.kaiming_uniform_(x.A, a=5 ** 0.5)
elif not full: m.freeze_base()
m.train()
ps = [p for p in m.parameters() if p.requires_grad]
opt = torch.optim.AdamW(ps, lr=1e-4 if full else 2e-2, weight_decay=0.0, **({} if a.adamw == "default" else {a.adamw: True}))
drop = None
ts, real, losses, tgt = [], [], [], []
for s in range(a.steps + a.warmup):
    bt = data[s * a.batch:(s + 1) * a.batch]
    w = a.seq if a.pad == "max" else max(len(i) for i, _ in bt)
    ids = torch.tensor([i + [0] * (w - len(i)) for i, _ in bt]); lab = torch.tensor([l + [-100] * (w - len(l)) for _, l in bt])
    t0 = time.perf_counter()
    if not a.lora and not full: drop = (torch.rand(a.batch, c.pre_seq_len, 2 * c.num_layers, c.multi_query_group_num, c.kv_channels) >= 0.1).float() / 0.9
    if a.smart:
        out = {}
        h = m.transformer.output_layer.register_forward_pre_hook(lambda mod, x: (x[0][:, :-1][lab[:, 1:] != -100],))
        lg, _ = m(ids, drop=drop); h.remove()
        loss = F.cross_entropy(lg.float(), lab[:, 1:][lab[:, 1:] != -100])
    else:
        lg, _ = m(ids, drop=drop); loss = F.cross_entropy(lg[:, :-1].float().reshape(-1, lg.shape[-1]), lab[:, 1:].reshape(-1), ignore_index=-100)
    opt.zero_grad(set_to_none=True); loss.backward(); torch.nn.utils.clip_grad_norm_(ps, 1.0); opt.step()
    losses.append(float(loss.detach()))
    if s >= a.warmup: ts.append(time.perf_counter() - t0); real.append(sum(len(i) for i, _ in bt)); tgt.append(ids.numel())
ts_s = sorted(ts); med = ts_s[len(ts) // 2]
print(json.dumps(dict(mode="smart" if a.smart else "thudm", pad=a.pad, method=a.method or ("lora" if a.lora else "prefix"), adamw=a.adamw, lora=a.lora, sdpa=a.sdpa, params=sum(p.numel() for p in m.parameters()), trainable=sum(p.numel() for p in ps), batch=a.batch, seq=a.seq, pre=a.pre, steps=a.steps,
    ms_step_median=round(med * 1e3, 1), ms_step_min=round(ts_s[0] * 1e3, 1), ms_step_max=round(ts_s[-1] * 1e3, 1), tokens_s=round(sum(tgt) / sum(ts), 1), real_tokens_s=round(sum(real) / sum(ts), 1), real_tokens=sum(real), real_fraction=round(sum(real) / sum(tgt), 3),
    peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, first_loss=round(losses[0], 4), last_loss=round(losses[-1], 4), torch=torch.__version__, threads=a.threads)))
