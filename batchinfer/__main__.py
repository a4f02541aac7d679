"""``python -m batchinfer``: the command line."""

from batchinfer.cli import main

if __name__ == "__main__":
    main()
