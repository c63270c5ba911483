"""Serve a bundle from the cluster. The arguments are those of `rayrec serve`; paths are absolute or URIs.

ray job submit --working-dir . -- python jobs/serve.py /data/bundles --max-replicas 8
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
