import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import dipgo
from benchmarks.studies.evaluate import Evaluation, Settings, evaluate
from benchmarks.studies.prompts import prompts_of
from dipgo.base.errors import DipgoError
from dipgo.base.records import read_record
from engines.pipeline.images import to_image
from tests import zoo
from tests.checks import ROOT, misused, refused
from tests.models import _clip_tokenizer, random_subnet

PROMPTS = ["a red fox", "two dogs", "a harbour", "oranges", "rain"]


@pytest.fixture(scope="module")
def sd():
    traced, sampler = zoo.trace("sd"), zoo.sampler("sd", 3, None)
    return zoo.bundle(traced, sampler, random_subnet(traced, sampler, seed=1))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]


def test_an_image_a_prompt_each_with_its_own_seed(sd, prompts, tmp_path):
    record = evaluate(sd, prompts, tmp_path / "out", Settings(number=4, seed=7, threads=1))
    assert (record.images, record.clip_score, record.fid) == (4, None, None)
    assert [line.split(":")[0] for line in record.skipped] == ["CLIP score", "FID"]
    assert read_record(tmp_path / "out" / "evaluation.json", Evaluation, "dipgo.evaluation/1", "it", "") == record
    found = pixels(tmp_path / "out")
    assert len(found) == 4
    with dipgo.load(sd, 1) as program:
        for index in (0, 3):
            alone = program.generate([PROMPTS[index]], 7 + index)[0]
            assert np.array_equal(found[index], np.asarray(to_image(alone)))


def test_a_run_that_was_cut_off_goes_on_and_is_not_mixed_with_another(sd, prompts, tmp_path):
    cut, settings = tmp_path / "cut", Settings(threads=1)
    evaluate(sd, prompts, cut, settings)
    whole, kept = pixels(cut), cut / "images" / "000001.png"
    before = kept.stat().st_mtime_ns
    (cut / "images" / "000003.png").unlink()
    (cut / "evaluation.json").unlink()
    evaluate(sd, prompts, cut, settings)
    assert kept.stat().st_mtime_ns == before
    assert all(np.array_equal(*pair) for pair in zip(pixels(cut), whole, strict=True))
    with misused("another bundle, prompts, number or seed"):
        evaluate(sd, prompts, cut, Settings(seed=1, threads=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep").touch()
    with misused("exists and is no evaluation"):
        evaluate(sd, prompts, tmp_path / "mine", settings)


def test_classes_are_refused(bundle, prompts, tmp_path):
    with misused("conditioned by class, not by prompts"):
        evaluate(bundle, prompts, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_the_work(sd, prompts, tmp_path):
    """The real launcher; the images are those of one process."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "benchmarks.studies.evaluate", str(sd), "--prompts", str(prompts)]
    command += ["-o", str(tmp_path / "two"), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    assert "left out: CLIP score" in done.stdout
    assert "5 images" in done.stdout
    evaluate(sd, prompts, tmp_path / "one", Settings(threads=1))
    for own, expected in zip(pixels(tmp_path / "two"), pixels(tmp_path / "one"), strict=True):
        assert np.array_equal(own, expected)


def test_the_clip_score_is_the_models_own(sd, prompts, tmp_path):
    """By a CLIP model with random weights in a local folder, against its own forward."""
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53}
    config = CLIPConfig(text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), _clip_tokenizer())
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")

    record = evaluate(sd, prompts, tmp_path / "out", Settings(number=3, threads=1, clip=tmp_path / "clip"))
    images = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "out" / "images").iterdir())]
    given = processor(text=PROMPTS[:3], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        made = model(**given)
    expected = 100 * torch.nn.functional.cosine_similarity(made.image_embeds, made.text_embeds)
    assert record.clip_score == pytest.approx(float(expected.mean().clamp(min=0)), abs=1e-3)
    with pytest.raises(DipgoError, match="not a CLIP model"):
        evaluate(sd, prompts, tmp_path / "out", Settings(number=3, threads=1, clip=tmp_path))


def test_prompts_as_they_are_published(tmp_path):
    coco = tmp_path / "captions_val2017.json"
    entries = [(9, 5, " A dog\nruns. "), (4, 8, "second"), (4, 2, "A cat."), (9, 6, "later")]
    annotations = [{"image_id": image, "id": number, "caption": text} for image, number, text in entries]
    coco.write_text(json.dumps({"annotations": annotations}))
    assert prompts_of(coco) == ["A cat.", "A dog runs."]
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"a ""b"", c"\tArts\tBasic\tx\n')
    assert prompts_of(parti) == ["bond", 'a "b", c']


def test_other_files_are_refused_in_one_line(tmp_path):
    for name, text, why in (
        ("a.json", "[]", "not COCO captions"),
        ("a.json", '{"annotations": []}', "no prompt in it"),
        ("a.tsv", "Text\tCategory\nbond\tx\n", "no column 'Prompt'"),
        ("a.tsv", "", "no prompt in it"),
        ("a.txt", "\n", "no prompt in it"),
    ):
        (tmp_path / name).write_text(text)
        with refused(why):
            prompts_of(tmp_path / name)
