"""Write the checkpoint files and, with --check, compare them with transformers.

    python export.py --state train-state.pt          model.safetensors, config.json, generation_config.json
    python export.py --check                         logits of transformers against model.py, both FP32
    python export.py --goldens                       golden.json (transformers) and golden_mtp.json (model.py)
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
from model import CONFIG, Tiny
from train import averaged

HERE = Path(__file__).resolve().parent
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 11],
              "pad_token_id": 0, "temperature": 0.6, "top_p": 0.95}


def official(model):
    """State as the official layout names it: experts one by one, BF16 except the router bias."""
    out = {}
    for name, value in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            out[name] = value.float()
        elif ".experts_" in name:
            head, kind = name.split(".experts_")
            for e, w in enumerate(value):
                out[f"{head}.experts.{e}.{kind}_proj.weight"] = w.bfloat16()
        else:
            out[name] = value.bfloat16()
    return {k: v.contiguous() for k, v in out.items()}


def from_official(path=HERE / "model.safetensors"):
    """The model of model.py, FP32, with the stored weights."""
    stored = load_file(path)
    model = Tiny()
    state = {}
    for name, value in model.state_dict().items():
        if ".experts_" in name:
            head, kind = name.split(".experts_")
            value = torch.stack([stored.pop(f"{head}.experts.{e}.{kind}_proj.weight") for e in range(len(value))])
        else:
            value = stored.pop(name)
        state[name] = value.float()
    assert not stored, list(stored)
    model.load_state_dict(state)
    return model.eval()


def write(state):
    save_file(official(averaged(state)), HERE / "model.safetensors.tmp", metadata={"format": "pt"})
    os.chmod(HERE / "model.safetensors.tmp", 0o644)
    os.replace(HERE / "model.safetensors.tmp", HERE / "model.safetensors")
    for name, value in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (HERE / name).write_text(json.dumps(value, indent=2) + "\n")
    tensors = load_file(HERE / "model.safetensors")
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} values, "
          f"{(HERE / 'model.safetensors').stat().st_size} bytes")


def reference():
    """The body in transformers, FP32. Its prefill clamps dt at time_step_min, which the model does not."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    config = NemotronHConfig.from_pretrained(HERE)
    config.time_step_min = 1e-30
    model, info = NemotronHForCausalLM.from_pretrained(HERE, config=config, dtype=torch.float32,
                                                       output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert all(k.startswith("mtp.") for k in info["unexpected_keys"]), info["unexpected_keys"]
    return model.float().eval()


def prompts():
    """Held-out prompts of different length and kind, as token ids."""
    tok, tpl = Tokenizer.from_file(str(HERE / "tokenizer.json")), data.template()
    rows = [json.loads(x) for x in (HERE / "heldout.jsonl").read_text().splitlines()]
    wanted = ["greeting", "arithmetic", "arithmetic-direct", "extraction", "tool-call", "after-tool"]
    chosen = [next(r for r in rows if r["family"] == f) for f in wanted]
    ids = [tok.encode(data.render_request(tpl, r["request"]), add_special_tokens=False).ids for r in chosen]
    return [ids[0][:1], ids[0][:7]] + ids


def rounded_rows(t):
    return [[float(f"{x:.7g}") for x in row] for row in t.tolist()]


@torch.no_grad()
def check():
    theirs, ours = reference(), from_official()
    worst = 0.0
    for ids in prompts():
        x = torch.tensor([ids])
        a, b = theirs(x).logits, ours.lm_head(ours.hidden(x))
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    print(f"largest relative difference to transformers: {worst:.2e}")
    assert worst < 1e-4


@torch.no_grad()
def goldens():
    theirs, ours = reference(), from_official()
    cases, drafts = [], []
    for ids in prompts():
        x = torch.tensor([ids])
        rows = list(range(max(0, len(ids) - 4), len(ids)))
        logits = theirs(x).logits[0]
        tokens, y = [], x
        for _ in range(24):
            tokens.append(int(theirs(y).logits[0, -1].argmax()))
            y = torch.cat([y, torch.tensor([[tokens[-1]]])], 1)
        cases.append({"ids": ids, "rows": rows, "logits": rounded_rows(logits[rows]), "tokens": tokens})
        ids = ids + tokens[:4]                # the draft block reads the token that follows each position
        x = torch.tensor([ids])
        m = ours.lm_head(ours.draft(x, ours.hidden(x)))[0]
        rows = list(range(max(0, len(m) - 2), len(m)))
        drafts.append({"ids": ids, "rows": rows, "logits": rounded_rows(m[rows]), "argmax": m.argmax(-1).tolist()})
    note = ("FP32 computation from the stored BF16 weights by transformers, time_step_min lowered; `rows` are positions "
            "of `ids`, `logits` their full rows, `tokens` the greedy continuation (stop tokens not obeyed)")
    dump("golden.json", {"source": note, "cases": cases})
    note = ("draft block, FP32 computation from the stored BF16 weights by models/tiny/model.py (transformers has no MTP): "
            "position i reads (E[ids[i+1]], g_i) and predicts ids[i+2]; `argmax` for positions 0..len(ids)-2")
    dump("golden_mtp.json", {"source": note, "cases": drafts})


def dump(name, value):
    (HERE / name).write_text(json.dumps(value, separators=(",", ":")).replace('{"ids"', '\n{"ids"') + "\n")
    print(name, (HERE / name).stat().st_size, "bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--goldens", action="store_true")
    args = parser.parse_args()
    if args.state:
        write(args.state)
    if args.check:
        check()
    if args.goldens:
        goldens()
