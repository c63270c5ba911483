"""What other servers wrap: the same ranker, on the same state, answering a batch in the same words. Needs no Ray."""

import time
from dataclasses import asdict

import torch

from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.ranking.pipeline import Ranker
from rayrec.serving import wire
from rayrec.serving.live import Cards
from rayrec.serving.scorer import load_scorer
from rayrec.state import open_state


class RankerOfBundle:
    """Ranks, and logs what is shown, as a replica does."""

    def __init__(self, bundle_path, state_url):
        torch.set_num_threads(1)
        bundle = Bundle.open(bundle_path)
        self.config = ServeConfig()
        self.ranker = Ranker(load_scorer(bundle), self.config, model=bundle.version)
        self.cards = Cards(self.ranker.catalogue, with_images=False)
        self.state = open_state(state_url)

    def request(self, body):
        """From a body as sent, checked."""
        sent = wire.RecommendRequest.model_validate(body)
        return wire.request_of(sent, time.time_ns() // 1_000_000, self.config.clock_skew_s)

    def answers(self, requests):
        """A body for each request."""
        return [
            {
                "request_id": answer.request_id,
                "model": answer.model,
                "served_by": answer.served_by,
                "items": [self.cards.of(item.item_id) | asdict(item) for item in answer.items],
                "removed": answer.removed,
                "timing_ms": {stage: round(ms, 3) for stage, ms in answer.timing_ms.items()},
            }
            for answer in self.ranker.recommend(requests, self.state)
        ]
