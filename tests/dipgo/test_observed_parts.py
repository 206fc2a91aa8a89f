"""The parts of observation by themselves: layouts, the roles of arguments, and how passes become one output."""

import itertools

import numpy as np
import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from transformers import BertConfig, BertModel

from dipgo.base.errors import UsageError
from dipgo.base.guidance import GuidanceScale, rescale_of
from dipgo.base.layout import find_layout
from dipgo.model.checks import class_named
from dipgo.model.observed.guide import Guide, fit_guide
from dipgo.model.observed.roles import Views, roles_of
from dipgo.model.observed.stand_ins import text_stand_in
from dipgo.model.observed.template import Condition, Constant, Joined, Latent, Moment


@pytest.mark.parametrize("seed", range(40))
def test_a_layout_is_found_from_where_numbers_go(seed):
    """Cut axes at random, reorder the parts and join neighbours: the way is found, and leads back."""
    generator = np.random.default_rng(seed)
    parts = generator.integers(1, 5, generator.integers(1, 6)).tolist()

    def joined(lengths):
        cuts = sorted(generator.choice(len(lengths) + 1, generator.integers(0, 3)).tolist())
        groups = [lengths[a:b] for a, b in itertools.pairwise([0, *cuts, len(lengths)])]
        return tuple(int(np.prod(group)) for group in groups)

    before, order = joined(parts), generator.permutation(len(parts))
    size = int(np.prod(parts))
    after = joined([parts[part] for part in order])
    places = np.arange(size).reshape(parts).transpose(order).reshape(after)
    layout = find_layout(places, before)
    assert layout is not None
    assert layout.fits
    values = generator.normal(size=(2, *before))
    moved = values.reshape(2, *parts).transpose(0, *(1 + order)).reshape(2, *after)
    assert np.array_equal(layout(values), moved)
    assert np.array_equal(layout(torch.from_numpy(values)).numpy(), moved)
    assert np.array_equal(layout.inverse(moved), values)
    assert layout.idle == (before == after and np.array_equal(places.ravel(), np.arange(size)))


@pytest.mark.parametrize("layout", ["batch first", "tokens first"])
def test_a_text_encoder_s_stand_in_has_its_shapes(layout):
    """Kolors' encoder is of diffusers' own, and the one whose states have the tokens along their first axis."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2}
    if layout == "batch first":
        encoder = BertModel(BertConfig(vocab_size=50, num_hidden_layers=2, intermediate_size=8, **sizes))
    else:
        options = {"num_layers": 2, "kv_channels": 4, "ffn_hidden_size": 8, "rmsnorm": True, "original_rope": True}
        encoder = ChatGLMModel(ChatGLMConfig(padded_vocab_size=50, **options, **sizes)).float()
    given = {"input_ids": torch.arange(15).reshape(3, 5), "position_ids": torch.arange(5).expand(3, 5)}
    own = encoder(**given, output_hidden_states=True).hidden_states
    text_stand_in(encoder)
    made = encoder(**given, output_hidden_states=True).hidden_states
    assert [each.shape for each in made] == [each.shape for each in own]


@pytest.mark.parametrize("library", ["os", "path", "pathlib", "kolors.text_encoder", "__name__", ""])
def test_classes_come_from_diffusers_and_transformers_alone(library):
    assert class_named(library, "ChatGLMModel", "KolorsPipeline") is None
    assert class_named(library, "Path", "KolorsPipeline") is None


@pytest.mark.parametrize("seed", range(10))
def test_numbers_that_no_layout_moves(seed):
    places = np.random.default_rng(seed).permutation(24)
    assert find_layout(places.reshape(4, 6), (24,)) is None
    assert find_layout(np.arange(12).reshape(3, 4), (13,)) is None
    assert find_layout(np.zeros((3, 4), int), (12,)) is None


KINDS = ("none", "linear", "norm")


@pytest.mark.parametrize(("kind", "sign", "offset"), [*itertools.product(KINDS, (1, -1), (0.0, 1.0))])
@pytest.mark.parametrize(("batched", "conditional"), [*itertools.product((False, True), (0, 1))])
@pytest.mark.parametrize("scale", [1.5, 4.0, GuidanceScale(5.0, 0.7)])
def test_a_guide_is_fitted(kind, sign, offset, batched, conditional, scale):
    """What is fitted makes the same of other outputs, too."""
    guide = Guide(kind, sign, offset, batched, conditional)
    if kind == "norm" and isinstance(scale, GuidanceScale):
        pytest.skip("no pipeline has both")

    def outputs(seed):
        generator = torch.Generator().manual_seed(seed)
        calls = [torch.randn(1, 6, 8, generator=generator) for _ in range(1 if kind == "none" else 2)]
        if kind == "none":
            return calls, sign * calls[0]
        unconditional, conditional_ = sign * calls[1 - conditional], sign * calls[conditional]
        made = guide.combine(unconditional, conditional_, scale, rescale_of(scale))
        return [torch.cat(calls)] if batched else calls, made

    fitted = fit_guide(*outputs(0), scale)
    calls, made = outputs(1)
    if kind == "none":
        assert (fitted.kind, fitted.sign) == ("none", sign)
        return
    passes = calls[0].chunk(2) if fitted.batched else calls
    assert fitted.batched == batched
    signed = [fitted.sign * each for each in passes]
    combined = fitted.combine(signed[1 - fitted.conditional], signed[fitted.conditional], scale, rescale_of(scale))
    torch.testing.assert_close(combined, made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [3.0, 0.25])
def test_a_third_pass_under_other_attention_is_fitted(share):
    guide = Guide("perturbed", batched=True, conditional=1, perturbed=share)
    unconditional, conditional, perturbed = torch.randn(3, 1, 4, 8).unbind()
    given = guide.combine(unconditional, conditional, 5.0, 0.0, perturbed)
    assert fit_guide([torch.cat([unconditional, conditional, perturbed])], given, 5.0) == guide
    assert (guide.passes, guide.rows) == (3, 2)


def test_guidance_of_other_kinds_is_refused():
    calls = [torch.randn(1, 4, 8) for _ in range(3)]
    with pytest.raises(UsageError, match="makes 3 passes of guidance per step, and one or two are supported"):
        fit_guide(calls, calls[0], 4.0)
    with pytest.raises(UsageError, match="combines its three passes of guidance in a way of its own"):
        fit_guide([torch.cat(calls)], calls[0], 4.0)
    with pytest.raises(UsageError, match="combines its passes of guidance in a way of its own"):
        fit_guide(calls[:2], calls[0] ** 2, 4.0)


NAMES = ["latent", "timestep", "text", "ids", "mask", "flag"]


def call(step=0, prompt=0, seed=0, rows=1):
    """One call's arguments: what they are depends on the arguments of this function alone."""
    latent = torch.sin(torch.arange(12.0) * (1 + seed) + step).view(1, 3, 4)
    return [
        latent.repeat(rows, 1, 1),
        torch.full((rows,), 900.0 - step),
        torch.full((rows, 5, 2), float(prompt)),
        torch.arange(4.0),
        torch.ones(rows, 5, dtype=torch.bool),
        True,
    ]


def views(**changes):
    steps = [call(step) for step in range(3)]
    seen = {
        "names": NAMES,
        "steps": steps,
        "passes": steps[:1],
        "prompt": call(prompt=1),
        "seed": call(seed=1),
        "scale": call(),
        "both": call(rows=2),
        "latents": [step[0] for step in steps],
    }
    return Views(**(seen | changes))


def test_roles_follow_from_what_changes():
    latent, moment, text, ids, mask, flag = roles_of(views(), 1)
    assert isinstance(latent, Latent)
    assert isinstance(moment, Moment)
    assert text == Condition("text")
    assert isinstance(ids, Constant)
    assert not ids.by_row
    assert isinstance(mask, Constant)
    assert mask.by_row
    assert flag == Constant(True)


@pytest.mark.parametrize(("axis", "first"), [(1, True), (2, True), (2, False)])
def test_what_lies_beside_the_latent_is_a_condition(axis, first):
    """The latents of a picture, in channels or tokens; zeros beside text are no latent."""
    beside = torch.sin(torch.arange(24.0)).view((1, 6, 4) if axis == 1 else (1, 3, 8))

    def join(latent):
        return torch.cat([latent, beside] if first else [beside, latent], dim=axis)

    steps = [changed(call(step), 0, join(call(step)[0])) for step in range(3)]
    seen = views(steps=steps, passes=steps[:1], latents=[call(step)[0] for step in range(3)])
    role = roles_of(seen, 1)[0]
    assert isinstance(role, Joined)
    assert all(torch.equal(*pair) for pair in zip(role.split(steps[1][0]), (call(1)[0], beside), strict=True))
    assert torch.equal(role.join(call(1)[0], beside), steps[1][0])
    padded = torch.cat([beside, torch.zeros(1, 3, beside.shape[2])], dim=1)[:, :, :4]
    steps = [changed(call(step), 2, padded) for step in range(3)]
    others = {name: changed(call(seed=name == "seed"), 2, padded) for name in ("seed", "scale", "prompt")}
    assert isinstance(roles_of(views(steps=steps, passes=steps[:1], **others), 1)[2], Constant)


def test_of_one_image_alone_rows_are_told_from_the_first():
    assert roles_of(views(both=None), 1)[2] == Condition("text")


def changed(arguments, place, value):
    return [value if index == place else each for index, each in enumerate(arguments)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": changed(call(), 2, torch.ones(1, 7, 2))}, "it passes 'text', which is as long as the prompt"),
        ({"prompt": changed(call(), 5, False)}, "it passes 'flag', which changes and is no tensor"),
        ({"seed": changed(call(), 2, torch.ones(1, 5, 2))}, "it passes 'text', which is drawn"),
        ({"prompt": changed(call(), 3, torch.zeros(4))}, "it passes 'ids' without a row for each image"),
        ({"scale": changed(call(), 3, torch.zeros(4))}, "it passes 'ids' without a row for each image"),
        (
            {"steps": [call(0), changed(call(1), 2, torch.rand(1, 5, 2)), call(2)]},
            "it passes 'text', which changes from step to step",
        ),
    ],
)
def test_arguments_that_have_no_role(changes, reason):
    with pytest.raises(UsageError, match=reason):
        roles_of(views(**changes), 1)
