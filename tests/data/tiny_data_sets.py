"""TFDS text data sets of a few records: one with a test split, one without."""

import numpy as np
import tensorflow_datasets as tfds


def text_of(split, k):
    return f"{split} record {k}, ünïcode and more. " * (k % 4)


class WithTest(tfds.core.GeneratorBasedBuilder):
    name = "tiny_with_test"
    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "validation", "test")

    def _info(self):
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"book_text": text, "title": text, "pages": np.int64}),
            description="Made up.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for k in range(300 if split == "train" else 20):
            yield k, {"book_text": text_of(split, k), "title": f"title {k}", "pages": k}


class TrainAlone(WithTest):
    name = "tiny_train_alone"
    SPLITS = ("train",)


class Scalars(WithTest):
    """As Hugging Face's data sets come: strings are scalars of dtype object."""

    name = "tiny_scalars"

    def _info(self):
        text = tfds.features.Scalar(np.object_)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": text, "url": text, "pages": np.int64}),
            description="Made up.",
            disable_shuffling=True,
        )

    def _generate_examples(self, split):
        for k in range(30):
            yield k, {"text": text_of(split, k), "url": f"url {k}", "pages": k}


class Given(tfds.core.GeneratorBasedBuilder):
    """Whatever texts benchmarks put here, by configuration."""

    name = "given"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("long", "short")]  # noqa: RUF012
    texts: dict[str, list[str]] = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features, description="Given.", disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k, text in enumerate(self.texts[self.builder_config.name]):
            yield k, {"text": text}
