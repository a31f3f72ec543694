"""`python -m widefield` is the command line."""

from __future__ import annotations

from widefield.cli import main

if __name__ == "__main__":
    main()
