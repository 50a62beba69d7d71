"""From vectors to numbers: does a step help?

Read metrics (formulas on arrays), then sentences (an encoder and a file to scores).
"""

from .metrics import ranks, spearman
from .sentences import cosine_scores, sts_score

__all__ = ["cosine_scores", "ranks", "spearman", "sts_score"]
