"""Independent PyTorch reference of ChatGLM2 with P-Tuning v2 and LoRA.

Written from the behaviour of the published model, not copied from it: batch-first layout,
explicit softmax attention (or SDPA), plain tensors for caches.  Parameter names follow the
published checkpoint so that its weights load by name.
"""
import json
import math
from dataclasses import dataclass, fields
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

KV = Tuple[torch.Tensor, torch.Tensor]  # each [batch, groups, seq, head_dim]


@dataclass
class Cfg:
    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    layernorm_epsilon: float = 1e-5
    seq_length: int = 32768
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    post_layer_norm: bool = True
    pre_seq_len: Optional[int] = None
    prefix_projection: bool = False
    eos_token_id: int = 2
    pad_token_id: int = 0

    @staticmethod
    def load(path: str) -> "Cfg":
        raw = json.load(open(path))
        return Cfg(**{f.name: raw[f.name] for f in fields(Cfg) if f.name in raw})


def rms_norm(x, w, eps):
    # whole computation in f32, one cast at the end
    h = x.double() if x.dtype == torch.float64 else x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (w.to(h.dtype) * h).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_table(rot_dim: int, positions: torch.Tensor, compute=torch.float32, out=torch.float32):
    """cos/sin [..., rot_dim/2].  rot_dim = kv_channels/2: only the first half of a head turns.
    The published code computes angle AND position in the model's dtype; compute=float32
    gives the clean value, compute=float16/bfloat16 mimics the published one."""
    i = torch.arange(0, rot_dim, 2, dtype=compute)
    theta = 1.0 / (10000 ** (i / rot_dim))
    ang = (positions.to(compute).unsqueeze(-1) * theta).to(torch.float64 if compute == torch.float64 else torch.float32)
    return torch.cos(ang).to(out), torch.sin(ang).to(out)


def rotate(x, cos, sin):
    """x [b, s, heads, d]; cos/sin [b or 1, s, d/4]: pairs (x0,x1),(x2,x3).. of the first d/2 channels."""
    half = cos.shape[-1] * 2
    a, keep = x[..., :half], x[..., half:]
    a = a.unflatten(-1, (-1, 2))
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    even = a[..., 0] * c - a[..., 1] * s
    odd = a[..., 1] * c + a[..., 0] * s
    return torch.cat([torch.stack([even, odd], -1).flatten(-2), keep], -1)


class Attention(nn.Module):
    def __init__(self, c: Cfg):
        super().__init__()
        self.c = c
        self.nq = c.num_attention_heads * c.kv_channels
        self.nk = c.multi_query_group_num * c.kv_channels
        self.query_key_value = nn.Linear(c.hidden_size, self.nq + 2 * self.nk, bias=c.add_qkv_bias or c.add_bias_linear)
        self.dense = nn.Linear(self.nq, c.hidden_size, bias=c.add_bias_linear)
        self.use_sdpa = False

    def forward(self, x, cos, sin, keep, past: Optional[KV]):
        c, (b, s, _) = self.c, x.shape
        qkv = self.query_key_value(x)
        q, k, v = qkv.split([self.nq, self.nk, self.nk], -1)
        q = rotate(q.view(b, s, c.num_attention_heads, c.kv_channels), cos, sin).transpose(1, 2)
        k = rotate(k.view(b, s, c.multi_query_group_num, c.kv_channels), cos, sin).transpose(1, 2)
        v = v.view(b, s, c.multi_query_group_num, c.kv_channels).transpose(1, 2)
        if past is not None:  # past keys are used as they are: prefix keys are never turned
            k = torch.cat([past[0].to(k.dtype), k], 2)
            v = torch.cat([past[1].to(v.dtype), v], 2)
        rep = c.num_attention_heads // c.multi_query_group_num  # head h reads group h // rep
        if self.use_sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if keep is None else keep,
                                               is_causal=keep is None and s == k.shape[2] and s > 1, enable_gqa=rep > 1)
        else:
            kk, vv = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
            sc = (q @ kk.transpose(2, 3)) / math.sqrt(c.kv_channels)
            sc = sc if sc.dtype == torch.float64 else sc.float()
            if keep is None and s > 1:
                keep = torch.ones(s, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - s)
            if keep is not None:
                sc = sc.masked_fill(~keep, float("-inf"))
            y = sc.softmax(-1).to(vv.dtype) @ vv
        return self.dense(y.transpose(1, 2).reshape(b, s, self.nq)), (k, v)


class Mlp(nn.Module):
    def __init__(self, c: Cfg):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=c.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=c.add_bias_linear)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Cfg):
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.layernorm_epsilon)
        self.self_attention = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.layernorm_epsilon)
        self.mlp = Mlp(c)

    def forward(self, x, cos, sin, keep, past):
        y, kv = self.self_attention(self.input_layernorm(x), cos, sin, keep, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Prefix(nn.Module):
    """P-Tuning v2 table, optionally through Linear-Tanh-Linear.  Row layout (last dim):
    [layer0 K | layer0 V | layer1 K | ...], each groups*kv_channels wide."""

    def __init__(self, c: Cfg):
        super().__init__()
        w = c.num_layers * 2 * c.multi_query_group_num * c.kv_channels
        self.embedding = nn.Embedding(c.pre_seq_len, w)
        if c.prefix_projection:
            self.trans = nn.Sequential(nn.Linear(w, c.hidden_size), nn.Tanh(), nn.Linear(c.hidden_size, w))

    def forward(self):
        t = self.embedding.weight
        return self.trans(t) if hasattr(self, "trans") else t


class ChatGLM2(nn.Module):
    def __init__(self, c: Cfg, use_sdpa=False):
        super().__init__()
        self.c = c
        t = nn.Module()
        t.embedding = nn.Module()
        t.embedding.word_embeddings = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        t.encoder = nn.Module()
        t.encoder.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        if c.post_layer_norm:
            t.encoder.final_layernorm = Norm(c.hidden_size, c.layernorm_epsilon)
        t.output_layer = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        if c.pre_seq_len:
            t.prefix_encoder = Prefix(c)
        self.transformer = t
        self.rope_compute = torch.float32
        self.grad_checkpoint = False
        for l in t.encoder.layers:
            l.self_attention.use_sdpa = use_sdpa

    def freeze_base(self):
        for n, p in self.named_parameters():
            p.requires_grad_("prefix_encoder" in n)

    def prefix_kv(self, batch: int, dtype, drop: Optional[torch.Tensor] = None) -> List[KV]:
        """drop: multiplier [batch, pre_seq_len, 2*layers, groups, kv] (0 or 1/(1-p)); the published model
        draws it per batch ROW (the table is expanded first), p = 0.1, in training only."""
        c = self.c
        t = self.transformer.prefix_encoder().to(dtype)
        t = t.view(1, c.pre_seq_len, 2 * c.num_layers, c.multi_query_group_num, c.kv_channels)
        t = t.expand(batch, -1, -1, -1, -1)
        if drop is not None:
            t = t * drop.to(dtype)
        t = t.permute(2, 0, 3, 1, 4)  # [2L, b, g, pre, d]
        return [(t[2 * i], t[2 * i + 1]) for i in range(c.num_layers)]

    @staticmethod
    def keep_mask(b, s, past_len, pad_mask, device):
        """True = may look. pad_mask [b, past_len + s] of 0/1 or None."""
        keep = torch.ones(s, past_len + s, dtype=torch.bool, device=device).tril(past_len)
        keep = keep.expand(b, s, past_len + s)
        if pad_mask is not None:
            keep = keep & pad_mask.bool()[:, None, :]
            if past_len == 0:  # padded query rows look at everything (no NaN rows)
                keep = keep | ~pad_mask.bool()[:, :, None]
        return keep[:, None]

    def forward(self, ids, attention_mask=None, position_ids=None, past: Optional[List[KV]] = None, drop=None,
                logits_last_only=False):
        c, (b, s) = self.c, ids.shape
        x = self.transformer.embedding.word_embeddings(ids)
        if c.pre_seq_len:
            if past is None:
                past = self.prefix_kv(b, x.dtype, drop)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(b, c.pre_seq_len), attention_mask], 1)
        n_past = 0 if past is None else past[0][0].shape[2]
        padded = attention_mask is not None and not bool(attention_mask.all())
        keep = None
        if padded or (n_past and s != 1):
            keep = self.keep_mask(b, s, n_past, attention_mask, ids.device)
        if position_ids is None:  # real tokens start at 0 whatever stands before them
            position_ids = torch.arange(s, device=ids.device)[None]
        comp = torch.float64 if x.dtype == torch.float64 else self.rope_compute
        cos, sin = rope_table(c.kv_channels // 2, position_ids.cpu(), comp, x.dtype)
        cos, sin = cos.to(ids.device), sin.to(ids.device)
        new = []
        for i, layer in enumerate(self.transformer.encoder.layers):
            p = None if past is None else past[i]
            if self.grad_checkpoint and self.training:
                x, kv = checkpoint(layer, x, cos, sin, keep, p, use_reentrant=False)
                kv = None
            else:
                x, kv = layer(x, cos, sin, keep, p)
            new.append(kv)
        if c.post_layer_norm:
            x = self.transformer.encoder.final_layernorm(x)
        if logits_last_only:
            x = x[:, -1:]
        return self.transformer.output_layer(x), new

    def loss(self, logits, labels):
        """Mean over non-ignored shifted labels, in f32; also per token (0 where ignored)."""
        lf = logits if logits.dtype == torch.float64 else logits.float()
        flat = F.cross_entropy(lf[:, :-1].reshape(-1, lf.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100,
                               reduction="none")
        n = (labels[:, 1:] != -100).sum()
        return flat.sum() / n, flat.view(labels.shape[0], -1)

    @torch.no_grad()
    def greedy(self, ids, n_new, attention_mask=None, position_ids=None, eos=None):
        b = ids.shape[0]
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1])[None].expand(b, -1)
        past, cur, pos, am, out, margin = None, ids, position_ids, attention_mask, [], []
        for _ in range(n_new):
            lg, past = self(cur, am, pos, past, logits_last_only=True)
            top = lg[:, -1].topk(2, -1)
            nxt = top.indices[:, 0]
            margin.append(top.values[:, 0] - top.values[:, 1])
            out.append(nxt)
            cur, pos = nxt[:, None], pos[:, -1:] + 1
            if am is not None:
                am = torch.cat([am, am.new_ones(b, 1)], 1)
        return torch.stack(out, 1), torch.stack(margin, 1)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, r, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.A = nn.Parameter(torch.zeros(r, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def add_lora(model: ChatGLM2, r, alpha, targets=("query_key_value",)):
    for p in model.parameters():
        p.requires_grad_(False)
    done = {}
    for i, l in enumerate(model.transformer.encoder.layers):
        for parent, pn in ((l.self_attention, "self_attention"), (l.mlp, "mlp")):
            for name in targets:
                if isinstance(getattr(parent, name, None), nn.Linear):
                    m = Lora(getattr(parent, name), r, alpha)
                    setattr(parent, name, m)
                    done[f"transformer.encoder.layers.{i}.{pn}.{name}"] = m
    return done
