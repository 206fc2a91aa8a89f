"""Forms of denoisers compute what the classes' own calls do, for texts of every length."""

import pytest
import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    ChromaTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)

from dipgo.base.errors import UsageError
from dipgo.graph.complex_numbers import in_real_numbers
from dipgo.model.observed.forms import form_of, padded

TOKENS = 64
WIDTH = 16


def qwen():
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    model = QwenImageTransformer2DModel(in_channels=8, out_channels=2, num_layers=2, joint_attention_dim=WIDTH, **heads)

    def call(lengths):
        assert len(set(lengths)) == 1  # its pipeline pads to the longest itself
        return {
            "hidden_states": torch.randn(len(lengths), 12, 8),
            "encoder_hidden_states": torch.randn(len(lengths), lengths[0], WIDTH),
            "timestep": torch.full((len(lengths),), 0.7),
            "img_shapes": [[(1, 3, 4)]] * len(lengths),
            "return_dict": False,
        }

    return model, call


def chroma():
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = ChromaTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, **heads, **approximator
    )

    def call(lengths):
        return {
            "hidden_states": torch.randn(len(lengths), 6, 8),
            "encoder_hidden_states": torch.randn(len(lengths), 5, WIDTH),
            "timestep": torch.full((len(lengths),), 0.7),
            "img_ids": torch.randn(6, 3).round(),
            "txt_ids": torch.zeros(5, 3),
            "attention_mask": torch.arange(11)[None] >= 5 - torch.tensor(lengths)[:, None].clamp(max=5),
            "return_dict": False,
        }

    return model, call


def lumina():
    size = {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1}
    heads = {"num_attention_heads": 3, "num_kv_heads": 1, "axes_dim_rope": (4, 2, 2), "axes_lens": (TOKENS + 8, 16, 16)}
    model = Lumina2Transformer2DModel(cap_feat_dim=WIDTH, **size, **heads)

    def call(lengths):
        return {
            "hidden_states": torch.randn(len(lengths), 4, 6, 8),
            "encoder_hidden_states": torch.randn(len(lengths), TOKENS, WIDTH),
            "encoder_attention_mask": (torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]).long(),
            "timestep": torch.full((len(lengths),), 0.7),
            "return_dict": False,
        }

    return model, call


def z_image():
    size = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    model = ZImageTransformer2DModel(
        cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[TOKENS + 40, 16, 16], rope_theta=256.0, **size
    )

    def call(lengths):
        return {
            "x": [torch.randn(4, 1, 6, 8) for _ in lengths],
            "t": torch.full((len(lengths),), 0.7),
            "cap_feats": [torch.randn(length, WIDTH) for length in lengths],
            "return_dict": False,
        }

    return model, call


def fibo():
    size = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "text_encoder_dim": 8}
    model = BriaFiboTransformer2DModel(pooled_projection_dim=None, **size, **heads)

    def call(lengths):
        longest, rows = max(lengths), len(lengths)
        mask = torch.arange(longest + 6)[None] >= 0
        mask = mask & ~(
            (torch.arange(longest + 6)[None] >= torch.tensor(lengths)[:, None]) & (torch.arange(longest + 6) < longest)
        )
        return {
            "hidden_states": torch.randn(rows, 6, 8),
            "encoder_hidden_states": torch.randn(rows, longest, WIDTH),
            "text_encoder_layers": [torch.randn(rows, longest, 8) for _ in range(2)],
            "timestep": torch.full((rows,), 0.7),
            "img_ids": torch.randn(6, 3).round(),
            "txt_ids": torch.zeros(longest, 3),
            "joint_attention_kwargs": {} if mask.all() else {"attention_mask": mask[:, None, None]},
            "return_dict": False,
        }

    return model, call


KINDS = {"qwen": qwen, "chroma": chroma, "lumina": lumina, "z_image": z_image, "fibo": fibo}


def made(kind):
    torch.manual_seed(0)
    model, call = KINDS[kind]()
    for parameter in model.parameters():  # gates and last layers begin as zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False), call


@pytest.mark.parametrize("lengths", [[3, 3], [40, 40], [7, 33]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_form_computes_what_the_class_does(kind, lengths):
    model, call = made(kind)
    form = form_of(model)
    if kind == "qwen":
        lengths = [lengths[1], lengths[1]]
    arguments = call(lengths)
    expected = form.first(model(**arguments))
    read = form.read(arguments, TOKENS)
    torch.testing.assert_close(form.forward(model, **read)[0], expected, rtol=1e-4, atol=1e-5)
    again = form.read(read, TOKENS)
    for name, value in read.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(again[name], value), name
    shapes = [value.shape[1] for name, value in read.items() if name in ("encoder_hidden_states", "cap_feats")]
    assert kind == "chroma" or shapes == [TOKENS]


@pytest.mark.parametrize("kind", ["qwen", "chroma", "lumina", "z_image"])
def test_a_form_is_one_graph_of_real_numbers(kind):
    """Traced on three rows it serves five, of other lengths; no complex number is left of rotary embeddings."""
    model, call = made(kind)
    form = form_of(model)
    example = form.read(call([33, 33, 33]), TOKENS)
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    by_row = {
        name for name, value in tensors.items() if value.ndim and value.shape[0] == 3 and not name.endswith("ids")
    }

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, given):
            return form.forward(self.model, **(example | given))[0]

    rows = {name: {0: torch.export.Dim.DYNAMIC} if name in by_row else None for name in tensors}
    program = torch.export.export(Called(), (tensors,), dynamic_shapes=(rows,), strict=False)
    values = [node.meta.get("val") for node in in_real_numbers(program).graph.nodes]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    others = form.read(call([7] * 5), TOKENS)
    given = {name: others[name] for name in tensors}
    torch.testing.assert_close(program.module()(given), Called()(given), rtol=1e-5, atol=1e-6)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(UsageError, match="a prompt of 9 tokens; at most 8"):
        padded(torch.zeros(1, 9, 4), None, 8)
