"""Model folders as the hub has them, for scripts/checkpoint_python.sh: a base gets code and tokenizer files, and transformers loads what was made from it.

hub_folder.py dress BASE      writes the files that a folder of the hub has beside weights and config.json: code of our own, by the names in `auto_map`
hub_folder.py load FOLDER..   AutoConfig, AutoModel and AutoTokenizer load each, with no weight missing or left over and all equal to the files'
"""
import glob
import json
import os
import sys

CONFIGURATION = '''
from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"
'''

# The published parameters by their published names, without the computation.
MODELING = '''
import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_chatglm import ChatGLMConfig
from .quantization import BITS


def tree(**parts):
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def norm(width):
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(width))
    return module


def layer(c):
    queries, groups = c.num_attention_heads * c.kv_channels, c.multi_query_group_num * c.kv_channels
    linear = lambda inputs, outputs, bias=c.add_bias_linear: nn.Linear(inputs, outputs, bias=bias)
    return tree(
        input_layernorm=norm(c.hidden_size),
        self_attention=tree(
            query_key_value=linear(c.hidden_size, queries + 2 * groups, c.add_qkv_bias), dense=linear(queries, c.hidden_size)
        ),
        post_attention_layernorm=norm(c.hidden_size),
        mlp=tree(dense_h_to_4h=linear(c.hidden_size, 2 * c.ffn_hidden_size), dense_4h_to_h=linear(c.ffn_hidden_size, c.hidden_size)),
    )


class ChatGLMForConditionalGeneration(PreTrainedModel):
    config_class = ChatGLMConfig

    def __init__(self, config):
        super().__init__(config)
        assert BITS == 0
        c = config
        self.transformer = tree(
            embedding=tree(word_embeddings=nn.Embedding(c.padded_vocab_size, c.hidden_size)),
            encoder=tree(layers=nn.ModuleList(layer(c) for _ in range(c.num_layers)), final_layernorm=norm(c.hidden_size)),
            output_layer=nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False),
        )
        self.post_init()

    def _init_weights(self, module):
        pass
'''

TOKENIZATION = '''
import sentencepiece
from transformers import PreTrainedTokenizer


class ChatGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file, **kwargs):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.sp.get_piece_size()

    def get_vocab(self):
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text, **_):
        return self.sp.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp.id_to_piece(index)
'''

FILES = {
    "configuration_chatglm.py": CONFIGURATION,
    "modeling_chatglm.py": MODELING,
    "quantization.py": "BITS = 0\n",
    "tokenization_chatglm.py": TOKENIZATION,
    "tokenizer_config.json": json.dumps(
        {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}, indent=2
    ),
}
TEXT = "类型#裤*版型#宽松"


def dress(base):
    for name, text in FILES.items():
        with open(os.path.join(base, name), "w", encoding="utf-8") as f:
            f.write(text.lstrip())


def check(good, what):
    if not good:
        raise SystemExit(f"error: {what}")


def load(folder):
    import sentencepiece
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    left = {what: names for what, names in info.items() if names}
    check(not left, f"{folder}: {left}")
    files = {name: tensor for file in glob.glob(os.path.join(folder, "*.safetensors")) for name, tensor in load_file(file).items()}
    weights = model.state_dict()
    check(set(files) == set(weights), f"{folder}: other names: {set(files) ^ set(weights)}")
    for name, tensor in files.items():
        check(tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), f"{folder}: {name} differs")
    check(all(tensor.dtype == config.dtype for tensor in files.values()), f"{folder}: config.json says {config.dtype}, the weights are of another")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model")).encode(TEXT)
    check(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TEXT)) == expected, f"{folder}: the tokenizer gives other ids")
    print(f"{folder}: {type(model).__name__} of {len(files)} tensors, {config.dtype}; {type(tokenizer).__name__} of {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is a folder here
    command, *folders = sys.argv[1:] or ["", ""]
    if command not in ("dress", "load") or not folders:
        sys.exit(__doc__)
    for folder in folders:
        dress(folder) if command == "dress" else load(folder)
