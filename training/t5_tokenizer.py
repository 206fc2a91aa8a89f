"""A T5 tokenizer with a small vocabulary of its own: the words of captions, and letters for all others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from transformers import T5Tokenizer

SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's first three tokens, in its order
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what T5 writes before a word
LETTER = -20.0  # log probability of a letter, so low that whole words win


def learn_t5_tokenizer(captions: Sequence[str], size: int, length: int) -> T5Tokenizer:
    """Return a tokenizer of at most ``size`` tokens, whose texts have at most ``length``.

    It has the most frequent words whole and writes others, of printable ASCII, letter by letter. The same captions
    give the same vocabulary.
    """
    letters = [SPACE, *(chr(code) for code in range(33, 127))]
    counts = Counter(word for text in captions for word in re.findall(r"\w+", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(SPECIAL) - len(letters)]
    total = counts.total()
    vocabulary = [
        *((token, 0.0) for token in SPECIAL),
        *((letter, LETTER) for letter in letters),
        *((f"{SPACE}{word}", math.log(counts[word] / total)) for word in words),
    ]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)
