"""Search a preset's dials on the cluster. The arguments are those of `rayrec tune`; paths are absolute.

ray job submit --working-dir . -- python jobs/tune.py /data/dataset /data/tune --trials 64 --gpu
"""

import sys

from rayrec.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
