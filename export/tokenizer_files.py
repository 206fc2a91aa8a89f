"""A pipeline's tokenizers as files of the ``tokenizers`` library, which alone reads them when a bundle runs."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from typing import Any

from tokenizers import Tokenizer

from dipgo.base.errors import DipgoError, one_line
from dipgo.model.families import Prompting
from dipgo.model.models import Model
from export.components import class_of, component_config
from export.records.conditioning import TokenizerRecord

# Enough to tell tokenizers apart that cut, pad or normalise differently.
_PROBES = ("", "a cat", "Ünïcödé  — 猫 😀", "word " * 200)


def tokenizer_of(model: Model, prompting: Prompting, encoder: str, number: int) -> tuple[TokenizerRecord, bytes]:
    """Return the record and the file of an encoder's tokenizer, the pipeline's ``number``-th."""
    name = prompting.tokenizers[prompting.encoders.index(encoder)]
    tokenizer = _load_tokenizer(model, name)
    tokenizer.padding_side = prompting.side or tokenizer.padding_side
    place = prompting.encoders.index(encoder)
    length = prompting.lengths[place] if prompting.lengths else prompting.tokens
    if prompting.own_length and tokenizer.model_max_length != prompting.tokens:
        raise DipgoError(
            f"{model.folder / name}: cuts prompts at {tokenizer.model_max_length} tokens, not at {prompting.tokens}; "
            "not supported"
        )
    suffix = f"_{number + 1}" if number else ""
    mask = f"{'token_mask' if 'attention_mask' in prompting.conditions else 'attention_mask'}{suffix}"
    record = TokenizerRecord(
        file=f"{name}.json",
        ids=f"input_ids{suffix}",
        mask=mask if prompting.masked(component_config(model, encoder)) else None,
        length=length,
        pad_token=tokenizer.pad_token,
        pad_id=tokenizer.pad_token_id,
        expands=_expands(tokenizer) if prompting.own_length else {},
        before=prompting.before[place] if prompting.before else "",
        after=prompting.after[place] if prompting.after else "",
        side=tokenizer.padding_side,
    )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    content = backend.to_str()
    alone = Tokenizer.from_str(content)
    alone.enable_truncation(record.length)
    alone.enable_padding(direction=record.side, length=record.length, pad_id=record.pad_id, pad_token=record.pad_token)
    for probe in (*_PROBES, *(f"a {token} b" for token in tokenizer.added_tokens_encoder)):
        expected = tokenizer(probe, padding="max_length", max_length=record.length, truncation=True).input_ids
        if alone.encode(probe).ids != expected:
            raise DipgoError(f"{model.folder / name}: a tokenizer that does more than its file says; not supported")
    return record, content.encode()


def _expands(tokenizer: Any) -> dict[str, str]:
    """Return the tokens of textual inversions of several vectors, ``<cat>``, and all: ``<cat> <cat>_1 <cat>_2``.

    As diffusers' ``maybe_convert_prompt`` has it.
    """
    added, expands = tokenizer.added_tokens_encoder, {}
    for token in added:
        vectors = [token, *itertools.takewhile(added.__contains__, (f"{token}_{k}" for k in itertools.count(1)))]
        if len(vectors) > 1:
            expands[token] = " ".join(vectors)
    return expands


def _load_tokenizer(model: Model, name: str) -> Any:
    """Load a tokenizer that the ``tokenizers`` library carries.

    Raises:
        DipgoError: no such folder, files missing from it, or a tokenizer in Python alone.
    """
    import transformers

    folder = model.folder / name
    class_name = (class_of(model, name) or ("", "tokenizer"))[1]
    for candidate in (class_name, f"{class_name}Fast"):
        kind = getattr(transformers, candidate, None)
        if kind is None:
            continue
        names = dict(kind.vocab_files_names)  # tokenizer.json, and what older libraries wrote in its place
        whole = names.pop("tokenizer_file", "tokenizer.json")
        if not (folder / whole).is_file() and not all((folder / file).is_file() for file in names.values()):
            raise DipgoError(
                f"{folder}: neither {whole} nor {' and '.join(names.values())} in it; download or save it again"
            )
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged file raises many kinds, some of the tokenizers library
            if not (folder / whole).is_file() and "spiece.model" in names.values() and not find_spec("sentencepiece"):
                raise DipgoError(
                    f"{folder}: only the sentencepiece library reads it; pip install sentencepiece"
                ) from error
            raise DipgoError(f"{folder}: not a tokenizer ({one_line(error)}); download or save it again") from error
        if hasattr(tokenizer, "backend_tokenizer"):
            return tokenizer
    raise DipgoError(f"{folder}: {class_name} is no tokenizer of the tokenizers library; not supported")
