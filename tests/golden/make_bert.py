#!/usr/bin/env python3
"""Writes the fixtures of test_bert.cpp and test_wordpiece.cpp into data/bert/.

Needs torch, transformers, tokenizers and safetensors; the tests themselves need no Python.

    python make_bert.py                 # tiny random networks and the tokenizer's fixture
    python make_bert.py --minilm DIR    # also the embeddings of the real MiniLM in DIR
"""

import argparse
import json
import random
import unicodedata
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

OUT = Path(__file__).parent / "data" / "bert"
SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=24,
)


def randomise(model):
    """Gives every parameter a random value: zeros and ones would hide a mistake."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def write(name, tensors):
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors", metadata={"format": "pt"})


def padded_ids(pad, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SIZES["vocab_size"], (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([9, 5, 1]):
        ids[row, length:] = pad
        mask[row, length:] = 0
    return ids, mask


def networks():
    torch.manual_seed(0)
    bert = randomise(BertModel(BertConfig(**SIZES, type_vocab_size=2)))
    ids, mask = padded_ids(pad=0, seed=1)
    types = (torch.arange(9) > 3).long().expand(3, 9).contiguous()
    with torch.no_grad():
        plain = bert(ids, attention_mask=mask)
        typed = bert(ids, attention_mask=mask, token_type_ids=types)
        unmasked = bert(ids)
    write("tiny_bert", bert.state_dict())
    write(
        "tiny_bert_expected",
        dict(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=types,
            hidden=plain.last_hidden_state,
            pooled=plain.pooler_output,
            hidden_typed=typed.last_hidden_state,
            hidden_unmasked=unmasked.last_hidden_state,
        ),
    )

    config = RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
    roberta = randomise(RobertaModel(config, add_pooling_layer=False))
    ids, mask = padded_ids(pad=1, seed=2)
    with torch.no_grad():
        hidden = roberta(ids, attention_mask=mask).last_hidden_state
    write("tiny_roberta", roberta.state_dict())
    write("tiny_roberta_expected", dict(input_ids=ids, attention_mask=mask, hidden=hidden))

    # A classifier with its loss and gradients, so that backward is compared as well.
    config = BertConfig(
        **SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    classifier = randomise(BertForSequenceClassification(config)).train()
    ids, mask = padded_ids(pad=0, seed=3)
    labels = torch.tensor([2, 0, 1])
    output = classifier(ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    layer = classifier.bert.encoder.layer[0]
    write("tiny_classifier", classifier.state_dict())
    write(
        "tiny_classifier_expected",
        dict(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            logits=output.logits,
            loss=output.loss,
            query_grad=layer.attention.self.query.weight.grad,
            word_grad=classifier.bert.embeddings.word_embeddings.weight.grad,
        ),
    )


HARD_LINES = [
    "",
    " ",
    "\t\n\r",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "Hello, World! It's 3:45 p.m. -- isn't it?",
    "unaffable unaffordable playing players replayed",
    "naïve café résumé Ångström façade coöperate Zoë",
    "NAÏVE CAFÉ RÉSUMÉ ÅNGSTRÖM",
    "e\u0301 a\u030a o\u0308 n\u0303 \u0301lone combining",
    "İstanbul ısı DİYARBAKIR Straße STRASSE ẞ ſtop",
    "ΑΣ ὈΔΥΣΣΕΎΣ Ὀδυσσεύς ς σ Σ",
    "Привет, мир! Ёлка йод Й",
    "日本語とテキスト中国語漢字",
    "汉字mixed漢字with latin",
    "\U00020000\U0002a6df \U0002b740 豈 \uf900\ufaff",
    "한국어 텍스트 각 가나다",
    "\u1100\u1161\u11a8 jamo",
    "がぎぐげご パピプペポ ｶﾞ ﾊﾟ",
    "हिन्दी नमस्ते क्षि",
    "ภาษาไทย กำ น้ำ",
    "العربية مَرْحَبًا لا",
    "עברית שָׁלוֹם",
    "ﬁ ﬂ ﬀ ﬃ ½ ² ™ Ⅳ ㎏ ℡",
    "𝓐𝓑𝓒 𝕏 𝟙𝟚 Ａｂｃ１２３",
    "emoji 😀 👩‍👩‍👧 🇩🇪 ✈️ ☃",
    "zero\u200bwidth \u200d joiner \ufeff bom soft\u00adhyphen",
    "nbsp\u00a0em\u2003ideographic\u3000line\u2028para\u2029nel\u0085ogham\u1680end",
    "nul\u0000 bell\u0007 esc\u001b del\u007f c1\u0080\u009f",
    "replacement \ufffd private \ue000 \U000f0000 noncharacter \ufdd0",
    "bidi \u202e\u202c \u2066\u2069 marks",
    "«guillemets» „quotes“ ‘single’ … — – ‐ ‑ ― ‼ ⁇",
    "。、「」・！？（）［］｛｝～",
    "¿qué? ¡sí! § ¶ † ‡ • ‰ ′ ″",
    "$ + < = > ^ ` | ~ € £ ¥ ₿ © ® ° ± × ÷ ¬ ¨ ¯ ´ ¸",
    "a_b-c/d\\e@f#g%h&i*j(k)l[m]n{o}p:q;r'\"s,t.u!v?w",
    "....!!!???---___",
    "x" * 100,
    "x" * 101,
    "é" * 100 + " " + "é" * 101,
    "supercalifragilisticexpialidocious",
    "123456789 1,234.56 1e-5 0x1F",
    "ＦＵＬＬ　ＷＩＤＴＨ",
    "Å (angstrom sign) Ω (ohm sign) K (kelvin sign)",
    "ǅ ǈ ǋ Ǳ ŉ ǰ ΐ ΰ և ẖ ẗ",
    "ᾳ ᾼ ῼ ᾈ ᾀ",
    "Ⴀⴀ Ა ა ꭰ Ꭰ Ᏸ ᏸ",
    "𐐀𐐨 𞤀𞤢 𐓐𐓸",
    "᠎mongolian vowel separator",
    "a\u0300\u0301\u0302\u0303b \u20dd\u20e3 \u0488",
]

SUBJECTS = "a person,the instrument,an animal,any plant,the act,a unit,the quality,some food".split(",")
VERBS = "used,playing,growing,moved,measured,eating,speaking,known,formed,containing".split(",")
OBJECTS = "for music,in water,by rapid motion,of a region,with leaves,to feel pain,as money".split(",")


def random_character(rng, blocks):
    """An old character: the reference's tables end with Unicode 8 and differ on younger ones."""
    while True:
        character = chr(rng.randint(*rng.choice(blocks)))
        if unicodedata.ucd_3_2_0.category(character) != "Cn" and character != "\u166d":
            return character


def random_line(rng):
    """A line of characters from anywhere in Unicode, ASCII letters between them."""
    blocks = [(0x20, 0x17F), (0x20, 0x24F), (0x300, 0x36F), (0x370, 0x58F), (0x590, 0x8FF),
              (0x900, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF),
              (0xAC00, 0xD7A3), (0xF900, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF)]
    characters = []
    for _ in range(rng.randint(1, 30)):
        if rng.random() < 0.45:
            characters.append(rng.choice("abcdeinorst ABEZ ."))
        else:
            characters.append(random_character(rng, blocks))
    return "".join(characters)


def vocabulary(lines):
    """The special tokens, many single characters and some pieces of the words in `lines`."""
    rng = random.Random(1)
    normalise = BertWordPieceTokenizer(lowercase=True).normalizer.normalize_str
    split = BertWordPieceTokenizer(lowercase=True).pre_tokenizer.pre_tokenize_str
    words = sorted({word for line in lines for word, _ in split(normalise(line))})
    pieces = set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-()")
    pieces |= {"##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"}
    for word in words:
        if rng.random() < 0.5 and len(word) < 30:
            pieces.add(word)
        cut = rng.randint(1, len(word))
        if rng.random() < 0.5 and cut < len(word) < 30:
            pieces |= {word[:cut], "##" + word[cut:]}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + sorted(pieces)


def tokenizer():
    rng = random.Random(0)
    lines = list(HARD_LINES)
    lines += [
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}" for _ in range(60)
    ]
    lines += [random_line(rng) for _ in range(300)]
    vocab = vocabulary(lines)
    (OUT / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    reference = BertWordPieceTokenizer(
        vocab={token: index for index, token in enumerate(vocab)}, lowercase=True
    )
    with open(OUT / "wordpiece.jsonl", "w", encoding="utf-8") as file:
        for line in lines:
            ids = reference.encode(line).ids
            file.write(json.dumps({"text": line, "ids": ids}, separators=(",", ":")) + "\n")


SENTENCES = [
    "a stringed instrument played with a bow",
    "make an extra effort",
    "Zürich, naïve café: 3.5 % — déjà vu!",
    "the feeling of being bored by something tedious",
    "a small domesticated carnivorous mammal with soft fur, a short snout, and retractile claws",
]


def minilm(folder):
    """Ids, last hidden states and mean embeddings of a few sentences, by the real weights."""
    reference = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    reference.enable_padding()
    encoded = reference.encode_batch(SENTENCES)
    ids = torch.tensor([each.ids for each in encoded])
    mask = torch.tensor([each.attention_mask for each in encoded])
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    write(
        "minilm_expected",
        dict(
            input_ids=ids,
            attention_mask=mask,
            embedding=(hidden * weights).sum(1) / weights.sum(1),
        ),
    )
    (OUT / "minilm_sentences.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=Path, help="folder with model.safetensors and vocab.txt")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    networks()
    tokenizer()
    if arguments.minilm:
        minilm(arguments.minilm)


if __name__ == "__main__":
    main()
