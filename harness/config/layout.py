"""Where each rank of a world stands: its pipeline stage, its replica, and its part of each layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`size` ranks in `stages` pipeline stages. The ranks of a stage are consecutive, as in DeepSpeed's topology.
    Within a stage, the `tp_size` ranks that share each layer are consecutive too.
    """

    size: int = 1
    stages: int = 1
    tp_size: int = 1

    @property
    def dp_size(self) -> int:
        """The number of replicas: whole models, which have different data."""
        return self.size // (self.stages * self.tp_size)

    def stage(self, rank: int) -> int:
        """The pipeline stage of `rank`."""
        return rank // (self.dp_size * self.tp_size)

    def dp_rank(self, rank: int) -> int:
        """The replica of which `rank` is a part."""
        return rank // self.tp_size % self.dp_size

    def tp_rank(self, rank: int) -> int:
        """The part of each layer that `rank` has."""
        return rank % self.tp_size

    def rank(self, stage: int, dp_rank: int = 0, tp_rank: int = 0) -> int:
        """The rank at this place."""
        return (stage * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def of_stage(self, stage: int) -> range:
        """The ranks of `stage`."""
        return range(self.rank(stage), self.rank(stage + 1))
