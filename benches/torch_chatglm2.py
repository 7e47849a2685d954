"""ChatGLM2 in plain PyTorch for bench_torch_gpu.py: several ways to attend, padded or packed rows, a trained prefix or LoRA.

Written for speed on a GPU; chatglm2_ref.py is the readable reference, and both are held against the same golden cases.
Shapes: b rows of n tokens (packed: b = 1 and n is all tokens), P keys of the prefix, H heads, G groups, D channels of a head.
"""

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

IGNORED, PAD, EOS = -100, 0, 2
MAX_SOURCE, MAX_POSITION = 64, 2048
PADDED_ATTN, PACKED_ATTN = ("mask", "causal_lr"), ("flex", "packed_mask")

Row = Tuple[List[int], List[int]]  # ids, labels


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Sizes (by default ChatGLM2-6B's), the method, and the way to compute it. Each field is an option of the command line."""

    layers: int = option(28, "number of layers")
    hidden: int = option(4096, "hidden size")
    ffn: int = option(13696, "inner size of the MLP")
    heads: int = option(32, "query heads")
    groups: int = option(2, "heads of keys and values")
    kv: int = option(128, "channels of a head")
    vocab: int = option(65024, "rows of the embedding")
    pre: int = option(128, "prefix length of P-Tuning v2; 0 with --lora")
    proj: int = option(0, "1: the prefix passes Linear, Tanh, Linear", (0, 1))
    dropout: float = option(0.1, "of the prefix: for each row where rows are padded, of the one shared table where they are packed")
    lora: int = option(0, "rank of the adapters that replace the prefix")
    lora_targets: str = option("query_key_value", "projections with adapters, separated by commas")
    seq: int = option(192, "most tokens of a row")
    batch: int = option(8, "rows of a padded micro-batch")
    pad: str = option("max", "rows padded to --seq, padded to the longest of their batch, or packed", ("max", "batch", "packed"))
    pack_tokens: int = option(4096, "tokens of a packed micro-batch, with its padding")
    attn: str = option("", "default: mask; flex for packed rows", PADDED_ATTN + PACKED_ATTN)
    gqa: int = option(-1, "1: keys of a group are stored once; 0: repeated for all its heads; default: 1 for flex, else 0", (0, 1))
    logits: str = option("all", "of all positions, or only where a label is", ("all", "labels"))
    ckpt: int = option(0, "1: each layer is recomputed in the backward pass", (0, 1))
    ckpt_reentrant: int = option(0, "1: PyTorch's older checkpoint", (0, 1))
    compile: str = option("none", "what torch.compile gets; with none, flex alone is compiled", ("none", "layer", "model"))

    def __post_init__(self):
        attn = self.attn or ("flex" if self.packed else "mask")
        if attn not in (PACKED_ATTN if self.packed else PADDED_ATTN):
            raise ValueError(f"--attn {attn} does not go with --pad {self.pad}")
        if self.packed and self.seq > self.pack_tokens:
            raise ValueError(f"a row of {self.seq} tokens (--seq) does not fit in {self.pack_tokens} (--pack-tokens)")
        resolved = {"attn": attn, "gqa": int(attn == "flex") if self.gqa < 0 else self.gqa, "pre": 0 if self.lora else self.pre}
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    @property
    def packed(self):
        return self.pad == "packed"


# Rows and batches


@dataclass
class Batch:
    ids: torch.Tensor  # [b, n]
    targets: torch.Tensor  # [b, n]: the label of the next token, IGNORED where there is none
    positions: torch.Tensor  # [n]
    documents: Optional[torch.Tensor]  # [n] if packed: which row a token is of
    picked: torch.Tensor  # places in b * n that have a target
    rows: List[int]  # real tokens of each row
    computed: List[int]  # the same with padding: what the GPU works on

    def to(self, device):
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(**{**vars(self), **moved})


def make_row(source: List[int], target: List[int], seq: int) -> Row:
    """Cut as the published recipe cuts: the prompt at 64 tokens (half a shorter row), the answer where the row is full."""
    source = source[: min(MAX_SOURCE, seq // 2)]
    target = target[: seq - len(source) - 1] + [EOS]
    return source + target, [IGNORED] * len(source) + target


def make_batch(rows: List[Row], ids, targets, positions, documents, computed) -> Batch:
    ids, targets = torch.tensor(ids), torch.tensor(targets)
    picked = (targets.flatten() != IGNORED).nonzero().flatten()
    return Batch(ids, targets, torch.tensor(positions), documents, picked, [len(i) for i, _ in rows], computed)


def pad_rows(rows: List[Row], width: int) -> Batch:
    """Each row for itself, padding at its end, where no real token sees it."""
    ids = [i + [PAD] * (width - len(i)) for i, _ in rows]
    targets = [labels[1:] + [IGNORED] * (width + 1 - len(labels)) for _, labels in rows]
    return make_batch(rows, ids, targets, list(range(width)), None, [width] * len(rows))


def pack_rows(rows: List[Row], tokens: int) -> Batch:
    """All rows behind each other in one sequence of `tokens`. The rest of it is one more document, without targets."""
    rest = tokens - sum(len(i) for i, _ in rows)
    assert rest >= 0, "the rows do not fit"
    padding = ([PAD] * rest, [IGNORED] * rest)
    ids, targets, positions, documents = [], [], [], []
    for number, (row_ids, labels) in enumerate(rows + [padding] * (rest > 0)):
        ids += row_ids
        targets += labels[1:] + [IGNORED]
        positions += [place % MAX_POSITION for place in range(len(row_ids))]  # the padding can be longer than the table
        documents += [number] * len(row_ids)
    computed = [len(i) for i, _ in rows] + [rest] * (rest > 0)
    return make_batch(rows, [ids], [targets], positions, torch.tensor(documents, dtype=torch.int32), computed)


def first_fit(rows, tokens: int, num_packs: int) -> List[List[Row]]:
    """Each row of an endless iterator goes into the first pack with room for it, until one pack more than asked for is begun."""
    packs, room = [], []
    while len(packs) <= num_packs:
        row = next(rows)
        place = next((i for i, free in enumerate(room) if free >= len(row[0])), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(tokens)
        packs[place].append(row)
        room[place] -= len(row[0])
    return packs[:num_packs]


# What a query sees


def see_back(num_queries, num_keys, device):
    """[n, m]: the last query sees all keys, each query before it one key less."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


class Masks:
    """Makes the mask of a batch, once for all layers: None, a boolean tensor (True: is seen), or flex_attention's blocks."""

    def __init__(self, c: Config, device):
        self.c, self.device = c, device
        if c.attn != "flex":
            return
        # Written in place for each batch: compiled code is guarded by the mask's function and its captures, so they stay the same objects.
        of_query = torch.zeros(c.pack_tokens, dtype=torch.int32, device=device)
        of_key = torch.full((c.pre + c.pack_tokens,), -1, dtype=torch.int32, device=device)  # -1: the prefix, seen by all
        pre = c.pre

        def sees(_b, _h, query, key):
            return (of_key[key] < 0) | ((of_key[key] == of_query[query]) & (key <= query + pre))

        self.of_query, self.of_key, self.sees = of_query, of_key, sees

    def __call__(self, batch: Batch):
        c, (b, n) = self.c, batch.ids.shape
        if c.attn == "flex":
            self.of_query.copy_(batch.documents)
            self.of_key[c.pre :].copy_(batch.documents)
            return create_block_mask(self.sees, None, None, n, c.pre + n, device=self.device)
        if c.attn == "packed_mask":
            keep = (batch.documents[:, None] == batch.documents[None, :]).tril()
            return torch.cat([keep.new_ones(n, c.pre), keep], 1)[None, None]
        if c.attn == "mask" and c.pre:
            return see_back(n, c.pre + n, self.device).expand(b, 1, -1, -1)
        return None


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def causal_lower_right(q, k, v, gqa):
    """The flash kernel's causal mask is see_back's. SDPA comes to it by torch.nn.attention.bias.causal_lower_right, at whose constructor
    torch.compile breaks the graph; so here is the call that it makes. The kernel needs a GPU and 16 bits."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal=True)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see_back(q.shape[2], k.shape[2], q.device), enable_gqa=gqa)


def attend(c: Config, q, k, v, mask):
    """q [b, H, n, D]; k, v [b, G or H, P + n, D]."""
    gqa = bool(c.gqa)
    if c.attn == "flex":
        # If not compiled, flex_attention stores all scores. Compiled layers compile it with them. A CPU can only run its forward pass.
        flex = compiled_flex() if c.compile == "none" and q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=gqa)
    if c.attn == "causal_lr" and c.pre:
        return causal_lower_right(q, k, v, gqa)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)


# The model


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * h).to(x.dtype)


def rotate(x, cos, sin):
    """x [b, heads, n, D]; cos, sin [n, D/4]. Pairs of neighbours in the first half of D turn, the rest stays."""
    turned = 2 * cos.shape[-1]
    pairs = x[..., :turned].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.widths = [c.heads * c.kv, c.groups * c.kv, c.groups * c.kv]
        self.query_key_value = nn.Linear(c.hidden, sum(self.widths), bias=True)
        self.dense = nn.Linear(c.heads * c.kv, c.hidden, bias=False)

    def forward(self, x, cos, sin, mask, prefix_k, prefix_v):
        c, (b, n, _) = self.c, x.shape
        q, k, v = (t.view(b, n, -1, c.kv).transpose(1, 2) for t in self.query_key_value(x).split(self.widths, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if prefix_k is not None:  # keys of the prefix are not turned
            k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
        if not c.gqa:
            shape = (b, c.groups, c.heads // c.groups, k.shape[2], c.kv)
            k, v = (t.unsqueeze(2).expand(shape).reshape(b, c.heads, -1, c.kv) for t in (k, v))
        y = attend(c, q, k, v, mask)
        return self.dense(y.transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden, 2 * c.ffn, bias=False)
        self.dense_4h_to_h = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(c.hidden), Norm(c.hidden)
        self.self_attention, self.mlp = Attention(c), Mlp(c)

    def forward(self, x, cos, sin, mask, prefix_k, prefix_v):
        x = x + self.self_attention(self.input_layernorm(x), cos, sin, mask, prefix_k, prefix_v)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.emb = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = Norm(c.hidden)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)
        # In f32 whatever the default is: bf16 holds no whole numbers above 256.
        channels = torch.arange(0, c.kv // 2, 2, dtype=torch.float32)
        angles = torch.outer(torch.arange(MAX_POSITION, dtype=torch.float32), 1.0 / 10000 ** (channels / (c.kv // 2)))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids, positions, mask=None, prefix=None, picked=None):
        """Logits [b, n, vocab], or [targets, vocab] of the places `picked`. prefix: [2 * layers, b, G, P, D]."""
        c = self.c
        x = self.emb(ids)
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        if c.ckpt and c.ckpt_reentrant:
            x.requires_grad_(True)  # else the older checkpoint takes the first layer for one without gradients
        for i, layer in enumerate(self.layers):
            prefix_k, prefix_v = (None, None) if prefix is None else (prefix[2 * i], prefix[2 * i + 1])
            if c.ckpt:
                x = checkpoint(layer, x, cos, sin, mask, prefix_k, prefix_v, use_reentrant=bool(c.ckpt_reentrant))
            else:
                x = layer(x, cos, sin, mask, prefix_k, prefix_v)
        x = self.norm(x)
        if picked is not None:
            x = x.flatten(0, 1).index_select(0, picked)
        return self.head(x)


def loss_of(c: Config, logits, batch: Batch):
    """Mean over all targets of the micro-batch, in f32."""
    if c.logits == "labels":
        return F.cross_entropy(logits.float(), batch.targets.flatten().index_select(0, batch.picked))
    # As the published code has it: all logits in f32, then all but the last of each row.
    return F.cross_entropy(logits.float()[:, :-1].reshape(-1, c.vocab), batch.targets[:, :-1].reshape(-1), ignore_index=IGNORED)


class Prefix(nn.Module):
    """Table [P, 2 * layers * G * D] of P-Tuning v2; stays f32, as in the published recipe."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        width = 2 * c.layers * c.groups * c.kv
        self.embedding = nn.Embedding(c.pre, width)
        if c.proj:
            self.trans = nn.Sequential(nn.Linear(width, c.hidden), nn.Tanh(), nn.Linear(c.hidden, width))

    def forward(self, b, dtype):
        c, table = self.c, self.embedding.weight
        table = self.trans(table) if c.proj else table
        table = table.to(dtype).view(1, c.pre, 2 * c.layers, c.groups, c.kv).expand(b, -1, -1, -1, -1)
        return F.dropout(table, c.dropout, self.training).permute(2, 0, 3, 1, 4)


class Lora(nn.Module):
    ALPHA = 16

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, self.scale = base, self.ALPHA / rank
        device = base.weight.device
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device).uniform_(-1, 1) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


def add_lora(model: Model, c: Config):
    for layer in model.layers:
        for parent in (layer.self_attention, layer.mlp):
            for name in c.lora_targets.split(","):
                if hasattr(parent, name):
                    setattr(parent, name, Lora(getattr(parent, name), c.lora))


# Training


class Trainer:
    """A model, what is trained in it, and its optimizer."""

    def __init__(self, c: Config, device: str, dtype, lr, std=0.02, peft=False, weights=None):
        self.c, self.device, self.dtype = c, device, dtype
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = Model(c)
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, std)
        if weights:
            model.load_state_dict(weights)
        model.requires_grad_(False)
        self.num_frozen = sum(p.numel() for p in model.parameters())
        self.autocast, self.prefix, core = contextlib.nullcontext, None, model
        if c.lora and peft:
            model = peft_model(model, c)
            core = model.base_model.model
            self.autocast = lambda: torch.autocast(device, dtype)
        elif c.lora:
            add_lora(model, c)
        else:
            with torch.device(device):
                self.prefix = Prefix(c)
        # Widths change from batch to batch with --pad batch alone; told so, torch.compile does not compile again in a timed step.
        widths_change = c.pad == "batch"
        if c.compile == "layer":
            for layer in core.layers:
                layer.compile(dynamic=widths_change)
        self.model = model.train()
        self.run = torch.compile(model, dynamic=widths_change or None) if c.compile == "model" else model
        self.masks = Masks(c, device)
        candidates = itertools.chain(model.parameters(), self.prefix.parameters() if self.prefix else ())
        self.trained = [p for p in candidates if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)

    def loss(self, batch: Batch):
        batch = batch.to(self.device)
        prefix = self.prefix(batch.ids.shape[0], self.dtype) if self.prefix else None
        picked = batch.picked if self.c.logits == "labels" else None
        mask = self.masks(batch)
        with self.autocast():
            logits = self.run(batch.ids, batch.positions, mask, prefix, picked)
        return loss_of(self.c, logits, batch)

    def step(self, batches):
        """One update; the mean of the micro-batches' losses."""
        losses = []
        for batch in batches:
            loss = self.loss(batch)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        if dist.is_initialized():
            for parameter in self.trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()


def peft_model(model, c: Config):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=c.lora, lora_alpha=16, target_modules=c.lora_targets.split(","), lora_dropout=0.0))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def model_flops(c: Config, rows: List[int], num_targets: int, num_trained: int) -> float:
    """Of forward and backward: 4 a frozen weight a token (no gradient of it), 6 an adapter's weight, 12 D a score that the mask leaves.
    Nothing that a checkpoint computes once more is counted, nor the softmax or the prefix's own layers."""
    width = (c.heads + 2 * c.groups) * c.kv
    layer = c.hidden * width + c.heads * c.kv * c.hidden + 3 * c.hidden * c.ffn
    adapters = num_trained if c.lora else 0
    scores = sum(n * c.pre + n * (n + 1) // 2 for n in rows)
    per_token = 4 * c.layers * layer + 6 * adapters
    return per_token * sum(rows) + 4 * c.hidden * c.vocab * num_targets + 12 * c.layers * c.heads * c.kv * scores
