"""Train a ranker on the cluster. The arguments are those of `rayrec train`; paths are absolute or URIs.

ray job submit --working-dir . -- python jobs/train.py /data/dataset /data/bundles --workers 8 --gpu --wait 600
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
