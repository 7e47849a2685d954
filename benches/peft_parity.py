"""The Python side of scripts/peft_parity.sh: PEFT puts an exported adapter on a PyTorch ChatGLM2 and must give glmddp's own loss.

glmddp logs the loss of step N + 1 before it updates; checkpoint-N holds the adapter of that moment. So PEFT's loss of the batch of step N + 1
under checkpoint-N's adapter has to be the logged one. Then PEFT saves the adapter again: the same tensors, bit for bit.
"""
import argparse
import json
import os
import sys
import tempfile

import torch
from peft import PeftModel
from peft import __version__ as peft_version
from safetensors.torch import load_file

from chatglm2_ref import Cfg, ChatGLM2
from learning_parity import read_losses, read_steps, summed_loss

BOUND = 1e-5  # relative; two f32 programs that sum in different orders


class Wrapped(torch.nn.Module):
    """Lets `summed_loss` hook and call the model inside PEFT's."""

    def __init__(self, peft_model):
        super().__init__()
        self.inner = peft_model.base_model.model

    @property
    def transformer(self):
        return self.inner.transformer

    def forward(self, ids):
        return self.inner(ids)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapter", "log"):
        p.add_argument(f"--{name}", required=True)
    p.add_argument("--batches", required=True, nargs="+", help="what --dump_batches wrote, the files of all ranks")
    p.add_argument("--step", type=int, required=True, help="the adapter's step")
    a = p.parse_args()

    model = ChatGLM2(Cfg.load(os.path.join(a.model, "config.json")), use_sdpa=True)
    missing, unknown = model.load_state_dict({n: w.float() for n, w in load_file(os.path.join(a.model, "model.safetensors")).items()}, strict=False)
    if missing or unknown:
        sys.exit(f"error: tensors missing {missing}, unknown {unknown}")
    model.config = {"model_type": "chatglm"}
    model.prepare_inputs_for_generation = None  # PEFT's wrapper for causal models asks for the name
    rows = [row for slot in read_steps(a.batches)[a.step] for row in slot]
    tokens = sum(sum(is_target[1:]) for _, is_target in rows)
    with torch.no_grad():
        base = float(summed_loss(model, rows)) / tokens
    tuned = PeftModel.from_pretrained(model, a.adapter).eval()
    with torch.no_grad():
        theirs = float(summed_loss(Wrapped(tuned), rows)) / tokens
    ours = read_losses(a.log)[a.step]
    relative = abs(ours - theirs) / theirs

    with tempfile.TemporaryDirectory() as again:
        tuned.save_pretrained(again)
        saved, exported = (load_file(os.path.join(d, "adapter_model.safetensors")) for d in (again, a.adapter))
    same = saved.keys() == exported.keys() and all(torch.equal(saved[n], exported[n]) for n in saved)
    kind = json.load(open(os.path.join(a.adapter, "adapter_config.json"), encoding="utf-8"))["peft_type"]
    print(f"{kind}, peft {peft_version}: base {base:.6f}, glmddp {ours:.6f}, PEFT {theirs:.6f}, difference {relative:.1e} (bound {BOUND:.0e}); "
          f"saved again: {'the same' if same else 'OTHER'} {len(exported)} tensors")
    if abs(base - ours) <= 100 * BOUND * base:
        sys.exit("error: the adapter changes nothing, so this shows nothing")
    sys.exit(0 if relative <= BOUND and same else 1)


if __name__ == "__main__":
    main()
