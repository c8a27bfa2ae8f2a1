"""Small training data shared by the tests that train."""

import numpy as np
import pytest

from protomem.data.images import encode_jpeg
from protomem.data.recordio import RecordWriter


def coloured_images(identities: int, images: int, size: int = 32, seed: int = 0):
    """(JPEG, label) of pictures whose coarse colours belong to the identity and whose noise does not."""
    rng = np.random.default_rng(seed)
    for label in range(identities):
        coarse = rng.integers(30, 226, (4, 4, 3))
        for _ in range(images):
            noise = rng.normal(0, 18, (size, size, 3)) + rng.normal(0, 10)
            picture = coarse.repeat(size // 4, 0).repeat(size // 4, 1) + noise
            yield encode_jpeg(picture.clip(0, 255).astype(np.uint8)), label


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    """A RecordIO set of 31 identities x 8 images of 32x32 pixels (248 images)."""
    folder = tmp_path_factory.mktemp("small_set")
    with RecordWriter(folder) as writer:
        for jpeg, label in coloured_images(31, 8):
            writer.add(jpeg, label)
    return folder
