"""The processes that train one model together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process among `size`; `rank` 0 writes the files."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0
