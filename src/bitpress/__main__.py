"""`python -m bitpress` is the command line."""

from bitpress.cli.app import main

if __name__ == "__main__":
    main()
