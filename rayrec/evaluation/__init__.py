"""How good a ranker is: metrics, floors, the replay of what users did, and a report. Only `shards` knows Ray."""

from rayrec.evaluation.floors import Markov, Popular, Ranker
from rayrec.evaluation.judge import evaluate, summarise
from rayrec.evaluation.replay import ReplaySettings, replay

__all__ = ["Markov", "Popular", "Ranker", "ReplaySettings", "evaluate", "replay", "summarise"]
