from cantata.data.drops import sum_drops, sum_reads


def test_counts_add_up_by_source_and_reason() -> None:
    parts = [{"a": {"too long": 1}}, {}, {"a": {"too long": 2, "corrupt image": 1}, "b": {"no text": 4}}]
    assert sum_drops(parts) == {"a": {"too long": 3, "corrupt image": 1}, "b": {"no text": 4}}


def test_nothing_dropped_is_nothing() -> None:
    assert sum_drops([]) == {}


def test_reads_add_up() -> None:
    assert sum_reads([{"a": 2, "b": 1}, {}, {"a": 3}]) == {"a": 5, "b": 1}
