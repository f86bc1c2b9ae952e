"""`python -m projecta` is the `projecta` command."""

from projecta.regress.cli import main

main()
