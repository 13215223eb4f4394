"""python -m locality_probe is the command locality-probe."""

from locality_probe.cli import main

if __name__ == "__main__":
    main()
