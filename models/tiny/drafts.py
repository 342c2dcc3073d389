"""Train the draft block alone, for several drafts in a row; the body and the shared head stay as they are stored.

    python drafts.py --minutes 30         from model.safetensors to draft-state.pt, which export.py --state reads
    python drafts.py --eval [--state S]   how many drafts in a row are right on heldout.jsonl

Joint training (train.py) asks the block for one draft. To be applied again it must read its own output in place of the
body's, which it learns here: the loss of each pass is the divergence from what the body itself says at that place.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
from export import from_official
from train import HERE, averaged, batches, optimisers, rounded

PASSES = 3


def losses(model, ids, weight, g):
    """Summed weighted divergence of every pass, and how many of each are right."""
    with torch.no_grad():
        said = model.lm_head(g).float()
    embedded = model.backbone.embeddings(ids).detach()
    total, right = torch.zeros(()), []
    width = ids.shape[1] - PASSES - 1
    for d, m in enumerate(model.mtp.unroll(embedded, g, PASSES), 1):
        logits = model.lm_head(m[:, :width]).float()
        target, w = said[:, d:d + width], weight[:, d + 1:d + 1 + width]
        total = total + (F.cross_entropy(logits.flatten(0, 1), target.softmax(-1).flatten(0, 1), reduction="none") *
                         w.flatten()).sum()
        right.append(int(((logits.argmax(-1) == target.argmax(-1)) & (w == 1)).sum()))
    return total, right


def train(args):
    torch.manual_seed(args.seed)
    tok, tpl = Tokenizer.from_file(str(HERE / "tokenizer.json")), data.template()
    model = from_official()
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.mtp.parameters():
        p.requires_grad_(True)
    opts = optimisers(model.mtp, args.lr)
    average = {k: v.clone() for k, v in model.mtp.state_dict().items()}
    step, begin, logged = 0, time.time(), None
    while (done := (time.time() - begin) / (args.minutes * 60)) < 1:
        lr = args.lr * min(1, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for o in opts:
            for group in o.param_groups:
                group["lr"] = lr
        # Seeds that train.py does not reach.
        group = list(batches(step + 1_000_000, tok, tpl))
        total = sum(w[:, 1:].sum() for _, w in group)
        for ids, weight in group:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                with torch.no_grad():
                    g = model.hidden(ids)
                loss, right = losses(model, ids, weight, g)
            (loss / total).backward()
            counts = [float(loss.detach()), float(total) / len(group), int((weight[:, 2:] == 1).sum())] + right
            logged = counts if logged is None else [a + b for a, b in zip(logged, counts)]
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.99, step / (step + 20))
        with torch.no_grad():
            for k, v in model.mtp.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        if step % args.log == 0:
            print(f"step {step} min {(time.time() - begin) / 60:.1f} lr {lr:.2e} loss {logged[0] / logged[1]:.4f} right " +
                  " ".join(f"{x / logged[2]:.4f}" for x in logged[3:]), flush=True)
            logged = None
            save(model, average, args.state)
    save(model, average, args.state)


def save(model, average, path):
    """The whole model, as train.py's averaged weights are saved."""
    state = {k: v for k, v in model.state_dict().items()}
    state.update({f"mtp.{k}": v for k, v in average.items()})
    torch.save({"average": state}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@torch.no_grad()
def evaluate(model, rows):
    """Share of drafts that are right if all before them were, at every place of the greedy answers."""
    tok, tpl = Tokenizer.from_file(str(HERE / "tokenizer.json")), data.template()
    right, tried = [0] * PASSES, [0] * PASSES
    for row in rows:
        prompt = tok.encode(data.render_request(tpl, row["request"]), add_special_tokens=False).ids
        ids = torch.tensor([prompt + model.generate(prompt, 160)])
        g, embedded = model.hidden(ids), model.backbone.embeddings(ids)
        drafts = [model.lm_head(m).argmax(-1)[0].tolist() for m in model.mtp.unroll(embedded, g, PASSES)]
        for i in range(len(prompt) - 1, ids.shape[1] - PASSES):
            for d in range(PASSES):
                if i + d + 2 >= ids.shape[1]:
                    break
                tried[d] += 1
                if drafts[d][i] != ids[0, i + d + 2]:
                    break
                right[d] += 1
    print("right if all before were:", " ".join(f"{r / t:.4f}" for r, t in zip(right, tried)), f"of {tried[0]} places")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, default=HERE / "draft-state.pt")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    if args.eval:
        rows = [json.loads(x) for x in (HERE / "heldout.jsonl").read_text().splitlines()]
        evaluate(rounded(averaged(args.state)) if args.state.exists() else from_official(), rows)
    else:
        train(args)
