"""`python -m polyshard`: the command line, where the `polyshard` script is not on the path."""

from polyshard.cli import main

if __name__ == "__main__":
    main()
