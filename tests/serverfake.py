"""Runs the real server on the fake scorer: what the tests of the service start as a process of its own."""

from __future__ import annotations

import os
import sys

from rayrec.config import ServeConfig
from rayrec.serving.app import run_server
from rayrec.settings import with_settings

if __name__ == "__main__":
    bundle, state_url, port, *settings = sys.argv[1:]
    run_server(
        bundle,
        state_url=state_url,
        config=with_settings(ServeConfig(), settings),
        port=int(port),
        loader=os.environ.get("RAYREC_TEST_LOADER", "shopfake:load_fake"),
        watch=True,
        on_ready=lambda url: print(f"ready {url}", flush=True),
    )
