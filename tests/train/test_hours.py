"""How long a run takes, by hand."""

import pytest

from cantata.tools.plan import read_stage
from cantata.train.hours import hours


def test_time_follows_from_the_stated_share_of_the_peak() -> None:
    chosen = read_stage(
        "pretrain", ["cluster.gpus=4", "cluster.gpu=h100", "cluster.mfu=0.5", "train.max_steps=90"], None
    )
    # 4 x 989 TFLOP/s, half of them used.
    found = hours(chosen, flops_per_step=4 * 989e12 * 20, tokens_per_step=8000)
    assert found is not None
    assert found.step_seconds == pytest.approx(40)
    assert found.hours == pytest.approx(1)
    assert found.gpu_hours == pytest.approx(4)
    assert found.tokens_per_second_per_gpu == pytest.approx(50)


@pytest.mark.parametrize("gpu", ["null", "cpu"])
def test_nothing_is_said_of_what_has_no_peak(gpu: str) -> None:
    assert hours(read_stage("pretrain", [f"cluster.gpu={gpu}"], None), 1e15, 1) is None
