import base64
import contextlib
import csv
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cantata.core.build import build
from cantata.core.errors import ConfigError
from cantata.core.samples import Chat, DataError, Document, Video
from cantata.data.conversations import Conversations
from cantata.data.formats import Format
from cantata.data.media import PdfOptions, Sampling, VideoOptions
from cantata.data.records import RecordKind
from cantata.data.split import Split

DATA = Path(os.environ.get("CANTATA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
VIDEO = VideoOptions(Sampling.uniform, 4, 1.0, 64, 0.0, None, 224, 40_000_000, 20_000)
PDF = PdfOptions("all", 0.5, 64, 40_000_000)
NLVR = {"user": "<image>Is it true? {sentence}", "assistant": "{label}"}


def conversations(path: Any, **changes: Any) -> Conversations:
    chosen: dict[str, Any] = {
        "records": RecordKind.auto,
        "format": Format.auto,
        "template": None,
        "root": None,
        "split": Split.all,
        "held_out_share": 0.0,
        "video": VIDEO,
        "pdf": PDF,
    }
    return Conversations(path, **(chosen | changes))


def real(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside the checkout")
    return str(DATA / name)


def read(name: str) -> Any:
    return json.loads(Path(real(name)).read_text(encoding="utf-8"))


def jsonl(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def said(example: Any) -> list[tuple[str, str]]:
    """Role and text of each message, media as their placeholders."""
    assert isinstance(example, Chat)
    marks = {Image.Image: "<image>", Video: "<video>"}
    return [
        (
            message.role,
            "".join(
                part
                if isinstance(part, str)
                else next(mark for kind, mark in marks.items() if isinstance(part, kind))
                for part in message.parts
            ),
        )
        for message in example.messages
    ]


def pixels(image: Any) -> bytes:
    assert isinstance(image, Image.Image)
    return image.tobytes()


def test_real_alpaca() -> None:
    records = read("chat/alpaca_en_demo.json")
    dataset = conversations(real("chat/alpaca_en_demo.json"))
    assert len(dataset) == len(records) == 999
    for record, index in zip(records, range(999), strict=True):
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        assert said(dataset[index]) == [("user", question), ("assistant", record["output"])]


def test_real_tool_calls() -> None:
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    records = read("chat/glaive_toolcall_en_demo.json")
    dataset = conversations(real("chat/glaive_toolcall_en_demo.json"))
    assert len(dataset) == len(records) == 300
    for record, index in zip(records, range(300), strict=True):
        turns = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
        system = (
            [("system", f"Available tools:\n{record['tools']}")] if record["tools"] not in ("", "[]") else []
        )
        assert said(dataset[index]) == system + turns
        assert all(message.weight is None for message in dataset[index].messages)


def test_real_image_conversations() -> None:
    records = read("chat/mllm_demo.json")
    dataset = conversations(real("chat/mllm_demo.json"))
    assert len(dataset) == 6
    for index, record in enumerate(records):
        assert said(dataset[index]) == [(turn["role"], turn["content"]) for turn in record["messages"]]
        images = [
            part for message in dataset[index].messages for part in message.parts if not isinstance(part, str)
        ]
        for image, name in zip(images, record["images"], strict=True):
            assert pixels(image) == Image.open(DATA / "chat" / name).convert("RGB").tobytes()


def test_real_videos_mp4_and_avi() -> None:
    dataset = conversations(real("chat/mllm_video_demo.json"))
    for index, record in enumerate(read("chat/mllm_video_demo.json")):
        assert said(dataset[index]) == [(turn["role"], turn["content"]) for turn in record["messages"]]
        clip = dataset[index].messages[0].parts[0]
        assert isinstance(clip, Video)
        assert len(clip.frames) == 4


def test_real_webdataset() -> None:
    dataset = conversations(real("webdataset/cc12m-0000.tar"))
    assert len(dataset) == 32
    with tarfile.open(real("webdataset/cc12m-0000.tar")) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    stems = list(dict.fromkeys(name.partition(".")[0] for name in contents))
    for index, stem in enumerate(stems):
        image, caption = dataset[index].parts
        assert caption == contents[f"{stem}.txt"].decode()
        assert pixels(image) == Image.open(io.BytesIO(contents[f"{stem}.jpg"])).convert("RGB").tobytes()


def test_real_photos_as_a_folder() -> None:
    dataset = conversations(real("photos"))
    names = sorted(file.name for file in (DATA / "photos").iterdir())
    assert len(dataset) == len(names)
    [image] = dataset[0].parts
    assert pixels(image) == Image.open(DATA / "photos" / names[0]).convert("RGB").tobytes()


def test_real_documents_as_a_folder() -> None:
    sizes = sorted(len(conversations(real("documents"))[index].parts) for index in range(2))
    assert sizes == [9, 23]


def test_real_nlvr_by_a_template() -> None:
    path = real("nlvr_dev.parquet")
    dataset = pickle.loads(pickle.dumps(conversations(path, template=NLVR)))
    [record] = parquet.ParquetFile(path).read_row_group(0).slice(5, 1).to_pylist()
    assert len(dataset) == 5934
    assert said(dataset[5]) == [
        ("user", f"<image>Is it true? {record['sentence']}"),
        ("assistant", str(record["label"])),
    ]
    assert (
        pixels(dataset[5].messages[0].parts[0])
        == Image.open(io.BytesIO(record["image"])).convert("RGB").tobytes()
    )
    with pytest.raises(
        ConfigError, match="hold identifier, sentence, label, image, which is no format known"
    ):
        conversations(path)


def test_embedded_emoji_by_a_template() -> None:
    template = {"user": "<image>Which group?", "assistant": "{group}"}
    dataset = conversations("embedded:twemoji.parquet", template=template)
    assert said(dataset[1]) == [("user", "<image>Which group?"), ("assistant", "Smileys & Emotion")]


def test_built_from_a_config_with_records_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    file = jsonl(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(5)))
    spool = {
        "_target_": "cantata.data.records.spool.Spool",
        "name": "json",
        "config": None,
        "data_files": [file],
        "split": "train",
        "rows": 5,
        "folder": str(tmp_path / "spool"),
    }
    node = {
        "_target_": "cantata.data.conversations.Conversations",
        "path": spool,
        "records": "auto",
        "format": "auto",
        "template": None,
        "root": None,
        "split": "all",
        "held_out_share": 0.0,
        "video": {**vars(VIDEO), "sampling": "uniform"},
        "pdf": vars(PDF),
    }
    dataset = build(node)
    assert [dataset[index] for index in range(5)] == [Document((str(number),)) for number in range(5)]
    assert build({**node, "path": file})[4] == Document(("4",))


def test_folders_as_aria_lays_them_out(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", *(chat(f"train {number}") for number in range(50)))
    train = conversations(str(tmp_path), split=Split.train, held_out_share=0.2)
    held_out = conversations(str(tmp_path), split=Split.held_out, held_out_share=0.2)
    assert len(train) + len(held_out) == 50
    assert 0 < len(held_out) < 25
    jsonl(tmp_path / "test.jsonl", chat("test 0"))
    assert len(conversations(str(tmp_path), split=Split.train)) == 50
    held_out = conversations(str(tmp_path), split=Split.held_out)
    assert [said(held_out[index])[0] for index in range(len(held_out))] == [("user", "test 0")]
    with pytest.raises(ConfigError, match="set held_out_share=0"):
        conversations(str(tmp_path), split=Split.held_out, held_out_share=0.2)
    with pytest.raises(ConfigError, match="name one of the files"):
        conversations(str(tmp_path), split=Split.all)


def test_paths_stay_inside_the_root(tmp_path: Path) -> None:
    inside = tmp_path / "data" / "a.png"
    path = jsonl(
        tmp_path / "data" / "a.jsonl",
        *(
            {**chat("<image>?"), "images": [name]}
            for name in (
                "a.png",
                "../b.png",
                str(tmp_path / "b.png"),
                "https://x.org/a.png",
                "gone.png",
                "a.jsonl",
            )
        ),
    )
    for name in (inside, tmp_path / "b.png"):
        Image.new("RGB", (2, 2)).save(name)
    dataset = conversations(path)
    assert said(dataset[0])[0] == ("user", "<image>?")
    reasons = []
    for index in range(1, len(dataset)):
        with pytest.raises(DataError) as caught:
            dataset[index]
        reasons.append(caught.value.reason)
    assert reasons == ["path outside the root"] * 2 + ["remote file", "missing file", "corrupt image"]
    assert said(conversations(path, root=str(tmp_path))[2])[0] == ("user", "<image>?")


def test_rows_without_a_root_name_no_files(tmp_path: Path) -> None:
    class Rows:
        root = None

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": "pyproject.toml", "text": "x"}

    with pytest.raises(DataError, match="missing file"):
        conversations(Rows())[0]


def test_odd_records_are_data_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    jsonl(
        path, chat("?"), {"odd": 1}, {"messages": [{"role": "user", "content": float("nan")}]}, "text", None
    )
    with path.open("ab") as file:
        file.write(b'{"messages": [{"ro')
    dataset = conversations(str(path))
    reasons = []
    for index in range(1, len(dataset)):
        with pytest.raises(DataError) as caught:
            dataset[index]
        reasons.append(caught.value.reason)
    assert reasons == ["unknown format", "bad text", "bad json", "bad json", "bad json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no record: it is empty"),
        (b"{broken\n", r"no record: none of the first 1 can be read, bad json \(line 1"),
        (b"PAR1\0\0\xff\n" * 40, "none of the first 16 can be read"),
        (b'{"a": 1}\n', "the records hold a, which is no format known"),
    ],
)
def test_files_without_a_format(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        conversations(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_are_checked_at_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"sentence": "x"})
    with pytest.raises(ConfigError, match="asks for label; the records hold sentence"):
        conversations(path, template={"user": "{sentence}", "assistant": "{label}"})
    with pytest.raises(ConfigError, match="set one of them"):
        conversations(path, template=NLVR, format=Format.text)


def test_an_image_folder_with_metadata(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (9, 0, 0)).save(tmp_path / "a.png")
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["a.png", "dark red"]])
    image, text = conversations(str(tmp_path))[0].parts
    assert (image.getpixel((0, 0)), text) == ((9, 0, 0), "dark red")


def tiny(folder: Path, kind: str) -> Path:
    """A file of four image conversations."""
    red = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(red, "PNG")
    rows = [{**chat("<image>?", f"answer {number}"), "images": [red.getvalue()]} for number in range(4)]
    path = folder / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number in range(4):
                for ending, data in (
                    ("png", red.getvalue()),
                    ("json", json.dumps(chat("<image>?")).encode()),
                ):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return path
    address = "data:image/png;base64," + base64.b64encode(red.getvalue()).decode()
    texts = [json.dumps({**row, "images": [address]}) for row in rows]
    path.write_text("\n".join(texts) if kind == "jsonl" else f"[{','.join(texts)}]")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_damaged_files_give_samples_or_reasons(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = tiny(tmp_path, kind)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole)))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        noise = data.draw(st.binary(min_size=1, max_size=40))
        damaged = whole[:place] + noise + whole[place + len(noise) :]
    path.write_bytes(damaged)
    renamed = data.draw(st.sampled_from(list(RecordKind)))
    try:
        dataset = conversations(str(path), records=renamed)
    except ConfigError as error:
        message = str(error)
    else:
        assert len(dataset) <= len(whole)
        message = ""
        for index in range(len(dataset)):
            with contextlib.suppress(DataError):
                dataset[index]
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, kind: str) -> None:
    dataset = conversations(str(tiny(tmp_path, kind)))
    assert len(dataset) == 4
    assert said(dataset[3])[0] == ("user", "<image>?")
    assert dataset[3].messages[0].parts[0].getpixel((0, 0)) == (255, 0, 0)
