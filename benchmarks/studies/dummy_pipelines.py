"""Make the pipelines of diffusers' own tests, one folder each, for benchmarks.studies.dummies.

    python -m benchmarks.studies.dummy_pipelines DIFFUSERS FOLDER

DIFFUSERS is a checkout of its sources, with tests. Every class of pipelines that tests have components for becomes
FOLDER/NAME, saved by ``save_pretrained``, and what tests call it with goes to FOLDER/inputs.json. Tokenizers and
encoders that the tests take from the hub are small ones of the same class here.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from string import ascii_letters, digits
from typing import Any
from unittest import TestCase, mock

from tqdm import tqdm

SECONDS = 300  # of a file of tests
LETTERS = [*ascii_letters, *digits, *".,!?<|>_/ \n"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{{ part.text or '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> Any:
    """Return one that knows letters, whose end has the highest number, as CLIP's pooling needs it."""
    from transformers import CLIPTokenizer

    letters = [letter for letter in LETTERS if letter.strip()]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [str(number) for number in range(10, 1008 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    numbers = {word: number for number, word in enumerate(words[-1000:])}
    return CLIPTokenizer(vocab=numbers, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *dict.fromkeys(LETTERS[:-1])]
    return T5Tokenizer(vocab=[(word, -float(number > 2)) for number, word in enumerate(words)], extra_ids=0)


def byte_tokenizer(begins: bool = False) -> Any:
    """Return one of bytes with a chat's template, as those of language models are; some begin every text alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = ["<pad>", "<unk>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = [*own, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(own)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<|endoftext|>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    made.chat_template = CHAT
    return made


def processor(kind: Any) -> Any:
    """Return a processor of texts and pictures around :func:`byte_tokenizer`."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return kind(Qwen2VLImageProcessor(), byte_tokenizer(), Qwen2VLVideoProcessor(), chat_template=CHAT)


def small_config(kind: str) -> Any:
    """Return the configuration of an encoder that tests take from the hub."""
    import transformers

    sizes = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    plain = {"vocab_size": 1103, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    plain |= {"num_attention_heads": 4, **({"hidden_size": 16} if "llama" in kind.lower() else {})}
    named = next((name for name in ("UMT5", "T5", "Bert", "Roberta", "Llama") if name.lower() in kind.lower()), "T5")
    return getattr(transformers, f"{named}Config")(**(sizes if "T5" in named else plain))


def stand_in(kind: Any, name: str) -> Any:
    """Return what stands for ``kind.from_pretrained(name)``.

    Raises:
        LookupError: nothing does.
    """
    import transformers

    own, hub = kind.__name__, name.lower()
    if "Tokenizer" in own:
        if "CLIP" in own or "clip" in hub:
            return clip_tokenizer()
        return t5_tokenizer() if "t5" in own.lower() or "t5" in hub else byte_tokenizer("qwen" not in hub)
    if own == "AutoConfig":
        return small_config(hub)
    if own == "AutoProcessor" or "VLProcessor" in own:
        return processor(transformers.Qwen2_5_VLProcessor if own == "AutoProcessor" else kind)
    if issubclass(kind, transformers.PreTrainedModel):
        return kind(small_config(own))
    raise LookupError(f"{own} of {name}")


def _patched(kinds: Iterator[Any]) -> ExitStack:
    """Return a context in which hub ids give stand-ins, of these classes."""
    stack = ExitStack()
    for kind in kinds:
        original = kind.__dict__["from_pretrained"]

        def load(own: Any, name: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if isinstance(name, str) and "/" in name and not Path(name).exists():
                return stand_in(own, name)
            return _original.__get__(None, own)(name, *args, **kwargs)

        stack.enter_context(mock.patch.object(kind, "from_pretrained", classmethod(load)))
    return stack


def _loaders() -> Iterator[Any]:
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    names = ("AutoTokenizer", "AutoConfig", "AutoProcessor", "ProcessorMixin", "PreTrainedModel")
    yield from (getattr(transformers, name) for name in names)
    yield from (PreTrainedTokenizerBase, _BaseAutoModelClass)


def make(module: str, folder: Path) -> list[dict[str, Any]]:
    """Save the pipelines of a module of tests; returns what became of each."""
    import torch

    try:
        tests = importlib.import_module(module)
    except Exception as error:  # whatever tests of another version may raise
        return [{"name": module.rpartition(".")[2], "said": _line(error)}]
    rows = []
    kinds: list[tuple[str, Any]] = inspect.getmembers(tests, inspect.isclass)
    for _, kind in kinds:
        if kind.__module__ != module or not hasattr(kind, "get_dummy_components"):
            continue
        name = getattr(getattr(kind, "pipeline_class", None), "__name__", "")
        if not name or (folder / name).exists():
            continue
        row: dict[str, Any] = {"name": name, "said": ""}
        try:
            torch.manual_seed(0)
            with _patched(_loaders()):
                test = kind("get_dummy_components") if issubclass(kind, TestCase) else kind()
                pipe = kind.pipeline_class(**test.get_dummy_components())
                asks = inspect.signature(test.get_dummy_inputs).parameters
                given = test.get_dummy_inputs(*["cpu"] * ("device" in asks))
            _fit(pipe)
            pipe.save_pretrained(folder / name)
            kind.pipeline_class.from_pretrained(folder / name)
            if not kind.pipeline_class.__module__.startswith(
                "diffusers."
            ):  # a class of the tests around one of diffusers
                _rename(folder / name, pipe)
            sized = given.get("height", 0) is None or given.get("use_resolution_binning") is False
            sides = dict.fromkeys(("height", "width"), _side(pipe)) if sized else {}
            own = {key: given[key] for key in ("prompt", "height", "width") if given.get(key) is not None}
            row["inputs"] = sides | own
        except Exception as error:  # whatever tests of another version may raise
            row["said"] = _line(error)
            shutil.rmtree(folder / name, ignore_errors=True)
        rows.append(row)
    return rows


def _rename(folder: Path, pipe: Any) -> None:
    """Have a saved pipeline be of the class that its own derives from."""
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = next(
        kind.__name__ for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers.")
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def _side(pipe: Any) -> int:
    """Return the side of the images that a denoiser was made for, in pixels."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    return int(denoiser.config.sample_size * pipe.vae_scale_factor)


def _fit(pipe: Any) -> None:
    """Give text encoders an embedding for each token of the tokenizers that stand in for the hub's."""
    for name, tokenizer in pipe.components.items():
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None) if "tokenizer" in name else None
        with suppress(NotImplementedError):  # classes that are not of transformers
            if encoder is not None and encoder.get_input_embeddings().num_embeddings < len(tokenizer):
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(options.diffusers))
    options.folder.mkdir(parents=True, exist_ok=True)
    files = sorted(options.diffusers.glob("tests/pipelines/*/test_*.py"))
    modules = [".".join(file.relative_to(options.diffusers).with_suffix("").parts) for file in files]
    inputs: dict[str, Any] = {}
    with get_context("fork").Pool(1) as pool:
        for module in tqdm(modules):
            try:
                rows = pool.apply_async(make, (module, options.folder)).get(SECONDS)
            except TimeoutError:
                rows = [{"name": module.rpartition(".")[2], "said": f"took over {SECONDS} s, or its process ended"}]
            inputs |= {row["name"]: row["inputs"] for row in rows if not row["said"]}
            for row in rows:
                tqdm.write(f"{row['name']}: {row['said'] or 'made'}")
            (options.folder / "inputs.json").write_text(json.dumps(inputs, indent=1) + "\n")


if __name__ == "__main__":
    main()
