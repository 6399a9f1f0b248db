"""Compare finished runs and write the report: `python -m kd.compare outputs/NAME`, or `kd-compare outputs/NAME`."""

import argparse
import sys

from kd.errors import KDError


def main() -> None:
    """Run the command line; exit with the code of what went wrong (see `kd.errors`)."""
    try:
        print(compare(sys.argv[1:]))
    except KDError as error:
        print(f"kd-compare: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def compare(command_line: list[str]) -> str:
    """Return the tables and the verdict on the runs that a command line names, and write their report.

    Raises:
        KDError: of the kind that fits, if there are no runs or a folder cannot be read or written.
    """
    arguments = _parser().parse_args(command_line)
    from kd.analysis.report import write_report  # here, so that --help does not wait for pandas and scipy

    return write_report(*arguments.paths, nuisance=arguments.best_of).text()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kd-compare",
        description="Compare finished runs: which setting is best, which cannot be told from it, and what they cost. "
        "Writes reports/report.html (and .md, .csv, .png) into the experiment's folder.",
    )
    parser.add_argument(
        "paths", nargs="*", default=["outputs"], help="outputs (default), outputs/<name>, or single runs, in any mix"
    )
    parser.add_argument(
        "--best-of",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        default=[],
        metavar="SETTINGS",
        help="compare the other settings each at its own best value of these, like learning_rate,warmup_steps; the "
        "choice is made on the validation part and counted in the intervals. Goes to reports/best_of/",
    )
    return parser


if __name__ == "__main__":
    main()
