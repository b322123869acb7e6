"""Write the table of SB3's contract into the docs: ``python tests/contract_table.py docs/sb3-contract.md``."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HEAD = """# SB3's contract

Written by `python tests/contract_table.py docs/sb3-contract.md` from `tests/test_sb3_contract.py`. sb3-contrib's ARS
stands beside EGGROLL as a control.

"""


class Collector:
    """Gathers what each test says of each algorithm."""

    def __init__(self):
        self.found, self.lines = {}, {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.lines[item.originalname] = " ".join(item.function.__doc__.split())

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            test = re.match(r".*::(\w+)", report.nodeid)[1]
            name = re.search(r"\[(?:.*-)?((?:EGGROLL|ARS), \w+)\]", report.nodeid)[1]
            reason = getattr(report, "wasxfail", "")
            said = f"no: {reason.removeprefix('reason: ')}" if reason else "yes" if report.passed else report.outcome
            self.found.setdefault(test, {}).setdefault(name, []).append(said)


def main():
    collector = Collector()
    status = pytest.main(["-q", str(HERE / "test_sb3_contract.py")], plugins=[collector])
    names = sorted({name for of_test in collector.found.values() for name in of_test}, reverse=True)
    rows = ["| line of the contract | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for test, of_test in collector.found.items():
        cells = ["; ".join(sorted(set(of_test[name]))) for name in names]
        rows.append(f"| {collector.lines[test]} | " + " | ".join(cells) + " |")
    if status == 0:  # else a mark is wrong, or something else is
        Path(sys.argv[1]).write_text(HEAD + "\n".join(rows) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
