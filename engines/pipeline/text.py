"""Prompts to the denoiser's conditions, without torch or transformers: tokenizers, then the text graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from dipgo.base.errors import DipgoError, DipgoWarning, UsageError, one_line
from dipgo.base.inputs import read_text
from export.records.conditioning import TextRecord, TokenizerRecord

LARGEST_TOKENIZER = 64 * 2**20  # bytes


class Each(tuple[str, ...]):
    """A prompt for each tokenizer."""


Text = str | Each
"""A prompt for all tokenizers, or one for each."""

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class TextEncoder:
    """The text encoders of a bundle.

    ``run(graph file, inputs) -> outputs by name`` runs a graph of the bundle in ``folder``.

    Raises:
        DipgoError: a tokenizer file that is missing or damaged.
    """

    def __init__(self, record: TextRecord, folder: Path, run: Run) -> None:
        self.record = record
        self._run = run
        self._rows = int(record.inputs[0].shape[0])
        self._tokenizers = [_load(folder / tokenizer.file, tokenizer) for tokenizer in record.tokenizers]
        self._negative = TextEncoder(record.negative, folder, run) if record.negative else None

    @property
    def skips(self) -> int:
        """How many of the encoders' last layers ``clip_skip`` may leave out."""
        return sum("." in output.name for output in self.record.outputs)

    def __call__(
        self, prompts: Sequence[Text], negative: Text | None, guided: bool, clip_skip: int = 0
    ) -> dict[str, np.ndarray]:
        """Return the conditions of one or more prompts, a row each, with the dtypes of the graph's outputs.

        When ``guided`` those of the unconditional pass come first, 2 B rows in all. They encode ``negative``; None
        means the pipeline's own way: the empty prompt's encoding, or zeros. ``negative`` is not read otherwise.
        ``clip_skip``, up to :attr:`skips`, leaves out the last layers of the encoders, for the prompts alone.

        A prompt that is cut is said by a :class:`~dipgo.base.errors.DipgoWarning`.
        """
        zeros = negative is None and self.record.unconditional == "zeros"
        texts = [] if zeros or not guided else [negative or ""] * len(prompts)
        if self._negative and texts:
            both = self._negative._encode(texts), self._encode(prompts)
            outputs = {name: np.concatenate([one[name] for one in both]) for name in both[1]}
        else:
            outputs = self._encode([*texts, *prompts])
        conditions = {name: value for name, value in outputs.items() if "." not in name}
        if clip_skip:
            name, _, _ = next(name for name in outputs if "." in name).partition(".")
            skipped = outputs[f"{name}.{clip_skip}"]
            conditions[name] = np.concatenate([conditions[name][: len(texts)], skipped[len(texts) :]])
        if guided and zeros:
            conditions = {name: np.concatenate([np.zeros_like(value), value]) for name, value in conditions.items()}
        rows = (2 if guided else 1) * len(prompts)
        dtype = next(iter(conditions.values())).dtype
        for name, row in self.record.fixed.items():
            conditions[name] = np.tile(np.asarray(row, dtype), (rows, 1))
        return conditions

    def tokens(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        """Return the graph's inputs ``[len(texts), length]`` int64: ids and, where the encoder takes one, the mask.

        Raises:
            UsageError: half a character of UTF-16, which bytes on the command line become that are no UTF-8.
        """
        inputs = {}
        for number, (record, tokenizer) in enumerate(zip(self.record.tokenizers, self._tokenizers, strict=True)):
            own = [text if isinstance(text, str) else text[number] for text in texts]
            for text in own:
                _check_text(text)
            if self.record.lower:
                own = [text.lower().strip() for text in own]
            own = [f"{record.before}{text}{record.after}" for text in own]
            if record.expands:
                own = [_expanded(text, tokenizer, record.expands) for text in own]
            encodings = tokenizer.encode_batch(own)
            inputs[record.ids] = np.array([encoding.ids for encoding in encodings], np.int64)
            if record.mask is not None:
                inputs[record.mask] = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            for text, encoding in dict(zip(own, encodings, strict=True)).items():
                _say_what_is_cut(text, encoding, record.length)
        return inputs

    def _encode(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        """Encode each different text once, as many at a time as the graph has rows; the last call is filled up."""
        different = list(dict.fromkeys(texts))
        calls = []
        for start in range(0, len(different), self._rows):
            batch = different[start : start + self._rows]
            inputs = self.tokens([*batch, *[batch[-1]] * (self._rows - len(batch))])
            outputs = self._run(self.record.file, inputs)
            calls.append({record.name: outputs[record.name][: len(batch)] for record in self.record.outputs})
        rows = [different.index(text) for text in texts]
        return {
            record.name: np.concatenate([call[record.name] for call in calls])[rows] for record in self.record.outputs
        }


def _expanded(text: str, tokenizer: Tokenizer, expands: Mapping[str, str]) -> str:
    """Return a prompt with every vector of its textual inversions, where only the first is written."""
    encoding = tokenizer.encode(text)
    tokens = {token for part in (encoding, *encoding.overflowing) for token in part.tokens}
    for token in tokens & expands.keys():
        text = text.replace(token, expands[token])
    return text


def _say_what_is_cut(text: str, encoding: Encoding, length: int) -> None:
    """Warn of the end of a prompt that is longer than ``length`` tokens."""
    if not encoding.overflowing:
        return
    special = encoding.special_tokens_mask
    end = max((stop for (_, stop), mark in zip(encoding.offsets, special, strict=True) if not mark), default=0)
    rest = " ".join(text[end:].split())
    rest = rest if len(rest) <= 80 else f"{rest[:80]}…"
    warnings.warn(f"the prompt is cut at {length} tokens; not read: '{rest}'", DipgoWarning, stacklevel=2)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{text[error.start]!a} at character {error.start}"
        raise UsageError(f"the prompt is not valid Unicode ({what}); give it in UTF-8") from error


def _load(path: Path, record: TokenizerRecord) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(read_text(path, "tokenizer", LARGEST_TOKENIZER))
        tokenizer.enable_truncation(record.length)
        tokenizer.enable_padding(
            direction=record.side, length=record.length, pad_id=record.pad_id, pad_token=record.pad_token
        )
    except Exception as error:  # the library raises plain Exceptions
        raise DipgoError(f"{path}: not a readable tokenizer ({one_line(error)}); export the bundle again") from error
    return tokenizer
