"""Judge a bundle on the cluster. The arguments are those of `rayrec evaluate`; paths are absolute or URIs.

ray job submit --working-dir . -- python jobs/evaluate.py /data/bundles /data/dataset --json
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
