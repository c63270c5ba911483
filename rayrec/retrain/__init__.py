"""Retraining: what was served and done becomes the next bundle, if that is no worse. One command, run each night.

    rayrec retrain BUNDLES DATASET [--state URL]      the state of `rayrec serve BUNDLES`, if it is left out

1. Export (`exports`). What the state holds and earlier exports do not, by event id, into files of their own in one raw
   folder (`--raw`); items that the shop changed or added live go with it as a catalogue, whole rows.
2. Add: `prepare --add` of that folder. Before, what visitors did who were erased since leaves exports and dataset, and
   what they did in sessions that were known to be theirs. Bundles that learned from it stay until others replace them.
3. Train, from the weights and with the settings of the current bundle (`--set` and options change some); unpublished.
4. Judge (`comparison`). Both bundles get the same questions: what visitors of the newest day did next. A question is a
   target of the dataset's test split; no bundle that was trained on the dataset, as it is or as it was, has learned
   from it. By leave-one-out (the default of prepare) the candidate knows what others did on that day, which favours it
   by what is in fashion that day. By a split by time neither knows anything of the test window; the price is that the
   newest events are learned from later. The current bundle ranks items that it never met by attributes and pictures,
   as the service does with items that are put live. Where fewer than `--least` visitors have a question, older targets
   make up for it.
5. Publish, if NDCG@10 of the next item lacks at most the share `--margin` of the current bundle's. The verdict goes
   into the candidate's lineage first. The live service is told by the state, and `serve --watch` by CURRENT.

Files alone say how far a run came, and each step leaves the old or the new: an export lies there or not, a dataset is
added to or not, a training has a checkpoint, a candidate has a verdict or none. The same command, given again, goes on
at the first step that is not done; without news it ends at once. A file lock (`alone`) keeps a second run out. At a
URI, where there are no locks, a dataset that changed meanwhile is refused in step 2 and another CURRENT in step 5. All
verdicts, a refusal too, exit with 0: the job has done its work.
"""
