"""The ranker behind BentoML, one worker: `python FILE BUNDLE STATE PORT BATCH`. That worker imports it, too."""

import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the worker is another process, which is told by its environment
    names = ("RANKER_BUNDLE", "RANKER_STATE", "RANKER_PORT", "RANKER_BATCH")
    os.environ.update(zip(names, sys.argv[1:], strict=True))

import bentoml
from ranker_of_bundle import RankerOfBundle

from rayrec.serving import wire

BATCH = int(os.environ["RANKER_BATCH"])


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Lists:
    """One list a request, ranked together with what else has come."""

    def __init__(self) -> None:
        self.ranker = RankerOfBundle(os.environ["RANKER_BUNDLE"], os.environ["RANKER_STATE"])

    @bentoml.api(route="/v1/recommend", batchable=True, max_batch_size=BATCH, max_latency_ms=2000)
    def recommend(self, requests: list[wire.RecommendRequest]) -> list[dict[str, Any]]:
        """Bodies are checked already: they are of the wire's type."""
        config, now_ms = self.ranker.config, time.time_ns() // 1_000_000
        return self.ranker.answers([wire.request_of(sent, now_ms, config.clock_skew_s) for sent in requests])


if __name__ == "__main__":
    command = ["-m", "bentoml", "serve", f"{Path(__file__).stem}:Lists", "--working-dir", str(Path(__file__).parent)]
    command += ["--host", "127.0.0.1", "--port", os.environ["RANKER_PORT"]]
    os.execv(sys.executable, [sys.executable, "-W", "ignore", *command])
