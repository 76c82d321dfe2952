"""`python -m stallfree` is the `stallfree` command."""

from stallfree.cli import main

main()
