"""A TFDS data set of a few preference pairs, as a user's own module may define one: for tests of `tfds:`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds


def rows(split: str, number: int) -> list[dict]:
    return [
        {
            "prompt": f"{split}: how much is {i} and {i}, naïvely?",
            "chosen": f"{2 * i} ☕",
            "rejected": f"{2 * i + 1}",
            "topic": "sums",
            "chosen_reward": np.float32(i),
            "flipped": np.bool_(i % 2),
        }
        for i in range(number)
    ]


class FewPairs(tfds.core.GeneratorBasedBuilder):
    """Texts, and columns that are none."""

    name = "few_pairs"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own spelling)
        tfds.core.BuilderConfig(name="small", description="Few pairs.")
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                **dict.fromkeys(("prompt", "chosen", "rejected", "topic"), tfds.features.Text()),
                "chosen_reward": tfds.features.Scalar(np.float32),
                "flipped": tfds.features.Scalar(np.bool_),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: enumerate(rows(split, number)) for split, number in (("train", 9), ("test", 3))}

    def _generate_examples(self) -> Iterator:
        raise NotImplementedError  # the splits are iterators already
