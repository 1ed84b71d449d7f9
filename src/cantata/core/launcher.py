"""What launchers add to the command line that is not the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """`arguments` without `--local_rank=N`.

    The deepspeed launcher puts it before the user's own arguments, beside the variable `LOCAL_RANK`
    that says the same; a recipe's parser knows no such option.
    """
    return [argument for argument in arguments if not _LOCAL_RANK.fullmatch(argument)]
