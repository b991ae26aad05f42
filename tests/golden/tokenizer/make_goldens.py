#!/usr/bin/env python3
"""Makes the tokenizer fixtures and what the reference libraries answer on them.

    pip install tokenizers==0.23.3 transformers==5.17.0 unicodedata2==16.0.0
    python3 tests/golden/tokenizer/make_goldens.py

Writes next to itself:
  byte_level.json, metaspace.json   tiny tokenizer.json files
  goldens.json                      answers on them and on variants (JSON merge patches)
  exhaustive.json                   hashes over all Unicode scalar values
  chat_template_*                   the two published templates, and conversations.json as rendered
  llava_prompts.json                the templates of the LLaVA families with Llama vocabularies, and
                                    conversations as rendered
Random texts come from a generator that the test repeats, so that only hashes are kept.
"""
import copy
import json
import pathlib
import sys

import tokenizers
import transformers
import unicodedata2
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
MASK = (1 << 64) - 1
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CORPUS = """
The camera sees a red square moving to the left, then a blue circle; how many are there? It's 3.
What's the colour of the thing that we're looking at? They've seen it, I'll say so, he'd agree.
def f(x):\n    return x + 1\n\nfor i in range(10):\n\tprint(i, "hello world")\n
Le café est fermé à midi. Über die Brücke geht der Weg. Señor, mañana por la mañana.
你好世界 你好 世界 こんにちは 한국어 한국어 שלום שלום สวัสดี привет мир привет
12 34 2024 3.14159 !!! ... ??? --- *** 😀 😀 👨‍👩‍👧 👨‍👩‍👧 ☃ ☃
Hello world, hello there, hello again. The quick brown fox jumps over the lazy dog.
""" * 3

# Texts whose ids are kept in full: the edge cases one wants to read.
TEXTS = [
    "", " ", "   ", "Hello world", " Hello", "hello  world", "a   b", "a\n\nb", " \n \n x", "\r\n\r\nx",
    "a \r\n b", "!!!\n\n", "foo!!!bar", "tab\there", "it's I'LL we'Re don’t", "a'ſx", "abc123456",
    "café", "cafe\u0301", "x\u0301 y", "\u0301", "你好世界", "한국어", "שלום", "สวัสดี", "👨‍👩‍👧",
    "\U00010400", "\u00a0x\u2003y\u3000z", "a\0b", "\x7f\x80\x85", "def f(x):\n    return x\n",
    "x<image>\ny<video>z", "<|im_start|", "<|im_start|>user <video>\nHi<|im_end|>",
    "trailing <|im_end|>", "<|im_end|> leading", "<image><image>", "a <image>b", "e\u0301<image>\u0301",
    "\u212b", "가ᄀ\u1161", "e\u0323\u0307", "e\u0307\u0323", "\ufb01", "\ufffe\uffff", "\ufffd",
    "<0x41>", "a\u2581b", "\u2581", "<s>", "a<s>b", "<unk>x", "</s>x", "\n", "\t", "🧿☃",
    "USER: hi ASSISTANT:", "½ ² Ⅻ १२३", "\u200b\u200ba", "\x1c\x1d", "'", "''s", "'s'S'ſ",
    "<ab<abc>", "<ab>", "x <foo>\n y", "x <bar>\n y", "x <both>\n y", "a<sw>b", "a <sw> b", "_<sw>",
    "\u0301<sw>", "-<sw>-", "é-tok e\u0301-tok", "a sp ace b", "<nrm> <nrm>", "x<nrm>", "zebra zebras",
    " " * 64 + "x", "abab",
]
ALPHABET = [
    " ", "  ", "\n", "\r\n", "\t", "'", "’", "ſ", "s", "S", "ll", "RE", "\u0301", "\u0323", "1", "23",
    "½", "你", "好", "😀", "👨‍👩‍👧", "<|im_", "<|im_end|>", "<video>", "<image>", "end|>", "a",
    "Hello", "wor", "ld", "é", "e", "\u00a0", "\u3000", "\u200b", "!", "?!", ".", "\0", "\ufffd", "가",
    "\u1100", "\u1161", "\u11a8", "\u2581", "<0x41>", "ก", "ั", "_", "\u2003", "\u212b", "\ufb01",
    "\x7f", "\x85", "<s>", "</s>", "Q", "<foo>", "<bar>", "<both>", "<sw>", "<nrm>", "<ab", "<ab>",
    "<abc>", "zebra", "the", "-tok",
]
NUM_TEXTS, TEXTS_PER_HASH = 2000, 250
NUM_SEQUENCES, IDS_PER_SEQUENCE = 400, 24


def added(id_, content, **flags):
    token = dict(id=id_, content=content, single_word=False, lstrip=False, rstrip=False,
                 normalized=False, special=True)
    token.update(flags)
    return token


class Random:
    """SplitMix64."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        return (z ^ z >> 31) % n


class Hash:
    """FNV-1a over 64-bit values."""

    def __init__(self):
        self.value = 0xCBF29CE484222325

    def add(self, value):
        self.value = ((self.value ^ value) * 0x100000001B3) & MASK

    def add_ids(self, ids):
        for i in ids:
            self.add(i)
        self.add(MASK)

    def add_text(self, text):
        self.add_ids(text.encode("utf-8"))

    def hex(self):
        return f"{self.value:016x}"


def merge_patch(target, patch):
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    target = copy.deepcopy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merge_patch(target.get(key), value)
    return target


def train(pre_tokenizer, vocab_size, initial_alphabet):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=initial_alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    return json.loads(tokenizer.to_str())["model"]


BYTE_LEVEL_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]


def make_byte_level():
    split = [{"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
              "use_regex": False}]
    model = train(pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), 456,
        pre_tokenizers.ByteLevel.alphabet())
    n = len(model["vocab"])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(n + i, content) for i, content in enumerate(BYTE_LEVEL_ADDED)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                           "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                    "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "vocab": model["vocab"], "merges": model["merges"]},
    }


def make_metaspace():
    model = train(pre_tokenizers.Metaspace(prepend_scheme="always", split=True), 260, [])
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces += [p for p, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(i, content) for i, content in enumerate(pieces[:3])],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": template(["<s>"], []),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "vocab": {p: i for i, p in enumerate(pieces)},
                  "merges": [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]},
    }


def template(before, after):
    ids = {"<s>": 1, "</s>": 2}
    special = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special(b) for b in before] + [text("A")] + [special(a) for a in after],
        "pair": [text("A"), text("B")],
        "special_tokens": {name: {"id": name, "ids": [id_], "tokens": [name]}
                           for name, id_ in ids.items()},
    }


def metaspace_patch(scheme, split):
    stage = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": stage}


def variants(byte_level):
    n = len(byte_level["model"]["vocab"])
    base = byte_level["added_tokens"]
    extra = [("<foo>", dict(rstrip=True)), ("<bar>", dict(lstrip=True)),
             ("<both>", dict(lstrip=True, rstrip=True, special=False)),
             ("<sw>", dict(single_word=True)), ("<nrm>", dict(normalized=True)),
             ("<ab", {}), ("<ab>", dict(special=False)), ("<abc>", {}),
             ("e\u0301-tok", dict(normalized=True, special=False)), (" sp ace ", dict(special=False))]
    flags = {"added_tokens": base + [added(n + len(base) + i, content, **options)
                                     for i, (content, options) in enumerate(extra)]}
    whole = {"added_tokens": [], "model": {"vocab": {"zebra": n, "\u0120zebra": n + 1, "\u0120foxes": n + 2}}}

    def split(pattern, behavior, invert=False):
        return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}

    def byte_stage(**options):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False, **options}

    def stages(*list_):
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(list_)}}

    yield "byte_level", {}
    yield "byte_level", flags
    yield "byte_level", whole
    yield "byte_level", merge_patch(whole, {"model": {"ignore_merges": True}})
    yield "byte_level", stages(split({"Regex": LLAMA3}, "Isolated"), byte_stage())
    yield "byte_level", stages(byte_stage(use_regex=True, add_prefix_space=True))
    yield "byte_level", {**stages(split({"Regex": GPT2}, "Isolated"), byte_stage()), "normalizer": None}
    # A special token that normalizing changes is never skipped by the reference (its set of special
    # contents holds the original), which is not what anybody asks for: none is special here.
    changed = {"added_tokens": [dict(t, special=t["special"] and not t["normalized"])
                                for t in flags["added_tokens"]]}
    yield "byte_level", {**changed, "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Replace", "pattern": {"String": "ll"}, "content": "LL"},
        {"type": "Prepend", "prepend": "\u2581"}]}}
    yield "byte_level", {"decoder": None}
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            yield "byte_level", stages(split({"String": " "}, behavior, invert), byte_stage())
    for individual in (False, True):
        yield "byte_level", stages({"type": "Digits", "individual_digits": individual}, byte_stage())

    yield "metaspace", {}
    yield "metaspace", {"post_processor": template(["<s>"], ["</s>"])}
    yield "metaspace", {"post_processor": {
        "type": "Sequence", "processors": [byte_stage(), template(["<s>"], ["</s>", "<s>"])],
        "single": None, "pair": None, "special_tokens": None}}
    for scheme in ("always", "first", "never"):
        for split_ in (False, True):
            yield "metaspace", metaspace_patch(scheme, split_)
    yield "metaspace", {**metaspace_patch("first", True),
                        "decoder": {"type": "Metaspace", "replacement": "\u2581",
                                    "prepend_scheme": "first", "split": True, "decoders": None}}
    yield "metaspace", stages({"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed",
                               "invert": False},
                              {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
                               "split": True})
    some = {f"<0x{b:02X}>": None for b in (0xE2, 0xC3, 0x0A)}
    yield "metaspace", {"model": {"vocab": some}}
    yield "metaspace", {"model": {"vocab": some, "fuse_unk": False}}
    yield "metaspace", {"model": {"byte_fallback": False}}
    yield "metaspace", {"model": {"byte_fallback": False, "fuse_unk": False}}
    yield "metaspace", {"model": {"byte_fallback": False, "unk_token": None}}


def random_text(random):
    return "".join(ALPHABET[random.below(len(ALPHABET))] for _ in range(random.below(25)))


def encode(tokenizer, text, as_text=False, frame=False):
    tokenizer.encode_special_tokens = as_text
    ids = tokenizer.encode(text, add_special_tokens=frame).ids
    tokenizer.encode_special_tokens = False
    return ids


def stream(tokenizer, ids):
    decoder = DecodeStream(skip_special_tokens=False)
    return "".join(decoder.step(tokenizer, i) or "" for i in ids)


def answers(base, patch, file):
    tokenizer = Tokenizer.from_str(json.dumps(file))
    for token in file["added_tokens"]:
        assert tokenizer.token_to_id(token["content"]) == token["id"], token
    kept = []
    for text in TEXTS:
        ids = encode(tokenizer, text)
        kept.append(ids)
    encoded, random = [], Random(1)
    for _ in range(NUM_TEXTS // TEXTS_PER_HASH):
        h = Hash()
        for _ in range(TEXTS_PER_HASH):
            text = random_text(random)
            ids = encode(tokenizer, text)
            h.add_ids(ids)
            h.add_ids(encode(tokenizer, text, as_text=True))
            h.add_ids(encode(tokenizer, text, frame=True))
            h.add_text(tokenizer.decode(ids, skip_special_tokens=False))
            h.add_text(tokenizer.decode(ids, skip_special_tokens=True))
        encoded.append(h.hex())
    # Ids in random order: half characters, stray bytes, ids without a token.
    size = max(list(file["model"]["vocab"].values()) + [t["id"] for t in file["added_tokens"]]) + 1
    h, random = Hash(), Random(2)
    for _ in range(NUM_SEQUENCES):
        ids = [random.below(size + 2) for _ in range(IDS_PER_SEQUENCE)]
        h.add_text(tokenizer.decode(ids, skip_special_tokens=False))
        h.add_text(tokenizer.decode(ids, skip_special_tokens=True))
    singles = Hash()
    for i in range(size):
        singles.add_text(tokenizer.decode([i], skip_special_tokens=False))
    # The reference's own stream holds back a literal U+FFFD at the end, so such texts have none.
    streams = Hash()
    for text, ids in zip(TEXTS, kept):
        if "\ufffd" not in tokenizer.decode(ids, skip_special_tokens=False):
            streams.add_text(stream(tokenizer, ids))
    return {"base": base, "patch": patch, "ids": kept, "random_texts": encoded,
            "random_ids": h.hex(), "single_ids": singles.hex(), "streams": streams.hex()}


def exhaustive():
    scalars = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    out = {}

    def members(regex):
        stage, found = pre_tokenizers.Split(Regex(regex), "removed", invert=True), set()
        for i in range(0, len(scalars), 4096):
            for piece, _ in stage.pre_tokenize_str("".join(map(chr, scalars[i:i + 4096]))):
                found.update(map(ord, piece))
        return found

    def hash_members(found):
        h = Hash()
        for c in sorted(found):
            h.add(c)
        return h.hex()

    for name, regex in (("letter", r"\p{L}"), ("number", r"\p{N}"), ("whitespace", r"\s")):
        out[name] = hash_members(members(regex))
    words = Tokenizer(models.BPE({"x": 0}, [], unk_token="x"))
    words.add_tokens([AddedToken("<sw>", single_word=True, normalized=False)])
    out["word"] = hash_members(c for c in scalars if words.encode(chr(c) + "<sw>").ids[-1] != 1)

    for name, regex in (("qwen2", QWEN), ("llama3", LLAMA3), ("gpt2", GPT2)):
        stage = pre_tokenizers.Split(Regex(regex), "isolated")
        for shape in ("a{}b", " {}", "{}\n", "'{}x", "1{} 2"):
            h = Hash()
            for c in scalars:
                lengths = 0
                for piece, _ in stage.pre_tokenize_str(shape.replace("{}", chr(c))):
                    lengths = lengths * 8 + len(piece)
                h.add(lengths)
            out[f"{name} {shape}"] = h.hex()

    # NFC of Unicode itself: the reference's tables are of version 9.0 and differ for what is newer.
    h = Hash()
    for c in scalars:
        h.add_text(unicodedata2.normalize("NFC", chr(c)))
    out["nfc of each"] = h.hex()
    moving = [c for c in scalars if unicodedata2.combining(chr(c)) or
              unicodedata2.decomposition(chr(c))[:1] not in ("", "<")]
    # Decomposed, so that there is something to compose and to put in order.
    alphabet = [unicodedata2.normalize("NFD", chr(c)) for c in moving[::17]]
    alphabet += list("aeoiu") + [chr(c) for c in (0x300, 0x301, 0x323, 0x345, 0x3099, 0x1100, 0x1112,
                                                  0x1161, 0x1175, 0x11A8, 0x11C2, 0xAC00, 0xAC01)]
    h, random = Hash(), Random(3)
    for _ in range(20000):
        text = "".join(alphabet[random.below(len(alphabet))] for _ in range(1 + random.below(8)))
        h.add_text(unicodedata2.normalize("NFC", text))
    out["nfc alphabet"] = alphabet
    out["nfc of random"] = h.hex()
    return out


TURNS = "{% for content in message['content'] | selectattr('type', 'equalto', 'KIND') %}"
SPACED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}" + TURNS.replace("KIND", "image") + "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}" + TURNS.replace("KIND", "video") + "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}" + TURNS.replace("KIND", "text") +
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}" + TURNS.replace("KIND", "text") +
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{# Render all images first #}" + TURNS.replace("KIND", "image") + "{{ '<image>\n' }}{% endfor %}"
    "{# Render all video then #}" + TURNS.replace("KIND", "video") + "{{ '<video>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}" + TURNS.replace("KIND", "text") +
    "{{ content['text'] }}{% endfor %}{% else %}" + TURNS.replace("KIND", "text") +
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# (system, [(question, answer)], add_generation_prompt)
CONVERSATIONS = [
    ("", [("What is this?", "")], True),
    ("You are a helpful assistant.", [("What is this?", "")], True),
    ("", [("How many?", "Three."), ("And now?", "")], True),
    ("Be brief.", [("How many?", "Three."), ("And now?", "Two\n"), (" \nwhere?", "")], True),
    ("", [("How many?", "Three.")], False),
    ("", [("\n\nleading newlines", ""), ], True),
]


def conversations(tokenizer):
    out = []
    for system, turns, generate in CONVERSATIONS:
        messages = []
        if system:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for i, (question, answer) in enumerate(turns):
            content = [{"type": "video"}] if i == 0 else []
            messages.append({"role": "user", "content": content + [{"type": "text", "text": question}]})
            if answer:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        row = {"system": system, "turns": turns, "generate": generate}
        for name, text in (("spaced", SPACED), ("chatml", CHATML)):
            rendered, _ = render_jinja_template([messages], chat_template=text,
                                                add_generation_prompt=generate)
            row[name] = {"text": rendered[0], "ids": encode(tokenizer, rendered[0])}
        out.append(row)
    return out


IMAGES = TURNS.replace("KIND", "image") + "{{ '<image>\n' }}{% endfor %}"
VIDEOS = TURNS.replace("KIND", "video") + "{{ '<video>\n' }}{% endfor %}"
TEXTS_OF = TURNS.replace("KIND", "text")
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}" + IMAGES + "VIDEOS{# Render all text next #}{% if message['role'] != 'assistant' %}" +
    TEXTS_OF + "{{ content['text'] + ' '}}{% endfor %}{% else %}" + TEXTS_OF +
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}{# Render all images first #}" + IMAGES + "{# Render all text next #}" + TEXTS_OF +
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + 'END '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
LLAVA = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}" + IMAGES +
        "{# Render all text next #}" + TEXTS_OF + "{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "vicuna": VICUNA.replace("VIDEOS", ""),
    "vicuna_video": VICUNA.replace("VIDEOS", "{# Render all video next #}" + VIDEOS),
    "converted_vicuna": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
        "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}" + IMAGES +
        "{# Render all video next #}" + VIDEOS + "{# Render all text next #}" + TEXTS_OF +
        "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"),
    "mistral": MISTRAL.replace("END", "</s>"),
    "mistral_backslash": MISTRAL.replace("END", "<\\s>"),
    "converted_mistral": MISTRAL.replace("END", "<\\s>").replace(
        "{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif", "{% if"),
}


def llava_prompts(metaspace):
    """The first row holds the templates and the tokens added to metaspace.json."""
    first = len(metaspace["model"]["vocab"])
    contents = ["<image>", "<video>", "<|im_start|>", "<|im_end|>"]
    tokens = metaspace["added_tokens"] + [added(first + i, content) for i, content in enumerate(contents)]
    tokenizer = Tokenizer.from_str(json.dumps({**metaspace, "added_tokens": tokens}))
    out = [{"templates": LLAVA, "added_tokens": tokens}]
    for system, turns, generate in CONVERSATIONS:
        row = {"system": system, "turns": turns, "generate": generate}
        for name, text in LLAVA.items():
            if system and name == "converted_mistral":
                continue  # raises
            kind = "video" if "<video>" in text else "image"
            messages = []
            if system:
                messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
            for i, (question, answer) in enumerate(turns):
                content = [{"type": kind}] if i == 0 else []
                messages.append({"role": "user", "content": content + [{"type": "text", "text": question}]})
                if answer:
                    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            rendered, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=generate)
            row[name] = {"text": rendered[0], "ids": encode(tokenizer, rendered[0], frame=True)}
        out.append(row)
    return out


def write(name, value, lines=False):
    with open(HERE / name, "w", encoding="utf-8") as out:
        if lines:  # one variant a line keeps differences readable
            out.write("[\n" + ",\n".join(json.dumps(v, ensure_ascii=True, separators=(",", ":"))
                                         for v in value) + "\n]\n")
        else:
            json.dump(value, out, ensure_ascii=True, separators=(",", ":"))
            out.write("\n")


def main():
    if unicodedata2.unidata_version != "16.0.0":
        sys.exit(f"need unicodedata2 16.0.0, got {unicodedata2.unidata_version}")
    files = {"byte_level": make_byte_level(), "metaspace": make_metaspace()}
    for name, file in files.items():
        write(name + ".json", file)
    groups = [answers(base, patch, merge_patch(files[base], patch))
              for base, patch in variants(files["byte_level"])]
    write("goldens.json", [{"made_by": f"tokenizers {tokenizers.__version__}, "
                                       f"transformers {transformers.__version__}",
                            "texts": TEXTS, "alphabet": ALPHABET}] + groups, lines=True)
    write("llava_prompts.json", llava_prompts(files["metaspace"]), lines=True)
    write("conversations.json", conversations(Tokenizer.from_str(json.dumps(files["byte_level"]))),
          lines=True)
    (HERE / "chat_template_spaced.json").write_text(
        json.dumps({"chat_template": SPACED}, indent=2) + "\n")
    (HERE / "chat_template_chatml.jinja").write_text(CHATML)
    write("exhaustive.json", exhaustive())


if __name__ == "__main__":
    main()
