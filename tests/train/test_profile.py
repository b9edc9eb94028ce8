"""Updates that are traced."""

import pytest

from ctpd_jax.cli import load_config
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.job.table import profiled
from ctpd_jax.train.profile import traced


@pytest.mark.parametrize(("seen", "files"), [(range(1, 3), 1), (range(3, 9), 1), (range(0), 0), (range(7, 9), 0)])
def test_every_update_is_made_and_those_that_were_asked_for_are_seen(tmp_path, seen, files):
    assert list(traced(range(4), seen, tmp_path)) == [0, 1, 2, 3]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == files


def test_a_stage_that_ends_meanwhile_leaves_what_was_seen(tmp_path):
    updates = traced(range(9), range(9), tmp_path)
    assert next(updates) == 0
    updates.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_the_setting_names_a_stage_and_its_updates():
    config = load_config(None, ["--config.data.train=x.jsonl", "--config.profile=train=5:8"])
    check_config(config)
    assert profiled(config, "train") == range(5, 8) and profiled(config, "positive") == range(0)
    for wrong in ("train", "train=5", "evaluate=1:2", "updates=5:8", "train=a:b", "train=-1:2"):
        config.profile = wrong
        with pytest.raises(UserError, match=r"config\.profile is .*; write STAGE=FIRST:LAST"):
            check_config(config)
