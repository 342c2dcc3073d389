"""Train the toy checkpoint on a CPU. Resumable: the same command goes on from the last saved state.

    python train.py --minutes 60          train (the learning rate follows the minutes already trained)
    python train.py --eval                answer heldout.jsonl greedily with the averaged weights
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
from model import Tiny

HERE = Path(__file__).resolve().parent


# ---- batches ------------------------------------------------------------------------------------------------------

# (with tools, several turns, shortest row, width, rows): few fixed shapes, so that torch.compile pays
GROUPS = [(True, True, 500, 640, 4), (True, False, 0, 352, 2), (False, True, 180, 256, 6), (False, False, 0, 80, 12)]


def batches(step, tok, tpl):
    """The micro-batches of a step; the step number is the seed, so that a resumed run sees the same data."""
    r = random.Random(7_000_003 * (step + 1))
    for with_tools, long, least, width, rows in GROUPS:
        found = []
        while len(found) < rows:
            text, spans = data.render_training(tpl, data.training_chat(r, with_tools, long))
            enc = tok.encode(text, add_special_tokens=False)
            if not least <= len(enc.ids) <= width:
                continue
            mask, s = [0] * len(enc.ids), 0
            for i, (a, b) in enumerate(enc.offsets):
                while s < len(spans) and a >= spans[s][1]:
                    s += 1
                mask[i] = int(s < len(spans) and spans[s][0] <= a)
            found.append((enc.ids, mask))
        ids = torch.zeros(rows, width, dtype=torch.long)
        weight = torch.zeros(rows, width)
        for n, (i, m) in enumerate(found):
            ids[n, :len(i)] = torch.tensor(i)
            weight[n, :len(i)] = torch.tensor(m) + 0.0
            weight[n, :len(i)] += 0.03 * (1 - weight[n, :len(i)])       # a little for the text that is only read
        yield ids, weight


def losses(model, ids, weight, mtp):
    """Summed weighted cross-entropy of the body and of the draft block, and how many trained tokens are right."""
    g = model.hidden(ids)
    target, w = ids[:, 1:], weight[:, 1:]
    logits = model.lm_head(g[:, :-1]).float()
    body = (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * w.flatten()).sum()
    right = ((logits.argmax(-1) == target) & (w == 1)).sum()
    draft = torch.zeros(())
    if mtp:
        m = model.draft(ids, g)[:, :-1]
        dl = model.lm_head(m).float()
        draft = (F.cross_entropy(dl.flatten(0, 1), ids[:, 2:].flatten(), reduction="none") *
                 weight[:, 2:].flatten()).sum()
    return body, draft, right


# ---- optimisers ---------------------------------------------------------------------------------------------------

def orthogonal(g):
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix, batched over leading dimensions."""
    x = g.float()
    wide = x.shape[-2] > x.shape[-1]
    if wide:
        x = x.transpose(-1, -2)
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(-1, -2) if wide else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to the size of an AdamW step."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.02):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buf = self.state[p].setdefault("m", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                u = orthogonal(p.grad.lerp(buf, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def optimisers(model, lr):
    matrices, rest = [], []
    for n, p in model.named_parameters():
        plain = p.ndim < 2 or "embeddings" in n or "lm_head" in n or "conv1d" in n or "gate" in n
        (rest if plain else matrices).append(p)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


# ---- training -----------------------------------------------------------------------------------------------------

def train(args):
    torch.manual_seed(args.seed)
    tok, tpl = Tokenizer.from_file(str(HERE / "tokenizer.json")), data.template()
    model = Tiny()
    opts = optimisers(model, args.lr)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(opts, saved["opts"]):
            o.load_state_dict(s)
        average, step, spent = saved["average"], saved["step"], saved["spent"]
        print(f"resumed at step {step}, {spent / 60:.1f} min", flush=True)

    def save():
        tmp = args.state.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "average": average,
                    "step": step, "spent": spent}, tmp)
        os.replace(tmp, args.state)

    run = torch.compile(losses, dynamic=False) if args.compile else losses
    model.train()
    last_save = last_log = time.time()
    logged = dict(tokens=0, weight=0.0, body=0.0, draft=0.0, right=0, trained=0)
    while spent < args.minutes * 60:
        begin = time.time()
        done = spent / (args.minutes * 60)
        lr = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for o in opts:
            for group in o.param_groups:
                group["lr"] = lr
        group = list(batches(step, tok, tpl))
        total = sum(w[:, 1:].sum() for _, w in group)
        for ids, weight in group:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
                body, draft, right = run(model, ids, weight, True)
            ((body + args.mtp_weight * draft) / total).backward()
            logged["tokens"] += ids.numel()
            logged["weight"] += float(weight[:, 1:].sum())
            logged["trained"] += int((weight[:, 1:] == 1).sum())
            logged["body"] += float(body.detach())
            logged["draft"] += float(draft.detach())
            logged["right"] += int(right)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        for m in model.moes():
            m.balance(1e-3 * (1 - done))
        step += 1
        keep = min(0.995, step / (step + 20))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        spent += min(30, time.time() - begin)           # a compiling step does not count in full
        if step % args.log == 0:
            t = logged
            print(f"step {step} min {spent / 60:.1f} lr {lr:.2e} tok/s {t['tokens'] / (time.time() - last_log):.0f} "
                  f"loss {t['body'] / t['weight']:.4f} mtp {t['draft'] / t['weight']:.4f} "
                  f"right {t['right'] / max(1, t['trained']):.4f}", flush=True)
            logged = dict.fromkeys(logged, 0)
            last_log = time.time()
        if time.time() - last_save > 120:
            save()
            last_save = time.time()
        time.sleep(args.rest)
        if args.steps and step >= args.steps:
            break
    save()


# ---- evaluation ---------------------------------------------------------------------------------------------------

def averaged(path):
    model = Tiny()
    model.load_state_dict(torch.load(path, weights_only=True)["average"])
    return model.eval()


def rounded(model):
    """The weights as they are stored: BF16, the router bias F32."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def split_reply(text, think):
    """(content, call) of a generated text, tags included."""
    if think:
        text = text.partition("</think>")[2]
    text = text.removesuffix("<|im_end|>").strip()
    call = None
    if text.startswith("<tool_call>"):
        name = text.partition("<function=")[2].partition(">")[0]
        args = {}
        for part in text.split("<parameter=")[1:]:
            key, _, value = part.partition(">")
            args[key] = value.partition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
        if "limit" in args and args["limit"].isdigit():
            args["limit"] = int(args["limit"])
        call = {"name": name, "arguments": args}
    return text, call


def correct(expect, content, call):
    if "tool" in expect:
        return call == expect["tool"]
    if "content" in expect:
        return content == expect["content"]
    if "contains" in expect:
        return all(c in content for c in expect["contains"])
    try:
        return json.loads(content) == expect["json"]
    except ValueError:
        return False


@torch.no_grad()
def evaluate(model, rows, show=0):
    tok, tpl = Tokenizer.from_file(str(HERE / "tokenizer.json")), data.template()
    score, drafts = {}, {}
    for row in rows:
        think = row["request"].get("chat_template_kwargs", {}).get("enable_thinking", True)
        prompt = tok.encode(data.render_request(tpl, row["request"]), add_special_tokens=False).ids
        out = model.generate(prompt, 160)
        text = tok.decode(out, skip_special_tokens=False)
        ok = correct(row["expect"], *split_reply(text, think))
        ids = torch.tensor([prompt + out])
        guess = model.lm_head(model.draft(ids, model.hidden(ids))).argmax(-1)[0]
        n = len(prompt)
        hits = sum(int(guess[i - 2] == ids[0, i]) for i in range(n + 1, n + len(out)))
        fam = row["family"]
        good, all_ = score.get(fam, (0, 0))
        score[fam] = (good + ok, all_ + 1)
        h, a = drafts.get(fam, (0, 0))
        drafts[fam] = (h + hits, a + len(out) - 1)
        if not ok and show > 0:
            show -= 1
            print("WRONG", fam, json.dumps(row["request"]["messages"][-1], ensure_ascii=False)[:200], "->", repr(text),
                  "| want", json.dumps(row["expect"], ensure_ascii=False))
    for fam in score:
        print(f"{fam:18} right {score[fam][0]:3}/{score[fam][1]:<3} first draft {drafts[fam][0] / drafts[fam][1]:.3f}")
    good, all_ = (sum(v[i] for v in score.values()) for i in (0, 1))
    h, a = (sum(v[i] for v in drafts.values()) for i in (0, 1))
    print(f"{'all':18} right {good}/{all_} = {good / all_:.3f}, first draft accepted {h / a:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, default=HERE / "train-state.pt")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--mtp-weight", type=float, default=0.2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds of pause after a step, on a shared machine")
    parser.add_argument("--log", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--limit", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    if args.eval:
        rows = [json.loads(x) for x in (HERE / "heldout.jsonl").read_text().splitlines()]
        if args.limit:
            rows = random.Random(0).sample(rows, args.limit)
        evaluate(rounded(averaged(args.state)), rows, args.show)
    else:
        train(args)
