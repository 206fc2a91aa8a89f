"""A CLIP tokenizer with a small vocabulary of its own: byte pairs learned from captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
LENGTH = 77  # tokens of a prompt, as CLIP has


def learn_tokenizer(captions: Sequence[str], size: int) -> CLIPTokenizer:
    """Return a tokenizer of at most ``size`` tokens in CLIP's order: bytes, bytes that end a word, merges, two marks.

    Any text can be written with it, since all bytes are in the vocabulary. The same captions give the same vocabulary.
    """
    splitter = CLIPTokenizer().backend_tokenizer  # CLIP's own normaliser and splitter, with no words yet
    learner = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    learner.normalizer, learner.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(letters) - 2,  # the trainer counts only those word ends that it has seen
        min_frequency=2,
        initial_alphabet=letters,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*letters, *(letter + SUFFIX for letter in letters)]
    words = [*dict.fromkeys([*words, *(left + right for left, right in merges)]), BEGIN, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        pad_token=END,
        unk_token=END,
        model_max_length=LENGTH,
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer's folder, with ``vocab.json`` and ``merges.txt``, which older transformers read."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
