"""`python -m rayrec`."""

from rayrec.cli import main

main()
