"""Comparisons with other ways of doing the same, measured side by side on this machine."""
