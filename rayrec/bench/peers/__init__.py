"""Recommenders that rayrec is held against, a script each; rayrec itself takes the same way to the judge.

A script is run as `python SCRIPT DATA OUT SETTINGS` by the Python of an environment that holds the library; nothing of
rayrec need be in it. DATA holds `train.parquet` (user_id, item, place: every training event, in order),
`ask-valid.parquet`, `ask-test.parquet` (user_id, items: what a user did until then, oldest first; that of validation
also target: what came next, to stop early by), and for a peer that asks for them `pictures.npy` [M, S, S, 3] uint8 with
`picture_items.npy` [M]. SETTINGS is JSON: "seed", "minutes" of CPU for training at most (0 is no limit), and what the
script knows. It writes `lists-valid.parquet`, `lists-test.parquet` (user_id, items: the best 100 first, nothing that
the user has seen; scores: how good each is, if it can say) and `facts.json` ("version", "train_cpu_s", "lists_s": the
seconds of both splits' lists, reading and writing left out; where it validates, "curve": pairs of the CPU seconds of
training and NDCG@10 by then).
"""
