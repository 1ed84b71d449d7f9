import pytest

from cantata.core.launcher import without_local_rank


@pytest.mark.parametrize("added", ["--local_rank=0", "--local-rank=13"])
def test_the_launchers_argument_goes_and_the_users_stay(added: str) -> None:
    mine = ["recipes/pretrain.py", "experiment=aria_mini", "name=--local_rank=0", "--cfg", "job"]
    assert without_local_rank([mine[0], added, *mine[1:]]) == mine
