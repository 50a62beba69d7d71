"""From vectors to numbers: does a step help?

Read metrics (formulas on arrays), sentences and words (an encoder and a file to scores), compare (several encoders,
intervals, tests); then analysis (what changes inside) and doctor (is it silently wrong?).
"""

from .compare import evaluate
from .metrics import spearman
from .sentences import cosine_scores, sts_score

__all__ = ["cosine_scores", "evaluate", "spearman", "sts_score"]
