"""Names of contestants: as short as tells them apart, and never the same for two."""

from dit.drawing import told_apart


def test_names_tell_contestants_apart() -> None:
    teacher, strong, student = ("t 16 steps", "euler", "s=1"), ("t 16 steps", "euler", "s=3"), ("s 4 steps", "euler", "s=1")
    assert told_apart([teacher]) == ["t 16 steps"]
    assert told_apart([teacher, student]) == ["t 16 steps", "s 4 steps"]
    assert told_apart([teacher, strong, student]) == ["t 16 steps s=1", "t 16 steps s=3", "s 4 steps s=1"]
    assert told_apart([teacher, teacher, student]) == ["t 16 steps no. 1", "t 16 steps no. 2", "s 4 steps"]
