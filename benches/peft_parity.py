"""The Python side of scripts/peft_parity.sh: the libraries read what glmddp exports, and glmddp what they save, with the same losses.

`exported`: glmddp logs the loss of step N + 1 before it updates, and checkpoint-N holds the adapter of that moment; the library's loss of the
batch of step N + 1 under checkpoint-N's adapter has to be the logged one. Saved again by the library, its tensors are the same, bit for bit.
Of a method that trains the base, a model of its own stands in the adapter's place.

`foreign`: a library makes and saves an adapter with random values; `glmddp evaluate` has to give PyTorch's loss with it.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is a folder here
import sentencepiece
import torch

import libraries
from chatglm2_hub import Hub, mean_loss
from learning_parity import read_losses, read_steps

# relative; two f32 programs that sum in different orders. PyTorch's f32 is up to 1.2e-7 from its f64 on these adapters, and a mistake as small
# as a DoRA scale 1 % off moves a loss by 2.6e-5
BOUND = 2e-6
ANSWER = 256  # tokens of a prompt, and of an answer, at most: long enough for every row taken


def base_loss(folder, micro_batches):
    model = Hub.load(folder)
    return mean_loss(model, model.transformer.output_layer, micro_batches)


def verdict(name, base, ours, theirs):
    """One line, and whether the two agree and the adapter matters."""
    relative = abs(ours - theirs) / theirs
    matters = abs(base - theirs) > 100 * BOUND * base
    print(f"{name}: base {base:.6f}, glmddp {ours:.6f}, PyTorch {theirs:.6f}, difference {relative:.1e} (bound {BOUND:.0e})"
          f"{'' if matters else '; the adapter changes nothing, so this shows nothing'}", flush=True)
    return relative <= BOUND and matters


def exported(a):
    micro_batches = read_steps(a.batches)[a.step]
    tuned = libraries.load(a.model, a.adapter, a.fused)
    theirs = mean_loss(tuned.model, tuned.head, micro_batches)
    good = verdict(tuned.kind, base_loss(a.model, micro_batches), read_losses(a.log)[a.step], theirs)
    if tuned.save is None:
        return good
    written = libraries.tensors(a.adapter, *a.fused)
    with tempfile.TemporaryDirectory() as again:
        tuned.save(again)
        same = libraries.same(libraries.tensors(again), written)
    print(f"  saved again: {'the same' if same else 'OTHER'} {len(written)} tensors")
    return good and same


def rows_as_tokens(a):
    """The rows that glmddp will read, as tokens, by the published tokenizer's library and prompt: independent of glmddp."""
    sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(a.model, "tokenizer.model"))
    with open(a.rows, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    batch = []
    for row in rows:
        prompt = [64790, 64792] + sp.encode(f"[Round 1]\n\n问：{row['content']}\n\n答：")
        answer = sp.encode(row["summary"])
        if max(len(prompt), len(answer)) > ANSWER:
            sys.exit(f"error: {a.rows}: a row is longer than {ANSWER} tokens and would be cut; take others")
        batch.append((prompt + answer + [2], [False] * len(prompt) + [True] * (len(answer) + 1)))
    return [batch[i:i + 4] for i in range(0, len(batch), 4)]


def evaluate(a, adapter):
    """What `glmddp evaluate` says of an adapter: (loss, None), or (None, its error)."""
    command = [a.glmddp, "evaluate", "--model_name_or_path", a.model, "--adapter", adapter, "--validation_file", a.rows, "--json",
               "--max_source_length", str(ANSWER), "--max_target_length", str(ANSWER)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return None, f"exit status {done.returncode}: {done.stderr.strip()}"
    printed = json.loads(done.stdout)
    if "eval_loss" not in printed:
        sys.exit(f"error: {' '.join(command)} printed no `eval_loss`: {printed}")
    return printed["eval_loss"], None


def foreign(a):
    micro_batches = rows_as_tokens(a)
    base = base_loss(a.model, micro_batches)
    kinds = {**libraries.RANDOM, **libraries.RARE}
    wanted = a.only.split(",") if a.only else list(kinds)
    if unknown := set(wanted) - set(kinds):
        sys.exit(f"error: unknown kinds {sorted(unknown)}\n\nhint: there are {', '.join(kinds)}")
    bad = []
    for name in wanted:
        torch.manual_seed(list(kinds).index(name))
        rare = name in libraries.RARE
        tuned = kinds[name](a.model)
        folder = os.path.join(a.out, name)
        tuned.save(folder)
        theirs = mean_loss(tuned.model, tuned.head, micro_batches)
        ours, error = evaluate(a, folder)
        if error is None:
            good = verdict(f"{name} ({tuned.kind})", base, ours, theirs)
        else:
            keys = (f"`{name}`", f"`config.{name}`")  # where PEFT has it, and where adapters has it; in backticks: the folder has its name too
            good = rare and error.startswith("exit status 2") and any(key in error for key in keys)
            print(f"{name} ({tuned.kind}): {'refused' if good else 'NOT READ'}, {' '.join(error.replace(folder, '..').split())}", flush=True)
        if not good:
            bad.append(name)
    print(f"{len(wanted) - len(bad)} of {len(wanted)} foreign adapters{'; wrong: ' + ', '.join(bad) if bad else ''}")
    return not bad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    e = sub.add_parser("exported")
    for name in ("model", "adapter", "log"):
        e.add_argument(f"--{name}", required=True)
    e.add_argument("--batches", required=True, nargs="+", help="what --dump_batches wrote, the files of all ranks")
    e.add_argument("--step", type=int, required=True, help="the adapter's step")
    e.add_argument("--fused", nargs="*", default=[], help="folders of the adapters that a fusion without them is over")
    e.set_defaults(run=exported)
    f = sub.add_parser("foreign")
    for name in ("glmddp", "model", "rows", "out"):
        f.add_argument(f"--{name}", required=True)
    f.add_argument("--only", help="kinds, separated by commas")
    f.set_defaults(run=foreign)
    a = p.parse_args()
    sys.exit(0 if a.run(a) else 1)


if __name__ == "__main__":
    main()
