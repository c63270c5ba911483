"""Recommenders that rayrec is held against, a script each, and rayrec itself in the same form.

A script is run as `python SCRIPT DATA OUT SETTINGS` by the Python of an environment that holds the library; nothing of
rayrec need be in it. DATA holds `train.parquet` (user_id, item, place: every training event, in order) and
`ask-valid.parquet`, `ask-test.parquet` (user_id, items: what a user did until then, oldest first). SETTINGS is JSON:
"seed", "minutes" of training at most (0 is no limit), and what the script knows. It writes `lists-valid.parquet`,
`lists-test.parquet` (user_id, items: the best 100 first, nothing that the user has seen) and `facts.json`.
"""
