"""Options of a search: presets, methods, and one line for each that makes no sense."""

import re

import pytest

from dipgo.base.config import checked
from dipgo.searching.config import PRESETS, SearchConfig
from tests.checks import misused, python


def of(**options):
    return checked(SearchConfig, {"steps": 20, "budget": 0.5} | options)


def test_what_is_given_goes_before_preset_and_method():
    quick = of(preset="quick", alpha="0.5", gamma="false", loss="ssim+l1", batch=3, step_weights="0,1")
    assert (quick.alpha, quick.gamma, quick.loss, quick.batch) == (0.5, False, "ssim+l1", 3)
    assert quick.step_weights == (0.0, 1.0)
    assert quick.backup_iterations == PRESETS["quick"]["backup_iterations"]
    paper = of(method="paper", gate_rate="10")
    assert (paper.width, paper.optimiser, paper.gate_rate, paper.batch, paper.tau) == (512, "sgd", 10, 1, 0.2)
    assert (paper.loss, of(method="paper", loss="l1").loss, of().loss) == ("ssim", "l1", "psnr")
    assert of(budget="0.5,0.35").budget == of(budget=[0.5, 0.35]).budget == (0.5, 0.35)
    assert of(classes=[1, 2]).classes == "1,2"


def test_a_change_is_checked_and_leaves_the_rest():
    config = of(preset="quick", pool=7).changed(budget="0.25", drops=3)
    assert (config.pool, config.budget, config.drops, config.held_out) == (7, (0.25,), 3, PRESETS["quick"]["held_out"])
    with misused("drops = -1"):
        config.changed(drops=-1)


def test_circumstances_decide_nothing():
    """A resumed run may have others; every other setting is in what it is compared by."""
    first, second = of(), of(threads=2, checkpoint_seconds=1, run_folder="run", resume=True, device="cuda")
    assert first.deciding() == second.deciding()
    assert first.deciding().keys() == SearchConfig.SETTINGS - SearchConfig.CIRCUMSTANCES
    assert of(alpha=2).deciding() != first.deciding()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alfa": 1}, "unknown option 'alfa'; did you mean 'alpha'?"),
        ({"alpha": "much"}, "alpha = 'much': should be a valid number"),
        ({"tau": "inf"}, "tau = 'inf': should be a finite number"),
        ({"batch": 1.5}, "batch = 1.5: should be a valid integer"),
        ({"batch": 0}, "batch = 0: should be greater than or equal to 1"),
        ({"gamma": "maybe"}, "gamma = 'maybe': should be a valid boolean"),
        ({"step_weights": "1,x"}, "step_weights = 'x': should be a valid number"),
        ({"step_weights": "0,0"}, "give one number >= 0 a call, not all of them 0"),
        ({"precision": "fp8"}, "precision = 'fp8': should be 'fp32', 'fp16' or 'bf16'"),
        ({"loss": "mse"}, "loss term 'mse'"),
        ({"heads": 3}, "heads must divide the width"),
        ({"attention": "all"}, "attention = 'all': should be 'step', 'site' or 'both'"),
        ({"optimiser": "lion"}, "optimiser = 'lion': should be 'adam' or 'sgd'"),
        ({"method": "q"}, "method = 'q': should be 'dipgo' or 'paper'"),
        ({"steps": 1}, "steps = 1: should be greater than or equal to 2"),
        ({"guidance": "nan"}, "guidance = 'nan': give a finite number, or a range"),
        ({"resume": True}, "--resume and --tensorboard need --run-folder"),
        ({"budget": 1.5}, "budget 1.5 is outside (0, 1]"),
        ({"budget": "0.5;0.3"}, "should be a valid number"),
        ({"budget": ""}, "give a number, or several joined by commas"),
        ({"budget": "0.5,0.5"}, "names one twice"),
        ({"budget": "0.3333333,0.33333329"}, "names one twice in its first six digits"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with misused(re.escape(message)):
        of(**options)


def test_configs_need_no_torch():
    code = "import sys, benchmarks.bench.config, dipgo.searching.config, export.config; print('torch' in sys.modules)"
    assert python(code).stdout == "False\n"
