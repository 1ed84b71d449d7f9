import pytest

from cantata.core.errors import ConfigError
from cantata.core.samples import DataError
from cantata.data.formats.template import Template
from tests.data.formats.helpers import MEDIA, turns

NLVR = {"user": "<image>Is it true? {sentence}", "assistant": "{label}"}


def test_turns_from_columns() -> None:
    record = {"image": b"raw", "sentence": "All {dots} are red.", "label": True}
    assert turns(Template(NLVR)(record, MEDIA)) == [
        ("user", ("image", b"raw"), "Is it true? All {dots} are red."),
        ("assistant", "True"),
    ]
    with pytest.raises(DataError, match="unknown format"):
        Template(NLVR)({**record, "label": None}, MEDIA)
    with pytest.raises(DataError, match="wrong number of images"):
        Template(NLVR)({"sentence": "x", "label": False}, MEDIA)


@pytest.mark.parametrize("turns", [{"king": "x"}, {"user": "{"}, {"user": "{}"}, {"user": "{a.__class__}"}])
def test_bad_templates(turns: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"template\."):
        Template(turns)
