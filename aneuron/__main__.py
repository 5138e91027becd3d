"""`python -m aneuron`, the same as `aneuron`."""

from aneuron.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
