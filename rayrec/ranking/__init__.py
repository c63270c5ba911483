"""From a request to a list: retrieve, filter, score, re-rank, explain. No Ray, no web, no files."""
