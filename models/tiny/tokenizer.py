"""Train the byte-level BPE tokenizer on generated text and write tokenizer.json and tokenizer_config.json."""

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import data

SPLIT = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
         r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>",
           "</tool_call>", "<tool_response>", "</tool_response>"]
RESERVED = 32           # ids 0..31 are added tokens
VOCAB = 1280


def build():
    tokens = CONTROL + [f"<SPECIAL_{n}>" for n in range(len(CONTROL), RESERVED)]
    tok = Tokenizer(models.BPE(ignore_merges=True, byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tok.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tok.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)

    r = random.Random(1)
    tpl = data.template()
    control = "|".join(map(data.re.escape, tokens))
    pieces = []
    for n in range(12000):
        text, _ = data.render_training(tpl, data.training_chat(r, n % 4 == 0, n % 3 == 0))
        pieces += [p for p in data.re.split(control, text) if p]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=tokens, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(pieces, trainer)

    doc = json.loads(tok.to_str())
    doc["added_tokens"] = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False,
                                special=not 12 <= i <= 17) for i, t in enumerate(tokens)]
    (data.HERE / "tokenizer.json").write_text(json.dumps(doc, ensure_ascii=False, indent=1) + "\n")
    config = {
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"}
                                 for t in doc["added_tokens"]},
        "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (data.HERE / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n")


def check():
    tok = Tokenizer.from_file(str(data.HERE / "tokenizer.json"))
    for text in ["héllo Wörld 123 + 45", "ಮೈಸೂರು 🦀\r\n\t x", "a  b   c", "<|im_start|>user\n1<|im_end|>", "\x00\x7f\u200d"]:
        ids = tok.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids, skip_special_tokens=False) == text, text
    for i, t in enumerate(CONTROL):
        assert tok.token_to_id(t) == i and tok.encode(t).ids == [i]
    assert tok.get_vocab_size() == max(tok.get_vocab().values()) + 1
    print("vocabulary", tok.get_vocab_size())
    return tok


if __name__ == "__main__":
    build()
    tok = check()
    r = random.Random(5)
    tpl = data.template()
    for with_tools, long in [(True, True), (True, False), (False, True), (False, False)]:
        lens, loss = [], []
        for _ in range(200):
            text, spans = data.render_training(tpl, data.training_chat(r, with_tools, long))
            enc = tok.encode(text, add_special_tokens=False)
            lens.append(len(enc.ids))
            loss.append(sum(any(a <= o[0] < b for a, b in spans) for o in enc.offsets))
        print("tools" if with_tools else "plain", "long" if long else "short", "mean", sum(lens) / 200, "max",
              max(lens), "trained", sum(loss) / 200)
