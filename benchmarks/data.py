"""From files to batches: our reading, encoding and packing against transformers' Aria processor with padding.

    python benchmarks/data.py [--quick]

Both read the same photographs and captions at 980 px with the same tokenizer, in one process and in turn,
and end with pixels in fp32 between -1 and 1. Ours keeps pixels as bytes until the model has them; that last
step is counted here. The peer takes eight samples at a time, pads texts to the longest and images to
squares; it resizes with Pillow, the only way it has without torchvision, and we with each that we offer.
images/s is of captioned photographs, samples/s of these among four times as many texts. Packing efficiency
is the share of tokens that are not padding in rows of 8,192 (the published first stages) of photographs,
emoji and texts.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import harness
import pyarrow.parquet as parquet
import torch
from PIL import Image
from transformers import AriaProcessor as TheirProcessor
from transformers import PreTrainedTokenizerFast
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from cantata.core.locate import asset
from cantata.core.samples import Document, Example, Part
from cantata.core.types import Batch
from cantata.data.collate import PackedCollator
from cantata.data.config import OnError, TooLong
from cantata.data.loader import Loader
from cantata.data.media.images import open_image
from cantata.data.packing import Packer
from cantata.data.reading import Reader, Source
from cantata.data.sources import CaptionedImages, Dataset, TextDocuments
from cantata.data.split import Split
from cantata.models.aria.crops import Resampling
from cantata.models.aria.processor import AriaProcessor
from cantata.models.chat_processor import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
TOKENIZER = "embedded:tokenizer.json"
ROW, PEER_BATCH, TEXTS_PER_IMAGE = 8192, 8, 4
PREFIX, IMAGE, SUFFIX, END, PAD = "<fim_prefix>", "<|img|>", "<fim_suffix>", "<|endoftext|>", "<|pad|>"


class Item(NamedTuple):
    """An encoded image, or none, and a text."""

    image: bytes | None
    text: str


class Items:
    """A dataset of items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        image, text = self.items[index]
        pictures: tuple[Part, ...] = () if image is None else (open_image(image),)
        return Document((*pictures, text))


def photographs() -> list[Item]:
    """The photographs beside the checkout and the pairs of the webdataset shard; else emoji."""
    if not SHARED.is_dir():
        print("the photographs are absent; emoji of the package stand in for them")
        rows = parquet.read_table(asset("embedded:twemoji.parquet")).slice(0, 40).to_pylist()
        images = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in rows]
        return [Item(image, row["name"]) for image, row in zip(images, rows, strict=True)]
    files = sorted(path for path in (SHARED / "photos").iterdir() if path.is_file())
    items = [Item(path.read_bytes(), path.stem.replace("_", " ")) for path in files]
    with tarfile.open(SHARED / "webdataset" / "cc12m-0000.tar") as shard:
        members = {member.name: member for member in shard.getmembers()}
        for name in sorted(members):
            if name.endswith(".jpg"):
                image, text = (shard.extractfile(members[n]) for n in (name, name[:-3] + "txt"))
                assert image is not None
                assert text is not None
                items.append(Item(image.read(), text.read().decode()))
    return items


def texts(count: int) -> list[Item]:
    plays = TextDocuments("embedded:tinyshakespeare.txt", 1024, Split.all, 0.0)
    documents = (plays[index] for index in range(count))
    return [Item(None, str(document.parts[0])) for document in documents if isinstance(document, Document)]


def our_processor(image_size: int, resampling: Resampling) -> AriaProcessor:
    return AriaProcessor(
        tokenizer=TOKENIZER,
        image_size=image_size,
        min_image_size=min(336, image_size),
        patch_size=14,
        position_grid=70,
        features_per_image=256,
        split_image=False,
        resampling=resampling,
        image_token=IMAGE,
        image_prefix=PREFIX,
        image_suffix=SUFFIX,
        message_start="<|im_start|>",
        message_end="<|im_end|>",
        document_end=END,
        pad_token=PAD,
        chat_template=None,
    )


def source(dataset: Dataset) -> Source:
    return Source(dataset, 1.0, OnError["raise"], TooLong["raise"])


def our_batches(collator: PackedCollator, items: Sequence[Item]) -> Iterator[Batch]:
    reader = Reader({"s": source(Items(items))}, collator.encode, ROW, "data.sources")
    packer = Packer(
        lambda index: reader.read("s", index),
        stream=0,
        stride=1,
        sequence_length=ROW,
        window=32,
        patience=len(items),
        check=reader.check_skipped,
        end=len(items),
    )
    while row := packer.next_row():
        yield collator.collate([collator.row(row.samples, row.info)], ROW)


def ours(collator: PackedCollator, items: Sequence[Item]) -> None:
    seen = 0
    for batch in our_batches(collator, items):
        batch.images.patches_PC.float().div_(127.5).sub_(1)
        seen += len(batch.samples.lengths)
    assert seen == len(items)


def their_processor() -> TheirProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(TOKENIZER), pad_token=PAD, extra_special_tokens={"image_token": IMAGE}
    )
    return TheirProcessor(AriaImageProcessorPil(), tokenizer)


def theirs(processor: TheirProcessor, items: Sequence[Item]) -> None:
    for start in range(0, len(items), PEER_BATCH):
        batch = items[start : start + PEER_BATCH]
        given: dict[str, Any] = {
            "text": [(f"{PREFIX}{IMAGE}{SUFFIX}" if item.image else "") + item.text + END for item in batch]
        }
        images = [Image.open(io.BytesIO(item.image)).convert("RGB") for item in batch if item.image]
        if images:
            given["images"] = images
        made = processor(**given, padding=True, return_tensors="pt")
        ids = made["input_ids"]
        is_context = (made["attention_mask"] == 0) | (ids == processor.image_token_id)
        ids.masked_fill(is_context, -100)


def packing_efficiency(items: Sequence[Item], rows: int) -> float:
    """Of the training loader, on images as long in tokens as at 980 px and small in pixels, to save time."""
    emoji = CaptionedImages("embedded:twemoji.parquet", "image", "{name} ({subgroup})", Split.all, 0.0)
    plays = TextDocuments("embedded:tinyshakespeare.txt", 1024, Split.all, 0.0)
    loader = Loader(
        {"photographs": source(Items(items)), "emoji": source(emoji), "plays": source(plays)},
        PackedCollator(our_processor(56, Resampling.pillow)),
        seed=0,
        sequence_length=ROW,
        micro_batch_size=1,
        streams=4,
        window=32,
        num_workers=0,
        prefetch=1,
        stall_warning=None,
        rank=0,
        world_size=1,
    )
    batches = islice(iter(loader), rows)
    return sum(sum(batch.samples.lengths) for batch in batches) / (rows * ROW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, one pair")
    quick = parser.parse_args().quick
    print(harness.environment())
    pictures = photographs()[:: 4 if quick else 1]
    pairs, warmup = (1, 1) if quick else (7, 1)
    # Texts stand between the images, as a shuffle leaves hardly a batch without one.
    every = [
        item
        for group in zip(
            pictures, *[iter(texts(TEXTS_PER_IMAGE * len(pictures)))] * TEXTS_PER_IMAGE, strict=False
        )
        for item in group
    ]
    processor = their_processor()
    ratios = {}
    for resampling in Resampling:
        collator = PackedCollator(our_processor(980, resampling))
        for kind, items in (("images", pictures), ("samples", every)):
            name = f"{kind}_per_second_{resampling.value}"
            mine, other, ratios[name] = harness.alternate(
                partial(ours, collator, items), partial(theirs, processor, items), pairs, warmup
            )
            harness.figure(f"{name}_ours", len(items) / mine, "1/s")
            harness.figure(f"{name}_transformers", len(items) / other, "1/s")
    for name, value in ratios.items():
        harness.ratio(name, value)
    harness.figure("packing_efficiency", packing_efficiency(pictures, 20 if quick else 100), "of tokens")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
