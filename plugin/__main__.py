"""`blackwell-kernels` and `python -m blackwell_kernels`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command and exit: 0 ok, 1 check failed, 2 usage, 3 environment."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["doctor"]:  # must work where nothing else does, typer included
        from blackwell_kernels import doctor

        sys.exit(doctor.main(arguments[1:]))
    try:
        from blackwell_kernels import cli
    except ModuleNotFoundError as error:
        print(f"blackwell-kernels needs the package {error.name}: pip install {error.name}", file=sys.stderr)
        print("next: blackwell-kernels doctor", file=sys.stderr)
        sys.exit(3)
    sys.exit(cli.run(arguments))


if __name__ == "__main__":
    main()
