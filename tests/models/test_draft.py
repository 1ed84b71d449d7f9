import numpy as np

from cantata.core.samples import ImagePatches
from cantata.core.types import IMAGE, TEXT
from cantata.models.draft import Draft


def test_pieces_become_one_sample_in_their_order() -> None:
    image = ImagePatches(np.zeros((4, 12), np.uint8), np.arange(4), 2)
    draft = Draft()
    draft.add([5, 6], weight=0.5)
    draft.add([9, 9], weight=0.0, modality=IMAGE)
    draft.images.append(image)
    draft.add([], weight=1.0)
    draft.add([7], weight=1.0)
    sample = draft.sample("s:3")
    assert (sample.key, len(sample), sample.images) == ("s:3", 5, (image,))
    assert sample.input_ids_T.tolist() == [5, 6, 9, 9, 7]
    assert sample.weight_T.tolist() == [0.5, 0.5, 0.0, 0.0, 1.0]
    assert sample.modality_ids_T.tolist() == [TEXT, TEXT, IMAGE, IMAGE, TEXT]
    assert [sample.input_ids_T.dtype, sample.weight_T.dtype, sample.modality_ids_T.dtype] == [
        np.int32,
        np.float32,
        np.int8,
    ]


def test_an_empty_one_is_empty() -> None:
    sample = Draft().sample("s:0")
    assert (len(sample), sample.weight_T.shape, sample.images) == (0, (0,), ())
