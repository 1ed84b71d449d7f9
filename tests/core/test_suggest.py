from cantata.core.suggest import hint, nearest


def test_nearest_finds_the_likely_name() -> None:
    assert nearest("max_stpes", ["max_steps", "log_every"]) == "max_steps"
    assert nearest("zzz", ["max_steps"]) is None


def test_hint_names_the_nearest_or_all_there_is() -> None:
    assert hint("enigne", ["engine", "mesh"]) == "; nearest: engine"
    assert hint("zzz", ["mesh", "engine"]) == "; known: engine, mesh"
    assert hint("zzz", []) == ""
