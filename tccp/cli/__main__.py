"""`python -m tccp.cli`."""

from tccp.cli import main

if __name__ == "__main__":
    main()
