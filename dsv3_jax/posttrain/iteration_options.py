"""What expert iteration keeps of its attempts, as options of a command. Loads no JAX."""

from dataclasses import dataclass

from dsv3_jax.posttrain.synthesis_options import Selection


@dataclass(frozen=True)
class Keeping:
    """How many and which."""

    keep: int = 4
    """Most samples of a statement, over all rounds; earlier ones stay"""
    near_duplicates: float = 0.0
    """Share of common word n-grams from which a later sample goes; 0: none goes, since formal
    proofs are much alike"""
    near_ngram: int = 5
    """Words and symbols of each of these n-grams"""
    contamination_ngram: int = 13
    """Words in a row that a sample may not share with a text of --decontaminate"""

    def selection(self) -> Selection:
        """For `select`."""
        how = self.near_duplicates, self.near_ngram, self.contamination_ngram
        return Selection(self.keep, "first", *how)

    def check(self) -> None:
        """ValueError, in the names of the options."""
        self.selection().check()
