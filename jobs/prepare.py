"""Prepare a raw folder on the cluster. The arguments are those of `rayrec prepare`; paths are absolute or URIs.

ray job submit --working-dir . -- python jobs/prepare.py /data/shop /data/dataset
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
