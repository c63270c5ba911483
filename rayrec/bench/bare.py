"""The service in one process under uvicorn, without Ray and without a proxy.

`python -m rayrec.bench.bare BUNDLE STATE PORT [SETTING...]`. In: a bundle, a state URL, a port, settings as `--set`
takes them. Out: the same application as a replica of Ray Serve.
"""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI

from rayrec.bundle import Bundle
from rayrec.config import ServeConfig
from rayrec.serving.editing import editor
from rayrec.serving.pictures import Pictures
from rayrec.serving.scorer import load_scorer
from rayrec.serving.web import create_app
from rayrec.settings import with_settings
from rayrec.state import open_state


def application(bundle_path: str, state_url: str, settings: list[str]) -> FastAPI:
    """The application, with one thread for the model as in a replica."""
    torch.set_num_threads(1)
    bundle = Bundle.open(bundle_path)
    config = with_settings(ServeConfig(), settings)
    scorer, state = load_scorer(bundle), open_state(state_url)
    return create_app(scorer, state, config, model=bundle.version, image_of=Pictures(bundle), edit=editor(bundle))


if __name__ == "__main__":
    app = application(sys.argv[1], sys.argv[2], sys.argv[4:])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning", access_log=False)
