"""`python -m stableopd` is the command `stableopd`."""

from stableopd.cli import main

if __name__ == "__main__":
    main()
