"""Other forms of denoisers' calls: where a class's own serves one prompt's length alone, or cannot be traced.

A form reads the arguments that a pipeline passes into those that it takes itself, with a row for each image and text
of one length; its ``forward`` computes on them what the class does on its own. So one graph serves every prompt.
(No ``len`` of a tensor in a forward: torch.export takes it for a constant.)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dipgo.model.observed.forms.form import Arguments, Form, bound, padded
from dipgo.model.observed.forms.images import chroma, hidream, read_fibo, read_hidream, read_qwen
from dipgo.model.observed.forms.sequences import lumina, read_z_image, z_image
from dipgo.model.observed.forms.video import latte, mochi, motion, read_latte, read_motion

__all__ = ["FORMS", "Arguments", "Form", "bound", "form_of", "padded"]

_OWN = Form()
FORMS: Mapping[str, Form] = {
    "BriaFiboTransformer2DModel": Form(read=read_fibo),
    "ChromaTransformer2DModel": Form(forward=chroma),
    "HiDreamImageTransformer2DModel": Form(read_hidream, hidream),
    "LatteTransformer3DModel": Form(read_latte, latte),
    "Lumina2Transformer2DModel": Form(forward=lumina),
    "MochiTransformer3DModel": Form(forward=mochi),
    "QwenImageTransformer2DModel": Form(read=read_qwen),
    "UNetMotionModel": Form(read_motion, motion),
    "ZImageTransformer2DModel": Form(read_z_image, z_image, listed=True),
}


def form_of(denoiser: nn.Module) -> Form:
    """Return the form of a denoiser; most classes' own will do."""
    return FORMS.get(type(denoiser).__name__, _OWN)
