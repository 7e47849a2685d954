"""The reference ChatGLM2 as a `transformers` model, so that PEFT and AdapterHub's `adapters` put their own modules on it.

The published model cannot run PEFT's prompt methods (it wants input_ids where PEFT passes only inputs_embeds), so what PEFT passes is taken
here as it is meant: `inputs_embeds` are the rows before layer 0, at positions 0, 1, ..; `past_key_values` are keys and values before them.
"""
import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from chatglm2_ref import Cfg, ChatGLM2, rope_table


class HubConfig(PretrainedConfig):
    """config.json as it is. PEFT looks a prompt method's sizes up in it, and whether the vocabulary has grown."""

    model_type = "chatglm"
    attribute_map = {"vocab_size": "padded_vocab_size"}


class Trunk(PreTrainedModel):
    """Everything but the output layer's product, as the published ChatGLMModel."""

    config_class = HubConfig

    def __init__(self, cfg, config):
        super().__init__(config)
        self.c = cfg
        for name, part in ChatGLM2(cfg, use_sdpa=True).transformer.named_children():
            self.add_module(name, part)

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, **_):
        x = self.embedding.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past = None if past_key_values is None else [(layer.keys, layer.values) for layer in past_key_values.layers]
        before = 0 if past is None else past[0][0].shape[2]
        keep = ChatGLM2.keep_mask(x.shape[0], x.shape[1], before, None, x.device) if before else None
        cos, sin = rope_table(self.c.kv_channels // 2, torch.arange(x.shape[1])[None])
        for i, layer in enumerate(self.encoder.layers):
            x, _ = layer(x, cos, sin, keep, None if past is None else past[i])
        return self.encoder.final_layernorm(x)


class Hub(PreTrainedModel):
    config_class = HubConfig
    base_model_prefix = "transformer"

    def __init__(self, folder):
        super().__init__(HubConfig.from_pretrained(folder))
        self.transformer = Trunk(Cfg.load(os.path.join(folder, "config.json")), self.config)
        self.prepare_inputs_for_generation = None  # PEFT's wrapper for causal models asks for the name

    @staticmethod
    def load(folder):
        """The f32 model of a folder as the hub has it: config.json and either model.safetensors or an index with its files."""
        index = os.path.join(folder, "model.safetensors.index.json")
        files = {"model.safetensors"}
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                files = set(json.load(f)["weight_map"].values())
        weights = {n: w.float() for name in files for n, w in load_file(os.path.join(folder, name)).items()}
        weights.pop("transformer.rotary_pos_emb.inv_freq", None)
        model = Hub(folder)
        model.load_state_dict(weights, strict=True)
        return model.eval().requires_grad_(False)

    def forward(self, input_ids=None, inputs_embeds=None, past_key_values=None, attention_mask=None, labels=None, **_):
        if attention_mask is not None or labels is not None:
            raise NotImplementedError("rows are padded on the right and the caller takes the loss")
        return self.transformer.output_layer(self.transformer(input_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values))


def mean_loss(model, head, micro_batches):
    """Mean loss over the target tokens of micro-batches of rows (ids, is_target). `head` is the output layer: it gets the places with a target
    only. Soft tokens stand before a row and padding behind it, so the given tokens are the last columns, and need no mask."""
    total, count = 0.0, 0
    for rows in micro_batches:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([list(r) + [0] * (width - len(r)) for r, _ in rows])
        wanted = torch.tensor([list(t[1:]) + [False] * (width - len(t)) for _, t in rows])
        hook = head.register_forward_pre_hook(lambda _, x: (x[0][:, -width:-1][wanted],))
        with torch.no_grad():
            logits = model(input_ids=ids)
        hook.remove()
        total += float(F.cross_entropy(logits, ids[:, 1:][wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count
