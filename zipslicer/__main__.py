"""python -m zipslicer."""

from .cli import main

raise SystemExit(main())
