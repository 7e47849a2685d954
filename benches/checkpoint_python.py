"""Opens checkpoints with `zstandard` and `safetensors`, by the very lines of src/checkpoint/FORMAT.md, and exports with PEFT: all hold the same tensors.

checkpoint_python.py --model FOLDER RUN..    runs of one training: RUN/checkpoint-N and RUN/adapter
"""
import argparse
import hashlib
import os
import re
import sys

import numpy
import peft
import safetensors
import torch
import zstandard
from safetensors.torch import load_file

from chatglm2_hub import Hub

FORMAT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src", "checkpoint", "FORMAT.md")
PREFIX = "base_model.model."


def reader():
    """`read(folder)` as the format's page has it."""
    with open(FORMAT, encoding="utf-8") as f:
        code = re.search(r"```python\n(.*?)```", f.read(), re.S).group(1)
    names = {}
    exec(compile(code, FORMAT, "exec"), names)
    return names["read"]


def check(good, what):
    if not good:
        raise SystemExit(f"error: {what}")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def check_files(folder, manifest):
    """Lengths and hashes of all files, and of every piece of every tensor, as the manifest has them. Returns the bytes of the shards."""
    entries = {shard["file"]: shard for shard in manifest["shards"]} | manifest["files"]
    for name, entry in entries.items():
        with open(os.path.join(folder, name), "rb") as f:
            data = f.read()
        check((len(data), sha256(data)) == (entry["bytes"], entry["sha256"]), f"{folder}/{name} is not what the manifest says")
    contents = []
    for shard in manifest["shards"]:
        with open(os.path.join(folder, shard["file"]), "rb") as f:
            frame = f.read()
        parameters = zstandard.get_frame_parameters(frame)
        check(parameters.has_checksum and parameters.content_size == shard["content_bytes"], f"{shard['file']}: frame header")
        content = zstandard.ZstdDecompressor().decompress(frame)
        contents.append({name: value["data"] for name, value in safetensors.deserialize(content)})
    for name, entry in manifest["tensors"].items():
        for piece in entry["pieces"]:
            data = contents[piece["shard"]].pop(piece["stored_as"])
            check(sha256(data) == piece["sha256"], f"{folder}: {name}, elements {piece['start']}..{piece['end']}")
    check(not any(contents), f"{folder}: tensors that the manifest does not know")
    return sum(shard["bytes"] for shard in manifest["shards"])


def by_parameter(adapter, parameters):
    """An adapter's tensors under the names and in the shapes of the checkpoint: PEFT puts a prefix before a name, and has a prompt as one matrix."""
    if list(adapter) == ["prompt_embeddings"]:
        (name, value), = parameters.items()
        return {name: adapter["prompt_embeddings"].reshape(value.shape)}
    return {name.removeprefix(PREFIX): value for name, value in adapter.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)


def arrays(tensors):
    return {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}


def check_export(folder, model, parameters):
    """The export's file, and what PEFT has loaded from it, are the parameters."""
    written = arrays(load_file(os.path.join(folder, "adapter_model.safetensors")))
    check(same(by_parameter(written, parameters), parameters), f"{folder}: the export has other tensors than the checkpoint")
    loaded = peft.PeftModel.from_pretrained(Hub.load(model), folder)
    loaded = arrays(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
    check(same(by_parameter(loaded, parameters), parameters), f"{folder}: PEFT has loaded other tensors than the checkpoint's")
    return len(written)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("runs", nargs="+")
    a = parser.parse_args()
    read = reader()
    first = {}
    for run in a.runs:
        checkpoints = sorted((name for name in os.listdir(run) if name.startswith("checkpoint-")), key=lambda name: int(name[11:]))
        check(len(checkpoints) > 1, f"{run}: fewer than two checkpoints")
        for name in checkpoints:
            folder = os.path.join(run, name)
            manifest, tensors = read(folder)
            stored = check_files(folder, manifest)
            parameters = {n.removeprefix("parameter."): t for n, t in tensors.items() if n.startswith("parameter.")}
            check(len(tensors) == 3 * len(parameters) and all(numpy.isfinite(t).all() for t in tensors.values()), f"{folder}: kinds of tensors")
            num_exported = check_export(folder, a.model, parameters)
            if name == checkpoints[-1]:
                check_export(os.path.join(run, "adapter"), a.model, parameters)
            check(same(first.setdefault(name, tensors), tensors), f"{folder} has other tensors than {a.runs[0]}/{name}")
            cut = sum(len(entry["pieces"]) > 1 for entry in manifest["tensors"].values())
            elements = sum(t.size for t in tensors.values())
            print(f"| {os.path.basename(run)} | {name[11:]} | {len(manifest['shards'])} | {len(tensors)} | {cut} | {elements} | {stored} | {num_exported} |")
            sys.stdout.flush()


def versions():
    print(f"zstandard {zstandard.__version__}, safetensors {safetensors.__version__}, peft {peft.__version__}, torch {torch.__version__}\n", flush=True)
    print("| run | step | shards | tensors | in two shards | elements | bytes of the shards | tensors of the export |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)


if __name__ == "__main__":
    versions()
    main()
