"""The toy world's preference pairs as a TFDS data set `ctpd_toy`, in ArrayRecord files, without TensorFlow.

load_preferences("tfds:ctpd_jax.toy.builder:ctpd_toy/noise25", data_dir=...)      # one of the named configurations
load_preferences(prepare_toy(data_dir, noise=0.3, pairs=500))                     # any other setting
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from ctpd_jax.errors import UserError
from ctpd_jax.toy.world import NOISE, generate_pairs

DESCRIPTION = "Preference pairs of a small world in which the true reward of every phrase is known."


@dataclass(kw_only=True)
class ToyConfig(tfds.core.BuilderConfig):
    """The settings of a toy data set."""

    pairs: int = 2000
    test_pairs: int = 300
    noise: float = NOISE  # share of swapped labels in "train"; "test" has none
    seed: int = 0


class CtpdToy(tfds.core.GeneratorBasedBuilder):
    """Prompt, chosen and rejected answer, and what nobody knows in the real world: true rewards and swapped labels."""

    name = "ctpd_toy"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own spelling)
        ToyConfig(name=f"noise{percent:02d}", description=f"{percent} % of labels swapped.", noise=percent / 100)
        for percent in (round(100 * NOISE), 0, 10, 20, 30, 40)  # the first is TFDS's default
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "prompt": tfds.features.Text(),
                "chosen": tfds.features.Text(),
                "rejected": tfds.features.Text(),
                "topic": tfds.features.Text(),
                "chosen_reward": tfds.features.Scalar(np.float32),
                "rejected_reward": tfds.features.Scalar(np.float32),
                "flipped": tfds.features.Scalar(np.bool_),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=DESCRIPTION, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        config: ToyConfig = self.builder_config
        return {
            "train": self._generate_examples("train", config.pairs),
            "test": self._generate_examples("test", config.test_pairs),
        }

    def _generate_examples(self, split: str, number: int) -> Iterator[tuple[int, dict]]:
        config: ToyConfig = self.builder_config
        for index, pair in enumerate(generate_pairs(split, number, noise=config.noise, seed=config.seed)):
            yield index, asdict(pair)


def prepare_toy(
    data_dir: str | os.PathLike[str], pairs: int = 2000, test_pairs: int = 300, noise: float = NOISE, seed: int = 0
) -> str:
    """Writes a toy data set, unless it is there, and returns its spec for `load_preferences` (splits "train", "test").

    Args:
      data_dir: TFDS's folder; the data set gets a folder below it whose name says its settings.
      pairs, test_pairs: sizes of the splits.
      noise: share of swapped labels in "train", at least 0 and below 0.5.
      seed: of everything random.

    Raises:
      UserError: no pairs, or a noise outside its range.
    """
    if pairs < 1 or test_pairs < 1:
        raise UserError(f"The toy world needs at least one pair a split, not {pairs} and {test_pairs}.")
    if not 0 <= noise < 0.5:
        raise UserError(f"The toy world's label noise is {noise}; it must be at least 0 and below 0.5.")
    name = f"noise{noise:g}-seed{seed}-{pairs}-{test_pairs}"
    config = ToyConfig(name=name, description=name, pairs=pairs, test_pairs=test_pairs, noise=noise, seed=seed)
    with _quiet():
        builder = CtpdToy(config=config, data_dir=os.fspath(data_dir))
        builder.download_and_prepare(file_format="array_record")
    return f"tfds:{builder.data_dir}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS announces a download of unknown size and a custom configuration; here is neither news nor a download."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)
