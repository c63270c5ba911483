"""Retrain on the cluster: once, or each night. The arguments are those of `rayrec retrain`; paths are absolute or URIs.

ray job submit --working-dir . -- python jobs/retrain.py /data/bundles /data/dataset --state redis://HOST:6379/0
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["retrain", *sys.argv[1:]])
