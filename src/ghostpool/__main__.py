"""`python -m ghostpool` is the `ghostpool` command."""

from __future__ import annotations

from ghostpool._cli import main

if __name__ == "__main__":
    main()
