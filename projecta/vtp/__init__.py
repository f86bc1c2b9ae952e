"""Vision token pruning (VTP): keep some tokens of a vision transformer, and drop or merge the others.

`plan`, `scores` and `fusion` are pure tensor functions. `pruning` attaches a plan to a model of transformers,
`towers` describes these models, and `draw` shows the result.
"""

from projecta.vtp.draw import draw
from projecta.vtp.fusion import FUSIONS, Pruned
from projecta.vtp.plan import PRESETS, VIT_B16, Costs, Plan
from projecta.vtp.pruning import Pruning, prune
from projecta.vtp.scores import MODEL_SCORES, SCORES, View, attention_scores

__all__ = [
    "FUSIONS", "MODEL_SCORES", "PRESETS", "SCORES", "VIT_B16", "Costs", "Plan", "Pruned", "Pruning", "View",
    "attention_scores", "draw", "prune",
]  # fmt: skip
