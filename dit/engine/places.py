"""Where the elements of a parameter lie in the flat tensors of a rank."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Elements [start, start + size) of flattened parameter `name` lie in flat tensor `group` from `offset` on."""

    name: str
    start: int
    size: int
    group: int
    offset: int

    def cut(self, low: int, high: int) -> "Place":
        """The part of it in [low, high) of its flat tensor; its size is not positive if there is none."""
        first, last = max(low, self.offset), min(high, self.offset + self.size)
        return Place(self.name, self.start + first - self.offset, last - first, self.group, first)
