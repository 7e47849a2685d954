"""Adapters put on a PyTorch ChatGLM2 by the libraries that users have: PEFT, and AdapterHub's `adapters` through its plugin interface.

`load` reads a folder as its library does; `RANDOM` makes an adapter of every kind with random values. Both give a `Tuned`.
"""
import glob
import json
import logging
import os

import adapters
import torch
from adapters import AdapterModelInterface, DoubleSeqBnConfig, SeqBnConfig
from adapters.composition import Fuse, Stack
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file

from chatglm2_hub import Hub

# where the library finds a pre-norm block's parts: it reads the residual stream before each norm, and acts on each sublayer's last product
INTERFACE = AdapterModelInterface(
    adapter_methods=["bottleneck"], model_embeddings="embedding.word_embeddings", model_layers="encoder.layers", layer_self_attn="self_attention",
    layer_cross_attn=None, attn_qkv_proj="query_key_value", attn_o_proj="dense", layer_intermediate_proj="mlp.dense_h_to_4h",
    layer_output_proj="mlp.dense_4h_to_h", layer_pre_self_attn="input_layernorm", layer_pre_ffn="post_attention_layernorm",
)
logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns at every model without an active adapter, the moment before one is set
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


class Tuned:
    """A model under an adapter: `model(input_ids=..)` gives logits, `head` is the layer that makes them, `save(folder)` is the library's own;
    none where the model was tuned itself."""

    def __init__(self, kind, model, head, save):
        self.kind, self.model, self.head, self.save = kind, model.eval(), head, save


def under_peft(model, head):
    config = model.peft_config["default"]
    return Tuned(f"{config.peft_type.value}, peft {peft_version}", model, head, model.save_pretrained)


def under_adapters(model, setup):
    def save(folder):
        os.makedirs(folder, exist_ok=True)
        if isinstance(setup, Fuse):
            model.save_adapter_setup(folder, setup, use_safetensors=True)
        else:
            model.save_adapter(folder, setup, with_head=False)
    model.set_active_adapters(setup)
    return Tuned(f"{setup}, adapters {adapters.__version__}", model, model.transformer.output_layer, save)


def with_adapters(base):
    model = Hub.load(base)
    adapters.init(model, interface=INTERFACE)
    return model


def load(base, folder, fused=()):
    """The adapter of a folder on the model of folder `base`. A fusion brings its adapters as subfolders (the form of save_adapter_setup),
    or they are loaded from the folders `fused`."""
    if os.path.exists(os.path.join(folder, "adapter_setup.json")):
        model = with_adapters(base)
        setup, _ = model.load_adapter_setup(folder, use_safetensors=True)
        return under_adapters(model, setup)
    if os.path.exists(os.path.join(folder, "adapter_fusion_config.json")):
        model = with_adapters(base)
        names = [model.load_adapter(f, use_safetensors=True, with_head=False) for f in fused]
        model.load_adapter_fusion(folder, use_safetensors=True, with_head=False)
        return under_adapters(model, Fuse(*names))
    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        model = Hub.load(folder)  # which wants every tensor of a model, and no other
        return Tuned("a model of its own", model, model.transformer.output_layer, None)
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as f:
        config = json.load(f)
    if "peft_type" in config:
        model = Hub.load(base)
        return under_peft(PeftModel.from_pretrained(model, folder), model.transformer.output_layer)
    model = with_adapters(base)
    return under_adapters(model, model.load_adapter(folder, use_safetensors=True, with_head=False))


def tensors(*folders):
    """Every adapter tensor in folders and below by name. What is there twice, in two formats or two folders, has to be the same."""
    found = {}
    for path in sorted(p for folder in folders for p in glob.glob(os.path.join(folder, "**"), recursive=True)):
        name = os.path.basename(path)
        if name in ("adapter_model.safetensors", "adapter.safetensors", "model_adapter_fusion.safetensors"):
            read = load_file(path)
        elif name in ("pytorch_adapter.bin", "pytorch_model_adapter_fusion.bin"):
            read = torch.load(path, weights_only=True)
        else:
            continue
        for tensor, value in read.items():
            if tensor in found and not torch.equal(found[tensor], value):
                raise SystemExit(f"error: {path}: tensor {tensor} has other values than in another file")
            found[tensor] = value
    return found


def same(a, b):
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def randomise(model, factors=("magnitude", "ia3_l")):
    """Values under which an adapter does about as much as the layer that it is on, so that a wrong term cannot hide."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if any(f in name for f in factors):
            p.data *= 1 + 0.2 * torch.randn_like(p)
        elif "embedding" in name:
            p.data = torch.randn_like(p)
        elif p.dim() == 2:
            p.data = torch.randn_like(p) * p.shape[1] ** -0.5
            if "transform.2." in name:  # behind a tanh, and keys and values of the model are of size 1.6
                p.data *= 4
        else:
            p.data = 0.2 * torch.randn_like(p)


def peft_kind(config):
    def make(base):
        model = Hub.load(base)
        c = model.transformer.c
        # PEFT would guess a prefix for all heads, but keys and values have a head per group
        tuned = get_peft_model(model, config(num_attention_heads=c.multi_query_group_num, token_dim=c.multi_query_group_num * c.kv_channels))
        randomise(tuned)
        return under_peft(tuned, model.transformer.output_layer)
    return make


def soft(cls, **keys):
    return peft_kind(lambda **_: cls(task_type="CAUSAL_LM", num_virtual_tokens=7, **keys))


def prefix(**keys):
    return peft_kind(lambda **sizes: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **sizes, **keys))


def low_rank(**keys):
    return peft_kind(lambda **_: LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": list(LINEARS), **keys}))


def scaled(targets, feedforward):
    return peft_kind(lambda **_: IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward))


def bottleneck(config, name="news_2"):
    def make(base):
        model = with_adapters(base)
        model.add_adapter(name, config=config)
        model.train_adapter(name)
        randomise(model)
        return under_adapters(model, name)
    return make


def fusion(*names):
    def make(base):
        model = with_adapters(base)
        for name in names:
            model.add_adapter(name, config=SeqBnConfig(reduction_factor=8))
        model.train_adapter(Stack(*names))
        randomise(model)
        model.add_adapter_fusion(Fuse(*names))
        model.train_adapter_fusion(Fuse(*names))
        randomise(model)  # scores are sums over the whole width, without 1/sqrt(H): at full size their softmax would pick one adapter
        for name, p in model.named_parameters():
            if ".query." in name:
                p.data *= 0.1
        return under_adapters(model, Fuse(*names))
    return make


REGEX = r".*layers\.[13]\.(self_attention\.query_key_value|mlp\.dense_4h_to_h)"
RANDOM = {
    "prompt_tuning": soft(PromptTuningConfig),
    "p_tuning_lstm": soft(PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_hidden_size=24),
    "p_tuning_mlp": soft(PromptEncoderConfig, encoder_hidden_size=24),
    "prefix_tuning": prefix(),
    "prefix_tuning_projection": prefix(prefix_projection=True, encoder_hidden_size=24),
    "lora_qkv": low_rank(target_modules=["query_key_value"]),
    "lora_all": low_rank(),
    "lora_regex": low_rank(target_modules=REGEX),
    "rslora": low_rank(use_rslora=True),
    "dora": low_rank(use_dora=True),
    "dora_rslora": low_rank(use_dora=True, use_rslora=True, target_modules=["dense", "dense_h_to_4h"]),
    "ia3": scaled(["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "ia3_all": scaled(list(LINEARS), ["dense", "dense_4h_to_h"]),
    "pfeiffer": bottleneck(SeqBnConfig()),
    "pfeiffer_factor_5": bottleneck(SeqBnConfig(reduction_factor=5)),
    "houlsby": bottleneck(DoubleSeqBnConfig()),
    "fusion_of_2": fusion("news_2", "ads"),
    "fusion_of_3": fusion("b", "a", "c"),
}
# Settings that change the result and that few use: right, or refused under this name, but never computed as if they were not there
RARE = {
    "rank_pattern": low_rank(rank_pattern={"dense": 2}),
    "alpha_pattern": low_rank(alpha_pattern={"dense": 12}),
    "layers_to_transform": low_rank(layers_to_transform=[1]),
    "ln_before": bottleneck(SeqBnConfig(ln_before=True)),
    "use_gating": bottleneck(SeqBnConfig(use_gating=True)),
    "is_parallel": bottleneck(SeqBnConfig(is_parallel=True)),
    "scaling": bottleneck(SeqBnConfig(scaling=4.0)),
    "non_linearity": bottleneck(SeqBnConfig(non_linearity="gelu")),
    "leave_out": bottleneck(SeqBnConfig(leave_out=[0])),
    "residual_before_ln": bottleneck(SeqBnConfig(residual_before_ln=False)),
}
