"""What the challenge counts, exactly as its evaluation defines it; each score in a file of its own name."""

from sitreg_lumir.metrics.dsc import dsc
from sitreg_lumir.metrics.hd95 import hd95
from sitreg_lumir.metrics.labels import values_outside, warp_nearest
from sitreg_lumir.metrics.ndv import ndv
from sitreg_lumir.metrics.pair_scores import METRICS, score_pair
from sitreg_lumir.metrics.pair_table import CONTRASTS, PairTable, mean_scores
from sitreg_lumir.metrics.tre import tre

__all__ = [
    "CONTRASTS", "METRICS", "PairTable", "dsc", "hd95", "mean_scores", "ndv", "score_pair", "tre", "values_outside",
    "warp_nearest",
]  # fmt: skip
